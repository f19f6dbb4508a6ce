"""Importance functions of every kind but the transformer, and the one that a config names (law G1
of docs/method.md).

`mlp`, `vector_mlp` and `shared_mlp` look at each site on its own, `global_mlp` at all of them
together. A site's own network reads the site's input x or its inner activation a = x V; no other is
computed for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.importance import Importance, ImportanceFunction
from spd_lightning.decomposition.importance_transformer import (
    ImportanceTransformer,
    chunks_of_layers,
)
from spd_lightning.decomposition.matmul import Linear


def _normal(*shape: int, gain: float, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * (gain / fan_in) ** 0.5)


class _ScalarMLPs(torch.autograd.Function):
    """C tiny MLPs 1 → hidden → 1 at once, in blocks of components that stay in cache.

    The layout is (C, hidden, batch): the first layer is a broadcast multiply and GELU runs over
    contiguous memory. The hidden layer is rebuilt in the backward pass, so that nothing of its size
    is ever stored.
    """

    BLOCK = (
        1 << 16
    )  # hidden activations worked on at once on a CPU: 256 KiB of float32, measured best
    CUDA_BLOCK = 1 << 28  # 1 GiB of float32

    @staticmethod
    def _blocks(a, hidden):
        C, N = a.shape
        block = _ScalarMLPs.CUDA_BLOCK if a.is_cuda else _ScalarMLPs.BLOCK
        size = max(1, block // max(1, N * hidden))
        return [slice(start, start + size) for start in range(0, C, size)]

    @staticmethod
    def _hidden(a, W1, b1, k):
        return torch.addcmul(b1[k, :, None], W1[k, :, None], a[k, None, :])

    @staticmethod
    def forward(
        ctx, a, W1, b1, W2, b2
    ):  # a [C, batch], W1 b1 W2 [C, hidden], b2 [C] → z [C, batch]
        z = torch.empty_like(a)
        for k in _ScalarMLPs._blocks(a, W1.shape[1]):
            z[k] = torch.bmm(W2[k, None, :], gelu(_ScalarMLPs._hidden(a, W1, b1, k)))[:, 0]
        ctx.save_for_backward(a, W1, b1, W2)
        return z.add_(b2[:, None])

    @staticmethod
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        a, W1, b1, W2 = ctx.saved_tensors
        dz = dz.contiguous()
        da = torch.empty_like(a)
        dW1 = torch.empty_like(W1)
        db1 = torch.empty_like(b1)
        dW2 = torch.empty_like(W2)
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

    reads_inner = True

    def __init__(self, site: Site, C: int, hidden: int):
        super().__init__()
        self.W1 = _normal(C, hidden, gain=2.0, fan_in=1)
        self.b1 = nn.Parameter(torch.zeros(C, hidden))
        self.W2 = _normal(C, hidden, gain=1.0, fan_in=hidden)
        self.b2 = nn.Parameter(torch.zeros(C))

    def forward(self, a: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        flat = a.reshape(-1, a.shape[-1]).T.to(self.W1.dtype).contiguous()
        with torch.autocast(
            a.device.type, enabled=False
        ):  # its backward pass knows one precision only
            z = _ScalarMLPs.apply(flat, self.W1, self.b1, self.W2, self.b2)
        return z.T.contiguous().reshape(a.shape)  # pyright: ignore[reportOptionalMemberAccess]


class _VectorMLP(nn.Module):
    """`vector_mlp`: one MLP per component on the site's input."""

    reads_inner = False

    def __init__(self, site: Site, C: int, hidden: int):
        super().__init__()
        self.W1 = _normal(C, site.d_in, hidden, gain=2.0, fan_in=site.d_in)
        self.b1 = nn.Parameter(torch.zeros(C, hidden))
        self.W2 = _normal(C, hidden, gain=1.0, fan_in=hidden)
        self.b2 = nn.Parameter(torch.zeros(C))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... C"]:
        h = gelu(einsum(x, self.W1, "... d_in, C d_in hidden -> ... C hidden") + self.b1)
        return einsum(h, self.W2, "... C hidden, C hidden -> ... C") + self.b2


