"""Run folders: nothing finished is overwritten, nothing interrupted is lost, and a pulled run is
the run.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_lightning import json_files, runs
from spd_lightning.errors import BadInput
from spd_lightning.runs.files import held
from spd_lightning.runs.lineage import lineage
from spd_lightning.runs.trackers import check_inside
from spd_lightning.store import Store, Writer, prompt_hash

SETTINGS = {"model": {"C": 20}, "seed": 0}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "runs"


def finish(claimed: runs.RunLock, **summary: float) -> Path:
    runs.write_json(claimed.path / "summary.json", summary)
    claimed.release()
    return claimed.path


def harvest(path: Path) -> None:
    """A harvest of two prompts."""
    writer = Writer(path, {"harvest": path.name, "layers": ["input", "output"]})
    columns = {
        "token_ids": [[1], [2]],
        "tokens": [["a"], ["b"]],
        "source": ["x", "y"],
        "split": ["p", "p"],
    }
    prompts = pl.DataFrame({"prompt_id": [prompt_hash(b"1"), prompt_hash(b"2")]} | columns)
    types_ = {"prompt_id": pl.UInt64, "token_ids": pl.List(pl.UInt32)}
    writer.write(
        {
            "prompts": prompts.with_columns(
                pl.col(name).cast(dtype) for name, dtype in types_.items()
            )
        }
    )
    writer.complete()


# Claiming.


def test_states_of_a_run(root):
    claimed = runs.acquire_run("tms", SETTINGS)
    assert claimed.path == root / "tms"
    assert claimed.run.state == "running"
    claimed.release()
    assert claimed.run.state == "interrupted"
    finish(claimed, mmcs=0.99)
    assert claimed.run.state == "finished"
    assert claimed.run.summary == {"mmcs": 0.99}


def test_a_finished_run_is_never_claimed_again(root):
    first = finish(runs.acquire_run("tms", SETTINGS))
    second = runs.acquire_run("tms", SETTINGS)
    assert (second.path, second.resumed) == (root / "tms-2", False)
    finish(second)
    assert runs.acquire_run("tms", SETTINGS).path == root / "tms-3"
    assert sorted(path.name for path in first.iterdir()) == [".lock", "run.json", "summary.json"]


def test_an_interrupted_run_with_the_same_settings_goes_on(root):
    finish(runs.acquire_run("tms", SETTINGS))
    runs.acquire_run("tms", SETTINGS).release()
    again = runs.acquire_run("tms", dict(reversed(SETTINGS.items())))
    assert (again.path, again.resumed) == (root / "tms-2", True)


def test_an_interrupted_run_with_other_settings_is_left_alone(root):
    runs.acquire_run("tms", SETTINGS).release()
    other = runs.acquire_run("tms", SETTINGS | {"seed": 1})
    assert (other.path, other.resumed) == (root / "tms-2", False)
    assert runs.acquire_run("tms", SETTINGS).path == root / "tms"


@pytest.mark.parametrize(
    "reached", [None, "metrics.jsonl", "checkpoints", "decomposition.safetensors", "summary.json"]
)
def test_a_start_that_failed_leaves_no_folder_behind(root, reached):
    """Only a folder in which nothing was reached is taken away; the next try then has its name."""
    claimed = runs.acquire_run("tms", SETTINGS)
    (claimed.path / "config.yaml").write_text("{}")
    if reached:
        (claimed.path / reached).touch()
    claimed.release_and_discard()
    claimed.release_and_discard()
    assert claimed.path.exists() == (reached is not None)
    assert not held(claimed.path)


def test_further_devices_share_the_claim_of_the_first(root, monkeypatch):
    """Lightning runs the command again for each device, with its LOCAL_RANK: they work on one
    run.
    """
    first = runs.acquire_run("tms", SETTINGS)
    code = (
        "from spd_lightning import runs; c = runs.acquire_run('tms', {'any': 1}); print(c.path); "
        "c.release_and_discard()"
    )
    for rank, path in (("1", root / "tms"), ("0", root / "tms-2")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(path)
    assert first.run.state == "running"
    first.release()
    assert "SPD_CLAIM" not in os.environ


def test_a_run_that_somebody_works_on_is_passed_by(root, caplog):
    first = runs.acquire_run("tms", SETTINGS)
    with caplog.at_level("INFO"), runs.acquire_run("tms", SETTINGS) as second:
        assert second.path == root / "tms-2"
    assert "run tms: another process is working on it" in caplog.text
    assert first.run.state == "running"
    assert second.run.state == "interrupted"


def test_a_folder_that_is_not_ours_is_not_touched(root):
    (root / "tms").mkdir(parents=True)
    (root / "tms" / "notes.txt").write_text("mine")
    assert runs.acquire_run("tms", SETTINGS).path == root / "tms-2"
    assert [path.name for path in (root / "tms").iterdir()] == ["notes.txt"]


def test_families_with_numbers_in_their_names_do_not_mix(root):
    """tms_5-2 is a model of its own, not the second run of tms_5."""
    runs.acquire_run("tms_5-2", SETTINGS).release()
    assert runs.acquire_run("tms_5", SETTINGS).path == root / "tms_5"
    assert runs.acquire_run("tms_5", SETTINGS | {"seed": 1}).path == root / "tms_5-3"
    assert runs.acquire_run("tms_5-2", SETTINGS).resumed


@pytest.mark.parametrize(
    "name", ["", "a/b", "../a", "..", ".hidden", "-x", "a b", "ü", "x" * 101, "targets", "a\n"]
)
def test_names_that_cannot_be(root, name):
    with pytest.raises(BadInput, match="run name"):
        runs.acquire_run(name, SETTINGS)
    assert not root.exists()


CLAIMER = """
import sys
from spd_lightning import runs
print("ready", flush=True)
sys.stdin.readline()
claimed = runs.acquire_run("tms", {"a": 1})
print(claimed.path.name, claimed.resumed, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def claimers() -> Iterator[list[subprocess.Popen]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", CLAIMER], **pipes) for _ in range(4)]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_processes_that_race_get_a_folder_each(claimers, root):
    def tell(processes: list[subprocess.Popen]) -> list[str]:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return sorted(line_of(process).strip() for process in processes)

    assert {line_of(process) for process in claimers} == {"ready\n"}
    assert tell(claimers[:3]) == ["tms False", "tms-2 False", "tms-3 False"]
    assert {run.state for run in runs.runs()} == {"running"}
    for process in claimers[:3]:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert {run.state for run in runs.runs()} == {"interrupted"}  # the lock died with the process
    assert tell(claimers[3:]) == ["tms True"]


# Finding.


def test_newest_is_the_one_that_finished_last(root):
    first = runs.acquire_run("tms", SETTINGS)
    second = runs.acquire_run("tms", SETTINGS | {"seed": 1})
    with pytest.raises(BadInput, match=r"none has finished \(tms is running, tms-2 is running\)"):
        runs.newest("tms")
    finish(second)
    assert runs.newest("tms").name == "tms-2"
    finish(first)
    os.utime(second.path / "summary.json", (1, 1))
    runs.acquire_run("tms", SETTINGS)
    assert runs.newest("tms").name == "tms"
    with pytest.raises(BadInput, match=r"run 'tmss': not in .*did you mean 'tms'"):
        runs.newest("tmss")


def test_the_command_that_harvests_from_a_run(root):
    """It names the run unless its config names it already, and a config that can be found."""
    first = runs.acquire_run("tms", SETTINGS).run
    assert first.predict_command() == "python -m spd_lightning predict --config tms.yaml"
    second = runs.acquire_run("tms", SETTINGS | {"seed": 1}).run
    for run in (first, second):
        command = run.predict_command("graphs.yaml")
        assert command.endswith(f"--config tms.yaml --config graphs.yaml --run {run.name}")
    own = runs.acquire_run("a-name-of-mine", SETTINGS).run
    config = own.path / "config.yaml"
    assert own.predict_command().endswith(f"--config {config} --run a-name-of-mine")


def test_a_reference_is_a_name_or_a_path(root, tmp_path, monkeypatch):
    path = finish(runs.acquire_run("tms", SETTINGS))
    harvest(path / "harvest" / "graphs")
    harvest(tmp_path / "bare")
    assert runs.find("tms").path == path
    assert runs.find(str(path)).harvests == [path / "harvest" / "graphs"]
    for bare in (tmp_path / "bare", path / "harvest" / "graphs"):
        run = runs.find(str(bare))
        assert (run.harvests, run.state, run.summary, run.config) == ([bare], "finished", {}, {})
        assert run.metrics().is_empty()
    monkeypatch.chdir(tmp_path)
    assert runs.find("bare").name == "bare"
    with pytest.raises(BadInput, match=r"run 'tmz': not in .*did you mean 'tms'"):
        runs.find("tmz")
    target = root / "targets" / "tms-1"
    target.mkdir(parents=True)
    (target / "target.json").write_text("{}")
    (target / "metrics.jsonl").write_text("")
    for folder in (root, target):
        with pytest.raises(BadInput, match="not a run or a harvest"):
            runs.find(str(folder))
    with pytest.raises(BadInput, match="run '': not in"):
        runs.find("")


def test_the_list_of_runs_survives_broken_folders(root, caplog):
    for number, name in enumerate(("old", "broken", "new")):
        path = finish(runs.acquire_run(name, SETTINGS))
        for file in path.iterdir():
            os.utime(file, (number, number))
    for name in ("summary.json", "run.json"):
        (root / "broken" / name).write_text("{")
        os.utime(root / "broken" / name, (1, 1))
    (root / "broken" / "config.yaml").mkdir()
    os.utime(root / "broken" / "config.yaml", (1, 1))
    (root / "broken" / "metrics.jsonl").symlink_to("nowhere")
    for name in ("targets", "mlartifacts", ".pull-x", "empty"):
        (root / name / "harvest" if name != "empty" else root / name).mkdir(parents=True)
    (root / "mlflow.db").write_text("")
    found = runs.runs()
    assert [run.name for run in found] == ["new", "broken", "old"]
    assert [run.summary for run in found] == [{}, {}, {}]
    assert [run.metrics().height for run in found] == [0, 0, 0]
    assert [run.state for run in found] == ["finished"] * 3
    assert "summary.json': not JSON" in caplog.text
    assert runs.acquire_run("broken", SETTINGS).path == root / "broken-2"


def test_no_root_no_runs(root):
    assert runs.runs() == []
    with pytest.raises(BadInput, match="choose from: none"):
        runs.find("tms")


def test_the_root_is_beside_us_unless_told(monkeypatch, tmp_path):
    monkeypatch.delenv("SPD_RUNS")
    assert runs.root() == Path("runs")
    monkeypatch.setenv("SPD_RUNS", "/elsewhere")
    assert runs.root() == Path("/elsewhere")
    assert runs.tracking_uri() == "sqlite:////elsewhere/mlflow.db"
    assert runs.artifact_location() == "file:///elsewhere/mlartifacts"


def test_a_runs_config_and_figures(root):
    path = runs.acquire_run("tms", SETTINGS).path
    (path / "config.yaml").write_text("lr: 1e-3\nmodel: {C: 20}\n")
    (path / "figures").mkdir()
    for name in ("b.png", "a.png", "notes.txt"):
        (path / "figures" / name).write_bytes(b"")
    run = runs.find("tms")
    assert run.config == {"lr": 0.001, "model": {"C": 20}}
    assert [figure.name for figure in run.figures] == ["a.png", "b.png"]


def test_looking_imports_nothing_heavy():
    heavy = {"polars", "pyarrow", "mlflow", "wandb", "torch", "lightning", "numpy"}
    code = (
        f"import sys\nfrom spd_lightning import runs\nruns.runs()\nprint(sorted({heavy} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )


# Files.


def test_a_write_that_dies_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    runs.write_json(path, {"a": 1})

    def die_while_writing() -> None:
        with runs.write_whole(path) as temporary:
            temporary.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        die_while_writing()
    assert json_files.unsealed(json.loads(path.read_text())) == {"a": 1}
    assert [file.name for file in tmp_path.glob("*")] == ["summary.json"]


def test_a_disk_that_refuses(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot be written .Not a directory.*set SPD_RUNS"):
        runs.write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(BadInput, match="cannot be written"):
        runs.append_metrics(tmp_path / "file", 0, {})
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="cannot be written"):
        runs.acquire_run("tms", SETTINGS)


def test_metrics_of_one_step_are_one_row_and_the_later_values_count(tmp_path):
    for step, values in (
        (0, {"loss": 3}),
        (20, {"loss": 1.5}),
        (10, {"loss": 2.0}),
        (20, {"mmcs": 0.5, "loss": 1.0}),
    ):
        runs.append_metrics(tmp_path, step, values)
    frame = runs.Run(tmp_path).metrics()
    assert frame.to_dict(as_series=False) == {
        "step": [0, 10, 20],
        "loss": [3.0, 2.0, 1.0],
        "mmcs": [None, None, 0.5],
    }


@given(st.integers(0, 200), st.integers(1, 5000))
def test_a_torn_last_line_costs_that_line_alone(tmp_path_factory, cut, length):
    folder = tmp_path_factory.mktemp("run")
    path = folder / "metrics.jsonl"
    for step in range(3):
        runs.append_metrics(folder, step, {"loss": step / 2, "x" * length: 1.0})
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, path.stat().st_size - min(cut, len(lines[-1])))
    torn = cut > 0
    whole = runs.Run(folder).metrics()["step"].to_list()
    assert whole in ([0, 1], [0, 1, 2]) if cut <= 1 else whole == [0, 1]
    runs.append_metrics(folder, 7, {"loss": 0.1})
    assert path.read_bytes().splitlines(keepends=True)[:-1] == lines[: 2 if torn else 3]
    assert runs.Run(folder).metrics()["step"].to_list() == ([0, 1, 7] if torn else [0, 1, 2, 7])


def test_what_was_logged_after_a_checkpoint_is_taken_back(tmp_path):
    sizes = []
    for step in range(5):
        runs.append_metrics(tmp_path, step, {"loss": step / 2})
        sizes.append(runs.metrics_size(tmp_path))
    size = sizes[2]
    runs.cut_metrics(tmp_path, size)
    assert runs.Run(tmp_path).metrics()["step"].to_list() == [0, 1, 2]
    runs.cut_metrics(tmp_path, size + 100)  # a log that lost its end is not filled with zeros
    assert runs.metrics_size(tmp_path) == size
    runs.cut_metrics(tmp_path / "none", 0)


# Trackers.


def test_an_unreachable_tracker_is_named_at_once(monkeypatch):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(
            runs.NoAnswer, match="timed out"
        ):  # it takes connections and says nothing
            runs.reachable(address)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert runs.artifact_location() is None
    for ask in (lambda: runs.reachable(address), lambda: runs.find("mlflow:tms")):
        with pytest.raises(
            BadInput, match=rf"tracker '{address}': no answer .*unset MLFLOW_TRACKING_URI"
        ):
            ask()
    runs.reachable("sqlite:///nowhere.db")
    with pytest.raises(BadInput, match="no answer"):
        runs.reachable("http://[bad")


@pytest.mark.parametrize(
    "reference", ["mlflow:", "wandb:", "neptune:x", "wandb:a/b:v0", "wandb:a/b/c", "wandb:a/b/../c"]
)
def test_references_that_name_nothing(reference):
    with pytest.raises(BadInput, match=r"write mlflow:<run> or wandb:|write wandb:<entity>"):
        runs.pull(reference)


def test_pulling_before_anything_was_tracked():
    with pytest.raises(BadInput, match="no such file yet; run a fit"):
        runs.find("mlflow:tms")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "..", "a\\..\\b"])
