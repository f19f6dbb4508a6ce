"""Attributions over a corpus: sums of prompt graphs (section A), their rows, and what is asked of
them.
"""

import json
from collections import defaultdict
from math import sqrt

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from support import tiny_checkpoints
from test_closed_form import CLOSED, PARTIAL, STYLES, THRESHOLD, made, some_outputs
from test_nodes import WORDS, Ragged, harvested, induction_head, shaken, table
from torch import nn

from spd_lightning import cli
from spd_lightning.analysis.dataset_edges import named, strongest
from spd_lightning.attribution.autograd import cut_run, prompt_edges
from spd_lightning.attribution.closed_form.trace import closed_form_obstacle
from spd_lightning.attribution.dataset_edges import dataset_edges, looked_up
from spd_lightning.attribution.graph import MODES, GraphSpec
from spd_lightning.attribution.outputs import every_output
from spd_lightning.commands.arguments import RunArguments
from spd_lightning.data.modules import Batches
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput
from spd_lightning.harvest.dataset_edges import DatasetEdges
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.harvest.native_decoder import as_native_decoder
from spd_lightning.runs import Run
from spd_lightning.store import Store
from spd_lightning.targets.huggingface import HuggingFaceLM
from spd_lightning.targets.toy import TMS
from spd_lightning.targets.transformer import Decoder
from spd_lightning.training.decompose import Decomposition
from spd_lightning.viewer import edge_tables
from spd_lightning.viewer.library import harvest_names


def by_definition(model, inputs, g, mode, outputs):
    """The sums over all edges of prompt graphs, read one by one.

    {(kind, S, i, T, j): (edges, Σ A, Σ A·sign(a_T), and of both Σ over prompts of the prompt's sum
    squared)}
    """
    rows = looked_up(model, inputs)
    layers, found = prompt_edges(GraphSpec(model, inputs, g, mode, THRESHOLD, outputs))
    sums: dict = defaultdict(lambda: [(0, 0.0, 0.0)] * len(inputs))

    def component(layer, prompt, at):
        if layer.kind == "embedding":
            return rows[layer.name][prompt, at[0]].item()
        return 0 if layer.whole else at[1]

    for e in found:
        source = layers[e.source]
        target = layers[e.target]
        for p, start, end, value in zip(*(column.tolist() for column in e[2:]), strict=True):
            i = component(source, p, start)
            j = component(target, p, end)
            sign = 1 if target.value[(p, *end)] >= 0 else -1
            key = source.kind, source.name, i, target.name, j
            n, total, size = sums[key][p]
            sums[key][p] = n + 1, total + value, size + sign * value
    found_sums = {}
    for key, prompts in sums.items():
        counts, totals, sizes = zip(*prompts, strict=True)
        squares = (sum(value**2 for value in values) for values in (totals, sizes))
        found_sums[key] = sum(counts), sum(totals), sum(sizes), *squares
    return found_sums


def as_dictionary(pairs):
    found = {}
    for pair in pairs:
        for i, j, *sums in zip(*(column.tolist() for column in pair[3:]), strict=True):
            key = pair.kind, pair.source_layer, i, pair.target_layer, j
            assert key not in found
            found[key] = tuple(sums)
    return found


def assert_same(found, expected, rtol=1e-9, atol=1e-12, slack=0):
    """Alike as dictionaries; only edges across positions may be zero in one and left out in the
    other: a few, slack.
    """
    largest = [max(abs(sums[number]) for sums in expected.values()) for number in range(5)]
    for key in found.keys() | expected.keys():
        n, *sums = found.get(key, (0, 0.0, 0.0, 0.0, 0.0))
        m, *wanted = expected.get(key, (0, 0.0, 0.0, 0.0, 0.0))
        assert abs(n - m) <= slack or (n > m and key[1].endswith(("k_proj", "v_proj"))), key
        assert sums == [
            pytest.approx(w, rel=rtol, abs=atol * big)
            for w, big in zip(wanted, largest[1:], strict=True)
        ]


