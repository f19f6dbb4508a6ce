"""Statistics of components (laws H1 and H2), compared with counts in plain Python."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from scipy.stats import chisquare
from test_nodes import WORDS, decoder, harvested, induction_head, shaken

from spd_lightning import budgets
from spd_lightning.data.modules import Batches, Prompts
from spd_lightning.errors import BadInput
from spd_lightning.harvest import counting
from spd_lightning.harvest.examples import Examples, Firings, firing_hashes, unit_hashes
from spd_lightning.harvest.module import prompt_id
from spd_lightning.harvest.moments import activation_bin, importance_bin
from spd_lightning.harvest.statistics import Statistics
from spd_lightning.store import Store
from spd_lightning.store.columns import TABLES
from spd_lightning.store.compaction import compact
from spd_lightning.store.tables import smallest, summed
from spd_lightning.targets.toy import TMS
from spd_lightning.training.decompose import Decomposition
from spd_lightning.units import Observation

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)

THRESHOLD = 0.1
KEPT = {"uniform": 5, "importance": 3, "positive": 3, "negative": 3}


class Rows(L.LightningDataModule):
    """Given prompts, in batches of one length."""

    def __init__(self, prompts: list[torch.Tensor], batch: int = 4):
        super().__init__()
        self.prompts = prompts
        self.batch = batch

    def names(self, ids: list[int]) -> list[str]:
        return [WORDS[i] for i in ids]

    def predict_dataloader(self) -> Batches[Prompts]:
        by_shape = defaultdict(list)
        for prompt in self.prompts:
            by_shape[prompt.shape].append(prompt)
        batches = []
        for group in by_shape.values():
            for start in range(0, len(group), self.batch):
                some = group[start : start + self.batch]
                words = ["word"] * len(some)
                batches.append(Prompts(torch.stack(some), words, words))
        return Batches(lambda: iter(batches), len(batches))


def texts(count: int = 24, seed: int = 0) -> list[torch.Tensor]:
    """Different prompts of three lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (4, 7, 8)
    prompts = {}
    while len(prompts) < count:
        length = lengths[len(prompts) % len(lengths)]
        prompt = torch.randint(len(WORDS), (length,), generator=generator)
        prompts[tuple(prompt.tolist())] = prompt
    return list(prompts.values())


def vectors(count: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.rand(count, 5, generator=generator))


def toy():
    torch.manual_seed(1)
    return shaken(TMS(5, 2), {"linear*": 6})


def statistics(**settings) -> Statistics:
    return Statistics(THRESHOLD, examples=5, top_examples=3, **settings)


def table(store: Store, name: str) -> pl.DataFrame:
    """One row per key, whatever the number of groups; of examples, those with the smallest keys."""
    rows = store.scan(name)
    if TABLES[name].merge == "add":
        rows = summed(name, rows)
    frame = rows.collect().with_columns(pl.col(pl.Enum).cast(pl.String))
    if name == "examples":
        kinds = []
        for (kind,), some in frame.group_by("kind", maintain_order=True):
            kinds.append(smallest(some, ["layer", "component"], KEPT[kind]))
        frame = pl.concat(kinds)
    order = [*TABLES[name].sorted_by] or ["prompt_id"]
    return frame.sort(order)


@dataclass
class Plain:
    """Statistics that are counted one firing at a time."""

    positions: int = 0
    components: dict = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    cofirings: Counter = field(default_factory=Counter)
    inputs: Counter = field(default_factory=Counter)
    outputs: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    mass: Counter = field(default_factory=Counter)
    firings: list = field(default_factory=list)
    histogram: Counter = field(default_factory=Counter)


