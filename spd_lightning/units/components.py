"""The components of a decomposition as units."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput
from spd_lightning.units.observation import Observation


class ComponentUnits:
    """The components of a decomposed model, with their lower-leaky importances in the clean run.

    Examples:
        >>> import torch
        >>> from spd_lightning import TMS, ComponentModel
        >>> from spd_lightning.units import ComponentUnits
        >>> units = ComponentUnits(ComponentModel(TMS(5, 2), sites={"linear*": 20}))
        >>> units.counts
        {'linear1': 20, 'linear2': 20}
        >>> units.observe(torch.rand(8, 5)).activations["linear1"].shape
        torch.Size([8, 1, 20])
    """

    def __init__(self, model: ComponentModel):
        self.model = model

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of components of each site, in forward order."""
        return self.model.counts

    def observe(self, inputs: Shaped[Tensor, "batch _"]) -> Observation:
        """Run the target on a batch of prompts, without gradients.

        Raises:
            BadInput: a site has the same input for all prompts.
        """
        has_tokens = not inputs.is_floating_point()
        with torch.no_grad():  # inner activations are computed only when they are read below
            clean = self.model.clean(inputs)
            importances = self.model.importances(clean).lower
            check_own_importances(importances, inputs)
            return Observation(
                activations={site: by_position(a) for site, a in clean.inner.items()},
                importances={site: by_position(g) for site, g in importances.items()},
                logits=by_position(clean.output) if has_tokens else None,
            )


def check_own_importances(
    importances: Mapping[str, Float[Tensor, "*place C"]], inputs: Shaped[Tensor, "batch _"]
) -> None:
    """Check that importances at every site depend on the prompt.

    Raises:
        BadInput: a site has the same input for all prompts.
    """
    places = inputs.shape[:1] if inputs.is_floating_point() else inputs.shape
    for site, values in importances.items():
        if values.shape[:-1] != places:
            raise BadInput(
                f"site '{site}': its input is the same for all prompts, so no prompt has "
                "importances of its own; leave the site out"
            )


def by_position(x: Float[Tensor, "batch *pos K"]) -> Float[Tensor, "batch pos K"]:
    """Return values with a position dimension, in single precision or better.

    A vector counts as one position.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    return x.unsqueeze(1) if x.ndim == 2 else x
