"""Masks: how far each component is switched off, and where (section M of docs/method.md).

A mask is a *source* × a *route*:

    m = g + (1 − g) · s          m_Δ = s_Δ

with the causal importance g and the source s in [0, 1]. A component of importance 1 stays on, and
one of importance 0 is at the mercy of the source.

1. A *source* gives s at every site, position and component, and s_Δ at every site and position. It
   can be constant, random, or found by an adversary (see `adversaries`).
2. A *route* gives the forward passes, and for each of them the sites and positions that are
   decomposed. Everything else runs as in the target.
3. *Rows*: on CPUs, the masks are built at the decomposed positions only, so that the other
   positions cost nothing.

Sources: SPD (Bushnaq et al., 2025, arXiv 2506.20790) for stochastic masks; VPD (Bushnaq et al.,
2026) for the route `subset` and adversarial sources. This module does not run the model: see
`model`.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from spd_lightning.decomposition.components import Mask

SourceKind = Literal[
    "ones", "ci", "stochastic", "pgd", "persistent_pgd", "mixed", "zeros", "random", "rounded"
]
RouteKind = Literal["all", "layerwise", "subset", "static"]
Sources = dict[str, tuple[Tensor, Tensor]]
"""For each site, the component sources s [..., C] and the delta sources s_Δ [...]."""
Routes = dict[str, Tensor | None]
"""One forward pass: the sites it decomposes, each with a boolean [...] (None: every position)."""
Rows = dict[str, Tensor]
"""For each site, the flat indices [rows] of the positions where masks are built.

