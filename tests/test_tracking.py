"""Trackers, end to end: what MLflow and W&B get of a run, and what can be fetched from there."""

import json
import os
from pathlib import Path

import pytest
import torch
from polars.testing import assert_frame_equal
from support.tiny_run import done, killed, lay_out

from spd_lightning import cli, config, files, json_files, runs
from spd_lightning.digests import digest
from spd_lightning.runs import references, trackers
from spd_lightning.runs.files import read_metrics
from spd_lightning.store import TABLES, Store
from spd_lightning.tracking.trackers import acceptable
from spd_lightning.training.decompose import Decomposition

pytestmark = [
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
]
BOTH = ["--config", "tiny", "--config", "both"]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run fitted and harvested with both trackers, killed once on the way, where no network can
    be reached.
    """
    here = tmp_path_factory.mktemp("tracking")
    root = lay_out(here, steps=120, batch=32)
    alone = {
        f"WANDB_{kind}_DIR": str(here / "wandb" / kind) for kind in ("CACHE", "DATA", "CONFIG")
    }
    alone |= {"HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE, "WANDB_SILENT": "true"}
    checkpoint = root / "tiny/checkpoints/last.safetensors"
    killed(root, ["fit", *BOTH, "--run", "tiny"], checkpoint.exists, **alone)
    done(root, ["fit", *BOTH, "--run", "tiny"], **alone)
    done(root, ["predict", *BOTH, "--run", "tiny"], **alone)
    return root


@pytest.fixture
def client(root, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("SPD_RUNS", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return MlflowClient(runs.tracking_uri())


def tracked(client):
    """The one MLflow run there is: killed, resumed and harvested, it stayed the same."""
    experiment = client.get_experiment_by_name("spd_lightning")
    (only,) = client.search_runs([experiment.experiment_id])
    return only


def test_mlflow_holds_the_run(client, root):
    run = tracked(client)
    assert run.info.run_name == "tiny"
    assert run.info.status == "FINISHED"
    assert run.info.run_id == json.loads((root / "tiny/mlflow.json").read_text())["run_id"]


def test_mlflow_holds_the_settings(client, root):
    """Every setting is a hyperparameter under its path, nested ones flattened."""
    params = tracked(client).data.params
    assert params["model/init_args/losses/minimality/coeff"] == "0.003"
    assert params["model/init_args/inner_steps"] == "5"
    assert params["trainer/max_steps"] == "120"
    assert params["seed_everything"] == "0"
    made = config.load(str(root / "tiny/config.yaml"))

    def flat(tree, path=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{path}{key}/")
            elif not isinstance(value, list):
                yield f"{path}{key}", str(value)

    leaves = dict(flat(made))
    assert len(leaves) > 50
    assert leaves.items() <= params.items()


def test_mlflow_holds_the_metrics(client, root):
    """The same curves as the run's own metrics.jsonl, and the figures of its summary."""
    run = tracked(client)
    logged = read_metrics(root / "tiny")
    for name in ("train/loss", "l0/linear1", "mse/ci"):
        held = {
            point.step: point.value for point in client.get_metric_history(run.info.run_id, name)
        }
        assert held == pytest.approx(
            {values["step"]: values[name] for values in logged if name in values}
        )
        assert len(held) > 3
    summary = runs.Run(root / "tiny").summary
    assert run.data.metrics["l0/linear1"] == pytest.approx(summary["l0/linear1"])


def test_mlflow_holds_the_files(client, root):
    """Config, result, figures and the harvest, byte for byte; checkpoints stay at home."""
    run_id = tracked(client).info.run_id

    def files(folder=None):
        for item in client.list_artifacts(run_id, folder):
            yield from files(item.path) if item.is_dir else [item.path]

    held = set(files())
    assert {
        "config.yaml",
        "decomposition.safetensors",
        "decomposition.json",
        "summary.json",
        "metrics.jsonl",
    } <= held
    harvest = "harvest/graphs-unmasked"
    assert {"figures/mean_importance.png", f"{harvest}/manifest.json"} <= held
    assert f"{harvest}/summary.html" in held  # which MLflow shows, unlike Parquet
    here = {str(p.relative_to(root / "tiny")) for p in (root / "tiny").rglob("*") if p.is_file()}
    ours = ("checkpoints", "wandb", "mlflow", "sent", ".")
    locks = ("/.lock", "/.readers")
    away = {name for name in here if name.startswith(ours) or any(lock in name for lock in locks)}
    assert held == here - away


def test_mlflow_knows_the_lineage(client, root):
    """The run, its weights and its config, of the run itself and of its harvest."""
    tags = tracked(client).data.tags
    decomposition = json.loads((root / "tiny/decomposition.json").read_text())
    common = {
        "run": "tiny",
        "config": digest(root / "tiny/config.yaml"),
        "checkpoint": decomposition["digest"],
    }
    for part in ("run", "harvest/graphs-unmasked"):
        said = json.loads(tags[f"spd.{part}"])
        own = said.pop("digest")
        assert said == common
        assert len(own) == 16


@pytest.mark.parametrize("said", ['{"digest": "0000000000000000"}', "nonsense", '{"digest": 7}'])
def test_files_of_another_digest_are_not_pulled(client, root, said, tmp_path, monkeypatch, capsys):
    """As after an upload that was interrupted in the middle of a harvest that has grown."""
    record = tracked(client)
    tag = "spd.harvest/graphs-unmasked"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", runs.tracking_uri())
    monkeypatch.setenv("SPD_RUNS", str(tmp_path))
    client.set_tag(record.info.run_id, tag, said)
    try:
        assert cli.run(["pull", "mlflow:tiny"]) == 2
    finally:
        client.set_tag(record.info.run_id, tag, record.data.tags[tag])
    (line,) = capsys.readouterr().err.splitlines()
    assert "'mlflow:tiny': its part 'harvest/graphs-unmasked' has the digest" in line
    assert not list(tmp_path.glob("[!.]*"))


