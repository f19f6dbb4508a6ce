"""Queries of statistics, prompts and graphs, compared with plain loops over the raw tables."""

import json
import math
import re
import shutil
from collections import Counter, defaultdict

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support.query_run import harvest_all

from spd_lightning import cli
from spd_lightning.analysis.neighbors import SIDES
from spd_lightning.analysis.normalize import NORMALIZATIONS, normalized
from spd_lightning.analysis.search import MODES as SEARCH_MODES
from spd_lightning.analysis.statistics import COMPONENT_SORTS, CORRELATION_SORTS, OF, TOKEN_SORTS
from spd_lightning.analysis.store import Store
from spd_lightning.commands.query_verbs import QUERIES
from spd_lightning.errors import BadInput
from spd_lightning.store import Writer
from spd_lightning.store.columns import EXAMPLE_KINDS
from spd_lightning.store.manifest import read_settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)

NAME = "h.0.attn.k_proj:2"
OTHER = "h.1.mlp.c_fc:4"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return harvest_all(tmp_path_factory.mktemp("runs"))


def opened(run, harvest):
    return Store(run / "harvest" / harvest)


def raw(store, table) -> list[dict]:
    frame = store.scan(table).collect()
    return frame.with_columns(pl.col(pl.Enum).cast(pl.String)).to_dicts()


def unit(row) -> str:
    return f"{row['layer']}:{row['component']}"


# ---- statistics ----------------------------------------------------------------------------------


def test_components_are_sums_divided_by_counts(run):
    """Density and means over all positions and over firings, sorted with the layer as tie."""
    store = opened(run, "statistics")
    expected = {}
    for row in raw(store, "components"):
        n, N = row["firings"], row["positions"]
        mean = row["activation_sum"] / N
        expected[unit(row)] = (
            n / N,
            row["importance_sum"] / N,
            row["firing_importance_sum"] / n if n else None,
            math.sqrt(max(0, row["activation_square_sum"] / N - mean**2)),
        )
    rows = store.components().to_dicts()
    assert len(rows) == len(expected) == sum(store.manifest["C"].values())
    for row in rows:
        density, mean, firing, deviation = expected[unit(row)]
        assert row["density"] == pytest.approx(density)
        assert row["mean_importance"] == pytest.approx(mean)
        assert row["firing_importance"] == (None if firing is None else pytest.approx(firing))
        assert row["activation_std"] == pytest.approx(deviation, abs=1e-9)
    densities = [row["density"] for row in rows]
    assert densities == sorted(densities, reverse=True)
    by_layer = store.components("h.1.mlp.c_fc", "layer")
    assert by_layer["component"].to_list() == list(range(6))
    assert store.component(NAME)["density"] == pytest.approx(expected[NAME][0])


def test_correlations_are_those_of_a_plain_count(run):
    """Every pair of components that are nodes at the same position (from the table `nodes`)."""
    store = opened(run, "statistics")
    at = defaultdict(set)
    for row in raw(opened(run, "nodes"), "nodes"):
        if row["kind"] == "component":
            at[row["prompt_id"], row["pos"]].add(unit(row))
    N = store.component(NAME)["positions"]
    n = Counter(name for names in at.values() for name in names)
    together = Counter(name for names in at.values() if NAME in names for name in names - {NAME})
    rows = store.correlations(NAME).to_dicts()
    assert {unit(row): row["together"] for row in rows} == together
    for row in rows:
        m, both = n[unit(row)], row["together"]
        assert row["p_other"] == pytest.approx(both / n[NAME])
        assert row["p_this"] == pytest.approx(both / m)
        assert row["jaccard"] == pytest.approx(both / (n[NAME] + m - both))
        assert row["pmi"] == pytest.approx(math.log(both * N / (n[NAME] * m)), abs=1e-12)
        v = 1 / both - 1 / max(m, n[NAME]) + 1 / min(m, n[NAME]) - 1 / N
        assert row["low"] == pytest.approx(row["pmi"] - 1.96 * math.sqrt(v))
    lows = [row["low"] for row in rows]
    assert lows == sorted(lows, reverse=True)


