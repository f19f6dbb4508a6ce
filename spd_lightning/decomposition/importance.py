"""Causal importance: which components does an input need? (laws G1–G5 of docs/method.md)

1. An importance function reads the site inputs x or the inner activations a of the clean run. It
   returns one pre-activation z for each component at each position                       (G1)
2. Two sigmoids turn z into importances: *lower-leaky*, `g = σ_lower(z)`, for masks       (G2)
3. and *upper-leaky*, `ĝ = σ_upper(z)`, for the minimality losses                         (G3)

Both are the hard sigmoid `clamp(z, 0, 1)` between 0 and 1. They leak on different sides, so that
training has a gradient both below 0 and above 1.

Source: SPD (Bushnaq et al., 2025, arXiv 2506.20790). The networks of step 1 are in
`importance_functions` and `importance_transformer`.
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
"""Slope of the sigmoids on their leaky side."""


# ---- sigmoids ------------------------------------------------------------------------------------


def _between(grad: Tensor, z: Tensor) -> Tensor:
    """Return the gradient where 0 < z ≤ 1, and 0 elsewhere.

    This operation passes over memory once. It is 15 times as fast as `torch.where`.
    """
    above_one = 1.0 + torch.finfo(z.dtype).eps  # the operation excludes its bounds
    return torch.ops.aten.hardtanh_backward(grad, z, 0.0, above_one)


def _above(grad: Tensor, z: Tensor, bound: float) -> Tensor:
    """Return the gradient where z > bound, and 0 elsewhere."""
    return torch.ops.aten.threshold_backward(grad, z, bound)


class _LowerLeaky(torch.autograd.Function):
    """clamp(z, 0, 1); for z ≤ 0, the gradient is LEAK · min(gradient, 0).

    A negative gradient makes z rise. A positive one, which would push z further down, is dropped.
    """

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,) = grad_outputs
        (z,) = ctx.saved_tensors
        rising = grad.clamp(max=0)
        rising.mul_(LEAK)
        above = _above(rising, z, 0.0)
        below = rising - above  # where z ≤ 0
        between = _between(grad, z)
        return between + below


class _UpperLeaky(torch.autograd.Function):
    """clamp(z, 0, 1) + LEAK · max(z − 1, 0), with its own gradient."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        excess = z - 1
        excess.clamp_(min=0)
        clamped = z.clamp(0, 1)
        return clamped.add_(excess, alpha=LEAK)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,) = grad_outputs
        (z,) = ctx.saved_tensors
        above = _above(grad, z, 1.0)
        between = _between(grad, z)
        return between.add_(above, alpha=LEAK)


def lower_leaky(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hard sigmoid whose gradient below 0 lets an importance rise but not fall (G2)."""
    g = _LowerLeaky.apply(z)
    assert isinstance(g, Tensor)
    return g


def upper_leaky(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hard sigmoid that rises with slope 0.01 above 1 (G3)."""
    g = _UpperLeaky.apply(z)
    assert isinstance(g, Tensor)
    return g


def leaky_both_sides(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hard sigmoid with slope 0.01 below 0 and above 1 (G4)."""
    excess = z - 1
    above = 1 + LEAK * excess
    below = LEAK * z
    up_to_one = torch.where(z > 0, z, below)
    return torch.where(z > 1, above, up_to_one)


def swish_hard(z: Float[Tensor, "..."], sharpness: float = 10.0) -> Float[Tensor, "..."]:
    """Smooth hard sigmoid: swish(z) − swish(z − 1) (G4)."""
    gate = torch.sigmoid(sharpness * z)
    swish = z * gate
    shifted_gate = torch.sigmoid(sharpness * (z - 1))
    shifted = (z - 1) * shifted_gate
    return swish - shifted


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
"""For each name, the sigmoid of the masks (`lower`) and that of the losses (`upper`)."""


# ---- settings ------------------------------------------------------------------------------------


class Importances(NamedTuple):
    """Importances [..., C] of every site: `lower` for masks, `upper` for minimality losses."""

    lower: dict[str, Tensor]
    upper: dict[str, Tensor]


@dataclass(frozen=True)
class Importance:
    """How causal importances are computed.

    Args:
        kind: mlp (one tiny MLP per component on its inner activation), vector_mlp (one per
            component on the site's input), shared_mlp (one per site for all its components),
            global_mlp (one for all sites), transformer (one for all sites, which sees all
            positions). Embedding sites use `mlp` with every kind.
        hidden: width of the hidden layer of an MLP.
        sigmoid: leaky_hard is the pair of the paper, lower-leaky for masks (G2) and upper-leaky for
            minimality (G3).
        sampling: continuous sources in [0, 1], or binomial ones in {0, 1} (G5).
        embedding_hidden: width of the hidden layer at embedding sites if the kind is not `mlp`.
        d_model: width of the transformer.
        layers: number of blocks of the transformer.
        heads: number of attention heads of a block.
        d_mlp: width of a block's MLP; 4 × d_model if omitted.
        causal: whether a position sees only itself and earlier positions.
        chunk_layers: number of layers of the target that share a transformer, by the first number
            in a site's name; sites without a number belong to the first chunk. One transformer for
            all layers if omitted.
        checkpoint_activations: recompute blocks in the backward pass instead of storing their
            activations; this saves memory and costs time.
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
        check_range(
            "importance",
            least=1,
            whole=True,
            hidden=self.hidden,
            embedding_hidden=self.embedding_hidden,
            d_model=self.d_model,
            layers=self.layers,
            heads=self.heads,
            d_mlp=self.d_mlp,
            chunk_layers=self.chunk_layers,
        )
        pairs = 2 * self.heads
        if self.kind == "transformer" and self.d_model % pairs:
            nearest_width = pairs * max(1, round(self.d_model / pairs))
            raise BadInput(
                f"importance: d_model {self.d_model} with heads {self.heads}; rotary attention "
                f"needs heads of an even width, so take d_model {nearest_width}"
            )

    def __call__(
        self, z: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> Importances:
        """Return the importances of pre-activations (steps 2 and 3).

        Args:
            z: pre-activations [..., C] of every site.
            generator: draws the binomial jitter (G5); omitted outside training.
        """
        lower, upper = SIGMOIDS[self.sigmoid]
        importances = Importances({}, {})
        for name, v in z.items():
            if self.sampling == "binomial" and generator is not None:
                v = _jittered(v, generator)
            importances.lower[name] = lower(v)
        for name, v in z.items():
            importances.upper[name] = upper(v)
        return importances


def _jittered(z: Tensor, generator: torch.Generator) -> Tensor:
    """Return 1.05 z − 0.05 u, with u uniform on [0, 1) (G5)."""
    u = torch.rand(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    stretched = 1.05 * z
    return stretched - 0.05 * u


class ImportanceFunction(nn.Module, ABC):
    """A map from site inputs x and inner activations a to pre-activations z [..., C] (step 1)."""

    @abstractmethod
    def forward(
        self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]
    ) -> dict[str, Tensor]: ...


def by_site(z: Float[Tensor, "... C"], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the pre-activations of each site, from those of all sites side by side.

    Args:
        z: [..., Σ C], the components of all sites in the order of `counts`.
        counts: the number of components of each site.
    """
    widths = list(counts.values())
    parts = z.split(widths, dim=-1)  # [..., C] each
    return dict(zip(counts, parts, strict=True))
