"""An artifact from a stranger: nothing that it names is run, by any verb; only files of a run are
taken.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny_run import lay_out, one_figure

from spd_lightning import classes, cli, config, json_files, runs
from spd_lightning.errors import BadInput
from spd_lightning.runs.artifacts import keep_known
from spd_lightning.training import figures, networks
from spd_lightning.training.session import Settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*max_epochs. was not set", "ignore:LightningCLI's args parameter"
)

MODULE = """\
from pathlib import Path
import torch
from lightning.pytorch import Callback
(Path({here!r}) / "ran").write_text(__name__)
class Net(torch.nn.Module): pass
class Back(Callback): pass
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[Path]:
    here = tmp_path_factory.mktemp("hostile")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("SPD_RUNS", str(lay_out(here, steps=20, batch=160)))
        patch.setattr(figures, "draw", one_figure)
        assert cli.run(["fit", "--config", "tiny"]) == 0
    yield here
    torch.set_num_threads(threads)


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, importable from, with a pulled copy of a run and a module of the
    stranger's beside it.
    """
    here = tmp_path / "here"
    shutil.copytree(finished, here)
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("SPD_RUNS", str(here / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (here / "runs/tiny").rename(here / "runs/evil")
    runs.write_json(here / "runs/evil/pulled.json", {"reference": "mlflow:evil", "origin": "0"})
    (here / "stranger.py").write_text(MODULE.format(here=str(here)))
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return here


def change(path: Path, **values: Any) -> None:
    runs.write_json(path, json_files.unsealed(json.loads(path.read_text())) | values)


VERBS = {
    "runs": (["runs", "--table"], 0),
    "intervene": (["intervene", "evil", "--input", "0.5,0,0,0,0", "--ablate", "linear1:0"], 2),
    "weights": (["weights", "evil"], 2),
    "validate": (["validate", "--config", "tiny", "--run", "evil"], 2),
    "predict": (["predict", "--config", "tiny", "--run", "evil", "--trainer.logger", "false"], 2),
    "push": (["push", "evil"], 2),
    "export": (["export", "evil"], 2),
    "edges": (["edges", "evil", "linear1:0"], 2),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_network_of_the_artifacts_own_is_not_imported(here, verb, capsys):
    change(
        here / "runs/evil/decomposition.json",
        target={"class_path": "stranger.Net", "init_args": {}},
    )
    words, code = VERBS[verb]
    assert cli.run(words) == code
    assert not (here / "ran").exists()
    assert "stranger" not in sys.modules
    if verb in ("intervene", "weights", "validate", "predict"):
        assert (
            "target 'stranger.Net': cannot be built: files can name spd_lightning.TMS"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    "path",
    [
        "",
        "X",
        ".x.Y",
        "os.system",
        "this.Zen",
        "spd_lightning.Decomposition",
        "spd_lightning.cli.os.system",
    ],
)
def test_networks_from_files_are_a_closed_list(path):
    with pytest.raises(BadInput, match="cannot be built: files can name"):
        networks.network_class(path)


def test_every_network_of_the_list_is_one():
    for name, module in networks.NETWORKS.items():
        for path in (f"spd_lightning.{name}", f"{module}.{name}"):
            assert issubclass(networks.network_class(path), torch.nn.Module)


HOSTILE = {
    "callback": {"callbacks": [{"class_path": "stranger.Back"}]},
    "system": {"callbacks": [{"class_path": "os.system", "init_args": {"command": "touch ran"}}]},
    "popen": {
        "callbacks": [
            {"class_path": "subprocess.Popen", "init_args": {"args": "touch ran", "shell": True}}
        ]
    },
    "function": {
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                "init_args": {"setup": "stranger.Net"},
            }
        ]
    },
    "profiler": {
        "profiler": {
            "class_path": "lightning.pytorch.profilers.SimpleProfiler",
            "init_args": {"dirpath": ".", "filename": "ran"},
        }
    },
    "logger": {
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "ran"},
        }
    },
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_pulled_config_names_is_not_built(here, what):
    """Its loggers, profilers and callbacks are left out; the same config in the user's own folder
    is checked.
    """
    path = here / "runs/evil/config.yaml"
    held = yaml.safe_load(path.read_text())
    held["trainer"] |= HOSTILE[what]
    path.write_text(yaml.safe_dump(held))
    taken = config.load(str(path))["trainer"]
    assert not set(taken) & set(HOSTILE[what])
    assert cli.run(["validate", "--config", str(path), "--run", "evil"]) == 0
    assert not (here / "ran").exists()
    if what not in ("profiler", "logger"):
        own = here / "own.yaml"
        own.write_text(path.read_text())
        with pytest.raises(BadInput, match=r"not one that a config may name|is no|Expected"):
            Settings(config.load(str(own)))
        assert "stranger" not in sys.modules


_LOGGER = HOSTILE["logger"]["logger"]
HIDDEN = {
    "text": {"trainer": json.dumps({"logger": _LOGGER})},
    "dotted": {"trainer.logger": json.dumps(_LOGGER)},
    "nested": {"trainer": {"logger.class_path": _LOGGER["class_path"]}},
    "appended": {"trainer": {"callbacks+": [{"class_path": "lightning.pytorch.callbacks.Timer"}]}},
}


@pytest.mark.parametrize("how", HIDDEN)
def test_a_logger_cannot_hide_in_a_pulled_config(tmp_path, how):
    """jsonargparse takes all of these; a run writes none of them."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(HIDDEN[how]))
    assert config.load(str(path)) == HIDDEN[how]  # a user's own
    runs.write_json(tmp_path / "pulled.json", {"reference": "mlflow:evil", "origin": "0"})
    with pytest.raises(BadInput, match=r"config '.*config.yaml': .*; pull the run again"):
        config.load(str(path))