def test_artifacts_that_leave_their_folder(path):
    with pytest.raises(BadInput, match="points outside"):
        check_inside(path, "tms")


def logged(root: Path) -> tuple[Path, str]:
    """A finished run with a harvest, copied to the embedded MLflow store; and its id there."""
    from mlflow import MlflowClient

    claimed = runs.acquire_run("tms", SETTINGS)
    harvest(claimed.path / "harvest" / "graphs")
    (claimed.path / "config.yaml").write_text("seed: 0\n")
    (claimed.path / "checkpoints").mkdir()
    (claimed.path / "checkpoints" / "last.ckpt").write_text("stays here")
    (claimed.path / "figures").mkdir()
    (claimed.path / "figures" / "a.png").write_bytes(b"png")
    runs.append_metrics(claimed.path, 1, {"loss": 0.5})
    client = MlflowClient(tracking_uri=runs.tracking_uri())
    experiment = client.create_experiment("spd", artifact_location=runs.artifact_location())
    tracked = client.create_run(experiment, run_name="tms").info.run_id
    finish(claimed, mmcs=0.99)
    runs.log_artifacts(claimed.path, tracked)
    return claimed.path, tracked


def files(folder: Path) -> dict[str, bytes]:
    held = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in held}


@pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)  # MLflow's own
def test_a_run_comes_back_from_mlflow_as_it_went(root, monkeypatch):
    path, tracked = logged(root)
    pulled = runs.find("mlflow:tms")
    wanted = files(path)
    del wanted["checkpoints/last.ckpt"]
    got = files(pulled.path)
    assert pulled.path == root / "tms-pulled"
    assert json_files.unsealed(json.loads(got.pop("pulled.json"))) == {
        "reference": "mlflow:tms",
        "origin": tracked,
    }
    assert got == wanted
    assert Store(pulled.harvests[0]).scan("prompts").collect().height == 2
    assert runs.newest("tms").path == path
    assert [file.name for file in root.glob(".*")] == [
        ".mlflow.db.lock"
    ]  # held while the store is made
    # By id it is the same run, and takes the place of the older copy.
    (pulled.path / "summary.json").unlink()
    assert runs.pull(f"mlflow:{tracked}") == pulled.path
    assert pulled.summary == {"mmcs": 0.99}
    with pytest.raises(BadInput, match=r"run 'mlflow:tmz': not in sqlite.*did you mean 'tms'"):
        runs.find("mlflow:tmz")
    with pytest.raises(BadInput, match="check the reference"):
        runs.find(f"mlflow:{'0' * 32}")
    # What was pulled is found again without its tracker.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert runs.find(f"mlflow:{tracked}").path == pulled.path


