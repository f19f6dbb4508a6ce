"""The verb `sites`: maps in groups, and first configs that can be planned and fitted."""

import json

import pytest
import torch
import yaml
from support.tiny_checkpoints import write
from support.tiny_run import one_figure
from torch import nn

from spd_lightning import cli, config
from spd_lightning.commands import configs, sites
from spd_lightning.decomposition.components import find_sites
from spd_lightning.training import figures
from spd_lightning.training.session import Settings, quiet


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(figures, "draw", one_figure)
    return tmp_path


class Strange(nn.Module):
    """Numbers that are no layers, maps of several shapes under one pattern, and a map without a
    number.
    """

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(
            [nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 6 + k)}) for k in range(3)]
        )
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7)


def test_patterns_name_their_group_and_nothing_else():
    """Each pattern, given to a decomposition, names the maps that its line counts; together they
    name all.
    """
    network = Strange()
    groups = sites.grouped(network)
    assert [group.pattern for group in groups] == [
        "h.*.a",
        "h.0.b",
        "h.1.b",
        "h.2.b",
        "embed",
        "out",
    ]
    named = []
    for group in groups:
        assert list(find_sites(network, {group.pattern: 2})) == group.names
        named += group.names
    assert sorted(named) == sorted(find_sites(network, {"*": 1}))
    alone = sites.grouped(network, apart=True)
    assert sorted(group.pattern for group in alone) == sorted(named)
    kinds = {group.pattern: (group.kind, group.d_in, group.d_out) for group in groups}
    assert kinds["embed"] == ("Embedding", 7, 4)
    assert kinds["h.2.b"] == ("Linear", 4, 8)


@pytest.mark.parametrize(
    ("d_in", "d_out", "components"),
    [
        (5, 2, 10),
        (40, 10, 40),
        (128, 128, 260),
        (128, 512, 520),
        (768, 3072, 1540),
        (4096, 4096, 8200),
    ],
)
def test_suggested_components_can_add_up_to_the_weight(d_in, d_out, components):
    """Twice the rank at least, and as many as the wider side has features, up to 1000; in tens."""
    assert sites.Group("", [], "Linear", d_in, d_out).components == components


@pytest.mark.parametrize(("kind", "fully"), [("gpt2", "Conv1D"), ("llama", "Linear")])
def test_a_checkpoint_from_its_maps_to_a_run(here, capsys, kind, fully):
    """`sites --write` on a folder, then `plan` and a few steps of `fit` of what it wrote, with
    nothing added.
    """
    write(here / "checkpoint", kind, vocab_size=300)
    assert cli.run(["sites", "hf:checkpoint", "--write", "first.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:] if line.strip()}
    first = "transformer.h.*.mlp.c_fc" if kind == "gpt2" else "model.layers.*.mlp.up_proj"
    assert rows[first] == [
        "2",
        fully,
        "24",
        "96" if kind == "gpt2" else "40",
        "100" if kind == "gpt2" else "50",
    ]
    made = config.load("first.yaml")
    assert made["model"]["init_args"]["target"] == "hf:checkpoint"
    assert first in made["model"]["init_args"]["sites"]
    assert not any(
        "embed" in pattern or "wte" in pattern for pattern in made["model"]["init_args"]["sites"]
    )
    assert not configs.needs_network(made)
    if kind == "llama":  # as the network of the other is no quicker
        small = ["--data.corpus", "corpus.txt", "--data.batch_size", "2", "--data.seq_len", "6"]
        assert cli.run(["plan", "--config", "first.yaml", "--device", "laptop", *small]) == 0
        assert "5,000 steps" in capsys.readouterr().out
        (here / "corpus.txt").write_text(
            "\n\n".join(f"Mia went to the park {k} times ." for k in range(100))
        )
        short = [
            "--trainer.max_steps",
            "2",
            "--model.inner_steps",
            "1",
            "--model.warm_up.steps",
            "2",
        ]
        short += [
            "--data.validation_batches",
            "1",
            "--trainer.logger",
            "false",
            "--trainer.val_check_interval",
            "2",
        ]
        short += ["--model.evaluation.pgd_steps", "[]", "--trainer.precision", "32", *small]
        assert cli.run(["fit", "--config", "first.yaml", *short]) == 0
        assert (here / "runs/first/summary.json").exists()


@pytest.mark.parametrize("name", ["targets/tms_5-2", "targets/ih", "pretrain/stories-1L-tiny"])
def test_a_first_config_of_a_target_that_a_config_trains(here, capsys, name):
    """Its settings are known, and its data are those that the target is trained on."""
    assert cli.run(["sites", name, "--write", "first.yaml"]) == 0
    assert "config: first.yaml    next: python -m spd_lightning plan" in capsys.readouterr().out
    made = config.load("first.yaml")
    with quiet():
        Settings(made)
    assert made["data"]["class_path"] == config.load(name)["data"]["class_path"]


def test_deep_models_begin_with_a_middle_layer():
    blocks = [nn.ModuleDict({"up": nn.Linear(4, 16), "down": nn.Linear(16, 4)}) for _ in range(12)]
    network = nn.ModuleDict({"h": nn.ModuleList(blocks), "out": nn.Linear(4, 9)})
    assert sites.chosen(sites.grouped(network)) == {"h.6.up": 20, "h.6.down": 20}


def test_matrices_that_cannot_be_sites_are_named():
    """Experts and routers of their own kind: whoever decomposes the rest should know that they are
    there.
    """
    network = nn.ModuleDict(
        {"up": nn.Linear(4, 16), "norm": nn.LayerNorm(4), "experts": nn.Module()}
    )
    assert list(sites._left_out(network)) == []
    for number in range(4):
        network["experts"].register_parameter(f"e{number}", nn.Parameter(torch.zeros(2, 3, 4)))
    _, line = sites._left_out(network)
    assert line.endswith(
        "experts.e0 [2, 3, 4], experts.e1 [2, 3, 4], experts.e2 [2, 3, 4] and 1 more"
    )


def test_json(here, capsys):
    assert cli.run(["sites", "targets/tms_5-2", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == {
        "pattern": "linear1",
        "names": ["linear1"],
        "kind": "Linear",
        "d_in": 5,
        "d_out": 2,
        "components": 10,
    }
    assert second["pattern"] == "linear2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("hf:nowhere/at/all", "model 'nowhere/at/all': no such folder"),
        ("targets/tms_5-3", "config 'targets/tms_5-3': no such file"),
        ("tms", "target 'tms': does not train a target"),
        ("targets/tms_5-2 --write have.yaml", "--write 'have.yaml': it already exists"),
        ("targets/tms_5-2 --write no/first.yaml", "folder 'no' does not exist"),
    ],
)
def test_bad_words(here, capsys, words, said):
    (here / "have.yaml").write_text("")
    assert cli.run(["sites", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_the_example_explains_every_key_that_a_first_config_has(here):
    """my-checkpoint.yaml has at least the keys that `sites --write` writes."""
    text = (config.SHIPPED / "my-checkpoint.yaml").read_text(encoding="utf-8")
    write(here / "checkpoint", "gpt2", vocab_size=300)
    (here / "checkpoint/tokenizer.json").write_text("{}")
    assert cli.run(["sites", "hf:checkpoint", "--write", "first.yaml"]) == 0
    explained = yaml.safe_load(text)
    first = yaml.safe_load((here / "first.yaml").read_text())
    assert set(first["data"]["init_args"]) <= set(explained["data"]["init_args"])
    assert set(first["model"]["init_args"]) <= set(explained["model"]["init_args"])
