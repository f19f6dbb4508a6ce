"""Comparison of a toy's decomposition with its known mechanism (section E)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.decomposition.metrics import column_match, dense_error, identity_error
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.training.evaluate import Evaluation

PROBE = 0.75
"""The value of a feature that is fed alone."""


class LoneFeatures(NamedTuple):
    """Inputs and importances of each site if every feature is fed alone at 0.75."""

    inputs: dict[str, Float[Tensor, "features d_in"]]
    importances: dict[str, Float[Tensor, "features C"]]


def lone_features(model: ComponentModel, n_features: int) -> LoneFeatures:
    """Feed each feature alone to the model."""
    parameter = next(model.parameters())
    features = torch.eye(n_features, dtype=parameter.dtype, device=parameter.device)
    clean = model.clean(PROBE * features)
    return LoneFeatures(clean.inputs, model.importances(clean).lower)


def truth(
    model: ComponentModel, alone: LoneFeatures, settings: Evaluation
) -> dict[str, float | int]:
    """Compare a model on vectors with its known mechanism: MMCS, ML2R, identity and dense error.

    The columns of a site's weight are taken along the features as they reach the site. For the
    first map of a TMS, these are the columns of W.
    """
    figures: dict[str, float | int] = {}
    for site in settings.identity:
        features = alone.inputs[site] / PROBE  # [features, d_in]
        columns = model.sites[site].weight @ features.T  # [d_out, features]
        reads = features @ model[site].V  # [features, C]
        cosine, ratio = column_match(columns, reads, model[site].U)
        figures[f"mmcs/{site}"] = float(cosine)
        figures[f"ml2r/{site}"] = float(ratio)
        figures[f"identity_error/{site}"] = identity_error(alone.importances[site])
    for site, k in settings.dense.items():
        figures[f"dense_error/{site}"] = dense_error(alone.importances[site], k)
    return figures


def verdict(found: Mapping[str, float | int], settings: Evaluation, n_features: int) -> str | None:
    """Return how a decomposition differs from the known mechanism; None if it does not.

    Args:
        found: the figures of the decomposition.
        settings: the sites with a known mechanism.
        n_features: number of input features.
    """
    problems = []
    for site in settings.identity:
        alive = found[f"alive/{site}"]
        error = found[f"identity_error/{site}"]
        if error or alive != n_features:
            components = f"{alive:.0f} components for {n_features} features"
            problems.append(f"{site}: {components}, identity error {error:.0f}")
    for site, k in settings.dense.items():
        alive = found[f"alive/{site}"]
        error = found[f"dense_error/{site}"]
        if error or alive != k:
            components = f"{alive:.0f} components instead of {k}"
            problems.append(f"{site}: {components}, dense error {error:.0f}")
    return "; ".join(problems) or None
