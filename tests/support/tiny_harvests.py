"""A run with a harvest of each kind, of a decoder of two layers that was not trained."""

import warnings
from pathlib import Path

NAME, OTHER = "h.0.attn.q_proj:1", "h.1.mlp.c_fc:2"
"""Two components that fire."""

HARVESTS = ("statistics", "nodes", "graphs", "sums")


def make_harvests(folder: Path) -> None:
    """Write the run to a folder."""
    import lightning as L
    import torch

    from spd_lightning import (
        DatasetEdges,
        Decoder,
        Decomposition,
        InductionTokens,
        PromptGraphs,
        PromptNodes,
        Statistics,
    )

    torch.manual_seed(0)
    decoder = Decoder(vocab=8, d_model=16, n_layers=2, n_heads=2, context=8)
    module = Decomposition(decoder, sites={"h.*": 10})
    kinds = (Statistics, PromptNodes, PromptGraphs, DatasetEdges)
    harvesters = [kind(name=name) for kind, name in zip(kinds, HARVESTS, strict=True)]
    trainer = L.Trainer(
        callbacks=harvesters,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own
        trainer.predict(module, InductionTokens(8, 6, 1, n_prompts=4))