@pytest.mark.parametrize("mode", CLOSED)
@pytest.mark.parametrize("style", STYLES)
def test_sums_are_those_of_the_prompt_graphs(style, mode):
    """Section A: both metrics, beside the edges of batched products one by one; in closed form no
    backward pass.
    """
    model, tokens, g = made(style, prompts=3, length=5)
    with torch.inference_mode(closed_form_obstacle(model, CLOSED[mode]) is None):
        _, pairs = dataset_edges(GraphSpec(model, tokens, g, CLOSED[mode], THRESHOLD, some_outputs))
    expected = by_definition(model, tokens, g, CLOSED[mode], some_outputs)
    assert_same(as_dictionary(pairs), expected, slack=5 if style in PARTIAL else 0)


def test_toys_too():
    """Models without closed forms: vectors, whose features are sources, and tokens that look up two
    embeddings.
    """
    torch.manual_seed(0)
    tms = ComponentModel(TMS(5, 2), {"*": 4}).double()
    head = induction_head().model.double()
    x = torch.rand(6, 5).double() * (torch.rand(6, 5) < 0.6)
    for model, inputs in ((tms, x), (head, torch.randint(0, len(WORDS), (3, 5)))):
        g = {name: torch.rand(a.shape).double() for name, a in model.clean(inputs).inner.items()}
        nodes, pairs = dataset_edges(GraphSpec(model, inputs, g, MODES["unmasked"], THRESHOLD))
        assert_same(
            as_dictionary(pairs), by_definition(model, inputs, g, MODES["unmasked"], every_output)
        )
    assert {node.layer for node in nodes} == {"embed", "pos_embed", *head.sites, "output"}
    assert nodes[1].component.tolist() == [0, 1, 2, 3, 4]  # positions


def test_models_of_transformers_by_their_twins(tmp_path):
    """Closed forms of a decoder with the same weights, under the model's own names, to single
    precision.
    """
    tiny_checkpoints.write(tmp_path, "llama")
    target = HuggingFaceLM.from_pretrained(str(tmp_path))
    target.model.set_attn_implementation("eager")
    model = ComponentModel(
        target, {"model.layers.*.self_attn.*": 5, "model.layers.*.mlp.*_proj": 6}
    ).double()
    tokens = tiny_checkpoints.tokens(2, 4)
    g = {
        name: (1.8 * torch.rand(a.shape).double() - 0.6).clamp(0, 1)
        for name, a in model.clean(tokens).inner.items()
    }
    spec = GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD)
    quick = as_native_decoder(model, spec.mode)
    assert quick.model is not model
    (nodes, found), (slow, expected) = (
        way(spec, lambda name: name.startswith("model.")) for way in (quick.sums, dataset_edges)
    )
    assert [node.layer for node in nodes] == [node.layer for node in slow]
    assert_same(as_dictionary(found), as_dictionary(expected), rtol=1e-4, atol=1e-6)


def test_both_metrics_are_gradients_of_sums_and_of_sizes():
    """One backward pass a target over the whole batch, of Σ a_T and of Σ |a_T| over the places
    where T is a node.
    """
    model, tokens, g = made("llama", prompts=3, length=5)
    found = as_dictionary(
        dataset_edges(GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs))[1]
    )
    layers = cut_run(GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs))
    sources = [layer for layer in layers if layer.kind == "component"]
    for target in layers[2::3]:
        values = target.value[..., 1] * target.nodes[..., 1]
        leaves = [s.leaf for s in sources if s.leaf is not None]
        both = [
            torch.autograd.grad(spec.sum(), leaves, retain_graph=True, allow_unused=True)
            for spec in (values, values.abs())
        ]
        for source, *gradients in zip(sources, *both, strict=True):
            if gradients[0] is None:
                continue
            sums = [
                (source.contributions(x[None])[0] * source.nodes).sum((0, 1)).tolist()
                for x in gradients
            ]
            for i, expected in enumerate(zip(*sums, strict=True)):
                _, *mine = found.get(("component", source.name, i, target.name, 1), (0, 0.0, 0.0))[
                    :3
                ]
                assert mine == pytest.approx(list(expected), rel=1e-9, abs=1e-12)


