"""Optimized importance: circuits of one prompt against naive descents, known answers, and their
harvest (section A).
"""

import json
from dataclasses import replace

import lightning as L
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from spd_lightning.attribution.graph import MODES, GraphSpec
from spd_lightning.attribution.prompt_graphs import attribution_graphs
from spd_lightning.circuits.objective import CircuitObjective, CircuitSearch
from spd_lightning.circuits.search import (
    Frontier,
    ImportanceOptimization,
    optimize,
    select_circuits,
)
from spd_lightning.data.modules import Batches, Prompts
from spd_lightning.decomposition.adversaries import Adversary
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.masks import stochastic_sources
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput
from spd_lightning.harvest.circuits import SparseCircuits
from spd_lightning.store import Store
from spd_lightning.targets.toy import TMS
from spd_lightning.targets.transformer import Decoder
from spd_lightning.training.decompose import Decomposition
from spd_lightning.viewer.graph_page import GraphSelection, page_data

VOCAB = 9
SITES = {"h.*.attn.*_proj": 5, "h.*.mlp.*": 6}
PROMPTS = torch.tensor([[1, 2, 3, 4], [5, 5, 0, 8], [7, 1, 2, 6]])
QUICK = CircuitSearch(
    lambdas=(0.0, 0.01, 1.0), steps=12, lr=0.05, judge=Adversary(steps=5), draws=3, patience=4
)
ADVERSARIES = [None, Adversary(steps=2), Adversary(steps=2, scope="per_position", init="zeros")]


def network() -> Decoder:
    torch.manual_seed(0)
    target = Decoder(VOCAB, 8, 1, 2, 6, d_mlp=10)
    for name, parameter in target.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.5)
    return target


def shaken(model: ComponentModel) -> ComponentModel:
    """Importances between 0 and 1, some of them at either end."""
    for parameter in model.importance_function.parameters():
        nn.init.normal_(parameter)
    return model


def decoder() -> ComponentModel:
    return shaken(ComponentModel(network(), SITES)).double()


def by_features() -> ComponentModel:
    """Four features along the half-axes of a plane; component c of either layer is feature c, all
    important at first.

    A feature's reader meets no other that it excites, so each input needs one component of each
    layer.
    """
    target = TMS(4, 2)
    axes = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    with torch.no_grad():
        target.linear1.weight.copy_(axes.T)
        target.linear2.weight.copy_(axes)
        target.linear2.bias.zero_()
    model = ComponentModel(target, {"linear1": 4, "linear2": 4})
    with torch.no_grad():
        for name, V, U in (("linear1", torch.eye(4), axes), ("linear2", axes.T, torch.eye(4))):
            model[name].V.copy_(V)
            model[name].U.copy_(U)
        for parameter in model.importance_function.parameters():
            parameter.zero_()
        for name, parameter in model.importance_function.named_parameters():
            if parameter.shape[-1:] == (4,) and "b" in name.split(".")[-1]:
                parameter.fill_(0.9)
    return model.double()


def naive(
    model: ComponentModel, prompt: torch.Tensor, lambda_: float, search: CircuitSearch
) -> dict:
    """The descent of one row as the law writes it: all importances dense, one prompt, no
    windows.
    """
    clean = model.clean(prompt[None])
    label = clean.output[0, -1].argmax()
    start = model.importance_function(clean.inputs, clean.inner)
    alive = {name: z > 0 for name, z in start.items()}
    z = {name: v.detach().clamp(0, 1).requires_grad_() for name, v in start.items()}
    optimizer = torch.optim.AdamW(z.values(), lr=search.lr, weight_decay=0)
    generator = CircuitObjective(model, prompt[None], search).generators("descent")[0]
    for _ in range(search.steps):
        found = model.importance({name: torch.where(alive[name], v, -1) for name, v in z.items()})
        masks = {}
        for name, (s, delta) in stochastic_sources(found.lower, generator).items():
            masks[name] = Mask(found.lower[name] + (1 - found.lower[name]) * s, delta)
        loss = cross_entropy(model.masked(prompt[None], masks)[0, -1], label)
        if "ci" in search.masks:
            masks = {name: Mask(g, 0.0) for name, g in found.lower.items()}
            loss = (loss + cross_entropy(model.masked(prompt[None], masks)[0, -1], label)) / 2
        loss = loss + lambda_ * sum(
            ((v + 1e-12) ** search.p).mean((0, 1)).sum() for v in found.upper.values()
        )
        for leaf, gradient in zip(
            z.values(), torch.autograd.grad(loss, list(z.values())), strict=True
        ):
            leaf.grad = gradient
        optimizer.step()
    return {name: v.clamp(0, 1) * alive[name] for name, v in z.items()}


