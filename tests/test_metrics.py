"""Evaluation (law E): figures against known truth, of importances, and of outputs under the six
maskings.
"""

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import NETWORKS, Perceptron, decomposed, naive
from torch import nn

from spd_lightning.commands.results import uncertain
from spd_lightning.decomposition.adversaries import Adversary, pgd_sources
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.masks import masks_from_sources
from spd_lightning.decomposition.metrics import (
    MASKINGS,
    Masking,
    column_match,
    component_norms,
    dense_error,
    firings,
    identity_error,
    identity_order,
    l0,
    masked_outputs,
)
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext
from spd_lightning.errors import BadInput
from spd_lightning.targets.toy import TMS, InductionHead, ResidualBlock, ResidualMLP
from spd_lightning.training.evaluate import Evaluation, Totals, count, figures_of, hidden_squares
from spd_lightning.training.ground_truth import lone_features, truth, verdict
from spd_lightning.training.pgd_sweep import pgd_sweep

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
ANGLES = torch.arange(5).double() * 2 * math.pi / 5
PENTAGON = (
    torch.stack([ANGLES.cos(), ANGLES.sin()]) * torch.tensor([1.0, 1.1, 0.9, 1.2, 1.0]).double()
)  # W [2, 5]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def turned(U, angle):
    """Components that write at an angle to where they did."""
    rows = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    return U @ torch.tensor(rows, dtype=torch.float64)


def one_each(W, order, C):
    """V, U in which component order[j] is column j of W, and all others are zero."""
    V = torch.zeros(W.shape[1], C).double()
    U = torch.zeros(C, W.shape[0]).double()
    for j, c in enumerate(order):
        V[j, c] = 1.0
        U[c] = W[:, j]
    return V, U


# ---- against known truth -------------------------------------------------------------------------


@given(
    st.permutations(range(8)),
    st.lists(st.floats(0.2, 3) | st.floats(-3, -0.2), min_size=8, max_size=8),
)
def test_e_mmcs_and_ml2r_of_a_perfect_decomposition_are_one(order, scales):
    V, U = one_each(PENTAGON, order[:5], 8)
    scale = torch.tensor(scales).double()
    cosine, ratio = column_match(PENTAGON, V / scale, U * scale[:, None])
    assert (cosine.item(), ratio.item()) == pytest.approx((1, 1), abs=1e-12)


@given(st.floats(0.1, 3), st.floats(-0.6, 0.6))
def test_e_mmcs_sees_rotation_alone_and_ml2r_shrinkage_alone(size, angle):
    V, U = one_each(PENTAGON, range(5), 5)
    cosine, ratio = column_match(PENTAGON, V, size * turned(U, angle))
    assert cosine.item() == pytest.approx(math.cos(angle), abs=1e-9)
    assert ratio.item() == pytest.approx(size, rel=1e-9)


def test_e_a_component_that_writes_the_opposite_does_not_match():
    V, U = one_each(PENTAGON, range(5), 5)
    V[0, 0] *= -1
    cosine, ratio = column_match(PENTAGON, V, U)
    assert cosine.item() == pytest.approx(
        4 / 5
    )  # the best that is left reads nothing of the feature
    assert ratio.item() == pytest.approx(4 / 5)


def test_e_dead_components_do_not_compete():
    V, U = one_each(PENTAGON, range(5), 6)
    U[:5] = turned(U[:5], 0.3)
    # in the very direction of column 0, and 4 % of its size
    V[0, 5] = 1.0
    U[5] = 0.04 * PENTAGON[:, 0]
    cosine, ratio = column_match(PENTAGON, V, U)
    assert (cosine.item(), ratio.item()) == pytest.approx((math.cos(0.3), 1.0), abs=1e-9)
    U[5] *= 3  # at 12 % it competes, and wins
    cosine, ratio = column_match(PENTAGON, V, U)
    assert cosine.item() == pytest.approx((4 * math.cos(0.3) + 1) / 5)
    assert ratio.item() == pytest.approx(4.12 / 5)


