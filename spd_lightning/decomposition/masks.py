"""Masks: what is switched off, and where. A mask is a source × a route (section M of
docs/method.md).

    m = g + (1 − g)·s        g: causal importance, s in [0, 1]: the source            m_Δ = s_Δ

A *source* says how far what is not needed is switched off: not at all, fully, at random, or by an
adversary. A *route* says which sites and positions are decomposed in a forward pass, the others
running as in the target.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from spd_lightning.decomposition.components import Mask

SourceKind = Literal[
    "ones", "ci", "stochastic", "pgd", "persistent_pgd", "mixed", "zeros", "random", "rounded"
]
RouteKind = Literal["all", "layerwise", "subset", "static"]
Sources = dict[str, tuple[Tensor, Tensor]]
"""Component source s [..., C] and delta source s_Δ [...] of every site."""
Routes = dict[str, Tensor | None]
"""The sites decomposed in one forward pass, each with its positions (None: all of them)."""
Rows = dict[str, Tensor]
"""The flat numbers of positions at each site, among them all that are decomposed; empty for whole
batches.
"""
SIZES = 16
"""So many different numbers of them there are at most."""


def uniform(
    like: Tensor, shape: tuple[int, ...] | torch.Size, generator: torch.Generator | None
) -> Tensor:
    """Numbers in [0, 1) of that shape, of the kind and place of `like`."""
    if (
        like.dtype == torch.bfloat16 and like.device.type == "cpu"
    ):  # torch draws 64 bits for each of these
        count = torch.Size(shape).numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(
            -(2**63), None, generator=generator
        )
        halves = bits.view(torch.int16)[:count].bitwise_and_(
            255
        )  # its 8 bits are all that they hold below 1
        return halves.to(torch.bfloat16).mul_(2.0**-8).view(shape)
    return torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)


def masks_from_sources(
    importances: Mapping[str, Tensor], sources: Sources, delta: bool = True
) -> dict[str, Mask]:
    """`m = g + (1 − g)·s` and `m_Δ = s_Δ` at every site; without a delta component m_Δ is 0
    (G6).
    """
    masks = {}
    for name, g in importances.items():
        s, s_delta = sources[name]
        masks[name] = Mask(torch.addcmul(s, g, 1 - s), s_delta if delta else 0.0)
    return masks


def stochastic_sources(
    importances: Mapping[str, Tensor], generator: torch.Generator | None, binomial: bool = False
) -> Sources:
    """Fresh uniform sources per position and component; in {0, 1} when binomial, the delta's
    uniform still (G5).
    """
    drawn = {}
    for name, g in importances.items():
        s = uniform(g, g.shape, generator)
        drawn[name] = (s.round() if binomial else s, uniform(g, g.shape[:-1], generator))
    return drawn


def fixed_masks(
    kind: SourceKind,
    importances: Mapping[str, Tensor],
    generator: torch.Generator | None,
    threshold: float,
) -> dict[str, Mask]:
    """Masks of the sources that need neither a fresh stochastic draw nor an adversary.

    ones: every component on. ci: m = g. zeros: nothing on. random: uniform masks, whatever the
    importance. rounded: m = 1 where g exceeds the threshold, else 0. All of them switch the delta
    component off: with it on, `ones` would be the target itself (D5).
    """
    match kind:
        case "ones":
            return {name: Mask(None, 0.0) for name in importances}
        case "ci":
            return {name: Mask(g, 0.0) for name, g in importances.items()}
        case "zeros":
            return {name: Mask(torch.zeros_like(g), 0.0) for name, g in importances.items()}
        case "random":
            return {
                name: Mask(uniform(g, g.shape, generator), 0.0) for name, g in importances.items()
            }
        case "rounded":
            return {name: Mask((g > threshold).to(g.dtype), 0.0) for name, g in importances.items()}
        case _:
            raise ValueError(f"source '{kind}' is not a fixed one")


def draw_routes(
    kind: RouteKind,
    importances: Mapping[str, Tensor],
    generator: torch.Generator | None,
    probability: float = 0.5,
) -> Iterator[Routes]:
    """The forward passes a route asks for, each as the sites it decomposes and where.

    all: one pass, everything decomposed. layerwise: one pass a site, that site alone. subset: one
    pass, at each position a uniformly random number of sites, chosen uniformly (M1). static: one
    pass, each site and position with a given probability.
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
            rank = uniform(like, (len(names), *positions), generator).argsort(0).argsort(0)
            size = torch.randint(
                1, len(names) + 1, positions, generator=generator, device=like.device
            )
            yield dict(zip(names, rank < size, strict=True))
        case "static":
            yield {name: uniform(like, positions, generator) < probability for name in names}


def decomposed_rows(route: Routes) -> Rows:
    """The positions that a route decomposes, by number, so that the others cost nothing; and a few
    of these.

    Empty where it decomposes all, and on other devices than a processor: they would have to wait
    for the numbers.
    """
    if any(where is None or where.device.type != "cpu" for where in route.values()):
        return {}
    return {
        name: pad_row_count(where.flatten()) for name, where in route.items() if where is not None
    }


def pad_row_count(where: Tensor) -> Tensor:
    """The positions where that is true, and others up to a round number, one of 16.

    Kernels of matrix products are rebuilt for every new size, which takes longer than such a
    product.
    """
    found = where.nonzero()[:, 0]
    missing = -len(found) % max(1, len(where) // SIZES)
    return torch.cat([found, (~where).nonzero()[:missing, 0]]) if missing else found


def gathered(values: Mapping[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Values [..., C] of every site at some positions there ([rows, C]).

    `index_select` and not an index: on a processor its backward pass takes a fifth of the time.
    """
    return {
        n: v if n not in rows else v.flatten(0, -2).index_select(0, rows[n])
        for n, v in values.items()
    }


def widened(route: Routes, samples: Tensor) -> Routes:
    """Return the route with some samples of the batch decomposed at every site and position."""
    wide = {}
    for name, where in route.items():
        wide[name] = where if where is None else where | samples.view(-1, *[1] * (where.ndim - 1))
    return wide
