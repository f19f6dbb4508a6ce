"""Graphs of weights alone: against edges of prompts, naive loops, and changes of scale (laws A5,
A6, A8).
"""

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from support import tiny_checkpoints
from test_closed_form import MAPS, STYLES, THRESHOLD, dictionary, made, some_outputs
from torch import nn

from spd_lightning import cli
from spd_lightning.attribution.closed_form.trace import trace
from spd_lightning.attribution.closed_form.weights import links, weight_graph
from spd_lightning.attribution.graph import MODES, GraphSpec
from spd_lightning.attribution.prompt_graphs import attribution_graphs
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput
from spd_lightning.harvest.native_decoder import as_native_decoder
from spd_lightning.harvest.weights import weight_table
from spd_lightning.targets.huggingface import HuggingFaceLM
from spd_lightning.targets.toy import TMS
from spd_lightning.targets.transformer import Attention, Decoder
from spd_lightning.training.decompose import Decomposition

WHOLE = [style for style, (_, sites) in STYLES.items() if sites.items() >= MAPS.items()]

REFUSED = {
    "": "weights: RUN is missing",
    "txet": "run 'txet': not in",
    "toy": "weights: run 'toy': TMS is not a supported decoder",
    "text --min_share 2": "--min_share '2': not a number from 0 to 1",
    "text --to table.csv": "--to 'table.csv': unknown file type; end it in .parquet",
    "text --to no/where.parquet": "folder 'no' does not exist",
}


def denominator(norm, r):
    """What a norm divides by at each position."""
    match norm:
        case nn.RMSNorm():
            return (r.square().mean(-1) + norm.eps).sqrt()
        case nn.LayerNorm():
            return (r.var(-1, unbiased=False) + norm.eps).sqrt()
    return torch.ones_like(r[..., 0])


def norm_before(reader):
    parts = reader.split(".")
    return "norm_f" if reader == "lm_head" else f"h.{parts[1]}.norm_{1 if 'attn' in parts else 2}"


@pytest.mark.parametrize(
    ("style", "mode"),
    [
        *((style, "frozen") for style in WHOLE),
        ("without norm", "unmasked"),
        ("without norm", "ci_masked"),
    ],
)
def test_edges_through_the_residual_stream_are_weights_times_activations(style, mode):
    """A6, rule 2: frozen norms are constants, so an edge is w_i M_ij over the denominator; without
    norms, always.
    """
    model, tokens, g = made(style, prompts=1)
    layers, found = attribution_graphs(
        GraphSpec(model, tokens, g, MODES[mode], THRESHOLD, some_outputs)
    )
    edges = dictionary(layers, list(found), 0)
    run = trace(GraphSpec(model, tokens, g, MODES[mode], THRESHOLD))
    M = {
        (link.source, link.target): w
        for link, w in weight_graph(model, normalized=False)
        if link.kind == "residual"
    }
    checked = set()
    for (kind, (source, _, i, target, pos, j)), value in edges.items():
        if kind == "component" and (source, target) in M:
            norm = model.target.get_submodule(norm_before(target))
            expected = (
                run.weight[source][0, pos, i]
                * M[source, target][i, j]
                / denominator(norm, run.norm_inputs[norm])[0, pos]
            )
            assert value == pytest.approx(expected.item(), rel=1e-9, abs=1e-14)
            checked.add((source, target))
    assert checked == set(M)


def attention_of(model, layer):
    attention = model.target.get_submodule(f"h.{layer}.attn")
    assert isinstance(attention, Attention)
    return attention


@pytest.mark.parametrize("style", ["llama", "one key head", "gpt"])
def test_weights_of_heads_and_neurons_are_those_of_a_naive_loop(style):
    """Every head reads and writes its own slice; where heads share keys and values, neighbors share
    them.
    """
    model, _, _ = made(style)
    seen = set()
    for link, found in weight_graph(model, normalized=False):
        if link.kind == "residual":
            continue
        attn, source, target = (
            attention_of(model, 0),
            *(model[site].requires_grad_(False) for site in link[:2]),
        )
        d_head = 8 // attn.n_heads
        shared = attn.n_heads // attn.n_kv_heads
        for i in range(source.U.shape[0]):
            for j in range(target.V.shape[1]):
                if link.kind == "mlp":
                    expected = sum(
                        source.U[i, f] * target.V[f, j] for f in range(source.U.shape[1])
                    )
                else:
                    assert link.head is not None
                    ours = link.head * d_head
                    theirs = link.head // shared * d_head
                    read = target.V[:, j] if link.kind == "ov" else target.U[j] / d_head**0.5
                    expected = sum(source.U[i, theirs + e] * read[ours + e] for e in range(d_head))
                assert found[i, j].item() == pytest.approx(float(expected), rel=1e-9, abs=1e-14)
        seen.add((link.kind, link.head))
    assert seen == {("mlp", None), *((kind, head) for kind in ("ov", "qk") for head in range(4))}


