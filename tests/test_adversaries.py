"""The persistent adversary, against torch's own Adam on the same loss; mixed passes; hidden error
(L6).
"""

from typing import Any

import pytest
import torch
from support.networks import Branches, Perceptron, Tokens, decomposed, naive
from support.tensors import gradient_of, sum_of

from spd_lightning.decomposition.adversaries import Persistent, PersistentAdversary
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.divergences import kl
from spd_lightning.decomposition.losses import Losses
from spd_lightning.decomposition.masks import masks_from_sources
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction, hidden_error
from spd_lightning.errors import BadInput

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fitted(network, loss, seed=0):
    """A model, a run of it, and the adversary of its one reconstruction."""
    model = decomposed(network, seed)
    run = LossContext.from_batch(model, model.target.batch(4), generator())
    adversary = PersistentAdversary(loss.persistent, run.importances.lower, generator(3))
    run.adversaries = {"it": adversary}
    run.progress = 0.5
    return model, run, adversary


@pytest.mark.parametrize("network", [Perceptron, Tokens, Branches])
@pytest.mark.parametrize("particles", [None, 1, 3])
def test_three_climbs_a_step_are_those_of_torchs_adam(network, particles):
    """Two with all else at rest, one from the training loss's own gradient, whatever its
    coefficient.
    """
    loss = Reconstruction(
        "persistent_pgd",
        divergence="kl",
        coeff=7.0,
        persistent=Persistent(0.3, particles=particles),
    )
    model, run, adversary = fitted(network, loss)
    g = {name: value.detach() for name, value in run.importances.lower.items()}
    plain = {n: v.clone().requires_grad_() for n, v in adversary.vectors.items()}
    optimizer = torch.optim.Adam(plain.values(), lr=0.3, betas=(0.5, 0.99), maximize=True)

    def damage():
        masks = {}
        for n, v in plain.items():
            rows = [v[b % particles] if particles else v[b] for b in range(len(g[n]))]
            s = torch.stack([row.expand(*g[n].shape[1:-1], -1) for row in rows])
            masks[n] = Mask(g[n] + (1 - g[n]) * s[..., :-1], s[..., -1])
        return kl(naive(model, run.batch, masks), run.clean.output)

    for _ in range(2):
        values = []
        for _ in range(3):
            optimizer.zero_grad()
            values.append(damage())
            values[-1].backward()
            optimizer.step()
            with torch.no_grad():
                for v in plain.values():
                    v.clamp_(0, 1)
        found = loss(run, "it")
        (loss.coeff * found).backward(retain_graph=True)
        adversary.finish(run.progress)
        torch.testing.assert_close(found, values[-1], **EXACT)
        for n, v in plain.items():
            torch.testing.assert_close(adversary.vectors[n], v.detach(), **EXACT)
            assert ((v >= 0) & (v <= 1)).all()


def test_it_climbs_and_warms_up():
    loss = Reconstruction("persistent_pgd", persistent=Persistent(0.1, warmup=0.2))
    _, run, adversary = fitted(Perceptron, loss)
    start = {n: v.clone() for n, v in adversary.vectors.items()}
    run.progress = 0.0
    first = loss(run, "it").item()
    assert all(torch.equal(v, start[n]) for n, v in adversary.vectors.items())
    run.progress = 0.1
    adversary.ascend(lambda vectors: sum_of(v.sum() for v in vectors.values()), 0.1)
    moved = max((v - start[n]).abs().max().item() for n, v in adversary.vectors.items())
    assert 0.05 < moved <= 0.2 + 1e-9  # two climbs at half the rate
    run.progress = 1.0
    last = [loss(run, "it").item() for _ in range(20)][-1]
    assert last > first