class Artifact:
    """What W&B's client shows of an artifact."""

    qualified_name = "me/spd/tms-graphs:v3"

    def __init__(self, folder: Path, *more: str):
        self._files = files(folder)
        self.metadata: dict[str, Any] = {}
        self.manifest = types.SimpleNamespace(entries=dict.fromkeys([*self._files, *more]))

    def download(self, root: str) -> str:
        for name, content in self._files.items():
            (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / name).write_bytes(content)
        return root


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """A W&B client with one artifact, a harvest; the real one needs an account."""
    harvest(tmp_path / "graphs")
    module: Any = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.held = {"me/spd/tms-graphs:v3": Artifact(tmp_path / "graphs")}

    def artifact(name: str) -> Artifact:
        if name not in module.held:
            raise module.Error(f"artifact {name}\nnot found")
        return module.held[name]

    module.Api = lambda: types.SimpleNamespace(artifact=artifact)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_harvest_comes_from_wandb(root, wandb, tmp_path):
    run = runs.find("wandb:me/spd/tms-graphs:v3")
    assert (run.path, run.harvests) == (root / "tms-graphs-pulled", [root / "tms-graphs-pulled"])
    assert Store(run.path).manifest["prompts"] == 2
    del wandb.held["me/spd/tms-graphs:v3"]
    assert runs.find("wandb:me/spd/tms-graphs:v3") == run
    with pytest.raises(BadInput, match="artifact me/spd/x:v1 not found; check the name"):
        runs.find("wandb:me/spd/x:v1")


