"""Small targets for the tests of the method, each with its forward pass written twice.

`forward` is what the decomposition patches; `explicit(batch, at)` is the same computation on plain
functions, where `at(name, x)` says what the site of that name gives. `naive` fills it with D1, D3
and D4 as the laws are printed.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.model import ComponentModel

At = Callable[[str, Tensor], Tensor]


class Perceptron(nn.Module):
    """Vectors; a linear map with bias, one without."""

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
    """Token ids; an embedding, a Conv1D of HuggingFace, identities before the last map, positions
    that mix.
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
    """Vectors at positions; three parallel branches, a norm and an activation that are used twice,
    a tuple.
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
        n = self.norm(mixed)  # also read beside the sites
        return x + n + at("down", self.act(at("up", at("up.pre_identity", n))))

    def batch(self, rows=3):
        return torch.randn(rows, 4, 4).double()


class InPlace(nn.Module):
    """Vectors; changes a site's output by hand, by a module and by a sum, and a site's input when
    it has been read.
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
    """Vectors; in place on no recorded tensor but through a module whose answer nobody takes."""

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


def decomposed(network: type, seed: int = 0, **settings) -> ComponentModel:
    """A component model of a fresh network with its own patterns, in double precision."""
    torch.manual_seed(seed)
    return ComponentModel(network(), network.patterns, **settings).double()


def naive(
    model: ComponentModel, batch: Tensor, masks: Mapping[str, Mask], seen: dict | None = None
) -> Tensor:
    """The masked run by the printed laws: explicit Δ, every component its own matrix, nothing
    shared (D1, D3, D4).

    seen: where given, receives the input of every site.
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
    """A mask that holds some positions alone, over all of them; what it does not hold is zero."""
    if mask.rows is None:
        return mask

    def at_all(values):
        if not isinstance(values, Tensor):
            return values
        whole = values.new_zeros(positions.numel(), *values.shape[1:])
        return whole.index_copy(0, mask.rows, values).view(*positions, *values.shape[1:])

    return Mask(at_all(mask.components), at_all(mask.delta), mask.route)


def printed_weight(target: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """W [d_out, d_in] and b of a site, read from the network itself; b is zeros where there is
    none.
    """
    module = target.get_submodule(name.removesuffix(".pre_identity"))
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
