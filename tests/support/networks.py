"""Small targets for tests of the method, each with two implementations of its forward pass.

The decomposition patches `forward`. `explicit(batch, at)` is the same computation with plain
functions; `at(name, x)` computes the output of a site. `naive` runs `explicit` with a literal
implementation of the laws D1, D3 and D4 for `at`.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.model import ComponentModel

At = Callable[[str, Tensor], Tensor]


class Perceptron(nn.Module):
    """A network on vectors: a linear map with a bias, and one without."""

    patterns: ClassVar = {"*": 5}

    def __init__(self, d_in=4, d_hidden=3, d_out=2, bias=True):
        super().__init__()
        self.first = nn.Linear(d_in, d_hidden, bias=bias)
        self.second = nn.Linear(d_hidden, d_out, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    def explicit(self, x, at: At):
        return at("second", torch.tanh(at("first", x)))

    def batch(self, rows=6):
        return torch.randn(rows, self.first.in_features).double()


class Tokens(nn.Module):
    """A network on token ids that mixes positions.

    It has an embedding, a Conv1D of HuggingFace, and an identity site before the last map.
    """

    patterns: ClassVar = {"embed": 9, "conv": 4, "readout": 6, "readout.pre_identity": 7}

    def __init__(self, vocab=7, d=4):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.conv = Conv1D(d + 1, d)
        self.readout = nn.Linear(d + 1, vocab)
        nn.init.normal_(self.conv.weight)
        nn.init.normal_(self.conv.bias)

    def forward(self, tokens):
        return self.readout(F.gelu(self.conv(self.embed(tokens).cumsum(1))))

    def explicit(self, tokens, at: At):
        h = at("readout.pre_identity", F.gelu(at("conv", at("embed", tokens).cumsum(1))))
        return at("readout", h)

    def batch(self, rows=3):
        return torch.randint(0, 7, (rows, 5))


class Branches(nn.Module):
    """A network on vectors at positions, with three parallel branches.

    A norm and an activation are used twice, and an LSTM returns a tuple.
    """

    patterns: ClassVar = {"q": 3, "k": 4, "v": 5, "o": 6, "up": 4, "down": 3, "up.pre_identity": 2}

    def __init__(self, d=4):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.act = nn.Tanh()
        self.mix = nn.LSTM(d, d, batch_first=True)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=name in "vo") for name in "qkvo")
        self.up = nn.Linear(d, 2 * d)
        self.down = nn.Linear(2 * d, d)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.explicit(
            x, lambda name, h: h if name == "up.pre_identity" else getattr(self, name)(h)
        )

    def explicit(self, x, at: At):
        n = self.norm(self.act(x))
        q, k, v = (at(name, n) for name in "qkv")
        x = x + at("o", torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        mixed, _ = self.mix(x)
        n = self.norm(mixed)  # also used outside the sites
        return x + n + at("down", self.act(at("up", at("up.pre_identity", n))))

    def batch(self, rows=3):
        return torch.randn(rows, 4, 4).double()


class InPlace(nn.Module):
    """A network on vectors with in-place operations.

    The output of a site is changed by an addition, by a module and by a sum; the input of a site is
    changed after the site has read it.
    """

    patterns: ClassVar = {"*": 5}

    def __init__(self, d=4):
        super().__init__()
        self.a = nn.Linear(d, d)
        self.b = nn.Linear(d, d, bias=False)
        self.c = nn.Linear(d, d)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.a(x)
        h += 1
        self.relu(h)
        r = self.b(h)
        r += h
        y = self.c(r)
        r -= 3
        return y * r

    def explicit(self, x, at: At):
        h = torch.relu(at("a", x) + 1)
        r = at("b", h) + h
        return at("c", r) * (r - 3)

    def batch(self, rows=6):
        return torch.randn(rows, 4).double()


class IgnoredAnswer(nn.Module):
    """A network on vectors that uses an in-place module and ignores its return value.

    The module does not change any recorded tensor.
    """

    patterns: ClassVar = {"*": 5}

    def __init__(self, d=4):
        super().__init__()
        self.a = nn.Linear(d, d)
        self.c = nn.Linear(d, d)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.a(x) * 2
        self.relu(h)
        return self.c(h.sin()) + h

    def explicit(self, x, at: At):
        h = torch.relu(at("a", x) * 2)
        return at("c", h.sin()) + h

    def batch(self, rows=6):
        return torch.randn(rows, 4).double()


NETWORKS = (Perceptron, Tokens, Branches, InPlace, IgnoredAnswer)


class Decomposed(ComponentModel):
    """A component model whose target is one of these networks."""

    target: Any


def decomposed(network: type, seed: int = 0, **settings) -> Decomposed:
    """Return a component model of a new network with its `patterns`, in double precision."""
    torch.manual_seed(seed)
    return Decomposed(network(), network.patterns, **settings).double()


def naive(
    model: Decomposed, batch: Tensor, masks: Mapping[str, Mask], seen: dict | None = None
) -> Tensor:
    """Return the output of a masked run, computed literally as in the laws D1, D3 and D4.

    Δ is explicit, every component is a separate matrix, and no intermediate result is shared.

    Args:
        model: a component model of one of these networks.
        batch: the inputs.
        masks: the masks by site; other sites are not masked.
        seen: if given, is filled with the input of every site.
    """

    def at(name: str, x: Tensor) -> Tensor:
        if name not in model.sites:
            return x
        if seen is not None:
            seen[name] = x
        W, b = printed_weight(model.target, name)
        x = F.one_hot(x, W.shape[1]).to(W.dtype) if x.dtype == torch.long else x
        own = x @ W.T + b
        if name not in masks:
            return own
        mask = spread(masks[name], x.shape[:-1])
        V = model[name].V
        U = model[name].U
        m = (
            torch.ones(*x.shape[:-1], V.shape[1]).to(x)
            if mask.components is None
            else mask.components
        )
        delta = torch.as_tensor(mask.delta).to(x).expand(x.shape[:-1])
        matrices = torch.stack([torch.outer(U[c], V[:, c]) for c in range(len(U))])
        y = sum(m[..., c, None] * (x @ matrices[c].T) for c in range(len(U)))
        y = y + delta[..., None] * (x @ (W - matrices.sum(0)).T) + b
        route = mask.route
        return (
            y if route is None else route[..., None].to(x) * y + (1 - route[..., None].to(x)) * own
        )

    return model.target.explicit(batch, at)


def spread(mask: Mask, positions: torch.Size) -> Mask:
    """Return a mask over all positions for one over some of them; the others are zero."""
    rows = mask.rows
    if rows is None:
        return mask

    def at_all(values):
        if not isinstance(values, Tensor):
            return values
        whole = values.new_zeros(positions.numel(), *values.shape[1:])
        return whole.index_copy(0, rows, values).view(*positions, *values.shape[1:])

    return Mask(at_all(mask.components), at_all(mask.delta), mask.route)


def printed_weight(target: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return W [d_out, d_in] and b of a site, read from the network; a missing b is zeros."""
    module: Any = target.get_submodule(name.removesuffix(".pre_identity"))
    match module:
        case _ if name.endswith(".pre_identity"):
            W = torch.eye(module.weight.shape[1], dtype=module.weight.dtype)
            return W, W.new_zeros(len(W))
        case Conv1D():
            return module.weight.T, module.bias
        case nn.Embedding():
            return module.weight.T, module.weight.new_zeros(module.weight.shape[1])
        case _:
            return module.weight, module.weight.new_zeros(
                len(module.weight)
            ) if module.bias is None else module.bias
