"""Sites, components and masked runs (laws D1–D9) against the laws written out, and against runs
without a record.
"""

import copy
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.networks import (
    NETWORKS,
    Branches,
    InPlace,
    Perceptron,
    Tokens,
    decomposed,
    naive,
    printed_weight,
)
from support.tensors import gradient_of, sum_of
from torch import nn

from spd_lightning.decomposition.components import (
    Components,
    Mask,
    available,
    find_sites,
    masked_output,
)
from spd_lightning.decomposition.losses import Losses
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext
from spd_lightning.errors import BadInput
from spd_lightning.targets.toy import TMS, InductionHead

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
KINDS = ("none", "all on", "free", "free, no delta", "routed", "routed, no delta")
some_kinds = st.lists(st.sampled_from(KINDS), min_size=7, max_size=7)


def random_masks(model, batch, kinds):
    """Masks of the sites, each of its own kind; drawn entries are leaves of the graph."""
    masks = {}
    for (name, a), kind in zip(model.clean(batch).inner.items(), kinds, strict=False):
        m = torch.rand(a.shape).double().requires_grad_()
        delta = torch.rand(a.shape[:-1]).double().requires_grad_()
        route = torch.rand(a.shape[:-1]) < 0.5
        match kind:
            case "all on":
                masks[name] = Mask(None, 1.0)
            case "free" | "free, no delta":
                masks[name] = Mask(m, delta if kind == "free" else 0.0)
            case "routed" | "routed, no delta":
                masks[name] = Mask(m, delta if kind == "routed" else 0.0, route)
    return masks


def gradients(output, model, masks):
    """The gradients of a number made of an output, with respect to V, U, m and m_Δ."""
    wanted = [*model.components.parameters()]
    wanted += [t for mask in masks.values() for t in mask[:2] if isinstance(t, torch.Tensor)]
    weights = torch.linspace(-1, 2, output.numel()).double().reshape(output.shape)
    number = (weights * output).sum() + 0 * sum(t.sum() for t in wanted)
    return torch.autograd.grad(number, wanted, retain_graph=True)


# ---- components ----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [Perceptron, Tokens, Branches])
def test_d1_components_and_delta_add_up_to_the_weight(network):
    model = decomposed(network)
    for name in model.sites:
        W, _ = printed_weight(model.target, name)
        V = model[name].V
        U = model[name].U
        rows = [sum_of(U[c, o] * V[:, c] for c in range(len(U))) for o in range(len(W))]
        torch.testing.assert_close(torch.stack(rows) + model.delta_weight(name), W, **EXACT)
        assert torch.equal(model.sites[name].weight, W)
        assert (model.sites[name].d_out, model.sites[name].d_in) == W.shape


@pytest.mark.parametrize("network", [Perceptron, Tokens, Branches])
def test_d2_inner_activations_read_the_input_along_v(network):
    model = decomposed(network)
    clean = model.clean(model.target.batch(2))
    for name, a in clean.inner.items():
        V = model[name].V.tolist()
        for *where, c in torch.cartesian_prod(*map(torch.arange, a.shape)).tolist():
            x = clean.inputs[name][tuple(where)].tolist()
            expected = (
                V[x][c]
                if isinstance(x, int)
                else sum(x_i * V_i[c] for x_i, V_i in zip(x, V, strict=True))
            )
            assert a[(*where, c)].item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("delta", ["drawn", 0, 0.0, 1.0, 0.3])