def test_what_a_pulled_config_builds_on_is_filtered_too(tmp_path):
    """A picture by its name alone can be a config, in a folder that has no pulled.json of its
    own.
    """
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/a.png").write_text(
        yaml.safe_dump({"trainer": {"max_steps": 3, "logger": _LOGGER}})
    )
    (tmp_path / "config.yaml").write_text("base: figures/a.png\n")
    runs.write_json(tmp_path / "pulled.json", {"reference": "mlflow:evil", "origin": "0"})
    assert config.load(str(tmp_path / "config.yaml")) == {"trainer": {"max_steps": 3}}


def test_a_config_that_was_changed_is_not_pushed(here, capsys):
    path = here / "runs/evil/config.yaml"
    path.write_text(path.read_text() + "\n# harmless\n")
    runs.find("evil").checked_config()  # a comment changes no setting
    path.write_text("a: !!python/object/apply:os.system ['touch ran']\n")
    assert cli.run(["push", "evil"]) == 2
    assert "not valid YAML" in capsys.readouterr().err
    assert not (here / "ran").exists()


def test_push_imports_no_tracker_that_is_not_allowed(here, capsys):
    """A run that was copied without its pulled.json counts as the user's own; the closed list of
    classes holds.
    """
    run = here / "runs/evil"
    (run / "pulled.json").unlink()
    held = yaml.safe_load((run / "config.yaml").read_text())
    held["trainer"]["logger"] = {"class_path": "stranger.Back"}
    (run / "config.yaml").write_text(yaml.safe_dump(held))
    change(run / "run.json", digest=config.digest(held))
    assert cli.run(["push", "evil"]) == 2
    assert "class_path 'stranger.Back': not one that a config may name" in capsys.readouterr().err
    assert not (here / "ran").exists()
    assert "stranger" not in sys.modules


def test_the_user_may_name_a_package(here):
    """`--allow_classes` lets the user's own configs name classes of their own, for one command."""
    (here / "mine.py").write_text(MODULE.format(here=str(here)))
    own = {"trainer": {"callbacks": [{"class_path": "mine.Back"}]}}
    with pytest.raises(BadInput, match=r"class_path 'mine.Back': not one.*--allow_classes mine"):
        Settings(config.merge(config.load("tiny"), own))
    classes.trust(["mine"])
    Settings(config.merge(config.load("tiny"), own))
    assert (here / "ran").read_text() == "mine"
    classes.trust([])
    with pytest.raises(BadInput, match="not one that a config may name"):
        Settings(config.merge(config.load("tiny"), own))


def test_only_files_of_a_run_are_taken(tmp_path, caplog):
    names = [
        "config.yaml",
        "decomposition.json",
        "figures/a.png",
        "harvest/g/manifest.json",
        "harvest/g/manifest-0.json",
        "harvest/g/edges/part-0-12.parquet",
        "edges/part-0-0.parquet",
    ]
    strange = [
        "figures/net.py",
        "net.py",
        "figures/a.so",
        "x/y/z.parquet",
        ".lock",
        "harvest/g/config.yaml",
    ]
    folder = tmp_path / "run"
    for name in [*names, *strange]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "figures/link.png").symlink_to("/etc/passwd")
    keep_known(folder, "mlflow:x")
    left = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    assert sorted(left) == sorted(names)
    assert "skipped 7 files that do not belong to a run" in caplog.text
    (tmp_path / "other").mkdir()
    (tmp_path / "other/net.py").write_text("x")
    with pytest.raises(BadInput, match="none of its files belongs to a run"):
        keep_known(tmp_path / "other", "mlflow:y")
