"""What harvesters share: finding the store of this run, skipping what it already holds, closing it whole.

A harvester is a callback. On every predicted batch it turns prompts into rows and commits them as one group of shards;
prompts that the store already holds are not computed again. A harvest lives in `<run>/harvest/<name>/`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from spd_lightning.store import Writer, prompt_hash
from spd_lightning.targets.data import Prompts
from spd_lightning.training.decompose import Decomposition


class Harvester(Callback, ABC):
    """A callback that turns prompts into the rows of one store.

    Attributes:
        name: the harvest's folder below `<run>/harvest/`.
        folder: that folder, once predicting has begun.
    """

    def __init__(self, name: str):
        self.name = name
        self.folder: Path | None = None
        self._writer: Writer | None = None

    @abstractmethod
    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """What is harvested, and how; a store made under other settings is not continued."""

    @abstractmethod
    def rows(self, module: Decomposition, prompts: Prompts, ids: list[int]) -> Mapping[str, pl.DataFrame]:
        """The rows of a batch of prompts, by table."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Decomposition)
        self.folder = Path(trainer.default_root_dir) / "harvest" / self.name
        settings = self.manifest(pl_module)
        self._writer = Writer(self.folder, settings, trainer.global_rank, trainer.world_size)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Prompts, *_: Any, **__: Any
    ) -> None:
        assert self._writer is not None
        assert isinstance(pl_module, Decomposition)
        ids = [prompt_id(row) for row in batch.inputs]
        fresh = [k for k, i in enumerate(ids) if i not in self._writer.finished and i not in ids[:k]]
        if fresh:
            prompts = Prompts(batch.inputs[fresh], [batch.sources[k] for k in fresh], [batch.splits[k] for k in fresh])
            with torch.inference_mode(False), torch.enable_grad():  # attributions are gradients
                prompts = prompts._replace(inputs=prompts.inputs.clone())
                self._writer.write(self.rows(pl_module, prompts, [ids[k] for k in fresh]))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._writer is not None
        self._writer.complete()
        self._writer.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._writer is not None:
            self._writer.close()


def prompt_id(row: torch.Tensor) -> int:
    """The id of one prompt: a hash of its numbers."""
    return prompt_hash(row.cpu().contiguous().numpy().tobytes())
