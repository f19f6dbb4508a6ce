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
from spd_lightning.decomposition.importance import Importance, ImportanceFunction, by_site
from spd_lightning.decomposition.importance_transformer import (
    ImportanceTransformer,
    chunks_of_layers,
)
from spd_lightning.decomposition.matmul import Linear


def _normal(*shape: int, gain: float, fan_in: int) -> nn.Parameter:
    """Return a parameter with normal entries of standard deviation √(gain / fan_in) (D7)."""
    variance = gain / fan_in
    std = variance**0.5
    entries = torch.randn(*shape) * std
    return nn.Parameter(entries)


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
    def forward(ctx, a, W1, b1, W2, b2):
        """Return z [C, batch] from a [C, batch], W1, b1 and W2 [C, hidden], and b2 [C]."""
        z = torch.empty_like(a)
        for block in _blocks(a, W1):
            z[block] = _output(a, W1, b1, W2, block)  # steps 1 and 2
        ctx.save_for_backward(a, W1, b1, W2)
        bias = b2[:, None]  # [C, 1]
        return z.add_(bias)

    @staticmethod
    def backward(ctx, *grad_outputs):
        """Return the gradients to a, W1, b1, W2 and b2, from the one to z [C, batch]."""
        (dz,) = grad_outputs
        dz = dz.contiguous()
        a, W1, b1, W2 = ctx.saved_tensors
        da = torch.empty_like(a)
        dW1 = torch.empty_like(W1)
        db1 = torch.empty_like(b1)
        dW2 = torch.empty_like(W2)
        for block in _blocks(a, W1):
            h = _hidden(a, W1, b1, block)  # step 1
            dW2[block] = _sum_over_batch(gelu(h), dz, block)  # step 3
            dh = _hidden_gradient(dz, W2, h, block)  # step 4
            da[block] = _sum_over_hidden(W1, dh, block)  # step 5
            dW1[block] = _sum_over_batch(dh, a, block)
            db1[block] = dh.sum(-1)
        db2 = dz.sum(-1)
        return da, dW1, db1, dW2, db2


PerComponent = Float[Tensor, "C hidden"]
"""Weights or biases between the inner activation and the hidden layer of each component."""
Hidden = Float[Tensor, "block hidden batch"]
"""Hidden activations of a block of components."""


