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
from torch.nn.functional import normalize, pad

from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.masks import (
    fixed_masks,
    masks_from_sources,
    stochastic_sources,
    uniform,
)
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
    read_norms = V.norm(dim=0)  # [C]
    write_norms = U.norm(dim=1)  # [C]
    return read_norms * write_norms


def sizeable(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> Bool[Tensor, " C"]:
    """Mark the components whose norm is above 5 % of the site's largest."""
    norms = component_norms(V, U)  # [C]
    largest = norms.max()
    bound = REMNANT * largest
    remnants = norms <= bound
    comparable = largest > 0  # False if all norms are zero or one is not a number
    return ~remnants | ~comparable  # all components if they are not comparable


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
    directions = normalize(writes, dim=1)  # [alive, d_out]
    columns = normalize(W, dim=0)  # [d_out, d_in]
    overlap = directions @ columns  # [alive, d_in]
    cosine = overlap.T * reads.sign()  # [d_in, alive]
    best = cosine.argmax(dim=1)  # [d_in]: step 2
    column = torch.arange(len(best), device=best.device)  # [d_in]
    best_cosine = cosine[column, best]  # [d_in]
    best_read = reads[column, best]  # [d_in]
    write_norms = writes.norm(dim=1)  # [alive]
    sizes = best_read.abs() * write_norms[best]  # [d_in]
    column_norms = W.norm(dim=0)  # [d_in]
    ratios = sizes / column_norms  # [d_in]
    nonzero = column_norms > 0
    mmcs = best_cosine[nonzero].mean()  # step 3
    ml2r = ratios[nonzero].mean()  # step 4
    return mmcs, ml2r


def identity_order(importances: Float[Tensor, "features C"]) -> Int[Tensor, " C"]:
    """Return the order of components in which importances look most like the identity matrix.

    The Hungarian algorithm assigns components to features. Components without a feature follow in
    the order of their total importance, the largest first.
    """
    finite = importances.detach().cpu().nan_to_num()
    _, C = finite.shape
    features, components = linear_sum_assignment(finite.numpy(), maximize=True)
    by_feature = features.argsort()
    assigned = torch.as_tensor(components[by_feature])
    taken = set(assigned.tolist())
    free = [c for c in range(C) if c not in taken]
    rest = torch.tensor(free, dtype=torch.long)
    total = finite.sum(0)  # [C]
    by_total = total[rest].argsort(descending=True)
    ordered_rest = rest[by_total]
    return torch.cat([assigned, ordered_rest])


def identity_error(importances: Float[Tensor, "features C"]) -> int:
    """Return the number of importances that differ from the identity matrix by more than 0.1.

    Row i holds the importances when feature i alone is fed. Components are permuted for the best
    match; if there are fewer components than features, components of importance 0 are added.
    """
    features, C = importances.shape
    missing = max(0, features - C)
    on_cpu = importances.detach().cpu()
    padded = pad(on_cpu, (0, missing))
    order = identity_order(padded)
    ordered = padded[:, order]
    identity = torch.eye(*ordered.shape)
    error = (ordered - identity).abs()
    right = error <= TOLERANCE
    wrong = ~right  # also if it is not a number
    return int(wrong.sum())


def dense_error(importances: Float[Tensor, "features C"], k: int) -> int:
    """Return how far importances are from k components that serve all features, and no others.

    Components are ordered by their total importance. Each of the first k counts one if it never
    reaches an importance of 0.9. Each importance above 0.1 of the other components counts one.
    """
    _, C = importances.shape
    missing = max(0, k - C)
    total = importances.sum(0)  # [C]
    order = total.argsort(descending=True)
    ordered = importances[:, order]
    needed = ordered[:, :k]  # [features, k]
    others = ordered[:, k:]  # [features, C − k]
    largest = needed.amax(0)  # [k]
    idle = largest < 1 - TOLERANCE
    surplus = others > TOLERANCE
    errors = idle.sum() + missing + surplus.sum()
    return int(errors)


# ---- importances ---------------------------------------------------------------------------------


def firings(importances: Float[Tensor, "... C"], threshold: float) -> Bool[Tensor, "... C"]:
    """Return where components fire: where the importance exceeds the threshold."""
    return importances > threshold


def l0(importances: Float[Tensor, "... C"], threshold: float) -> Float[Tensor, ""]:
    """Return the mean number of components that fire at a position."""
    fired = firings(importances, threshold)  # [..., C]
    count = fired.sum(-1).double()  # [...]
    return count.mean()


# ---- output under the maskings -------------------------------------------------------------------


class DeviceShare(NamedTuple):
    """The share of a batch that one of several devices has: its index, and their number."""

    rank: int = 0
    world: int = 1

    def take(self, whole: Tensor) -> Tensor:
        """Return the rows of this share, from a tensor that belongs to the whole batch."""
        shares = whole.chunk(self.world)
        return shares[self.rank]


def masked_outputs(
    model: ComponentModel,
    batch: Tensor,
    clean: Clean,
    importances: Mapping[str, Tensor],
    generator: torch.Generator | None,
    threshold: float,
    share: DeviceShare = DeviceShare(),  # noqa: B008
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
        share: the share of the whole batch that `batch` is.
    """
    for masking in MASKINGS:
        masks = _masks(masking, importances, generator, threshold, model.delta, share)
        output = model.masked(batch, masks, clean)
        yield masking, output


def _masks(
    masking: Masking,
    importances: Mapping[str, Tensor],
    generator: torch.Generator | None,
    threshold: float,
    delta: bool,
    share: DeviceShare,
) -> dict[str, Mask]:
    """Return the masks of one masking."""
    if masking == "unmasked":
        return fixed_masks("ones", importances, None, threshold)
    if masking not in ("stochastic", "random"):
        return fixed_masks(masking, importances, None, threshold)
    masks: dict[str, Mask] = {}
    for name, g in importances.items():  # one at a time: a draw for the whole batch is large
        if masking == "random":
            masks[name] = _random_mask(g, generator, share)
        else:
            masks[name] = _stochastic_mask(g, generator, delta, share)
    return masks


def _random_mask(
    g: Float[Tensor, "batch ... C"], generator: torch.Generator | None, share: DeviceShare
) -> Mask:
    """Draw a mask for the whole batch that ignores g, and return this device's share."""
    whole = _whole_batch(g, share)
    drawn = uniform(whole, whole.shape, generator)
    return Mask(share.take(drawn), 0.0)


def _stochastic_mask(
    g: Float[Tensor, "batch ... C"],
    generator: torch.Generator | None,
    delta: bool,
    share: DeviceShare,
) -> Mask:
    """Draw sources for the whole batch, and return the mask of this device's share."""
    site = ""  # any name: there is only one
    whole = _whole_batch(g, share)
    s, s_delta = stochastic_sources({site: whole}, generator)[site]
    sources = {site: (share.take(s), share.take(s_delta))}
    masks = masks_from_sources({site: g}, sources, delta)
    return masks[site]


def _whole_batch(g: Float[Tensor, "batch ... C"], share: DeviceShare) -> Float[Tensor, "... C"]:
    """Return a tensor with the shape of g in the whole batch; its values do not matter."""
    batch, *rest = g.shape
    row = g[:1]
    return row.expand(share.world * batch, *rest)
