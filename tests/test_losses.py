"""Losses (laws L1–L5, L7): every term against loops, exact in how batches are merged or split among
devices.
"""

import json
import math
import sys
from itertools import pairwise, product
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.half_batches import half_of_two, losses_and_gradients, whole_batch
from support.networks import Branches, Perceptron, Tokens, decomposed, naive, printed_weight
from support.tensors import gradient_of, sum_of
from torch import nn
from torch.distributions import Categorical, kl_divergence

from spd_lightning.decomposition import model as model_module
from spd_lightning.decomposition.adversaries import Adversary
from spd_lightning.decomposition.divergences import kl, mse
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.losses import (
    EPSILON,
    Faithfulness,
    Frequency,
    Losses,
    Minimality,
    SmoothL0,
    anneal,
)
from spd_lightning.decomposition.masks import RouteKind
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction
from spd_lightning.errors import BadInput
from spd_lightning.targets.toy import TMS, ResidualMLP
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.schedule import Schedule

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
SOURCES = ("ones", "ci", "stochastic", "pgd", "zeros", "random", "rounded")
ROUTES = ("all", "layerwise", "subset", "static")
drawn_importances = st.lists(
    st.lists(st.floats(-0.5, 1.5), min_size=3, max_size=3), min_size=1, max_size=5
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---- divergences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 7)])
def test_kl_is_that_of_torch_distributions(shape):
    torch.manual_seed(0)
    masked = (5 * torch.randn(shape)).double().requires_grad_()
    target = (5 * torch.randn(shape)).double()
    expected = kl_divergence(Categorical(logits=target), Categorical(logits=masked)).mean()
    torch.testing.assert_close(kl(masked, target), expected, **EXACT)
    for a, b in zip(
        torch.autograd.grad(kl(masked, target), masked),
        torch.autograd.grad(expected, masked),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)
    low = kl(masked.bfloat16(), target.bfloat16())
    high = kl(masked.bfloat16().float(), target.bfloat16().float())
    assert low.dtype == torch.float32
    assert torch.equal(low, high)
    assert torch.isfinite(kl(1e4 * masked, -1e4 * target))
    assert kl(target, target + 3.0).abs() < 1e-12


@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 7)])
def test_mse_is_the_mean_over_all_output_entries(shape):
    torch.manual_seed(0)
    a = torch.randn(shape).double()
    b = torch.randn(shape).double()
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    assert mse(a, b).item() == pytest.approx(
        sum((x - y) ** 2 for x, y in pairs) / math.prod(shape), rel=1e-12
    )


@pytest.mark.parametrize("divergence", [mse, kl])
def test_weights_stand_for_repeated_rows(divergence):
    torch.manual_seed(0)
    a = torch.randn(3, 4, 5).double()
    b = torch.randn(3, 4, 5).double()
    counts = torch.tensor([2, 1, 4])
    repeated = divergence(a.repeat_interleave(counts, 0), b.repeat_interleave(counts, 0))
    torch.testing.assert_close(divergence(a, b, counts.double()), repeated, **EXACT)