def plain(module, prompts) -> Plain:
    counted = Plain()
    for prompt in prompts:
        with torch.no_grad():
            clean = module.model.clean(prompt[None])
            importances = module.model.importances(clean).lower
        is_text = not prompt.is_floating_point()
        fired = set()
        for pos in range(len(prompt) if is_text else 1):
            place = (0, pos) if is_text else (0,)
            masses: dict[int | None, int] = {}
            if is_text:
                probabilities = clean.output[place].double().softmax(-1).tolist()
                likeliest = sorted(range(len(WORDS)), key=probabilities.__getitem__)[-3:]
                masses = {v: round(probabilities[v] * 2**32) for v in likeliest}
                masses[None] = 2**32 - sum(masses.values())
                counted.tokens[int(prompt[pos])] += 1
                counted.mass.update(masses)
            counted.positions += 1
            here = []
            for site, values in importances.items():
                for c, g in enumerate(values[place].tolist()):
                    a = clean.inner[site][place][c].item()
                    sums = counted.components[site, c]
                    sums["importance_sum"] += g
                    sums["importance_square_sum"] += g * g
                    sums["activation_sum"] += a
                    sums["activation_square_sum"] += a * a
                    if not g > THRESHOLD:
                        continue
                    here.append((site, c))
                    sums["firings"] += 1
                    sums["firing_importance_sum"] += g
                    sums["firing_importance_square_sum"] += g * g
                    sums["firing_activation_sum"] += a
                    sums["firing_activation_square_sum"] += a * a
                    counted.firings.append((site, c, prompt_id(prompt), pos, g, a))
                    counted.histogram[site, c, "importance", math.ceil(g * 32) - 1] += 1
                    octave = math.floor(4 * math.log2(abs(a))) + 49
                    number = math.copysign(min(max(octave, 1), 96), a)
                    counted.histogram[site, c, "activation", int(number)] += 1
                    if is_text:
                        counted.inputs[site, c, int(prompt[pos])] += 1
                        counted.outputs.update({(site, c, v): m for v, m in masses.items()})
            fired.update(here)
            for i, first in enumerate(here):
                for second in here[i + 1 :]:
                    counted.cofirings[(*first, *second)] += 1
        for unit in fired:
            counted.components[unit]["prompts"] += 1
    return counted


@pytest.mark.parametrize(
    ("make", "prompts"),
    [(toy, vectors()), (induction_head, texts()), (decoder, texts())],
    ids=["vectors", "induction head", "decoder"],
)
def test_statistics_are_those_of_a_plain_count(tmp_path, monkeypatch, make, prompts):
    """H: every table, also with few likely tokens kept, and components that never fire."""
    monkeypatch.setattr(counting, "LIKELIEST", 3)
    module = make()
    (store,) = harvested(tmp_path, module, Rows(prompts), statistics())
    expected = plain(module, prompts)
    rows = table(store, "components")
    assert rows.height == sum(module.model.counts.values())
    assert set(rows["positions"]) == {expected.positions}
    for row in rows.iter_rows(named=True):
        sums = expected.components[row["layer"], row["component"]]
        assert row["firings"] == sums["firings"]
        assert row["prompts"] == sums["prompts"]
        for name, value in sums.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert rows.filter(firings=0).height, "no component is dead, so dead rows are not tested"
    histogram = {row[:4]: row[4] for row in table(store, "histograms").iter_rows()}
    assert histogram == expected.histogram
    cofirings = {row[:4]: row[4] for row in table(store, "cofirings").iter_rows()}
    assert cofirings == expected.cofirings
    examples = table(store, "examples")
    for kind, size in (("importance", 4), ("positive", 5), ("negative", 5)):
        for (layer, c), some in examples.filter(kind=kind).group_by("layer", "component"):
            own = [f for f in expected.firings if f[:2] == (layer, c)]
            sign = {"positive": 1, "negative": -1}.get(kind, 0)
            values = [abs(f[size]) for f in own if not sign or f[5] * sign > 0]
            largest = sorted(values, reverse=True)[:3]
            column = some["importance" if kind == "importance" else "activation"].abs()
            assert column.sort(descending=True).to_list() == pytest.approx(largest, rel=1e-5)
    if make is toy:
        return
    counts = table(store, "token_counts")
    inputs = {row[:3]: row[3] for row in counts.iter_rows() if row[3]}
    assert inputs == expected.inputs
    outputs = {row[:3]: row[4] for row in counts.iter_rows() if row[4]}
    assert outputs.keys() == {key for key, mass in expected.outputs.items() if mass}
    for key, mass in outputs.items():
        assert mass == pytest.approx(expected.outputs[key], abs=2e-6 * 2**32)
    tokens = table(store, "tokens")
    positions = dict(tokens.select("token_id", "positions").iter_rows())
    assert {v: n for v, n in positions.items() if n} == expected.tokens
    texts_of = dict(tokens.select("token_id", "token").iter_rows())
    assert texts_of == {v: None if v is None else WORDS[v] for v in texts_of}


