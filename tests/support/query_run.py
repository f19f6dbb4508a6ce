"""A run with one harvest of each kind, of a small decoder with random weights."""

from pathlib import Path

import lightning as L
import torch
from test_nodes import shaken

from spd_lightning.data.modules import InductionTokens
from spd_lightning.harvest.dataset_edges import DatasetEdges
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.harvest.nodes import PromptNodes
from spd_lightning.harvest.statistics import Statistics
from spd_lightning.targets.transformer import Decoder


def harvest_all(folder: Path) -> Path:
    """Write the run `queried` into a folder, and return its path."""
    torch.manual_seed(0)
    network = Decoder(vocab=20, d_model=16, n_layers=2, n_heads=2, context=16)
    module = shaken(network, {"h.*.attn.*_proj": 6, "h.*.mlp.*": 6})
    run = folder / "queried"
    trainer = L.Trainer(
        callbacks=[
            Statistics(0.1),
            PromptNodes(0.1),
            PromptGraphs(threshold=0.1, name="graphs"),
            DatasetEdges(threshold=0.1, name="sums"),
        ],
        default_root_dir=run,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module, InductionTokens(20, 8, 1, n_prompts=30), return_predictions=False)
    return run
