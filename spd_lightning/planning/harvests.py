"""The memory that the harvesters of a config need, estimated before anything is harvested.

    memory = libraries + weights
            + a batch's forward passes
            + what each harvester keeps until it is written

The forward passes are measured in a dry run (`dry_run`). The rest are bounds from `budgets`.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from spd_lightning import budgets
from spd_lightning.decomposition.masks import Mask
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.planning.dry_run import fake_tensors
from spd_lightning.planning.estimate import batch_of, bytes_of, module_of
from spd_lightning.training.session import Settings

PASSES = "forward passes of a batch"


@runtime_checkable
class Harvests(Protocol):
    """A harvester whose memory can be estimated."""

    name: str

    def at_once(self, model: ComponentModel, inputs: Tensor) -> int:
        """Return the number of prompts of a batch that fit in memory together."""
        ...

    def memory(self, model: ComponentModel, inputs: Tensor) -> Mapping[str, int]:
        """Return the largest number of bytes of rows that wait to be written, by purpose."""
        ...


def harvest_memory(settings: Settings) -> dict[str, int]:
    """Return the bytes that the harvesters of a config need, by purpose.

    The dictionary is empty if the config has no harvester.

    Raises:
        BadInput: a setting of a harvester is invalid.
    """
    callbacks = settings.built("trainer").get("callbacks") or []
    harvesters = [callback for callback in callbacks if isinstance(callback, Harvests)]
    if not harvesters:
        return {}
    make = module_of(settings)
    with fake_tensors() as counter:
        model = make().model
        inputs = batch_of(settings, predict=True)()
        memory = {
            "Python and its libraries": budgets.LIBRARY_BYTES,
            "weights": bytes_of(model),
            PASSES: 0,
        }
        for harvester in harvesters:
            prompts = min(len(inputs), harvester.at_once(model, inputs))
            held = counter.alive
            counter.peak = held  # the peak of this harvester's passes alone
            _run(model, inputs[:prompts])
            passes = counter.peak - held
            memory[PASSES] = max(memory[PASSES], passes)
            for purpose, count in harvester.memory(model, inputs).items():
                memory[f"{harvester.name}: {purpose}"] = count
    return memory


@torch.no_grad()
def _run(model: ComponentModel, inputs: Tensor) -> None:
    """Run a batch of prompts clean and under its importances as masks, as harvesters do."""
    clean = model.clean(inputs)
    importances = model.importances(clean).lower
    activations = dict(clean.inner.items())  # harvesters hold them during the masked run
    masks = {site: Mask(values, 0.0) for site, values in importances.items()}
    model.masked(inputs, masks, clean)
    del activations
