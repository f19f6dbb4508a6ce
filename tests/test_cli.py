"""The command line: what is wrong is told in one line with exit code 2, and nothing written before
is lost.
"""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from support.tiny_run import SERVER, done, lay_out, one_figure, work_uncopied

from spd_lightning import cli, config, json_files, runs
from spd_lightning.commands import configs, results
from spd_lightning.errors import BadInput
from spd_lightning.store import SCHEMA_VERSION, Store
from spd_lightning.training import checkpoint, figures
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.tensor_files import read_tensors, write_tensors

FIT = ["fit", "--config", "tiny"]
PREDICT = ["predict", "--config", "tiny"]
SHORT = ["--trainer.max_steps", "10"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[Path]:
    """A working directory with runs/tiny in it, fitted and harvested. To be copied, not changed."""
    here = tmp_path_factory.mktemp("cli")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("SPD_RUNS", str(lay_out(here, steps=40, batch=32)))
        patch.setattr(figures, "draw", one_figure)
        assert cli.run(FIT) == 0
        assert cli.run(PREDICT) == 0
    yield here
    torch.set_num_threads(threads)


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    copy = tmp_path / "here"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(figures, "draw", one_figure)
    monkeypatch.setenv("SPD_RUNS", str(copy / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return copy


@pytest.fixture
def refused(capsys, here):
    """Runs a command that cannot work; returns the one line that says why. No file of a run may
    change.
    """

    def command(*words: str, touches: bool = False) -> str:
        before = contents(here / "runs")
        capsys.readouterr()
        assert cli.run(words) == 2
        out, err = capsys.readouterr()
        work = (
            "run ",
            "fit ",
            "predict ",
            "faithfulness ",
        )  # what a command says while it still goes well
        lines = [
            line
            for line in re.split(r"[\r\n]+|(?=faithfulness)", err)
            if line.strip() and not line.startswith(work)
        ]
        assert out == ""
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert len(lines[0]) < 420
        if not touches:
            assert contents(here / "runs") == before
        return lines[0].removeprefix("error: ")

    return command


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of runs; targets are made when needed."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")
    ]
    return {path: path.read_bytes() for path in files if "targets" not in path.parts}


# ---- what costs nothing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--debug"], ["--allow_classes", "torch"], ["--debug", "--help"]]
)
def test_options_without_a_verb_print_the_verbs(capsys, words):
    assert cli.run(words) == 0
    assert "usage: python -m spd_lightning VERB" in capsys.readouterr().out


def test_a_broken_pipe_that_is_not_our_output_is_an_error(monkeypatch, capsys):
    def failing(words):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("spd_lightning.commands.runs.main", failing)
    assert cli.run(["runs"]) == 2
    assert capsys.readouterr().err.startswith("error: Broken pipe")


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["-h"], []])
def test_help_comes_before_all_imports(words):
    """Help needs nothing but Python: no torch, no Lightning, no table, no YAML is loaded for it."""
    code = (
        f"import sys; sys.argv = ['spd'] + {words!r}; from spd_lightning.__main__ import main; "
        "main();"
        "print(*sys.modules, sep=chr(10), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "usage: python -m spd_lightning" in done.stdout
    loaded = set(done.stderr.split())
    assert not loaded & {
        "torch",
        "lightning",
        "mlflow",
        "polars",
        "numpy",
        "yaml",
        "gradio",
        "jsonargparse",
    }
    own = {name for name in loaded if name.startswith("spd_lightning.")}
    needed = (
        "__main__",
        "commands",
        "commands.option",
        "commands.options",
        "commands.query_verbs",
        "commands.verbs",
        "errors",
        "stopping",
        "terminal",
    )
    assert own == {f"spd_lightning.{name}" for name in needed}


def test_the_folder_around_the_checkout_is_no_trap(tmp_path):
    """Python takes a checkout there for the package, and its folder `runs` for our module."""
    (tmp_path / "spd_lightning" / "runs").mkdir(parents=True)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    alone["SPD_RUNS"] = str(tmp_path / "empty")
    words = [sys.executable, "-m", "spd_lightning", "runs"]
    done = subprocess.run(words, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no runs" in done.stdout + done.stderr


def test_verbs_without_a_trainer_need_no_torch(tmp_path):
    """`runs`, `list` and refusals answer without the seconds that torch and Lightning cost."""
    code = (
        "import sys; from spd_lightning.cli import run;"
        "assert run(['runs']) == run(['list']) == 0; assert run(['pull', 'x']) == run(['fti']) == "
        "2;"
        "assert not {'torch', 'lightning', 'mlflow', 'wandb', 'gradio', 'matplotlib'} & "
        "set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SPD_RUNS": str(tmp_path)},
        check=True,
        timeout=60,
    )


def test_a_reader_that_goes_away_is_no_error():
    words = f"{sys.executable} -m spd_lightning list | true"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words}"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- settings ------------------------------------------------------------------------------------