def test_a_pulled_run_is_the_run(client, root, tmp_path, monkeypatch, capsys):
    """Fetched to another machine it opens there: tables, weights, figures; asking twice fetches
    once.
    """
    whole = Store(root / "tiny/harvest/graphs-unmasked")
    weights = Decomposition.from_pretrained(root / "tiny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", runs.tracking_uri())
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "elsewhere"))
    assert cli.run(["pull", "mlflow:tiny"]) == 0
    path = tmp_path / "elsewhere/tiny-pulled"
    assert f"run: {path}" in capsys.readouterr().out
    store = Store(path / "harvest/graphs-unmasked")
    assert store.manifest == whole.manifest
    for table in TABLES:
        assert_frame_equal(store.scan(table).collect(), whole.scan(table).collect())
    assert not (path / "harvest/graphs-unmasked/summary.html").exists()  # could run scripts
    assert found_by_search("tiny-pulled", capsys) == found_by_search(str(root / "tiny"), capsys)
    monkeypatch.setattr(references, "pull", lambda *_: pytest.fail("fetched twice"))
    assert runs.find("mlflow:tiny").path == path
    pulled = Decomposition.from_pretrained("mlflow:tiny")
    assert all(torch.equal(v, weights.state_dict()[k]) for k, v in pulled.state_dict().items())
    assert runs.Run(path).state == "finished"
    assert runs.Run(path).summary == runs.Run(root / "tiny").summary


def found_by_search(run: str, capsys) -> list[dict]:
    """The prompts that need the component of the strongest node."""
    harvest = Store(runs.find(run).path / "harvest/graphs-unmasked")
    nodes = harvest.scan("nodes").filter(kind="component").sort("importance", "prompt_id").collect()
    (layer, component) = nodes.select("layer", "component").row(-1)
    capsys.readouterr()
    assert cli.run(["search", run, f"{layer}:{component}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] > 0
    return found["items"]


def test_a_record_that_the_tracker_has_lost(client, root, capsys, monkeypatch):
    """It is told before the work begins, with the way out."""
    monkeypatch.chdir(root.parent)
    path = root / "tiny/mlflow.json"
    known = path.read_text()
    runs.write_json(path, json_files.unsealed(json.loads(known)) | {"run_id": "f" * 32})
    assert cli.run(["predict", "--config", "tiny", "--trainer.logger", "true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: tracker 'sqlite:")
    assert f"delete '{path}'" in line
    path.write_text(known)


def test_pulling_what_is_not_there(client, capsys):
    assert cli.run(["pull", "mlflow:tyni"]) == 2
    assert "choose from: tiny" in capsys.readouterr().err


def test_wandb_keeps_its_files_in_the_run(root):
    """Offline, each command leaves one record, all of the same W&B run, with settings, curves and
    artifacts in it.
    """
    records = sorted((root / "tiny/wandb").glob("offline-run-*/run-*.wandb"))
    name = json.loads((root / "tiny/wandb.json").read_text())["id"]
    assert len(records) == 3
    assert {record.name for record in records} == {f"run-{name}.wandb"}
    fitted, harvested = (record.read_bytes() for record in records[1:])
    for held in (
        b"train/loss",
        b"l0/linear1",
        b"minimality",
        b"tiny-run",
        b"decomposition.safetensors",
        digest(root / "tiny/config.yaml").encode(),  # in the artifact's metadata
    ):
        assert held in fitted
    weights = json.loads((root / "tiny/decomposition.json").read_text())["digest"].encode()
    for held in (b"tiny-harvest-graphs-unmasked", b"manifest.json", b"summary.html", weights):
        assert held in harvested
    assert not (root.parent / "wandb/run").exists()


def test_patterns_of_sites_are_logged_as_text():
    """MLflow takes no stars in the name of a parameter; all else keeps its shape."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_param_name

    settings = {
        "model": {"sites": {"h.*.attn.*_proj": 3}, "lr": 0.1},
        "data": {"a b/c-d:e.f_1": {}},
    }
    taken = acceptable(settings)
    assert taken == {
        "model": {"sites": '{"h.*.attn.*_proj": 3}', "lr": 0.1},
        "data": {"a b/c-d:e.f_1": {}},
    }
    for name in ("model/sites", "model/lr"):
        _validate_param_name(name)
    with pytest.raises(MlflowException):
        _validate_param_name("model/sites/h.*")


def test_a_store_that_is_killed_while_it_is_made_leaves_nothing(tmp_path, monkeypatch):
    """Half of its tables would be a store that nothing opens again."""
    from mlflow.store.db import utils

    monkeypatch.setenv("SPD_RUNS", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = list[str]()

    def killed(engine):
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE model_version_tags (key TEXT)")
        made.append(str(engine.url))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "mlflow.store.tracking.sqlalchemy_store.mlflow.store.db.utils._initialize_tables",
            killed,
        )
        with pytest.raises(KeyboardInterrupt):
            trackers.mlflow_client(trackers.embedded_uri())
    assert made
    killed_by_the_system = f".mlflow.db{files.mark()}".replace(str(os.getpid()), "999999999")
    (tmp_path / killed_by_the_system).touch()
    assert utils._initialize_tables is not killed
    assert not (tmp_path / "mlflow.db").exists()
    assert trackers.mlflow_client(trackers.embedded_uri()).search_experiments()
    assert not list(tmp_path.glob(".*.new"))