def test_a_state_is_gone_on_from():
    loss = Reconstruction("persistent_pgd")
    _, run, adversary = fitted(Tokens, loss)
    loss(run, "it").backward()
    adversary.finish(0.5)
    other = PersistentAdversary(loss.persistent, run.importances.lower, generator(9))
    other.restore(adversary.state())
    for each in (adversary, other):
        run.adversaries = {"it": each}
        loss(run, "it")
    assert adversary.updates == other.updates == 5
    assert all(torch.equal(v, other.vectors[n]) for n, v in adversary.vectors.items())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_mixed_passes_are_wholly_chances_or_wholly_the_adversarys(share, monkeypatch):
    loss = Reconstruction("mixed", "subset", "kl", share=share)
    model, run, adversary = fitted(Tokens, loss)
    seen = []
    own = type(model).masked

    def watch(self, batch, masks, *rest, **named):
        seen.append(masks)
        return own(self, batch, masks, *rest, **named)

    monkeypatch.setattr(type(model), "masked", watch)
    value = loss(run, "it")
    value.backward()
    torch.testing.assert_close(
        value, kl(naive(model, run.batch, seen[-1]), run.clean.output), **EXACT
    )
    assert len(seen) == 3
    gradients = [gradient_of(leaf) for leaf in adversary._leaves.values()]
    assert any(g.any() for g in gradients) == bool(share)
    if share:
        sources = {n: (v[..., :-1], v[..., -1]) for n, v in adversary.vectors.items()}
        everywhere = masks_from_sources(run.importances.lower, sources)
        torch.testing.assert_close(
            value, kl(naive(model, run.batch, everywhere), run.clean.output), **EXACT
        )


def test_mixed_gives_each_sample_its_own(monkeypatch):
    """A sample of the adversary's is routed everywhere under its sources; another somewhere, under
    others.
    """
    loss = Reconstruction("mixed", "static", share=0.3, probability=0.4)
    model, run, adversary = fitted(Tokens, loss)
    seen = []
    own = type(model).masked

    def watch(self, batch, masks, *rest, **named):
        seen.append(masks)
        return own(self, batch, masks, *rest, **named)

    monkeypatch.setattr(type(model), "masked", watch)
    loss(run, "it")
    whole = torch.stack([mask.route for mask in seen[-1].values()]).flatten(2).all(-1).all(0)
    assert 0 < whole.sum() < len(whole)
    for n, mask in seen[-1].items():
        g = run.importances.lower[n].flatten(0, -2)[mask.rows]
        persistent = adversary.vectors[n].flatten(0, -2)[mask.rows]
        same = torch.isclose(mask.components, g + (1 - g) * persistent[:, :-1]).all(-1)
        sample = mask.rows // run.importances.lower[n].shape[1]
        assert torch.equal(same, whole[sample])


def test_l6_hidden_error_is_that_of_the_same_masked_run():
    model = decomposed(Branches)
    run = LossContext.from_batch(model, model.target.batch(), generator())
    _, hidden = Reconstruction("ci", hidden=("o", "d*"), hidden_coeff=3.0).terms(run)
    assert hidden is not None
    seen = {}
    naive(model, run.batch, {n: Mask(g, 0.0) for n, g in run.importances.lower.items()}, seen)
    errors = [
        ((seen[n] - run.clean.inputs[n]) ** 2).sum() / (run.clean.inputs[n] ** 2).sum()
        for n in ("o", "down")
    ]
    torch.testing.assert_close(hidden, sum(errors) / 2, **EXACT)
    total, terms = Losses(
        reconstruction={"a": Reconstruction("ci", hidden=("o", "d*"), hidden_coeff=3.0)}
    )(run)
    assert list(terms)[-2:] == ["reconstruction/a", "hidden/a"]
    rest = Losses(reconstruction={"a": Reconstruction("ci")})(run)[0]
    torch.testing.assert_close(total - rest, 3 * hidden, rtol=1e-8, atol=1e-10)
    with pytest.raises(BadInput, match=r"hidden: \['nothing'\] match no site"):
        hidden_error(run.clean.inputs, seen, ("nothing",))


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="acts everywhere"):
        Reconstruction("persistent_pgd", "subset")
    with pytest.raises(BadInput, match="many passes"):
        Reconstruction("mixed", "layerwise")
