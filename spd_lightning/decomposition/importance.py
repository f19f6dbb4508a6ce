"""Causal importance: which components does this input need? (laws G1–G5 of docs/method.md)

An importance function looks at the site inputs of the clean target run and gives one pre-activation z per component;
a sigmoid turns z into the importance. Two of them are used: the *lower-leaky* one makes masks (G2), the *upper-leaky*
one feeds the minimality losses (G3), so that training keeps a gradient on both sides of [0, 1].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from spd_lightning.decomposition.components import Site
from spd_lightning.errors import BadInput

LEAK = 0.01


# ---- sigmoids -------------------------------------------------------------------------------------------------------


def _between(grad: Tensor, z: Tensor) -> Tensor:
    """The gradient where 0 < z ≤ 1, else 0; one pass over memory, fifteen times quicker than `torch.where`."""
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


def leaky_hard(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hard sigmoid with slope 0.01 on both sides (G4)."""
    return torch.where(z > 1, 1 + LEAK * (z - 1), torch.where(z > 0, z, LEAK * z))


def swish_hard(z: Float[Tensor, "..."], sharpness: float = 10.0) -> Float[Tensor, "..."]:
    """Smooth hard sigmoid: the difference of two swishes one apart (G4)."""
    return z * torch.sigmoid(sharpness * z) - (z - 1) * torch.sigmoid(sharpness * (z - 1))