@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 6), st.integers(0, 1000))
def test_e_mmcs_and_ml2r_are_their_loops(d_out, d_in, C, seed):
    torch.manual_seed(seed)
    W = torch.randn(d_out, d_in).double()
    V = torch.randn(d_in, C).double()
    U = torch.randn(C, d_out).double()
    V[:, 0] *= 0.03
    V[0, -1] = 0.0
    norms = [torch.outer(U[c], V[:, c]).norm().item() for c in range(C)]
    cosines = []
    ratios = []
    for j in range(d_in):
        columns = {c: U[c] * V[j, c] for c in range(C) if norms[c] > 0.05 * max(norms)}
        cos = {
            c: float(u @ W[:, j] / max(float(u.norm() * W[:, j].norm()), 1e-30))
            for c, u in columns.items()
        }
        best = max(cos, key=lambda c: cos[c])
        cosines.append(cos[best])
        ratios.append(float(columns[best].norm() / W[:, j].norm()))
    cosine, ratio = column_match(W, V, U)
    assert cosine.item() == pytest.approx(sum(cosines) / d_in, rel=1e-9)
    assert ratio.item() == pytest.approx(sum(ratios) / d_in, rel=1e-9)
    assert component_norms(V, U).tolist() == pytest.approx(norms, rel=1e-10)


@settings(max_examples=50)
@given(
    features=st.integers(1, 5),
    C=st.integers(1, 8),
    order=st.permutations(range(8)),
    flips=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=2),
    seed=st.integers(0, 99),
)
def test_e_identity_error_counts_what_is_off_in_any_order(features, C, order, flips, seed):
    noise = 0.099 * torch.rand(features, C, generator=generator(seed)).double()
    ideal = torch.eye(features, C).double()
    clean = (ideal - noise).abs()
    assert identity_error(clean[:, [c for c in order if c < C]]) == max(
        0, features - C
    )  # one for each idle feature
    if features <= 4 and features < C:
        for f, c in flips:
            if f < features and c < C:
                clean[f, c] = 0.5
        shuffled = clean[:, [c for c in order if c < C]]
        choices = permutations(range(C), features)
        best = max(choices, key=lambda columns: sum(clean[f, c] for f, c in enumerate(columns)))
        target = torch.zeros(features, C).double()
        target[range(features), best] = 1
        expected = int(((clean - target).abs() > 0.1).sum())
        assert identity_error(shuffled) == expected


def test_e_identity_error_by_hand():
    importances = torch.tensor(
        [[0.0, 0.95, 0.0, 0.2], [0.85, 0.0, 0.0, 0.0], [0.0, 0.05, 1.0, 0.0]]
    )
    assert (
        identity_error(importances) == 2
    )  # feature 0 wakes a second component, feature 1 its own only to 0.85
    assert identity_order(importances).tolist() == [1, 0, 2, 3]
    assert identity_error(torch.zeros(4, 4)) == 4
    assert identity_error(torch.ones(3, 3)) == 6


@given(st.permutations(range(4)), st.integers(0, 3))
def test_e_identity_order_puts_the_busiest_of_the_others_first(order, features):
    importances = torch.zeros(features, features + 4)
    importances[:, :features] = torch.eye(features)
    importances[:, features:] = 0.01 * (1 + torch.tensor(order, dtype=torch.float32))
    found = identity_order(importances).tolist()
    assert found[:features] == list(range(features))
    assert [order[c - features] for c in found[features:]] == (
        [3, 2, 1, 0] if features else [order[c] for c in range(4)]
    )


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 7), st.integers(0, 999))
def test_e_dense_error_is_its_definition(features, C, k, seed):
    g = torch.rand(features, C, generator=generator(seed)).double().square()
    g[:, torch.rand(C, generator=generator(seed)) < 0.5] *= 0.05
    columns = sorted(g.T.tolist(), key=sum, reverse=True)
    expected = sum(max(column) < 0.9 for column in columns[:k]) + max(0, k - C)
    expected += sum(value > 0.1 for column in columns[k:] for value in column)
    assert dense_error(g, k) == expected


def test_e_dense_error_of_a_dense_block_is_zero_in_any_order():
    g = torch.cat([torch.full((6, 3), 0.5), torch.full((6, 4), 0.05)], dim=1)
    g[range(3), range(3)] = 0.95
    shuffled = g[:, torch.randperm(7, generator=generator())]
    assert [dense_error(shuffled, k) for k in (2, 3, 4)] == [6, 0, 1]


