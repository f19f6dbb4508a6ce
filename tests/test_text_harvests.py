"""Harvests of a language model: killed and run again, on two devices, of prompts that cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from support.tiny_run import done, killed
from test_resume import committed

from spd_lightning import cli
from spd_lightning.attribution.graph import MODES, check_mode
from spd_lightning.errors import BadInput
from spd_lightning.harvest.dataset_edges import DatasetEdges
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.store import Store, added
from spd_lightning.store.tables import SORTED
from spd_lightning.targets.transformer import Decoder
from spd_lightning.training.decompose import Decomposition
from spd_lightning.viewer.library import Library

CONFIG = """\
base: stories-1L-tiny.yaml
trainer: {logger: false}
data:
  init_args:
    {corpus: HERE/corpus.txt, vocab: 270, seq_len: 12, n_prompts: 45, predict_batch_size: 2}
"""
DECODER: dict[str, Any] = {"vocab": 270, "d_model": 8, "n_layers": 1, "n_heads": 2, "context": 16}
HARVESTS = ("graphs", "sums")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A working directory with runs/text in it, a decoder of 16 positions that was never
    trained.
    """
    here = tmp_path_factory.mktemp("text")
    words = (f"Mia went to the park {k} times and saw {k % 7} dogs ." for k in range(1500))
    (here / "corpus.txt").write_text("\n\n".join(words))
    (here / "text.yaml").write_text(CONFIG.replace("HERE", str(here)))
    (here / "runs/text").mkdir(parents=True)
    torch.manual_seed(0)
    module = Decomposition(Decoder(**DECODER), {"h.*.attn.*_proj": 4, "h.*.mlp.*": 4})
    module.target_spec = {"class_path": "spd_lightning.Decoder", "init_args": DECODER}
    with torch.no_grad():
        for parameter in module.model.importance_function.parameters():
            parameter.normal_(0, 0.6)
    module.save(here / "runs/text")
    (here / "runs/text/summary.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("SPD_RUNS", str(here / "runs"))
        yield here / "runs"


def predict(name: str, mode: str = "unmasked", **more: object) -> list[str]:
    """Graphs and their sums; a group of sums is three batches."""
    graphs = {"mode": mode, "name": f"{name}-graphs", "checks": 2, **more}
    sums = {"mode": mode, "name": f"{name}-sums", "group": 6}
    chosen = [
        {"class_path": f"spd_lightning.{kind}", "init_args": settings}
        for kind, settings in (("PromptGraphs", graphs), ("DatasetEdges", sums))
    ]
    return ["predict", "--config", "text", "--trainer.callbacks", json.dumps(chosen)]


def harvests(root: Path, name: str) -> list[Store]:
    return [Store(root / f"text/harvest/{name}-{kind}") for kind in HARVESTS]


def rows(store: Store, table: str) -> pl.DataFrame:
    """A table in an order of its own, whoever wrote it; what adds up added up."""
    frame = store.scan(table).collect().with_columns(pl.col(pl.Enum).cast(pl.String))
    more = (c for c in ("token_id", "node") if c in frame.columns)
    keys = list(dict.fromkeys([*SORTED[table], *more])) or ["prompt_id"]
    if (
        table == "dataset_nodes"
    ):  # rows of embeddings are there in some groups only, and count those groups' positions
        frame = frame.with_columns(
            positions=pl.when(pl.col("kind") == "component").then("positions").otherwise(0)
        )
    if table == "components":
        counts = ["firings", "positions", "importance_sum", "activation_sum"]
        frame = frame.group_by(keys).agg(pl.col(counts).sum(), pl.col("norm", "alive").first())
    parts = [frame[k : k + 1000] for k in range(0, max(1, frame.height), 1000)]
    return added(table, parts).sort(list(dict.fromkeys(keys)))


def assert_same(found: list[Store], whole: list[Store], exact: bool) -> None:
    for one, other in zip(found, whole, strict=True):
        assert one.manifest["complete"]
        assert (
            one.manifest["prompts"]
            == other.manifest["prompts"]
            == one.scan("prompts").collect().n_unique("prompt_id")
        )
        assert 25 < one.manifest["prompts"] < 45  # equal windows count once
        assert one.tables == other.tables
        for table in one.tables:
            sums = table == "components" or table.startswith("dataset_")
            close: dict[str, Any] = (
                {"check_exact": True} if exact and not sums else {"abs_tol": 1e-5, "rel_tol": 1e-4}
            )
            mine = rows(one, table)
            theirs = rows(other, table)
            assert mine.height > 0
            assert_frame_equal(mine, theirs, **close)


@pytest.fixture(scope="module")
def undisturbed(root) -> list[Store]:
    done(root, predict("whole"))
    return harvests(root, "whole")


@pytest.mark.parametrize("groups", [2, 13])
def test_killed_and_run_again(root, undisturbed, groups):
    """Killed between batches, the two harvests at different places; no row is lost, none is there
    twice.
    """
    name = f"killed{groups}"
    killed(root, predict(name), lambda: committed(root / f"text/harvest/{name}-graphs") >= groups)
    graphs, sums = (store.manifest for store in harvests(root, name))
    assert not graphs["complete"]
    assert not sums["complete"]
    assert groups <= graphs["prompts"] < 45
    assert sums["prompts"] <= graphs["prompts"]
    done(root, predict(name))
    assert_same(harvests(root, name), undisturbed, exact=True)


def test_two_devices_write_what_one_writes(root, undisturbed):
    words = [
        "--trainer.devices",
        "2",
        "--trainer.accelerator",
        "cpu",
        "--trainer.strategy",
        "ddp_fork",
    ]
    done(root, [*predict("two"), *words])
    found = harvests(root, "two")
    assert [store.manifest["world"] for store in found] == [2, 2]
    assert_same(found, undisturbed, exact=False)


# ---- what cannot be ------------------------------------------------------------------------------

LONG = json.dumps(["Mia", "Mia went to the park " * 9])
BAD = {
    "longer than the context": (
        ["--data.prompts", LONG],
        r"given 1: \d+ tokens, and the target's context holds 16; shorten it",
    ),
    "windows too long": (
        ["--data.n_ctx", "20"],
        r"prompt 'validation \d+': it has 20 tokens.* 16; lower data.n_ctx",
    ),
    "empty": (
        ["--data.prompts", '["Mia", ""]'],
        "given 1: it is empty; give it a text or leave it out",
    ),
    "another vocabulary": (
        ["--data.vocab", "300"],
        r"token \d+ is outside the target's vocabulary of 270; use the",
    ),
}


def refused(capsys, root: Path, words: list[str]) -> str:
    """The one line that a command ends with; no harvest is begun."""
    before = set((root / "text").rglob("*"))
    capsys.readouterr()
    assert cli.run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert set((root / "text").rglob("*")) == before
    return err


@pytest.mark.parametrize("what", BAD)
def test_prompts_that_cannot_be(root, capsys, what):
    words, told = BAD[what]
    assert pl.Series([refused(capsys, root, [*predict("bad"), *words])]).str.contains(told).item()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"nodes": ["h.0.mlp.c_f:1"]}, "did you mean 'h.0.mlp.c_fc'?"),
        ({"nodes": ["h.0.mlp.c_fc:4"]}, "it has 4; take one from 0 to 3"),
        ({"nodes": ["h.0.mpl.*"]}, "nodes 'h.0.mpl.*': no such layer"),
        ({"nodes": ["h.0.mlp.c_fc:12:1"]}, "there is no position 12; a prompt has 12"),
        ({"outputs": {"positions": [12]}}, "position 12 in outputs: a prompt has 12"),
        (
            {"outputs": {"tokens": [270]}},
            "token 270 in outputs: the vocabulary has 270 tokens; take 0 to 269",
        ),
        ({"mode": "frozn"}, "did you mean 'frozen'?"),
    ],
)
def test_questions_that_cannot_be(root, capsys, more, told):
    """Even where another harvest of the same pass is in order, nothing is begun."""
    assert told in refused(capsys, root, predict("bad", **more))


