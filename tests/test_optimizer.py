"""Updates: Muon beside AdamW, and batches taken in parts."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from support import half_batches
from support.networks import Perceptron
from torch import nn

from spd_lightning.decomposition.adversaries import Persistent
from spd_lightning.decomposition.importance import Importance, Kind
from spd_lightning.decomposition.losses import Losses
from spd_lightning.decomposition.reconstruction import Reconstruction
from spd_lightning.errors import BadInput
from spd_lightning.training.decompose import Decomposition, FaithfulnessWarmup
from spd_lightning.training.optimizer import Optimizer, matrices_of


def module(kind: Kind = "shared_mlp", losses=None, **settings):
    losses = losses or Losses()
    importance = Importance(kind, hidden=5)
    target = Perceptron().requires_grad_(False)
    d = Decomposition(
        target,
        {"*": 6},
        importance=importance,
        losses=losses,
        warm_up=FaithfulnessWarmup(0),
        **settings,
    )
    for p in d.model.importance_function.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    return d.double()


def trained(d):
    return [p for p in d.parameters() if p.requires_grad]


def draw_gradients(d, step):
    chance = torch.Generator().manual_seed(step)
    for p in trained(d):
        p.grad = torch.randn(p.shape, generator=chance, dtype=p.dtype)


# ---- Muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared_mlp", "mlp"])
def test_matrices_are_updated_by_muon_and_all_else_by_adamw(kind):
    """One optimizer for Lightning; the numbers of torch's two, each on its own parameters, learning
    rates apart.
    """
    ours = module(kind).float()
    plain = module(kind).float()
    together = Optimizer(lr=0.01, importance_lr=0.02, kind="muon", momentum=0.9).over(ours.model)
    rates = [(plain.model.components, 0.01), (plain.model.importance_function, 0.02)]
    others = []
    for part, lr in rates:
        found = {id(p) for p in matrices_of(part)}
        rest = [p for p in part.parameters() if id(p) not in found]
        if found:
            muon = {"weight_decay": 0.0, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
            others.append(torch.optim.Muon(matrices_of(part), lr=lr, **muon))
        if rest:
            others.append(torch.optim.AdamW(rest, lr=lr, weight_decay=0.0))
    for step in range(3):
        for group in together.param_groups:
            group["lr"] = group["peak"]
        for d in (ours, plain):
            draw_gradients(d, step)
        together.step()
        for optimizer in others:
            optimizer.step()
    for p, q in zip(trained(ours), trained(plain), strict=True):
        torch.testing.assert_close(p, q)
    assert sum(len(g["params"]) for g in together.param_groups) == len(trained(ours))
    stacks = {id(p) for p in matrices_of(ours.model.importance_function)}
    assert bool(stacks) == (kind == "shared_mlp"), "MLPs of single components are no matrices"


def test_its_state_goes_on_from_a_checkpoint():
    ours = module().float()
    other = module().float()
    first, second = (Optimizer(kind="muon").over(d.model) for d in (ours, other))
    for step in range(4):
        for optimizer, d in ((first, ours), (second, other)):
            draw_gradients(d, step)
            optimizer.step()
        if step == 1:
            second = Optimizer(kind="muon").over(other.model)
            second.load_state_dict(deepcopy(first.state_dict()))
    for p, q in zip(trained(ours), trained(other), strict=True):
        assert torch.equal(p, q)


# ---- micro-batches -------------------------------------------------------------------------------

LOSSES = replace(
    half_batches.LOSSES,
    reconstruction={
        "ci": Reconstruction("ci"),
        "lasting": Reconstruction(
            "persistent_pgd", coeff=0.5, persistent=Persistent(lr=0.1, warmup=0.0)
        ),
    },
)


def accumulated(d, batch):
    """The mean loss over the parts of a batch, as training takes it, and the gradient that it
    leaves.
    """
    parts = batch.chunk(d.micro_batches)
    losses = []
    d.zero_grad()
    d.before_parts(parts, 1)
    for k, part in enumerate(parts):
        loss, _ = d.objective(part, 1, k)
        (loss / len(parts)).backward()
        d.after_backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean(), [
        p.grad.clone() for p in d.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(parts, monkeypatch):
    """L3 and L7 on micro-batches: the frequency term too, and persistent adversaries climb
    alike.
    """
    monkeypatch.setattr(Decomposition, "steps", property(lambda _: 2))
    whole = module(losses=LOSSES)
    cut = module(losses=LOSSES, micro_batches=parts)
    cut.network.load_state_dict(whole.network.state_dict())
    batch = half_batches.whole_batch()
    for d in (whole, cut):  # the adversaries are made
        accumulated(d, batch)
    mine = whole._adversaries["lasting"]
    for name in mine.vectors:
        for kept in (mine.vectors, mine.first, mine.second):
            torch.nn.init.uniform_(kept[name], generator=torch.Generator().manual_seed(3))
    for k, other in enumerate(cut._adversaries.values()):
        rows = slice(8 // parts * k, 8 // parts * (k + 1))
        for theirs, kept in (
            (other.vectors, mine.vectors),
            (other.first, mine.first),
            (other.second, mine.second),
        ):
            theirs.update({name: v[rows].clone() for name, v in kept.items()})
    (loss, gradients) = accumulated(whole, batch)
    (loss_cut, gradients_cut) = accumulated(cut, batch)
    torch.testing.assert_close(loss_cut, loss)
    for g, h in zip(gradients, gradients_cut, strict=True):
        torch.testing.assert_close(h, g)
    for name, v in mine.vectors.items():
        climbed = torch.cat([other.vectors[name] for other in cut._adversaries.values()])
        torch.testing.assert_close(climbed, v)
    assert cut.state_dict().keys() == whole.state_dict().keys()


def test_pools_climb_on_whole_batches():
    pool = {"pool": Reconstruction("persistent_pgd", persistent=Persistent(particles=2))}
    with pytest.raises(BadInput, match="micro_batches 2 with particles in reconstruction 'pool'"):
        module(losses=Losses(reconstruction=pool), micro_batches=2)


def test_a_batch_that_cannot_be_cut(monkeypatch):
    d = module(micro_batches=3)
    with pytest.raises(
        BadInput, match=r"micro_batches 3 in Decomposition: a batch of 8 .*data\.batch_size"
    ):
        d._accumulate(torch.zeros(8, 4), 0)