@torch.no_grad()
def test_e_truth_of_a_handmade_decomposition_of_tms():
    target = TMS(5, 2).double()
    with torch.no_grad():
        target.linear1.weight.copy_(PENTAGON)
    model = ComponentModel(target, {"linear*": 8}, {"linear2": "linear1"}).double()
    V, U = one_each(PENTAGON, [3, 1, 6, 0, 2], 8)
    with torch.no_grad():
        model["linear1"].V.copy_(V)
        model["linear1"].U.copy_(0.9 * U)
    settings = Evaluation(identity=("linear1",), dense={"linear2": 2})
    alone = lone_features(model, 5)
    for name, g in alone.importances.items():
        expected = torch.stack(
            [
                model.importances(model.clean(0.75 * e[None])).lower[name][0]
                for e in torch.eye(5).double()
            ]
        )
        torch.testing.assert_close(g, expected, **EXACT)
    found = truth(model, alone, settings)
    assert found["mmcs/linear1"] == pytest.approx(1)
    assert found["ml2r/linear1"] == pytest.approx(0.9)
    assert found["identity_error/linear1"] == identity_error(alone.importances["linear1"])
    assert found["dense_error/linear2"] == dense_error(alone.importances["linear2"], 2)
    assert "mmcs/linear2" not in found, "its columns belong to no features"


@torch.no_grad()
def test_e_columns_of_a_residual_mlp_are_taken_along_its_features():
    torch.manual_seed(0)
    target = ResidualMLP(5, 7, 4)
    model = ComponentModel(target, {"*": 6}).double()
    found = truth(model, lone_features(model, 5), Evaluation(identity=("layers.0.mlp_in",)))
    block = target.layers[0]
    assert isinstance(block, ResidualBlock)
    W = block.mlp_in.weight
    V = model["layers.0.mlp_in"].V
    U = model["layers.0.mlp_in"].U
    cosines = []
    ratios = []
    for direction in target.embedding:
        written = {
            c: (direction @ V[:, c]) * U[c] for c in range(6)
        }  # no remnants among random components
        best = max(written, key=lambda c: torch.cosine_similarity(written[c], W @ direction, dim=0))
        cosines.append(torch.cosine_similarity(written[best], W @ direction, dim=0).item())
        ratios.append((written[best].norm() / (W @ direction).norm()).item())
    assert found["mmcs/layers.0.mlp_in"] == pytest.approx(sum(cosines) / 5)
    assert found["ml2r/layers.0.mlp_in"] == pytest.approx(sum(ratios) / 5)


def test_e_diverged_or_vanished_components_are_no_crash():
    V, U = one_each(PENTAGON, range(5), 5)
    assert [value.item() for value in column_match(PENTAGON, 0 * V, U)] == [0, 0]
    assert all(value.isnan() for value in column_match(PENTAGON, V, math.nan * U))
    assert identity_error(torch.full((3, 4), math.nan)) == 12


def test_e_the_verdict_names_what_is_wrong_and_nothing_else():
    settings = Evaluation(identity=("in",), dense={"out": 3})
    right = {"alive/in": 5, "identity_error/in": 0, "alive/out": 3, "dense_error/out": 0}
    assert verdict(right, settings, 5) is None
    assert verdict({}, Evaluation(), 5) is None
    for figure, value in {
        "alive/in": 4,
        "identity_error/in": 2,
        "alive/out": 4,
        "dense_error/out": 1,
    }.items():
        told = verdict(right | {figure: value}, settings, 5) or ""
        assert told.split(":")[0] == figure.split("/")[1]
        assert ";" not in told
        assert str(value) in told
    both = verdict(right | {"alive/in": 4, "alive/out": 7}, settings, 5)
    assert both == (
        "in: 4 components for 5 features, identity error 0; out: 7 components instead of 3, dense "
        "error 0"
    )


# ---- importances and outputs ---------------------------------------------------------------------


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_e_l0_is_the_mean_number_above_the_threshold(rows, threshold):
    g = torch.tensor(rows, dtype=torch.float64)
    expected = sum(value > threshold for row in rows for value in row) / len(rows)
    assert l0(g, threshold).item() == pytest.approx(expected)
    assert l0(g[:, None], threshold).item() == pytest.approx(expected)
    assert int(firings(g, threshold).sum()) == round(expected * len(rows))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("delta", [True, False])
