"""fit: trains the target if need be, decomposes it, and leaves a run."""

import logging
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from spd_lightning import config as configs
from spd_lightning import runs
from spd_lightning.commands import loading, results
from spd_lightning.commands.arguments import RunArguments
from spd_lightning.errors import BadInput, Diverged

if TYPE_CHECKING:
    from spd_lightning.training.decompose import Decomposition
    from spd_lightning.training.session import Session, Settings

log = logging.getLogger("spd_lightning")


def main(argv: Sequence[str]) -> None:
    """Train a target, or decompose one, and leave a run: its summary, its figures, and a copy in
    the tracker.
    """
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
    return isinstance(model, dict) and str(model.get("class_path")).endswith("TargetTraining")


def _decompose(request: RunArguments, config: dict[str, Any]) -> None:
    from spd_lightning.planning.estimate import refuse_what_does_not_fit
    from spd_lightning.training.checkpoint import Checkpoints
    from spd_lightning.training.figures import Figures
    from spd_lightning.training.session import Plan, Session, Settings

    settings = Settings(config, request.overrides)
    if lock := runs.uncopied(request.name, settings.settings):
        with lock:
            _complete_copy(lock.run, settings)
        return
    refuse_what_does_not_fit(settings)
    started = time.perf_counter()
    locks = []

    def plan(settings: dict[str, Any]) -> Plan:
        lock = runs.acquire_run(request.name, settings)
        locks.append(lock)
        with runs.write_whole(lock.path / "config.yaml") as temporary:
            temporary.write_text(configs.dump(settings), encoding="utf-8")
        _train_missing_target(settings["model"])
        extra = [Checkpoints(lock.path), Figures(lock.path)]
        return Plan(lock.path, lock.run.name, callbacks=extra, tracked=True)

    try:
        session = Session(config, request.overrides, plan)
        with session.copies:
            _train_or_note(session, started)
            if session.trainer.is_global_zero:
                _finish(session, started)
        if session.trainer.is_global_zero:
            print(
                f"run: {session.plan.folder}    next: python -m spd_lightning predict --config "
                f"{request.names[0]}"
            )
    finally:
        for lock in locks:
            lock.release_and_discard()


def _train_missing_target(model: dict[str, Any]) -> None:
    """Train the target that a decomposition names, unless that has been done."""
    from spd_lightning.training.open_target import is_trained_here
    from spd_lightning.training.pretraining import train_target

    reference = model["init_args"].get("target")
    if isinstance(reference, str) and is_trained_here(reference):
        try:
            train_target(reference)
        except BadInput as error:
            raise BadInput(f"target '{reference}': {error}") from error


def _complete_copy(run: runs.Run, settings: "Settings") -> None:
    """Send a finished run to the trackers that did not get all of it, in place of making it
    again.
    """
    from spd_lightning.training.tracking import send

    log.info("run %s: it is finished; sending what a tracker is still missing", run.name)
    try:
        send(settings.trackers, run.path, settings.settings)
    except BadInput as error:
        raise BadInput(
            f"{error}. The run itself is complete; to start another one, name it: --run NAME"
        ) from error
    print(f"sent: {run.path}")


def _train_or_note(session: "Session", started: float) -> None:
    """Trains; where that diverges the summary says so, and the last finite checkpoint stays."""
    try:
        _train(session)
    except Diverged as error:
        _note(session, error, started)
        kept = "its last finite checkpoint is kept"
        raise BadInput(f"run '{session.plan.name}': training {error}; {kept}") from error


def _train(session: "Session") -> None:
    from spd_lightning.training.checkpoint import resumable

    trainer, folder = session.trainer, session.plan.folder
    session.copies.begin(session.settings)
    trainer.fit(session.model, datamodule=session.datamodule, ckpt_path=resumable(folder))
    trainer.validate(session.model, datamodule=session.datamodule, verbose=False)
    session.model.adopt(
        trainer.callback_metrics
    )  # forked devices evaluate in processes of their own


def _finish(session: "Session", started: float) -> None:
    """Writes what the training came to, the summary last, and sends copies to the trackers."""
    from spd_lightning.training.tracking import publish

    folder, module = session.plan.folder, session.model
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
    """The flat map that a run is judged by: figures, seconds, steps, seed, versions."""
    module: Decomposition = session.model  # pyright: ignore[reportAssignmentType]
    return {
        **module.figures,
        "verdict": _verdict(module),
        **_facts(session, seconds, session.trainer.max_steps),
    }


def _facts(session: "Session", seconds: float, steps: int) -> dict[str, float | str]:
    module: Decomposition = session.model  # pyright: ignore[reportAssignmentType]
    trained = (module.target_spec or {}).get("seconds", 0.0)
    return {
        "seconds/target": round(trained, 2),
        "seconds/fit": round(seconds, 2),
        "steps": steps,
        "seed": module.seed,
        **{f"version/{name}": version(name) for name in ("spd_lightning", "torch", "lightning")},
    }


def _note(session: "Session", error: Diverged, started: float) -> None:
    """Writes the summary of a training that diverged: what happened, when, and no figures."""
    if session.trainer.is_global_zero:
        facts = _facts(session, time.perf_counter() - started, session.trainer.global_step)
        runs.write_json(
            session.plan.folder / "summary.json", {"verdict": f"diverged: {error.reason}", **facts}
        )


def _verdict(module: "Decomposition") -> str:
    if module.warning:
        return f"local minimum: {module.warning}"
    return "ok" if module.figures else "not evaluated"
