"""The verbs that need a Trainer: fit, validate, predict, and push, which sends a run to its trackers once more."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning import config as configs
from spd_lightning import loading, results, runs, usage
from spd_lightning.errors import BadInput, Diverged

if TYPE_CHECKING:
    from spd_lightning.training.decompose import Decomposition
    from spd_lightning.training.session import Session, Settings

log = logging.getLogger("spd_lightning")


@dataclass
class Request:
    """What the words of fit, validate or predict ask for."""

    names: list[str] = field(default_factory=list)
    run: str | None = None
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, verb: str, words: Sequence[str]) -> "Request":
        """Read --config and --run; all else is for LightningCLI.

        Raises:
            BadInput: there is no --config, or an option has no value.
        """
        found, rest = usage.read_some(verb, words)
        if not found.config:
            raise BadInput(f"{verb}: --config is missing; for example: --config tms.yaml ('list' shows the configs)")
        return cls(found.config, found.run, rest)

    @property
    def prints_only(self) -> bool:
        """Whether the merged settings are to be printed, and nothing else."""
        return any(word.startswith("--print_config") for word in self.overrides)

    @property
    def name(self) -> str:
        """The run's name: as asked for, or the first config's."""
        return runs.check_name(self.run or Path(self.names[0]).name.removesuffix(".yaml"))

    def finished_run(self) -> runs.Run:
        """Return the run that is asked for by name, or the newest that finished.

        Raises:
            BadInput: there is none.
        """
        return runs.find(self.run) if self.run else runs.newest(self.name)

    @property
    def config(self) -> dict[str, Any]:
        """All configs, merged; what several laid over the first say of callbacks, harvesters above all, adds up."""
        merged, laid = configs.load(self.names[0]), []
        for name in self.names[1:]:
            over = configs.load(name)
            merged = configs.merge(merged, over)
            laid += [each for each in _callbacks(over) if each not in laid]
        return configs.merge(merged, {"trainer": {"callbacks": laid}}) if laid else merged


def _callbacks(config: dict[str, Any]) -> list[Any]:
    trainer = config.get("trainer")
    found = trainer.get("callbacks") if isinstance(trainer, dict) else None
    return found if isinstance(found, list) else []


def fit(words: Sequence[str]) -> None:
    """Trains a target, or decomposes one: a run in the end, with its summary, figures and a copy in the tracker."""
    request = Request.of("fit", words)
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


def _decompose(request: Request, config: dict[str, Any]) -> None:
    from spd_lightning.training.checkpoint import Checkpoints
    from spd_lightning.training.figures import Figures
    from spd_lightning.training.session import Plan, Session, Settings
    from spd_lightning.training.sizing import refuse_what_does_not_fit

    settings = Settings(config, request.overrides)
    if claim := runs.uncopied(request.name, settings.settings):
        with claim:
            _complete_copy(claim.run, settings)
        return
    refuse_what_does_not_fit(settings)
    started, claims = time.perf_counter(), []

    def plan(settings: dict[str, Any]) -> Plan:
        claim = runs.claim(request.name, settings)
        claims.append(claim)
        with runs.write_whole(claim.path / "config.yaml") as temporary:
            temporary.write_text(configs.dump(settings), encoding="utf-8")
        _train_missing_target(settings["model"])
        extra = [Checkpoints(claim.path), Figures(claim.path)]
        return Plan(claim.path, claim.run.name, callbacks=extra, tracked=True)

    try:
        session = Session(config, request.overrides, plan)
        with session.copies:
            _train_or_note(session, started)
            if session.trainer.is_global_zero:
                _finish(session, started)
        if session.trainer.is_global_zero:
            print(f"run: {session.plan.folder}    next: python -m spd_lightning predict --config {request.names[0]}")
    finally:
        for claim in claims:
            claim.abandon()


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
    """Send a finished run to the trackers that did not get all of it, in place of making it again."""
    from spd_lightning.training.tracking import send

    log.info("run %s: it is finished; sending what a tracker is still missing", run.name)
    try:
        send(settings.trackers, run.path, settings.settings)
    except BadInput as error:
        raise BadInput(f"{error}. The run itself is complete; to start another one, name it: --run NAME") from error
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
    session.model.adopt(trainer.callback_metrics)  # forked devices evaluate in processes of their own


def _finish(session: "Session", started: float) -> None:
    """Writes what the training came to, the summary last, and sends copies to the trackers."""
    from spd_lightning.training.tracking import publish

    folder, module = session.plan.folder, session.model
    module.save(folder)
    summary = _summary(session, time.perf_counter() - started)
    if module.warning:
        log.warning("run %s: ended in a local minimum; try another seed. %s", folder.name, module.warning)
    runs.write_json(folder / "summary.json", summary)
    print(results.table([(folder.name, summary)]))
    publish(session.copies)


def _summary(session: "Session", seconds: float) -> dict[str, float | str]:
    """The flat map that a run is judged by: figures, seconds, steps, seed, versions."""
    module: Decomposition = session.model  # pyright: ignore[reportAssignmentType]
    return {**module.figures, "verdict": _verdict(module), **_facts(session, seconds, session.trainer.max_steps)}


def _facts(session: "Session", seconds: float, steps: int) -> dict[str, float | str]:
    from importlib.metadata import version

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
        runs.write_json(session.plan.folder / "summary.json", {"verdict": f"diverged: {error.reason}", **facts})


def _verdict(module: "Decomposition") -> str:
    if module.warning:
        return f"local minimum: {module.warning}"
    return "ok" if module.figures else "not evaluated"


def validate(words: Sequence[str]) -> None:
    """Evaluates a finished run again and prints its figures."""
    with _finished(Request.of("validate", words), tracked=False) as session:
        session.trainer.validate(session.model, datamodule=session.datamodule, verbose=False)
        if session.trainer.is_global_zero:
            print(json.dumps(session.model.figures, indent=1))


def predict(words: Sequence[str]) -> None:
    """Runs a config's harvesters over its prompts; the tables land in the run and, as one artifact, in its tracker."""
    with _finished(Request.of("predict", words), tracked=True) as session:
        _harvest(session)


