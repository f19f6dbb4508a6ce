"""Evaluation as a training holds it (law E): before step 0, in full precision, on two devices as on
one.
"""

import json
import math
import sys
from itertools import permutations
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from support.half_figures import figures as figures_on
from support.half_figures import half_of_two

from spd_lightning.data.modules import SparseFeatures
from spd_lightning.decomposition.importance import Importance
from spd_lightning.targets.toy import TMS
from spd_lightning.training import figures as drawing
from spd_lightning.training.checkpoint import SafetensorsIO
from spd_lightning.training.decompose import Decomposition, FaithfulnessWarmup
from spd_lightning.training.evaluate import Evaluation
from spd_lightning.training.pgd_sweep import worst_of
from spd_lightning.training.session import quiet


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")
def test_e_two_devices_give_the_figures_of_one(tmp_path):
    torch.multiprocessing.spawn(half_of_two, (str(tmp_path),), nprocs=2)
    halves = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for subject, whole in figures_on().items():
        left, right = (half[subject] for half in halves)
        assert left == right
        assert (left.pop("rows of this device"), whole.pop("rows of this device")) == (4, 8)
        right.pop("rows of this device")
        assert set(left) == set(whole)
        assert {"pgd/6", "se/pgd/6", "l0/all", "se/l0/all"} < set(whole)
        for name, value in whole.items():
            assert left[name] == pytest.approx(value, rel=1e-9, abs=1e-12), (subject, name)
        assert whole["pgd/6"] > 0
        assert any(value > 0 for name, value in whole.items() if name.endswith("/random"))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_e_the_worst_restart_of_the_sweep_is_one_that_is_not_a_number_wherever_it_comes(order):
    restarts = [
        {"pgd/2": 1.0, "se/pgd/2": 0.1, "pgd/5": 4.0, "se/pgd/5": 0.4},
        {"pgd/2": math.nan, "se/pgd/2": math.nan, "pgd/5": 3.0, "se/pgd/5": 0.3},
        {"pgd/2": 2.0, "se/pgd/2": 0.2, "pgd/5": 5.0, "se/pgd/5": 0.5},
    ]
    worst = worst_of([restarts[k] for k in order], (5, 2))
    assert list(worst) == ["pgd/2", "se/pgd/2", "pgd/5", "se/pgd/5"]
    assert math.isnan(worst["pgd/2"])
    assert math.isnan(worst["se/pgd/2"])
    assert (worst["pgd/5"], worst["se/pgd/5"]) == (5.0, 0.5)


# ---- inside a trainer ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _without_advice():
    with quiet():
        yield


class Kept(Logger):
    """Logs into a list."""

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def name(self):
        return "kept"

    @property
    def version(self):
        return ""

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs): ...


def decomposition(**settings):
    torch.manual_seed(0)
    given = {
        "inner_steps": 2,
        "log_every": 2,
        "warm_up": FaithfulnessWarmup(steps=3),
        "evaluation": Evaluation(pgd_steps=(2,)),
    }
    return Decomposition(TMS(5, 2), {"*": 4}, **given | settings)


def trainer(kept, steps=4, callbacks=(), **settings):
    given: dict[str, Any] = {"val_check_interval": 2, "num_sanity_val_steps": 1}
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=kept,
        callbacks=list(callbacks),
        plugins=[SafetensorsIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        **given | settings,
    )


def data():
    return SparseFeatures(5, 0.3, batch_size=64, validation_batches=2)


def test_e_the_figures_of_step_0_come_first_and_are_those_of_the_untrained(tmp_path):
    kept = Kept()
    module = decomposition()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(kept, callbacks=[drawing.Figures(tmp_path)]).fit(module, data())
    evaluated = [(step, line) for step, line in kept.lines if "mse/ci" in line]
    assert [step for step, _ in evaluated] == [0, 4]
    assert kept.lines[0] == evaluated[0]
    again = decomposition()
    again.load_state_dict(before)
    alone = Kept()
    trainer(alone, limit_val_batches=1).validate(again, data(), verbose=False)
    assert evaluated[0][1] == alone.lines[0][1]
    assert evaluated[0][1].keys() == evaluated[1][1].keys()
    assert not list(tmp_path.iterdir()), "what is drawn before step 0 is thrown away"


def test_e_what_cannot_be_drawn_fails_before_training(tmp_path, monkeypatch):
    kept = Kept()
    module = decomposition()

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(drawing, "_matrices", broken)
    with pytest.raises(ZeroDivisionError):
        trainer(kept, callbacks=[drawing.Figures(tmp_path)]).fit(module, data())
    assert kept.lines == []
    assert module.trainer.global_step == 0


def test_e_a_training_that_goes_on_does_not_log_step_0_again(tmp_path):
    kept = Kept()
    module = decomposition()
    first = trainer(kept, steps=2)
    first.fit(module, data())
    first.save_checkpoint(tmp_path / "last.ckpt")
    kept.lines.clear()
    trainer(kept).fit(decomposition(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert [step for step, line in kept.lines if "mse/ci" in line] == [4]


@pytest.mark.parametrize("kind", ["mlp", "shared_mlp", "transformer"])
def test_e_figures_are_taken_in_full_precision(kind):
    importance = Importance(kind, d_model=8, layers=1, heads=2)
    found = []
    for precision in ("32-true", "bf16-mixed"):
        module = decomposition(importance=importance)
        trainer(Kept(), precision=precision).validate(module, data(), verbose=False)
        found.append(module.figures)
    assert found[0] == found[1]
    assert found[0]["mse/ci"] > 0
