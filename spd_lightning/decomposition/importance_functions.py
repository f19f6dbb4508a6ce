"""Importance functions made of MLPs, and the choice among all kinds (law G1 of docs/method.md).

    mlp         z_c = W2_c · gelu(W1_c a_c + b1_c) + b2_c     one MLP per component, reads a_c
    vector_mlp  z_c = W2_c · gelu(W1_c x + b1_c) + b2_c       one MLP per component, reads x
    shared_mlp  z = W2 gelu(W1 x + b1) + b2                   one MLP per site, reads x
    global_mlp  the same with all x concatenated              one MLP for all sites

1. `importance_function` builds the networks that a config describes.
2. In a forward pass, each network reads the inputs x or the inner activations a = x V of its sites.
3. Its output is the pre-activation z of every component.

Source: SPD (Bushnaq et al., 2025, arXiv 2506.20790). The kind `transformer` is in
`importance_transformer`.
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
    """Return a parameter with normal entries of standard deviation √(gain / fan_in) (D7)."""
    std = (gain / fan_in) ** 0.5
    return nn.Parameter(torch.randn(*shape) * std)


# ---- one MLP per component -----------------------------------------------------------------------


class _ScalarMLPs(torch.autograd.Function):
    """C tiny MLPs 1 → hidden → 1, computed in blocks of components that fit in the cache.

    For each block of components:

    1. Hidden pre-activations `h = W1 a + b1`, [C, hidden, batch]. The first layer is a broadcast
       multiplication, and GELU runs over contiguous memory.
    2. Output `z = W2 · gelu(h) + b2`, [C, batch].

    The backward pass computes h again, so that nothing of its size is stored:

    3. `dW2 = gelu(h) dzᵀ`
    4. `dh = gelu'(h) (W2 dz)`
    5. `da = W1 · dh`, `dW1 = dh aᵀ`, and `db1` is the sum of dh over the batch.
    """

    BLOCK = 1 << 16
    """Hidden activations of a block on a CPU: 256 KiB of float32, the fastest size measured."""
    CUDA_BLOCK = 1 << 28
    """Hidden activations of a block on a GPU: 1 GiB of float32."""

    @staticmethod
    def _blocks(a, hidden):
        """Return slices of components."""
        C, batch = a.shape
        limit = _ScalarMLPs.CUDA_BLOCK if a.is_cuda else _ScalarMLPs.BLOCK
        per_component = max(1, batch * hidden)
        size = max(1, limit // per_component)
        return [slice(start, start + size) for start in range(0, C, size)]

    @staticmethod
    def _hidden(a, W1, b1, block):
        """Return h [block, hidden, batch]: step 1."""
        bias = b1[block, :, None]
        weight = W1[block, :, None]
        return torch.addcmul(bias, weight, a[block, None, :])

    @staticmethod
    def _output(a, W1, b1, W2, block):
        """Return W2 · gelu(h) [block, batch]: step 2."""
        out = W2[block, None, :]  # [block, 1, hidden]
        active = gelu(_ScalarMLPs._hidden(a, W1, b1, block))  # [block, hidden, batch]
        return torch.bmm(out, active)[:, 0]

    @staticmethod
    def forward(ctx, a, W1, b1, W2, b2):
        """Return z [C, batch] from a [C, batch], W1, b1 and W2 [C, hidden], and b2 [C]."""
        z = torch.empty_like(a)
        for block in _ScalarMLPs._blocks(a, W1.shape[1]):
            z[block] = _ScalarMLPs._output(a, W1, b1, W2, block)  # steps 1 and 2
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
        for block in _ScalarMLPs._blocks(a, W1.shape[1]):
            h = _ScalarMLPs._hidden(a, W1, b1, block)  # step 1
            dW2[block] = torch.bmm(gelu(h), dz[block, :, None])[..., 0]  # step 3
            dh = torch.ops.aten.gelu_backward(dz[block, None, :] * W2[block, :, None], h)  # step 4
            da[block] = torch.bmm(W1[block, None, :], dh)[:, 0]  # step 5
            dW1[block] = torch.bmm(dh, a[block, :, None])[..., 0]
            db1[block] = dh.sum(-1)
        return da, dW1, db1, dW2, dz.sum(-1)


class _ScalarMLP(nn.Module):
    """`mlp`: one MLP per component on its inner activation."""

    reads_inner = True

    def __init__(self, site: Site, C: int, hidden: int):
        super().__init__()
        self.W1 = _normal(C, hidden, gain=2.0, fan_in=1)
        self.b1 = nn.Parameter(torch.zeros(C, hidden))
        self.W2 = _normal(C, hidden, gain=1.0, fan_in=hidden)
        self.b2 = nn.Parameter(torch.zeros(C))

    def forward(self, a: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        by_component = a.reshape(-1, a.shape[-1]).T  # [C, batch]
        by_component = by_component.to(self.W1.dtype).contiguous()
        with torch.autocast(a.device.type, enabled=False):  # the backward pass has one precision
            z = _ScalarMLPs.apply(by_component, self.W1, self.b1, self.W2, self.b2)
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
        read = einsum(x, self.W1, "... d_in, C d_in hidden -> ... C hidden")
        h = gelu(read + self.b1)  # [..., C, hidden]
        return einsum(h, self.W2, "... C hidden, C hidden -> ... C") + self.b2


# ---- one MLP for many components -----------------------------------------------------------------


def _shared_network(d_in: int, hidden: int, d_out: int) -> nn.Sequential:
    """Return an MLP with one hidden layer, initialized as D7 says."""
    first = Linear(d_in, hidden)
    last = Linear(hidden, d_out)
    _initialize(first, gain=2.0)
    _initialize(last, gain=1.0)
    return nn.Sequential(first, nn.GELU(), last)


def _initialize(layer: nn.Linear, gain: float) -> None:
    std = (gain / layer.in_features) ** 0.5
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


class _SharedMLP(nn.Module):
    """`shared_mlp`: one MLP per site from its input to all of its components."""

    reads_inner = False

    def __init__(self, site: Site, C: int, hidden: int):
        super().__init__()
        self.network = _shared_network(site.d_in, hidden, C)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... C"]:
        return self.network(x)


# ---- importance functions ------------------------------------------------------------------------


SITE_NETWORKS = {"mlp": _ScalarMLP, "vector_mlp": _VectorMLP, "shared_mlp": _SharedMLP}


class PerSite(ImportanceFunction):
    """An importance function with a network for each site: mlp, vector_mlp or shared_mlp."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.names = list(networks)
        self.networks = nn.ModuleList(networks.values())

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        z = {}
        for name, network in zip(self.names, self.networks, strict=True):
            source = inner if network.reads_inner else inputs
            z[name] = network(source[name])
        return z