def hard(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Clamp to [0, 1] (G4)."""
    return z.clamp(0, 1)


Sigmoid = Literal["split_leaky_hard", "normal", "hard", "leaky_hard", "swish_hard"]
SIGMOIDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "split_leaky_hard": (lower_leaky, upper_leaky),
    "normal": (torch.sigmoid, torch.sigmoid),
    "hard": (hard, hard),
    "leaky_hard": (leaky_hard, leaky_hard),
    "swish_hard": (swish_hard, swish_hard),
}


class Importances(NamedTuple):
    """Importances of every site: `lower` [..., C] makes masks, `upper` [..., C] feeds the minimality losses."""

    lower: dict[str, Tensor]
    upper: dict[str, Tensor]


@dataclass(frozen=True)
class Importance:
    """How causal importances are computed.

    Args:
        kind: mlp (one tiny MLP per component on its own inner activation), vector_mlp (one per component on the site's
            input), shared_mlp (one per site, all components at once), global_mlp (one for all sites).
        hidden: width of the hidden layer.
        sigmoid: split_leaky_hard is the paper's pair of leaky hard sigmoids.
        sampling: continuous sources in [0, 1], or binomial ones in {0, 1} (G5).
    """

    kind: Literal["mlp", "vector_mlp", "shared_mlp", "global_mlp"] = "mlp"
    hidden: int = 16
    sigmoid: Sigmoid = "split_leaky_hard"
    sampling: Literal["continuous", "binomial"] = "continuous"

    def __call__(self, z: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Importances:
        """Pre-activations to importances; a generator samples the binomial jitter (training only, G5)."""
        lower, upper = SIGMOIDS[self.sigmoid]
        jitter = self.sampling == "binomial" and generator is not None
        return Importances(
            {name: lower(_jittered(v, generator) if jitter else v) for name, v in z.items()},
            {name: upper(v) for name, v in z.items()},
        )


def _jittered(z: Tensor, generator: torch.Generator | None) -> Tensor:
    u = torch.rand(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    return 1.05 * z - 0.05 * u


# ---- importance functions -------------------------------------------------------------------------------------------


def _normal(*shape: int, gain: float, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * (gain / fan_in) ** 0.5)


class ImportanceFunction(nn.Module, ABC):
    """Maps clean site inputs x and inner activations a to pre-activations z [..., C] of every site (G1)."""

    @abstractmethod
    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class _ScalarMLPs(torch.autograd.Function):
    """C tiny MLPs 1 → hidden → 1 at once, in blocks of components that stay in cache.

    The layout is (C, hidden, batch): the first layer is a broadcast multiply and GELU runs over contiguous memory. The
    hidden layer is rebuilt in the backward pass, so that nothing of its size is ever stored.
    """

    BLOCK = 1 << 16  # hidden activations worked on at once on a CPU: 256 KiB of float32, measured best

    @staticmethod
    def _blocks(a, hidden):
        C, N = a.shape
        size = C if a.is_cuda else max(1, _ScalarMLPs.BLOCK // max(1, N * hidden))
        return [slice(start, start + size) for start in range(0, C, size)]

    @staticmethod
    def _hidden(a, W1, b1, k):
        return torch.addcmul(b1[k, :, None], W1[k, :, None], a[k, None, :])

    @staticmethod
    def forward(ctx, a, W1, b1, W2, b2):  # a [C, batch], W1 b1 W2 [C, hidden], b2 [C] → z [C, batch]
        z = torch.empty_like(a)
        for k in _ScalarMLPs._blocks(a, W1.shape[1]):
            z[k] = torch.bmm(W2[k, None, :], gelu(_ScalarMLPs._hidden(a, W1, b1, k)))[:, 0]
        ctx.save_for_backward(a, W1, b1, W2)
        return z.add_(b2[:, None])

    @staticmethod
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        a, W1, b1, W2 = ctx.saved_tensors
        dz = dz.contiguous()
        da, dW1, db1, dW2 = torch.empty_like(a), torch.empty_like(W1), torch.empty_like(b1), torch.empty_like(W2)
        for k in _ScalarMLPs._blocks(a, W1.shape[1]):
            h = _ScalarMLPs._hidden(a, W1, b1, k)
            dW2[k] = torch.bmm(gelu(h), dz[k, :, None])[..., 0]
            dh = torch.ops.aten.gelu_backward(dz[k, None, :] * W2[k, :, None], h)
            da[k] = torch.bmm(W1[k, None, :], dh)[:, 0]
            dW1[k] = torch.bmm(dh, a[k, :, None])[..., 0]
            db1[k] = dh.sum(-1)
        return da, dW1, db1, dW2, dz.sum(-1)


class _ScalarMLP(nn.Module):
    """`mlp`: one MLP per component on its own inner activation."""

    def __init__(self, site: Site, C: int, hidden: int):
        super().__init__()
        self.W1, self.b1 = _normal(C, hidden, gain=2.0, fan_in=1), nn.Parameter(torch.zeros(C, hidden))
        self.W2, self.b2 = _normal(C, hidden, gain=1.0, fan_in=hidden), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor, a: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        flat = a.reshape(-1, a.shape[-1]).T.to(self.W1.dtype).contiguous()
        with torch.autocast(a.device.type, enabled=False):  # its backward pass knows one precision only
            z = _ScalarMLPs.apply(flat, self.W1, self.b1, self.W2, self.b2)
        return z.T.contiguous().reshape(a.shape)  # pyright: ignore[reportOptionalMemberAccess]


class _VectorMLP(nn.Module):
    """`vector_mlp`: one MLP per component on the site's input."""

    def __init__(self, site: Site, C: int, hidden: int):
        super().__init__()
        self.W1 = _normal(C, site.d_in, hidden, gain=2.0, fan_in=site.d_in)
        self.b1 = nn.Parameter(torch.zeros(C, hidden))
        self.W2, self.b2 = _normal(C, hidden, gain=1.0, fan_in=hidden), nn.Parameter(torch.zeros(C))

    def forward(self, x: Float[Tensor, "... d_in"], a: Tensor) -> Float[Tensor, "... C"]:
        h = gelu(einsum(x, self.W1, "... d_in, C d_in hidden -> ... C hidden") + self.b1)
        return einsum(h, self.W2, "... C hidden, C hidden -> ... C") + self.b2


def _shared_network(d_in: int, hidden: int, d_out: int) -> nn.Sequential:
    first, last = nn.Linear(d_in, hidden), nn.Linear(hidden, d_out)
    for layer, gain in ((first, 2.0), (last, 1.0)):
        nn.init.normal_(layer.weight, std=(gain / layer.in_features) ** 0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.GELU(), last)


class _SharedMLP(nn.Module):
    """`shared_mlp`: one MLP per site from its input to all of its components."""

    def __init__(self, site: Site, C: int, hidden: int):
        super().__init__()
        self.network = _shared_network(site.d_in, hidden, C)

    def forward(self, x: Float[Tensor, "... d_in"], a: Tensor) -> Float[Tensor, "... C"]:
        return self.network(x)


class PerSite(ImportanceFunction):
    """An importance function that looks at each site on its own (`mlp`, `vector_mlp`, `shared_mlp`)."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.names = list(networks)
        self.networks = nn.ModuleList(networks.values())

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: f(inputs[n], inner[n]) for n, f in zip(self.names, self.networks, strict=True)}


class GlobalMLP(ImportanceFunction):
    """`global_mlp`: one MLP from the concatenated inputs of all sites to all of their components."""

    def __init__(self, sites: Mapping[str, tuple[Site, int]], hidden: int):
        super().__init__()
        self.counts = {name: C for name, (_, C) in sites.items()}
        self.network = _shared_network(sum(s.d_in for s, _ in sites.values()), hidden, sum(self.counts.values()))

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Tensor]) -> dict[str, Tensor]:
        z = self.network(torch.cat([inputs[name] for name in self.counts], dim=-1))
        return dict(zip(self.counts, z.split(list(self.counts.values()), dim=-1), strict=True))


def importance_function(config: Importance, sites: Mapping[str, tuple[Site, int]]) -> ImportanceFunction:
    """Builds the importance function that a config names for sites with their component counts.

    Raises:
        BadInput: an embedding site with a kind other than `mlp` (its input is a token id, not a vector).
    """
    embeddings = [name for name, (site, _) in sites.items() if site.kind == "embedding"]
    if embeddings and config.kind != "mlp":
        raise BadInput(f"importance: kind '{config.kind}' cannot read token ids at '{embeddings[0]}'; use kind 'mlp'")
    if config.kind == "global_mlp":
        return GlobalMLP(sites, config.hidden)
    network = {"mlp": _ScalarMLP, "vector_mlp": _VectorMLP, "shared_mlp": _SharedMLP}[config.kind]
    return PerSite({name: network(site, C, config.hidden) for name, (site, C) in sites.items()})