def test_e_six_maskings_are_their_rows_of_the_table(network, delta, monkeypatch):
    model = decomposed(network, delta=delta)
    calls = []
    own = ComponentModel.masked
    monkeypatch.setattr(
        ComponentModel,
        "masked",
        lambda self, b, masks, *rest: calls.append(masks) or own(self, b, masks, *rest),
    )
    batch = model.target.batch()
    run = LossContext.from_batch(model, batch)
    g = {name: (value * 1.7).clamp(0, 1) for name, value in run.importances.lower.items()}
    outputs = dict(masked_outputs(model, batch, run.clean, g, generator(), 0.3))
    assert (
        tuple(outputs) == MASKINGS == ("unmasked", "ci", "stochastic", "random", "rounded", "zeros")
    )
    used = dict(zip(MASKINGS, calls, strict=True))
    for name, value in g.items():
        assert (
            (used["stochastic"][name].components >= value)
            & (used["stochastic"][name].components <= 1)
        ).all()
        assert torch.is_tensor(used["stochastic"][name].delta) == delta
    printed: dict[Masking, dict[str, Mask]] = {
        "unmasked": {name: Mask(torch.ones_like(v), 0.0) for name, v in g.items()},
        "ci": {name: Mask(v, 0.0) for name, v in g.items()},
        "stochastic": used["stochastic"],
        "random": {name: Mask(used["random"][name].components, 0.0) for name in g},
        "rounded": {name: Mask((v > 0.3).double(), 0.0) for name, v in g.items()},
        "zeros": {name: Mask(torch.zeros_like(v), 0.0) for name, v in g.items()},
    }
    for source, masks in printed.items():
        torch.testing.assert_close(outputs[source], naive(model, batch, masks), **EXACT)
    with torch.no_grad():
        for (
            name,
            site,
        ) in model.sites.items():  # where there are enough components they are made to add up
            if site.d_in <= model.counts[name]:
                model[name].V.copy_(torch.eye(site.d_in, model.counts[name]))
                model[name].U.copy_(
                    torch.cat([site.weight.T, torch.zeros(99, site.d_out)])[: model.counts[name]]
                )
    exact = {
        name: m
        for name, m in printed["unmasked"].items()
        if model.sites[name].d_in <= model.counts[name]
    }
    torch.testing.assert_close(model.masked(batch, exact), model.target(batch), **EXACT)


def tokens_model():
    torch.manual_seed(0)
    patterns = {"h.*.attn.*_proj": 4, "unembed": 5}
    return ComponentModel(InductionHead(7, 6, 6), patterns).double(), torch.randint(1, 7, (5, 6))


def vectors_model():
    torch.manual_seed(0)
    target = TMS(5, 3)
    nn.init.normal_(target.linear2.bias)
    return ComponentModel(
        target, {"*": 4}, importance=Importance("shared_mlp")
    ).double(), torch.rand(5, 5).double()


