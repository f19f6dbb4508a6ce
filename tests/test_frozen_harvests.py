"""Harvests of frozen graphs say whether in-edges add up: printed, in the ledger, on both pages (law
A6).
"""

import logging

import lightning as L
import pytest
import torch
from test_circuits import QUICK, Few
from torch import nn

from spd_lightning import Decomposition, PromptGraphs, SparseCircuits, Store
from spd_lightning.decomposition.importance import Importance
from spd_lightning.harvest.dataset_edges import DatasetEdges
from spd_lightning.store import ADDS_UP, Writer, gap_warning
from spd_lightning.store.manifest import read_settings
from spd_lightning.viewer import graph_page, run_page
from spd_lightning.viewer.graph_page import GraphSelection

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*predict returned None"
)


class Network(nn.Module):
    """On vectors; between its two maps a non-linearity."""

    def __init__(self, function):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


class Opaque(torch.autograd.Function):
    """A non-linearity with a derivative of its own, which no rule can look into."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.square()

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0] * 2 * ctx.saved_tensors[0]


FUNCTIONS = {"rule": (lambda h: h * torch.sigmoid(1.7 * h), True), "no rule": (Opaque.apply, False)}


@pytest.fixture(params=FUNCTIONS)
def harvested(request, tmp_path, caplog):
    """Whether its sums are right, and the stores of three kinds of harvests."""
    function, right = FUNCTIONS[request.param]
    torch.manual_seed(0)
    module = Decomposition(Network(function), {"*": 5}, importance=Importance(hidden=3))
    harvesters = [
        PromptGraphs("frozen", checks=0),
        DatasetEdges("frozen"),
        SparseCircuits(QUICK, mode="frozen"),
        PromptGraphs("unmasked", checks=0),
    ]
    options = {
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with caplog.at_level(logging.INFO, logger="spd_lightning"):
        trainer = L.Trainer(callbacks=[*harvesters], default_root_dir=tmp_path, **options)
        trainer.predict(module, Few(torch.rand(3, 4)), return_predictions=False)
    return right, {h.name: Store(tmp_path / "harvest" / h.name) for h in harvesters}, caplog.records


def test_a6_the_largest_gap_is_printed_and_kept(harvested):
    right, stores, records = harvested
    said = {
        record.getMessage().split(":")[0]: record
        for record in records
        if "add up" in record.getMessage()
    }
    assert set(said) == {"harvest graphs-frozen", "harvest dataset-frozen", "harvest circuits"}
    for name in ("graphs-frozen", "dataset-frozen", "circuits"):
        store = stores[name]
        record = said[f"harvest {name}"]
        gap = store.manifest["gap"]
        assert (gap <= ADDS_UP) == right
        assert record.levelno == (logging.INFO if right else logging.WARNING)
        assert (
            f"{gap:.1e}" in record.getMessage() or f"up to {100 * gap:.2g} %" in record.getMessage()
        )
        assert "\n" not in record.getMessage()
    graphs = stores["graphs-frozen"]
    assert graphs.manifest["gap"] == graphs.collect(graphs.scan("graphs"))["gap"].max()
    assert "gap" not in stores["graphs-unmasked"].manifest


def test_both_pages_say_so(harvested, tmp_path):
    right, stores, _ = harvested
    store = stores["graphs-frozen"]
    warning = gap_warning(store.manifest)
    assert bool(warning) != right
    prompt = store.collect(store.scan("prompts"))["prompt_id"][0]
    assert graph_page.page_data(store, GraphSelection(prompt)).warning == warning
    (tmp_path / "metrics.jsonl").write_text("")
    page = run_page.page_data(run_page.Run(tmp_path), store)
    assert page.warning == warning
    assert ("do NOT add up" in run_page._tables(page)) != right
    assert "largest gap of in-edges" in dict(page.harvest)


def test_the_largest_gap_is_that_of_any_group(harvested):
    """A continued harvest keeps what earlier groups said, and reads it back."""
    _, stores, _ = harvested
    store = stores["graphs-frozen"]
    before = store.manifest["gap"]
    own = read_settings(store.path)
    added = ("schema_version", "world")  # by the writer itself
    writer = Writer(store.path, {key: value for key, value in own.items() if key not in added})
    frames = {"prompts": store.collect(store.scan("prompts")).head(1).with_columns(prompt_id=1)}
    frames["prompts"] = frames["prompts"].cast(
        {"prompt_id": store.collect(store.scan("prompts")).schema["prompt_id"]}
    )
    writer.write(frames, gap=before + 1)
    writer.complete()
    assert Store(store.path).manifest["gap"] == before + 1