def test_an_artifact_of_another_digest_is_not_pulled(root, wandb, tmp_path):
    """Its metadata has the digest of each part."""
    harvest(tmp_path / "run" / "harvest" / "graphs")
    part = "harvest/graphs"
    artifact = Artifact(tmp_path / "run")
    artifact.metadata = {part: lineage(tmp_path / "run", part), "harvest/../..": {"digest": "1"}}
    wandb.held["me/spd/x:v0"] = artifact
    assert runs.pull("wandb:me/spd/x:v0") == root / "x-pulled"
    artifact.metadata[part]["digest"] = "f" * 16
    with pytest.raises(BadInput, match="'wandb:me/spd/x:v0': its part 'harvest/graphs' has the"):
        runs.pull("wandb:me/spd/x:v0")


def test_a_hostile_artifact_writes_nothing(root, wandb, tmp_path):
    wandb.held["me/spd/x:v0"] = Artifact(tmp_path / "graphs", "../../.bashrc")
    with pytest.raises(BadInput, match="points outside"):
        runs.pull("wandb:me/spd/x:v0")
    assert list(root.iterdir()) == []


def test_copies_of_different_things_lie_side_by_side(root, wandb, tmp_path):
    other = Artifact(tmp_path / "graphs")
    other.qualified_name = "you/spd/tms-graphs:v0"
    wandb.held["you/spd/tms-graphs:v0"] = other
    names = [
        runs.pull(f"wandb:{name}").name
        for name in ("me/spd/tms-graphs:v3", "you/spd/tms-graphs:v0")
    ]
    assert names == ["tms-graphs-pulled", "tms-graphs-pulled-2"]
    assert runs.pull("wandb:me/spd/tms-graphs:v3").name == "tms-graphs-pulled"