@pytest.mark.parametrize(("made", "divergence"), [(tokens_model, "kl"), (vectors_model, "mse")])
def test_e_figures_are_means_over_positions_however_the_data_are_cut(made, divergence):
    model, data = made()
    with torch.no_grad():
        model[next(iter(model.sites))].U[0] *= 1e-3  # a remnant
    if made is tokens_model:
        data[:, -1] = data[:, 1]  # the last token has occurred before
    settings = Evaluation(threshold=0.2, groups={"some": "*1*", "all": "*"}, divergence=divergence)
    found = []
    for cut in ([5], [2, 3], [1, 1, 3]):
        totals = Totals()
        for batch in data.split(cut):
            count(model, LossContext.from_batch(model, batch, generator()), settings, totals)
        found.append((totals, figures_of(model, totals, settings)))
    drawn = {
        f"{kind}/{source}"
        for kind in (divergence, "recovered", "task_difference")
        for source in ("stochastic", "random")
    }
    drawn |= {f"ce_recovered/{source}" for source in ("stochastic", "random")}
    drawn |= {f"se/{name}" for name in drawn}
    for _, figures in found[1:]:
        for name in figures.keys() - drawn:
            assert figures[name] == pytest.approx(found[0][1][name], rel=1e-9, abs=1e-12), name
    totals, figures = found[0]
    run = LossContext.from_batch(model, data)
    flat = {name: g.reshape(-1, g.shape[-1]) for name, g in run.importances.lower.items()}
    for name, g in flat.items():
        rows = g.tolist()
        assert figures[f"l0/{name}"] == pytest.approx(
            sum(v > 0.2 for row in rows for v in row) / len(rows)
        )
        norms = [
            torch.outer(u, v).norm() for u, v in zip(model[name].U, model[name].V.T, strict=True)
        ]
        large = [norm > 0.05 * max(norms) for norm in norms]
        assert figures[f"alive/{name}"] == sum(
            big and any(row[c] > 0.2 for row in rows) for c, big in enumerate(large)
        )
        assert figures[f"nonzero/{name}"] == sum(large)
        torch.testing.assert_close(totals.mean(f"importance/{name}"), g.mean(0))
        torch.testing.assert_close(totals.mean(f"fired/{name}"), (g > 0.2).double().mean(0))
        assert totals.sums[f"histogram/{name}"].sum() == g.numel()
    for name, (error, size) in hidden_squares(model, run).items():
        assert figures[f"hidden/{name}"] == pytest.approx((error / size).item(), rel=1e-9)
    assert figures["l0/all"] == pytest.approx(sum(figures[f"l0/{name}"] for name in flat))
    assert figures["l0/some"] == pytest.approx(
        sum(figures[f"l0/{name}"] for name in flat if "1" in name)
    )
    masks = {
        "ci": run.importances.lower,
        "zeros": {n: torch.zeros_like(g) for n, g in run.importances.lower.items()},
    }
    raw = {}
    gaps = {}
    target = model.target(data)
    for source, m in masks.items():
        output = model.masked(data, {name: Mask(value, 0.0) for name, value in m.items()})
        log_p = torch.log_softmax(target, -1)
        log_q = torch.log_softmax(output, -1)
        apart = (
            (log_p.exp() * (log_p - log_q)).sum(-1)
            if divergence == "kl"
            else (output - target).square()
        )
        raw[source] = apart.mean().item()
        assert figures[f"{divergence}/{source}"] == pytest.approx(raw[source], rel=1e-9)
        gap = model.target.score(output, data) - model.target.score(target, data)
        assert figures[f"task_difference/{source}"] == pytest.approx(gap.item(), rel=1e-9)
        gaps[source] = gap.item()
    assert figures["recovered/ci"] == pytest.approx(1 - raw["ci"] / raw["zeros"])
    assert ("ce_recovered/ci" in figures) == (divergence == "kl" and gaps["zeros"] > 0)
    if "ce_recovered/ci" in figures:
        assert figures["ce_recovered/ci"] == pytest.approx(1 - gaps["ci"] / gaps["zeros"])
    assert figures["recovered/zeros"] == pytest.approx(0)
    assert figures["task/target"] == pytest.approx(model.target.score(target, data).item())


def test_e_hidden_errors_are_those_of_site_inputs_inside_the_ci_masked_model():
    model = decomposed(Perceptron)
    run = LossContext.from_batch(model, model.target.batch())
    seen = {}
    naive(model, run.batch, {name: Mask(g, 0.0) for name, g in run.importances.lower.items()}, seen)
    squares = hidden_squares(model, run)
    assert squares["first"][0] == 0
    x = torch.tanh(model.target.first(run.batch))
    error, size = squares["second"]
    assert (error / size).item() == pytest.approx(
        ((seen["second"] - x).norm() / x.norm()).item() ** 2, rel=1e-9
    )


@pytest.mark.parametrize("restarts", [1, 3])
def test_e_every_rung_of_the_ladder_is_the_worst_of_adversaries_of_its_own(restarts):
    model = decomposed(Perceptron)
    batch = model.target.batch()
    g = {
        name: value.detach()
        for name, value in LossContext.from_batch(model, batch[:4]).importances.lower.items()
    }

    def rows(sources):
        return (
            (naive(model, batch[:4], masks_from_sources(g, sources)) - model.target(batch[:4]))
            .square()
            .mean(1)
        )

    with torch.no_grad():
        settings = Evaluation(pgd_steps=(9, 2, 5), restarts=restarts, pgd_rows=4)
        swept = pgd_sweep(model, batch, settings)
        for steps in settings.pgd_steps:
            starts = range(restarts)
            climbed = [
                rows(pgd_sources(Adversary(steps), g, lambda s: rows(s).mean(), generator(seed)))
                for seed in starts
            ]
            worst = max(climbed, key=torch.mean)
            assert swept[f"pgd/{steps}"] == pytest.approx(worst.mean().item(), rel=1e-10)
            assert swept[f"se/pgd/{steps}"] == pytest.approx(worst.std().item() / 2, rel=1e-9)
    assert [name for name in swept if name.startswith("pgd")] == ["pgd/2", "pgd/5", "pgd/9"]
    assert not any(p.grad is not None for p in model.parameters())


