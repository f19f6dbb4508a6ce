"""`make bench`: milliseconds per optimizer step, compared with a plain implementation.

The plain one (`plain.py`) implements the same laws literally. Both are measured in CPU time of one
thread at the published batch sizes. They take turns, so that a change in the machine's speed
affects both. The best turn of each counts, since disturbances only ever add time. The last column
is the overhead of Lightning.

    python benchmarks/bench.py [MODEL ...]
"""

import logging
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import lightning as L
import torch
from plain import Plain
from torch import Tensor, nn

from spd_lightning.data.modules import SampledData, SparseFeatures
from spd_lightning.decomposition.adversaries import Adversary
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.losses import Faithfulness, Losses, Minimality
from spd_lightning.decomposition.reconstruction import Reconstruction
from spd_lightning.targets.toy import TMS, ResidualMLP
from spd_lightning.targets.transformer import Decoder
from spd_lightning.training.decompose import Decomposition, FaithfulnessWarmup
from spd_lightning.training.multi_step import settle_allocator
from spd_lightning.training.session import quiet

TURNS = 7
# The measured steps are in the middle of a long training, where p is not an integer.
MIDDLE = 500_000
STEPS = 1_000_000


class Tokens(SampledData):
    """Random token sequences, which cost almost nothing to draw."""

    def __init__(self):
        super().__init__(8, 0, 1, 0, 1)

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        return torch.randint(1000, (rows, 64), generator=generator)

    def probes(self) -> tuple[Tensor, list[str]]:
        raise NotImplementedError("nothing is harvested")


@dataclass(frozen=True)
class Case:
    """A model at its published batch size, and the milliseconds that a step can take at most."""

    target: Callable[[], nn.Module]
    sites: dict[str, int]
    tied: dict[str, str]
    data: Callable[[], SampledData]
    losses: Losses
    budget: float
    importance: Importance = Importance()  # noqa: RUF009  (frozen)
    half: bool = False

    @property
    def autocast(self) -> torch.autocast:
        """The precision, as Lightning sets it."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half, cache_enabled=False)


HALVES = {
    "stochastic": Reconstruction("stochastic", "subset", "kl", 0.5),
    "adversarial": Reconstruction("pgd", "subset", "kl", 0.5, adversary=Adversary(1, 1.0)),
}
LANGUAGE = Case(
    lambda: Decoder(1000, 128, 2, 4, 64),
    {"h.*.attn.*_proj": 650, "h.*.mlp.*": 650},
    {},
    Tokens,
    Losses(Faithfulness(1e6), Minimality(1e-3, p=2.0, p_final=0.3), reconstruction=HALVES),
    500,
    Importance("shared_mlp", hidden=550),
)

CASES = {
    "tms_5-2": Case(
        lambda: TMS(5, 2),
        {"linear1": 20, "linear2": 20},
        {"linear2": "linear1"},
        lambda: SparseFeatures(5, 0.05, 4096),
        Losses(minimality=Minimality(3e-3, p=1.0)),
        8,
    ),
    "tms_40-10": Case(
        lambda: TMS(40, 10),
        {"linear1": 200, "linear2": 200},
        {"linear2": "linear1"},
        lambda: SparseFeatures(40, 0.05, 4096),
        Losses(minimality=Minimality(1e-4, p=2.0)),
        180,
    ),
    "resid_mlp1": Case(
        lambda: ResidualMLP(100, 1000, 50, 1),
        {"layers.*": 100},
        {},
        lambda: SparseFeatures(100, 0.01, 2048, -1.0, 1.0),
        Losses(minimality=Minimality(1e-5, p=2.0)),
        110,
    ),
    "2-layer LM": LANGUAGE,
    "in bf16": replace(LANGUAGE, half=True, budget=250),
}


def fresh(case: Case) -> Decomposition:
    """Return a new module to train."""
    return Decomposition(
        case.target(),
        case.sites,
        case.tied,
        importance=case.importance,
        losses=case.losses,
        warm_up=FaithfulnessWarmup(steps=0),
    )


def ours(case: Case) -> Callable[[Tensor, int], None]:
    """Return a function that takes one of our steps in a raw loop, without Lightning."""
    module = fresh(case)
    module.trainer = L.Trainer(
        max_steps=STEPS, **SILENT
    )  # the learning rate schedule reads its number of steps
    optimizer = module.configure_optimizers()

    def step(x: Tensor, k: int) -> None:
        with case.autocast:
            loss, _ = module.objective(x, MIDDLE + k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain(case: Case) -> Callable[[Tensor, int], None]:
    """Return a function that takes one step of the plain implementation."""
    model = Plain(
        case.target(), next(iter(case.sites.values())), case.tied, case.importance, case.losses
    )

    def step(x: Tensor, k: int) -> None:
        with case.autocast:
            loss = model.objective(x, (MIDDLE + k) / STEPS)
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()

    return step


SILENT = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "accelerator": "cpu",
}


def milliseconds(step: Callable[[int], None], first: int, count: int) -> float:
    """Return the CPU milliseconds per step, averaged over `count` steps."""
    started = time.process_time()
    for k in range(first, first + count):
        step(k)
    return (time.process_time() - started) / count * 1e3


def measure(name: str) -> str:
    """Return a line of the table: ours, plain, their ratio, and the overhead of Lightning."""
    case = CASES[name]
    torch.manual_seed(0)
    data = case.data()
    step = ours(case)
    other = plain(case)
    drawn = [data.batch(k) for k in range(4)]
    count = 10 if case.budget > 50 else 40
    mine = []
    theirs = []
    for turn in range(TURNS):  # the first warms up
        mine.append(milliseconds(lambda k: step(drawn[k % 4], k), turn * count, count))
        theirs.append(
            milliseconds(lambda k: other(drawn[k % 4], k), turn * count, max(2, count // 4))
        )
    a = min(mine[1:])
    b = min(theirs[1:])
    within = lightning_overhead(case, count * 3)
    return f"{name:<12} {a:>8.1f} {case.budget:>8.0f} {b:>8.1f} {b / a:>7.1f}x {within:>10.2f}x"


def lightning_overhead(case: Case, count: int) -> float:
    """Return the CPU time of `Trainer.fit`, divided by that of a raw loop on the same batches."""
    step = ours(case)
    data = case.data()
    raw = milliseconds(lambda k: step(data.batch(k), k), 0, count)
    trainer = L.Trainer(max_steps=count, precision="bf16-mixed" if case.half else None, **SILENT)
    started = time.process_time()
    with quiet():
        trainer.fit(fresh(case), case.data())
    return (time.process_time() - started) / count * 1e3 / raw


def startup() -> str:
    """Return a line with the wall seconds that `--help` takes, the best of three runs."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "spd_lightning", "--help"], capture_output=True, check=True
        )
        seconds.append(time.perf_counter() - started)
    return f"--help answers in {min(seconds):.2f} s (at most 0.30)"


def prepare() -> None:
    """Set up a process as for a training."""
    torch.set_num_threads(1)
    settle_allocator()
    torch.set_flush_denormal(True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def main(names: list[str]) -> None:
    print("CPU milliseconds per optimizer step, one thread, published batch size")
    print(f"{'model':<12} {'ours':>8} {'at most':>8} {'plain':>8} {'ratio':>8} {'Lightning':>11}")
    alone = {
        "max_workers": 1,
        "max_tasks_per_child": 1,
        "mp_context": multiprocessing.get_context("spawn"),
    }
    with ProcessPoolExecutor(
        initializer=prepare, **alone
    ) as pool:  # a new process for each model, as for trainings
        for line in pool.map(measure, names):
            print(line, flush=True)
    print(startup())


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
