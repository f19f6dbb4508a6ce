"""The graph of an induction head shows its mechanism: the previous token is written down, then
looked up (law A1).

On `BOS T* S M T* S` the first layer must copy S into M's position, and the second, at the end, must
find that position by its key and copy M from it. Components here are exact (V = Wᵀ, U the
identity), so edges are those of the network.
"""

import pytest
import torch

from spd_lightning.attribution.autograd import LayerEdges, prompt_edges
from spd_lightning.attribution.graph import MODES, GraphSpec
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.targets.toy import InductionHead, induced_token, induction_tokens

PROMPTS, VOCAB, LENGTH, WIDTH = 24, 32, 16, 32


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    target = InductionHead(VOCAB, WIDTH, LENGTH)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(target.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        loss = target.loss(sequences(128, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert target.unrepresented() == []
    return target


def sequences(rows, generator):
    return induction_tokens(
        torch.randint(1, VOCAB, (rows, 1), generator=generator), VOCAB, LENGTH, generator
    )


@pytest.fixture(scope="module")
def graphs(trained):
    """Prompts, where M stands in each, and by (source, target) name the edges of their unmasked
    graphs.
    """
    tokens = sequences(PROMPTS, torch.Generator().manual_seed(7))
    model = ComponentModel(trained, {"h.*.attn.*_proj": WIDTH})
    for name, site in model.sites.items():
        model[name].V.data = site.weight.T.clone()
        model[name].U.data = torch.eye(WIDTH)
    model = model.double()
    g = {name: torch.ones(*tokens.shape, WIDTH).double() for name in model.sites}
    wanted = induced_token(tokens)

    def answer(output):
        chosen = torch.zeros_like(output, dtype=torch.bool)
        chosen[torch.arange(PROMPTS), -1, wanted] = True
        return chosen

    layers, found = prompt_edges(GraphSpec(model, tokens, g, MODES["unmasked"], 0.5, answer))
    parts: dict[tuple[str, str], list[LayerEdges]] = {}
    for e in found:
        parts.setdefault((layers[e.source].name, layers[e.target].name), []).append(e)
    edges = {
        pair: LayerEdges(
            several[0].source,
            several[0].target,
            *map(torch.cat, zip(*(e[2:] for e in several), strict=True)),
        )
        for pair, several in parts.items()
    }
    return (tokens == tokens[:, -1:]).int().argmax(1) + 1, edges


def strengths(e: LayerEdges, target_pos):
    """Per prompt and source position, how strongly all edges go from there to one position [prompt,
    pos].
    """
    here = e.target_at[:, 0] == target_pos[e.prompt]
    flat = e.prompt[here] * LENGTH + e.source_at[here, 0]
    sizes = torch.zeros(PROMPTS * LENGTH).double().index_add(0, flat, e.attribution[here].abs())
    return sizes.view(PROMPTS, LENGTH)


def test_a1_the_first_layer_copies_the_previous_token(graphs):
    m, edges = graphs
    copied = strengths(edges["h.0.attn.v_proj", "h.0.attn.o_proj"], m)
    assert (copied.argmax(1) == m - 1).float().mean() > 0.9


@pytest.mark.parametrize("part", ["k", "v"])
def test_a1_the_second_layer_looks_up_what_followed_it(graphs, part):
    m, edges = graphs
    end = torch.full_like(m, LENGTH - 1)
    found = strengths(edges[f"h.1.attn.{part}_proj", "h.1.attn.o_proj"], end)
    assert (found.argmax(1) == m).float().mean() > 0.9


def test_a1_keys_are_made_of_what_the_first_layer_wrote(graphs):
    """At M's position the second layer's key reads the first layer's head far more than the token
    that stands there.
    """
    m, edges = graphs
    from_head, from_token = (
        strengths(edges[source, "h.1.attn.k_proj"], m)[torch.arange(PROMPTS), m]
        for source in ("h.0.attn.o_proj", "embed")
    )
    assert (from_head > 3 * from_token).float().mean() > 0.9


def test_a1_the_answer_is_written_by_the_second_layer(graphs):
    _, edges = graphs
    written = {
        name: torch.zeros(PROMPTS).double().index_add(0, e.prompt, e.attribution)
        for (name, target), e in edges.items()
        if target == "output"
    }
    assert set(written) == {"embed", "pos_embed", "h.0.attn.o_proj", "h.1.attn.o_proj"}
    for name, sums in written.items():
        if name != "h.1.attn.o_proj":
            assert (written["h.1.attn.o_proj"] > 2 * sums).float().mean() > 0.9