def test_e_the_ladder_takes_about_512_positions_where_nothing_is_said(monkeypatch):
    taken = []
    own = LossContext.from_batch.__func__
    monkeypatch.setattr(
        LossContext,
        "from_batch",
        classmethod(lambda cls, model, batch: taken.append(batch) or own(cls, model, batch)),
    )
    settings = Evaluation(pgd_steps=(1,), divergence="kl")
    tokens, _ = tokens_model()
    pgd_sweep(tokens, torch.randint(1, 7, (200, 6)), settings)
    vectors, _ = vectors_model()
    pgd_sweep(vectors, torch.rand(700, 5).double(), settings)
    pgd_sweep(vectors, torch.rand(3, 5).double(), settings)
    pgd_sweep(vectors, torch.rand(700, 5).double(), Evaluation(pgd_steps=(1,), pgd_rows=7))
    assert [len(batch) for batch in taken] == [86, 512, 3, 7]
    assert pgd_sweep(vectors, torch.rand(3, 5).double(), Evaluation(pgd_steps=())) == {}


# ---- uncertainty ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "divergence"), [(tokens_model, "kl"), (vectors_model, "mse")])
def test_e_standard_errors_are_those_of_the_mean_over_rows(made, divergence):
    model, data = made()
    if made is tokens_model:
        data[:, -1] = data[:, 1]
    settings = Evaluation(threshold=0.2, groups={"all": "*"}, divergence=divergence)
    totals = Totals()
    for batch in data.split([2, 3]):
        count(model, LossContext.from_batch(model, batch, generator()), settings, totals)
    figures = figures_of(model, totals, settings)
    one = {}
    for row in data:
        alone = Totals()
        count(model, LossContext.from_batch(model, row[None], generator()), settings, alone)
        for name, value in figures_of(model, alone, settings).items():
            one.setdefault(name, []).append(value)
    assert not any(name.startswith("se/") for name in one), "one row says nothing of the next"
    errors = {
        name.removeprefix("se/"): value for name, value in figures.items() if name.startswith("se/")
    }
    expected = {f"l0/{site}" for site in model.sites} | {"l0/all", "task/target"}
    expected |= {
        f"{kind}/{masking}" for kind in (divergence, "task_difference") for masking in MASKINGS
    }
    assert set(errors) == expected
    for name in expected - {n for n in expected if n.endswith(("/stochastic", "/random"))}:
        values = torch.tensor(one[name], dtype=torch.float64)
        assert figures[name] == pytest.approx(values.mean().item(), rel=1e-9, abs=1e-12), name
        assert errors[name] == pytest.approx(
            values.std().item() / math.sqrt(5), rel=1e-6, abs=1e-9
        ), name


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.integers(1, 29))
def test_standard_errors_add_up_however_rows_are_cut(values, cut):
    rows = torch.tensor(values, dtype=torch.float64)
    totals = Totals()
    for part in (rows[:cut], rows[cut:]):
        totals.add("rows", torch.tensor(len(part)))
        totals.add_rows("x", part)
    assert totals.row_mean("x") == pytest.approx(rows.mean().item(), abs=1e-9)
    assert totals.standard_error("x") == pytest.approx(
        rows.std().item() / math.sqrt(len(rows)), rel=1e-6, abs=1e-4
    )


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        (0.12345, 0.0042, "0.123 ± 0.004"),
        (0.12345, 0.0142, "0.123 ± 0.014"),
        (0.12345, 0.0096, "0.123 ± 0.010"),
        (-3.14159, 0.5, "-3.1 ± 0.5"),
        (1234.5, 34.0, "1230 ± 30"),
        (0.0, 3e-9, "0 ± 3e-09"),
        (2.5, None, "2.5"),
        (2.5, 0.0, "2.5"),
        (0.123456, math.nan, "0.1235"),
        (7, None, "7"),
    ],
)
def test_figures_are_stated_to_the_digit_that_is_certain(value, error, told):
    assert uncertain(value, error) == told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"divergence": "kll"}, "divergence 'kll'.*'kl'"),
        ({"restarts": 0}, "restarts 0 in evaluation: it must be at least 1"),
        ({"pgd_rows": 0}, "pgd_rows 0 in evaluation: it must be at least 1"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(settings, told):
    with pytest.raises(BadInput, match=told):
        Evaluation(**settings)
