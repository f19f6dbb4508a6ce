"""Trackers that are slow, locked, hang or die: a training goes on, and the copy is completed later.

The independent truth is the tracker's own store, read back through MLflow's client or with sqlite.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import SERVER, begun, done, killed, lay_out, one_figure, work_hanging

from spd_lightning import cli, runs
from spd_lightning.errors import BadInput, without_passwords
from spd_lightning.runs.files import read_metrics
from spd_lightning.store import Store
from spd_lightning.tracking import copies, publishing
from spd_lightning.tracking.copies import Copies, Tail
from spd_lightning.tracking.publishing import send
from spd_lightning.tracking.trackers import MLflow, trackers
from spd_lightning.training import figures

pytestmark = [
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
]
FIT = ["fit", "--config", "tiny", "--trainer.logger", "true"]
PUSH = "python -m spd_lightning push"
METRICS = "SELECT key, step, value FROM metrics"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """A working directory with a config of seconds, and a run `local` in the embedded store."""
    here = tmp_path_factory.mktemp("copies")
    root = lay_out(here, steps=120, batch=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("SPD_RUNS", str(root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(figures, "draw", one_figure)
        done(root, [*FIT, "--run", "local"])
        yield root


def held(database: Path, run: Path) -> list[tuple[str, int, float]]:
    """Every value that a store has of a run, sorted."""
    record = json.loads((run / "mlflow.json").read_text())["run_id"]
    with contextlib.closing(sqlite3.connect(database)) as store:
        return sorted(store.execute(f"{METRICS} WHERE run_uuid = ?", [record]))


def same_metrics(database: Path, run: Path) -> None:
    """The store has every value of metrics.jsonl, and each of them once."""
    logged = {
        (key, values["step"]): value
        for values in read_metrics(run)
        for key, value in values.items()
        if key != "step"
    }
    values = held(database, run)
    assert Counter((key, step) for key, step, _ in values) == Counter(logged.keys())
    assert {(key, step): value for key, step, value in values} == pytest.approx(logged)


def same_files(artifacts: Path, run: Path) -> None:
    """All files of a run that a tracker gets are there, byte for byte."""
    for name in runs.MIRRORED:
        for path in [run / name, *(run / name).rglob("*")]:
            if path.is_file():
                assert (artifacts / path.relative_to(run)).read_bytes() == path.read_bytes()
    assert (artifacts / "decomposition.safetensors").exists()


def artifacts_of(root: Path, run: Path) -> Path:
    return (
        root / "mlartifacts" / json.loads((run / "mlflow.json").read_text())["run_id"] / "artifacts"
    )


# ---- a server ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """An MLflow server on a port and a folder of its own, to be killed and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = folder / "server.db"

    def start(self) -> None:
        words = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as said:
            self.process = subprocess.Popen(
                words,
                env=os.environ | quiet,
                cwd=self.folder,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while True:
            try:
                return runs.reachable(self.uri)
            except BadInput:
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
                time.sleep(0.2)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(root, tmp_path_factory) -> Iterator[Server]:
    """A server whose store begins as a copy of one that is made already, which saves seconds."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(root / "mlflow.db", folder / "server.db")
    with contextlib.closing(sqlite3.connect(folder / "server.db")) as store, store:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs", "experiments"):
            store.execute(
                f"DELETE FROM {table} WHERE true"
                + (" AND experiment_id" * (table == "experiments"))
            )
    server = Server(folder)
    server.start()
    yield server
    server.kill()


def test_a_server_that_dies_in_the_middle(root, server):
    """The fit finishes without it. Once it is back `push` completes its copy, and pushing twice
    adds nothing.
    """
    run = root / "dies"
    process = begun(
        root, [*FIT, "--run", "dies", "--trainer.max_steps", "600"], MLFLOW_TRACKING_URI=server.uri
    )
    deadline = time.monotonic() + 60
    while not (
        (run / "mlflow.json").exists()
        and (run / "metrics.jsonl").exists()
        and held(server.database, run)
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.kill()
    assert not (run / "summary.json").exists(), "it was to die in the middle"
    process.join(60)
    assert process.exitcode == 0
    assert runs.Run(run).state == "finished"
    assert json.loads((run / "uncopied.json").read_text())["trackers"] == [server.uri]
    assert 0 < len(held(server.database, run)) < sum(len(v) - 1 for v in read_metrics(run))
    server.start()
    for _ in range(2):
        done(root, ["push", "dies"], MLFLOW_TRACKING_URI=server.uri)
        same_metrics(server.database, run)
    record = json.loads((run / "mlflow.json").read_text())["run_id"]
    (artifacts,) = (server.folder / "artifacts").glob(f"*/{record}/artifacts")
    same_files(artifacts, run)
    assert not (run / "uncopied.json").exists()


def test_a_harvest_goes_through_a_server_and_is_searched(
    root, server, tmp_path, monkeypatch, capsys
):
    """The run is fitted and harvested with a server, pulled into an empty folder, and searched."""
    path = root / "through"
    for verb in ("fit", "predict"):
        words = [verb, *FIT[1:], "--run", "through"]
        done(root, words, MLFLOW_TRACKING_URI=server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("SPD_RUNS", str(tmp_path))
    assert cli.run(["pull", "mlflow:through"]) == 0
    nodes = Store(path / "harvest/graphs-unmasked").scan("nodes").filter(kind="component").collect()
    layer, component = nodes.select("layer", "component").row(0)
    found = []
    for run in (str(path), "through-pulled"):
        capsys.readouterr()
        words = ["search", run, f"{layer}:{component}", "--json"]
        assert cli.run(words) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["total"] > 0


# ---- what does not answer ------------------------------------------------------------------------


@contextlib.contextmanager
def mute() -> Iterator[str]:
    """The address of a server that takes every connection and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def said_by(
    root: Path, words: list[str], monkeypatch, capsys, **surroundings: str
) -> tuple[int, str, float]:
    """A command in this process: its exit code, what it printed to the standard error, its
    seconds.
    """
    monkeypatch.setenv("SPD_RUNS", str(root))
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    started = time.monotonic()
    code = cli.run(words)
    return code, capsys.readouterr().err, time.monotonic() - started


SHORT = ["--trainer.max_steps", "10"]


@pytest.mark.parametrize("kind", ["dead", "mute"])
def test_a_server_that_never_answers(root, monkeypatch, capsys, kind):
    """A dead server and a hanging one each cost two short looks and two lines, and the run is
    finished.
    """
    with mute() as address:
        if kind == "dead":
            address = f"http://127.0.0.1:{free_port()}"
        secret = address.replace("//", "//me:hushhush@")
        words = [*FIT, *SHORT, "--run", kind]
        code, said, seconds = said_by(root, words, monkeypatch, capsys, MLFLOW_TRACKING_URI=secret)
        assert code == 0
        assert (
            seconds < 120
        )  # on a loaded machine; a fit that waits for the server takes minutes longer
        lines = [line for line in said.splitlines() if "tracker '" in line]
        assert len(lines) == 2, said
        shown = address.replace("//", "//***@")
        assert f"tracker '{shown}': no answer" in lines[0]
        assert "The work continues" in lines[0]
        assert lines[1].endswith(f"send the copy later: python -m spd_lightning push {kind}")
        assert "Traceback" not in said
        # The same command sends the copy instead of training again; `push` says what is wrong in
        # one line.
        for again in (words, ["push", kind]):
            code, said, seconds = said_by(root, again, monkeypatch, capsys)
            assert code == 2
            assert seconds < 30
            assert said.splitlines()[-1].startswith(f"error: tracker '{shown}': no answer")
        assert not (root / f"{kind}-2").exists()
    kept = [path for path in (root / kind).rglob("*") if path.is_file()]
    assert not [path for path in kept if b"hushhush" in path.read_bytes()]
    done(root, ["push", kind])  # to the embedded store
    same_metrics(root / "mlflow.db", root / kind)
    same_files(artifacts_of(root, root / kind), root / kind)


def test_a_locked_store(root, monkeypatch):
    """Another process holds the sqlite file while a fit begins, works and ends."""
    with contextlib.closing(sqlite3.connect(root / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        done(root, [*FIT, *SHORT, "--run", "locked"])
        assert runs.Run(root / "locked").state == "finished"
        assert (root / "locked/uncopied.json").exists()
        other.execute("ROLLBACK")
    done(root, [*FIT, *SHORT, "--run", "locked"])
    assert not (root / "locked-2").exists()
    assert not (root / "locked/uncopied.json").exists()
    same_metrics(root / "mlflow.db", root / "locked")
    same_files(artifacts_of(root, root / "locked"), root / "locked")


# ---- killed --------------------------------------------------------------------------------------


def test_killed_while_copying_the_same_command_finishes_the_copy(root):
    """It does not train again as `sent-2`; the run's own files stay as they were."""
    words = [*FIT, "--run", "sent"]
    run = root / "sent"
    process = SERVER.Process(target=work_hanging, args=(root, words, {}))
    process.start()
    deadline = time.monotonic() + 60
    while not (root.parent / "copying").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    assert runs.Run(run).state == "finished"
    before = {
        name: (run / name).read_bytes()
        for name in ("decomposition.safetensors", "summary.json", "metrics.jsonl")
    }
    done(root, words)
    assert not (root / "sent-2").exists()
    assert before == {name: (run / name).read_bytes() for name in before}
    same_metrics(root / "mlflow.db", run)
    same_files(artifacts_of(root, run), run)


def test_a_resumed_fit_logs_nothing_twice(root):
    """Killed after its first checkpoint and well past it, so that the steps between are made
    again.
    """
    words = [*FIT, "--run", "resumed"]
    run = root / "resumed"

    def past_its_checkpoint() -> bool:
        steps = [values["step"] for values in read_metrics(run)]
        stored = (run / "mlflow.json").exists() and held(root / "mlflow.db", run)
        return (
            (run / "checkpoints/last.safetensors").exists()
            and bool(steps)
            and max(steps) > 30
            and bool(stored)
        )

    killed(root, [*words, "--trainer.max_steps", "600"], past_its_checkpoint)
    done(root, [*words, "--trainer.max_steps", "600"])
    same_metrics(root / "mlflow.db", run)


# ---- several commands, and paths -----------------------------------------------------------------


def logs_a_run(root: Path, name: str, start: Any) -> None:
    """A finished run and its copy, in a process of its own."""
    os.environ["SPD_RUNS"] = str(root)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with runs.acquire_run(name, {"name": name}) as lock:
        runs.append_metrics(lock.path, 1, {"loss": 0.5})
        runs.write_json(lock.path / "summary.json", {"name": name})
        (lock.path / "config.yaml").write_text("seed: 0\n")
        start.wait()
        send(None, lock.path, {"seed": 0})


def test_two_at_once_on_a_strange_path_that_moves(tmp_path, monkeypatch):
    """Two commands make the store at the same moment; `%20`, `?`, `#` and spaces in its path; and
    then it is moved.
    """
    first = tmp_path / "x%20y ?a=b#c" / "runs"
    start = SERVER.Event()
    both = [SERVER.Process(target=logs_a_run, args=(first, name, start)) for name in ("one", "two")]
    for process in both:
        process.start()
    time.sleep(0.5)
    start.set()
    for process in both:
        process.join(90)
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [
        first.parent.name
    ]  # nothing went elsewhere
    assert held(first / "mlflow.db", first / "one") == [("loss", 1, 0.5)]

    second = tmp_path / "moved"
    first.rename(second)
    first.parent.rmdir()
    monkeypatch.setenv("SPD_RUNS", str(second))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pulled = runs.pull("mlflow:two")
    assert (pulled / "summary.json").read_bytes() == (second / "two/summary.json").read_bytes()
    # A run that is pushed again stays the same record, and its files go to where the store is now.
    (second / "one/config.yaml").write_text("seed: 1\n")
    send(None, second / "one", {"seed": 0})
    with contextlib.closing(sqlite3.connect(second / "mlflow.db")) as store:
        assert store.execute("SELECT count(*) FROM runs").fetchone() == (2,)
    assert (artifacts_of(second, second / "one") / "config.yaml").read_text() == "seed: 1\n"
    assert not first.exists()


# ---- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:hush@host:5000/a", "http://***@host:5000/a"),
        ("postgresql://u:hu/sh@h@127.0.0.1:9/db", "postgresql://***@127.0.0.1:9/db"),
        ("https://hush@host/", "https://***@host/"),
        ("https://host/x?access_token=hush&a=1", "https://host/x?access_token=***&a=1"),
        ("mysql://host/db?user=u&password=hush", "mysql://host/db?user=u&password=***"),
        ("two: http://a:hush@b and http://c:hush@d", "two: http://***@b and http://***@d"),
        ("http://host/a@b", "http://host/a@b"),
        ("http://me:hu'sh@127.0.0.1:1", "http://***@127.0.0.1:1"),
        ('http://me:hu"sh@host', "http://***@host"),
        ("http://me:hu sh@host", "http://***@host"),
        ("//me:hush@host", "//***@host"),
        ("http://host/#access_token=hush", "http://host/#access_token=***"),
        ("http://host/?sig=hush&pass=hush;pw=hush", "http://host/?sig=***&pass=***;pw=***"),
        ("http://host/?api_key='hush hush'", "http://host/?api_key=***"),
        ("tracker 'http://host:5000': ask me@home", "tracker 'http://host:5000': ask me@home"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
    ],
)
def test_passwords_are_not_shown(address, shown):
    assert without_passwords(address) == shown


def test_a_store_that_mlflow_rejects(root, monkeypatch, capsys):
    """The reason is the tracker's, before any work; no folder is left behind, and no password is
    shown.
    """
    never = f"file://{root.parent}/mlruns", "gopher://me:hushhush@x"
    for number, uri in enumerate((*never, "postgresql://u:hushhush@127.0.0.1:9/db")):
        name = f"rejected{number}"
        words = [*FIT, *SHORT, "--run", name]
        code, said, _ = said_by(root, words, monkeypatch, capsys, MLFLOW_TRACKING_URI=uri)
        assert "hushhush" not in said
        assert f"tracker '{without_passwords(uri)}': " in said
        assert "Not a valid subclass" not in said
        assert code == (2 if uri in never else 0)  # a database that is down may come back
        assert (root / name).exists() == (code == 0)
        if code:
            assert len(said.splitlines()) == 1


def test_a_logger_that_raises_is_named(tmp_path):
    """Any other logger is built by us too, and what it raises is not blamed on the config."""
    (other,) = trackers(
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {}}, tmp_path
    )
    with pytest.raises(TypeError) as raised:
        other.connect()
    assert str(other.trouble(raised.value)).startswith("tracker 'CSVLogger': ")


def test_the_short_name_of_a_logger(tmp_path):
    """Lightning's own loggers need no package; a name that none of them has gets one line."""
    (short,) = trackers(
        {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}}, tmp_path
    )
    short.connect()
    assert (short.library, short.address) == ("lightning.pytorch.loggers", "CSVLogger")
    with pytest.raises(BadInput, match=r"class_path '.*NoLogger': .*; write package.Class"):
        send({"class_path": "NoLogger"}, tmp_path, {})


