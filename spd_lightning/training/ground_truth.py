"""How near a toy's decomposition comes to its known mechanism, and whether near enough (section
E).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.decomposition.metrics import column_match, dense_error, identity_error
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.training.evaluate import Evaluation

PROBE = 0.75


class LoneFeatures(NamedTuple):
    """The inputs and importances of each site when every feature is fed alone at 0.75."""

    inputs: dict[str, Float[Tensor, "features d_in"]]
    importances: dict[str, Float[Tensor, "features C"]]


def lone_features(model: ComponentModel, n_features: int) -> LoneFeatures:
    """Feeds each feature alone: what the truth of toy models is judged by."""
    parameter = next(model.parameters())
    clean = model.clean(
        PROBE * torch.eye(n_features, dtype=parameter.dtype, device=parameter.device)
    )
    return LoneFeatures(clean.inputs, model.importances(clean).lower)


def truth(
    model: ComponentModel, alone: LoneFeatures, settings: Evaluation
) -> dict[str, float | int]:
    """How near a model on vectors comes to its known mechanism: MMCS, ML2R, identity and dense
    error.

    A site's columns are taken along the features as they reach it: for the first map of a TMS, the
    columns of W.
    """
    found: dict[str, float | int] = {}
    for name in settings.identity:
        X = alone.inputs[name] / PROBE
        cosine, ratio = column_match(
            model.sites[name].weight @ X.T, X @ model[name].V, model[name].U
        )
        found[f"mmcs/{name}"] = float(cosine)
        found[f"ml2r/{name}"] = float(ratio)
        found[f"identity_error/{name}"] = identity_error(alone.importances[name])
    for name, k in settings.dense.items():
        found[f"dense_error/{name}"] = dense_error(alone.importances[name], k)
    return found


def verdict(found: Mapping[str, float | int], settings: Evaluation, n_features: int) -> str | None:
    """Why a decomposition with known truth has ended in a local minimum, or None where it has
    not.
    """
    wrong = [
        f"{name}: {found[f'alive/{name}']:.0f} components for {n_features} features, identity "
        "error "
        f"{found[f'identity_error/{name}']:.0f}"
        for name in settings.identity
        if found[f"identity_error/{name}"] or found[f"alive/{name}"] != n_features
    ]
    wrong += [
        f"{name}: {found[f'alive/{name}']:.0f} components instead of {k}, dense error "
        f"{found[f'dense_error/{name}']:.0f}"
        for name, k in settings.dense.items()
        if found[f"dense_error/{name}"] or found[f"alive/{name}"] != k
    ]
    return "; ".join(wrong) or None