class GlobalMLP(ImportanceFunction):
    """`global_mlp`: one MLP from the concatenated inputs of all sites to all components."""

    def __init__(self, sites: Mapping[str, tuple[Site, int]], hidden: int):
        super().__init__()
        self.counts = {name: C for name, (_, C) in sites.items()}
        d_in = sum(site.d_in for site, _ in sites.values())
        self.network = _shared_network(d_in, hidden, sum(self.counts.values()))

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        x = torch.cat([inputs[name] for name in self.counts], dim=-1)  # [..., Σ d_in]
        z = self.network(x)  # [..., Σ C]
        widths = list(self.counts.values())
        by_site = z.split(widths, dim=-1)
        return dict(zip(self.counts, by_site, strict=True))


class Together(ImportanceFunction):
    """Several importance functions, each for some of the sites."""

    def __init__(self, names: Sequence[str], parts: Sequence[ImportanceFunction]):
        super().__init__()
        self.names = list(names)
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        z = {}
        for part in self.parts:
            z.update(part(inputs, inner))
        return {name: z[name] for name in self.names}


def importance_function(
    config: Importance, sites: Mapping[str, tuple[Site, int]]
) -> ImportanceFunction:
    """Build the importance function of a config for sites with their component counts (step 1).

    Embedding sites use `mlp` with every kind, since their input is a token id and not a vector.
    """
    if config.kind in SITE_NETWORKS:
        return PerSite({name: _network(config, site, C) for name, (site, C) in sites.items()})
    networks = {}
    vector_sites = {}
    for name, (site, C) in sites.items():
        if site.kind == "embedding":
            networks[name] = _network(config, site, C)
        else:
            vector_sites[name] = (site, C)
    parts: list[ImportanceFunction] = []
    if networks:
        parts.append(PerSite(networks))
    if vector_sites:
        parts += _joint(config, vector_sites)
    return parts[0] if len(parts) == 1 else Together(list(sites), parts)


def _network(config: Importance, site: Site, C: int) -> nn.Module:
    """Return the network of one site."""
    if site.kind != "embedding":
        return SITE_NETWORKS[config.kind](site, C, config.hidden)
    hidden = config.hidden if config.kind == "mlp" else config.embedding_hidden
    return _ScalarMLP(site, C, hidden)


def _joint(config: Importance, sites: Mapping[str, tuple[Site, int]]) -> list[ImportanceFunction]:
    """Return functions that read several sites each: one, or one for each chunk of layers."""
    if config.kind == "global_mlp":
        return [GlobalMLP(sites, config.hidden)]
    functions: list[ImportanceFunction] = []
    for chunk in chunks_of_layers(list(sites), config.chunk_layers):
        chunk_sites = {name: sites[name] for name in chunk}
        functions.append(ImportanceTransformer(chunk_sites, config))
    return functions