def test_another_logger_is_fed_from_the_metrics_file(tmp_path, monkeypatch):
    """CSVLogger, by the thread: every line, and after a second command none of them again."""
    for step in range(3):
        runs.append_metrics(tmp_path, step, {"loss": 1.0 / (1 + step)})
    chosen = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    for version in ("first", "second"):
        init = {"save_dir": str(tmp_path / "csv"), "name": "", "version": version}
        send({**chosen, "init_args": init}, tmp_path, {})
    assert (tmp_path / "csv/first/metrics.csv").read_text().split() == [
        "loss,step",
        "1.0,0",
        "0.5,1",
        f"{1 / 3},2",
    ]
    assert not (tmp_path / "csv/second/metrics.csv").exists()


def test_a_run_without_a_tracker_is_not_pushed(tmp_path):
    """Its config.yaml must stay as it is: the digest of a changed one does not match."""
    with pytest.raises(
        BadInput, match=f"run '{tmp_path.name}': .*; the run has no tracker to push to"
    ):
        send(False, tmp_path, {})


def test_two_loggers_of_a_class_have_files_of_their_own(tmp_path):
    """Each notes what it has itself: what the first has sent is not taken for sent by the
    second.
    """
    runs.append_metrics(tmp_path, 0, {"loss": 1.0})
    name = "lightning.pytorch.loggers.CSVLogger"
    both = [
        {
            "class_path": name,
            "init_args": {"save_dir": str(tmp_path), "name": "", "version": version},
        }
        for version in ("a", "b")
    ]
    send(both[:1], tmp_path, {})
    send(both, tmp_path, {})
    for version in ("a", "b"):
        assert (tmp_path / version / "metrics.csv").read_text().split() == ["loss,step", "1.0,0"]
    kept = {path.name for path in tmp_path.glob("*.json")}
    assert kept == {"sent-CSVLogger.json", "sent-CSVLogger-2.json"}

    first, second = trackers([{"class_path": "MLFlowLogger"}] * 2, tmp_path)
    for tracker, record in ((first, "x"), (second, "y")):
        assert isinstance(tracker, MLflow)
        tracker.run_id = record
        tracker.begin(None)
    assert json.loads((tmp_path / "mlflow.json").read_text())["run_id"] == "x"
    assert json.loads((tmp_path / "mlflow-2.json").read_text())["run_id"] == "y"
    trackers([{"class_path": "WandbLogger"}] * 2, tmp_path)
    ids = {
        json.loads((tmp_path / name).read_text())["id"] for name in ("wandb.json", "wandb-2.json")
    }
    assert len(ids) == 2


