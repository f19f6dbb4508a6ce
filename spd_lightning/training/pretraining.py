"""Target training: a network is trained once and shared by all decompositions that name it.

    <root>/targets/<name>-<digest>/    target.safetensors, metrics.jsonl, figures/loss.png,
                                       and target.json, which is written last;
                                       samples.txt and tokenizer.json of a language model;
                                       checkpoints/ and attempt.json until training is complete

A killed training resumes from its last checkpoint and ends with bitwise the same weights.
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
from spd_lightning.training.session import Plan, Session, Settings, quiet
from spd_lightning.training.target import VALIDATION
from spd_lightning.training.tensor_files import write_tensors

log = logging.getLogger(__name__)

ATTEMPT = "attempt.json"
SAMPLES, SAMPLE_PROMPT, TEMPERATURE = 6, 8, 0.8


# ---- training ------------------------------------------------------------------------------------


def train_target(
    name: str, config: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Path:
    """Train a target unless it has been trained before, and return its folder.

    A target that leaves features unrepresented is trained again from the next seed.

    Args:
        name: a config that trains a target: a path, or a name that `list` shows.
        config: its settings; loaded by name if omitted.
        overrides: settings from the command line.

    Raises:
        BadInput: the config does not train a target.

    Examples:
        >>> from spd_lightning import train_target
        >>> folder = train_target("targets/tms_5-2", overrides=["--trainer.max_steps=1000"])
        >>> sorted(path.name for path in folder.glob("target.*"))
        ['target.json', 'target.safetensors']
    """
    config = configs.load(name) if config is None else config
    folder = target_folder(name, config, overrides)
    make_folder(folder)
    with _alone(folder), quiet():
        sweep(folder)
        sweep(folder / LAST.parent)
        if not (folder / "target.json").exists():
            _train(name, config, overrides, folder)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for other processes that train the same target, and lock them out.

    The processes that Lightning starts for further devices share the lock of the first.
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
        problem = f"target {name}: seed {seed} leaves {missed} unrepresented"
        if seed >= first + session.model.retries:
            log.warning("%s; no retries left, the target is used as it is", problem)
            break
        seed += 1
        log.warning("%s; training again with seed %d", problem, seed)
        shutil.rmtree(folder / LAST.parent, ignore_errors=True)
        runs.write_json(folder / ATTEMPT, {"seed": seed})
    if session.trainer.is_global_zero:
        facts = {"seed": seed, "unrepresented": missed, "config": dict(config)}
        _save(session, folder, facts, started)
    session.trainer.strategy.barrier()


def _attempt(
    name: str, config: Mapping[str, Any], overrides: Sequence[str], folder: Path
) -> Session:
    """Train with one seed, from the last checkpoint if it exists; leave the target in eval mode."""
    title = f"target {Path(name).stem}"
    checkpoints = Checkpoints(folder)
    plan = Plan(folder, title, callbacks=[checkpoints], logged=True)
    session = Session(config, overrides, lambda _: plan)
    trainer = session.trainer
    model = session.model
    data = session.datamodule
    if not hasattr(model, "target"):
        raise BadInput("does not train a target; its model must be a TargetTraining")
    trainer.fit(model, datamodule=data, ckpt_path=resumable(folder))
    trainer.validate(model, datamodule=data, verbose=False)
    model.target.eval()
    return session


def _save(session: Session, folder: Path, facts: dict[str, Any], started: float) -> None:
    """Write the results of a training, and delete its temporary files.

    Args:
        session: the training.
        folder: the target's folder.
        facts: what target.json says about the training.
        started: when the training started.
    """
    network: nn.Module = session.model.target  # pyright: ignore[reportAssignmentType]
    write_tensors(network.state_dict(), folder / "target.safetensors")
    validation_loss = session.trainer.callback_metrics.get(VALIDATION, math.nan)
    losses = {"validation": float(validation_loss)}
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


# ---- reports -------------------------------------------------------------------------------------


def report(folder: Path) -> str:
    """Return one line about a trained target: its folder, losses and training time."""
    description = described(folder)
    losses = description["losses"]
    text = ""
    if "validation" in losses:
        text = f"validation loss {losses['validation']:.4g}"
    if "perplexity" in losses:
        text += f" nats, perplexity {losses['perplexity']:.4g}"
    seconds = description["seconds"]
    return f"target: {folder}    {text}    {seconds:.0f} s"


def samples(network: LanguageModel, data: Any) -> str:
    """Return the beginnings of some validation sequences, with the model's continuations."""
    device = next(network.parameters()).device
    batch = next(iter(data.val_dataloader()))
    length = min(SAMPLE_PROMPT, batch.shape[1] // 2)
    prompts = batch[:SAMPLES, :length].to(device)
    steps = min(network.context - length, 200)
    generator = torch.Generator(device).manual_seed(0)
    sequences = sample(network, prompts, steps, TEMPERATURE, generator).tolist()
    lines = [f"The model continues from ▸ on, at temperature {TEMPERATURE}.\n"]
    for number, ids in enumerate(sequences, 1):
        prompt = _text(data, ids[:length])
        continuation = _text(data, ids[length:])
        lines.append(f"({number}) {prompt}▸{continuation}\n")
    return "\n".join(lines)


def _text(data: Any, ids: list[int]) -> str:
    """Return the text of token ids, or their names if the data cannot decode them."""
    if hasattr(data, "decode"):
        return data.decode(ids)
    names = data.names(ids)
    return " ".join(names)


def draw_losses(folder: Path) -> None:
    """Draw `figures/loss.png`: the losses in a folder's metrics.jsonl over optimizer steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = runs.Run(folder).metrics()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, label in (("train/loss", "training"), (VALIDATION, "validation")):
        if name in metrics.columns:
            curve = metrics.select("step", name).drop_nulls()
            steps = curve["step"].to_numpy()
            losses = curve[name].to_numpy()
            axis.plot(steps, losses, label=label, linewidth=1)
    axis.set(xlabel="optimizer steps", ylabel="loss", title=folder.name)
    axis.legend(frameon=False)
    make_folder(folder / "figures")
    path = folder / "figures" / "loss.png"
    with runs.write_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
