"""A batch on one device, and its two halves on two devices.

Separate processes import this module, so it imports as little as possible.
"""

import json

import torch
from torch import Tensor, nn

from spd_lightning.decomposition.adversaries import Adversary, Persistent, PersistentAdversary
from spd_lightning.decomposition.losses import Frequency, Losses, Minimality, SmoothL0
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction

LOSSES = Losses(
    minimality=Minimality(1.0, p=1.5, p_final=0.9),
    frequency=Frequency(1.0, positions=30.0),
    smooth_l0=SmoothL0(1.0),
    reconstruction={
        "ci": Reconstruction("ci"),
        "pgd": Reconstruction("pgd", adversary=Adversary(4, init="zeros")),
        "lasting": Reconstruction("persistent_pgd", coeff=0.5),
        "pool": Reconstruction("persistent_pgd", persistent=Persistent(particles=2)),
    },
)


def whole_batch():
    return torch.linspace(-1.5, 2, 32).sin().reshape(8, 4).double()


def losses_and_gradients(batch, rank=0, world=1):
    """Return the loss terms of a batch, and the gradient of their total.

    They are those of the second step, when the persistent adversaries have ascended once.
    """
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model = ComponentModel(target, {"*": 5}).double()
    for parameter in model.importance_function.parameters():
        nn.init.normal_(parameter)
    run = LossContext.from_batch(model, batch)
    adversaries = {
        name: PersistentAdversary(
            settings, run.importances.lower, torch.Generator().manual_seed(1), rank, world
        )
        for name, settings in LOSSES.persistent.items()
    }
    terms: dict[str, Tensor] = {}
    for _ in range(2):
        model.zero_grad()
        run = LossContext.from_batch(model, batch)
        run.adversaries = adversaries
        total, terms = LOSSES(run, 0.5)
        total.backward()
        for adversary in adversaries.values():
            adversary.finish(0.5)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {name: value.item() for name, value in terms.items()}, gradient


def half_of_two(rank, folder):
    """Run one of two processes, each with half of the batch; average their gradients, as in DDP."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    terms, gradient = losses_and_gradients(whole_batch()[4 * rank : 4 * rank + 4], rank, 2)
    torch.distributed.all_reduce(gradient)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump([terms, (gradient / 2).tolist()], file)
    torch.distributed.destroy_process_group()