def test_an_older_run_with_one_file_for_all_loggers(tmp_path):
    """Rows that the old sent.json records are not sent again; a second logger of the same class
    gets all rows.
    """
    runs.write_json(tmp_path / "sent.json", {"CSVLogger": 70, "WandbLogger": 50})
    chosen = [{"class_path": name} for name in ("WandbLogger", "CSVLogger", "CSVLogger")]
    assert [tracker.start() for tracker in trackers(chosen, tmp_path)] == [50, 70, 0]


def test_the_tail_of_a_file_that_is_cut_and_grows_again(tmp_path):
    """Torn lines wait for their end; a file that was cut back gives nothing new until it is longer
    than it was.
    """
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.rows() == []
    lines = [json.dumps({"step": step, "loss": step / 10}) + "\n" for step in range(4)]
    path.write_text("".join(lines[:2]) + lines[2][:5])
    assert tail.rows() == [(0, {"loss": 0.0}), (1, {"loss": 0.1})]
    path.write_text(lines[0])
    assert tail.rows() == []
    path.write_text("".join(lines[:3]))
    assert tail.rows() == [(2, {"loss": 0.2})]
    path.write_text(
        "".join(lines[:2]) + "rubbish that is longer than the line before was\n" + lines[3]
    )
    assert [step for step, _ in tail.rows()] == [0, 1, 3]