def test_sums_over_tokens_are_firings(tmp_path):
    """H2: Σ_v I[c,v] = n_c, Σ_v O[c,v] = n_c exactly, n_cd ≤ min(n_c, n_d)."""
    (store,) = harvested(tmp_path, decoder(), Rows(texts()), statistics())
    components = table(store, "components")
    firings = {row[:2]: row[2] for row in components.iter_rows()}
    counts = (
        table(store, "token_counts")
        .group_by("layer", "component")
        .agg(pl.col("input_firings", "output_mass").sum())
    )
    assert counts.height
    for layer, component, inputs, mass in counts.iter_rows():
        assert inputs == firings[layer, component]
        assert mass == firings[layer, component] << 32
    pairs = table(store, "cofirings")
    for layer, c, other_layer, d, together in pairs.iter_rows():
        assert 0 < together <= min(firings[layer, c], firings[other_layer, d])
    tokens = table(store, "tokens")
    assert tokens["positions"].sum() == components["positions"][0]
    assert tokens["output_mass"].sum() == components["positions"][0] << 32


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory) -> tuple[Decomposition, Store]:
    """A decomposition in double precision, and the statistics of 12 prompts from one batch."""
    module = decoder().double()
    folder = tmp_path_factory.mktemp("whole")
    (store,) = harvested(folder, module, Rows(texts(12), 12), statistics())
    return module, store


@settings(max_examples=8, phases=[Phase.generate])
@given(
    order=st.permutations(range(12)),
    batch=st.integers(1, 5),
    group=st.integers(1, 15),
    first=st.integers(0, 12),
    rows=st.sampled_from([1, 40, 1 << 25]),
    pairs=st.sampled_from([1, 50, 1 << 27]),
)
def test_any_split_gives_the_same_tables(
    in_one_go, tmp_path_factory, order, batch, group, first, rows, pairs
):
    """H1: batches, groups of shards, order, two sittings, memory for few counts, and compaction."""
    module, whole = in_one_go
    prompts = texts(12)
    shuffled = [prompts[i] for i in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgets, "MAX_STATISTICS_ROWS", rows)
        patch.setattr(budgets, "MAX_FIRING_PAIRS", pairs)
        folder = tmp_path_factory.mktemp("split")
        if first:
            harvested(folder, module, Rows(shuffled[:first], batch), statistics(group=group))
        (split,) = harvested(folder, module, Rows(shuffled, batch), statistics(group=group))
    assert split.manifest["prompts"] == 12
    compact(split.path)
    merged = Store(split.path)
    for name in whole.tables:
        if name == "prompts":
            continue
        expected = table(whole, name)
        for store in (split, merged):
            assert_frame_equal(table(store, name), expected, rel_tol=1e-9, abs_tol=1e-12)
        assert merged.scan(name).collect().height == expected.height


def firings_of_one_unit(count: int) -> Firings:
    return Firings(
        unit=np.zeros(count, dtype=np.int64),
        prompt_id=np.arange(count, dtype=np.uint64) // np.uint64(4),
        pos=(np.arange(count) % 4).astype(np.uint32),
        importance=np.ones(count, dtype=np.float32),
        activation=np.ones(count, dtype=np.float32),
    )


def test_uniform_examples_are_uniform():
    """H1: over many seeds, every firing of neighboring prompts and positions is kept as often."""
    firings = firings_of_one_unit(40)
    kept = np.zeros(40)
    for seed in range(800):
        examples = Examples({"layer": 1}, {"uniform": 8}, seed)
        hashes = firing_hashes(
            unit_hashes({"layer": 1}, seed)[firings.unit], firings.prompt_id, firings.pos
        )
        examples._samples["uniform"].add(firings, hashes)
        rows = examples.rows()
        numbers = (rows["prompt_id"] * 4 + rows["pos"]).to_numpy().astype(int)
        assert len(numbers) == 8
        kept[numbers] += 1
    assert chisquare(kept).pvalue > 1e-4


