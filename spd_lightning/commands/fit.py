"""fit: train the target if necessary, decompose it, and write a run."""

import logging
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning import config as configs
from spd_lightning import runs
from spd_lightning.commands import loading, results
from spd_lightning.commands.arguments import RunArguments
from spd_lightning.errors import BadInput, Diverged, command

if TYPE_CHECKING:
    from spd_lightning.training.decompose import Decomposition
    from spd_lightning.training.session import Session, Settings

log = logging.getLogger("spd_lightning")


def main(argv: Sequence[str]) -> None:
    """Train or decompose a target, and write a run with its summary, figures and tracker copy."""
    request = RunArguments.parse("fit", argv)
    config = request.config
    with loading.trainer():
        if _trains_target(config):
            from spd_lightning.training.pretraining import report, train_target

            folder = train_target(request.names[0], config, request.overrides)
            print(report(folder))
        else:
            _decompose(request, config)


def _trains_target(config: dict[str, Any]) -> bool:
    model = config.get("model")
    if not isinstance(model, dict):
        return False
    name = str(model.get("class_path"))
    return name.endswith("TargetTraining")


def _decompose(request: RunArguments, config: dict[str, Any]) -> None:
    from spd_lightning.planning.estimate import check_memory
    from spd_lightning.planning.precision import FLOAT32, slow_here
    from spd_lightning.training.checkpoint import Checkpoints
    from spd_lightning.training.figures import Figures
    from spd_lightning.training.session import Plan, Session, Settings

    settings = Settings(config, request.overrides)
    if lock := runs.uncopied(request.name, settings.settings):
        with lock:
            _complete_copy(lock.run, settings)
        return
    check_memory(settings)
    started = time.perf_counter()
    locks = []

    def plan(settings: dict[str, Any]) -> Plan:
        lock = runs.acquire_run(request.name, settings)
        locks.append(lock)
        _announce_new(request, lock)
        if not lock.resumed and (slow := slow_here(settings["trainer"])):
            log.warning("on this CPU, %s; to train in float32, add %s", slow, FLOAT32)
        with runs.write_whole(lock.path / "config.yaml") as temporary:
            temporary.write_text(configs.dump(settings), encoding="utf-8")
        _train_missing_target(settings["model"])
        callbacks = [Checkpoints(lock.path), Figures(lock.path)]
        return Plan(lock.path, lock.run.name, callbacks=callbacks, tracked=True)

    try:
        session = Session(config, request.overrides, plan)
        with session.copies:
            _train_or_note(session, started)
            if session.trainer.is_global_zero:
                _finish(session, started)
        if session.trainer.is_global_zero:
            print(f"run: {session.plan.folder}    next: {_predict(request, session.plan.name)}")
    finally:
        for lock in locks:
            lock.release_and_discard()


def _announce_new(request: RunArguments, lock: runs.RunLock) -> None:
    """Log that this trains another run, if one of the same name has finished."""
    finished = runs.latest_finished(request.name)
    if lock.resumed or finished is None:
        return
    new = lock.run.name
    old = finished.name
    predict = _predict(request, old, newest=False)
    log.info(
        "run %s: already finished; training a new run, %s. To harvest from %s: %s",
        old,
        new,
        old,
        predict,
    )


def _predict(request: RunArguments, run: str, newest: bool = True) -> str:
    """Return the command that harvests from a run.

    Args:
        request: the fit, whose configs the command repeats.
        run: the name of the run.
        newest: whether the run is the newest of its name; the first config then names it already.
    """
    words = ["predict"]
    for config in request.names:
        words += ["--config", config]
    if not newest or Path(request.names[0]).stem != run:
        words += ["--run", run]
    return command(shlex.join(words))


def _train_missing_target(model: dict[str, Any]) -> None:
    """Train the target that a decomposition names, unless it has been trained already."""
    from spd_lightning.training.open_target import is_trained_here
    from spd_lightning.training.pretraining import train_target

    reference = model["init_args"].get("target")
    if isinstance(reference, str) and is_trained_here(reference):
        try:
            _advise_float32(reference)
            train_target(reference)
        except BadInput as error:
            raise BadInput(f"target '{reference}': {error}") from error


