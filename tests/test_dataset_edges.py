"""Attributions over a corpus: sums of prompt graphs (section A), their rows, and what is asked of them."""

from collections import defaultdict

import pytest
import torch
from test_closed_form import CLOSED, STYLES, THRESHOLD, made, some_outputs
from torch import nn

from spd_lightning.decomposition.attribution import MODES, every_output, prompt_edges
from spd_lightning.decomposition.closed_form import why_not
from spd_lightning.decomposition.dataset_edges import dataset_edges, looked_up
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.targets.toy import TMS, InductionHead


def by_definition(model, inputs, g, mode, outputs):
    """The sums over all edges of prompt graphs, read one by one: {(kind, S, i, T, j): (edges, Σ A, Σ A·sign(a_T))}."""
    rows = looked_up(model, inputs)
    layers, found = prompt_edges(model, inputs, g, mode, THRESHOLD, outputs)
    sums: dict = defaultdict(lambda: (0, 0.0, 0.0))

    def component(layer, prompt, at):
        if layer.kind == "embedding":
            return rows[layer.name][prompt, at[0]].item()
        return 0 if layer.whole else at[1]

    for e in found:
        source, target = layers[e.source], layers[e.target]
        for p, start, end, value in zip(*(column.tolist() for column in e[2:]), strict=True):
            i, j = component(source, p, start), component(target, p, end)
            sign = 1 if target.value[(p, *end)] >= 0 else -1
            key = source.kind, source.name, i, target.name, j
            n, total, size = sums[key]
            sums[key] = n + 1, total + value, size + sign * value
    return dict(sums)


def as_dictionary(pairs):
    found = {}
    for pair in pairs:
        for i, j, *sums in zip(*(column.tolist() for column in pair[3:]), strict=True):
            key = pair.kind, pair.source_layer, i, pair.target_layer, j
            assert key not in found
            found[key] = tuple(sums)
    return found


def assert_same(found, expected):
    """Alike as dictionaries; only edges across positions may be zero in one and left out in the other."""
    largest = [max(abs(sums[number]) for sums in expected.values()) for number in range(3)]
    for key in found.keys() | expected.keys():
        n, *sums = found.get(key, (0, 0.0, 0.0))
        m, *wanted = expected.get(key, (0, 0.0, 0.0))
        assert n == m or (n > m and key[1][-6:] in ("k_proj", "v_proj")), key
        assert sums == [pytest.approx(w, rel=1e-9, abs=1e-12 * big) for w, big in zip(wanted, largest[1:], strict=True)]


@pytest.mark.parametrize("mode", CLOSED)
@pytest.mark.parametrize("style", STYLES)
def test_sums_are_those_of_the_prompt_graphs(style, mode):
    """Section A: both metrics, edge by edge of batched products, for ragged prompts; no backward pass where none is due."""
    model, tokens, g = made(style, prompts=3, length=5)
    with torch.inference_mode(why_not(model, CLOSED[mode]) is None):
        _, pairs = dataset_edges(model, tokens, g, CLOSED[mode], THRESHOLD, some_outputs)
    assert_same(as_dictionary(pairs), by_definition(model, tokens, g, CLOSED[mode], some_outputs))
