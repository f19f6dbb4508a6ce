"""Killed work goes on: the same command again ends in what an undisturbed one would have ended in,
bit for bit.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support.tiny_run import begun, done, kill_when, killed, lay_out

from spd_lightning import files, runs
from spd_lightning.runs.files import read_metrics
from spd_lightning.store import TABLES, Store
from spd_lightning.store.tables import SORTED, smallest, summed
from spd_lightning.training.checkpoint import SafetensorsIO

FIT = ["fit", "--config", "tiny"]
PREDICT = ["predict", "--config", "tiny"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A working directory with a config of a few seconds, and a finished run `plain` of it."""
    here = tmp_path_factory.mktemp("resume")
    lay_out(here, steps=120, batch=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("SPD_RUNS", str(here / "runs"))
        patch.setenv("OMP_NUM_THREADS", "1")
        done(here / "runs", [*FIT, "--run", "plain"])
        yield here / "runs"


def logged(folder: Path) -> int:
    """The last step that a run logged."""
    return max((values["step"] for values in read_metrics(folder)), default=-1)


def same_run(folder: Path, other: Path) -> None:
    for name in ("decomposition.safetensors", "metrics.jsonl", "config.yaml", "decomposition.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    summaries = [runs.Run(path).summary for path in (folder, other)]
    assert {k: v for k, v in summaries[0].items() if not k.startswith("seconds/")} == {
        k: v for k, v in summaries[1].items() if not k.startswith("seconds/")
    }


# ---- fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_fit_ends_as_if_never_killed(root, seed):
    """Killed at a random step, twice; the weights, the log and the figures are those of the
    undisturbed run.
    """
    words = [*FIT, "--run", f"killed{seed}"]
    folder = root / f"killed{seed}"
    chance = random.Random(seed)
    for step in sorted(chance.sample(range(30, 100), 2)):
        killed(
            root,
            words,
            lambda step=step: (
                logged(folder) >= step and (folder / "checkpoints/last.safetensors").exists()
            ),
        )
        assert runs.Run(folder).state == "interrupted"
    done(root, words)
    same_run(folder, root / "plain")
    assert not list(root.glob(f"killed{seed}-*"))


def test_a_killed_fit_in_micro_batches_with_muon(root):
    """As above, with each batch split in two, each half with its own adversaries, and with Muon
    next to AdamW.
    """
    words = [
        *FIT,
        "--model.init_args.micro_batches=2",
        "--model.init_args.optimizer.kind=muon",
        "--run",
    ]
    folder = root / "parts"
    done(root, [*words, "parts-plain"])
    killed(root, [*words, "parts"], lambda: logged(folder) >= 60)
    assert runs.Run(folder).state == "interrupted"
    done(root, [*words, "parts"])
    same_run(folder, root / "parts-plain")


def test_a_fit_killed_before_its_first_checkpoint_begins_anew(root):
    words = [*FIT, "--run", "early"]
    folder = root / "early"
    killed(root, words, lambda: logged(folder) >= 0)
    done(root, words)
    same_run(folder, root / "plain")


def test_a_fit_killed_in_its_last_moments(root):
    """All steps done, no summary yet: the end is repeated."""
    words = [*FIT, "--run", "late"]
    folder = root / "late"
    killed(
        root,
        words,
        lambda: (folder / "figures").exists() or (folder / "decomposition.safetensors").exists(),
    )
    done(root, words)
    same_run(folder, root / "plain")


def test_a_command_of_the_shell_killed_and_stopped(root):
    """`python -m spd_lightning fit` as a user runs it: killed; run again, and stopped by Ctrl-C;
    and run again.
    """
    words = [sys.executable, "-m", "spd_lightning", *FIT, "--run", "shell"]
    folder = root / "shell"
    said = []
    for step, by, code in ((40, signal.SIGKILL, -signal.SIGKILL), (80, signal.SIGINT, 130)):
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        kill_when(
            lambda step=step: logged(folder) >= step,
            lambda process=process: process.poll() is None,
            process.pid,
            by,
        )
        said.append(process.communicate(timeout=240)[1])
        assert process.returncode == code
    assert "run shell: resuming from where it was interrupted" in said[1]
    line = (
        r"Stopped by SIGINT at step \d+( \(saved at step \d+\))?; run the same command again to "
        r"resume\.\n"
    )
    assert re.search(f"{line}$", said[1])
    assert "Traceback" not in said[1]
    done(root, [*FIT, "--run", "shell"])
    same_run(folder, root / "plain")


def test_a_second_fit_never_touches_a_finished_one(root):
    """The same command again is a run of its own, with the same result."""
    before = {path: path.stat().st_mtime_ns for path in (root / "plain").rglob("*")}
    done(root, [*FIT, "--run", "plain"])
    assert {path: path.stat().st_mtime_ns for path in (root / "plain").rglob("*")} == before
    same_run(root / "plain-2", root / "plain")


def test_other_settings_continue_nothing(root):
    """An interrupted run is continued by the same settings alone."""
    folder = root / "other"
    killed(root, [*FIT, "--run", "other"], lambda: logged(folder) >= 50)
    held = (folder / "metrics.jsonl").read_bytes()
    done(root, [*FIT, "--run", "other", "--trainer.max_steps", "10"])
    assert (folder / "metrics.jsonl").read_bytes() == held
    assert runs.Run(folder).state == "interrupted"
    assert runs.Run(root / "other-2").summary["steps"] == 10


@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_fit_saves_where_it_is(root, by, code):
    """A signal in mid-training: the right exit code; resumed, bit for bit the same."""
    name = f"stopped-{by.name}"
    words = [*FIT, "--run", name]
    folder = root / name
    process = begun(root, words)
    kill_when(lambda: logged(folder) >= 63, process.is_alive, process.pid, by)
    process.join()
    assert process.exitcode == code
    assert runs.Run(folder).state == "interrupted"
    done(root, words)
    same_run(folder, root / "plain")


def test_a_bad_checkpoint_falls_back_to_the_one_before(root):
    """Two checkpoints are kept: with the last one damaged, or missing, the fit still ends in the
    same weights.
    """
    words = [*FIT, "--run", "fallback"]
    folder = root / "fallback"
    killed(root, words, lambda: logged(folder) >= 60)
    held = folder / "checkpoints"
    steps = [
        SafetensorsIO().load_checkpoint(held / name)["global_step"]
        for name in ("previous.safetensors", "last.safetensors")
    ]
    assert steps[0] < steps[1]
    (held / "last.safetensors").write_bytes((held / "last.safetensors").read_bytes()[:-9])
    done(root, words)
    same_run(folder, root / "plain")


def test_temporary_files_of_the_dead_are_removed_and_those_of_the_living_stay(root):
    words = [*FIT, "--run", "swept"]
    folder = root / "swept"
    killed(root, words, lambda: logged(folder) >= 50)
    gone = subprocess.Popen(["true"])
    gone.wait()
    mine = files.mark()
    dead = mine.replace(f".{os.getpid()}.", f".{gone.pid}.")
    for place in (folder, folder / "checkpoints"):
        for end in (dead, mine):
            (place / f".half{end}").write_bytes(b"half")
    done(root, words)
    left = {path.name for path in folder.rglob(".*.new")}
    assert left == {f".half{mine}"}
    same_run(folder, root / "plain")


# ---- predict -------------------------------------------------------------------------------------


def harvest(name: str) -> list[str]:
    graphs = [
        {
            "class_path": "spd_lightning.PromptGraphs",
            "init_args": {"mode": "unmasked", "name": name},
        }
    ]
    return [*PREDICT, "--run", "plain", "--trainer.callbacks", json.dumps(graphs)]


@pytest.fixture(scope="module")
def undisturbed(root) -> Store:
    """Harvested without interruption, and without progress bars."""
    done(root, [*harvest("undisturbed"), "--trainer.enable_progress_bar", "false"])
    return Store(root / "plain/harvest/undisturbed")


def committed(folder: Path) -> int:
    lines = folder / "manifest-0.jsonl"
    return lines.read_bytes().count(b"\n") if lines.exists() else 0


def rows(store: Store, table: str) -> pl.DataFrame:
    """A table's rows in an order that does not depend on who wrote them, counts of components added
    up.
    """
    frame = store.collect(store.scan(table))
    if table == "components":
        counts = ["firings", "positions", "importance_sum", "activation_sum"]
        frame = frame.group_by("layer", "component").agg(
            pl.col(counts).sum(), pl.col("norm", "alive").first()
        )
    return frame.sort(
        [c for c in frame.columns if not isinstance(frame.schema[c], pl.List | pl.Float32)]
    )


def same_tables(store: Store, other: Store, exact: bool) -> None:
    sums = ("dataset_edges", "dataset_nodes")
    statistics = ("histograms", "cofirings", "token_counts", "tokens", "examples")
    for table in TABLES.keys() - {*sums, *statistics, "head_edges", "frontier"}:
        one = rows(store, table)
        two = rows(other, table)
        assert one.height > 0
        assert_frame_equal(one, two, check_exact=exact, abs_tol=1e-6, rel_tol=1e-5)


@pytest.mark.parametrize("groups", [1, 9, 25])
def test_a_killed_predict_gives_the_same_tables(root, undisturbed, groups):
    """Killed between batches, and run again: nothing is missing, nothing is there twice."""
    name = f"killed{groups}"
    folder = root / "plain/harvest" / name
    killed(root, harvest(name), lambda: committed(folder) >= groups)
    part = Store(folder)
    assert not part.manifest["complete"]
    assert 4 * groups <= part.manifest["prompts"] < undisturbed.manifest["prompts"] == 165
    done(root, harvest(name))
    whole = Store(folder)
    assert whole.manifest["complete"]
    same_tables(whole, undisturbed, exact=True)


def test_killed_statistics_are_those_of_one_sitting(root):
    """H1: killed between groups of prompts, and run again: the same sums and examples."""

    def statistics(name: str) -> list[str]:
        settings = {"name": name, "group": 8, "examples": 7, "top_examples": 3}
        harvester = {"class_path": "spd_lightning.Statistics", "init_args": settings}
        return [*PREDICT, "--run", "plain", "--trainer.callbacks", json.dumps([harvester])]

    done(root, statistics("counted"))
    folder = root / "plain/harvest/interrupted"
    killed(root, statistics("interrupted"), lambda: committed(folder) >= 5)
    part = Store(folder)
    assert 8 <= part.manifest["prompts"] < 165
    done(root, statistics("interrupted"))
    whole = Store(root / "plain/harvest/counted")
    kept = whole.manifest["examples"]
    for table in ("components", "histograms", "cofirings"):
        one, two = (summed(table, store.scan(table)).collect() for store in (Store(folder), whole))
        keys = SORTED[table]
        assert one.height > 0
        assert_frame_equal(one.sort(keys), two.sort(keys), abs_tol=1e-6, rel_tol=1e-5)
    for kind, number in kept.items():
        one, two = (
            smallest(store.scan("examples").filter(kind=kind).collect(), UNIT, number)
            for store in (Store(folder), whole)
        )
        assert one.height > 0 or kind == "negative"
        assert_frame_equal(one, two, abs_tol=1e-6, rel_tol=1e-5)


UNIT = ("layer", "component")


def test_a_stopped_predict_says_so_and_resumes(root, undisturbed):
    """SIGTERM between or inside batches: exit code 143; what was committed stays, and the rest
    follows.
    """
    folder = root / "plain/harvest/stopped"
    process = begun(root, harvest("stopped"))
    kill_when(lambda: committed(folder) >= 5, process.is_alive, process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert committed(folder) >= 5
    done(root, harvest("stopped"))
    same_tables(Store(folder), undisturbed, exact=True)


def test_a_complete_harvest_is_not_computed_again(root, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*.parquet")}
    done(root, harvest("undisturbed"))
    assert {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*.parquet")} == before
    assert Store(undisturbed.path).manifest["complete"]


def test_two_processes_give_the_rows_of_one(root, undisturbed):
    """Two devices divide the prompts; together they write what one writes."""
    words = [*harvest("two"), "--trainer.devices", "2", "--trainer.strategy", "ddp_fork"]
    done(root, words)
    store = Store(root / "plain/harvest/two")
    assert store.manifest["complete"]
    assert store.manifest["world"] == 2
    assert {path.name for path in store.path.glob("manifest-*.json")} == {
        "manifest-0.json",
        "manifest-1.json",
    }
    same_tables(store, undisturbed, exact=False)
