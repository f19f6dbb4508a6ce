"""The evaluation figures of a batch on one device, and of its two halves on two devices.

Separate processes import this module.
"""

import json

import torch

from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.metrics import DeviceShare
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext
from spd_lightning.targets.toy import TMS, InductionHead
from spd_lightning.training.evaluate import Evaluation, Totals, count, figures_of
from spd_lightning.training.pgd_sweep import pgd_sweep


def subjects():
    """Yield a model on tokens and one on vectors, each with a batch and evaluation settings."""
    torch.manual_seed(0)
    sweep = {"threshold": 0.2, "pgd_steps": (2, 6), "restarts": 2, "groups": {"all": "*"}}
    tokens = torch.randint(1, 7, (8, 6))
    tokens[:, -1] = tokens[:, 1]
    importance = Importance("transformer", d_model=12, layers=1, heads=2)
    decoder = ComponentModel(
        InductionHead(7, 6, 6), {"h.*.attn.*_proj": 4, "embed": 3}, importance=importance
    )
    yield "tokens", decoder.double(), tokens, Evaluation(**sweep, pgd_rows=5, divergence="kl")
    yield (
        "vectors",
        ComponentModel(TMS(5, 3), {"*": 4}).double(),
        torch.rand(8, 5).double(),
        Evaluation(**sweep),
    )


def figures(share=DeviceShare()):  # noqa: B008
    """Return all figures of section E by subject; this device evaluates its share of the batch."""
    found = {}
    for name, model, batch, settings in subjects():
        for parameter in model.importance_function.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            totals = Totals()
            mine = share.take(batch)
            count(
                model,
                LossContext.from_batch(model, mine, torch.Generator().manual_seed(0)),
                settings,
                totals,
                share,
            )
            swept = pgd_sweep(model, mine, settings)
            found[name] = figures_of(model, totals.over_devices(), settings) | swept
            found[name] |= {"rows of this device": len(mine)}
    return found


def half_of_two(rank, folder):
    """Run one of two processes, each with half of the batch; add up their sums."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(figures(DeviceShare(rank, 2)), file)
    torch.distributed.destroy_process_group()
