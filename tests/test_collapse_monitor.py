"""Warnings of a collapse: each on numbers that call for it and on numbers that do not, and from a
real training.
"""

import logging
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spd_lightning.data.modules import SparseFeatures
from spd_lightning.decomposition.adversaries import Adversary
from spd_lightning.decomposition.losses import Losses, Minimality
from spd_lightning.decomposition.reconstruction import Reconstruction
from spd_lightning.targets.toy import TMS
from spd_lightning.training.checkpoint import pack, unpack
from spd_lightning.training.collapse_monitor import CollapseMonitor, adversarial
from spd_lightning.training.decompose import Decomposition, FaithfulnessWarmup
from spd_lightning.training.evaluate import Evaluation
from spd_lightning.training.session import quiet


def after(norms):
    watch = CollapseMonitor()
    for step, norm in enumerate(norms):
        assert watch.gradient(step, norm) is None
    return watch


# ---- gradients -----------------------------------------------------------------------------------


def test_a_gradient_a_hundred_times_the_usual_is_told_once_until_it_is_over():
    watch = after([1.0, 3.0, 2.0] * 5)
    told = watch.gradient(400, 201.0) or ""
    assert told.startswith(
        "step 400: importance gradients explode: norm 2e+02, the median of the last 16 is 2"
    )
    assert "clip_importance 2" in told
    assert watch.gradient(410, 300.0) is None, "told already"
    assert watch.gradient(420, 2.0) is None
    assert watch.gradient(430, 900.0) is not None
    for strange in (float("nan"), float("inf")):
        assert "norm" in (after([2.0] * 12).gradient(5, strange) or "")


@given(st.lists(st.floats(0.5, 40.0), max_size=150))
def test_gradients_of_ordinary_size_are_not_told(norms):
    after(norms)
    assert after([2.0] * 12).gradient(9, 199.0) is None
    assert after([1e-9, 1.0]).gradient(9, 1e9) is None, "too few to know what is usual"
    assert after([0.0] * 20).gradient(9, 1.0) is None, "nothing was usual"
    assert after([1.0] * 20).gradient(9, None) is None, "not measured"


def test_what_is_usual_moves_with_time():
    watch = after([1.0] * 100)
    for step in range(100):
        assert watch.gradient(step, 60.0) is None
    assert watch.gradient(200, 5000.0) is None
    assert watch.gradient(201, 7000.0) is not None


# ---- alive components ----------------------------------------------------------------------------


def held(a, b, recovered):
    return {"alive/a": a, "alive/b": b, "recovered/ci": recovered, "l0/a": 3.0}


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (
            held(40, 40, 0.9),
            held(30, 9, 0.5),
            "components die all at once: 80 alive at the evaluation before, now 39",
        ),
        (
            held(40, 40, 0.9),
            held(30, 9, 0.5),
            "fell by 0.40; try a lower coefficient of minimality",
        ),
        (held(40, 40, 0.9), held(20, 20, 0.5), None),  # half is left
        (held(40, 40, 0.9), held(5, 5, 0.85), None),  # as it should be: the rest was not needed
        (held(40, 40, 0.9), held(39, 0, 0.9), "no component of b is alive; try a lower"),
        (held(40, 0, 0.9), held(39, 0, 0.9), None),
        (held(0, 0, 0.0), held(0, 0, 0.0), None),
        ({}, held(4, 4, 0.9), None),
    ],
)
def test_a_cliff_is_told_and_pruning_is_not(then, now, told):
    watch = CollapseMonitor()
    watch.alive(100, then)
    found = watch.alive(200, now)
    assert (found is None) == (told is None)
    if found is not None:
        assert found.startswith("step 200: ")
        assert told in found
    assert watch.alive(300, now) is None, "nothing has changed since"


def test_a_layer_without_components_is_told_at_the_first_evaluation_and_once():
    watch = CollapseMonitor()
    first = watch.alive(100, held(40, 0, 0.9)) or ""
    assert first.startswith("step 100: no component of b is alive; try a lower coeff")
    assert watch.alive(200, held(40, 0, 0.9)) is None
    assert watch.alive(300, held(40, 2, 0.9)) is None
    again = watch.alive(400, held(40, 0, 0.9)) or ""
    assert "of b is alive" in again, "again, after it was over"
    resumed = CollapseMonitor()
    resumed.load_state_dict(watch.state_dict())
    assert resumed.alive(500, held(40, 0, 0.9)) is None


def used(l0, recovered):
    return {"alive/a": 3, "nonzero/a": 100, "l0/a": l0, "recovered/ci": recovered}


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        (
            used(0.5, 0.01),
            (
                "importances are nearly all zero: 0.5 of 100 components are used and recover 1% of "
                "the output"
            ),
        ),
        (used(0.0, -0.2), "recover 0% of the output; try a lower losses.minimality.coeff"),
        (used(0.25, 0.98), None),  # sparse inputs need few components, and those do the work
        (used(30.0, -0.2), None),  # importances do harm, but are not zero
        (used(0.5, 0.06), None),
        ({"alive/a": 3}, None),
    ],
)
def test_importances_that_are_nearly_all_zero_are_told(figures, told):
    """Below 2 % of the components in use, which recover less than 5 % of what masking everything
    costs.
    """
    watch = CollapseMonitor()
    found = watch.in_use(300, figures)
    assert (found is None) == (told is None)
    if found is not None:
        assert found.startswith("step 300: ")
        assert told in found
    assert watch.in_use(400, figures) is None, "told already"


