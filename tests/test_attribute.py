"""`attribute`: one call from a prompt to its graph, compared with a harvest of the prompt."""

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from test_nodes import WORDS, Ragged, decoder, harvested

from spd_lightning.data.modules import StepData
from spd_lightning.errors import BadInput
from spd_lightning.harvest.attribute import attribute
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.targets.toy import TMS
from spd_lightning.training.decompose import Decomposition

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)


class Letters(StepData):
    """A tokenizer of one character to a token."""

    def __init__(self):
        super().__init__(1, 0, 1, 1)

    def batch(self, step, rank=0, split="train", world=1):
        raise NotImplementedError("nothing is trained")

    def groups(self):
        return []

    def names(self, ids):
        return [WORDS[i] for i in ids]

    def encode(self, text: str) -> list[int]:
        return [WORDS.index(letter) for letter in text]


@pytest.mark.parametrize("mode", ["unmasked", "frozen", "ci_masked"])
def test_the_graph_is_that_of_a_harvest(tmp_path, mode):
    """Token ids in a list or a tensor give the nodes, edges and outputs of the harvest."""
    module = decoder()
    data = Ragged(lengths=(5,), rows=1)
    tokens = data.batches[0].inputs[0]
    (store,) = harvested(tmp_path, module, data, PromptGraphs(mode, 0.2, 0.01))
    for prompt in (tokens, tokens.tolist()):
        graph = attribute(module, prompt, mode, 0.2, 0.01)
        for table in ("nodes", "edges", "outputs"):
            rows = store.scan(table).collect().drop("prompt_id")
            own = getattr(graph, table)
            if table == "outputs":  # without data, tokens have no text
                rows = rows.drop("token")
                own = own.drop("token")
            names = pl.col(pl.Enum).cast(pl.String)
            assert_frame_equal(own.with_columns(names), rows.with_columns(names))
        assert graph.edges.height > 10
        assert graph.gap == pytest.approx(store.scan("graphs").collect()["gap"][0])


def test_a_text_is_tokenized_by_the_data():
    """The tokenizer of the given data module; its texts name the tokens."""
    module = decoder()
    graph = attribute(module, "xyz", data=Letters())
    assert graph.tokens == ["x", "y", "z"]
    assert set(graph.outputs["token"]) <= set(WORDS)


def test_bad_prompts_are_one_line():
    """A text without a tokenizer, a batch, and a token outside the vocabulary."""
    module = decoder()
    with pytest.raises(BadInput, match=r"does not come from a run.*give data=Text"):
        attribute(module, "xyz")
    with pytest.raises(BadInput, match=r"prompt of shape \[2, 3\]"):
        attribute(module, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(BadInput, match=r"token 99 is outside"):
        attribute(module, [99])
    toy = Decomposition(TMS(5, 2), sites={"linear*": 4})
    assert attribute(toy, torch.eye(5)[2]).tokens == ["f2=1"]