@pytest.mark.parametrize("components", ["drawn", "ones"])
@pytest.mark.parametrize("routed", [True, False])
def test_d3_and_d4_both_forms_agree_in_value_and_every_gradient(bias, delta, components, routed):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4).double()
    W = torch.randn(5, 4).double()
    b = torch.randn(5).double() * bias
    V, U, m, m_delta = (
        torch.randn(shape).double() for shape in ((4, 6), (6, 5), (2, 3, 6), (2, 3))
    )
    route = torch.rand(2, 3) < 0.5 if routed else None
    leaves = [t.requires_grad_() for t in (x, V, U, m, m_delta)]
    gate = m_delta if delta == "drawn" else delta
    mask = Mask(m if components == "drawn" else None, gate, route)
    cheap = masked_output(x @ W.T + b, b if bias else None, x @ V, U, mask)

    ones = torch.ones(2, 3).double()
    full = m if components == "drawn" else torch.ones_like(m)
    gate = ones * gate
    r = ones if route is None else route
    y = (full * (x @ V)) @ U + gate[..., None] * (x @ (W - (V @ U).T).T) + b
    printed = r[..., None] * y + (1 - r.double())[..., None] * (x @ W.T + b)
    torch.testing.assert_close(cheap, printed, **EXACT)
    for a, expected in zip(
        *(
            torch.autograd.grad(y.cos().sum() + 0 * sum(t.sum() for t in leaves), leaves)
            for y in (cheap, printed)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, expected, **EXACT)


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=12)
@given(kinds=some_kinds, seed=st.integers(0, 99))
def test_d3_and_d4_hold_in_whole_networks_of_every_kind_of_site(network, kinds, seed):
    model = decomposed(network, seed)
    batch = model.target.batch()
    masks = random_masks(model, batch, kinds)
    found = model.masked(batch, masks)
    printed = naive(model, batch, masks)
    torch.testing.assert_close(found, printed, **EXACT)
    for a, b in zip(gradients(found, model, masks), gradients(printed, model, masks), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("network", NETWORKS)
def test_d5_the_unmasked_model_is_the_target(network):
    model = decomposed(network)
    batch = model.target.batch()
    shapes = {name: a.shape for name, a in model.clean(batch).inner.items()}
    for masks in (
        dict.fromkeys(shapes, Mask(None, 1.0)),
        {
            name: Mask(torch.ones(s).double(), torch.ones(s[:-1]).double())
            for name, s in shapes.items()
        },
    ):
        torch.testing.assert_close(model.masked(batch, masks), model.target(batch), **EXACT)
        torch.testing.assert_close(
            model.masked(batch, masks, model.clean(batch)), model.target(batch), **EXACT
        )
    single = model.float()
    small = batch.float() if batch.is_floating_point() else batch
    masks = {name: Mask(torch.ones(s), torch.ones(s[:-1])) for name, s in shapes.items()}
    expected = single.target(small)
    off = (single.masked(small, masks) - expected).abs().max() / expected.abs().max()
    assert off < 1e-5


# ---- the frozen target ---------------------------------------------------------------------------


def test_d6_the_target_never_changes_whatever_is_trained():
    class Dropping(Perceptron):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.second(self.drop(self.norm(torch.tanh(self.first(x)))))

    model = decomposed(Dropping)
    model.train()
    before = copy.deepcopy(model.target.state_dict())
    assert not model.target.drop.training
    assert not model.target.norm.training
    assert model.importance_function.training
    assert not any(p.requires_grad for p in model.target.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    start = copy.deepcopy(model.components.state_dict())
    for step in range(3):
        optimizer.zero_grad()
        run = LossContext.from_batch(
            model, model.target.batch(), torch.Generator().manual_seed(step)
        )
        Losses()(run)[0].backward()
        optimizer.step()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(
        torch.equal(before[name], value) for name, value in model.target.state_dict().items()
    )
    assert not any(
        torch.equal(start[name], value) for name, value in model.components.state_dict().items()
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_d6_a_run_leaves_no_trace_on_the_target_even_where_it_fails(network):
    model = decomposed(network)
    batch = model.target.batch()
    expected = model.target(batch)
    model.masked(batch, random_masks(model, batch, KINDS[1:] * 2), model.clean(batch))
    with suppress(RuntimeError, IndexError):
        model.masked(batch[..., :1] + 100, {})
    with (
        pytest.raises(ZeroDivisionError),
        model.replaced(lambda site, x, own: own(x), lambda module, own: own),
    ):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.target.modules())
    assert torch.equal(model.target(batch), expected)


def test_d7_initial_values_are_normal_with_the_stated_deviations():
    torch.manual_seed(0)
    components = Components(300, 200, 120)
    for values, sd in ((components.V, 300**-0.5), (components.U, 120**-0.5)):
        assert stats.kstest(values.detach().flatten().numpy() / sd, "norm").pvalue > 0.01


# ---- identity sites and ties ---------------------------------------------------------------------


def test_d8_an_identity_site_decomposes_what_its_module_reads():
    model = decomposed(Tokens)
    site = model.sites["readout.pre_identity"]
    assert (site.kind, site.d_in, site.d_out, site.bias) == ("identity", 5, 5, None)
    assert torch.equal(site.weight, torch.eye(5).double())
    assert torch.equal(
        model.clean(tokens := model.target.batch()).inputs[site.name],
        model.clean(tokens).inputs["readout"],
    )
    assert list(model.sites) == ["embed", "conv", "readout.pre_identity", "readout"]


@pytest.mark.parametrize("masked", ["linear1", "linear2", "both"])
def test_d9_tied_sites_have_one_parameter_and_the_sum_of_both_gradients(masked):
    torch.manual_seed(0)
    target = TMS(5, 3)
    x = torch.rand(8, 5).double()
    model = ComponentModel(target, {"linear*": 4}, {"linear2": "linear1"}).double()
    free = ComponentModel(target, {"linear*": 4}).double()
    V = model["linear1"].V
    U = model["linear1"].U
    assert {id(p) for p in model.components.parameters()} == {id(V), id(U)}
    assert len(list(model.components.parameters())) == 2
    assert sorted(model.components.state_dict()) == ["linear1.U", "linear1.V"]
    with torch.no_grad():
        for name, read, write in (("linear1", V, U), ("linear2", U.T, V.T)):
            free[name].V.copy_(read)
            free[name].U.copy_(write)
    names = ["linear1", "linear2"] if masked == "both" else [masked]
    masks = {name: Mask(torch.rand(8, 4).double(), torch.rand(8).double()) for name in names}
    outputs = [m.masked(x, masks) for m in (model, free)]
    torch.testing.assert_close(*outputs, **EXACT)
    for output in outputs:
        output.square().sum().backward()
    other = {name: free[name] for name in names}
    grad_V = sum(
        gradient_of(c.V) if n == "linear1" else gradient_of(c.U).T for n, c in other.items()
    )
    grad_U = sum(
        gradient_of(c.U) if n == "linear1" else gradient_of(c.V).T for n, c in other.items()
    )
    torch.testing.assert_close(V.grad, grad_V, **EXACT)
    torch.testing.assert_close(U.grad, grad_U, **EXACT)


def test_d9_the_optimizer_updates_tied_components_once():
    torch.manual_seed(0)
    model = ComponentModel(TMS(5, 3), {"linear*": 4}, {"linear2": "linear1"}).double()
    before = model["linear1"].V.detach().clone()
    optimizer = torch.optim.SGD(model.components.parameters(), lr=0.1)
    Losses().faithfulness(model).backward()
    optimizer.step()
    V = model["linear1"].V
    torch.testing.assert_close(V, before - 0.1 * gradient_of(V), **EXACT)
    torch.testing.assert_close(
        model.delta_weight("linear2"), model.delta_weight("linear1").T, **EXACT
    )


def test_d9_ties_survive_copies():
    twin = copy.deepcopy(ComponentModel(TMS(5, 3), {"linear*": 4}, {"linear2": "linear1"}))
    nn.init.zeros_(twin["linear1"].V)
    assert not twin["linear2"].U.any()


def test_d9_an_embedding_can_be_tied_to_the_map_that_reads_it_out():
    class Tied(InductionHead):
        def __init__(self):
            super().__init__(7, 4, 5, 1)
            self.unembed.weight = self.embed.weight

    model = ComponentModel(Tied(), {"embed": 6, "unembed": 6}, {"unembed": "embed"})
    assert torch.equal(model["unembed"].V, model["embed"].U.T)


@pytest.mark.parametrize(
    ("tied", "told"),
    [
        ({"linear2": "linear3"}, "'linear3', which is not a site; did you mean 'linear"),
        ({"linear3": "linear1"}, "'linear3' is not a site"),
        ({"linear2": "hidden.0"}, "not the transpose of 'hidden.0'"),
        ({"linear1": "linear2", "linear2": "linear1"}, "tied itself"),
        ({"linear1": "linear1"}, "tied itself"),
    ],
)
def test_d9_ties_that_do_not_hold_are_refused(tied, told):
    with pytest.raises(BadInput, match=told):
        ComponentModel(TMS(5, 3, 1), {"*": 4}, tied)


def test_d9_ties_of_unlike_counts_or_weights_are_refused():
    with pytest.raises(BadInput, match="not the transpose"):
        ComponentModel(TMS(5, 3), {"linear1": 4, "linear2": 5}, {"linear2": "linear1"})
    with pytest.raises(BadInput, match="not the transpose"):
        ComponentModel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"*": 4}, {"1": "0"})