# ---- penalties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [Perceptron, Tokens, Branches])
@pytest.mark.parametrize("relative", [False, True])
def test_l1_faithfulness_is_the_mean_square_of_what_components_miss(network, relative):
    model = decomposed(network)
    squares = []
    sizes = 0
    shares = []
    for name in model.sites:
        W, _ = printed_weight(model.target, name)
        V = model[name].V
        U = model[name].U
        entries = [
            (W[o, i] - V[i] @ U[:, o]) ** 2 for o in range(len(W)) for i in range(W.shape[1])
        ]
        squares.append(sum_of(entries))
        sizes = sizes + len(entries)
        shares.append(squares[-1] / sum_of(w * w for w in W.flatten()))
    expected = sum_of(shares) / len(shares) if relative else sum_of(squares) / sizes
    loss = Faithfulness(relative=relative)(model)
    parameters = list(model.components.parameters())
    torch.testing.assert_close(loss, expected, **EXACT)
    for a, b in zip(
        *(torch.autograd.grad(number, parameters) for number in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_l1_faithfulness_stays_in_float32_under_autocast():
    model = decomposed(Perceptron).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = Faithfulness()(model)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, Faithfulness()(model))


@given(
    rows=drawn_importances,
    p=st.sampled_from([0.5, 1.0, 1.7, 2.0, 3.0]),
    pos=st.booleans(),
    merged=st.booleans(),
)
def test_l2_and_l3_are_their_loops(rows, p, pos, merged):
    upper = {"a": double(rows).clamp(min=0), "b": double(rows)[:, :2].square()}
    upper = {name: torch.stack([g, g.flip(0)], dim=1) if pos else g for name, g in upper.items()}
    counts = [1 + k % 3 for k in range(len(rows))]
    full = {
        n: g.repeat_interleave(torch.tensor(counts), 0) if merged else g for n, g in upper.items()
    }
    weights = double(counts) if merged else None
    minimality, frequency = 0.0, 0.0
    for g in full.values():
        positions = g.flatten(0, -2).tolist()
        for c in range(g.shape[-1]):
            f = sum((row[c] + 1e-12) ** p for row in positions) / len(positions)
            minimality = minimality + f
            frequency = frequency + f * math.log2(1 + 37.0 * f)
    means = Minimality(p=p).means(upper, 0.0, weights)
    assert Minimality()(means).item() == pytest.approx(minimality, rel=1e-10)
    assert Frequency(positions=37.0)(means).item() == pytest.approx(frequency, rel=1e-10)


@pytest.mark.parametrize(("progress", "p"), [(0.0, 2.0), (0.25, 1.6), (0.5, 1.2), (1.0, 0.4)])
def test_l3_the_frequency_term_has_the_annealed_exponent_of_minimality(progress, p):
    """By hand for p(t) ≠ 1: f = mean (ĝ + ε)^{p(t)}, term = Σ f log2(1 + a f)."""
    run = LossContext.from_batch(decomposed(Perceptron), Perceptron().batch())
    losses = Losses(
        Faithfulness(0.0),
        Minimality(1.0, p=2.0, p_final=0.4),
        Frequency(1.0, positions=29.0),
        reconstruction={},
    )
    expected = 0.0
    for g in run.importances.upper.values():
        for column in g.T.tolist():
            f = sum((value + 1e-12) ** p for value in column) / len(column)
            expected += f * math.log2(1 + 29.0 * f)
    _, terms = losses(run, progress)
    assert terms["frequency"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("progress", "on"), [(0.0, True), (0.6, True), (0.61, False), (1.0, False)]
)
def test_l3_the_frequency_term_ends_where_it_is_told(progress, on):
    """After `until` the total is that without the term, which is still logged."""
    run = LossContext.from_batch(decomposed(Perceptron), Perceptron().batch())
    with_it = Losses(
        Faithfulness(0.0), Minimality(1.0), Frequency(5.0, 29.0, until=0.6), reconstruction={}
    )
    without = Losses(Faithfulness(0.0), Minimality(1.0), reconstruction={})
    total, terms = with_it(run, progress)
    expected = without(run, progress)[0] + (5.0 * terms["frequency"] if on else 0.0)
    assert terms["frequency"] > 0.1
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert Frequency(5.0).coefficient(1.0) == 5.0


@pytest.mark.parametrize("progress", [0.0, 0.45, 0.9, 1.0])
@given(rows=drawn_importances)
def test_l4_smooth_l0_counts_with_a_falling_width(progress, rows):
    gamma = {0.0: 1.0, 0.45: 0.505, 0.9: 0.01, 1.0: 0.01}[progress]
    lower = {"a": double(rows).clamp(0, 1), "b": double(rows)[:, :2].clamp(0, 1)}
    entries = [
        g * g / (g * g + gamma**2) for site in lower.values() for g in site.flatten().tolist()
    ]
    found = SmoothL0()(lower, progress, None).item()
    assert found == pytest.approx(sum(entries) / len(rows), rel=1e-9, abs=1e-9)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(-5, 5), st.floats(-5, 5))