class Client:
    """An MLflow store that loses its answer, as a server does that dies after it wrote."""

    def __init__(self):
        self.kept: list[Any] = []
        self.dies = True

    def get_run(self, run_id: str) -> Any:
        latest = {metric.key: metric for metric in self.kept}
        return type("Run", (), {"data": type("Data", (), {"_metric_objs": list(latest.values())})})

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.kept += metrics
        if self.dies:
            raise ConnectionError("no answer")


def test_what_arrived_without_an_answer_is_not_sent_again(tmp_path):
    tracker = MLflow(tmp_path, {"run_id": "x"})
    tracker._client = Client()
    rows = [(step, {"loss": 1.0, "l0": 2.0}) for step in range(3)]
    with pytest.raises(ConnectionError):
        tracker.metrics(rows, 0)
    tracker._client.dies = False
    tracker.metrics([*rows, (3, {"loss": 0.5})], 0)
    assert [(m.key, m.step) for m in tracker._client.kept].count(("loss", 1)) == 1
    assert len(tracker._client.kept) == 7


def test_a_training_never_waits_for_a_tracker(tmp_path, monkeypatch):
    """While one request of a tracker hangs, `begin` returns, and at the end the wait is bounded."""
    monkeypatch.setattr(copies, "AT_ONCE", 0.1)
    monkeypatch.setattr(copies, "PATIENCE", 0.2)
    hung = threading.Event()

    class Hangs(MLflow):
        def connect(self) -> None:
            hung.wait(10)

    both = copies.Copies([Hangs(tmp_path, {})], tmp_path)
    started = time.monotonic()
    with both:
        both.connect()
        both.begin({"seed": 0})
        (error,) = both.complete()
    assert time.monotonic() - started < 8  # the request hangs for 10
    assert "it takes too long" in str(error)
    assert json.loads((tmp_path / "uncopied.json").read_text())["trackers"]
    hung.set()


