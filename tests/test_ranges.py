"""Every number among the settings has a range, and what is outside of it is told in one line that
names it.
"""

import math
from collections.abc import Callable
from functools import reduce

import pytest
from torch import nn

from spd_lightning import config
from spd_lightning.circuits.objective import CircuitSearch
from spd_lightning.commands import configs
from spd_lightning.data.modules import InductionTokens, SparseFeatures
from spd_lightning.data.text import Text
from spd_lightning.decomposition.adversaries import Adversary, Persistent
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.losses import Faithfulness, Frequency, Minimality, SmoothL0
from spd_lightning.decomposition.reconstruction import Reconstruction
from spd_lightning.errors import BadInput, check_range
from spd_lightning.harvest.circuits import SparseCircuits
from spd_lightning.harvest.dataset_edges import DatasetEdges
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.harvest.nodes import PromptNodes
from spd_lightning.targets.toy import TMS
from spd_lightning.training.decompose import Decomposition, FaithfulnessWarmup
from spd_lightning.training.evaluate import Evaluation
from spd_lightning.training.optimizer import Optimizer
from spd_lightning.training.schedule import Schedule
from spd_lightning.training.session import Settings, quiet
from spd_lightning.training.target import TargetTraining

NOT_FINITE = (math.nan, math.inf, -math.inf)
SHARE = (-0.1, 1.1, *NOT_FINITE)
POSITIVE = (0.0, -1.0, *NOT_FINITE)
NOT_NEGATIVE = (-1.0, *NOT_FINITE)
COUNT = (0, -1)
COUNT_OR_NONE = (-1,)
BETAS = ((2.0, 2.0), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9))


def sparse(**settings) -> SparseFeatures:
    return SparseFeatures(**{"n_features": 5, "probability": 0.05, "batch_size": 8} | settings)


def induction(**settings) -> InductionTokens:
    return InductionTokens(**{"vocab": 9, "seq_len": 8, "batch_size": 8} | settings)


def decomposition(**settings) -> Decomposition:
    return Decomposition(TMS(5, 2), {"linear1": 3}, **settings)


def training(**settings) -> TargetTraining:
    return TargetTraining(nn.Linear(2, 2), **settings)