def test_what_was_made_in_an_older_copy_is_kept(root, wandb, caplog):
    """A harvest that `predict` left in the copy is not in the tracker, so the next copy lands next
    to it.
    """
    caplog.set_level("INFO")
    pulled = runs.pull("wandb:me/spd/tms-graphs:v3")
    harvest(pulled / "harvest" / "mine")
    made = files(pulled)
    names = [runs.pull("wandb:me/spd/tms-graphs:v3").name for _ in range(2)]
    assert names == ["tms-graphs-pulled-2", "tms-graphs-pulled-2"]
    assert files(pulled) == made
    lines = {record.getMessage() for record in caplog.records}
    first = sorted(made.keys() - files(root / "tms-graphs-pulled-2").keys())[0]
    kept = "this copy is kept, and the new one gets the next free number"
    assert lines == {f"'{pulled}': the tracker does not have its file {first}; {kept}"}


@pytest.mark.parametrize("name", [".lock", ".lock-0"])
def test_an_older_copy_in_use_is_not_replaced(root, wandb, name):
    """`.lock` is that of the run, and `.lock-0` the one of a writer of its harvest."""
    pulled = runs.pull("wandb:me/spd/tms-graphs:v3")
    before = files(pulled)
    with open(pulled / name, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(
            BadInput, match=r"tms-graphs-pulled': another process is working on it; pull it again"
        ):
            runs.pull("wandb:me/spd/tms-graphs:v3")
    assert files(pulled) == before
    assert runs.pull("wandb:me/spd/tms-graphs:v3") == pulled
    assert [path.name for path in root.iterdir()] == ["tms-graphs-pulled"]
