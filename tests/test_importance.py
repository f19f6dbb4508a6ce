"""Causal importance (laws G1–G6, D7): importance functions against loops over components, sigmoids
entry by entry.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.networks import Branches, Perceptron, Tokens, decomposed
from support.tensors import gradient_of, sum_of
from torch import nn

from spd_lightning.decomposition import importance_functions as module
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.importance import SIGMOIDS, Importance, lower_leaky, upper_leaky
from spd_lightning.decomposition.masks import stochastic_sources
from spd_lightning.decomposition.metrics import masked_outputs
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction

KINDS = ("mlp", "vector_mlp", "shared_mlp", "global_mlp")
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
reals = st.floats(-3, 3, allow_nan=False)


def gelu(h):
    """By erf (D7)."""
    return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def loop(kind, function, inputs, inner):
    """z of every site, one component after the other."""
    if isinstance(
        function, module.Together
    ):  # an embedding's `mlp`, and a function for all other sites
        first, rest = function.parts
        names = [name for name in inputs if name != "embed"]
        z = loop("mlp", first, {"embed": inputs["embed"]}, inner)
        z |= loop(kind, rest, {n: inputs[n] for n in names}, {n: inner[n] for n in names})
        return {name: z[name] for name in inputs}
    if kind == "global_mlp":
        x = torch.cat(list(inputs.values()), dim=-1)
        flat = iter(torch.stack(read_shared(function.network, x), dim=-1).unbind(-1))
        return {
            name: torch.stack([next(flat) for _ in range(a.shape[-1])], dim=-1)
            for name, a in inner.items()
        }
    return {
        name: torch.stack(
            ONE_SITE["mlp" if name == "embed" else kind](f, inputs[name], inner[name]), dim=-1
        )
        for (name, f) in zip(inputs, function.networks, strict=True)
    }


def read_scalar(f, _, a):
    neuron = lambda c, h: f.W2[c, h] * gelu(f.W1[c, h] * a[..., c] + f.b1[c, h])  # noqa: E731
    return [sum(neuron(c, h) for h in range(f.W1.shape[1])) + f.b2[c] for c in range(a.shape[-1])]


def read_vector(f, x, a):
    neuron = lambda c, h: f.W2[c, h] * gelu(x @ f.W1[c, :, h] + f.b1[c, h])  # noqa: E731
    return [sum(neuron(c, h) for h in range(f.W1.shape[2])) + f.b2[c] for c in range(a.shape[-1])]


def read_shared(network, x):
    first = network[0]
    last = network[2]
    hidden = [gelu(x @ w + b) for w, b in zip(first.weight, first.bias, strict=True)]
    return [
        sum(h * w for h, w in zip(hidden, row, strict=True)) + b
        for row, b in zip(last.weight, last.bias, strict=True)
    ]


ONE_SITE = {
    "mlp": read_scalar,
    "vector_mlp": read_vector,
    "shared_mlp": lambda f, x, _: read_shared(f.network, x),
}


def scrambled(network, kind, **settings):
    """A model whose importance function has no zeros left."""
    model = decomposed(network, importance=Importance(kind, hidden=3, **settings))
    for parameter in model.importance_function.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("network", [Perceptron, Branches, Tokens])
@pytest.mark.parametrize("kind", KINDS)
def test_g1_every_kind_is_its_loop_over_components_in_value_and_gradient(network, kind):
    model = scrambled(network, kind)
    clean = model.clean(model.target.batch(3))
    inputs = {
        n: x.clone().requires_grad_() if x.is_floating_point() else x
        for n, x in clean.inputs.items()
    }
    inner = {n: a.detach().requires_grad_() for n, a in clean.inner.items()}
    wanted = [*model.importance_function.parameters(), *inner.values()]
    wanted += [x for x in inputs.values() if x.requires_grad]
    found = model.importance_function(inputs, inner)
    expected = loop(kind, model.importance_function, inputs, inner)
    numbers = []
    for z in (found, expected):
        assert list(z) == list(model.sites)
        number = sum(
            (z[name] * torch.linspace(-1, 2, z[name].numel()).reshape(z[name].shape)).sum()
            for name in z
        )
        numbers.append(number + 0 * sum(t.sum() for t in wanted))
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **EXACT)
    for a, b in zip(*(torch.autograd.grad(number, wanted) for number in numbers), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@settings(max_examples=25)
@given(
    C=st.integers(1, 7), hidden=st.integers(1, 5), rows=st.integers(0, 6), block=st.integers(1, 80)
)
def test_g1_blocks_of_any_size_give_the_same(C, hidden, rows, block):
    torch.manual_seed(0)
    shapes = ((C, rows), (C, hidden), (C, hidden), (C, hidden), (C,))
    a, W1, b1, W2, b2 = (torch.randn(shape).double().requires_grad_() for shape in shapes)
    before, module._ScalarMLPs.BLOCK = module._ScalarMLPs.BLOCK, block
    try:
        z = module._ScalarMLPs.apply(a, W1, b1, W2, b2)
        printed = (W2[..., None] * gelu(W1[..., None] * a[:, None] + b1[..., None])).sum(1) + b2[
            :, None
        ]
        found, expected = (
            torch.autograd.grad(y.cos().sum(), (a, W1, b1, W2, b2)) for y in (z, printed)
        )
    finally:
        module._ScalarMLPs.BLOCK = before
    for left, right in zip((z, *found), (printed, *expected), strict=True):
        torch.testing.assert_close(left, right, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_g1_importances_come_from_the_clean_run_and_only_mlp_trains_v(kind):
    model = scrambled(Perceptron, kind)
    batch = model.target.batch()
    clean = model.clean(batch)
    before = model.importances(clean).lower
    model.masked(
        batch, {name: Mask(torch.zeros(6, 5).double(), 0.0) for name in model.sites}, clean
    )
    z = model.importance_function(clean.inputs, clean.inner)
    expected = loop(kind, model.importance_function, clean.inputs, clean.inner)
    for name, g in model.importances(clean).lower.items():
        assert torch.equal(g, before[name])
        torch.testing.assert_close(z[name], expected[name], **EXACT)
        torch.testing.assert_close(g, z[name].clamp(0, 1))
    parameters = [model[name].V for name in model.sites]
    total = sum_of(v.sum() for v in z.values())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    assert [g is not None and bool(g.any()) for g in gradients] == [kind == "mlp"] * 2


@pytest.mark.parametrize("kind", [*KINDS, "transformer"])
def test_g1_embeddings_get_an_mlp_of_a_width_of_its_own(kind):
    model = decomposed(Tokens, importance=Importance(kind, hidden=3, embedding_hidden=5))
    function: Any = model.importance_function
    per_site: Any = function.parts[0] if isinstance(function, module.Together) else function
    first = per_site.networks[0]
    assert first.W1.shape == (9, 3 if kind == "mlp" else 5)
    alone = ComponentModel(nn.Sequential(nn.Embedding(7, 4)), {"*": 9}, importance=Importance(kind))
    assert isinstance(alone.importance_function, module.PerSite)
    assert isinstance(alone.importance_function.networks[0], type(first))


@pytest.mark.parametrize("kind", [*KINDS, "transformer"])
def test_g1_nothing_asks_for_what_it_does_not_read(kind):
    model = decomposed(Tokens, importance=Importance(kind))
    asked = set()

    class Watched(dict):
        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

    clean = model.clean(model.target.batch())
    model.importance_function(clean.inputs, Watched(clean.inner))
    assert asked == (set(model.sites) if kind == "mlp" else {"embed"})


@pytest.mark.parametrize("kind", KINDS)
def test_d7_importance_functions_start_with_the_stated_deviations(kind):
    torch.manual_seed(0)
    C, hidden, d_in = (
        (300, 40, 1) if kind == "mlp" else (50, 60, 80) if kind == "vector_mlp" else (200, 60, 80)
    )
    model = ComponentModel(
        nn.Sequential(nn.Linear(80, 3)), {"*": C}, importance=Importance(kind, hidden)
    )
    function: Any = model.importance_function
    network = function if kind == "global_mlp" else function.networks[0]
    if kind in ("shared_mlp", "global_mlp"):
        first = network.network[0]
        last = network.network[2]
        weights = (first.weight, last.weight)
        biases = (first.bias, last.bias)
    else:
        weights = (network.W1, network.W2)
        biases = (network.b1, network.b2)
    for values, sd in zip(weights, (math.sqrt(2 / d_in), math.sqrt(1 / hidden)), strict=True):
        assert stats.kstest(values.detach().flatten().numpy() / sd, "norm").pvalue > 0.01
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("kind", KINDS)
def test_importances_train_under_bf16_autocast(kind):
    model = scrambled(Perceptron, kind).float()
    batch = model.target.batch().float()
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run = LossContext.from_batch(model, batch)
            loss = Reconstruction("ci")(run) + sum(g.mean() for g in run.importances.upper.values())
        loss.backward()
        results.append(
            [
                loss.detach(),
                *(gradient_of(p).clone() for p in model.parameters() if p.requires_grad),
            ]
        )
    off = torch.cat([(a - b).flatten() for a, b in zip(*results, strict=True)]).norm()
    assert off < 0.05 * torch.cat([a.flatten() for a in results[0]]).norm()


def test_mlp_importances_keep_their_precision_under_autocast():
    model = scrambled(Perceptron, "mlp").float()
    clean = model.clean(model.target.batch().float())
    outside = model.importance_function(clean.inputs, clean.inner)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.importance_function(clean.inputs, clean.inner)
    assert all(torch.equal(inside[name], z) for name, z in outside.items())


# ---- sigmoids ------------------------------------------------------------------------------------


def passed(z, incoming):
    """What G2 lets through to z."""
    if z > 1:
        return 0.0
    if z > 0:
        return incoming
    return 0.01 * incoming if incoming < 0 else 0.0


@given(
    st.lists(
        st.tuples(reals | st.sampled_from([0.0, -0.0, 1.0]), reals | st.just(0.0)),
        min_size=1,
        max_size=20,
    )
)
def test_g2_lower_leaky_in_value_and_gradient_entry_by_entry(pairs):
    z = torch.tensor([z for z, _ in pairs], dtype=torch.float64, requires_grad=True)
    g = lower_leaky(z)
    assert g.tolist() == [min(max(value, 0.0), 1.0) for value, _ in pairs]
    g.backward(torch.tensor([incoming for _, incoming in pairs], dtype=torch.float64))
    assert gradient_of(z).tolist() == pytest.approx(
        [passed(*pair) for pair in pairs], rel=1e-12, abs=0
    )


def test_g2_a_component_at_zero_can_rise_but_is_never_pushed_down():
    z = torch.tensor([-0.5, -0.5, 0.0, 0.0], requires_grad=True)
    lower_leaky(z).backward(torch.tensor([-2.0, 2.0, -2.0, 2.0]))
    torch.testing.assert_close(z.grad, torch.tensor([-0.02, 0.0, -0.02, 0.0]))


HAND = {
    "upper": lambda z: 0.0 if z <= 0 else z if z <= 1 else 1 + 0.01 * (z - 1),
    "normal": lambda z: 1 / (1 + math.exp(-z)),
    "hard": lambda z: min(max(z, 0.0), 1.0),
    "leaky_both_sides": lambda z: 0.01 * z if z <= 0 else z if z <= 1 else 1 + 0.01 * (z - 1),
    "swish_hard": lambda z: z / (1 + math.exp(-10 * z)) - (z - 1) / (1 + math.exp(-10 * (z - 1))),
}


@pytest.mark.parametrize("name", HAND)
@given(z=reals.filter(lambda z: abs(z) > 1e-4 and abs(z - 1) > 1e-4))
def test_g3_and_g4_other_sigmoids_in_value_and_slope(name, z):
    roles = (upper_leaky,) if name == "upper" else SIGMOIDS[name]
    hand = HAND[name]
    step = 1e-5
    for sigmoid in roles:
        point = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        value = sigmoid(point)
        value.backward()
        assert value.item() == pytest.approx(hand(z), rel=1e-12, abs=1e-14)
        assert gradient_of(point).item() == pytest.approx(
            (hand(z + step) - hand(z - step)) / (2 * step), rel=1e-6, abs=1e-8
        )


def test_g2_and_g3_are_the_default_pair_and_the_kinks_lie_where_they_should():
    assert Importance().sigmoid == "leaky_hard"
    lower, upper = Importance()({"site": torch.tensor([-1.0, 0.0, 1.0, 3.0])})
    torch.testing.assert_close(lower["site"], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(upper["site"], torch.tensor([0.0, 0.0, 1.0, 1.02]))


# ---- sampling ------------------------------------------------------------------------------------


def test_g5_binomial_blurs_the_lower_importance_only_and_by_the_stated_noise():
    z = torch.full((20_000,), 0.5, dtype=torch.float64, requires_grad=True)
    blur = Importance(sampling="binomial")
    lower, upper = blur({"site": z}, torch.Generator().manual_seed(0))
    noise = (1.05 * 0.5 - lower["site"].detach()) / 0.05
    assert stats.kstest(noise.numpy(), "uniform").pvalue > 0.01
    assert torch.equal(upper["site"], z)
    lower["site"].sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 1.05))
    ends = blur(
        {"site": torch.tensor([-0.2, 0.0, 1.0, 1.2])}, torch.Generator().manual_seed(0)
    ).lower["site"]
    assert ends.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_g5_binomial_sources_are_fair_coins_and_the_deltas_stay_uniform():
    g = {"site": torch.zeros(20_000, 4)}
    s, delta = stochastic_sources(g, torch.Generator().manual_seed(0), binomial=True)["site"]
    assert set(s.unique().tolist()) == {0.0, 1.0}
    assert stats.binomtest(int(s.sum()), s.numel(), 0.5).pvalue > 0.01
    assert stats.kstest(delta.numpy(), "uniform").pvalue > 0.01
    run = LossContext.from_batch(
        scrambled(Perceptron, "mlp", sampling="binomial"), Perceptron().batch(), torch.Generator()
    )
    for name, mask in run.masks("stochastic", 0, 0.0).items():
        g = run.importances.lower[name]
        assert ((mask.components == g) | (mask.components == 1)).all()
        assert isinstance(mask.delta, torch.Tensor)
        assert ((mask.delta > 0) & (mask.delta < 1)).all()


def test_g5_only_training_blurs():
    blurred, plain = (scrambled(Perceptron, "mlp", sampling=s) for s in ("binomial", "continuous"))
    plain.load_state_dict(blurred.state_dict())
    batch = blurred.target.batch(50)
    generator = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    evaluated = LossContext.from_batch(blurred, batch, generator())
    trained = LossContext.from_batch(blurred, batch, generator(), sample=True)
    for name, g in LossContext.from_batch(
        plain, batch, generator(), sample=True
    ).importances.lower.items():
        assert torch.equal(evaluated.importances.lower[name], g)
        assert not torch.equal(trained.importances.lower[name], g)
        assert torch.equal(trained.importances.upper[name], evaluated.importances.upper[name])
    outputs = [
        dict(masked_outputs(model, batch, run.clean, run.importances.lower, generator(), 0.1))
        for model, run in ((blurred, evaluated), (plain, LossContext.from_batch(plain, batch)))
    ]
    assert all(torch.equal(outputs[0][source], outputs[1][source]) for source in outputs[0])
