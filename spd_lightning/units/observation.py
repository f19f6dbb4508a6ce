"""The protocol of units, and the values that statistics need from them.

A *unit* reads a position and has one activation there: an SPD component, a rank of a LoRA adapter,
a feature of a sparse autoencoder, a neuron. Some units also have an importance between 0 and 1,
which says how much the position needs them. A unit *fires* where its importance is above a
threshold; without importances, it fires where its |activation| is.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor


class Observation(NamedTuple):
    """The units of a batch of prompts, and the predictions of the network they belong to.

    activations: by layer, [batch, pos, C].
    importances: by layer, [batch, pos, C]; None for units without importances.
    logits: [batch, pos, vocab]; None if the network does not predict tokens.
    """

    activations: Mapping[str, Float[Tensor, "batch pos C"]]
    importances: Mapping[str, Float[Tensor, "batch pos C"]] | None
    logits: Float[Tensor, "batch pos vocab"] | None

    def measure(self, layer: str) -> Float[Tensor, "batch pos C"]:
        """Return the values that are compared with the threshold: importances, or |activation|."""
        if self.importances is None:
            return self.activations[layer].abs()
        return self.importances[layer]


@runtime_checkable
class Units(Protocol):
    """Units of one kind, by layer."""

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of units of each layer, in forward order."""
        ...

    def observe(self, inputs: Shaped[Tensor, "batch _"]) -> Observation:
        """Run the network on a batch of prompts, without gradients.

        inputs: [batch, features] floating point, or [batch, pos] token ids.
        """
        ...
