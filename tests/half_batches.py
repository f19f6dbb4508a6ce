"""A batch on one device, and the two halves of it on two: what a process of its own needs, and light to import."""

import json

import torch
from torch import nn

from spd_lightning.decomposition.adversaries import Adversary
from spd_lightning.decomposition.losses import Frequency, Losses, Minimality, SmoothL0
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import Pass, Reconstruction

LOSSES = Losses(
    minimality=Minimality(1.0, p=1.5),
    frequency=Frequency(1.0, positions=30.0),
    smooth_l0=SmoothL0(1.0),
    reconstruction={
        "ci": Reconstruction("ci"),
        "pgd": Reconstruction("pgd", adversary=Adversary(4, init="zeros")),
    },
)


def whole_batch():
    return torch.linspace(-1.5, 2, 32).sin().reshape(8, 4).double()


def losses_and_gradients(batch):
    """The terms of a batch, and the gradient of their total."""
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model = ComponentModel(target, {"*": 5}).double()
    for parameter in model.importance_function.parameters():
        nn.init.normal_(parameter)
    total, terms = LOSSES(Pass.of(model, batch))
    total.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {name: value.item() for name, value in terms.items()}, gradient


def half_of_two(rank, folder):
    """A process that holds half of the batch and averages gradients with the other, as DDP does."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    terms, gradient = losses_and_gradients(whole_batch()[4 * rank : 4 * rank + 4])
    torch.distributed.all_reduce(gradient)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump([terms, (gradient / 2).tolist()], file)
    torch.distributed.destroy_process_group()