BLOCKS: dict[str, tuple] = dict.fromkeys(
    ("inner_steps", "log_every", "checkpoint_every", "threads", "micro_batches"), COUNT
) | {"keep_checkpoints": (1, 0)}
DATA: dict[str, tuple] = {
    "batch_size": COUNT,
    "predict_batch_size": COUNT,
    "validation_batches": (-1,),
    "n_prompts": (-1,),
}
RANGES: dict[Callable, dict[str, tuple]] = {
    Faithfulness: {"coeff": NOT_NEGATIVE},
    Minimality: {
        "coeff": NOT_NEGATIVE,
        **dict.fromkeys(("p", "p_final"), POSITIVE),
        **dict.fromkeys(("start", "end", "ramp"), SHARE),
    },
    Frequency: {"coeff": NOT_NEGATIVE, "positions": POSITIVE, "until": SHARE},
    SmoothL0: {"coeff": NOT_NEGATIVE, "gamma": POSITIVE, "gamma_final": POSITIVE, "end": SHARE},
    Reconstruction: {
        "coeff": NOT_NEGATIVE,
        "hidden_coeff": NOT_NEGATIVE,
        "samples": COUNT,
        "probability": (0.0, *SHARE),
        **dict.fromkeys(("share", "threshold"), SHARE),
    },
    Adversary: {"steps": COUNT_OR_NONE, "step_size": POSITIVE},
    Persistent: {
        "lr": POSITIVE,
        "warmup": SHARE,
        "betas": BETAS,
        "ascents": COUNT_OR_NONE,
        "particles": COUNT,
    },
    Importance: dict.fromkeys(
        ("hidden", "embedding_hidden", "d_model", "layers", "heads", "d_mlp", "chunk_layers"), COUNT
    ),
    Optimizer: {
        "lr": POSITIVE,
        "importance_lr": NOT_NEGATIVE,
        "betas": BETAS,
        "momentum": (-0.1, 1.0, *NOT_FINITE),
        "clip_components": POSITIVE,
        "clip_importance": POSITIVE,
    },
    Schedule: {"warmup": COUNT_OR_NONE, "hold": SHARE, "final": SHARE},
    FaithfulnessWarmup: {"steps": COUNT_OR_NONE, "lr": POSITIVE, "weight_decay": NOT_NEGATIVE},
    Evaluation: {
        "threshold": SHARE,
        "pgd_steps": ((0,), (-1,), (20, 0)),
        "pgd_rows": COUNT,
        "restarts": COUNT,
    },
    CircuitSearch: {
        **dict.fromkeys(("p", "lr"), POSITIVE),
        **dict.fromkeys(("adversarial", "tolerance"), NOT_NEGATIVE),
        "lambdas": ((-1.0,), (0.1, math.nan)),
        "steps": COUNT_OR_NONE,
        **dict.fromkeys(("patience", "draws"), COUNT),
        "threshold": SHARE,
    },
    decomposition: BLOCKS,
    training: BLOCKS
    | {
        "lr": POSITIVE,
        "clip": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "betas": BETAS,
        "retries": COUNT_OR_NONE,
    },
    sparse: DATA
    | {"n_features": COUNT, "probability": (0.0, *SHARE), "low": NOT_FINITE, "high": NOT_FINITE},
    induction: DATA,
    Text: DATA
    | {
        "seq_len": (1,),
        "n_ctx": COUNT,
        "max_tokens": COUNT,
        "validation_batch_size": COUNT,
        "vocab": (256,),
    },
    PromptGraphs: {
        "threshold": SHARE,
        "min_share": (-0.1, 1.0, *NOT_FINITE),
        "checks": COUNT_OR_NONE,
    },
    PromptNodes: {"threshold": SHARE},
    DatasetEdges: {"threshold": SHARE, "group": COUNT},
    SparseCircuits: {
        "threshold": SHARE,
        **dict.fromkeys(("share", "min_share"), (-0.1, 1.0, *NOT_FINITE)),
    },
}
CASES = [
    (kind, name, value)
    for kind, held in RANGES.items()
    for name, values in held.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_a_number_out_of_range_is_refused(kind, name, value):
    """In one line with the setting, the value, where it stands and what it may be."""
    with pytest.raises(BadInput) as caught:
        kind(**{name: value})
    said = str(caught.value)
    shown = list(value) if isinstance(value, tuple) else value
    assert said.startswith(f"{name} {shown} in ")
    assert ": it must be " in said or ": each must be " in said
    assert "\n" not in said


def test_numbers_at_the_ends_of_their_ranges_are_taken():
    assert Minimality(0.0, p=1e-9, p_final=2.0, start=1.0, end=1.0, ramp=1.0).coeff == 0
    assert Minimality(start=0.0, end=0.0).end == 0
    assert (
        Reconstruction(
            coeff=0.0, hidden_coeff=0.0, share=0.0, probability=1.0, threshold=0.0
        ).samples
        == 1
    )
    assert Persistent(warmup=0.0, betas=(0.0, 0.0), ascents=0, particles=None).particles is None
    assert Optimizer(importance_lr=0.0, betas=(0.0, 0.0), momentum=0.0).importance_lr == 0
    assert Evaluation(pgd_steps=(), threshold=1.0).pgd_steps == ()
    assert (
        Adversary(steps=0).steps
        == FaithfulnessWarmup(0, weight_decay=0.0).steps
        == Schedule(warmup=0, hold=1.0).warmup
        == 0
    )


def test_an_annealing_ends_after_it_begins():
    with pytest.raises(
        BadInput, match=r"^start 0\.6 in minimality: it must be at most end, which is 0\.5$"
    ):
        Minimality(start=0.6, end=0.5)


def test_dense_sites_have_components():
    with pytest.raises(
        BadInput, match=r"^k 0 in evaluation\.dense, site 'mlp\.out': it must be at least 1$"
    ):
        Evaluation(dense={"mlp.in": 3, "mlp.out": 0})


@pytest.mark.parametrize("value", [True, "2", None, 2.5, 10**400])
def test_only_whole_numbers_pass_where_they_are_asked_for(value):
    """True and false are rejected. None is not checked, and a whole number may have any number of
    digits.
    """
    if value is None or value == 10**400:
        check_range("losses", least=1, whole=True, samples=value)
        return
    with pytest.raises(
        BadInput, match=rf"^samples {value} in losses: it must be a whole number, at least 1$"
    ):
        check_range("losses", least=1, whole=True, samples=value)


def test_the_line_says_what_would_be_right():
    with pytest.raises(
        BadInput, match=r"^clip 0 in loop: it must be above 0; leave it out for none$"
    ):
        check_range("loop", above=0, hint="leave it out for none", clip=0)
    with pytest.raises(BadInput, match=r"^low nan in loop: it must be a finite number$"):
        check_range("loop", low=math.nan)
    with pytest.raises(
        BadInput, match=r"^p True in loop: it must be a finite number, above 0 and at most 1$"
    ):
        check_range("loop", above=0, most=1, p=True)


def unbuilt_elsewhere() -> list[list[str]]:
    """Shipped configs of checkpoints from the network, and those to be added to others: test_cli
    builds neither.
    """
    targets = {
        name: given.get("model", {}).get("init_args", {}).get("target")
        for name, given, _ in configs.shipped()
    }
    checkpoints = [
        [name] for name, target in targets.items() if str(target).startswith(("hf:", "decoder:"))
    ]
    added = [["tms.yaml", "paper.yaml"], ["tms.yaml", "random-components.yaml"]]
    return [*checkpoints, *added, ["resid_mlp1.yaml", "paper-resid_mlp.yaml"]]


@pytest.mark.parametrize("names", unbuilt_elsewhere(), ids=" ".join)
def test_shipped_configs_are_within_the_ranges(names):
    given = reduce(config.merge, map(config.load, names))
    with quiet():
        settings = Settings(given)
        settings.built("data")
        module = settings.built("model", target=TMS(5, 2), sites={"linear1": 3}, tied=None)
    assert (
        module.losses.minimality.coeff
        == given["model"]["init_args"]["losses"]["minimality"]["coeff"]
    )


def test_the_command_line_names_the_setting():
    """Whatever depth it has in a config; every value was once taken in silence, or ended in a
    traceback.
    """
    for option, said in {
        "losses.reconstruction.all.samples=0": "samples 0 in reconstruction: it must be at least 1",
        "losses.smooth_l0.gamma=0": "gamma 0.0 in smooth_l0: it must be above 0",
        "losses.minimality.ramp=.nan": (
            "ramp nan in minimality: it must be a finite number, at least 0 and at most 1"
        ),
        "warm_up.steps=-1": "steps -1 in warm_up: it must be at least 0",
        "optimizer.betas=[2,2]": (
            "betas [2.0, 2.0] in optimizer: each must be at least 0 and below 1"
        ),
        "evaluation.pgd_steps=[0]": "pgd_steps [0] in evaluation: each must be at least 1",
    }.items():
        with quiet(), pytest.raises(BadInput) as caught:
            Settings(config.load("tms.yaml"), [f"--model.{option}"]).built(
                "model", target=TMS(5, 2)
            )
        assert str(caught.value) == said
