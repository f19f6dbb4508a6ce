"""Stochastic Parameter Decomposition on PyTorch Lightning.

The public names are imported lazily: `import spd_lightning` loads nothing else, and
`spd_lightning.Decomposition` loads only the modules that it needs.
"""

import importlib
from typing import Any

_HOME = {
    "Decomposition": "spd_lightning.training.decompose",
    "TargetTraining": "spd_lightning.training.target",
    "train_target": "spd_lightning.training.pretraining",
    "TMS": "spd_lightning.targets.toy",
    "ResidualMLP": "spd_lightning.targets.toy",
    "InductionHead": "spd_lightning.targets.toy",
    "Decoder": "spd_lightning.targets.transformer",
    "HuggingFaceLM": "spd_lightning.targets.huggingface",
    "SparseFeatures": "spd_lightning.data.modules",
    "InductionTokens": "spd_lightning.data.modules",
    "Text": "spd_lightning.data.text",
    "ComponentModel": "spd_lightning.decomposition.model",
    "PromptNodes": "spd_lightning.harvest.nodes",
    "PromptGraphs": "spd_lightning.harvest.graphs",
    "OutputTargets": "spd_lightning.harvest.output_targets",
    "attribute": "spd_lightning.harvest.attribute",
    "Statistics": "spd_lightning.harvest.statistics",
    "DatasetEdges": "spd_lightning.harvest.dataset_edges",
    "SparseCircuits": "spd_lightning.harvest.circuits",
    "CircuitSearch": "spd_lightning.circuits.objective",
    "optimize": "spd_lightning.circuits.search",
    "weight_graph": "spd_lightning.attribution.closed_form.weights",
    "weight_table": "spd_lightning.harvest.weights",
    "Store": "spd_lightning.analysis.store",
    "BadInput": "spd_lightning.errors",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spd_lightning' has no attribute '{name}'")
    module = importlib.import_module(_HOME[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(_HOME)