def _shared_network(d_in: int, hidden: int, d_out: int) -> nn.Sequential:
    first = Linear(d_in, hidden)
    last = Linear(hidden, d_out)
    for layer, gain in ((first, 2.0), (last, 1.0)):
        nn.init.normal_(layer.weight, std=(gain / layer.in_features) ** 0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.GELU(), last)


class _SharedMLP(nn.Module):
    """`shared_mlp`: one MLP per site from its input to all of its components."""

    reads_inner = False

    def __init__(self, site: Site, C: int, hidden: int):
        super().__init__()
        self.network = _shared_network(site.d_in, hidden, C)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... C"]:
        return self.network(x)


SITE_NETWORKS = {"mlp": _ScalarMLP, "vector_mlp": _VectorMLP, "shared_mlp": _SharedMLP}


class PerSite(ImportanceFunction):
    """An importance function that looks at each site on its own (`mlp`, `vector_mlp`,
    `shared_mlp`).
    """

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.names = list(networks)
        self.networks = nn.ModuleList(networks.values())

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        pairs = zip(self.names, self.networks, strict=True)
        return {
            name: network((inner if network.reads_inner else inputs)[name])
            for name, network in pairs
        }


class GlobalMLP(ImportanceFunction):
    """`global_mlp`: one MLP from the concatenated inputs of all sites to all of their
    components.
    """

    def __init__(self, sites: Mapping[str, tuple[Site, int]], hidden: int):
        super().__init__()
        self.counts = {name: C for name, (_, C) in sites.items()}
        self.network = _shared_network(
            sum(s.d_in for s, _ in sites.values()), hidden, sum(self.counts.values())
        )

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        z = self.network(torch.cat([inputs[name] for name in self.counts], dim=-1))
        return dict(zip(self.counts, z.split(list(self.counts.values()), dim=-1), strict=True))


class Together(ImportanceFunction):
    """Several importance functions, each for sites of its own."""

    def __init__(self, names: Sequence[str], parts: Sequence[ImportanceFunction]):
        super().__init__()
        self.names = list(names)
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        z = {name: value for part in self.parts for name, value in part(inputs, inner).items()}
        return {name: z[name] for name in self.names}


def importance_function(
    config: Importance, sites: Mapping[str, tuple[Site, int]]
) -> ImportanceFunction:
    """Builds the importance function that a config names for sites with their component counts.

    Embedding sites get `mlp` whatever the kind: their input is a token id, not a vector.
    """
    if config.kind in SITE_NETWORKS:
        return PerSite({name: _network(config, site, C) for name, (site, C) in sites.items()})
    tokens = {
        name: _network(config, site, C)
        for name, (site, C) in sites.items()
        if site.kind == "embedding"
    }
    vectors = {name: held for name, held in sites.items() if name not in tokens}
    parts = ([PerSite(tokens)] if tokens else []) + (_joint(config, vectors) if vectors else [])
    return parts[0] if len(parts) == 1 else Together(list(sites), parts)


def _network(config: Importance, site: Site, C: int) -> nn.Module:
    if site.kind == "embedding":
        return _ScalarMLP(
            site, C, config.hidden if config.kind == "mlp" else config.embedding_hidden
        )
    return SITE_NETWORKS[config.kind](site, C, config.hidden)


def _joint(config: Importance, sites: Mapping[str, tuple[Site, int]]) -> list[ImportanceFunction]:
    """The functions that look at several sites at once: one, or one for each chunk of layers."""
    if config.kind == "global_mlp":
        return [GlobalMLP(sites, config.hidden)]
    chunks = chunks_of_layers(list(sites), config.chunk_layers)
    return [
        ImportanceTransformer({name: sites[name] for name in chunk}, config) for chunk in chunks
    ]