def _harvest(session: "Session") -> None:
    from spd_lightning.harvest.module import Harvester
    from spd_lightning.training.tracking import publish

    harvesters = [c for c in session.trainer.callbacks if isinstance(c, Harvester)]  # pyright: ignore[reportAttributeAccessIssue]
    if not harvesters:
        raise BadInput("config: no harvester in trainer.callbacks; add class_path spd_lightning.PromptGraphs")
    with session.copies:
        session.copies.begin()
        session.trainer.predict(session.model, datamodule=session.datamodule, return_predictions=False)
    for harvester in harvesters:
        if session.trainer.is_global_zero:
            folder = session.plan.folder / "harvest" / harvester.name  # devices of their own processes know it alone
            print(f"harvest: {folder}    see it: python -m spd_lightning view")
    publish(session.copies, [f"harvest/{harvester.name}" for harvester in harvesters])


@contextmanager
def _finished(request: Request, tracked: bool) -> Iterator["Session"]:
    """Open a session on the run that a request means: its weights, the config's data and trainer."""
    config = request.config
    found = None if request.prints_only else request.finished_run()
    with loading.trainer():
        from spd_lightning.training.decompose import Decomposition
        from spd_lightning.training.session import Plan, Session

        def plan(settings: dict[str, Any]) -> Plan:
            assert found is not None  # printing settings ends before there is a plan
            return Plan(found.path, found.name, Decomposition.from_pretrained(found.path), tracked=tracked)

        yield Session(config, request.overrides, plan)


def push(words: Sequence[str]) -> None:
    """Sends a finished run, its harvests included, to the trackers that its config names: once more, or at last."""
    found = runs.find(usage.read("push", words).run)
    if found.state != "finished":
        raise BadInput(f"run '{found.name}': it is {found.state}; let its fit finish, which also sends it")
    if not (found.path / "config.yaml").exists():
        raise BadInput(f"run '{found.name}': it has no config.yaml, so it was not made by fit; 'runs' lists the runs")
    runs.check_whole(found.path)
    settings = found.checked_config()
    trainer = settings.get("trainer")
    # A pulled run may come from a stranger, so its config chooses no tracker here.
    chosen = trainer.get("logger") if isinstance(trainer, dict) and not found.pulled else None
    with loading.trainer():
        from spd_lightning.training.tracking import send

        send(chosen, found.path, settings)
    print(f"sent: {found.path}")


def describe(words: Sequence[str]) -> None:
    """Print all settings of the model, the data, the trainer, or of a public class."""
    with loading.trainer():
        from spd_lightning.training.parsing import settings_of

        print(settings_of(words[-1]), end="")
