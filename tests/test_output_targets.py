"""Graphs of what is asked for: outputs and components by name (A2, A3)."""

import pytest
import torch
from test_closed_form import CLOSED, THRESHOLD, assert_equal, dictionary, made, some_outputs
from test_nodes import WORDS, Ragged, decoder, harvested, shaken, table

from spd_lightning.attribution.autograd import cut_run, oracle
from spd_lightning.attribution.graph import GraphSpec
from spd_lightning.attribution.prompt_graphs import attribution_graphs
from spd_lightning.data.modules import SparseFeatures
from spd_lightning.errors import BadInput
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.harvest.output_targets import OutputTargets, thresholds, token_id
from spd_lightning.targets.toy import TMS

CHOSEN = ["h.0.mlp.*", "h.0.attn.v_proj:3", "h.1.attn.o_proj:2:0", "h.1.attn.o_proj:1-3:4"]


@pytest.mark.parametrize("mode", CLOSED)
@pytest.mark.parametrize("style", ["llama", "gpt"])
def test_a3_a_graph_of_chosen_nodes(style, mode):
    """It is the oracle's; all else is in the rests, so that frozen graphs still add up (A6)."""
    model, tokens, g = made(style, prompts=1)
    above = thresholds(model, CHOSEN, THRESHOLD, tokens.shape[1])
    spec = GraphSpec(model, tokens, g, CLOSED[mode], above, some_outputs)
    layers, found = attribution_graphs(spec)
    found = dictionary(layers, found, 0)
    assert_equal(found, oracle(cut_run(spec)), atol=1e-12)
    written_out = {("h.0.attn.v_proj", p, 3) for p in range(4)} | {("h.1.attn.o_proj", 2, 0)}
    written_out |= {("h.1.attn.o_proj", p, 4) for p in (1, 2, 3)}
    for layer in layers:
        for pos, c in layer.nodes[0].nonzero().tolist() if layer.kind == "component" else ():
            assert g[layer.name][0, pos, c] > THRESHOLD
            assert layer.name.startswith("h.0.mlp.") or (layer.name, pos, c) in written_out
    held = sum(int(layer.nodes.sum()) for layer in layers if layer.kind == "component")
    assert held == sum(int((g[name] > above[name]).sum()) for name in g) > 10
    if CLOSED[mode].linearization == "frozen" and CLOSED[mode].mask == "ones":
        into = {}
        for (_, (*_, target, pos, j)), value in found.items():
            into[target, pos, j] = into.get((target, pos, j), 0.0) + value
        for layer in layers:
            for _, pos, j in (
                layer.nodes.nonzero().tolist() if layer.kind in ("component", "output") else ()
            ):
                assert into[layer.name, pos, j] == pytest.approx(
                    layer.value[0, pos, j].item(), rel=1e-9, abs=1e-9
                )


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*predict returned None")
def test_a_harvest_of_what_is_asked_for(tmp_path):
    """Two tokens against a third, at the last position, by the MLP alone."""
    asked = OutputTargets(tokens=[WORDS[1], 3], contrast=WORDS[5], positions=[-1])
    module = decoder()
    (store,) = harvested(
        tmp_path, module, Ragged((6,)), PromptGraphs("frozen", outputs=asked, nodes=["h.0.mlp.*"])
    )
    nodes = table(store, "nodes")
    outputs = table(store, "outputs")
    last = nodes.filter(kind="output")
    assert set(last.select("pos", "component").iter_rows()) == {(5, 1), (5, 3)}
    assert set(outputs["token"]) == {WORDS[1], WORDS[3]}
    assert set(nodes.filter(kind="component")["layer"]) <= {
        f"h.0.mlp.{x}_proj" for x in ("gate", "up", "down")
    }
    batch = Ragged((6,)).batches[0]
    with torch.no_grad():
        logits = module.model.target(batch.inputs)[:, -1]
    expected = (logits[:, [1, 3]] - logits[:, 5:6]).flatten().tolist()
    found = last.sort("component")["activation"].sort().to_list()
    assert found == pytest.approx(sorted(expected), rel=1e-4, abs=1e-5)
    assert store.manifest["config"]["outputs"]["contrast"] == WORDS[5]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"outputs": OutputTargets(tokens=["zz"])}, "token 'zz' in outputs: not one"),
        (
            {"outputs": OutputTargets(contrast=99)},
            "token 99 in outputs: the vocabulary has 11 tokens; take 0 to 10",
        ),
        (
            {"outputs": OutputTargets(positions=[6])},
            "position 6 in outputs: a prompt has 6 positions; take −6 to 5",
        ),
        ({"nodes": ["h.0.mlp.up_pro:1"]}, r"site 'h.0.mlp.up_pro': not a site .*h.0.mlp.up_proj"),
        ({"nodes": ["h.7.*"]}, r"nodes 'h.7.\*': no such layer"),
        (
            {"nodes": ["h.0.mlp.up_proj:9:1"]},
            "nodes 'h.0.mlp.up_proj:9:1': there is no position 9; a prompt has 6",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*predict returned None")
def test_what_is_not_there_is_said(tmp_path, asked, message):
    with pytest.raises(BadInput, match=message):
        harvested(tmp_path, decoder(), Ragged((6,)), PromptGraphs(**asked))


def test_a_mean_and_another_token_exclude_each_other():
    with pytest.raises(BadInput, match="leave one out"):
        OutputTargets(centered=True, contrast=1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*predict returned None")
def test_vectors_have_no_tokens(tmp_path):
    module = shaken(TMS(5, 2), {"linear1": 3})
    with pytest.raises(BadInput, match="a model on vectors has no tokens"):
        harvested(
            tmp_path, module, SparseFeatures(5, 0.3, 4), PromptGraphs(outputs=OutputTargets())
        )


def test_tokens_go_by_id_or_by_name():
    def names(ids):
        return [WORDS[i] for i in ids]

    assert token_id(2, 11, names) == 2
    assert token_id(" a", 11, names) == 1