class Rejects(MLflow):
    """A tracker that can never work, and takes its time to say so."""

    def __init__(self, folder: Path, given: dict[str, Any]):
        super().__init__(folder, given)
        self.asked = threading.Event()

    def connect(self) -> None:
        self.asked.wait(10)
        raise BadInput("tracker 'slow': no such project; name another")


def failed_late(tracker: Rejects, late: copies.Copies) -> None:
    """Let the tracker answer, and wait until its thread has noted the error."""
    tracker.asked.set()
    deadline = time.monotonic() + 10
    while late._copies[0].error is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def rejects(tmp_path, monkeypatch) -> Rejects:
    monkeypatch.setattr(copies, "AT_ONCE", 0.1)
    monkeypatch.setattr(copies, "RETRY", 0.05)
    return Rejects(tmp_path, {})


def test_a_tracker_that_rejects_late_ends_the_command_before_the_training(rejects, tmp_path):
    """The error comes after `connect` has stopped waiting for it."""
    late = copies.Copies([rejects], tmp_path)
    with late:
        late.connect()
        failed_late(rejects, late)
        with pytest.raises(BadInput, match="no such project"):
            late.begin({"seed": 0})
        late.abandon()


def test_a_tracker_that_rejects_during_the_training_gets_one_line(rejects, tmp_path, caplog):
    """The training is not ended; further tries, which fail as well, log nothing."""
    late = copies.Copies([rejects], tmp_path)
    with late:
        late.connect()
        late.begin({"seed": 0})
        failed_late(rejects, late)
        time.sleep(0.3)
        (error,) = late.complete()
    assert str(error) == "tracker 'slow': no such project; name another"
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        line
        == f"{error}. The work continues without it; send the copy later: {PUSH} {tmp_path.name}"
    )


# ---- what is printed -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, BadInput("tracker 'x': no answer")])
def test_the_end_of_the_copies_is_printed(tmp_path, monkeypatch, error):
    """A line says that they are complete, and how long it took; or a warning, that one is not."""

    class Ended(Copies):
        def __len__(self):
            return 1

        def complete(self, names=runs.MIRRORED):
            return [error] if error else []

    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            publishing.log, level, lambda text, *values: lines.append(text % values)
        )
    publishing.publish(Ended([], tmp_path / "tms"))
    assert lines[0] == "run tms: completing the copies of its files in the trackers ..."
    last = f"{error}. The run itself is whole; send the copy later: {PUSH} tms"
    assert lines[1:] == [last if error else "run tms: the copies are complete (0 s)"]