def _advise_float32(target: str) -> None:
    """Log that bfloat16 is slow on this CPU, if the training of a target will need it."""
    from spd_lightning.planning.precision import slow_here
    from spd_lightning.training.open_target import target_folder

    config = configs.load(target)
    is_trained = (target_folder(target, config) / "target.json").exists()
    if not is_trained and (slow := slow_here(config.get("trainer", {}))):
        log.warning(
            "target %s: on this CPU, %s; to train it in float32, name with --model.target a config "
            "of two lines: 'base: %s' and 'trainer: {precision: 32-true}'",
            target,
            slow,
            target,
        )


def _complete_copy(run: runs.Run, settings: "Settings") -> None:
    """Send a finished run to the trackers that lack a part of it, instead of fitting it again."""
    from spd_lightning.tracking.publishing import send

    log.info("run %s: already finished; sending the parts that a tracker lacks", run.name)
    try:
        send(settings.trackers, run.path, settings.settings)
    except BadInput as error:
        raise BadInput(
            f"{error}. The run itself is complete; to start another one, name it: --run NAME"
        ) from error
    print(f"sent: {run.path}")


def _train_or_note(session: "Session", started: float) -> None:
    """Train; if training diverges, note it in the summary and keep the last finite checkpoint."""
    try:
        _train(session)
    except Diverged as error:
        _note(session, error, started)
        raise BadInput(
            f"run '{session.plan.name}': training {error}; its last finite checkpoint is kept"
        ) from error


def _train(session: "Session") -> None:
    from spd_lightning.training.checkpoint import resumable

    trainer = session.trainer
    session.copies.begin(session.settings)
    checkpoint = resumable(session.plan.folder)
    trainer.fit(session.model, datamodule=session.datamodule, ckpt_path=checkpoint)
    trainer.validate(session.model, datamodule=session.datamodule, verbose=False)
    # Forked devices evaluate in their own processes, so this one takes over their metrics.
    session.model.adopt(trainer.callback_metrics)


def _finish(session: "Session", started: float) -> None:
    """Write the results of the training, the summary last, and send copies to the trackers."""
    from spd_lightning.tracking.publishing import publish

    folder = session.plan.folder
    module = session.model
    module.save(folder)
    summary = _summary(session, time.perf_counter() - started)
    if module.warning:
        log.warning(
            "run %s: ended in a local minimum; try another seed. %s", folder.name, module.warning
        )
    runs.write_json(folder / "summary.json", summary)
    print(results.table([(folder.name, summary)]))
    publish(session.copies)


def _summary(session: "Session", seconds: float) -> dict[str, float | str]:
    """Return the summary of a run: figures, verdict, seconds, steps, seed and versions."""
    module: Decomposition = session.model  # pyright: ignore[reportAssignmentType]
    facts = _facts(session, seconds, session.trainer.max_steps)
    return {**module.figures, "verdict": _verdict(module), **facts}


def _facts(session: "Session", seconds: float, steps: int) -> dict[str, float | str]:
    """Return the parts of a summary that do not depend on how well the training went."""
    module: Decomposition = session.model  # pyright: ignore[reportAssignmentType]
    target_seconds = (module.target_spec or {}).get("seconds", 0.0)
    packages = ("spd_lightning", "torch", "lightning")
    return {
        "seconds/target": round(target_seconds, 2),
        "seconds/fit": round(seconds, 2),
        "steps": steps,
        "seed": module.seed,
        **{f"version/{name}": version(name) for name in packages},
    }


def _note(session: "Session", error: Diverged, started: float) -> None:
    """Write the summary of a diverged training: its reason and step, and no figures."""
    if not session.trainer.is_global_zero:
        return
    seconds = time.perf_counter() - started
    step = session.trainer.global_step
    facts = _facts(session, seconds, step)
    verdict = f"diverged: {error.reason}"
    summary = {"verdict": verdict, **facts}
    path = session.plan.folder / "summary.json"
    runs.write_json(path, summary)


def _verdict(module: "Decomposition") -> str:
    if module.warning:
        return f"local minimum: {module.warning}"
    return "ok" if module.figures else "not evaluated"
