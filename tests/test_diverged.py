"""Numbers that must be finite and are not end the work with one line that names them; what was good
before is kept.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from support.tensors import gradient_of
from test_checkpoint import TARGET, decomposition, trainer

from spd_lightning import cli, runs
from spd_lightning.circuits import search
from spd_lightning.circuits.objective import CircuitSearch
from spd_lightning.data.modules import SparseFeatures
from spd_lightning.errors import BadInput, Diverged
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.training.checkpoint import LAST, SafetensorsIO
from spd_lightning.training.decompose import Decomposition, FaithfulnessWarmup
from spd_lightning.training.multi_step import non_finite
from spd_lightning.training.networks import build
from spd_lightning.training.target import TargetTraining

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*",
    "ignore:.*does not have many workers.*",
    "ignore:.*in eval mode at the start.*",
)


def data() -> SparseFeatures:
    return SparseFeatures(5, 0.3, 16)


class Poisoned(Decomposition):
    """Its loss term `reconstruction/all` is not a number at one step."""

    at = 13

    def objective(self, batch, step, part=0):
        loss, terms = super().objective(batch, step, part)
        if step == self.at:
            terms = {**terms, "reconstruction/all": terms["reconstruction/all"] * math.nan}
            loss = loss * math.nan
        return loss, terms


def test_the_step_and_the_term_are_named_and_the_checkpoint_is_kept(tmp_path):
    """The step lies between two logged ones; the checkpoint of step 10 stays, none of poisoned
    weights is written.
    """
    module = Poisoned(
        build(TARGET),
        {"linear1": 7, "linear2": 7},
        {"linear2": "linear1"},
        warm_up=FaithfulnessWarmup(0),
        inner_steps=5,
    )
    module.checkpoint_every = 5
    with pytest.raises(
        Diverged, match="the loss term 'reconstruction/all' is nan at step 13; lower"
    ):
        trainer(tmp_path, 40).fit(module, data())
    kept = SafetensorsIO().load_checkpoint(tmp_path / LAST)
    assert kept["global_step"] == 10
    assert all(weights.isfinite().all() for weights in kept["state_dict"].values())


def test_weights_that_the_last_update_spoiled_are_found(tmp_path):
    module = decomposition(inner_steps=5, warm_up=FaithfulnessWarmup(0))

    def spoil():
        gradient_of(module.model["linear1"].U).fill_(math.inf)
        return {}

    module.clip = spoil
    with pytest.raises(Diverged, match=r"the weights '.*linear1\.U' are not finite after 1 steps"):
        trainer(tmp_path, 1).fit(module, data())


def test_a_warm_up_that_diverges(tmp_path):
    module = decomposition(warm_up=FaithfulnessWarmup(50, lr=1e30))
    with pytest.raises(
        Diverged, match=r"the faithfulness is (inf|nan) at step [0-9]+ of the warm-up"
    ):
        trainer(tmp_path, 10).fit(module, data())


def test_a_target_that_diverges(tmp_path):
    training = TargetTraining(build(TARGET), lr=1e30)
    with pytest.raises(Diverged, match=r"the loss is (inf|nan) at step [0-9]+"):
        trainer(tmp_path, 60).fit(training, data())


def test_a_figure_that_is_no_number():
    with pytest.raises(Diverged, match="the figure 'mse/ci' is nan in the evaluation"):
        decomposition().adopt({"l0/linear1": 1.0, "mse/ci": torch.tensor(math.nan)})


def test_weights_that_are_not_finite_are_not_opened(tmp_path):
    """One number of one component, infinite: no verb gets the run."""
    module = decomposition()
    with torch.no_grad():
        module.model["linear1"].U[2, 1] = math.inf
    module.save(tmp_path)
    runs.write_json(tmp_path / "summary.json", {})
    with pytest.raises(BadInput, match=r"the weights '.*linear1\.U' are not finite"):
        Decomposition.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_not_harvested(tmp_path):
    """In memory, too: nothing is written."""
    module = decomposition()
    with torch.no_grad():
        module.model["linear1"].U[2, 1] = math.nan
    own = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[PromptGraphs(mode="unmasked", name="g")],
    )
    with pytest.raises(BadInput, match=r"harvest 'g': the weights '.*linear1\.U' are not finite"):
        own.predict(module, data(), return_predictions=False)
    assert not (tmp_path / "harvest").exists()


def test_a_circuit_search_that_diverges(monkeypatch):
    monkeypatch.setattr(
        search.ImportanceOptimization,
        "_minimality",
        lambda self: torch.full((len(self.prompt),), math.nan) * self.values.sum(),
    )
    inputs = torch.eye(5)[:2]
    with pytest.raises(Diverged, match=r"the circuit search's loss .* is nan after"):
        search.optimize(decomposition().model, inputs, CircuitSearch(steps=3, lambdas=(0.1,)))


def test_the_first_strange_tensor_is_named():
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, -math.inf]), "c": torch.tensor(math.nan)}
    assert non_finite(tensors) == "b"
    assert non_finite({"a": torch.ones(3), "n": torch.arange(2)}) is None
    assert non_finite({}) is None


CONFIG = """\
base: tms_5-2.yaml
model:
  init_args:
    target: target.yaml
    sites: {linear1: 6, linear2: 6}
    warm_up: {steps: 5}
    inner_steps: 5
    optimizer: {lr: 1.0e+30}
    evaluation: {pgd_steps: []}
trainer: {max_steps: 40, val_check_interval: 4, logger: false}
data: {init_args: {batch_size: 64}}
"""


def test_a_fit_that_diverges_says_so_everywhere(tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line; summary, list of runs and the next predict say what happened."""
    from support.tiny_run import TARGET as TRAINED

    (tmp_path / "wild.yaml").write_text(CONFIG)
    (tmp_path / "target.yaml").write_text(TRAINED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    assert cli.run(["fit", "--config", "wild"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: run 'wild': training diverged: the loss")
    assert "at step" in said
    summary = json.loads(Path("runs/wild/summary.json").read_text())
    assert summary["verdict"] in said.replace("training ", "")
    assert runs.Run(Path("runs/wild")).state == "diverged"
    assert not Path("runs/wild/decomposition.safetensors").exists()
    for words in (
        ["predict", "--config", "wild"],
        ["validate", "--config", "wild", "--run", "wild"],
    ):
        assert cli.run(words) == 2
        assert "diverged" in capsys.readouterr().err