# ---- which maps are sites ------------------------------------------------------------------------


def test_sites_are_found_in_the_models_order_with_their_counts():
    found = find_sites(Branches(), {"down": 3, "[qkvo]": 2, "up.pre_identity": 4})
    assert {name: C for name, (_, C) in found.items()} == dict.fromkeys("qkvo", 2) | {
        "up.pre_identity": 4,
        "down": 3,
    }
    assert list(found) == ["q", "k", "v", "o", "up.pre_identity", "down"]
    assert {name: site.kind for name, site in available(Tokens()).items()} == {
        "embed": "embedding",
        "conv.pre_identity": "identity",
        "conv": "conv1d",
        "readout.pre_identity": "identity",
        "readout": "linear",
    }


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "*",
                "q",
                "[qk]",
                "?",
                "*n",
                "up",
                "o*",
                "*.pre_identity",
                "up.pre_identity",
                "nothing",
                "Q",
            ]
        ),
        st.integers(-1, 5),
        min_size=1,
        max_size=4,
    )
)
def test_a_set_of_patterns_is_used_as_it_reads_or_refused(patterns):
    maps = ["q", "k", "v", "o", "up", "down"]
    identities = [f"{name}.pre_identity" for name in maps]
    claims = {
        pattern: [
            n
            for n in (identities if pattern.endswith(".pre_identity") else maps)
            if fnmatchcase(n, pattern)
        ]
        for pattern in patterns
    }
    names = [name for claimed in claims.values() for name in claimed]
    if min(patterns.values()) < 1 or not all(claims.values()) or len(set(names)) < len(names):
        with pytest.raises(BadInput, match=r"^sites: .*$"):
            find_sites(Branches(), patterns)
    else:
        expected = {
            name: patterns[pattern] for pattern, claimed in claims.items() for name in claimed
        }
        assert {name: C for name, (_, C) in find_sites(Branches(), patterns).items()} == expected