def test_pmi_is_the_same_from_both_sides(run):
    """Also its interval: the order of two components does not matter."""
    store = opened(run, "statistics")
    for row in store.correlations(NAME).to_dicts():
        back = {unit(other): other for other in store.correlations(unit(row)).to_dicts()}[NAME]
        for column in ("together", "jaccard", "pmi", "low", "high"):
            assert back[column] == pytest.approx(row[column], abs=1e-12)
        assert back["p_other"] == pytest.approx(row["p_this"])


def test_tokens_are_those_of_a_plain_count(run):
    """Input tokens: recall, precision, lift and PMI from the prompts and the nodes."""
    store = opened(run, "statistics")
    tokens = {row["prompt_id"]: row["token_ids"] for row in raw(store, "prompts")}
    total = Counter(token for ids in tokens.values() for token in ids)
    own = Counter()
    for row in raw(opened(run, "nodes"), "nodes"):
        if row["kind"] == "component" and unit(row) == NAME:
            own[tokens[row["prompt_id"]][row["pos"]]] += 1
    n, N = sum(own.values()), sum(total.values())
    rows = store.tokens(NAME).to_dicts()
    assert {row["token_id"]: row["count"] for row in rows} == own
    for row in rows:
        K, T = row["count"], total[row["token_id"]]
        assert row["recall"] == pytest.approx(K / n)
        assert row["precision"] == pytest.approx(K / T)
        assert row["lift"] == pytest.approx(K / T / (n / N))
        assert row["pmi"] == pytest.approx(math.log(row["lift"]), abs=1e-12)
    outputs = store.tokens(NAME, "output")
    assert outputs["count"].sum() == pytest.approx(n)
    assert outputs["token_id"].to_list()[-1] is None or outputs["token_id"].null_count() == 0


def test_contexts_show_the_tokens_around_each_firing(run):
    """The window is cut at both ends of the prompt; the firing is where `first` says."""
    store = opened(run, "statistics")
    tokens = {row["prompt_id"]: row["tokens"] for row in raw(store, "prompts")}
    for kind in ("uniform", "importance", "positive", "negative"):
        rows = store.contexts(NAME, kind, window=2).to_dicts()
        assert rows or kind in ("positive", "negative")
        for row in rows:
            whole = tokens[row["prompt_id"]]
            first = max(0, row["pos"] - 2)
            assert row["first"] == first
            assert row["tokens"] == whole[first : row["pos"] + 3]
        if kind != "uniform":
            column = "importance" if kind == "importance" else "activation"
            sizes = [abs(row[column]) for row in rows]
            assert sizes == sorted(sizes, reverse=True)


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["all", "any"])
@pytest.mark.parametrize("least", [0.0, 0.6])
def test_search_is_a_plain_scan(run, mode, least):
    """Largest importance of each component on each prompt; smallest or largest of these."""
    store = opened(run, "nodes")
    names = [NAME, OTHER, "h.0.attn.q_proj:3"]
    best = defaultdict(dict)
    for row in raw(store, "nodes"):
        name = unit(row)
        if row["kind"] == "component" and name in names and row["importance"] >= least:
            known = best[row["prompt_id"]]
            known[name] = max(known.get(name, 0), row["importance"])
    expected = {}
    for prompt, found in best.items():
        if mode == "any" or len(found) == len(names):
            choose = min if mode == "all" else max
            expected[prompt] = (len(found), choose(found.values()))
    rows = store.search(names, mode, least)
    assert expected, "nothing is found, so nothing is tested"
    assert {p: (m, g) for p, m, g in rows.iter_rows()} == expected
    order = [(-m, -g, p) for p, m, g in rows.iter_rows()]
    assert order == sorted(order)


