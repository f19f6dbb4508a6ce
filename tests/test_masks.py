"""Masks (law M1 and the tables of sources and routes): formulas, exact statistics, and an adversary
that climbs.
"""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.networks import Branches, Perceptron, decomposed

from spd_lightning.decomposition.adversaries import Adversary, pgd_sources
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.divergences import mse
from spd_lightning.decomposition.masks import (
    Routes,
    Sources,
    draw_routes,
    fixed_masks,
    masks_from_sources,
    stochastic_sources,
    uniform,
)
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction, routed

unit = st.floats(0, 1, width=32)
SCOPES = ("per_position", "per_batch")
INITS = ("random", "ones", "zeros")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def importances(*counts, positions=(4, 3), seed=0):
    """Random importances of some sites, with exact zeros and ones among them."""
    drawn = [
        torch.rand(*positions, C, generator=generator(seed + C)).double() * 1.6 - 0.3
        for C in counts
    ]
    return {f"site{k}": g.clamp(0, 1) for k, g in enumerate(drawn)}


def components(mask: Mask) -> torch.Tensor:
    """The entries of a mask that is not all ones."""
    assert mask.components is not None
    return mask.components


def where_decomposed(route: Routes) -> list[torch.Tensor]:
    """The positions of each site, for a route that does not have all of them."""
    places = [where for where in route.values() if where is not None]
    assert len(places) == len(route)
    return places


# ---- sources -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=8), unit)
def test_a_mask_lies_between_importance_and_one_as_the_source_says(pairs, s_delta):
    g, s = torch.tensor(pairs, dtype=torch.float64).T
    mask = masks_from_sources({"site": g}, {"site": (s, torch.tensor(s_delta))})["site"]
    expected = [importance + (1 - importance) * source for importance, source in pairs]
    torch.testing.assert_close(components(mask), torch.tensor(expected, dtype=torch.float64))
    assert (components(mask) >= g - 1e-12).all()
    assert (components(mask) <= 1 + 1e-12).all()
    assert mask.route is None


def test_g6_the_deltas_mask_is_its_source_whatever_the_importances():
    for fill in (0.0, 0.5, 1.0):
        s_delta = torch.rand(4, 3)
        g = {"site": torch.full((4, 3, 5), fill)}
        sources = {"site": (torch.rand(4, 3, 5), s_delta)}
        delta = masks_from_sources(g, sources)["site"].delta
        assert isinstance(delta, torch.Tensor)
        assert torch.equal(delta, s_delta)
        assert masks_from_sources(g, sources, delta=False)["site"].delta == 0.0


def test_every_fixed_source_is_its_row_of_the_table():
    g = importances(5, 2)
    drawn = {
        kind: fixed_masks(kind, g, generator(), 0.4)
        for kind in ("ones", "ci", "zeros", "random", "rounded")
    }
    for name, value in g.items():
        assert drawn["ones"][name] == Mask(None, 0.0)
        assert torch.equal(components(drawn["ci"][name]), value)
        assert not components(drawn["zeros"][name]).any()
        assert components(drawn["rounded"][name]).flatten().tolist() == [
            float(v > 0.4) for v in value.flatten()
        ]
        assert all(drawn[kind][name].delta == 0.0 for kind in ("ci", "zeros", "random", "rounded"))
    with pytest.raises(ValueError, match="'pgd' is not a fixed one"):
        fixed_masks("pgd", g, None, 0.0)


def test_random_masks_and_stochastic_sources_are_uniform_and_fresh_everywhere():
    g = {"a": torch.full((1000, 3, 2), 0.7), "b": torch.zeros(1000, 3, 4)}
    sources = stochastic_sources(g, generator())
    masks = fixed_masks("random", g, generator(1), 0.0)
    samples = [s for pair in sources.values() for s in pair] + [
        components(mask) for mask in masks.values()
    ]
    assert [s.shape for s in samples[:4]] == [(1000, 3, 2), (1000, 3), (1000, 3, 4), (1000, 3)]
    for sample in samples:
        assert stats.kstest(sample.flatten().numpy(), "uniform").pvalue > 0.01
        assert sample.unique().numel() > 0.999 * sample.numel()
    columns = torch.cat([s.reshape(1000, -1) for s in samples[:4]], dim=1)
    correlations = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlations.abs().max() < 0.15  # five standard deviations of 1/√1000


# ---- routes --------------------------------------------------------------------------------------


def test_route_all_is_one_pass_and_layerwise_one_a_site():
    g = importances(2, 3, 4)
    assert list(draw_routes("all", g, None)) == [dict.fromkeys(g)]
    assert list(draw_routes("layerwise", g, None)) == [{name: None} for name in g]