def test_refusals_name_the_modules_to_choose_from():
    with pytest.raises(
        BadInput, match="'embd' matches no module of the target; did you mean 'embed'"
    ):
        find_sites(Tokens(), {"embd": 3})
    with pytest.raises(BadInput, match=r"'conv' is matched by both 'c\*' and '\*v'"):
        find_sites(Tokens(), {"c*": 3, "*v": 3})
    with pytest.raises(BadInput, match="'conv: 0' must have at least one component"):
        find_sites(Tokens(), {"conv": 0})


def test_a_site_used_twice_or_never_is_refused():
    class Twice(Perceptron):
        def forward(self, x):
            return self.second(self.first(self.first(x)))

    class Never(Perceptron):
        def forward(self, x):
            return self.first(x)

    with pytest.raises(BadInput, match="uses 'first' twice"):
        ComponentModel(Twice(3, 3), {"*": 2}).clean(torch.rand(2, 3))
    with pytest.raises(BadInput, match="does not use 'second'"):
        ComponentModel(Never(3, 3), {"*": 2}).clean(torch.rand(2, 3))


# ---- replaying the clean run ---------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=12)
@given(kinds=some_kinds, more=some_kinds, seed=st.integers(0, 99))
def test_replaying_the_clean_runs_record_changes_nothing(network, kinds, more, seed):
    model = decomposed(network, seed)
    batch = model.target.batch()
    shared = random_masks(model, batch, kinds)
    passes = [
        {},
        shared,
        *({name: mask} for name, mask in shared.items()),
        random_masks(model, batch, more),
        shared,
    ]
    clean = model.clean(batch)
    for masks in passes:
        replayed = model.masked(batch, masks, clean)
        fresh = model.masked(batch, masks)
        assert torch.equal(replayed, fresh)
        for a, b in zip(
            gradients(replayed, model, masks), gradients(fresh, model, masks), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_replaying_in_inference_mode_changes_nothing(network):
    model = decomposed(network)
    batch = model.target.batch()
    masks = random_masks(model, batch, KINDS[2:] * 2)
    expected = model.masked(batch, masks)
    with torch.inference_mode():
        assert torch.equal(model.masked(batch.clone(), masks, model.clean(batch.clone())), expected)


@pytest.mark.parametrize("network", [Perceptron, Tokens, Branches])
def test_a_masked_run_repeats_nothing_before_the_first_masked_site(network, monkeypatch):
    model = decomposed(network)
    batch = model.target.batch()
    last = list(model.clean(batch).inputs)[-1]
    masks = {last: random_masks(model, batch, ["free"] * 7)[last]}
    clean = model.clean(batch)
    used = []
    for name, module in model.target.named_children():
        monkeypatch.setattr(
            module, "forward", lambda *x, f=module.forward, n=name: used.append(n) or f(*x)
        )
    model.masked(batch, masks, clean)
    again = (
        ["norm", "act", "mix", "act"] if network is Branches else []
    )  # what is used twice, and tuples
    assert set(used) <= set(again)
    used.clear()
    model.masked(batch, masks)
    assert used


def test_detached_runs_give_gradients_to_masks_alone():
    model = decomposed(Branches)
    batch = model.target.batch()
    clean = model.clean(batch)
    masks = random_masks(model, batch, ["free"] * 7)
    attached, detached = (model.masked(batch, masks, clean, detach=d) for d in (False, True))
    assert torch.equal(attached, detached)
    leaves = [t for mask in masks.values() for t in mask[:2]]
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), leaves) for y in (attached, detached)), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)
    again = model.masked(batch, masks, clean, detach=True).square().sum()
    components = list(model.components.parameters())
    assert all(g is None for g in torch.autograd.grad(again, components, allow_unused=True))