def test_prompts_by_text(run):
    """A part of the text without its spaces, or an expression on the text as it is."""
    store = opened(run, "nodes")
    texts = dict(store.prompts().select("prompt_id", "text").iter_rows())
    found = store.prompts(text="1 2")
    joined = {prompt for prompt, text in texts.items() if "12" in text.replace(" ", "")}
    assert set(found["prompt_id"]) == joined
    expression = r"\b7 \d\b"
    matching = {prompt for prompt, text in texts.items() if re.search(expression, text)}
    assert set(store.prompts(regex=expression)["prompt_id"]) == matching
    assert joined
    assert matching


@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_edges_are_normalized_before_any_is_left_out(run, how):
    """In-edges add up to 1 in absolute value, or their squares do, by node or by layer."""
    store = opened(run, "graphs")
    prompt_id = store.prompts()["prompt_id"][3]
    nodes = {row["node"]: row for row in store.scan("nodes", prompt_id).collect().to_dicts()}
    edges = store.scan("edges", prompt_id).collect()
    sizes = defaultdict(float)
    for _, _, target, value in edges.iter_rows():
        group = nodes[target]["layer"] if how == "layer_l2" else target
        sizes[group] += abs(value) if how == "target" else value * value
    expected = {}
    for _, source, target, value in edges.iter_rows():
        group = nodes[target]["layer"] if how == "layer_l2" else target
        size = sizes[group] if how == "target" else math.sqrt(sizes[group])
        scaled = value if how == "none" else (value / size if size else 0.0)
        expected[source, target] = pytest.approx(scaled, rel=1e-6, abs=1e-12)
    view = store.prompt(prompt_id, top_k=10, normalize=how)
    rows = view.edges.iter_rows()
    strongest = sorted((abs(e.expected) for e in expected.values()), reverse=True)[:10]
    for (source, target, value), size in zip(rows, strongest, strict=True):
        assert value == expected[source, target]
        assert abs(value) == pytest.approx(size, rel=1e-6)
    assert view.edges_total == len(edges)


def test_filters_of_a_prompt(run):
    """Unimportant components, components that are always on, and unlikely outputs are left out."""
    store = opened(run, "graphs")
    prompt_id = store.prompts()["prompt_id"][0]
    means = {unit(row): row["mean_importance"] for row in store.components().to_dicts()}
    view = store.prompt(
        prompt_id, 10**6, ci_threshold=0.5, max_mean_ci=0.4, output_prob_threshold=0.05
    )
    whole = store.prompt(prompt_id, 10**6)
    likely = {
        (row["pos"], row["token_id"])
        for row in whole.outputs.to_dicts()
        if row["ci_probability"] >= 0.05
    }
    expected = []
    for row in whole.nodes.to_dicts():
        is_component = row["kind"] == "component"
        if is_component and (row["importance"] < 0.5 or means[unit(row)] > 0.4):
            continue
        if row["kind"] == "output" and (row["pos"], row["component"]) not in likely:
            continue
        expected.append(row["node"])
    assert view.nodes["node"].to_list() == expected
    assert len(expected) < whole.nodes.height
    kept = set(expected)
    edges = {(s, t) for s, t, _ in whole.edges.iter_rows() if s in kept and t in kept}
    assert {(s, t) for s, t, _ in view.edges.iter_rows()} == edges
    assert set(view.outputs.select("pos", "token_id").iter_rows()) == likely


def test_edges_into_a_node_of_zeros_stay_zero():
    """No division by 0."""
    nodes = pl.DataFrame({"node": [0, 1], "layer": ["a", "b"]})
    edges = pl.DataFrame({"source": [0], "target": [1], "attribution": [0.0]})
    for how in NORMALIZATIONS:
        assert normalized(edges, nodes, how)["attribution"].to_list() == [0.0]