def test_annealing_is_linear_between_two_fractions_and_constant_outside(
    progress, one, other, start, final
):
    begin, end = sorted((one, other))
    value = anneal(start, final, progress, begin, end)
    if progress < begin:
        assert value == start
    elif progress >= end:
        assert value == pytest.approx(final, abs=1e-12)
    else:
        assert (value - start) * (end - begin) == pytest.approx(
            (final - start) * (progress - begin), abs=1e-9
        )


@pytest.mark.parametrize(
    ("progress", "p"), [(0.0, 2.0), (0.2, 2.0), (0.4, 1.45), (0.6, 0.9), (1.0, 0.9)]
)
def test_l2_the_exponent_moves_linearly_between_two_fractions(progress, p):
    term = Minimality(p=2.0, p_final=0.9, start=0.2, end=0.6)
    upper = {"a": double([[0.3]] * 3), "b": double([[0.8]] * 3)}
    assert term(term.means(upper, progress, None)).item() == pytest.approx(
        0.3**p + 0.8**p, rel=1e-9
    )
    fixed = term(Minimality(p=2.0).means(upper, progress, None))
    assert fixed.item() == pytest.approx(0.3**2 + 0.8**2, rel=1e-9)


def test_l2_the_coefficient_can_rise_from_nothing():
    ramped = Minimality(coeff=3.0, ramp=0.5)
    assert [ramped.coefficient(progress) for progress in (0.0, 0.25, 0.5, 0.9)] == [
        0.0,
        1.5,
        3.0,
        3.0,
    ]
    assert Minimality(coeff=3.0).coefficient(0.0) == 3.0


def test_l2_gradients_are_finite_where_nothing_is_important():
    upper = torch.zeros(4, 3, requires_grad=True)
    term = Minimality(p=0.3)
    term(term.means({"a": upper}, 0.0, None)).backward()
    assert torch.isfinite(gradient_of(upper)).all()
    assert EPSILON == 1e-12


def test_l3_does_not_depend_on_the_batch_size_nor_l2_on_the_number_of_rows():
    g = {"a": torch.rand(6, 4).double()}
    twice = {"a": g["a"].repeat(2, 1)}
    term = Minimality(p=1.5)
    means = Minimality(p=1.5).means
    for loss in (Frequency(positions=50.0), term):
        torch.testing.assert_close(
            loss(means(g, 0.0, None)), loss(means(twice, 0.0, None)), **EXACT
        )
    both = term(means({"a": g["a"], "b": g["a"]}, 0.0, None))
    torch.testing.assert_close(both, 2 * term(means(g, 0.0, None)), **EXACT)


# ---- reconstruction ------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """The masks of every masked run with gradient, in order."""
    seen = []
    own = ComponentModel.masked

    def watched(self, batch, masks, clean=None, detach=False, **rest):
        if not detach:
            seen.append(masks)
        return own(self, batch, masks, clean, detach, **rest)

    monkeypatch.setattr(ComponentModel, "masked", watched)
    return seen