def test_edges_through_attention_are_counted_by_pairs_of_places():
    model, tokens, g = made("llama", layers=1)
    found = as_dictionary(
        dataset_edges(GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs))[1]
    )
    for name in ("k", "v"):
        source, target = (g[f"h.0.attn.{x}_proj"] > THRESHOLD for x in (name, "o"))
        for i in range(5):
            for j in range(5):
                counts = torch.outer(target[..., j].flatten(), source[..., i].flatten()).view(
                    2, 4, 2, 4
                )
                expected = sum(
                    int(counts[p, s, p, : s + 1].sum()) for p in range(2) for s in range(4)
                )
                key = "component", f"h.0.attn.{name}_proj", i, "h.0.attn.o_proj", j
                assert found.get(key, (0,))[0] == expected


def test_a6_frozen_sums_add_up():
    """All that reaches a component over the corpus is what it holds where it is a node, and so with
    sizes.
    """
    model, tokens, g = made("gpt", prompts=3)
    _, pairs = dataset_edges(GraphSpec(model, tokens, g, MODES["frozen"], THRESHOLD, some_outputs))
    arriving: dict = defaultdict(lambda: [0.0, 0.0])
    for key, (_, *sums) in ((key, row[:3]) for key, row in as_dictionary(pairs).items()):
        arriving[key[3:]] = [a + b for a, b in zip(arriving[key[3:]], sums, strict=True)]
    inner = model.clean(tokens).inner
    for name, a in inner.items():
        held = a * (g[name] > THRESHOLD)
        for j in range(a.shape[-1]):
            expected = [held[..., j].sum().item(), held[..., j].abs().sum().item()]
            assert arriving[name, j] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_normalizers_are_those_of_a_naive_pass():
    model, tokens, g = made("gpt")
    nodes, _ = dataset_edges(
        GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs)
    )
    found = {node.layer: node for node in nodes}
    for name, a in model.clean(tokens).inner.items():
        assert found[name].firings.tolist() == (g[name] > THRESHOLD).sum((0, 1)).tolist()
        torch.testing.assert_close(found[name].importance, g[name].sum((0, 1)))
        torch.testing.assert_close(found[name].square, a.square().sum((0, 1)))
    wte = found["wte"]
    embedding = model.target.get_submodule("wte")
    assert isinstance(embedding, nn.Embedding)
    assert wte.component.tolist() == sorted(set(tokens.flatten().tolist()))
    for token, count, square in zip(wte.component, wte.firings, wte.square, strict=True):
        assert count == (tokens == token).sum()
        assert square == pytest.approx(count * embedding.weight[token].square().sum().item())


def test_layers_can_be_chosen():
    """What is not wanted is as if it had no nodes; in closed form and otherwise alike."""
    for style in ("llama", "mlps alone"):
        model, tokens, g = made(style)
        every = dataset_edges(
            GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs)
        )
        some = dataset_edges(
            GraphSpec(model, tokens, g, MODES["unmasked"], THRESHOLD, some_outputs),
            lambda layer: layer.startswith("h.0.mlp"),
        )
        assert {node.layer for node in some[0]} == {
            name for name in model.sites if name.startswith("h.0.mlp")
        }
        whole = as_dictionary(every[1])
        expected = {
            k: v
            for k, v in whole.items()
            if all(name.startswith("h.0.mlp") for name in (k[1], k[3]))
        }
        assert_same(as_dictionary(some[1]), expected)
        assert expected


# ---- harvests ------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)
LENGTHS = (7, 4, 5)
ENDS = ["source_kind", "source_layer", "source", "target_layer", "target"]


def decoder() -> Decomposition:
    torch.manual_seed(1)
    network = Decoder(vocab=len(WORDS), d_model=8, n_layers=1, n_heads=2, context=8, mlp="gated")
    return shaken(network, {"h.*.attn.*_proj": 5, "h.*.mlp.*": 6})


def summed(store: Store, name: str = "dataset_edges") -> pl.DataFrame:
    keys = ENDS if name == "dataset_edges" else ["kind", "layer", "component"]
    return table(store, name).group_by(keys).sum().sort(keys)


