"""Metrics: how good a decomposition is (section E of docs/method.md).

There are three kinds:

1. *Against known truth*. MMCS and ML2R compare components with the columns of a weight. Identity
   and dense error compare the importances of single features with an ideal pattern.
2. *Of importances*: firing and L0, the number of components that fire at a position.
3. *Of the output* under the six maskings of section E.

Sources: SPD (Bushnaq et al., 2025, arXiv 2506.20790) for MMCS, ML2R and the maskings. All
functions are pure. Sums over batches and devices are left to the caller.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.masks import fixed_masks, masks_from_sources, stochastic_sources
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.replay import Clean

Masking = Literal["unmasked", "ci", "stochastic", "random", "rounded", "zeros"]
MASKINGS: tuple[Masking, ...] = get_args(Masking)
TOLERANCE = 0.1
"""An importance counts as 0 or 1 if it is at most this far from it."""
REMNANT = 0.05
"""A component is a remnant if its norm is at most this share of the largest at its site."""


# ---- against known truth -------------------------------------------------------------------------


def component_norms(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> Float[Tensor, " C"]:
    """Return the Frobenius norm of each component, `‖V[:, c]‖ · ‖U[c]‖`."""
    return V.norm(dim=0) * U.norm(dim=1)


def sizeable(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> Bool[Tensor, " C"]:
    """Mark the components whose norm is above 5 % of the site's largest."""
    norms = component_norms(V, U)  # [C]
    largest = norms.max()
    large = ~(norms <= REMNANT * largest)
    return large | ~(largest > 0)  # all components if all norms are zero or one is not a number


def column_match(
    W: Float[Tensor, "d_out d_in"], V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return MMCS and ML2R: does one component write each column of W? (SPD, section 3)

    1. Take the components that are not remnants. A remnant could have the best cosine and then
       spoil the ratio of norms.
    2. For column j, find the component whose column `U[c] V[j, c]` has the highest cosine with
       `W[:, j]`.
    3. MMCS is the mean of these cosines over the columns of W that are not zero.
    4. ML2R is the mean of the ratio of norms, `‖U[c] V[j, c]‖ / ‖W[:, j]‖`.
    """
    alive = sizeable(V, U)  # step 1
    reads = V[:, alive]  # [d_in, alive]
    writes = U[alive]  # [alive, d_out]
    directions = torch.nn.functional.normalize(writes, dim=1)
    columns = torch.nn.functional.normalize(W, dim=0)
    cosine = (directions @ columns).T * reads.sign()  # [d_in, alive]
    best = cosine.argmax(dim=1)  # [d_in]: step 2
    best_cosine = cosine.gather(1, best[:, None])[:, 0]  # [d_in]
    best_read = reads.gather(1, best[:, None])[:, 0]  # [d_in]
    sizes = best_read.abs() * writes.norm(dim=1)[best]  # [d_in]
    column_norms = W.norm(dim=0)  # [d_in]
    nonzero = column_norms > 0
    mmcs = best_cosine[nonzero].mean()  # step 3
    ml2r = (sizes / column_norms)[nonzero].mean()  # step 4
    return mmcs, ml2r


def identity_order(importances: Float[Tensor, "features C"]) -> Int[Tensor, " C"]:
    """Return the order of components in which importances look most like the identity matrix.

    The Hungarian algorithm assigns components to features. Components without a feature follow in
    the order of their total importance, the largest first.
    """
    given = importances.detach().cpu().nan_to_num()
    features, components = linear_sum_assignment(given.numpy(), maximize=True)
    assigned = torch.as_tensor(components[features.argsort()])
    taken = set(assigned.tolist())
    count = importances.shape[1]
    free = [c for c in range(count) if c not in taken]
    rest = torch.tensor(free, dtype=torch.long)
    total = given.sum(0)  # [C]
    by_total = total[rest].argsort(descending=True)
    return torch.cat([assigned, rest[by_total]])


def identity_error(importances: Float[Tensor, "features C"]) -> int:
    """Return the number of importances that differ from the identity matrix by more than 0.1.

    Row i holds the importances when feature i alone is fed. Components are permuted for the best
    match; if there are fewer components than features, components of importance 0 are added.
    """
    features, C = importances.shape
    missing = max(0, features - C)
    padded = torch.nn.functional.pad(importances.detach().cpu(), (0, missing))
    ordered = padded[:, identity_order(padded)]
    error = (ordered - torch.eye(*ordered.shape)).abs()
    wrong = ~(error <= TOLERANCE)  # also if it is not a number
    return int(wrong.sum())


def dense_error(importances: Float[Tensor, "features C"], k: int) -> int:
    """Return how far importances are from k components that serve all features, and no others.

    Components are ordered by their total importance. Each of the first k counts one if it never
    reaches an importance of 0.9. Each importance above 0.1 of the other components counts one.
    """
    order = importances.sum(0).argsort(descending=True)
    ordered = importances[:, order]
    needed = ordered[:, :k]  # [features, k]
    others = ordered[:, k:]  # [features, C − k]
    missing = max(0, k - ordered.shape[1])
    idle = (needed.amax(0) < 1 - TOLERANCE).sum()
    surplus = (others > TOLERANCE).sum()
    return int(idle + missing + surplus)


# ---- importances ---------------------------------------------------------------------------------


def firings(importances: Float[Tensor, "... C"], threshold: float) -> Bool[Tensor, "... C"]:
    """Return where components fire: where the importance exceeds the threshold."""
    return importances > threshold


def l0(importances: Float[Tensor, "... C"], threshold: float) -> Float[Tensor, ""]:
    """Return the mean number of components that fire at a position."""
    count = firings(importances, threshold).sum(-1)  # [...]
    return count.double().mean()


# ---- output under the maskings -------------------------------------------------------------------


class Part(NamedTuple):
    """One of several equal parts of a batch: its index, and the number of parts."""

    rank: int = 0
    world: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """Return the rows of this part of a tensor that belongs to the whole batch."""
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
    """Yield the output under each of the six maskings of section E, with everything decomposed.

    `unmasked` has every component on and the delta component off. With the delta on, it would be
    the target (D5).

    Args:
        model: the decomposed model.
        batch: inputs; with several devices, this device's part.
        clean: the clean run of the batch.
        importances: g [..., C] of every site.
        generator: has the same state on all devices. Draws are made for the whole batch, so that
            they do not depend on how it is divided.
        threshold: τ of the masking `rounded`.
        part: the part of the whole batch that `batch` is.
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
    """Return the masks of one masking."""
    if masking == "unmasked":
        return fixed_masks("ones", importances, None, threshold)
    if masking not in ("stochastic", "random"):
        return fixed_masks(masking, importances, None, threshold)
    masks: dict[str, Mask] = {}
    for name, g in importances.items():  # one at a time: a draw for the whole batch is large
        whole = {name: g[:1].expand(part.world * len(g), *g.shape[1:])}  # for its shape
        if masking == "random":
            drawn = fixed_masks("random", whole, generator, threshold)[name].components
            assert drawn is not None
            masks[name] = Mask(part.of(drawn), 0.0)
        else:
            s, s_delta = stochastic_sources(whole, generator)[name]
            sources = {name: (part.of(s), part.of(s_delta))}
            masks |= masks_from_sources({name: g}, sources, delta)
    return masks
