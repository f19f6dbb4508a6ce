"""The whole story once, for real: a target is trained, decomposed and harvested; what comes out is
the known truth.
"""

import math
import os
import subprocess
import sys

import polars as pl
import pytest
import torch

from spd_lightning import runs
from spd_lightning.store import Store
from spd_lightning.training.decompose import Decomposition


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """TMS 5-2 by the commands of the README, without a tracker.

    In processes of their own: checking the shapes of every call, as tests do, takes ten times as
    long as the training.
    """
    root = tmp_path_factory.mktemp("story")
    for words in (["fit"], ["predict", "--config", "frozen.yaml"], ["predict"]):
        command = [
            sys.executable,
            "-m",
            "spd_lightning",
            words[0],
            "--config",
            "tms.yaml",
            *words[1:],
        ]
        subprocess.run(
            [*command, "--trainer.logger", "false"],
            env=os.environ | {"SPD_RUNS": str(root)},
            check=True,
        )
    return runs.Run(root / "tms")


@pytest.fixture
def graph(run):
    """Edges of the prompts that show one feature alone, with both of their nodes."""

    def of(harvest):
        store = Store(run.path / "harvest" / harvest)
        prompts = store.scan("prompts").filter(pl.col("split") == "probe")
        nodes = store.scan("nodes").select(
            "prompt_id", "node", "kind", pl.col("layer").cast(pl.String), "component", "activation"
        )
        ends = {
            end: nodes.rename(
                {c: f"{end}_{c}" for c in ("kind", "layer", "component", "activation")}
                | {"node": end}
            )
            for end in ("source", "target")
        }
        edges = store.scan("edges").join(
            prompts.select("prompt_id", "source").rename({"source": "shown"}), on="prompt_id"
        )
        for end, frame in ends.items():
            edges = edges.join(frame, on=["prompt_id", end])
        return store.collect(edges)

    return of


def test_every_feature_has_its_component(run):
    """Table 1 of the SPD paper for TMS 5-2: MMCS, ML2R, five components alive, identity error 0
    (E).
    """
    summary = run.summary
    assert summary["mmcs/linear1"] >= 0.999
    assert 0.97 <= summary["ml2r/linear1"] <= 1.04
    assert summary["alive/linear1"] == summary["alive/linear2"] == 5
    assert summary["identity_error/linear1"] == 0
    assert summary["verdict"] == "ok"
    assert summary["recovered/ci"] > 0.9
    assert all(isinstance(value, int | float | str) for value in summary.values())


def test_graphs_show_five_components_for_five_features(graph):
    """Of each feature alone, one component of linear1 carries nearly all to its own output, another
    one each time.
    """
    edges = graph("graphs-unmasked").filter(pl.col("target_layer") == "linear1")
    best = (
        edges.sort(pl.col("attribution").abs(), descending=True)
        .group_by("shown", maintain_order=True)
        .first()
    )
    assert best.height == 5
    assert best["target_component"].n_unique() == 5
    outputs = graph("graphs-unmasked").filter(pl.col("target_layer") == "output")
    top = (
        outputs.sort("attribution", descending=True).group_by("shown", maintain_order=True).first()
    )
    assert {f"feature {k}" for k in top["target_component"]} == set(top["shown"])
    own = pl.col("shown") == "feature " + pl.col("target_component").cast(pl.String)
    assert top.filter(own).height == 5


def test_frozen_graphs_add_up(graph):
    """A6: in frozen mode the in-edges of every component and output sum to its value (stored in
    float32).
    """
    edges = graph("graphs-frozen")
    sums = edges.group_by("prompt_id", "target").agg(
        pl.col("attribution").sum(), pl.col("target_activation").first()
    )
    assert sums.height > 25
    for total, value in zip(sums["attribution"], sums["target_activation"], strict=True):
        assert math.isclose(total, value, rel_tol=1e-4, abs_tol=1e-6)


def test_the_decomposition_opens_again(run):
    """`Decomposition.from_pretrained` gives the components that the summary speaks of."""
    module = Decomposition.from_pretrained(run.path)
    with torch.no_grad():
        g = module.model.importances(module.model.clean(0.75 * torch.eye(5))).lower["linear1"]
    assert ((g > 0.9).sum(1) == 1).all()
    assert (g.max(1).indices.unique().numel()) == 5