M = "model: {{init_args: {{{}}}}}"
WRONG_CONFIGS = {
    "sites: {nope: 3}": (
        M,
        "sites: pattern 'nope' matches no module of the target; choose from: linear1, linear2",
    ),
    "sites: {linear1: 0, linear2: 0}": (M, "must have at least one component"),
    "sites: {linear1: four}": (M, "config: model.sites: 'four' is not a whole number"),
    "sites: [linear1]": (M, "config: model.sites: '['linear1']' is not 'key: value' pairs"),
    "tied: {linear3: linear1}": (M, "tied: 'linear3' is not a site; did you mean 'linear"),
    "site: {linear1: 3}": (M, "config: model.site: no such setting; did you mean 'sites'?"),
    "inner_steps: many": (M, "config: model.inner_steps: 'many' is not a whole number"),
    "inner_steps: 0": (M, "inner_steps 0 in Decomposition: it must be at least 1"),
    "checkpoint_every: -1": (M, "checkpoint_every -1 in Decomposition"),
    "losses: {minimality: {coeff: lots}}": (
        M,
        "config: model.losses.minimality.coeff: 'lots' is not a number",
    ),
    "losses: {minimality: {coef: 1}}": (
        M,
        "config: model.losses.minimality.coef: no such setting; did you mean 'coeff'?",
    ),
    "losses: {reconstruction: {all: {source: stochastc}}}": (
        M,
        "'stochastc' is not one of 'ones', 'ci', 'stochastic'",
    ),
    "optimizer: {schedule: {knd: cosine}}": (
        M,
        "config: model.optimizer.schedule.knd: no such setting; did you mean 'kind'?",
    ),
    "optimizer: {schedule: {kind: cosin}}": (
        M,
        "'cosin' is not one of 'constant', 'linear', 'cosine'",
    ),
    "optimizer: {lr: -1}": (M, "lr -1.0 in optimizer: it must be above 0"),
    "importance: {kind: mpl}": (M, "config: model.importance.kind: 'mpl' is not one of 'mlp'"),
    "target: targets/tms_5-3": (M, "config 'targets/tms_5-3': no such file here"),
    "target: toy": (M, "target 'toy': "),
    "target: tms_5-2": (M, "target 'tms_5-2': does not train a target"),
    "model: {class_path: spd_lightning.Decompositon}": (
        "{}",
        "did you mean 'spd_lightning.Decomposition'?",
    ),
    "model: {class_path: nopackage.Thing}": (
        "{}",
        "class_path 'nopackage.Thing': not one that a config may name",
    ),
    "model: {class_path: spd_lightning.SparseFeatures}": (
        "{}",
        "'spd_lightning.SparseFeatures' is not a LightningModule",
    ),
    "model: 3": ("{}", "config: model: '3' is not a LightningModule; give its class_path"),
    "data: {class_path: spd_lightning.SparseFeature}": (
        "{}",
        "did you mean 'spd_lightning.SparseFeatures'?",
    ),
    "data: {init_args: {n_feature: 5}}": (
        "{}",
        "config: data.n_feature: no such setting; did you mean 'n_features'?",
    ),
    "data: {init_args: {probability: 3}}": (
        "{}",
        "probability 3.0 in SparseFeatures: it must be above 0 and at most 1",
    ),
    "data: {init_args: {n_features: 7}}": (
        "{}",
        "data: a batch [64, 7] does not go through the target",
    ),
    "trainer: {max_step: 3}": (
        "{}",
        "config: trainer.max_step: no such setting; did you mean 'max_steps'?",
    ),
    "trainer: {max_steps: three}": (
        "{}",
        "config: trainer.max_steps: 'three' is not a whole number",
    ),
    "trainer: {max_steps: -1}": (
        "{}",
        "max_steps -1 in trainer: data that is drawn on demand never ends",
    ),
    "trainer: {val_check_interval: 0}": (
        "{}",
        "config: trainer.val_check_interval: it must be at least 1",
    ),
    "trainer: {accelerator: quantum}": ("{}", "quantum"),
    "trainer: {devices: zero}": ("{}", "devices"),
    "trainer: {callbacks: [{class_path: spd_lightning.PromptGraph}]}": (
        "{}",
        "did you mean 'spd_lightning.PromptGraphs'?",
    ),
    "trainer: {callbacks: [{class_path: spd_lightning.PromptGraphs, init_args: {mde: frozen}}]}": (
        "{}",
        "config: trainer.callbacks.mde: no such setting; did you mean 'mode'?",
    ),
    "trainer: {callbacks: [{class_path: spd_lightning.PromptGraphs, init_args: {mode: frzen}}]}": (
        "{}",
        "'frzen' is not one of 'unmasked', 'ci_masked', 'frozen', 'reference'",
    ),
    "trainer: {logger: {class_path: WandbLoger}}": (
        "{}",
        "class_path 'WandbLoger': names no package",
    ),
    "seed_everything: abc": (
        "{}",
        "config: seed_everything: 'abc' is not true or false or a whole number",
    ),
    "modle: {x: 1}": ("{}", "config: modle: no such setting; did you mean 'model'?"),
    "modle: {}": ("{}", "config: modle: no such setting; did you mean 'model'?"),
    "losess: {}": (M, "config: model.losess: no such setting; did you mean 'losses'?"),
    "losses: {minimalty: {}}": (
        M,
        "config: model.losses.minimalty: no such setting; did you mean 'minimality'?",
    ),
    "trainer: {plugin: {}}": (
        "{}",
        "config: trainer.plugin: no such setting; did you mean 'plugins'?",
    ),
    "a: [1": ("{}", "config 'wrong.yaml': not valid YAML"),
}