@pytest.mark.parametrize("network", [Perceptron, Branches])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("source", ["ones", "ci", "stochastic", "rounded", "pgd"])
def test_l5_reconstruction_is_the_mean_divergence_of_its_masked_runs(
    network, source, route, passes
):
    model = decomposed(network)
    run = LossContext.from_batch(model, model.target.batch(), generator())
    loss = Reconstruction(source, route, "kl", samples=3, adversary=Adversary(2))(run)
    by_route = 3 * len(model.sites) if route == "layerwise" else 3
    assert len(passes) == by_route
    for k, masks in enumerate(passes):
        assert (
            list(masks) == [list(model.sites)[k % len(model.sites)]]
            if route == "layerwise"
            else list(model.sites)
        )
        assert all(
            (mask.route is None) == (route in ("all", "layerwise")) for mask in masks.values()
        )
    target = Categorical(logits=model.target(run.batch))
    divergences = [
        kl_divergence(target, Categorical(logits=naive(model, run.batch, masks))).mean()
        for masks in passes
    ]
    expected = torch.stack(divergences).mean()
    torch.testing.assert_close(loss, expected, **EXACT)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    for a, b in zip(
        found, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_l5_all_ones_is_the_reconstruction_by_the_components_alone():
    """The source `ones` as a loss: outputs of a network whose weights are V U, by hand."""
    model = decomposed(Perceptron)
    run = LossContext.from_batch(model, model.target.batch())
    own = {name: site.weight.clone() for name, site in model.sites.items()}
    with torch.no_grad():
        for name, site in model.sites.items():
            site.weight.copy_((model[name].V @ model[name].U).T)
        alone = model.target(run.batch)
        for name, weight in own.items():
            model.sites[name].weight.copy_(weight)
    expected = (alone - model.target(run.batch)).square().mean()
    assert expected > 1e-3
    torch.testing.assert_close(Reconstruction("ones")(run), expected, **EXACT)


def test_pgd_may_not_start_where_it_would_stay():
    """With the delta on, sources of 1 are the target (D5): no gradient leads away, and 0 would read
    as robust.
    """
    stuck = Reconstruction("pgd", adversary=Adversary(2, init="ones"))
    message = "adversary init 'ones' in reconstruction 'worst': with the delta component on"
    with pytest.raises(BadInput, match=message):
        Decomposition(Perceptron(), {"*": 3}, losses=Losses(reconstruction={"worst": stuck}))
    whole, bare = (decomposed(Perceptron, delta=delta) for delta in (True, False))
    with pytest.raises(BadInput, match=message):
        stuck(LossContext.from_batch(whole, whole.target.batch()), "worst")
    assert stuck(LossContext.from_batch(bare, bare.target.batch()), "worst") > 0


def test_l5_samples_are_different_draws_shared_by_all_losses_of_a_step(passes):
    model = decomposed(Perceptron)
    run = LossContext.from_batch(model, model.target.batch(), generator())
    Reconstruction("stochastic", samples=2)(run)
    Reconstruction("stochastic", "layerwise", samples=2)(run)
    assert passes[0]["first"] is not passes[1]["first"]
    assert [masks["first"] for masks in passes if "first" in masks][2:] == [
        passes[0]["first"],
        passes[1]["first"],
    ]


def test_l5_thresholds_of_two_rounded_losses_are_kept_apart(passes):
    model = decomposed(Perceptron)
    run = LossContext.from_batch(model, model.target.batch())
    for threshold in (0.1, 0.7):
        Reconstruction("rounded", threshold=threshold)(run)
    for masks, threshold in zip(passes, (0.1, 0.7), strict=True):
        assert torch.equal(
            masks["first"].components, (run.importances.lower["first"] > threshold).double()
        )


@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize(("source", "route"), list(product(SOURCES, ROUTES)))
@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
def test_l5_every_source_route_and_divergence_trains(source, route, divergence, sampling):
    model = decomposed(Tokens, importance=Importance(sampling=sampling)).float()
    run = LossContext.from_batch(model, model.target.batch(), generator(), sample=True)
    loss = Reconstruction(source, route, divergence, adversary=Adversary(2))(run)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.any() for g in gradients) == (source != "zeros")


# ---- the total -----------------------------------------------------------------------------------