def busiest(store: Store, layer: str) -> int:
    """The component of a layer that is a node most often."""
    return (
        summed(store, "dataset_nodes")
        .filter(pl.col("layer") == layer)
        .sort("firings")["component"][-1]
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Prompt graphs and their sums, harvested in one pass, into a run of their own."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    return run, *harvested(run, decoder(), Ragged(LENGTHS), PromptGraphs(), DatasetEdges())


def test_one_pass_gives_graphs_and_their_sums(both):
    """The table of sums is that of prompt graphs joined, grouped and added up."""
    _, graphs, sums = both
    nodes = table(graphs, "nodes").select(
        "prompt_id", "node", "kind", "layer", "component", "pos", "activation"
    )
    texts = {
        row["prompt_id"]: row["token_ids"]
        for row in graphs.scan("prompts").collect().iter_rows(named=True)
    }
    token = [
        texts[row["prompt_id"]][row["pos"]] if row["layer"] == "wte" else row["component"]
        for row in nodes.iter_rows(named=True)
    ]
    nodes = nodes.with_columns(component=pl.Series(token, dtype=pl.UInt32))
    edges = table(graphs, "edges")
    for end in ("source", "target"):
        own = nodes.select("prompt_id", pl.exclude("prompt_id").name.prefix(f"{end}_"))
        edges = edges.join(own, left_on=["prompt_id", end], right_on=["prompt_id", f"{end}_node"])
    sign = pl.when(pl.col("target_activation") < 0).then(-1.0).otherwise(1.0)
    edges = edges.select(
        "prompt_id", "source_kind", "source_layer", "target_layer",
        source="source_component", target="target_component",
        sum=pl.col("attribution").cast(pl.Float64),
        sum_abs_target=sign * pl.col("attribution").cast(pl.Float64),
    )  # fmt: skip
    by_prompt = edges.group_by("prompt_id", *ENDS).agg(
        pl.len().cast(pl.UInt64).alias("edges"), pl.col("sum", "sum_abs_target").sum()
    )
    expected = by_prompt.group_by(ENDS).agg(
        pl.col("edges", "sum", "sum_abs_target").sum(),
        prompt_square_sum=pl.col("sum").pow(2).sum(),
        prompt_square_sum_abs_target=pl.col("sum_abs_target").pow(2).sum(),
    )
    found = summed(sums)
    assert_frame_equal(found, expected.select(found.columns).sort(ENDS), rel_tol=1e-4, abs_tol=1e-6)
    firings = (
        table(graphs, "components")
        .group_by("layer", "component")
        .agg(pl.col("firings", "positions").sum())
    )
    own = summed(sums, "dataset_nodes").filter(pl.col("kind") == "component")
    own = own.select("layer", "component", "firings", "positions")
    assert_frame_equal(own, firings.sort("layer", "component"))


class Breaking(Ragged):
    """Ends with an error when it has given all."""

    def predict_dataloader(self):
        def given():
            yield from self.batches
            raise RuntimeError("no more")

        return Batches(given, len(self.batches) + 1)


def test_groups_and_sittings_change_nothing(both, tmp_path):
    """Written prompt by prompt, or cut short within a group and gone on with: nothing is lost,
    nothing there twice.
    """
    _, _, whole = both
    (single,) = harvested(tmp_path / "single", decoder(), Ragged(LENGTHS), DatasetEdges(group=1))
    cut = DatasetEdges(group=7)
    with pytest.raises(RuntimeError, match="no more"):
        harvested(tmp_path / "cut", decoder(), Breaking(LENGTHS), cut)
    assert cut.folder is not None
    part = Store(cut.folder).manifest
    assert (part["complete"], part["prompts"]) == (False, 10)  # of 15, in batches of 5
    (mended,) = harvested(tmp_path / "cut", decoder(), Ragged(LENGTHS), DatasetEdges(group=7))
    for store in (single, mended):
        assert store.manifest["complete"]
        assert store.manifest["prompts"] == whole.manifest["prompts"] == 15
        for name in ("dataset_edges", "dataset_nodes"):
            assert_frame_equal(summed(store, name), summed(whole, name), rel_tol=1e-5, abs_tol=1e-6)
    assert whole.manifest["shards"] == 1


def test_a_long_group_is_added_up_as_it_grows(both, tmp_path, monkeypatch):
    monkeypatch.setattr("spd_lightning.budgets.MAX_SUM_ROWS", 10)
    (store,) = harvested(tmp_path, decoder(), Ragged(LENGTHS), DatasetEdges())
    for name in ("dataset_edges", "dataset_nodes"):
        assert_frame_equal(summed(store, name), summed(both[2], name), rel_tol=1e-9)


def test_a_harvest_of_chosen_layers(tmp_path):
    (store,) = harvested(
        tmp_path, decoder(), Ragged(), DatasetEdges(layers=["h.0.mlp.*"], name="mlp")
    )
    found = table(store, "dataset_edges")
    assert set(found["target_layer"]) == {"h.0.mlp.down_proj"}
    assert set(found["source_layer"]) == {"h.0.mlp.gate_proj", "h.0.mlp.up_proj"}
    with pytest.raises(
        BadInput, match=r"layers 'h.0.mpl.\*' in DatasetEdges: no such layer; choose from: h.0"
    ):
        harvested(tmp_path, decoder(), Ragged(), DatasetEdges(layers=["h.0.mpl.*"], name="none"))


def test_configs_laid_over_another_add_their_harvesters():
    """graphs.yaml and dataset_edges.yaml together; what the first config names is replaced, as
    ever.
    """

    def harvesters(*names):
        request = RunArguments(["stories-2L.yaml", *names])
        return [
            each["class_path"].removeprefix("spd_lightning.")
            for each in request.config["trainer"]["callbacks"]
        ]

    assert harvesters() == ["PromptNodes"]
    assert harvesters("dataset_edges.yaml") == ["DatasetEdges"]
    assert harvesters("graphs.yaml", "wandb.yaml", "dataset_edges.yaml") == [
        "PromptGraphs",
        "DatasetEdges",
    ]
    assert harvesters("graphs.yaml", "graphs.yaml") == ["PromptGraphs"]
    together = RunArguments(["stories-2L.yaml", "graphs.yaml", "dataset_edges.yaml"]).config
    assert together["trainer"]["callbacks"][0]["init_args"] == {"min_share": 0.005}


# ---- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["activation", "size"])
@pytest.mark.parametrize("scale", ["sum", "mean", "normalized"])
@pytest.mark.parametrize("side", ["sources", "targets"])
def test_strongest_beside_loops_over_all_rows(both, side, scale, metric):
    """Values, intervals over prompts and order, by hand from the rows of the tables."""
    store = both[2]
    nodes = {
        (r["layer"], r["component"]): r
        for r in summed(store, "dataset_nodes").iter_rows(named=True)
    }
    layer = "h.0.attn.o_proj"
    (here, there) = ("target", "source") if side == "sources" else ("source", "target")
    expected = []
    busy = busiest(store, layer)
    for row in summed(store).iter_rows(named=True):
        if (row[f"{here}_layer"], row[here]) != (layer, busy) or row["edges"] < 3:
            continue
        source = nodes[row["source_layer"], row["source"]]
        target = nodes[row["target_layer"], row["target"]]
        rms = sqrt(target["activation_square_sum"] / target["positions"])
        by = {"sum": 1, "mean": source["firings"], "normalized": source["importance_sum"] * rms}[
            scale
        ]
        values = row["sum"] / by, row["sum_abs_target"] / by
        name = {"activation": "sum", "size": "sum_abs_target"}[metric]
        squares = row["prompt_square_sum" + name.removeprefix("sum")]
        half = 1.96 * sqrt(15 / 14 * (squares - row[name] ** 2 / 15)) / by
        ends = row[name] / by - half, row[name] / by + half
        expected.append((row[f"{there}_layer"], row[there], row["edges"], *values, *ends))
    which = {"activation": 3, "size": 4}[metric]
    expected.sort(
        key=lambda row: (-max(0.0, abs(row[which]) - (row[6] - row[5]) / 2), -abs(row[which]))
    )
    found = strongest(store, layer, busy, side, scale, metric, top_k=5, min_edges=3)
    assert len(expected) > 5
    for row, wanted in zip(found.drop("kind").rows(), expected, strict=False):
        assert row[:3] == wanted[:3]
        assert row[3:] == pytest.approx(wanted[3:], rel=1e-9)
    assert len(found) == 5


def test_names_of_what_drives(both):
    found = strongest(both[2], "h.0.attn.q_proj", 0, top_k=3, min_edges=1)
    for name, component in zip(named(both[2], found), found["component"], strict=True):
        assert name == f"wte:{component} {WORDS[component]!r}"
    heard = strongest(
        both[2], "wte", found["component"][0], "targets", "sum", top_k=99, min_edges=1
    )
    assert {name.partition(":")[0] for name in named(both[2], heard)} == set(heard["layer"])
    assert {
        repr(WORDS[c]) in name
        for name, c, layer in zip(
            named(both[2], heard), heard["component"], heard["layer"], strict=True
        )
        if layer == "output"
    } == {True}


@pytest.mark.parametrize(
    ("layer", "component", "why"),
    [
        (
            "h.0.mlp.gate",
            1,
            r"layer 'h.0.mlp.gate' is not in harvest '.*'; did you mean 'h.0.mlp.gate_proj'\?",
        ),
        (
            "h.0.mlp.gate_proj",
            9,
            r"component 9 of 'h.0.mlp.gate_proj' is not in harvest '.*'; the nearest is 5",
        ),
    ],
)
def test_what_there_is_not_is_refused(both, layer, component, why):
    with pytest.raises(BadInput, match=why):
        strongest(both[2], layer, component)
    with pytest.raises(
        BadInput, match=r"has no sums over a corpus; run predict with --config dataset_edges\."
    ):
        strongest(both[1], "h.0.mlp.gate_proj", 1)


def test_edges_on_the_command_line(both, capsys):
    run = str(both[0])
    assert cli.run(["edges", run, "h.0.mlp.down_proj:1", "--top_k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "h.0.mlp.down_proj:1 over 15 prompts, unmasked, normalized; pairs with at least 10 edges"
    )
    assert [line.split()[0] for line in lines if line[:1].isalpha()][1:] == ["sources", "targets"]
    assert len(lines) == 9
    assert (
        cli.run(
            [
                "edges",
                run,
                "h.0.mlp.down_proj:1",
                "--sources",
                "--json",
                "--scale",
                "sum",
                "--top_k",
                "3",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    expected = strongest(both[2], "h.0.mlp.down_proj", 1, scale="sum", top_k=3)
    assert [row["to_size"] for row in found["sources"]] == expected["to_size"].to_list()
    assert list(found) == ["sources"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["h.0.mlp.down_proj"], "component 'h.0.mlp.down_proj': write layer:number"),
        (
            ["h.0.mlp.down_proj:1", "--harvest", "dataset-unmaskd"],
            "did you mean 'dataset-unmasked'?",
        ),
        (["h.0.mlp.down_proj:1", "--top_k", "0"], "--top_k '0': not a whole number of at least 1"),
        (
            ["h.0.mlp.down_proj:1", "--scale", "log"],
            "--scale 'log': unknown value; choose from: mean, normalized, sum",
        ),
        ([], "edges: COMPONENT is missing: layer:number"),
    ],
)
def test_bad_questions_on_the_command_line(both, capsys, words, why):
    assert cli.run(["edges", str(both[0]), *words]) == 2
    told = capsys.readouterr().err
    assert why in told
    assert told.count("\n") == 1


def test_the_viewer_shows_them_beside_components(both):
    """Sums are no harvest to choose in the viewer; they stand below the components of whichever is
    chosen.
    """
    run = Run(both[0])
    assert harvest_names(run) == ["graphs-unmasked"]
    busy = busiest(both[2], "h.0.attn.o_proj")
    page = edge_tables.of_run(run, "h.0.attn.o_proj", busy)
    found = strongest(both[2], "h.0.attn.o_proj", busy, "targets", top_k=edge_tables.TOP_K)
    assert page is not None
    assert [row[1] for row in page.targets] == found["to_activation"].to_list()
    html = edge_tables.html(page)
    assert f"Strongest sources of h.0.attn.o_proj:{busy}" in html
    assert html.count("<tr>") == 2 + len(page.sources) + len(page.targets)
    assert edge_tables.update(run, "h.0.attn.o_proj", 99, busy, 5) == (busy, html)
    bare = edge_tables.update(Run(both[0] / "harvest/graphs-unmasked"), "h.0.attn.o_proj", 1, 2, 5)
    assert bare == (None, "")