They include every decomposed position. The dictionary is empty if masks are built everywhere.
"""
SIZES = 16
"""Maximum number of distinct row counts."""


# ---- sources -------------------------------------------------------------------------------------


def uniform(
    like: Tensor, shape: tuple[int, ...] | torch.Size, generator: torch.Generator | None
) -> Tensor:
    """Draw numbers in [0, 1) of a shape, with the dtype and device of `like`."""
    device = like.device
    dtype = like.dtype
    if device.type == "cpu" and dtype == torch.bfloat16:
        size = torch.Size(shape)
        return _uniform_bfloat16(size, generator)
    return torch.rand(shape, generator=generator, device=device, dtype=dtype)


def _uniform_bfloat16(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Draw multiples of 1/256 in [0, 1), the precision of bfloat16 below 1.

    `torch.rand` draws 64 bits for every such number. This function draws 16.
    """
    count = shape.numel()
    n_words = -(-count // 4)  # an int64 holds four int16; rounded up
    words = torch.empty(n_words, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits
    quarters = words.view(torch.int16)
    numerators = quarters[:count]
    numerators.bitwise_and_(255)  # [count], 0 to 255
    numbers = numerators.to(torch.bfloat16)
    numbers.mul_(2.0**-8)
    return numbers.view(shape)


def masks_from_sources(
    importances: Mapping[str, Tensor], sources: Sources, delta: bool = True
) -> dict[str, Mask]:
    """Return `m = g + (1 − g)·s` and `m_Δ = s_Δ` at every site (step 1).

    Without a delta component, m_Δ is 0 (G6).
    """
    masks = {}
    for name, g in importances.items():
        s, s_delta = sources[name]
        m = torch.addcmul(s, g, 1 - s)  # [..., C]: s + g (1 − s), the same number
        m_delta = s_delta if delta else 0.0
        masks[name] = Mask(m, m_delta)
    return masks


def stochastic_sources(
    importances: Mapping[str, Tensor], generator: torch.Generator | None, binomial: bool = False
) -> Sources:
    """Draw uniform sources for every position and component.

    If binomial, component sources are rounded to 0 or 1; delta sources stay uniform (G5).
    """
    sources = {}
    for name, g in importances.items():
        s = uniform(g, g.shape, generator)  # [..., C]
        if binomial:
            s = s.round()
        positions = g.shape[:-1]
        s_delta = uniform(g, positions, generator)  # [...]
        sources[name] = (s, s_delta)
    return sources


def choose_sources(condition: Mapping[str, Tensor], first: Sources, second: Sources) -> Sources:
    """Return the first sources where the condition [..., 1] of a site is True, else the second."""
    sources = {}
    for site, where in condition.items():
        s, s_delta = first[site]
        other_s, other_delta = second[site]
        chosen_s = torch.where(where, s, other_s)  # [..., C]
        by_position = where[..., 0]  # [...]
        chosen_delta = torch.where(by_position, s_delta, other_delta)  # [...]
        sources[site] = (chosen_s, chosen_delta)
    return sources


def fixed_masks(
    kind: SourceKind,
    importances: Mapping[str, Tensor],
    generator: torch.Generator | None,
    threshold: float,
) -> dict[str, Mask]:
    """Return the masks of a source that is neither stochastic nor adversarial.

    - ones: every component is on.
    - ci: m = g.
    - zeros: everything is off.
    - random: uniform masks that ignore the importances.
    - rounded: m = 1 if g exceeds the threshold, else 0.

    All of them switch the delta component off. With the delta on, `ones` would be the target
    itself (D5).
    """
    masks = {}
    for name, g in importances.items():
        match kind:
            case "ones":
                m = None
            case "ci":
                m = g
            case "zeros":
                m = torch.zeros_like(g)
            case "random":
                m = uniform(g, g.shape, generator)
            case "rounded":
                m = (g > threshold).to(g.dtype)
            case _:
                raise ValueError(f"source '{kind}' is not a fixed one")
        masks[name] = Mask(m, 0.0)
    return masks


# ---- routes --------------------------------------------------------------------------------------


def draw_routes(
    kind: RouteKind,
    importances: Mapping[str, Tensor],
    generator: torch.Generator | None,
    probability: float = 0.5,
) -> Iterator[Routes]:
    """Yield the forward passes of a route (step 2).

    - all: one pass that decomposes everything.
    - layerwise: one pass for each site, which decomposes this site only.
    - subset: one pass. At each position, the number of decomposed sites is uniform on 1..L, and
      all subsets of that size are equally likely (M1).
    - static: one pass. Each site is decomposed at each position with the given probability.
    """
    names = list(importances)
    like = next(iter(importances.values()))
    positions = like.shape[:-1]
    match kind:
        case "all":
            yield dict.fromkeys(names)
        case "layerwise":
            for name in names:
                yield {name: None}
        case "subset":
            L = len(names)
            numbers = uniform(like, (L, *positions), generator)
            order = numbers.argsort(0)  # [L, ...]: a random order of the sites
            rank = order.argsort(0)  # [L, ...]: the place of each site in this order
            device = like.device
            size = torch.randint(1, L + 1, positions, generator=generator, device=device)
            decomposed = rank < size  # [L, ...]
            yield dict(zip(names, decomposed, strict=True))
        case "static":
            route = {}
            for name in names:
                numbers = uniform(like, positions, generator)
                route[name] = numbers < probability
            yield route


def widened(route: Routes, samples: Bool[Tensor, " batch"]) -> Routes:
    """Return the route with some samples of the batch decomposed at every site and position."""
    wide = {}
    for name, where in route.items():
        if where is None:
            wide[name] = None
        else:
            ones = [1] * (where.ndim - 1)
            wide[name] = where | samples.view(-1, *ones)  # [batch, ...]
    return wide


# ---- rows ----------------------------------------------------------------------------------------


def decomposed_rows(route: Routes) -> Rows:
    """Return the flat indices of the positions that a route decomposes, plus padding (step 3).

    The result is empty if the route decomposes every position of a site, or if the route is not on
    a CPU: other devices would have to wait for the indices.
    """
    rows = {}
    restricted = _restricted(route)
    for name, where in restricted.items():
        flat = where.flatten()  # [positions]
        rows[name] = pad_row_count(flat)
    return rows


def _restricted(route: Routes) -> dict[str, Tensor]:
    """Return the route if it restricts every site, on a CPU; else an empty one."""
    restricted = {}
    for name, where in route.items():
        if where is None or where.device.type != "cpu":
            return {}
        restricted[name] = where
    return restricted


def pad_row_count(where: Bool[Tensor, " positions"]) -> Int[Tensor, " rows"]:
    """Return the indices where `where` is True, and others up to one of 16 round numbers.

    Kernels of matrix products are built for every new size, which takes longer than the product.
    """
    indices = _indices(where)
    step = max(1, len(where) // SIZES)
    missing = -len(indices) % step  # up to the next multiple of the step
    if missing == 0:
        return indices
    others = _indices(~where)
    padding = others[:missing]
    return torch.cat([indices, padding])


def _indices(where: Bool[Tensor, " positions"]) -> Int[Tensor, " rows"]:
    """Return the indices where `where` is True."""
    coordinates = where.nonzero()  # [rows, 1]
    return coordinates[:, 0]


def gathered(values: Mapping[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Return the values of every site at its rows: [rows, C] from [..., C].

    On a CPU, the backward pass of `index_select` takes a fifth of the time of indexing.
    """
    selected = {}
    for name, value in values.items():
        if name in rows:
            flat = value.flatten(0, -2)  # [positions, C]
            value = flat.index_select(0, rows[name])
        selected[name] = value
    return selected