def test_l7_the_total_is_coefficient_times_loss_and_what_is_logged_is_raw():
    model = decomposed(Perceptron)
    losses = Losses(
        Faithfulness(2.0),
        Minimality(3.0, p=1.5, ramp=0.5),
        Frequency(5.0, positions=10.0),
        SmoothL0(7.0),
        {
            "exact": Reconstruction("ci", coeff=11.0),
            "each": Reconstruction("ci", "layerwise", "kl", coeff=13.0),
        },
    )
    run = LossContext.from_batch(model, model.target.batch())
    total, terms = losses(run, 0.25)
    alone = LossContext.from_batch(model, run.batch)
    means = Minimality(p=1.5).means(alone.importances.upper, 0.25, None)
    raw = {
        "faithfulness": Faithfulness()(model),
        "minimality": Minimality()(means),
        "frequency": Frequency(positions=10.0)(means),
        "smooth_l0": SmoothL0()(alone.importances.lower, 0.25, None),
        "reconstruction/exact": Reconstruction("ci")(alone),
        "reconstruction/each": Reconstruction("ci", "layerwise", "kl")(alone),
    }
    assert list(terms) == list(raw)
    for name, value in raw.items():
        torch.testing.assert_close(terms[name], value.detach(), **EXACT)
        assert not terms[name].requires_grad
    expected = sum_of(
        c * value for c, value in zip((2.0, 1.5, 5.0, 7.0, 11.0, 13.0), raw.values(), strict=True)
    )
    torch.testing.assert_close(total, expected, **EXACT)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        *(torch.autograd.grad(number, parameters) for number in (total, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_l7_terms_without_weight_are_not_computed():
    run = LossContext.from_batch(decomposed(Perceptron), Perceptron().batch(), generator())
    assert list(Losses()(run)[1]) == [
        "faithfulness",
        "minimality",
        "reconstruction/all",
        "reconstruction/layerwise",
    ]
    _, terms = Losses(Faithfulness(0.0), Minimality(0.0), reconstruction={"one": Reconstruction()})(
        run
    )
    assert list(terms) == ["reconstruction/one"]
    off = Reconstruction(coeff=0.0)
    hidden = Reconstruction(coeff=0.0, hidden=("*",))
    total, terms = Losses(
        Faithfulness(0.0), Minimality(0.0), reconstruction={"off": off, "hidden": hidden}
    )(run)
    assert list(terms) == ["reconstruction/hidden", "hidden/hidden"]
    torch.testing.assert_close(total, terms["hidden/hidden"], **EXACT)


def test_what_losses_need_alike_is_computed_once(monkeypatch):
    model = decomposed(Perceptron)
    maps = []
    cleans = []
    own_map, own_clean = model_module.masked_output, ComponentModel.clean
    monkeypatch.setattr(
        model_module, "masked_output", lambda *args: maps.append(1) or own_map(*args)
    )
    monkeypatch.setattr(
        ComponentModel, "clean", lambda self, batch: cleans.append(1) or own_clean(self, batch)
    )
    Losses()(LossContext.from_batch(model, model.target.batch(), generator()))
    assert len(cleans) == 1
    assert (
        len(maps) == 3
    )  # `first` once for both passes; `second` behind the masked and behind the clean `first`


# ---- merged zero rows ----------------------------------------------------------------------------

WAYS: tuple[tuple[RouteKind, Literal["mse", "kl"]], ...] = (("all", "mse"), ("layerwise", "kl"))
EXACT_WHEN_MERGED = {
    f"{source}-{route}": Reconstruction(
        source, route, divergence, adversary=Adversary(2, init="zeros")
    )
    for route, divergence in WAYS
    for source in ("ones", "ci", "rounded", "pgd")
}


@settings(max_examples=6)
@given(
    active=st.lists(st.booleans(), min_size=1, max_size=12),
    delta=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("kind", ["tms", "residual"])
def test_merging_zero_rows_changes_no_loss_whose_masks_are_not_drawn(kind, active, delta, seed):
    torch.manual_seed(seed)
    target = TMS(5, 3, 1) if kind == "tms" else ResidualMLP(5, 6, 4)
    if isinstance(target, TMS):
        nn.init.normal_(target.linear2.bias)
    d = Decomposition(target, {"*": 4}, delta=delta).double()
    for parameter in d.model.importance_function.parameters():
        nn.init.normal_(parameter)
    batch = torch.randn(len(active), 5).double() * torch.tensor(active)[:, None]
    rows, weights = d._merged(batch)
    assert len(rows) == sum(active) + 1
    assert weights is not None
    assert weights.tolist() == [1.0] * sum(active) + [len(active) - sum(active)]
    losses = Losses(
        minimality=Minimality(1.0, p=1.5),
        frequency=Frequency(1.0, positions=20.0),
        smooth_l0=SmoothL0(1.0),
        reconstruction=EXACT_WHEN_MERGED,
    )
    (merged, terms) = losses(LossContext.from_batch(d.model, rows, None, weights))
    (full, expected) = losses(LossContext.from_batch(d.model, batch))
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name], **EXACT)
    parameters = [p for p in d.model.parameters() if p.requires_grad]
    for a, b in zip(
        *(torch.autograd.grad(number, parameters) for number in (merged, full)), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_zero_rows_are_merged_only_where_they_are_inert():
    batch = torch.eye(4)[[0, 3, 0]] * torch.tensor([[1.0], [0.0], [0.0]])
    for target, inert in (
        (Perceptron(bias=False), True),
        (Perceptron(bias=True), False),
        (TMS(4, 2), True),
    ):
        d = Decomposition(target, {"*": 3})
        rows, weights = d._merged(batch)
        assert len(rows) == (2 if inert else 3)
        assert (weights is not None) == inert
    tokens = torch.zeros(3, 5, dtype=torch.long)
    assert Decomposition(Tokens(), {"conv": 3})._merged(tokens)[0] is tokens


# ---- more than one device ------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")
def test_l3_two_devices_give_what_one_gives(tmp_path):
    torch.multiprocessing.spawn(half_of_two, (str(tmp_path),), nprocs=2)
    (left, gradient), (right, same) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    terms, expected = losses_and_gradients(whole_batch())
    assert gradient == same
    torch.testing.assert_close(double(gradient), expected, **EXACT)
    assert left["frequency"] == right["frequency"] == pytest.approx(terms["frequency"], rel=1e-12)
    for name, value in terms.items():
        assert (left[name] + right[name]) / 2 == pytest.approx(value, rel=1e-10)
    assert abs(left["minimality"] - right["minimality"]) > 1e-3  # the halves do differ


# ---- learning rates ------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 20),
    hold=st.floats(0, 1),
    final=st.floats(0, 1),
    steps=st.integers(1, 60),
)
def test_l7_learning_rates_rise_fall_and_end_exactly_at_their_final_value(
    kind, warmup, hold, final, steps
):
    schedule = Schedule(kind, warmup, hold, final)
    factors = [schedule.factor(step, steps) for step in range(steps)]
    rise = factors[:warmup]
    fall = factors[warmup:]
    assert rise == [(step + 1) / warmup for step in range(len(rise))]
    assert all(a >= b - 1e-12 for a, b in pairwise(fall))
    begin = max(warmup, hold * (steps - 1))
    assert all(value == 1 for step, value in enumerate(factors) if warmup <= step <= begin)
    if steps - 1 > begin:
        assert factors[-1] == pytest.approx(1.0 if kind == "constant" else final, abs=1e-9)
        middle = (begin + steps - 1) / 2
        if begin == int(begin) and middle == int(middle):
            half = 1.0 if kind == "constant" else (1 + final) / 2
            assert factors[int(middle)] == pytest.approx(half, abs=1e-9)


class Forgetful(dict):
    """Knows nothing of what it holds."""

    def __contains__(self, key):
        return False


def test_matrices_that_are_cast_once_a_batch_still_get_every_gradient():
    """An ascent asks for them first, without a gradient; both reconstructions train them all the
    same.
    """
    torch.manual_seed(0)
    model = ComponentModel(ResidualMLP(6, 8, 5, 2), {"layers.*": 7})
    ascent = Reconstruction("pgd", "all", adversary=Adversary(1, 0.5, "random"))
    losses = Losses(
        Faithfulness(0.0),
        Minimality(0.0),
        reconstruction={"first": ascent, "then": Reconstruction("ci")},
    )
    gradients = []
    for held in ({}, Forgetful()):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            run = LossContext.from_batch(model, torch.linspace(-1, 1, 24).view(4, 6), generator())
            run.clean.matrices = held
            total, _ = losses(run)
        assert set(held.keys()) == set(model.sites)
        model.zero_grad()
        total.backward()
        gradients.append(
            torch.cat([gradient_of(p).flatten() for p in model.components.parameters()])
        )
    assert gradients[0].norm() > 0
    torch.testing.assert_close(
        gradients[0], gradients[1], rtol=0.05, atol=0.01 * gradients[1].abs().max().item()
    )