def test_ties_are_ordered_by_hash_not_by_prompt():
    """If importances are equal, a random choice of firings is kept, not the first prompts."""
    examples = Examples({"layer": 1}, KEPT, seed=0)
    examples.add(firings_of_one_unit(400))
    rows = examples.rows()
    top = rows.filter(kind="importance")
    assert top.height == 3
    assert max(top["prompt_id"].to_list()) > 10
    assert rows.filter(kind="negative").is_empty()


def test_one_sort_or_many(monkeypatch):
    """Candidates that are sorted often leave the same examples as one sort at the end."""
    generator = np.random.default_rng(0)
    count = 3000
    importance = generator.integers(0, 9, count).astype(np.float32) / 8
    firings = Firings(
        unit=generator.integers(0, 7, count),
        prompt_id=generator.integers(0, 50, count).astype(np.uint64),
        pos=np.arange(count, dtype=np.uint32),
        importance=importance,
        activation=generator.normal(size=count).astype(np.float32),
    )
    at_once = Examples({"a": 3, "b": 4}, KEPT, seed=1)
    at_once.add(firings)
    monkeypatch.setattr("spd_lightning.harvest.examples._ROWS_BETWEEN_SORTS", 10)
    often = Examples({"a": 3, "b": 4}, KEPT, seed=1)
    for start in range(0, count, 37):
        rows = slice(start, start + 37)
        some = Firings(
            unit=firings.unit[rows],
            prompt_id=firings.prompt_id[rows],
            pos=firings.pos[rows],
            importance=importance[rows],
            activation=firings.activation[rows],
        )
        often.add(some)
    assert_frame_equal(often.rows(), at_once.rows())


def test_bins_hold_what_the_table_says():
    """The ends of bins, and values outside all of them."""
    g = np.array([0.0, 1e-9, 1 / 32, 1 / 32 + 1e-6, 1.0], dtype=np.float32)
    assert importance_bin(g).tolist() == [0, 0, 0, 1, 31]
    a = np.array([0.0, 1.0, -1.0, 1.18, 1.2, 2.0, 1e-30, -1e30], dtype=np.float32)
    assert activation_bin(a).tolist() == [0, 49, -49, 49, 50, 53, 1, -96]


def test_a_site_that_never_fires_has_rows(tmp_path):
    """Its sums over firings are zeros of the same type as those of other sites."""
    module = toy()
    with torch.no_grad():
        for parameter in module.model.importance_function.parameters():
            parameter.zero_()
    (store,) = harvested(tmp_path, module, Rows(vectors()), Statistics(0.6))
    rows = table(store, "components")
    assert rows["firings"].to_list() == [0] * 12
    assert rows["firing_activation_sum"].to_list() == [0.0] * 12
    assert "cofirings" not in store.tables


def test_units_without_importances_fire_by_activation():
    """The protocol: the size of the activation is compared with the threshold."""
    activation = torch.tensor([[[0.5, -0.2], [0.0, -3.0]]])
    observation = Observation({"layer": activation}, None, None)
    assert observation.measure("layer").tolist() == activation.abs().tolist()


def test_masses_of_a_position_add_up_to_one():
    """Also where rounding makes the kept probabilities exceed 1."""
    logits = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) * 5
    mass = counting.probability_mass(logits)
    assert (mass.sum(axis=1) == counting.UNIT_MASS).all()
    assert (mass.data >= 0).all()


def test_an_activation_that_overflows_is_one_line(tmp_path):
    """The message names the harvest and the layer."""
    module = decoder()
    with torch.no_grad():
        module.model["wte"].V.mul_(3e38)
    with pytest.raises(BadInput, match=r"harvest 'statistics'.*layer 'wte'.*not finite"):
        harvested(Path(tmp_path), module, Rows(texts()), statistics())
