"""Causal importance: which components does this input need? (laws G1–G5 of docs/method.md)

An importance function looks at the site inputs of the clean target run and gives one pre-activation
z per component; a sigmoid turns z into the importance. Two of them are used: the *lower-leaky* one
makes masks (G2), the *upper-leaky* one feeds the minimality losses (G3), so that training keeps a
gradient on both sides of [0, 1].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.errors import BadInput, check_range

LEAK = 0.01


def _between(grad: Tensor, z: Tensor) -> Tensor:
    """The gradient where 0 < z ≤ 1, else 0; one pass over memory, fifteen times quicker than
    `torch.where`.
    """
    return torch.ops.aten.hardtanh_backward(grad, z, 0.0, 1.0 + torch.finfo(z.dtype).eps)


def _above(grad: Tensor, z: Tensor, bound: float) -> Tensor:
    """The gradient where z > bound, else 0."""
    return torch.ops.aten.threshold_backward(grad, z, bound)


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (z,) = ctx.saved_tensors
        rising = grad.clamp(max=0).mul_(LEAK)
        return _between(grad, z) + (rising - _above(rising, z, 0.0))


class _UpperLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(0, 1).add_((z - 1).clamp_(min=0), alpha=LEAK)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (z,) = ctx.saved_tensors
        return _between(grad, z).add_(_above(grad, z, 1.0), alpha=LEAK)


def lower_leaky(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hard sigmoid whose gradient below 0 still lets an importance rise, never fall (G2)."""
    return _LowerLeaky.apply(z)  # pyright: ignore[reportReturnType]


def upper_leaky(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hard sigmoid that goes on rising with slope 0.01 above 1 (G3)."""
    return _UpperLeaky.apply(z)  # pyright: ignore[reportReturnType]


def leaky_both_sides(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hard sigmoid with slope 0.01 below 0 and above 1 (G4)."""
    return torch.where(z > 1, 1 + LEAK * (z - 1), torch.where(z > 0, z, LEAK * z))


def swish_hard(z: Float[Tensor, "..."], sharpness: float = 10.0) -> Float[Tensor, "..."]:
    """Smooth hard sigmoid: the difference of two swishes one apart (G4)."""
    return z * torch.sigmoid(sharpness * z) - (z - 1) * torch.sigmoid(sharpness * (z - 1))


def hard(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Clamp to [0, 1] (G4)."""
    return z.clamp(0, 1)


Kind = Literal["mlp", "vector_mlp", "shared_mlp", "global_mlp", "transformer"]
Sigmoid = Literal["leaky_hard", "normal", "hard", "leaky_both_sides", "swish_hard"]
SIGMOIDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "leaky_hard": (lower_leaky, upper_leaky),
    "normal": (torch.sigmoid, torch.sigmoid),
    "hard": (hard, hard),
    "leaky_both_sides": (leaky_both_sides, leaky_both_sides),
    "swish_hard": (swish_hard, swish_hard),
}


class Importances(NamedTuple):
    """Importances of every site: `lower` [..., C] makes masks, `upper` [..., C] feeds the
    minimality losses.
    """

    lower: dict[str, Tensor]
    upper: dict[str, Tensor]


@dataclass(frozen=True)
class Importance:
    """How causal importances are computed.

    Args:
        kind: mlp (one tiny MLP per component on its own inner activation), vector_mlp (one per
            component on the site's input), shared_mlp (one per site, all components at once),
            global_mlp (one for all sites), transformer (one for all sites, which sees all
            positions). Embedding sites get `mlp` under every kind.
        hidden: width of the hidden layer of an MLP.
        sigmoid: leaky_hard is the paper's pair, lower-leaky for masks (G2) and upper-leaky for
            minimality (G3).
        sampling: continuous sources in [0, 1], or binomial ones in {0, 1} (G5).
        embedding_hidden: width of the hidden layer at embedding sites, where the kind is not `mlp`.
        d_model: width of the transformer.
        layers: blocks of the transformer.
        heads: attention heads of a block.
        d_mlp: width of a block's MLP; 4 × d_model if omitted.
        causal: whether a position sees only itself and earlier ones.
        chunk_layers: layers of the target that share a transformer, by the first number in a site's
            name; sites without one go with the first. One transformer for all if omitted.
        checkpoint_activations: blocks are run again in the backward pass instead of kept: less
            memory, more time.
    """

    kind: Kind = "mlp"
    hidden: int = 16
    sigmoid: Sigmoid = "leaky_hard"
    sampling: Literal["continuous", "binomial"] = "continuous"
    embedding_hidden: int = 16
    d_model: int = 256
    layers: int = 2
    heads: int = 4
    d_mlp: int | None = None
    causal: bool = False
    chunk_layers: int | None = None
    checkpoint_activations: bool = False

    def __post_init__(self):
        names = (
            "hidden",
            "embedding_hidden",
            "d_model",
            "layers",
            "heads",
            "d_mlp",
            "chunk_layers",
        )
        check_range(
            "importance", least=1, whole=True, **{name: getattr(self, name) for name in names}
        )
        if self.kind == "transformer" and self.d_model % (2 * self.heads):
            fitting = 2 * self.heads * max(1, round(self.d_model / (2 * self.heads)))
            raise BadInput(
                f"importance: d_model {self.d_model} with heads {self.heads}; rotary attention "
                "needs heads of an even "
                f"width, so take d_model {fitting}"
            )

    def __call__(
        self, z: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> Importances:
        """Pre-activations to importances; a generator samples the binomial jitter (training only,
        G5).
        """
        lower, upper = SIGMOIDS[self.sigmoid]
        jitter = self.sampling == "binomial" and generator is not None
        return Importances(
            {name: lower(_jittered(v, generator) if jitter else v) for name, v in z.items()},
            {name: upper(v) for name, v in z.items()},
        )


def _jittered(z: Tensor, generator: torch.Generator | None) -> Tensor:
    u = torch.rand(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    return 1.05 * z - 0.05 * u


class ImportanceFunction(nn.Module, ABC):
    """Maps clean site inputs x and inner activations a to pre-activations z [..., C] of every site
    (G1).
    """

    @abstractmethod
    def forward(
        self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]
    ) -> dict[str, Tensor]: ...