@pytest.mark.parametrize("L", [1, 2, 3, 5])
def test_m1_subset_routes_have_uniform_size_and_the_stated_marginal(L):
    g = importances(*range(1, L + 1), positions=(4000, 5))
    (route,) = draw_routes("subset", g, generator())
    where = torch.stack(where_decomposed(route))
    assert where.shape == (L, 4000, 5)
    sizes = torch.bincount(where.sum(0).flatten(), minlength=L + 1)
    assert sizes[0] == 0
    assert L == 1 or stats.chisquare(sizes[1:].numpy()).pvalue > 0.01
    for site in where:
        assert stats.binomtest(int(site.sum()), site.numel(), (L + 1) / (2 * L)).pvalue > 0.001


def test_m1_all_subsets_of_one_size_are_alike_and_positions_independent():
    (route,) = draw_routes("subset", importances(1, 2, 3, 4, positions=(20_000, 2)), generator(1))
    where = torch.stack(where_decomposed(route), dim=-1)
    for k, subsets in ((1, 4), (2, 6), (3, 4)):
        seen = Counter(
            tuple(row)
            for row in where.flatten(0, 1)[where.flatten(0, 1).sum(1) == k].int().tolist()
        )
        assert len(seen) == subsets
        assert stats.chisquare(list(seen.values())).pvalue > 0.01
    first, second = where.sum(-1).T.double()
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.035


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_static_routes_draw_each_site_and_position_on_its_own(p):
    (route,) = draw_routes("static", importances(2, 3, positions=(5000, 2)), generator(), p)
    for where in where_decomposed(route):
        assert stats.binomtest(int(where.sum()), where.numel(), p).pvalue > 0.01
    columns = torch.cat([where.double() for where in where_decomposed(route)], dim=1)
    if 0 < p < 1:
        assert (torch.corrcoef(columns.T) - torch.eye(4)).abs().max() < 0.07


def test_a_routed_mask_acts_at_its_positions_only():
    model = decomposed(Branches)
    batch = model.target.batch()
    clean = model.clean(batch)
    zeros = {name: Mask(torch.zeros_like(a), 0.0) for name, a in clean.inner.items()}
    where = torch.zeros(3, 4, dtype=torch.bool)
    where[1, 2] = True
    output = model.masked(batch, routed(zeros, {"down": where}), clean)
    changed = (output - clean.output).abs().amax(-1) > 1e-9
    assert torch.equal(changed, where)
    assert torch.equal(
        model.masked(batch, routed(zeros, {"down": ~where}), clean)[1, 2], clean.output[1, 2]
    )


@pytest.mark.parametrize("route", ["all", "layerwise", "subset", "static"])
@pytest.mark.parametrize("source", ["stochastic", "random", "pgd"])
def test_draws_are_a_function_of_the_generator(source, route):
    model = decomposed(Branches)
    batch = model.target.batch()
    term = Reconstruction(source, route, adversary=Adversary(2))
    values = [
        term(LossContext.from_batch(model, batch, generator(seed))).item() for seed in (0, 0, 1)
    ]
    assert values[0] == values[1]
    assert values[0] != values[2]


# ---- the adversary -------------------------------------------------------------------------------


def ascend(g, loss, adversary, start):
    """The rule of section M on one vector a site: component sources, then the delta's."""
    s = {name: vector.clone() for name, vector in start.items()}
    for _ in range(adversary.steps):
        for vector in s.values():
            vector.requires_grad_()
        value = loss({n: (v[..., :-1], v[..., -1].expand(g[n].shape[:-1])) for n, v in s.items()})
        value.backward()
        with torch.no_grad():
            s = {n: (v + adversary.step_size * v.grad.sign()).clamp(0, 1) for n, v in s.items()}
    return s


def hilly(sources: Sources) -> torch.Tensor:
    """A number that sources can raise, with peaks inside and outside [0, 1], and one entry that
    does not matter.
    """
    total = torch.tensor(0.0)
    for k, (s, delta) in enumerate(sources.values()):
        peaks = torch.linspace(-0.4 - k, 1.3, s[..., 1:].numel()).double().reshape(s[..., 1:].shape)
        total = total - (s[..., 1:] - peaks).square().sum() + (delta * (k - 0.5)).sum()
    return total


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("init", INITS)
def test_pgd_is_its_rule(scope, init):
    g = importances(3, 5)
    adversary = Adversary(7, 0.13, init, scope)
    found = pgd_sources(adversary, g, hilly, generator())
    start = {}
    draws = generator()
    for name, value in g.items():
        shape = (
            (*value.shape[:-1], value.shape[-1] + 1)
            if scope == "per_position"
            else (value.shape[-1] + 1,)
        )
        drawn = (
            torch.rand(shape, generator=draws, dtype=torch.float64) if init == "random" else None
        )
        start[name] = {
            "ones": torch.ones(shape).double(),
            "zeros": torch.zeros(shape).double(),
        }.get(init, drawn)
    for name, vector in ascend(g, hilly, adversary, start).items():
        s, delta = found[name]
        torch.testing.assert_close(s, vector[..., :-1])
        torch.testing.assert_close(delta, vector[..., -1].expand(g[name].shape[:-1]))
        assert 0 <= min(s.min(), delta.min()) <= max(s.max(), delta.max()) <= 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("init", INITS)