def _blocks(a: Float[Tensor, "C batch"], W1: PerComponent) -> list[slice]:
    """Return slices of components whose hidden activations fit in the cache."""
    C, batch = a.shape
    _, hidden = W1.shape
    limit = _ScalarMLPs.CUDA_BLOCK if a.is_cuda else _ScalarMLPs.BLOCK
    per_component = max(1, batch * hidden)
    size = max(1, limit // per_component)
    starts = range(0, C, size)
    return [slice(start, start + size) for start in starts]


def _hidden(
    a: Float[Tensor, "C batch"], W1: PerComponent, b1: PerComponent, block: slice
) -> Hidden:
    """Return h = W1 a + b1 of a block: step 1."""
    bias = b1[block, :, None]  # [block, hidden, 1]
    weight = W1[block, :, None]  # [block, hidden, 1]
    read = a[block, None, :]  # [block, 1, batch]
    return torch.addcmul(bias, weight, read)


def _output(
    a: Float[Tensor, "C batch"], W1: PerComponent, b1: PerComponent, W2: PerComponent, block: slice
) -> Float[Tensor, "block batch"]:
    """Return W2 · gelu(h) of a block: steps 1 and 2."""
    h = _hidden(a, W1, b1, block)
    return _sum_over_hidden(W2, gelu(h), block)


def _hidden_gradient(
    dz: Float[Tensor, "C batch"], W2: PerComponent, h: Hidden, block: slice
) -> Hidden:
    """Return dh = gelu'(h) (W2 dz) of a block: step 4."""
    written = dz[block, None, :]  # [block, 1, batch]
    weight = W2[block, :, None]  # [block, hidden, 1]
    return torch.ops.aten.gelu_backward(written * weight, h)


def _sum_over_hidden(weight: PerComponent, h: Hidden, block: slice) -> Float[Tensor, "block batch"]:
    """Return the sum over the hidden layer of weight times h."""
    row = weight[block, None, :]  # [block, 1, hidden]
    product = torch.bmm(row, h)  # [block, 1, batch]
    return product[:, 0]


def _sum_over_batch(
    h: Hidden, a: Float[Tensor, "C batch"], block: slice
) -> Float[Tensor, "block hidden"]:
    """Return the sum over the batch of h times a."""
    column = a[block, :, None]  # [block, batch, 1]
    product = torch.bmm(h, column)  # [block, hidden, 1]
    return product[..., 0]


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
        C = a.shape[-1]
        by_position = a.reshape(-1, C)  # [batch, C]
        by_component = by_position.T.to(self.W1.dtype)  # [C, batch]
        by_component = by_component.contiguous()
        with torch.autocast(a.device.type, enabled=False):  # the backward pass has one precision
            z = _ScalarMLPs.apply(by_component, self.W1, self.b1, self.W2, self.b2)
        assert isinstance(z, Tensor)
        z = z.T.contiguous()  # [batch, C]
        return z.reshape(a.shape)


class _VectorMLP(nn.Module):
    """`vector_mlp`: one MLP per component on the site's input."""

    reads_inner = False

    def __init__(self, site: Site, C: int, hidden: int):
        super().__init__()
        d_in = site.d_in
        self.W1 = _normal(C, d_in, hidden, gain=2.0, fan_in=d_in)
        self.b1 = nn.Parameter(torch.zeros(C, hidden))
        self.W2 = _normal(C, hidden, gain=1.0, fan_in=hidden)
        self.b2 = nn.Parameter(torch.zeros(C))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... C"]:
        h = einsum(x, self.W1, "... d_in, C d_in hidden -> ... C hidden")
        h = gelu(h + self.b1)
        z = einsum(h, self.W2, "... C hidden, C hidden -> ... C")
        return z + self.b2


# ---- one MLP for many components -----------------------------------------------------------------


def _shared_network(d_in: int, hidden: int, d_out: int) -> nn.Sequential:
    """Return an MLP with one hidden layer, initialized as D7 says."""
    first = Linear(d_in, hidden)
    last = Linear(hidden, d_out)
    _initialize(first, gain=2.0)
    _initialize(last, gain=1.0)
    return nn.Sequential(first, nn.GELU(), last)


def _initialize(layer: nn.Linear, gain: float) -> None:
    variance = gain / layer.in_features
    std = variance**0.5
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
        networks = zip(self.names, self.networks, strict=True)
        for name, network in networks:
            source = inner if network.reads_inner else inputs
            activations = source[name]
            z[name] = network(activations)
        return z


class GlobalMLP(ImportanceFunction):
    """`global_mlp`: one MLP from the concatenated inputs of all sites to all components."""

    def __init__(self, sites: Mapping[str, tuple[Site, int]], hidden: int):
        super().__init__()
        self.counts: dict[str, int] = {}
        d_in = 0
        for name, (site, C) in sites.items():
            self.counts[name] = C
            d_in += site.d_in
        components = sum(self.counts.values())
        self.network = _shared_network(d_in, hidden, components)

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        vectors = [inputs[name] for name in self.counts]  # [..., d_in] each
        x = torch.cat(vectors, dim=-1)  # [..., Σ d_in]
        z = self.network(x)  # [..., Σ C]
        return by_site(z, self.counts)


class Together(ImportanceFunction):
    """Several importance functions, each for some of the sites."""

    def __init__(self, names: Sequence[str], parts: Sequence[ImportanceFunction]):
        super().__init__()
        self.names = list(names)
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        z = {}
        for part in self.parts:
            z |= part(inputs, inner)
        return {name: z[name] for name in self.names}  # in the order of the sites


def importance_function(
    config: Importance, sites: Mapping[str, tuple[Site, int]]
) -> ImportanceFunction:
    """Build the importance function of a config for sites with their component counts (step 1).

    Embedding sites use `mlp` with every kind, since their input is a token id and not a vector.
    """
    one_per_site = config.kind in SITE_NETWORKS
    networks = {}
    joint_sites = {}
    for name, (site, C) in sites.items():
        if one_per_site or site.kind == "embedding":
            networks[name] = _network(config, site, C)
        else:
            joint_sites[name] = (site, C)
    parts: list[ImportanceFunction] = []
    if networks:
        parts.append(PerSite(networks))
    if joint_sites:
        parts += _joint(config, joint_sites)
    if len(parts) == 1:
        return parts[0]
    return Together(list(sites), parts)


def _network(config: Importance, site: Site, C: int) -> nn.Module:
    """Return the network of one site."""
    if site.kind != "embedding":
        network = SITE_NETWORKS[config.kind]
        return network(site, C, config.hidden)
    if config.kind == "mlp":
        return _ScalarMLP(site, C, config.hidden)
    return _ScalarMLP(site, C, config.embedding_hidden)


def _joint(config: Importance, sites: Mapping[str, tuple[Site, int]]) -> list[ImportanceFunction]:
    """Return functions that read several sites each: one, or one for each chunk of layers."""
    if config.kind == "global_mlp":
        return [GlobalMLP(sites, config.hidden)]
    names = list(sites)
    chunks = chunks_of_layers(names, config.chunk_layers)
    transformers: list[ImportanceFunction] = []
    for chunk in chunks:
        chunk_sites = {name: sites[name] for name in chunk}
        transformer = ImportanceTransformer(chunk_sites, config)
        transformers.append(transformer)
    return transformers