# ---- adversaries ---------------------------------------------------------------------------------


def attacked(*values):
    watch = CollapseMonitor()
    watch._attacks = {"hard": list(values), "easy": [values[0] / 100]}
    return watch


def test_a_soft_training_adversary_is_told():
    fresh = {"pgd/20": 0.5, "pgd/160": 2.0}
    told = attacked(0.1, 0.2).adversary(700, fresh) or ""
    assert told.startswith(
        "step 700: the training's adversary is too weak: reconstruction 'hard' is 0.15"
    )
    assert "(pgd/160) 2;" in told
    assert attacked(0.3, 0.2).adversary(700, fresh) is None
    assert attacked(0.1).adversary(700, {}) is None
    assert CollapseMonitor().adversary(700, fresh) is None, "no adversary in training"
    watch = attacked(0.1)
    assert watch.adversary(700, fresh)
    watch._attacks = {"hard": [0.1]}
    assert watch.adversary(800, fresh) is None, "told already"
    watch._attacks = {"hard": [1.0]}
    assert watch.adversary(900, fresh) is None
    watch._attacks = {"hard": [0.1]}
    assert watch.adversary(950, fresh), "again, after it was over"


def test_only_adversaries_that_are_compared_alike_count():
    terms = {
        "a": Reconstruction("pgd"),
        "b": Reconstruction("pgd", divergence="kl"),
        "c": Reconstruction("stochastic"),
    }
    module = Decomposition(TMS(5, 2), {"*": 4}, losses=Losses(reconstruction=terms))
    assert adversarial(module) == ["a"]
    assert adversarial(L.LightningModule()) == []


# ---- in a training -------------------------------------------------------------------------------


def fitted(losses, spoil=None, steps=60, delta=True):
    torch.manual_seed(0)
    evaluation = Evaluation(pgd_steps=(3,))
    module = Decomposition(
        TMS(5, 2),
        {"*": 6},
        delta=delta,
        inner_steps=2,
        log_every=2,
        losses=losses,
        warm_up=FaithfulnessWarmup(steps=50),
        evaluation=evaluation,
    )
    trainer: Any = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=5,
        callbacks=[spoil] if spoil else [],
    )
    with quiet():
        trainer.fit(module, SparseFeatures(5, 0.3, batch_size=64, validation_batches=1))
    return next(c for c in trainer.callbacks if isinstance(c, CollapseMonitor))


class Spoil(L.Callback):
    """Does harm at step 40."""

    def __init__(self, harm):
        self.harm = harm

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 40:
            with torch.no_grad():
                self.harm(pl_module.model)


def dead(model):
    for name, parameter in model.importance_function.named_parameters():
        if name.endswith("b2"):
            parameter.fill_(-50.0)


def loud(model):
    for components in model.components.children():
        components.U.mul_(1000.0)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [(None, []), (dead, ["die all at once"]), (loud, ["importance gradients explode"])],
)
def test_a_training_tells_what_befalls_it(harm, expected, caplog):
    with caplog.at_level(logging.WARNING, "spd_lightning.training.collapse_monitor"):
        fitted(Losses(minimality=Minimality(1e-4)), Spoil(harm) if harm else None)
    told = [r.getMessage() for r in caplog.records if r.name.endswith("collapse_monitor")]
    assert all(any(text in line for line in told) for text in expected), told
    assert bool(told) == bool(expected), told
    assert all(int(line.split()[1].rstrip(":")) >= 40 for line in told), (
        "none before the harm is done"
    )


def test_a_training_compares_its_adversary_with_a_fresh_one(caplog):
    weak = Reconstruction("pgd", adversary=Adversary(1, step_size=1e-6, init="ones"))
    with caplog.at_level(logging.WARNING, "spd_lightning.training.collapse_monitor"):
        fitted(
            Losses(minimality=Minimality(1e-4), reconstruction={"weak": weak}),
            steps=20,
            delta=False,
        )
    (line,) = [r.getMessage() for r in caplog.records if "too weak" in r.getMessage()]
    assert "reconstruction 'weak'" in line


def test_a_resumed_training_goes_on_watching():
    watch = attacked(0.1)
    resumed = CollapseMonitor()
    for step in range(20):
        watch.gradient(step, 1.0 + step)
    watch.alive(100, held(40, 40, 0.9))
    tensors = {}
    resumed.load_state_dict(unpack(pack(watch.state_dict(), tensors), tensors))
    assert resumed.state_dict() == watch.state_dict()
    assert resumed.gradient(30, 5000.0) == watch.gradient(30, 5000.0) is not None
    assert resumed.alive(200, held(3, 3, 0.1)) == watch.alive(200, held(3, 3, 0.1)) is not None
    assert (
        resumed.adversary(200, {"pgd/3": 5.0}) == watch.adversary(200, {"pgd/3": 5.0}) is not None
    )
