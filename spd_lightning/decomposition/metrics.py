"""Figures that say how good a decomposition is (section E of docs/method.md).

Three kinds: against known truth (MMCS, ML2R, identity and dense error), about importances (L0,
firing, mean), and about the output under the maskings of section M. All are pure functions; sums
over batches and devices are the caller's.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.masks import fixed_masks, masks_from_sources, stochastic_sources
from spd_lightning.decomposition.model import Clean, ComponentModel

Masking = Literal["unmasked", "ci", "stochastic", "random", "rounded", "zeros"]
MASKINGS: tuple[Masking, ...] = get_args(Masking)
TOLERANCE = 0.1
"""How far an importance may be from 0 or 1 and still count as such."""
REMNANT = 0.05
"""The share of its site's largest norm up to which a component is but a remnant."""


# ---- against known truth -------------------------------------------------------------------------


def component_norms(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> Float[Tensor, " C"]:
    """Frobenius norm of each component's matrix `U[c]ᵀ V[:, c]ᵀ`."""
    return V.norm(dim=0) * U.norm(dim=1)


def sizeable(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> Bool[Tensor, " C"]:
    """Mark the components whose norm is above 5 % of the site's largest."""
    norms = component_norms(V, U)
    return ~(norms <= REMNANT * norms.max()) | ~(
        norms.max() > 0
    )  # all, where all are zero or not a number


def column_match(
    W: Float[Tensor, "d_out d_in"], V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """MMCS and ML2R: does one component write each column of W, in direction and in size? (SPD,
    section 3)

    For column j, the component whose column `U[c] V[j, c]` has the highest cosine with `W[:, j]`;
    returns the mean cosine and the mean ratio of norms. Only sizeable components compete, or a
    remnant could win the cosine and spoil the ratio. Columns of W that are zero are left out.
    """
    alive = sizeable(V, U)
    directions = torch.nn.functional.normalize(U[alive], dim=1)
    columns = torch.nn.functional.normalize(W, dim=0)
    cosine = (directions @ columns).T * V[:, alive].sign()
    best = cosine.argmax(dim=1)
    sizes = V[:, alive].gather(1, best[:, None])[:, 0].abs() * U[alive].norm(dim=1)[best]
    real = W.norm(dim=0) > 0
    top = cosine.gather(1, best[:, None])[:, 0]
    return top[real].mean(), (sizes / W.norm(dim=0))[real].mean()


def identity_order(importances: Float[Tensor, "features C"]) -> Int[Tensor, " C"]:
    """The order of components that makes a matrix of importances look most like the identity
    (Hungarian assignment).

    Components that match no feature follow, the most important first.
    """
    given = importances.detach().cpu().nan_to_num()
    rows, columns = linear_sum_assignment(given.numpy(), maximize=True)
    first = torch.as_tensor(columns[rows.argsort()])
    rest = torch.tensor(
        [c for c in range(importances.shape[1]) if c not in set(first.tolist())], dtype=torch.long
    )
    total = given.sum(0)
    return torch.cat([first, rest[total[rest].argsort(descending=True)]])


def identity_error(importances: Float[Tensor, "features C"]) -> int:
    """How many importances, features fed alone and components permuted, are off the identity by
    more than 0.1.
    """
    features, C = importances.shape
    padded = torch.nn.functional.pad(
        importances.detach().cpu(), (0, max(0, features - C))
    )  # idle ones where few
    ordered = padded[:, identity_order(padded)]
    return int((~((ordered - torch.eye(*ordered.shape)).abs() <= TOLERANCE)).sum())


def dense_error(importances: Float[Tensor, "features C"], k: int) -> int:
    """How far importances are from k components that serve all features together and none besides.

    Columns are ordered by their sums: each of the first k without an entry of at least 0.9 counts
    one, and so does every entry above 0.1 after them.
    """
    ordered = importances[:, importances.sum(0).argsort(descending=True)]
    idle = (ordered[:, :k].amax(0) < 1 - TOLERANCE).sum() + max(0, k - ordered.shape[1])
    return int(idle + (ordered[:, k:] > TOLERANCE).sum())


# ---- importances ---------------------------------------------------------------------------------


def firings(importances: Float[Tensor, "... C"], threshold: float) -> Bool[Tensor, "... C"]:
    """Where components fire: importance above the threshold."""
    return importances > threshold


def l0(importances: Float[Tensor, "... C"], threshold: float) -> Float[Tensor, ""]:
    """Mean number of components that fire at a position."""
    return firings(importances, threshold).sum(-1).double().mean()


# ---- output under the maskings -------------------------------------------------------------------


class Part(NamedTuple):
    """The share of a batch that one device holds: its index, and the number of equal shares."""

    rank: int = 0
    world: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """This part of the rows of something that belongs to the whole batch."""
        return whole.chunk(self.world)[self.rank]


def masked_outputs(
    model: ComponentModel,
    batch: Tensor,
    clean: Clean,
    importances: Mapping[str, Tensor],
    generator: torch.Generator | None,
    threshold: float,
    part: Part = Part(),  # noqa: B008
) -> Iterator[tuple[Masking, Tensor]]:
    """The model's output under each of the six maskings of section E, everything decomposed; one at
    a time.

    `unmasked` has every component on and the delta component off; with that on too, it would be the
    target (D5).

    generator: where two devices hold parts of a batch, the same on both; draws are made for the
        whole batch, so that they do not depend on how it is cut.
    """
    for masking in MASKINGS:
        masks = _masks(masking, importances, generator, threshold, model.delta, part)
        yield masking, model.masked(batch, masks, clean)


def _masks(
    masking: Masking,
    importances: Mapping[str, Tensor],
    generator: torch.Generator | None,
    threshold: float,
    delta: bool,
    part: Part,
) -> dict[str, Mask]:
    if masking == "unmasked":
        return fixed_masks("ones", importances, None, threshold)
    if masking not in ("stochastic", "random"):
        return fixed_masks(masking, importances, None, threshold)
    masks: dict[str, Mask] = {}
    for name, g in importances.items():  # a draw for the whole batch is kept for one site at a time
        whole = {name: g[:1].expand(part.world * len(g), *g.shape[1:])}
        if masking == "random":
            drawn = fixed_masks("random", whole, generator, threshold)[name].components
            assert drawn is not None
            masks[name] = Mask(part.of(drawn), 0.0)
        else:
            s, s_delta = stochastic_sources(whole, generator)[name]
            masks |= masks_from_sources({name: g}, {name: (part.of(s), part.of(s_delta))}, delta)
    return masks