def test_pgd_that_goes_on_is_pgd_that_did_not_stop(scope, init):
    g = importances(3, 5)
    half = pgd_sources(Adversary(3, 0.2, init, scope), g, hilly, generator())
    resumed = pgd_sources(Adversary(4, 0.2, init, scope), g, hilly, None, half)
    for name, (s, delta) in pgd_sources(
        Adversary(7, 0.2, init, scope), g, hilly, generator()
    ).items():
        assert torch.equal(resumed[name][0], s)
        assert torch.equal(resumed[name][1], delta)
    untouched = pgd_sources(Adversary(0, 0.2, init, scope), g, hilly, None, half)
    assert all(torch.equal(untouched[name][0], half[name][0]) for name in g)


@pytest.mark.parametrize("network", [Perceptron, Branches])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("init", INITS)
def test_pgd_hurts_more_the_longer_it_climbs(network, scope, init):
    model = decomposed(network)
    batch = model.target.batch(4)
    with torch.no_grad():
        run = LossContext.from_batch(model, batch)
        g = {name: value * 0.5 for name, value in run.importances.lower.items()}

        def loss(sources):
            masks = masks_from_sources(
                g, sources, delta=init != "ones"
            )  # with it, all ones is the target: no slope
            return mse(model.masked(batch, masks, run.clean, detach=True), run.clean.output)

        rungs = [
            loss(pgd_sources(Adversary(n, 0.05, init, scope), g, loss, generator()))
            for n in (0, 4, 40)
        ]
        draws = [loss(stochastic_sources(g, generator(seed))) for seed in range(30)]
    assert rungs[0] < rungs[1] < rungs[2]
    if scope == "per_position":
        assert rungs[2] > max(draws)


@pytest.mark.parametrize("route", ["all", "layerwise", "subset", "static"])
def test_pgd_climbs_one_route_and_leaves_parameters_alone(route, monkeypatch):
    model = decomposed(Perceptron)
    run = LossContext.from_batch(model, model.target.batch(), generator())
    parameters = [p for p in model.parameters() if p.requires_grad]
    calls = []
    own = type(model).masked

    def watched(self, batch, masks, *rest, **named):
        output = own(self, batch, masks, *rest, **named)
        reached = torch.autograd.grad(
            output.sum(), parameters, retain_graph=True, allow_unused=True
        )
        calls.append(
            (
                {name: mask.route for name, mask in masks.items()},
                any(g is not None for g in reached),
            )
        )
        return output

    monkeypatch.setattr(type(model), "masked", watched)
    loss = Reconstruction("pgd", route, adversary=Adversary(3, scope="per_position"))(run)
    assert all(p.grad is None for p in parameters)
    passes = 2 if route == "layerwise" else 1
    assert len(calls) == 4 * passes
    assert [trained for _, trained in calls] == [False] * 3 * passes + [True] * passes
    for k, (routes, _) in enumerate(calls):
        held = calls[k % passes][0]
        assert routes.keys() == held.keys()
        assert all(
            routes[n] is None if held[n] is None else torch.equal(routes[n], held[n]) for n in held
        )
    assert any(g.any() for g in torch.autograd.grad(loss, parameters))


def test_pgd_sources_are_constants_of_the_training_gradient():
    model = decomposed(Perceptron)
    adversary = Adversary(3, init="zeros")
    run = LossContext.from_batch(model, model.target.batch(), generator())
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(Reconstruction("pgd", adversary=adversary)(run), parameters)
    g = run.importances.lower
    fixed = {name: value.detach() for name, value in run.importances.lower.items()}

    def loss(sources, lower=fixed):
        return (
            (model.masked(run.batch, masks_from_sources(lower, sources)) - run.clean.output)
            .square()
            .mean()
        )

    start = {name: torch.zeros(value.shape[-1] + 1).double() for name, value in g.items()}
    end = ascend(g, loss, adversary, start)
    sources = {n: (v[:-1].detach(), v[-1].detach().expand(g[n].shape[:-1])) for n, v in end.items()}
    fresh = LossContext.from_batch(model, run.batch)
    for a, b in zip(
        found, torch.autograd.grad(loss(sources, fresh.importances.lower), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (400, 333)])
def test_draws_in_half_precision(shape):
    """All multiples of 2⁻⁸ below 1, each as often as the others, the same again for the same
    seed.
    """
    like = torch.zeros(1, dtype=torch.bfloat16)
    drawn = [uniform(like, shape, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0].shape == shape
    assert drawn[0].dtype == torch.bfloat16
    assert torch.equal(drawn[0], drawn[1])
    if drawn[0].numel() > 10_000:
        assert not torch.equal(drawn[0], drawn[2])
        counts = torch.bincount((drawn[0].float() * 256).long().flatten(), minlength=256)
        expected = drawn[0].numel() / 256
        assert len(counts) == 256
        assert ((counts - expected).abs() < 6 * expected**0.5).all()
        neighbors = torch.corrcoef(torch.stack([drawn[0][0], drawn[0][1]]).float())[0, 1]
        assert abs(neighbors) < 6 / 333**0.5
