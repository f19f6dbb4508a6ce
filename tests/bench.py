"""`make bench`: milliseconds per optimiser step, ours beside a plain implementation of the same maths, in one run.

The plain one writes the laws down as they stand (docs/method.md): every row of the batch, one masked forward for each
term with masks of its own, `V U` and Δ built, importance MLPs by einsum. Both take CPU time of one thread at the
published batch sizes, in turn, so that a drifting machine drifts for both. The last column is what Lightning adds.

    python tests/bench.py [MODEL ...]
"""

import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn

from spd_lightning.decomposition.importance import lower_leaky, upper_leaky
from spd_lightning.decomposition.losses import Losses, Minimality
from spd_lightning.targets.data import SparseFeatures
from spd_lightning.targets.toy import TMS, ResidualMLP
from spd_lightning.training.blocks import settle_allocator
from spd_lightning.training.decompose import Decomposition, WarmUp
from spd_lightning.training.session import quiet


@dataclass(frozen=True)
class Case:
    """One model at its published batch size, and the milliseconds that it may take."""

    target: Callable[[], nn.Module]
    sites: dict[str, int]
    tied: dict[str, str]
    data: Callable[[], SparseFeatures]
    losses: Losses
    budget: float


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
}


class Plain(nn.Module):
    """The same training step, written as the laws are."""

    def __init__(self, case: Case):
        super().__init__()
        self.case, self.target = case, case.target().requires_grad_(False)
        maps = {n: m for n, m in self.target.named_modules() if isinstance(m, nn.Linear) and n not in case.tied}
        C = next(iter(case.sites.values()))
        self.maps, self.names = maps, [*maps, *case.tied]
        V = {n: nn.Parameter(torch.randn(m.in_features, C) / m.in_features**0.5) for n, m in maps.items()}
        U = {n: nn.Parameter(torch.randn(C, m.out_features) / C**0.5) for n, m in maps.items()}
        self.V, self.U = V, U
        self.mlps = {n: [nn.Parameter(torch.randn(s) / 4) for s in ((C, 1, 16), (C, 16), (C, 16, 1), (C, 1))]
                     for n in self.names}  # fmt: skip
        trained = [*V.values(), *U.values(), *(p for mlp in self.mlps.values() for p in mlp)]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)

    def parts(self, name: str) -> tuple[Tensor, Tensor]:
        if partner := self.case.tied.get(name):
            return self.U[partner].T, self.V[partner].T
        return self.V[name], self.U[name]

    def run(self, x: Tensor, masks: dict[str, tuple[Tensor, Tensor]], seen: dict[str, Tensor] | None = None) -> Tensor:
        """The target with masked sites (D3), by hooks."""
        modules, hooks = dict(self.target.named_modules()), []
        for name in self.names:

            def hook(module, args, out, name=name):
                if seen is not None:
                    seen[name] = args[0]
                if name not in masks:
                    return out
                (V, U), (m, m_delta) = self.parts(name), masks[name]
                delta = module.weight - (V @ U).T
                y = (m * (args[0] @ V)) @ U + m_delta[:, None] * (args[0] @ delta.T)
                return y if module.bias is None else y + module.bias

            hooks.append(modules[name].register_forward_hook(hook))
        try:
            return self.target(x)
        finally:
            for handle in hooks:
                handle.remove()

    def step(self, x: Tensor) -> None:
        seen: dict[str, Tensor] = {}
        out = self.run(x, {}, seen)
        z = {}
        for name in self.names:
            W1, b1, W2, b2 = self.mlps[name]
            a = (seen[name] @ self.parts(name)[0])[..., None]
            h = nn.functional.gelu(torch.einsum("bci,cih->bch", a, W1) + b1)
            z[name] = (torch.einsum("bch,cho->bco", h, W2) + b2)[..., 0]
        minimality = self.case.losses.minimality
        loss = minimality.coeff * sum((upper_leaky(v) + 1e-12).pow(minimality.p).mean(0).sum() for v in z.values())
        g = {name: lower_leaky(v) for name, v in z.items()}
        passes = [self.names, *([name] for name in self.names)]
        for route, share in zip(passes, [1.0] + [1 / len(self.names)] * len(self.names), strict=True):
            masks = {n: (g[n] + (1 - g[n]) * torch.rand_like(g[n]), torch.rand(len(x))) for n in route}
            loss = loss + share * (self.run(x, masks) - out).square().mean()
        entries, squares = 0, 0
        for name in self.names:
            V, U = self.parts(name)
            weight = dict(self.target.named_modules())[name].weight
            squares, entries = squares + (weight - (V @ U).T).square().sum(), entries + weight.numel()
        loss = loss + squares / entries
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()