@pytest.mark.parametrize("text", WRONG_CONFIGS)
@pytest.mark.filterwarnings("ignore:.*max_epochs. was not set")
def test_a_wrong_config(refused, here, text):
    """The line names the setting by its path, the value, and the nearest or possible ones; no run
    folder is left.
    """
    shape, said = WRONG_CONFIGS[text]
    body = text if shape == "{}" else shape.format(text)
    (here / "wrong.yaml").write_text(f"base: tiny.yaml\n{body}\n")
    assert said in refused("fit", "--config", "wrong.yaml")
    assert not (here / "runs" / "wrong").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {max_steps: 3}", "config: data, model: missing"),
        (
            "model: {class_path: spd_lightning.Decomposition, init_args: {target: target.yaml}}",
            "model.sites: missing",
        ),
        (
            "model: {init_args: {sites: {linear1: 3}}}",
            "config: model: no class_path; name the class, for example",
        ),
        ("base: 3", "config '3': no such file"),
        ("base: wrong.yaml", "builds on itself"),
    ],
)
def test_a_config_by_itself(refused, here, text, said):
    (here / "wrong.yaml").write_text(f"{text}\n")
    assert said in refused("fit", "--config", "wrong.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--trainer.max_stps 3",
            "config: trainer.max_stps: no such setting; did you mean 'max_steps'?",
        ),
        (
            "--trainer.max_st 3",
            "config: trainer.max_st: no such setting",
        ),  # a prefix that only one option has
        ("--trai.max_steps 3", "config: trai: no such setting; did you mean 'trainer'?"),
        ("--seed_every 3", "config: seed_every: no such setting; did you mean 'seed_everything'?"),
        (
            "--model.losses.minimality.coef 3",
            "config: model.losses.minimality.coef: no such setting",
        ),
        (
            "--model.losses.minimality.coef=3",
            "config: model.losses.minimality.coef: no such setting",
        ),
        (
            "--model.init_args.losses.minimality.coef 3",
            "config: model.losses.minimality.coef: no such setting",
        ),
        ("--data.n_feat 5", "config: data.n_feat: no such setting; did you mean 'n_features'?"),
        ("--model.nonsense 3", "config: model.nonsense: no such setting"),
        ("--trainer.max_steps many", "config: trainer.max_steps: 'many' is not a whole number"),
        ("--trainer.max_steps=", "config: trainer.max_steps: '' is not a whole number"),
        (
            "--trainer.max_steps",
            "config: trainer.max_steps: no value; for example: --trainer.max_steps=1",
        ),
        ("stray", "config: unexpected argument 'stray'"),
        ("--config", "'--config' needs a value; for example: --config tms.yaml"),
        ("--config --run x", "'--config' needs a value"),
        ("--run", "'--run' needs a value"),
        ("--run a/b", "run name 'a/b': use at most 100 letters"),
        ("--run targets", "run name 'targets'"),
        (
            "--config tms_52",
            (
                "config 'tms_52': no such file here, in configs/, or among the shipped ones; did "
                "you mean 'tms_5-2'?"
            ),
        ),
    ],
)
def test_wrong_words(refused, words, said):
    """No option is guessed from its beginning, none is passed over."""
    assert said in refused(*FIT, *words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fti --config tiny", "'fti': not a verb of spd_lightning; did you mean 'fit'?"),
        ("--config tiny", "'--config': not a verb"),
        ("fit", "fit: --config is missing; for example: --config tms.yaml"),
        ("predict --config tms", "run 'tms': not in "),
        ("predict --config tiny --run tniy", "did you mean 'tiny'?"),
        ("validate --config tms", "run 'tms': not in "),
        ("runs --tabel", "runs: unknown option '--tabel'; did you mean '--table'?"),
        ("runs tiny", "runs: unexpected argument 'tiny'; see: python -m spd_lightning runs --help"),
        ("list all", "list: unexpected argument 'all'"),
        ("pull", "pull: REFERENCE is missing: mlflow:<run> or wandb:"),
        ("push", "push: RUN is missing: a run's name"),
        ("push tiny --port", "push: unknown option '--port'"),
        ("push tniy", "did you mean 'tiny'?"),
        ("pull nonsense", "reference 'nonsense': write mlflow:<run> or wandb:"),
        ("pull mlflow:", "reference 'mlflow:': write mlflow:<run>"),
        ("pull mlflow:tiny", "mlflow.db': no such file yet"),
        (
            "pull wandb:nonsense",
            "reference 'wandb:nonsense': write wandb:<entity>/<project>/<artifact>:<version>",
        ),
        ("pull a b", "pull: unexpected argument 'b'"),
        ("view --prt 3", "view: unknown option '--prt'; did you mean '--port'?"),
        (
            "view --port x",
            "view: --port 'x': not a whole number of at least 1; for example: --port 7860",
        ),
        ("view --port", "view: '--port' needs a value; for example: --port 7860"),
        ("view --port 65536 --no_browser", "--port 65536: not a port"),
        (
            "view --host no-such-host.invalid",
            "--host 'no-such-host.invalid': not a name or address",
        ),
    ],
)
def test_verbs_and_their_words(refused, words, said):
    assert said in refused(*words.split())


