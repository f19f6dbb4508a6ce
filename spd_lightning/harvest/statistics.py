"""Statistics: how often components fire, with which others, on which tokens, and where.

1. Each batch is run once, clean. A component fires where its importance is above the threshold.
2. Sums, counts and examples are kept in memory (`moments`, `counting`, `examples`). They do not
   need the table `nodes`, and their size does not grow with the number of prompts.
3. They are written for a group of prompts at a time. Readers add the groups up.

Anything that satisfies the protocol `Units` can take the place of components.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch

from spd_lightning import budgets
from spd_lightning.data.modules import Prompts
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, check_range
from spd_lightning.harvest.counting import Counts, count
from spd_lightning.harvest.examples import Examples, Firings
from spd_lightning.harvest.module import Harvester, positions_of
from spd_lightning.harvest.moments import Histograms, histograms, moments
from spd_lightning.harvest.rows import array, harvest_metadata, prompt_rows, site_rows
from spd_lightning.harvest.statistics_rows import (
    UnitNames,
    cofiring_rows,
    histogram_rows,
    token_count_rows,
    token_rows,
)
from spd_lightning.targets.protocols import vocab_of
from spd_lightning.training.decompose import Decomposition
from spd_lightning.units import ComponentUnits, Observation


class Statistics(Harvester):
    """Write statistics of all components over many prompts, in one clean run per prompt.

    The tables are prompts, components, histograms, cofirings, token_counts, tokens and examples.

    Args:
        threshold: importance above which a component fires.
        examples: firings of each component to keep at random.
        top_examples: firings to keep with the largest importance, and with the largest activation
            of each sign.
        seed: determines which firings are kept at random.
        group: the number of prompts that are added up before they are written. A group also ends
            after five minutes, or once its counts fill the memory set aside for them. A killed
            harvest loses at most one group.
        name: the harvest's folder in `<run>/harvest/`.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, Decomposition, SparseFeatures, Statistics, Store
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20})
        >>> trainer = L.Trainer(callbacks=[Statistics()], default_root_dir="mine")
        >>> _ = trainer.predict(module, SparseFeatures(5, 0.05, batch_size=1))
        >>> components = Store("mine/harvest/statistics").scan("components").collect()
        >>> components.height, components["positions"].unique().to_list()
        (40, [69])
    """

    def __init__(
        self,
        threshold: float = 0.0,
        examples: int = 1000,
        top_examples: int = 100,
        seed: int = 0,
        group: int = 10_000,
        name: str = "statistics",
    ):
        super().__init__(name, group)
        check_range("Statistics", least=0, most=1, threshold=threshold)
        check_range("Statistics", least=0, whole=True, examples=examples, top_examples=top_examples)
        check_range("Statistics", least=0, whole=True, seed=seed)
        self.threshold = threshold
        self.seed = seed
        self.kept = {
            "uniform": examples,
            "importance": top_examples,
            "positive": top_examples,
            "negative": top_examples,
        }
        self._totals: Totals | None = None

    def manifest(self, module: Decomposition) -> dict[str, Any]:
        """Return the settings of the harvest, which its rows depend on."""
        return harvest_metadata(module) | {
            "harvest": self.name,
            "mode": "statistics",
            "threshold": self.threshold,
            "examples": self.kept,
            "config": {"threshold": self.threshold, "examples": self.kept, "seed": self.seed},
        }

    def memory(self, model: ComponentModel, inputs: torch.Tensor) -> Mapping[str, int]:
        """Return the bytes of the firings of a batch, and of the statistics of a group."""
        prompts = min(len(inputs), self.at_once(model, inputs))
        units = sum(model.counts.values())
        firings = prompts * positions_of(inputs) * units * budgets.FIRING_SHARE
        pairs = units * (units + 1) // 2
        token_counts = 2 * units * (vocab_of(model.target) or 0)
        counts = min(pairs + token_counts, budgets.MAX_STATISTICS_ROWS)
        examples = units * sum(self.kept.values())
        return {
            "firings of a batch": round(firings * budgets.FIRING_BYTES),
            "counts": counts * budgets.COUNT_BYTES,
            "examples": examples * budgets.EXAMPLE_BYTES,
        }

    def rows(
        self, module: Decomposition, prompts: Prompts, ids: list[int]
    ) -> Mapping[str, pl.DataFrame]:
        """Add a batch of prompts to the sums of the group, and return the rows of the prompts."""
        units = ComponentUnits(module.model)
        if self._totals is None:
            self._totals = Totals(units.counts, self.kept, self.seed)
        observation = units.observe(prompts.inputs)
        fires = {}
        for layer in units.counts:
            fires[layer] = observation.measure(layer) > self.threshold
        _check_finite(observation, self.name)
        vocab = vocab_of(module.network) or 0
        self._totals.add(observation, fires, prompts.inputs, ids, vocab)
        return {"prompts": prompt_rows(prompts, ids, self.names)}

    def sums(self, module: Decomposition) -> Mapping[str, pl.DataFrame]:
        """Return the statistics of the group, by table, and begin the next group."""
        assert self._totals is not None
        totals = self._totals
        self._totals = None
        names = UnitNames(totals.units, self._settings["layers"])
        tables = {
            "components": pl.concat(
                site_rows(module, site, sums) for site, sums in totals.moments.items()
            ),
            "histograms": histogram_rows(totals.histograms, names),
            "cofirings": cofiring_rows(totals.counts, names),
            "examples": names.named(totals.examples.rows()),
        }
        if totals.counts.inputs is not None:
            tables["token_counts"] = token_count_rows(totals.counts, names)
            tables["tokens"] = token_rows(totals.counts, self.names)
        return tables

    def is_full(self) -> bool:
        """Return whether the counts of the group should be written to free their memory."""
        if self._totals is None:
            return False
        return self._totals.counts.rows() > budgets.MAX_STATISTICS_ROWS


def _check_finite(observation: Observation, harvest: str) -> None:
    """Check the activations of all layers.

    Raises:
        BadInput: an activation is infinite or NaN.
    """
    for layer, activation in observation.activations.items():
        # The sum is not finite if any entry is not, and needs no mask of the same shape.
        if not torch.isfinite(activation.sum()):
            raise BadInput(
                f"harvest '{harvest}': an activation of layer '{layer}' is not finite; the target "
                "overflows on these prompts, so harvest with --trainer.precision 32-true"
            )


class Totals:
    """The statistics of a group of prompts, kept in memory.

    Attributes:
        units: the number of units of each layer.
        moments: by layer, the additive columns of the table `components`.
        histograms: the numbers of firings by bin.
        counts: the numbers of co-firings, and of firings by token.
        examples: the firings to show.
    """

    def __init__(self, units: Mapping[str, int], kept: Mapping[str, int], seed: int):
        self.units = dict(units)
        self.moments: dict[str, dict[str, np.ndarray]] = {}
        self.examples = Examples(units, kept, seed)
        self._histograms: Histograms | None = None
        self._counts: Counts | None = None

    @property
    def histograms(self) -> Histograms:
        assert self._histograms is not None, "no batch was added"
        return self._histograms

    @property
    def counts(self) -> Counts:
        assert self._counts is not None, "no batch was added"
        return self._counts

    def add(
        self,
        observation: Observation,
        fires: Mapping[str, torch.Tensor],
        inputs: torch.Tensor,
        ids: list[int],
        vocab: int,
    ) -> None:
        """Add a batch of prompts.

        fires: by layer, [batch, pos, C].
        inputs: [batch, features] floating point, or [batch, pos] token ids.
        """
        self._add_moments(observation, fires)
        firings = _firings(observation, fires, ids)
        self.examples.add(firings)
        binned = histograms(
            sum(self.units.values()), firings.unit, firings.importance, firings.activation
        )
        tokens = None if inputs.is_floating_point() else inputs.flatten()
        logits = observation.logits
        counts = count(
            {layer: entries.flatten(0, 1) for layer, entries in fires.items()},  # [position, C]
            tokens,
            None if logits is None else logits.flatten(0, 1),
            vocab,
        )
        if self._counts is None or self._histograms is None:
            self._counts = counts
            self._histograms = binned
        else:
            self._counts = self._counts.plus(counts)
            self._histograms = self._histograms.plus(binned)

    def _add_moments(self, observation: Observation, fires: Mapping[str, torch.Tensor]) -> None:
        for layer in self.units:
            importance = None
            if observation.importances is not None:
                importance = observation.importances[layer]
            sums = moments(fires[layer], importance, observation.activations[layer])
            previous = self.moments.get(layer)
            if previous is not None:
                sums = {name: previous[name] + total for name, total in sums.items()}
            self.moments[layer] = sums


def _firings(
    observation: Observation, fires: Mapping[str, torch.Tensor], ids: list[int]
) -> Firings:
    """Return the firings of a batch of prompts, layer by layer."""
    prompt_ids = np.array(ids, dtype=np.uint64)
    parts = []
    first_unit = 0  # the number of the layer's first unit among those of all layers
    for layer, entries in fires.items():
        prompt, pos, component = entries.nonzero().cpu().numpy().T  # [firings] each
        importance = None
        if observation.importances is not None:
            importance = array(observation.importances[layer][entries])
        parts.append(
            Firings(
                unit=first_unit + component,
                prompt_id=prompt_ids[prompt],
                pos=pos.astype(np.uint32),
                importance=importance,
                activation=array(observation.activations[layer][entries]),
            )
        )
        first_unit += entries.shape[2]
    return _concatenated(parts)


def _concatenated(parts: list[Firings]) -> Firings:
    """Return the firings of several layers as one; all or none of them have importances."""
    importances = [part.importance for part in parts if part.importance is not None]
    return Firings(
        unit=np.concatenate([part.unit for part in parts]),
        prompt_id=np.concatenate([part.prompt_id for part in parts]),
        pos=np.concatenate([part.pos for part in parts]),
        importance=np.concatenate(importances) if importances else None,
        activation=np.concatenate([part.activation for part in parts]),
    )