@pytest.mark.parametrize("side", ["sources", "targets"])
def test_neighbors_add_up_the_edges_of_all_graphs(run, side):
    """From graphs, by a plain loop; and the same sums from the harvest of sums."""
    graphs = opened(run, "graphs")
    total = defaultdict(float)
    number = Counter()
    this, other = ("target", "source") if side == "sources" else ("source", "target")
    nodes = {(row["prompt_id"], row["node"]): row for row in raw(graphs, "nodes")}
    for row in raw(graphs, "edges"):
        own = nodes[row["prompt_id"], row[this]]
        far = nodes[row["prompt_id"], row[other]]
        if own["kind"] == "component" and unit(own) == NAME:
            total[unit(far)] += row["attribution"]
            number[unit(far)] += 1
    rows = graphs.neighbors(NAME, side, top=1000).to_dicts()
    assert {unit(row): row["edges"] for row in rows} == number
    for row in rows:
        assert row["sum"] == pytest.approx(total[unit(row)], rel=1e-5, abs=1e-6)
    sums = opened(run, "sums").neighbors(NAME, side, top=1000).to_dicts()
    for row in sums:
        if not row["layer"].startswith(("wte", "output")):
            assert row["sum"] == pytest.approx(total[unit(row)], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("number", [-1, 10**30])
def test_numbers_out_of_range_are_one_line(run, number):
    graphs = opened(run, "graphs")
    some_prompt = graphs.prompts()["prompt_id"][0]
    with pytest.raises(BadInput, match="top_k"):
        graphs.prompt(some_prompt, top_k=number)
    with pytest.raises(BadInput, match="top"):
        graphs.neighbors(NAME, top=number)
    with pytest.raises(BadInput, match="window"):
        opened(run, "statistics").contexts(NAME, window=number)
    with pytest.raises(BadInput, match="min_importance"):
        graphs.search([NAME], min_importance=float(number))


# ---- commands ------------------------------------------------------------------------------------


def printed(capsys, run, words) -> str:
    verb, *rest = words
    assert cli.run([verb, str(run), *rest]) == 0
    return capsys.readouterr().out


CHOICES = {
    "components --sort": COMPONENT_SORTS,
    "component --examples": EXAMPLE_KINDS,
    "correlations --sort": CORRELATION_SORTS,
    "tokens --of": OF,
    "tokens --sort": TOKEN_SORTS,
    "neighbors --side": SIDES,
    "search --mode": SEARCH_MODES,
    "prompt --normalize": NORMALIZATIONS,
}


def test_commands_offer_what_queries_accept():
    """Their help is printed without polars, so their choices are written out."""
    offered = {
        f"{verb.name} {option.name}": set(option.choices)
        for verb in QUERIES
        for option in verb.options
        if option.choices
    }
    assert offered == {name: set(choices) for name, choices in CHOICES.items()}


def test_component_says_what_it_is_about(run, capsys):
    """Its statistics, tokens, correlations and examples, with the firing marked."""
    page = printed(capsys, run, ["component", NAME, "--examples", "uniform", "--top", "3"])
    row = opened(run, "statistics").component(NAME)
    assert f"fires at {row['firings']} of {row['positions']} positions" in page
    assert page.count("«") == 3
    for title in ("importance", "tokens where it fires", "next tokens", "fires together with"):
        assert title in page
    answer = json.loads(printed(capsys, run, ["component", NAME, "--json"]))
    assert answer["firings"] == row["firings"]
    assert len(answer["examples"]) == 8


def test_component_without_statistics_shows_what_is_known(run, capsys):
    """A harvest of nodes counts firings, but has no tokens or examples."""
    words = ["component", NAME, "--harvest", "nodes"]
    page = printed(capsys, run, words)
    row = opened(run, "nodes").component(NAME)
    assert f"fires at {row['firings']} of {row['positions']} positions" in page
    assert "make statistics: python -m spd_lightning predict" in page
    answer = json.loads(printed(capsys, run, [*words, "--json"]))
    assert answer["firings"] == row["firings"]
    assert answer["examples"] == answer["histogram"] == []


def test_all_rows_in_a_file(run, capsys, tmp_path):
    """CSV and Parquet have all rows, not one page."""
    path = tmp_path / "rows.parquet"
    page = printed(capsys, run, ["correlations", NAME, "--parquet", str(path), "--size", "2"])
    expected = opened(run, "statistics").correlations(NAME)
    assert f"wrote {expected.height} rows" in page
    strings = pl.col(pl.Enum, pl.Categorical).cast(pl.String)
    assert_frame_equal(pl.read_parquet(path).select(strings), expected.select(strings))
    path = tmp_path / "rows.csv"
    printed(capsys, run, ["prompts", "--csv", str(path)])
    assert pl.read_csv(path).height == opened(run, "nodes").manifest["prompts"]


BAD = {
    "component": (["component", "h.0.mlp.c_fc:600"], "it has 6; take one from 0 to 5"),
    "layer": (["component", "h.0.mlp.c_fx:1"], "h.0.mlp.c_fc"),
    "form": (["correlations", "5"], "layer:component"),
    "position": (["correlations", "h.0.mlp.c_fc:1:1"], "without a position"),
    "sort": (["components", "--sort", "size"], "unknown value"),
    "layer of a list": (["components", "--layer", "h.0"], "site 'h.0'"),
    "page": (["components", "--page", "999"], "page 999: the last page of 20 items is"),
    "size": (["components", "--size", "100000"], "at most 1000"),
    "harvest": (["components", "--harvest", "statistic"], "statistics"),
    "no statistics": (["components", "--harvest", "sums"], "statistics.yaml"),
    "no nodes": (["search", NAME, "--harvest", "statistics"], "no table 'nodes'"),
    "no component": (["search", ","], "no component is given"),
    "expression": (["prompts", "--regex", "(a"], "regex '(a'"),
    "long expression": (["prompts", "--regex", "(((a{1000}){1000}){1000})"], "regex '"),
    "prompt": (["prompt", "nothing like this"], "prompt 'nothing like this'"),
    "no name": (["components", "--csv", ""], "--csv '': the name is empty"),
    "device": (["components", "--csv", "/dev/null"], "'/dev/null': not a regular file"),
    "folder": (["components", "--csv", "/nowhere/rows.csv"], "the folder does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(run, capsys, case):
    """The value, the place and the remedy; exit code 2."""
    words, hint = BAD[case]
    verb, *rest = words
    assert cli.run([verb, str(run), *rest]) == 2
    message = capsys.readouterr().err
    lines = [line for line in message.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert hint in message


def test_another_harvest_answers_for_a_damaged_one_and_says_so(run, capsys, tmp_path):
    """Without another one, the damage is reported, and not that nothing was harvested."""
    copy = tmp_path / "queried"
    shutil.copytree(run, copy)
    damaged = copy / "harvest" / "nodes"
    (damaged / "manifest-0.json").write_text("{")
    assert cli.run(["search", str(copy), NAME]) == 0
    line = capsys.readouterr().err
    assert "nodes/manifest-0.json" in line
    assert "harvest 'graphs' answers instead" in line
    shutil.rmtree(copy / "harvest" / "graphs")
    assert cli.run(["search", str(copy), NAME]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nodes/manifest-0.json" in line


def test_a_harvest_in_progress_answers_and_says_so(run, capsys, tmp_path):
    """While a process writes a harvest, it is incomplete."""
    copy = tmp_path / "queried"
    shutil.copytree(run, copy)
    folder = copy / "harvest" / "statistics"
    settings = read_settings(folder)
    del settings["world"]
    writer = Writer(folder, settings)
    assert cli.run(["components", str(copy), "--harvest", "statistics"]) == 0
    assert "is not complete: it has" in capsys.readouterr().err
    writer.complete()
    assert cli.run(["components", str(copy), "--harvest", "statistics"]) == 0
    assert "is not complete" not in capsys.readouterr().err