def test_debug_shows_where_it_came_from(here):
    with pytest.raises(BadInput, match="not a verb"):
        cli.run(["--debug", "fti"])


def test_a_wrong_command_of_the_shell():
    """As a user sees it: one line, exit code 2, no traceback."""
    words = [sys.executable, "-m", "spd_lightning", "runs", "--tabel"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: runs: unknown option '--tabel'; did you mean '--table'?\n"


# ---- what is printed -----------------------------------------------------------------------------


def test_print_config(here, capsys):
    """It prints what a fit would take, as a config that says the same again; it needs no run and
    makes none.
    """
    before = contents(here / "runs")
    assert cli.run([*FIT, "--model.losses.minimality.coeff", "7e-3", "--print_config"]) == 0
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert printed["model"]["init_args"]["losses"]["minimality"]["coeff"] == 7e-3
    assert printed["model"]["init_args"]["sites"] == {"linear1": 6, "linear2": 6}  # from tiny.yaml
    assert printed["model"]["init_args"]["tied"] == {"linear2": "linear1"}  # from its base
    assert printed["trainer"]["accelerator"] == "cpu"  # from the base of that
    (here / "again.yaml").write_text(text)
    for verb in ("fit", "predict", "validate"):
        assert cli.run([verb, "--config", "again.yaml", "--print_config"]) == 0
        assert capsys.readouterr().out == text
    assert contents(here / "runs") == before


FITTED = ("toys", "language", "targets")
GROUPS = {name: configs.group_of(settings) for name, settings, _ in configs.shipped()}
"""The group in which `list` shows each shipped config."""


@pytest.mark.parametrize("name", [name for name in GROUPS if GROUPS[name].startswith(FITTED)])
def test_every_shipped_config_can_be_fitted(name, tmp_path, monkeypatch):
    """Its settings are known and of the right types, and its patterns name maps of its target;
    nothing is trained.
    """
    from spd_lightning.planning.dry_run import fake_tensors
    from spd_lightning.planning.estimate import outline
    from spd_lightning.training.session import Settings, quiet

    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    given = config.load(name)
    with quiet():
        settings = Settings(given)
        data = settings.built("data")
        target = given["model"]["init_args"]["target"]
        assert settings.config["trainer"]["max_steps"] > 0
        if GROUPS[name].startswith("targets"):
            with fake_tensors():
                network = settings.built("model").target
        elif target.partition(":")[0] in ("hf", "decoder"):
            assert configs.needs_network(given)
            return
        else:
            with fake_tensors():
                network = settings.built("model", target=outline(target)()).network
    if hasattr(network, "context"):
        assert data.seq_len <= network.context
        assert data.tokenizer_name or data.vocab == network.vocab
    assert not (tmp_path / "runs").exists()


def test_configs_that_say_so_need_no_internet_access():
    """Those listed as offline, and every target that they name."""
    for name in [n for n in GROUPS if GROUPS[n].startswith("language models, offline")]:
        given = config.load(name)
        assert not configs.needs_network(given)
        assert not configs.needs_network(config.load(given["model"]["init_args"]["target"]))
    for name in [n for n in GROUPS if GROUPS[n].startswith("language models, downloaded")]:
        text = (config.SHIPPED / name).read_text()
        assert "needs internet access" in text.lower()


def test_the_config_of_a_run_says_it_again(here):
    """runs/<run>/config.yaml names the same settings: a fit of it would be the same run."""
    made = config.load(str(here / "runs/tiny/config.yaml"))
    assert config.digest(made) == runs.Run(here / "runs/tiny").record["digest"]
    assert cli.run(["predict", "--config", "runs/tiny/config.yaml", "--run", "tiny"]) == 0


def test_runs(here, capsys):
    shutil.copytree(here / "runs/tiny", here / "runs/half")
    (here / "runs/half/summary.json").unlink()
    assert cli.run(["runs", "--json"]) == 0
    found = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert {name: run["state"] for name, run in found.items()} == {
        "tiny": "finished",
        "half": "interrupted",
    }
    assert found["tiny"]["path"] == str(here / "runs/tiny")
    assert found["tiny"]["summary"]["steps"] == 40
    assert found["half"]["summary"] == {}
    assert cli.run(["runs"]) == 0
    assert re.search(rf"^finished +{here}/runs/tiny ", capsys.readouterr().out, re.MULTILINE)
    assert cli.run(["runs", "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "site", "MMCS", "ML2R", "alive", "L0", "error", "seconds"]
    assert [line.split()[:2] for line in lines[1:2]] == [["tiny", "linear1"]]


def test_no_runs_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "nothing"))
    assert cli.run(["runs"]) == 0
    assert "fit --config tms.yaml" in capsys.readouterr().out
    assert cli.run(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_list(capsys):
    """Every config once, below what it is for, with the first line of its header."""
    assert cli.run(["list"]) == 0
    groups = dict(block.split("\n", 1) for block in capsys.readouterr().out.strip().split("\n\n"))
    lines = [line.split(maxsplit=1) for block in groups.values() for line in block.splitlines()]
    listed = dict(lines)
    assert len(listed) == len(lines)
    assert set(listed) == {
        str(path.relative_to(config.SHIPPED)) for path in config.SHIPPED.rglob("*.yaml")
    }
    assert all(listed.values())
    places = {
        "toys": ["tms.yaml", "ih.yaml"],
        "targets": ["targets/tms_5-2.yaml"],
        "shared": ["toy.yaml", "wandb.yaml", "lm.yaml"],
    }
    for group, names in places.items():
        (block,) = [block for title, block in groups.items() if title.startswith(group)]
        assert {*names} <= {line.split()[0] for line in block.splitlines()}


TOY = {
    "alive/linear1": 5,
    "alive/linear2": 5,
    "l0/linear1": 0.25,
    "l0/linear2": 0.25,
    "mmcs/linear1": 0.9995,
}
TOY |= {
    "ml2r/linear1": 0.997,
    "identity_error/linear1": 0,
    "seconds/fit": 19.6,
    "recovered/ci": 0.98,
}
LM = {
    "alive/h.0.attn.q_proj": 41,
    "alive/h.0.mlp.c_fc": 177,
    "l0/h.0.attn.q_proj": 3.25,
    "l0/h.0.mlp.c_fc": 12.5,
}
LM |= {
    "kl/ci": 0.2153,
    "task_difference/ci": 0.19,
    "recovered/ci": 0.965,
    "seconds/fit": 1201.0,
    "se/kl/ci": 0.0041,
}
LM |= {
    "task_difference/unmasked": 0.012,
    "se/task_difference/unmasked": 0.0015,
    "task/target": 2.3142,
}


def test_the_table_of_toys_and_of_language_models():
    """Runs are judged by what is known of them; where no truth is known, no empty columns stand for
    it.
    """
    toys, models = results.table([("tms", TOY), ("stories-2L", LM)]).split("\n\n")
    assert [line.split() for line in toys.splitlines()] == [
        ["run", "site", "MMCS", "ML2R", "alive", "L0", "error", "seconds"],
        ["tms", "linear1", "1.000", "0.997", "5", "0.25", "0", "20"],
        ["linear2", "5", "0.25"],
    ]
    head, *sites, kept, everything = models.splitlines()
    assert head.split() == ["run", "site", "alive", "L0", "seconds"]
    assert [line.split() for line in sites] == [
        ["stories-2L", "h.0.attn.q_proj", "41", "3.25", "1201"],
        ["h.0.mlp.c_fc", "177", "12.50"],
    ]
    masked = "under CI masks: KL 0.215 ± 0.004 nats, loss difference 0.19, recovered 96.5 %"
    assert kept.strip() == masked
    unmasked = "unmasked: loss difference 0.0120 ± 0.0015, the target's loss is 2.314"
    assert everything.strip() == unmasked
    assert results.table([]) == ""


def test_validate_gives_the_figures_of_the_fit_and_changes_nothing(here, capsys):
    before = contents(here / "runs")
    assert cli.run(["validate", "--config", "tiny"]) == 0
    figures = json.loads(capsys.readouterr().out)
    summary = runs.Run(here / "runs/tiny").summary
    assert figures == pytest.approx({name: summary[name] for name in figures}, rel=1e-6, abs=1e-6)
    assert contents(here / "runs") == before


# ---- runs that cannot be used --------------------------------------------------------------------


def test_predict_before_the_end_of_the_fit(refused, here):
    (here / "runs/tiny/summary.json").unlink()
    assert "run 'tiny': none has finished (tiny is interrupted)" in refused(*PREDICT)


@pytest.mark.parametrize("keep", [0, 8, 1000])
def test_truncated_weights(refused, here, keep):
    path = here / "runs/tiny/decomposition.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "decomposition.safetensors': cannot be read" in refused(*PREDICT)


def test_weights_of_another_run(refused, here):
    path = here / "runs/tiny/decomposition.safetensors"
    tensors, _ = read_tensors(path)
    write_tensors({name: tensor + 1 for name, tensor in tensors.items()}, path)
    assert "not the weights that decomposition.json describes" in refused(*PREDICT)


def interrupt(here: Path) -> Path:
    """Makes the finished run one that was killed before its end; returns its last checkpoint."""
    (here / "runs/tiny/summary.json").unlink()
    return here / "runs/tiny/checkpoints/last.safetensors"


def test_a_checkpoint_of_another_model(refused, here):
    path = interrupt(here)
    state = checkpoint.SafetensorsIO().load_checkpoint(path)
    state["state_dict"]["model.components.linear1.V"] = torch.ones(5, 5)
    checkpoint.SafetensorsIO().save_checkpoint(state, path)
    assert "weights of another model ('model.components.linear1.V' differs)" in refused(*FIT)


def test_a_truncated_checkpoint(refused, here):
    """Where no other one can be read either it is refused with its remedy, and the remedy works."""
    path = interrupt(here)
    for held in path.parent.iterdir():
        held.write_bytes(held.read_bytes()[:-9])
    assert ".safetensors': cannot be read" in (said := refused(*FIT))
    assert (
        f"delete the folder '{path.parent.name}', and run the same fit again to start over" in said
    )
    shutil.rmtree(path.parent)
    weights = (here / "runs/tiny/decomposition.safetensors").read_bytes()
    assert cli.run(FIT) == 0
    assert (here / "runs/tiny/decomposition.safetensors").read_bytes() == weights


def test_no_harvester(refused):
    assert "no harvester in trainer.callbacks" in refused(*PREDICT, "--trainer.callbacks", "null")


# ---- harvests that cannot be used ----------------------------------------------------------------


def graphs(here: Path) -> Path:
    return here / "runs/tiny/harvest/graphs-unmasked"


def test_a_truncated_parquet_file_is_told_and_mended(here):
    """Readers name it, or read the rest; the same predict harvests what it held again."""
    whole = {table: Store(graphs(here)).scan(table).collect() for table in ("prompts", "edges")}
    path = graphs(here) / "edges/part-0-3.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match=r"edges/part-0-3\.parquet is damaged"):
        Store(graphs(here)).scan("edges").collect()
    rest = Store(graphs(here), skip_damaged=True).scan("edges").collect()
    assert 0 < rest.height < whole["edges"].height
    assert cli.run(PREDICT) == 0
    for table, frame in whole.items():
        order = [c for c in frame.columns if frame.schema[c] != pl.List]
        assert Store(graphs(here)).scan(table).collect().sort(order).equals(frame.sort(order))


def change(path: Path, **values) -> None:
    """Writes other values into a JSON file, as a program would that means them."""
    runs.write_json(path, json_files.unsealed(json.loads(path.read_text())) | values)


def test_a_harvest_of_a_newer_schema(refused, here):
    path = graphs(here) / "manifest.json"
    change(path, schema_version=SCHEMA_VERSION + 1)
    assert f"schema_version {SCHEMA_VERSION + 1} is newer than {SCHEMA_VERSION}" in refused(
        *PREDICT
    )


def test_a_decomposition_of_a_newer_schema(refused, here):
    path = here / "runs/tiny/decomposition.json"
    change(path, schema=99)
    assert "schema 99 is newer" in refused(*PREDICT)


def test_a_harvest_of_other_weights(refused, here):
    """Rows of two decompositions never meet in one harvest."""
    path = graphs(here) / "manifest.json"
    change(path, checkpoint_digest="0" * 16)
    assert "made with checkpoint_digest" in refused(*PREDICT)


# ---- trackers that do not answer -----------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch) -> str:
    """An address that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


def test_a_harvest_without_its_tracker(here, nobody, capsys):
    """A tracker that does not answer is named before the work begins, and stops nothing."""
    assert cli.run([*PREDICT, "--trainer.logger", "true"]) == 0
    first, last = [
        line for line in capsys.readouterr().err.splitlines() if f"tracker '{nobody}'" in line
    ]
    assert "no answer" in first
    assert last.endswith("python -m spd_lightning push tiny")


def test_a_copy_that_did_not_arrive_is_sent_by_push(here):
    """A tracker that fails at the very end costs nothing: the run is whole, and a small verb sends
    it.

    In processes of their own: MLflow remembers the store it first spoke to.
    """
    words = [*FIT, "--trainer.logger", "true", *SHORT]
    process = SERVER.Process(target=work_uncopied, args=(here / "runs", words, {}))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    said = (here / "said").read_text().splitlines()[-1]
    assert said.endswith(
        "The run itself is whole; send the copy later: python -m spd_lightning push tiny-2"
    )
    assert runs.Run(here / "runs/tiny-2").state == "finished"
    assert not list((here / "runs/mlartifacts").rglob("decomposition.safetensors"))
    mark = here / "runs/tiny-2/uncopied.json"
    assert mark.exists()
    before = contents(here / "runs/tiny-2")
    done(here / "runs", ["push", "tiny-2"])
    assert contents(here / "runs/tiny-2") | {mark: before[mark]} == before
    assert not mark.exists()
    (sent,) = (here / "runs/mlartifacts").rglob("decomposition.safetensors")
    assert sent.read_bytes() == (here / "runs/tiny-2/decomposition.safetensors").read_bytes()


def test_pull_from_an_unreachable_tracker(refused, nobody):
    assert "no answer" in refused("pull", "mlflow:tiny")


def test_wandb_without_a_network(here, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert cli.run([*FIT, *SHORT, "--config", "wandb", "--run", "alone"]) == 0
    said = capsys.readouterr().err
    assert "tracker 'http://127.0.0.1:9': no answer" in said
    assert "set WANDB_MODE=offline" in said
    assert runs.Run(here / "runs/alone").state == "finished"


# ---- variables of launchers ----------------------------------------------------------------------

SBATCH = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "5", "SLURM_PROCID": "0"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (SBATCH, "SLURM_NTASKS=2: ignored, because srun did not start this command"),
        ({"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_NTASKS": "2(x2)"}, "SLURM_NTASKS=2(x2): ignored"),
        ({"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4"}, "RANK=3, LOCAL_RANK=1: ignored"),
        ({"LOCAL_RANK": "0"}, ""),
        (TORCHRUN, ""),  # the first of two processes that train alone
    ],
)
def test_variables_that_a_launcher_left(here, monkeypatch, capsys, left, said):
    """They are ignored, with a line if they would have changed anything; everything is logged as
    ever.
    """
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert cli.run([*FIT, *SHORT]) == 0
    err = capsys.readouterr().err
    assert said in err
    assert ("ignored" in err) == bool(said)
    assert runs.Run(here / "runs/tiny-2").metrics().height > 1


def test_a_launcher_that_does_not_fit_the_config(refused, monkeypatch):
    for name, value in (SBATCH | {"SLURM_STEP_ID": "0"}).items():
        monkeypatch.setenv(name, value)
    assert "--ntasks-per-node=2" in refused(*FIT, *SHORT)


# ---- disks that refuse ---------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk is to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_fit_on_a_full_disk(refused, here):
    """It ends in one line wherever it happens (record, checkpoint, log), and goes on once there is
    room.
    """
    finished = contents(here / "runs/tiny")
    for size, stopped_by in ((600, "config.yaml"), (9000, "last.safetensors"), (14000, "")):
        with largest_file(size):
            said = refused(*FIT, touches=True)
        assert stopped_by in said
        assert "make room" in said
        assert contents(here / "runs/tiny") == finished
        assert not list((here / "runs").rglob("*.new"))
    assert cli.run(FIT) == 0
    for name in ("decomposition.safetensors", "metrics.jsonl"):
        assert (here / "runs/tiny-2" / name).read_bytes() == (
            here / "runs/tiny" / name
        ).read_bytes()


def test_a_predict_on_a_full_disk(refused, here):
    """What was committed stays readable, and the same predict adds the rest."""
    whole = Store(graphs(here)).manifest
    sizes = [
        max(path.stat().st_size for path in graphs(here).glob(f"*/part-0-{n}.*")) for n in range(6)
    ]
    shutil.rmtree(graphs(here))
    with largest_file(sizes[0]):  # the first group has room
        assert "make room" in refused(*PREDICT, touches=True)
    part = Store(graphs(here))
    assert 0 < part.manifest["shards"] < whole["shards"]
    assert not part.manifest["complete"]
    for table in part.tables:
        part.scan(table).collect()
    assert cli.run(PREDICT) == 0
    assert Store(graphs(here)).manifest["rows"] == whole["rows"]


@pytest.mark.parametrize("words", [FIT, [*FIT, "--run", "x"]])
def test_runs_below_a_file(refused, here, monkeypatch, words):
    (here / "file").write_text("no folder")
    monkeypatch.setenv("SPD_RUNS", str(here / "file" / "runs"))
    assert "file" in refused(*words)
    assert cli.run(["runs"]) == 0


def test_a_place_that_takes_no_files(refused, monkeypatch):
    """The kernel's own file system refuses even root."""
    monkeypatch.setenv("SPD_RUNS", "/proc/spd")
    assert "/proc/spd" in refused(*FIT)


# ---- runs beside each other ----------------------------------------------------------------------


def test_a_second_fit_is_a_run_of_its_own(here, capsys):
    """A finished run is not touched, nor one that another process works on: the next number is
    taken, and the command that is shown next harvests from that run.
    """
    before = contents(here / "runs/tiny")
    settings = config.load(str(here / "runs/tiny/config.yaml"))
    settings["trainer"]["max_steps"] = 10
    with runs.acquire_run("tiny", settings) as held:
        assert held.path == here / "runs/tiny-2"
        assert cli.run([*FIT, *SHORT]) == 0
    out, err = capsys.readouterr()
    assert (
        "run tiny: already finished; training a new run, tiny-3. To harvest from tiny: "
        "python -m spd_lightning predict --config tiny --run tiny\n"
    ) in err
    assert err.index("already finished") < err.index("fit tiny-3")
    last = out.splitlines()[-1]
    assert last.endswith("python -m spd_lightning predict --config tiny --run tiny-3")
    assert contents(here / "runs/tiny") == before
    assert runs.Run(here / "runs/tiny-2").state == "interrupted"
    assert runs.Run(here / "runs/tiny-3").summary["steps"] == 10
    assert runs.newest("tiny").name == "tiny-3"
    assert Decomposition.from_pretrained("tiny").origin == "tiny"


def in_bash(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in a folder, with this checkout's package."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [("runs >&-", 0), ("--help >&-", 0), ("--help >/dev/full", 2), ("runs >/dev/full", 2)],
)
def test_output_that_goes_nowhere(tmp_path, command, code):
    """A closed output is not an error; a full disk gives one line."""
    line = f"{sys.executable} -m spd_lightning {command}"
    done = in_bash(line, tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") <= 1
    assert "Traceback" not in done.stderr


def test_a_folder_that_was_deleted(tmp_path):
    line = (
        f"mkdir gone && cd gone && rmdir ../gone && {sys.executable} -m spd_lightning plan "
        "--config tms_5-2.yaml"
    )
    done = in_bash(line, tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: the current folder was deleted; change to another one (cd) and try again\n"
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("trainer:\n", "config: trainer: expected 'key: value' lines"),
        ("trainer: [1]\n", "config: trainer: expected 'key: value' lines"),
        ("config: 3\n", "config: config: not a setting"),
        (f"trainer: {{max_steps: 1{'0' * 400}}}\n", "trainer.max_steps"),
    ],
)
def test_shapes_of_configs_that_nothing_can_be_built_from(refused, here, text, part):
    (here / "shape.yaml").write_text(f"base: tms\n{text}")
    assert part in refused("plan", "--config", "shape.yaml")


@pytest.mark.parametrize(
    "option", ["--model.target", "--model.init_args.target", "--trainer.logger", "--data"]
)
def test_a_file_in_place_of_a_setting_is_not_shown(refused, here, option):
    (here / "secret.txt").write_text("hush\nhush\n")
    said = refused("plan", "--config", "tms", option, "secret.txt")
    assert f"{option} 'secret.txt': this is a file, not a setting" in said
    assert "hush" not in said


def test_help_imports_no_module_that_it_does_not_know(refused):
    assert "--help this.x: not a class with settings" in refused("fit", "--help", "this.x")
    assert "this" not in sys.modules
