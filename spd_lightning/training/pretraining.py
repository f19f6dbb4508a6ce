"""Target training: a network trained once, and kept for every decomposition that names it.

    <root>/targets/<name>-<digest>/    target.safetensors, metrics.jsonl, figures/loss.png,
                                       and target.json, which is written last;
                                       samples.txt and tokenizer.json of a language model;
                                       checkpoints/ and attempt.json until it is trained

A killed training resumes from its last checkpoint, and ends with the same weights, bit for bit.
"""

import fcntl
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spd_lightning import config as configs
from spd_lightning import runs
from spd_lightning.digests import digest
from spd_lightning.errors import BadInput
from spd_lightning.files import make_folder, sweep
from spd_lightning.targets.language import LanguageModel, sample
from spd_lightning.training.checkpoint import LAST, Checkpoints, resumable
from spd_lightning.training.open_target import described, target_folder
from spd_lightning.training.session import Plan, Session, Settings
from spd_lightning.training.target import VALIDATION
from spd_lightning.training.tensor_files import write_tensors

log = logging.getLogger(__name__)

ATTEMPT = "attempt.json"
SAMPLES, SAMPLE_PROMPT, TEMPERATURE = 6, 8, 0.8


# ---- training one --------------------------------------------------------------------------------


def train_target(
    name: str, config: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Path:
    """Train a target unless that has been done, and return its folder.

    A target that leaves features unrepresented is trained again from the next seed.

    Args:
        name: a config that trains a target: a path, or a name that `list` shows.
        config: its settings; those that the name loads if omitted.
        overrides: settings of the command line.

    Raises:
        BadInput: the config does not describe a target.
    """
    config = configs.load(name) if config is None else config
    folder = target_folder(name, config, overrides)
    make_folder(folder)
    with _alone(folder):
        sweep(folder)
        sweep(folder / LAST.parent)
        if not (folder / "target.json").exists():
            _train(name, config, overrides, folder)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Another process that trains the same target is waited for; those that Lightning starts for
    devices are one.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _train(name: str, config: Mapping[str, Any], overrides: Sequence[str], folder: Path) -> None:
    started = time.perf_counter()
    first = int(Settings(config, overrides).settings["seed_everything"])
    seed = runs.read_json(folder / ATTEMPT, dict[str, int]).get("seed", first)
    while True:
        session = _attempt(name, config, [*overrides, "--seed_everything", str(seed)], folder)
        missed = session.model.target.unrepresented()  # pyright: ignore[reportCallIssue]
        if not missed:
            break
        said = f"target {name}: seed {seed} leaves {missed} unrepresented"
        if seed >= first + session.model.retries:
            log.warning("%s; no retries left, it is kept so", said)
            break
        seed += 1
        log.warning("%s; training again with seed %d", said, seed)
        shutil.rmtree(folder / LAST.parent, ignore_errors=True)
        runs.write_json(folder / ATTEMPT, {"seed": seed})
    if session.trainer.is_global_zero:
        _keep(
            session,
            folder,
            {"seed": seed, "unrepresented": missed, "config": dict(config)},
            started,
        )
    session.trainer.strategy.barrier()


def _attempt(
    name: str, config: Mapping[str, Any], overrides: Sequence[str], folder: Path
) -> Session:
    """One training to its end, from the last checkpoint if there is one; the target is then in eval
    mode.
    """
    plan = Plan(folder, f"target {Path(name).stem}", callbacks=[Checkpoints(folder)], logged=True)
    session = Session(config, overrides, lambda _: plan)
    if not hasattr(session.model, "target"):
        raise BadInput("does not train a target; its model must be a TargetTraining")
    session.trainer.fit(session.model, datamodule=session.datamodule, ckpt_path=resumable(folder))
    session.trainer.validate(session.model, datamodule=session.datamodule, verbose=False)
    session.model.target.eval()
    return session


def _keep(session: Session, folder: Path, facts: dict[str, Any], started: float) -> None:
    """Writes what a training came to, and takes away what it needed."""
    network: nn.Module = session.model.target  # pyright: ignore[reportAssignmentType]
    write_tensors(network.state_dict(), folder / "target.safetensors")
    losses = {"validation": float(session.trainer.callback_metrics.get(VALIDATION, math.nan))}
    if isinstance(network, LanguageModel):
        losses["perplexity"] = math.exp(losses["validation"])
        with runs.write_whole(folder / "samples.txt") as temporary:
            temporary.write_text(samples(network, session.datamodule), encoding="utf-8")
        if tokenizer := getattr(session.datamodule, "tokenizer", None):
            with runs.write_whole(folder / "tokenizer.json") as temporary:
                tokenizer.inner.save(str(temporary))
    draw_losses(folder)
    spec = session.settings["model"]["init_args"]["target"]
    facts |= {"spec": spec, "losses": losses, "seconds": time.perf_counter() - started}
    facts["digest"] = digest(folder / "target.safetensors")
    runs.write_json(folder / "target.json", facts)
    shutil.rmtree(folder / LAST.parent, ignore_errors=True)
    (folder / ATTEMPT).unlink(missing_ok=True)


# ---- what is shown of it -------------------------------------------------------------------------


def report(folder: Path) -> str:
    """One line on a trained target: its losses and where it is."""
    facts = described(folder)
    losses = facts["losses"]
    said = f"validation loss {losses['validation']:.4g}" if "validation" in losses else ""
    if "perplexity" in losses:
        said += f" nats, perplexity {losses['perplexity']:.4g}"
    return f"target: {folder}    {said}    {facts['seconds']:.0f} s"


def samples(network: LanguageModel, data: Any) -> str:
    """Beginnings of a few validation sequences, and how a language model goes on from them."""
    device = next(network.parameters()).device
    batch = next(iter(data.val_dataloader()))
    prompts = batch[:SAMPLES, : min(SAMPLE_PROMPT, batch.shape[1] // 2)].to(device)
    steps = network.context - prompts.shape[1]
    generator = torch.Generator(device).manual_seed(0)
    longer = sample(network, prompts, min(steps, 200), TEMPERATURE, generator).tolist()
    parts = [(ids[: prompts.shape[1]], ids[prompts.shape[1] :]) for ids in longer]
    lines = [
        f"({number}) {_text(data, given)}▸{_text(data, own)}\n"
        for number, (given, own) in enumerate(parts, 1)
    ]
    return "\n".join([f"From ▸ on the model speaks, at temperature {TEMPERATURE}.\n", *lines])


def _text(data: Any, ids: list[int]) -> str:
    return data.decode(ids) if hasattr(data, "decode") else " ".join(data.names(ids))


def draw_losses(folder: Path) -> None:
    """Draws `figures/loss.png`: the losses in a folder's metrics.jsonl over optimizer steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = runs.Run(folder).metrics()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, label in (("train/loss", "training"), (VALIDATION, "validation")):
        if name in logged.columns:
            curve = logged.select("step", name).drop_nulls()
            axis.plot(curve["step"].to_numpy(), curve[name].to_numpy(), label=label, linewidth=1)
    axis.set(xlabel="optimizer steps", ylabel="loss", title=folder.name)
    axis.legend(frameon=False)
    make_folder(folder / "figures")
    with runs.write_whole(folder / "figures" / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)