def ours(case: Case) -> tuple[Decomposition, torch.optim.Optimizer]:
    """The module as it trains, and its optimiser."""
    module = Decomposition(case.target(), case.sites, case.tied, losses=case.losses, warm_up=WarmUp(steps=0))
    module.trainer = L.Trainer(max_steps=1_000_000, **SILENT)  # the schedule asks it for the number of steps
    return module, module.configure_optimizers()


SILENT = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "accelerator": "cpu",
}


def raw_step(module: Decomposition, optimiser: torch.optim.Optimizer, x: Tensor, step: int) -> None:
    """Our step in a raw loop, without Lightning."""
    loss, _ = module.objective(x, step)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def milliseconds(step: Callable[[int], None], first: int, count: int) -> float:
    """CPU milliseconds of one step, mean over several."""
    started = time.process_time()
    for k in range(first, first + count):
        step(k)
    return (time.process_time() - started) / count * 1e3


def measure(name: str) -> str:
    """One line: ours, plain, their ratio, and ours inside Lightning over ours in a raw loop."""
    case = CASES[name]
    torch.manual_seed(0)
    data, plain, (module, optimiser) = case.data(), Plain(case), ours(case)
    drawn = [data.batch(k) for k in range(4)]
    count = 10 if case.budget > 50 else 40
    mine, theirs = [], []
    for turn in range(4):  # the first warms up
        mine.append(milliseconds(lambda k: raw_step(module, optimiser, drawn[k % 4], k), turn * count, count))
        theirs.append(milliseconds(lambda k: plain.step(drawn[k % 4]), turn * count, max(2, count // 4)))
    a, b = statistics.median(mine[1:]), statistics.median(theirs[1:])
    within = lightning_overhead(case, count * 3)
    return f"{name:<12} {a:>8.1f} {case.budget:>8.0f} {b:>8.1f} {b / a:>7.1f}x {within:>10.2f}x"


def lightning_overhead(case: Case, count: int) -> float:
    """CPU time of `Trainer.fit` over that of a raw loop on the same batches."""
    module, optimiser = ours(case)
    data = case.data()
    raw = milliseconds(lambda k: raw_step(module, optimiser, data.batch(k), k), 0, count)
    trainer = L.Trainer(max_steps=count, **SILENT)
    fresh = Decomposition(case.target(), case.sites, case.tied, losses=case.losses, warm_up=WarmUp(steps=0))
    started = time.process_time()
    with quiet():
        trainer.fit(fresh, case.data())
    return (time.process_time() - started) / count * 1e3 / raw


def startup() -> str:
    """Wall seconds until `--help` has answered, best of three."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "spd_lightning", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return f"--help answers in {min(seconds):.2f} s (at most 0.30)"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    settle_allocator()
    torch.set_flush_denormal(True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print("CPU milliseconds per optimiser step, one thread, published batch size")
    print(f"{'model':<12} {'ours':>8} {'at most':>8} {'plain':>8} {'ratio':>8} {'Lightning':>11}")
    for name in names:
        print(measure(name), flush=True)
    print(startup())


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
