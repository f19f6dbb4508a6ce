"""`make bench`, fourth part: statistics of many units, next to a loop over the units.

The activations are synthetic: units of two layers fire at random, a few of them often and most of
them rarely, on prompts of 64 tokens. The time is that of the statistics alone, without the target's
forward pass and without writing. The loop computes the same sums, counts and examples for one unit
at a time, in PyTorch. It runs for 64 of the units only, and its speed is computed from these.

    python benchmarks/bench_statistics.py
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spd_lightning.harvest.statistics import Totals
from spd_lightning.units import Observation

LENGTH = 64
VOCAB = 1000
BATCH = 64
LOOPED = 64
"""The number of units that the loop runs for."""

KEPT = {"uniform": 1000, "importance": 100, "positive": 100, "negative": 100}
SIZES = ((2048, 128), (4096, 256))
"""Numbers of units and of prompts."""


def batches(units: int, prompts: int) -> list[tuple[Observation, Tensor]]:
    """Return batches of activations and their tokens."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.arange(1, units // 2 + 1)
    density = (2.0 / rank).clamp(max=0.3)  # [unit], the share of positions at which it fires
    made = []
    for _ in range(prompts // BATCH):
        activations = {}
        importances = {}
        for layer in ("first", "second"):
            shape = (BATCH, LENGTH, units // 2)
            fires = torch.rand(shape, generator=generator) < density
            activations[layer] = torch.randn(shape, generator=generator)
            importances[layer] = torch.rand(shape, generator=generator) * fires
        logits = 3 * torch.randn((BATCH, LENGTH, VOCAB), generator=generator)
        tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        made.append((Observation(activations, importances, logits), tokens))
    return made


def ours(units: int, made: list[tuple[Observation, Tensor]]) -> Totals:
    """Return the statistics of all units."""
    totals = Totals({"first": units // 2, "second": units // 2}, KEPT, seed=0)
    for number, (observation, tokens) in enumerate(made):
        fires = {layer: g > 0 for layer, g in (observation.importances or {}).items()}
        ids = list(range(number * BATCH, (number + 1) * BATCH))
        totals.add(observation, fires, tokens, ids, VOCAB)
    totals.examples.rows()
    return totals


class Loop:
    """Computes the same statistics for one unit at a time."""

    def __init__(self, made: list[tuple[Observation, Tensor]]):
        activations = []
        importances = []
        logits = []
        for observation, _ in made:
            assert observation.importances is not None
            assert observation.logits is not None
            activations.append(_all_layers(observation.activations))
            importances.append(_all_layers(observation.importances))
            logits.append(observation.logits.flatten(0, 1))
        self.a = torch.cat(activations)  # [position, unit]
        self.g = torch.cat(importances)
        self.fires = self.g > 0
        self.logits = torch.cat(logits)  # [position, vocab]
        self.tokens = torch.cat([tokens.flatten() for _, tokens in made])
        self.prompt = torch.arange(len(self.tokens)) // LENGTH  # [position]

    def unit(self, unit: int) -> dict[str, Any]:
        """Return the statistics of one unit."""
        fires = self.fires[:, unit]
        a = self.a[:, unit].double()  # [position]
        g = self.g[:, unit].double()
        at_firings = a[fires]  # [firing]
        importance = g[fires]
        probabilities = self.logits[fires].softmax(-1)
        likeliest = probabilities.topk(32, dim=-1)
        mass = torch.zeros(VOCAB).index_add_(
            0, likeliest.indices.flatten(), likeliest.values.flatten()
        )
        keys = torch.rand(len(importance))
        strengths = (importance, at_firings, -at_firings)
        return {
            "firings": len(importance),
            "prompts": len(self.prompt[fires].unique()),
            "sums": [x.sum() for x in (a, g, a**2, g**2, at_firings, importance)],
            "squares": [x.square().sum() for x in (at_firings, importance)],
            "histograms": [x.float().histc(bins=32) for x in (at_firings, importance)],
            "cofirings": self.fires[fires].sum(0),
            "tokens": self.tokens[fires].bincount(minlength=VOCAB),
            "mass": mass,
            "uniform": keys.topk(min(1000, len(keys))).indices,
            "top": [x.topk(min(100, len(x))).indices for x in strengths],
        }


def _all_layers(values: Mapping[str, Tensor]) -> Tensor:
    """Return values as [position, unit], with the units of all layers."""
    return torch.cat([layer.flatten(0, 1) for layer in values.values()], dim=1)


def main() -> None:
    print(f"\n{'statistics':<24} {'ours':>22} {'a loop over units':>22} {'ratio':>8}")
    for units, prompts in SIZES:
        made = batches(units, prompts)
        started = time.perf_counter()
        totals = ours(units, made)
        speed = units * prompts / (time.perf_counter() - started)
        loop = Loop(made)
        chosen = torch.linspace(0, units - 1, LOOPED).long().tolist()
        started = time.perf_counter()
        looped = [loop.unit(unit) for unit in chosen]
        loop_speed = LOOPED * prompts / (time.perf_counter() - started)
        _compare(totals, looped, chosen, units)
        name = f"{units:,} units × {prompts} prompts"
        values = f"{speed:>20,.0f}/s {loop_speed:>20,.0f}/s {speed / loop_speed:>7.1f}×"
        print(f"{name:<24} {values}")
    print("in units × prompts per second")


def _compare(totals: Totals, looped: list[dict[str, Any]], chosen: list[int], units: int) -> None:
    """Check that both count the same."""
    half = units // 2
    for unit, expected in zip(chosen, looped, strict=True):
        layer = "first" if unit < half else "second"
        firings = totals.moments[layer]["firings"][unit % half]
        assert firings == expected["firings"], f"{layer}:{unit % half}"


if __name__ == "__main__":
    main()