@pytest.mark.parametrize("masks", [("stochastic",), ("stochastic", "ci")])
@pytest.mark.parametrize("lambda_", [0.0, 0.3])
def test_descent_is_the_law(lambda_, masks):
    """Stochastic cross-entropy plus λ·L2, by AdamW, on a dense copy of one prompt's importances."""
    model = decoder()
    search = replace(QUICK, lambdas=(lambda_,), masks=masks, tolerance=0.0)
    found = optimize(model, PROMPTS[:1], search).importances
    for name, g in naive(model, PROMPTS[0], lambda_, search).items():
        torch.testing.assert_close(found[name][1:], g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_rows_of_a_batch_end_where_each_ends_alone(adversary, loss):
    """Prompts and λs in one batch, some finished before others, are what each is by itself."""
    model = decoder()
    lambdas = (0.01, 1.0)
    search = replace(
        QUICK, lambdas=lambdas, steps=12, patience=3, adversary=adversary, loss=loss, tolerance=0.1
    )
    together = optimize(model, PROMPTS[:2], search)
    assert len(set(together.frontier.steps.tolist())) > 2
    for row, prompt, lambda_ in (
        (3 * p + k + 1, p, lambdas[k]) for p in range(2) for k in range(2)
    ):
        alone = optimize(model, PROMPTS[prompt : prompt + 1], replace(search, lambdas=(lambda_,)))
        for name, g in alone.importances.items():
            torch.testing.assert_close(together.importances[name][row], g[1], rtol=1e-8, atol=1e-10)
        assert together.frontier.prompt[row] == prompt
        for column in ("steps", "nodes", "lambdas", "label", "kept"):
            theirs = getattr(together.frontier, column)[row]
            torch.testing.assert_close(
                theirs, getattr(alone.frontier, column)[1], rtol=1e-7, atol=1e-9
            )


def test_only_what_is_important_is_a_parameter_and_the_model_stands_still():
    """D6: no weight, component or importance function changes or is given a gradient."""
    model = decoder()
    before = {name: v.clone() for name, v in model.state_dict().items()}
    start = model.importances(model.clean(PROMPTS)).lower
    objective = CircuitObjective(model, PROMPTS, QUICK)
    assert len(ImportanceOptimization(objective).values) == (1 + len(QUICK.lambdas)) * sum(
        int((g > 0).sum()) for g in start.values()
    )
    found = optimize(model, PROMPTS, replace(QUICK, adversary=Adversary(steps=1))).importances
    for name, g in start.items():
        assert (g == 0).any()
        for row, own in enumerate(found[name].split(1)):
            assert (own[0][g[row // 4] == 0] == 0).all()
            same = torch.equal(own[0], g[row // 4])
            assert same or row % 4 != 0  # the importance function's own
            assert not same or row % 4 != 3  # the largest λ's
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_larger_lambda_leaves_fewer_nodes_and_none_does_no_harm():
    model = decoder()
    search = replace(QUICK, steps=60, lr=0.03, tolerance=0.0, draws=32)
    before, after = (optimize(model, PROMPTS, replace(search, steps=n)).frontier for n in (0, 60))
    nodes = after.nodes.view(3, 4)
    loss = after.loss["stochastic"].view(3, 4)
    taken = after.steps.view(3, 4)
    assert (nodes[:, 1] > nodes[:, 2]).all()
    assert (nodes[:, 2] >= nodes[:, 3]).all()
    assert (loss[:, 1] <= loss[:, 0]).all()
    assert torch.equal(loss[:, 0], before.loss["stochastic"].view(3, 4)[:, 1])
    assert (before.steps == 0).all()
    assert (taken == torch.tensor([0, 60, 60, 60])).all()
    expected = model.target(PROMPTS)[:, -1].softmax(-1).max(-1)
    assert before.probability is not None
    torch.testing.assert_close(before.probability["target"], expected.values.repeat_interleave(4))
    assert before.label is not None
    assert torch.equal(before.label, expected.indices.repeat_interleave(4))


@pytest.mark.parametrize("adversary", [None, Adversary(steps=1)])
def test_an_exact_decomposition_keeps_what_its_feature_needs(adversary):
    """One component a layer, that of the active feature; and then no adversary can do harm."""
    inputs = 0.75 * torch.eye(4).double()
    search = CircuitSearch(
        lambdas=(1e-3,), p=1.0, steps=300, lr=0.02, adversary=adversary, tolerance=0.0
    )
    found = optimize(by_features(), inputs, search)
    for g in found.importances.values():
        assert torch.equal(g[1::2] > 0, torch.eye(4, dtype=torch.bool))
    assert torch.equal(found.frontier.nodes, torch.tensor([8, 2]).repeat(4))
    assert (found.frontier.kept[1::2] > 0.98).all()
    assert found.frontier.probability is None


def test_masks_of_the_judge():
    """ci masks are the importances, delta off; an adversary that climbs finds worse than where it
    starts.
    """
    model = decoder()
    found = optimize(model, PROMPTS, QUICK)
    masks = {name: Mask(g, 0.0) for name, g in found.importances.items()}
    logits = model.masked(PROMPTS.repeat_interleave(4, 0), masks)[:, -1]
    assert found.frontier.label is not None
    torch.testing.assert_close(
        found.frontier.loss["ci"], cross_entropy(logits, found.frontier.label, reduction="none")
    )
    still = optimize(model, PROMPTS, replace(QUICK, judge=Adversary(steps=0))).frontier
    assert (found.frontier.loss["adversarial"] > still.loss["adversarial"]).all()


def test_chosen_is_the_smallest_that_stands_the_adversary_else_the_best():
    """What an adversary leaves of nothing says nothing: then the answer under ci masks decides."""

    def frontier(kept: list[float], nodes: list[int], loss: list[float]) -> Frontier:
        rows = torch.zeros(10, dtype=torch.long)
        prompt = (torch.arange(10) - 1).clamp(min=0) // 3
        lambdas = torch.tensor([torch.nan] + [1.0] * 9).double()
        losses = {"ci": torch.tensor(loss)}
        return Frontier(
            prompt, lambdas, rows, torch.tensor(nodes), rows, losses, None, None, torch.tensor(kept)
        )

    kept = [1.0, 0.9, 0.85, 0.5, 0.1, 0.3, 0.2, 1e-9, 1e-8, 0.0]
    loss = [0.0, 1, 2, 0, 0, 1, 2, 3, 2, 1]
    assert select_circuits(frontier(kept, [5, *[90, 50, 10] * 3], loss), 0.8) == [2, 5, 9]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"position": 4}, "position 4"),
        ({"position": -5}, "position -5"),
        ({"label": VOCAB}, f"label {VOCAB}"),
        ({"loss": "mse"}, "loss 'mse'"),
        ({"lambdas": ()}, "lambdas"),
        ({"lambdas": (-1.0,)}, "lambdas"),
        ({"patience": 0}, "patience 0"),
        ({"masks": ()}, "masks"),
    ],
)
def test_a_search_that_cannot_be_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        optimize(decoder(), PROMPTS, CircuitSearch(**settings))
    if settings.keys() & {"position", "label", "loss"}:  # a harvest says so before it begins
        asked = SparseCircuits(CircuitSearch(**settings))
        prompts = Few(PROMPTS).prompts
        with pytest.raises(BadInput, match=words):
            asked.check_prompts(Decomposition(network(), sites=SITES), prompts)
    with pytest.raises(BadInput, match="share 1"):
        SparseCircuits(share=1.0)


# ---- the harvest ---------------------------------------------------------------------------------


class Few(L.LightningDataModule):
    def __init__(self, inputs: torch.Tensor):
        super().__init__()
        rows = len(inputs)
        self.prompts = Prompts(inputs, [f"text {k}" for k in range(rows)], ["given"] * rows)

    def names(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]

    def predict_dataloader(self) -> Batches[Prompts]:
        return Batches(lambda: iter([self.prompts]), 1)


def harvested(folder, module, inputs, **settings) -> Store:
    harvester = SparseCircuits(QUICK, **settings)
    trainer = L.Trainer(
        callbacks=[harvester],
        default_root_dir=folder,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module, Few(inputs), return_predictions=False)
    assert harvester.folder is not None
    return Store(harvester.folder)


quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)


@quiet
def test_a_harvest_holds_the_chosen_graphs_and_all_that_were_tried(tmp_path):
    module = Decomposition(network(), sites=SITES)
    shaken(module.model)
    store = harvested(tmp_path, module, PROMPTS[:2])
    store = harvested(tmp_path, module, PROMPTS)  # goes on with the third
    assert store.manifest["prompts"] == 3
    found = optimize(module.model, PROMPTS, QUICK)
    best = select_circuits(found.frontier, 0.8)
    frontier = store.scan("frontier").collect()
    assert frontier.group_by("prompt_id").agg(pl.col("chosen").sum())["chosen"].to_list() == [
        1,
        1,
        1,
    ]
    assert set(frontier["pos"]) == {3}
    assert frontier["token"].to_list() == [f"<{label}>" for label in frontier["label"]]
    assert set(frontier["adversary_steps"]) == {5}
    ids = store.scan("prompts").collect()["prompt_id"].to_list()
    g = {name: v[best] for name, v in found.importances.items()}
    layers, edges = attribution_graphs(GraphSpec(module.model, PROMPTS, g, MODES["ci_masked"]))
    inner = sum(len(table.source) for table in edges)
    for k, i in enumerate(ids):
        row = frontier.filter(pl.col("chosen"), pl.col("prompt_id") == i).row(0, named=True)
        nodes = store.scan("nodes", i).collect().filter(pl.col("kind") == "component")
        assert row["lambda"] == QUICK.lambdas[best[k] % 4 - 1]
        assert row["nodes"] == len(nodes) == found.frontier.nodes[best[k]]
        outputs = store.scan("outputs", i).collect()
        assert set(outputs["pos"]) == {3}
        own = outputs.filter(pl.col("token_id") == row["label"])
        assert own["ci_probability"].item() == pytest.approx(row["p_ci"], rel=1e-4)
        assert own["target_probability"].item() == pytest.approx(row["p_target"], rel=1e-4)
        held = {(n["layer"], n["pos"], n["component"]): n["importance"] for n in nodes.to_dicts()}
        for (layer, pos, component), importance in held.items():
            assert importance == pytest.approx(
                g[layer][k, pos, component].item(), rel=1e-3, abs=1e-5
            )
    assert 0 < store.manifest["rows"]["edges"] < inner
    assert [layer.name for layer in layers] == store.layers


@quiet
def test_vectors_have_no_label(tmp_path):
    module = Decomposition(TMS(4, 2), sites={"linear1": 4, "linear2": 4})
    module.model = by_features().float()
    store = harvested(tmp_path, module, 0.75 * torch.eye(4))
    frontier = store.scan("frontier").collect()
    assert len(frontier) == 16
    assert frontier["lambda"].null_count() == 4
    assert frontier["label"].null_count() == frontier["p_ci"].null_count() == 16
    assert frontier["kept"].is_not_null().all()
    prompt = frontier["prompt_id"][5]
    page = page_data(store, GraphSelection(prompt))
    json.dumps(page.frontier, allow_nan=False)
    assert (
        page.frontier == frontier.filter(pl.col("prompt_id") == prompt).drop("prompt_id").to_dicts()
    )
    assert [row["lambda"] for row in page.frontier] == [None, *QUICK.lambdas]
    assert store.manifest["rows"]["edges"] > 0