def test_scores_at_the_querys_own_position_need_no_angle():
    """Rotary angles cancel there: what queries and keys write gives the same scores turned to any
    one position.
    """
    model, _, _ = made("llama")
    attn = attention_of(model, 1)
    assert isinstance(model.target, Decoder)
    rotary = model.target.rotary(6)
    q, k = (model[f"h.1.attn.{x}_proj"].U[:, None].expand(-1, 6, -1) for x in "qk")
    q = attn.turned(q, 4, rotary)
    k = attn.turned(k, 2, rotary).repeat_interleave(2, dim=1)
    for link, found in weight_graph(model, normalized=False):
        if link.kind == "qk" and link.target == "h.1.attn.q_proj":
            scores = k[:, link.head, 4] @ q[:, link.head, 4].T / 2**0.5
            torch.testing.assert_close(found, scores)


@pytest.mark.parametrize("style", WHOLE)
def test_a8_scales_of_components_do_not_matter(style):
    """U times k and V over k: the same weights, signs of k aside."""
    model, _, _ = made(style)
    before = list(weight_graph(model))
    with torch.no_grad():
        for name in model.sites:
            k = torch.rand(model.counts[name], dtype=torch.float64) * 5 + 0.1
            model[name].U.mul_(k[:, None])
            model[name].V.div_(k)
    after = list(weight_graph(model))
    assert before
    for (link, ours), (other, theirs) in zip(before, after, strict=True):
        assert link == other
        torch.testing.assert_close(theirs, ours)


def test_only_some_maps_need_be_sites():
    model, _, _ = made("mlps alone")
    found = {(link.source, link.target, link.kind) for link in links(model)}
    assert found == {
        ("h.0.mlp.c_fc", "h.0.mlp.down_proj", "mlp"),
        ("h.0.mlp.down_proj", "h.1.mlp.c_fc", "residual"),
        ("h.1.mlp.c_fc", "h.1.mlp.down_proj", "mlp"),
    }


def test_other_models_are_refused():
    with pytest.raises(
        BadInput,
        match=r"^weights: TMS is not a supported decoder; decompose a GPT-2, Llama, Mistral",
    ):
        weight_table(ComponentModel(TMS(5, 2), {"*": 3}))


@pytest.mark.parametrize("min_share", [0.0, 0.4])
def test_the_table_holds_the_strongest_into_each_target(min_share):
    """Row by row; what is a remnant has none, and the strongest come first."""
    model, _, _ = made("llama")
    with torch.no_grad():
        model["h.0.attn.o_proj"].U[2] *= 1e-3
        model["h.1.attn.v_proj"].V[:, 3] *= 1e-3
    remnants = {("h.0.attn.o_proj", 2), ("h.1.attn.v_proj", 3)}
    expected = {}
    largest = {}
    for link, values in weight_graph(model):
        for i, row in enumerate(values.tolist()):
            for j, value in enumerate(row):
                if not remnants & {(link.source, i), (link.target, j)}:
                    expected[(link.source, i, link.target, j, link.kind, link.head)] = value
                    into = link.target, j, link.kind
                    largest[into] = max(largest.get(into, 0.0), abs(value))
    expected = {key: v for key, v in expected.items() if abs(v) >= min_share * largest[key[2:5]]}
    table = weight_table(model, min_share)
    found = {tuple(key): value for *key, value in table.rows()}
    assert len(found) == len(table)
    assert found == pytest.approx(expected, rel=1e-6)
    assert table["weight"].abs().is_sorted(descending=True)
    assert table.schema["head"] == pl.UInt16


def test_a_model_of_transformers_has_its_twins_weights_under_its_own_names(tmp_path):
    tiny_checkpoints.write(tmp_path, "llama", num_key_value_heads=2)
    torch.manual_seed(0)
    model = ComponentModel(HuggingFaceLM.from_pretrained(str(tmp_path)), {"model.layers.*proj": 5})
    found = weight_table(model)
    twin = as_native_decoder(model, MODES["unmasked"])
    assert len(found)
    assert twin.model is not model
    ends = pl.col("source_layer", "target_layer").cast(pl.String)
    assert set(found.select(ends).unpivot()["value"]) <= set(model.sites)
    ours = weight_table(twin.model).with_columns(
        ends.replace({our: own for own, our in twin.names.items()})
    )
    assert_frame_equal(found.with_columns(ends), ours)


def test_the_verb_writes_the_table(tmp_path, monkeypatch, capsys):
    """One file, whole, of a run that was never trained; whatever else is asked for is refused in
    one line.
    """
    settings = {"vocab": 7, "d_model": 8, "n_layers": 1, "n_heads": 2, "context": 6}
    networks = {"text": (Decoder, settings), "toy": (TMS, {"n_features": 5, "n_hidden": 2})}
    torch.manual_seed(0)
    for name, (network, given) in networks.items():
        module = Decomposition(network(**given), {"h.*.mlp.*" if name == "text" else "linear1": 4})
        module.target_spec = {"class_path": f"spd_lightning.{network.__name__}", "init_args": given}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("base: stories-1L-tiny.yaml")
        module.save(tmp_path / name)
    monkeypatch.setenv("SPD_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.run(["weights", "text", "--min_share", "0"]) == 0
    assert capsys.readouterr().out.startswith(
        "weights: weights.parquet    16 rows, each at least 0 of the largest"
    )
    assert len(pl.read_parquet("weights.parquet")) == 16
    for words, said in REFUSED.items():
        assert cli.run(["weights", *words.split()]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
