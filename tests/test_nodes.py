"""Harvests of nodes (A3) beside a naive pass over every prompt, position and component; killed,
resumed, cut small.
"""

import json
import math
from pathlib import Path

import lightning as L
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from support.tiny_run import done, killed
from torch import nn

from spd_lightning import budgets
from spd_lightning.data.modules import Batches, InductionTokens, Prompts, SparseFeatures
from spd_lightning.decomposition.components import Mask
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.harvest.nodes import PromptNodes
from spd_lightning.store import Store
from spd_lightning.targets.toy import TMS, InductionHead
from spd_lightning.targets.transformer import Decoder
from spd_lightning.training.decompose import Decomposition

WORDS = ["⟨s⟩", " a", "<b>&", "\n", "é", "\t", "  ", "x", "y", "z", "0"]
THRESHOLD = 0.2


class Ragged(L.LightningDataModule):
    """Prompts of two lengths, one length a batch, and words for tokens."""

    def __init__(self, lengths: tuple[int, ...] = (7, 4), rows: int = 5, words: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.batches = []
        for length in lengths:
            inputs = torch.randint(0, len(WORDS), (rows, length), generator=generator)
            tokens = [[WORDS[i] for i in row] for row in inputs.tolist()] if words else None
            sources = [f"text {length}.{k}" for k in range(rows)]
            self.batches.append(Prompts(inputs, sources, ["given"] * rows, tokens))

    def names(self, ids: list[int]) -> list[str]:
        return [WORDS[i] for i in ids]

    def predict_dataloader(self) -> Batches[Prompts]:
        return Batches(lambda: iter(self.batches), len(self.batches))


def shaken(network: nn.Module, sites: dict[str, int]) -> Decomposition:
    """A decomposition whose importances are neither all 0 nor all 1."""
    torch.manual_seed(0)
    made = Decomposition(network, sites=sites)
    with torch.no_grad():
        for parameter in made.model.importance_function.parameters():
            parameter.normal_(0, 0.6)
    return made


def induction_head() -> Decomposition:
    torch.manual_seed(1)
    return shaken(InductionHead(vocab=len(WORDS), d_model=8, seq_len=8), {"h.*.attn.*_proj": 6})


def decoder() -> Decomposition:
    torch.manual_seed(1)
    network = Decoder(vocab=len(WORDS), d_model=8, n_layers=1, n_heads=2, context=8, mlp="gated")
    return shaken(network, {"wte": 5, "h.*.mlp.*": 6, "lm_head": 4})


def harvested(
    folder: Path, module: Decomposition, data: L.LightningDataModule, *harvesters, **settings
) -> list[Store]:
    trainer = L.Trainer(
        callbacks=list(harvesters),
        default_root_dir=folder,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.predict(module, data, return_predictions=False)
    return [Store(harvester.folder) for harvester in harvesters]


def table(store: Store, name: str) -> pl.DataFrame:
    return store.scan(name).collect().with_columns(pl.col(pl.Enum).cast(pl.String))


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)


@pytest.mark.parametrize("make", [induction_head, decoder])
def test_rows_are_those_of_a_naive_pass(tmp_path, make):
    """One prompt at a time, one place at a time: importances, activations, both probabilities (A3,
    D2, G2).
    """
    module = make()
    data = Ragged()
    (store,) = harvested(tmp_path, module, data, PromptNodes(THRESHOLD))
    model = module.model
    nodes = {}
    outputs = {}
    counts = {}
    embeddings = [
        n
        for n in ("embed", "pos_embed", "wte")
        if hasattr(model.target, n) and n not in model.sites
    ]
    for batch in data.batches:
        for row, source in zip(batch.inputs, batch.sources, strict=True):
            with torch.no_grad():
                clean = model.clean(row[None])
                g = model.importances(clean).lower
                masked = model.masked(row[None], {site: Mask(v, 0.0) for site, v in g.items()})
                logits = {"ci": masked[0], "target": model.target(row[None])[0]}
                vectors = {n: getattr(model.target, n) for n in embeddings}
            for p, token in enumerate(row.tolist()):
                for name, embedding in vectors.items():
                    size = embedding.weight[p if name == "pos_embed" else token].norm().item()
                    nodes[source, name, p, 0] = ("embedding", None, size)
                for site in model.sites:
                    x = clean.inputs[site][0, p]
                    a = model[site].V[x] if x.dtype == torch.long else x @ model[site].V
                    for c in range(model.counts[site]):
                        importance = g[site][0, p, c].item()
                        firings, total = counts.get((site, c), (0, 0.0))
                        counts[site, c] = firings + (importance > THRESHOLD), total + importance
                        if importance > THRESHOLD:
                            nodes[source, site, p, c] = ("component", importance, a[c].item())
                share = {name: (v[p] - v[p].max()).exp() for name, v in logits.items()}
                share = {name: v / v.sum() for name, v in share.items()}
                likely = sorted(range(len(WORDS)), key=lambda t: -share["ci"][t].item())[:15]
                for t in likely:
                    if share["ci"][t] > 0.01:
                        nodes[source, "output", p, t] = (
                            "output",
                            None,
                            logits["target"][p, t].item(),
                        )
                        values = (
                            share["ci"][t],
                            logits["ci"][p, t],
                            share["target"][t],
                            logits["target"][p, t],
                        )
                        outputs[source, p, t] = (WORDS[t], *map(float, values))
    prompts = {row["prompt_id"]: row for row in table(store, "prompts").to_dicts()}
    source = {i: row["source"] for i, row in prompts.items()}
    found = {}
    for row in table(store, "nodes").to_dicts():
        key = (source[row["prompt_id"]], row["layer"], row["pos"], row["component"])
        assert key not in found
        found[key] = (row["kind"], row["importance"], row["activation"])
    assert found.keys() == nodes.keys()
    assert {kind for kind, *_ in found.values()} == {"component", "output"} | (
        {"embedding"} if embeddings else set()
    )
    for key, (kind, importance, activation) in nodes.items():
        assert found[key][0] == kind
        assert found[key][1] == (
            None if importance is None else pytest.approx(importance, abs=1e-6)
        )
        assert found[key][2] == pytest.approx(activation, abs=1e-5)
    told = {
        (source[r["prompt_id"]], r["pos"], r["token_id"]): (
            r["token"],
            r["ci_probability"],
            r["ci_logit"],
            r["target_probability"],
            r["target_logit"],
        )
        for r in table(store, "outputs").to_dicts()
    }
    assert told.keys() == outputs.keys()
    for key, (word, *values) in outputs.items():
        assert told[key][0] == word
        assert told[key][1:] == pytest.approx(values, abs=1e-5)
    sums = (
        table(store, "components")
        .group_by("layer", "component")
        .agg(pl.col("firings", "importance_sum").sum())
    )
    for row in sums.to_dicts():
        firings, total = counts[row["layer"], row["component"]]
        assert row["firings"] == firings
        assert row["importance_sum"] == pytest.approx(total, rel=1e-5)
    for batch in data.batches:
        for text, ids, tokens in zip(
            batch.sources, batch.inputs.tolist(), batch.tokens, strict=True
        ):
            (held,) = (row for row in prompts.values() if row["source"] == text)
            assert (held["token_ids"], held["tokens"]) == (ids, tokens)


def test_nodes_are_those_of_unmasked_graphs(tmp_path):
    """A5: in mode `unmasked` the forward pass is the target's own, so all tables but the edges are
    the same.
    """
    vectors = SparseFeatures(n_features=5, probability=0.3, batch_size=4, n_prompts=12)
    torch.manual_seed(2)
    tms = shaken(TMS(n_features=5, n_hidden=2), {"linear1": 7, "linear2": 7})
    for name, module, data in [("tokens", induction_head(), Ragged()), ("vectors", tms, vectors)]:
        nodes, graphs = harvested(tmp_path / name, module, data, PromptNodes(), PromptGraphs())
        assert "edges" not in nodes.tables
        assert table(graphs, "edges").height
        assert nodes.manifest["kind"] == graphs.manifest["kind"] == name
        for own in ("prompts", "nodes", "nodes_by_component", "outputs", "components"):
            assert_frame_equal(table(nodes, own), table(graphs, own), abs_tol=1e-5)
    assert (
        table(nodes, "outputs")["token"].to_list()
        == table(nodes, "outputs")["token_id"].cast(pl.String).to_list()
    )


def test_tokens_that_nobody_names_go_by_their_numbers(tmp_path):
    data = InductionTokens(
        vocab=len(WORDS), seq_len=8, batch_size=4, n_prompts=3, predict_batch_size=4
    )
    (store,) = harvested(tmp_path, induction_head(), data, PromptNodes())
    prompts = table(store, "prompts")
    outputs = table(store, "outputs")
    assert prompts["tokens"].to_list() == [[str(i) for i in row] for row in prompts["token_ids"]]
    assert outputs["token"].to_list() == [str(i) for i in outputs["token_id"]]


def test_what_does_not_fit_is_harvested_in_parts(tmp_path, monkeypatch):
    """A small memory changes how many groups of shards there are, and nothing else."""
    module = induction_head()
    data = Ragged()
    (whole,) = harvested(tmp_path / "whole", module, data, PromptNodes())
    logits = budgets.LOGIT_ARRAYS * len(WORDS)
    budget = 2 * 7 * (sum(module.model.counts.values()) + logits)
    monkeypatch.setattr(budgets, "MAX_COMPONENT_NUMBERS", budget)
    assert [PromptNodes().at_once(module.model, batch.inputs) for batch in data.batches] == [2, 3]
    (parts,) = harvested(tmp_path / "parts", module, data, PromptNodes())
    assert (whole.manifest["shards"], parts.manifest["shards"]) == (2, 5)
    for name in ("prompts", "nodes", "outputs"):
        keys = [
            c for c in ("prompt_id", "node", "pos", "token_id") if c in table(whole, name).columns
        ]
        assert_frame_equal(
            table(whole, name).sort(keys), table(parts, name).sort(keys), abs_tol=1e-6
        )
    monkeypatch.setattr(budgets, "MAX_COMPONENT_NUMBERS", 1)
    assert PromptNodes().at_once(module.model, data.batches[0].inputs) == 1


def test_half_precision_of_a_config_stays_out(tmp_path):
    """Under precision bf16-mixed the rows are those of single precision, to the last bit."""
    module = decoder()
    data = Ragged()
    (plain,) = harvested(tmp_path / "plain", module, data, PromptNodes())
    (mixed,) = harvested(tmp_path / "mixed", module, data, PromptNodes(), precision="bf16-mixed")
    for name in ("nodes", "outputs", "components"):
        assert_frame_equal(table(plain, name), table(mixed, name), check_exact=True)


def test_a_target_in_half_precision_is_harvested_too(tmp_path):
    module = induction_head()
    data = Ragged(lengths=(5,))
    module.to(torch.bfloat16)
    (store,) = harvested(tmp_path, module, data, PromptNodes())
    outputs = table(store, "outputs")
    sums = outputs.group_by("prompt_id", "pos").agg(
        pl.col("ci_probability", "target_probability").sum()
    )
    assert sums.height == 25
    assert all(0.5 < v <= 1 + 1e-5 for v in sums["ci_probability"])
    assert all(math.isfinite(v) for v in table(store, "nodes")["activation"])


# ---- by the command line -------------------------------------------------------------------------

CONFIG = """\
base: ih.yaml
model:
  init_args:
    target: head.yaml
    sites: {h.*.attn.*_proj: 5}
    warm_up: {steps: 5}
    evaluation: {pgd_steps: [2]}
trainer:
  max_steps: 12
  val_check_interval: 1
  logger: false
  callbacks: [{class_path: spd_lightning.PromptNodes, init_args: {name: NAME}}]
data: {init_args: {batch_size: 16, n_prompts: 160, predict_batch_size: 4}}
"""
HEAD = """\
base: targets/ih.yaml
model: {init_args: {retries: 0}}
trainer: {max_steps: 20}
data: {init_args: {batch_size: 16}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A working directory with a fitted run of a tiny induction head."""
    here = tmp_path_factory.mktemp("nodes")
    (here / "tiny.yaml").write_text(CONFIG)
    (here / "head.yaml").write_text(HEAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        done(here / "runs", ["fit", "--config", "tiny"])
        yield here / "runs"


def predict(name: str) -> list[str]:
    chosen = [{"class_path": "spd_lightning.PromptNodes", "init_args": {"name": name}}]
    return ["predict", "--config", "tiny", "--trainer.callbacks", json.dumps(chosen)]


def test_a_killed_predict_gives_the_same_tables(root):
    """Killed between two groups and run again: nothing is missing, nothing is there twice."""
    folder = root / "tiny/harvest/killed"

    def committed() -> int:
        lines = folder / "manifest-0.jsonl"
        return lines.read_bytes().count(b"\n") if lines.exists() else 0

    done(root, predict("whole"))
    killed(root, predict("killed"), lambda: committed() >= 5)
    part = Store(folder).manifest
    assert not part["complete"]
    assert 20 <= part["prompts"] < 191
    done(root, predict("killed"))
    whole, mended = (Store(root / "tiny/harvest" / name) for name in ("whole", "killed"))
    assert mended.manifest["complete"]
    assert mended.manifest["rows"] == whole.manifest["rows"]
    assert whole.manifest["rows"]["edges"] == 0
    for name in ("prompts", "nodes", "outputs"):
        assert_frame_equal(table(mended, name), table(whole, name), check_exact=True)