@pytest.mark.parametrize("network", [Perceptron, Branches, InPlace])
def test_seen_are_the_sites_inputs_inside_the_masked_run(network):
    model = decomposed(network)
    batch = model.target.batch()
    masks = random_masks(model, batch, ["free"] * 7)
    seen = {}
    expected = {}
    model.masked(batch, masks, model.clean(batch), seen=seen)
    naive(model, batch, masks, seen=expected)
    assert seen.keys() == set(model.sites) == expected.keys()
    for name, x in seen.items():
        torch.testing.assert_close(x, expected[name], **EXACT)


def test_a_target_that_changes_tensors_is_run_twice_for_its_first_batch_only(monkeypatch):
    model = decomposed(InPlace)
    batch = model.target.batch()
    runs = []
    forward = model.target.forward

    def counted(x):
        runs.append(x)
        return forward(x)

    monkeypatch.setattr(model.target, "forward", counted)
    first = model.clean(batch)
    assert len(runs) == 2
    second = model.clean(batch)
    assert len(runs) == 3
    expected = {}
    naive(model, batch, {}, seen=expected)
    for name, x in expected.items():
        assert torch.equal(first.inputs[name], second.inputs[name])
        assert torch.equal(first.outputs[name], second.outputs[name])
        torch.testing.assert_close(second.inputs[name], x, **EXACT)