@pytest.mark.parametrize("kind", [PromptGraphs, DatasetEdges])
def test_a_mode_that_there_is_not(kind):
    assert all(check_mode(mode, "x") == mode for mode in MODES)
    with pytest.raises(
        ValueError, match=f"mode 'ci_mask' in {kind.__name__}: .*; did you mean 'ci_masked'?"
    ):
        check_mode("ci_mask", kind.__name__)


def test_the_long_way_is_told_once(root, capsys):
    assert cli.run([*predict("long", mode="reference"), "--data.n_prompts", "2"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "no closed forms" in line]
    assert [line.partition(":")[0] for line in said] == ["harvest long-graphs", "harvest long-sums"]
    assert "(this mode lets delta carry gradient)" in said[0]


def test_a_run_with_sums_alone_says_where_they_show(root, undisturbed, tmp_path):
    """They have no prompts to open; graphs have."""
    shutil.copytree(root / "text", tmp_path / "text", ignore=shutil.ignore_patterns("*-graphs"))
    library = Library(str(tmp_path))
    chosen = library.choose("text", "whole-sums")
    assert chosen is not None
    _, harvest = chosen
    assert harvest is None
    with pytest.raises(
        BadInput, match=r"its harvests are sums, .*--config graphs\.yaml; .* edges text LAYER:"
    ):
        library.store("text", harvest)
    _, latest = Library(str(root)).choose("text", None) or (None, None)
    assert latest is not None
    assert latest.endswith("-graphs")
