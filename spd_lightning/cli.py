"""The verbs: fit, validate and predict by LightningCLI, and those that need no Trainer.

Each verb is a function of its words. Bad input becomes one line and exit code 2; `--debug` shows where it came from.
What a verb does not need it does not import.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning import config as configs
from spd_lightning import runs
from spd_lightning.errors import BadInput, nearest

if TYPE_CHECKING:
    from spd_lightning.training.decompose import Decomposition
    from spd_lightning.training.session import Session

log = logging.getLogger("spd_lightning")


def run(words: Sequence[str]) -> int:
    """Runs one verb and returns the exit code: 0, 2 where the input was bad, or 130 after Ctrl-C."""
    words = list(words)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _speak()
    try:
        verb = VERBS.get(words[0])
        if verb is None:
            raise BadInput(f"'{words[0]}': not a verb of spd_lightning; {nearest(words[0], VERBS)}")
        with _quiet(words[0]):
            verb(words[1:])
        sys.stdout.flush()
    except BadInput as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as done:
        if isinstance(done, SystemExit) and not done.code:  # --print_config has printed
            return 0
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)  # Lightning exits with 1
        return 130
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if debug:
            raise
        place = f"'{error.filename}': " if error.filename else ""
        print(f"error: {place}{error.strerror or error}; make room or choose another place (SPD_RUNS)", file=sys.stderr)
        return 2
    return 0


def _quiet(verb: str) -> AbstractContextManager[None]:
    """Lightning's verbs run without its advice; the others must not wait for its import."""
    if verb not in ("fit", "validate", "predict"):
        return nullcontext()
    from spd_lightning.training.session import quiet

    return quiet()


def _speak() -> None:
    """What this tool has to say goes to the terminal as it is."""
    log.handlers = [logging.StreamHandler()]
    log.setLevel(logging.INFO)
    log.propagate = False


# ---- fit, validate, predict -----------------------------------------------------------------------------------------


@dataclass
class Request:
    """What the words of fit, validate or predict ask for."""

    names: list[str] = field(default_factory=list)
    run: str | None = None
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, words: Sequence[str]) -> "Request":
        """Reads --config and --run; all else is for LightningCLI."""
        request, rest = cls(), list(words)
        while rest:
            option = rest.pop(0)
            word, _, value = option.partition("=")
            if word not in ("--config", "-c", "--run"):
                request.overrides.append(option)
                continue
            if not value and (not rest or rest[0].startswith("--")):
                raise BadInput(f"'{word}' needs a value; for example: {word} tms.yaml")
            value = value or rest.pop(0)
            if word == "--run":
                request.run = value
            else:
                request.names.append(value)
        if not request.names:
            raise BadInput("--config is missing; for example: --config tms.yaml ('list' shows the configs there are)")
        return request

    @property
    def name(self) -> str:
        """The run's name: as asked for, or the first config's."""
        return runs.check_name(self.run or Path(self.names[0]).name.removesuffix(".yaml"))

    @property
    def config(self) -> dict[str, Any]:
        """All configs, merged."""
        merged: dict[str, Any] = {}
        for name in self.names:
            merged = configs.merge(merged, configs.load(name))
        return merged


def fit(words: Sequence[str]) -> None:
    """Trains a target, or decomposes one: a run in the end, with its summary, figures and a copy in the tracker."""
    from spd_lightning.training.session import train_target

    request = Request.of(words)
    config = request.config
    if _trains_target(config):
        folder = train_target(request.names[0], config, request.overrides)
        print(f"target: {folder}")
        return
    _decompose(request, config)


def _trains_target(config: dict[str, Any]) -> bool:
    model = config.get("model")
    return isinstance(model, dict) and str(model.get("class_path")).endswith("TargetTraining")


def _decompose(request: Request, config: dict[str, Any]) -> None:
    from spd_lightning.training.checkpoint import Checkpoints
    from spd_lightning.training.figures import Figures
    from spd_lightning.training.session import Plan, Session

    started, claims = time.perf_counter(), []

    def plan(settings: dict[str, Any]) -> Plan:
        claim = runs.claim(request.name, settings)
        claims.append(claim)
        with runs.write_whole(claim.path / "config.yaml") as temporary:
            temporary.write_text(configs.dump(settings), encoding="utf-8")
        extra = [Checkpoints(claim.path), Figures(claim.path)]
        return Plan(claim.path, claim.run.name, callbacks=extra, tracked=True)

    try:
        session = Session(config, request.overrides, plan)
        _train(session)
        if session.trainer.is_global_zero:
            _finish(session, started)
            print(f"run: {session.plan.folder}    next: python -m spd_lightning predict --config {request.names[0]}")
    finally:
        for claim in claims:
            claim.abandon()


def _train(session: "Session") -> None:
    from spd_lightning.training.checkpoint import LAST
    from spd_lightning.training.tracking import answering, begin

    trainer, checkpoint = session.trainer, session.plan.folder / LAST
    begin(trainer, session.plan.folder, session.settings)
    with answering("once it answers, the same command goes on from the last checkpoint"):
        trainer.fit(session.model, datamodule=session.datamodule, ckpt_path=checkpoint if checkpoint.exists() else None)
        trainer.validate(session.model, datamodule=session.datamodule, verbose=False)
    session.model.adopt(trainer.callback_metrics)  # forked devices evaluate in processes of their own


def _finish(session: "Session", started: float) -> None:
    """Writes what the training came to, the summary last, and sends copies to the trackers."""
    from spd_lightning.training.checkpoint import save_decomposition
    from spd_lightning.training.tracking import answering, publish

    folder, module = session.plan.folder, session.model
    save_decomposition(module, folder)
    summary = _summary(session, time.perf_counter() - started)
    if module.warning:
        log.warning("run %s: ended in a local minimum; try another seed. %s", folder.name, module.warning)
    runs.write_json(folder / "summary.json", summary)
    print(_table([(folder.name, summary)]))
    with answering(f"the run itself is whole: '{folder}'"):
        publish(session.trainer, folder)


def _summary(session: "Session", seconds: float) -> dict[str, float | str]:
    """The flat map that a run is judged by: figures, seconds, steps, seed, versions."""
    from importlib.metadata import version

    module: Decomposition = session.model  # pyright: ignore[reportAssignmentType]
    trained = (module.target_spec or {}).get("seconds", 0.0)
    return {
        **module.figures,
        "verdict": _verdict(module),
        "seconds/target": round(trained, 2),
        "seconds/fit": round(seconds, 2),
        "steps": session.trainer.max_steps,
        "seed": module.seed,
        **{f"version/{name}": version(name) for name in ("spd_lightning", "torch", "lightning")},
    }


def _verdict(module: "Decomposition") -> str:
    if module.warning:
        return f"local minimum: {module.warning}"
    return "ok" if module.figures else "not evaluated"


def validate(words: Sequence[str]) -> None:
    """Evaluates a finished run again and prints its figures."""
    session = _finished(Request.of(words), tracked=False)
    session.trainer.validate(session.model, datamodule=session.datamodule, verbose=False)
    if session.trainer.is_global_zero:
        print(json.dumps(session.model.figures, indent=1))


def predict(words: Sequence[str]) -> None:
    """Runs a config's harvesters over its prompts; the tables land in the run and, as one artifact, in its tracker."""
    from spd_lightning.harvest.module import Harvester
    from spd_lightning.training.tracking import answering, begin, publish

    session = _finished(Request.of(words), tracked=True)
    harvesters = [c for c in session.trainer.callbacks if isinstance(c, Harvester)]  # pyright: ignore[reportAttributeAccessIssue]
    if not harvesters:
        raise BadInput("config: no harvester in trainer.callbacks; add class_path spd_lightning.PromptGraphs")
    begin(session.trainer, session.plan.folder)
    session.trainer.predict(session.model, datamodule=session.datamodule, return_predictions=False)
    for harvester in harvesters:
        if session.trainer.is_global_zero:
            print(f"harvest: {harvester.folder}    see it: python -m spd_lightning view")
    with answering("once it answers, the same command sends what is harvested already"):
        publish(session.trainer, session.plan.folder, [f"harvest/{harvester.name}" for harvester in harvesters])


def _finished(request: Request, tracked: bool) -> "Session":
    """A session on the run a request means: its weights, the config's data and trainer."""
    from spd_lightning.training.checkpoint import load_decomposition
    from spd_lightning.training.session import Plan, Session

    def plan(settings: dict[str, Any]) -> Plan:
        found = runs.find(request.run) if request.run else runs.newest(request.name)
        return Plan(found.path, found.name, load_decomposition(found.path), tracked=tracked)

    return Session(request.config, request.overrides, plan)


# ---- verbs that need no Trainer -------------------------------------------------------------------------------------


def view(words: Sequence[str]) -> None:
    """Opens the viewer."""
    words, port = [part for word in words for part in _parts(word, "--port")], None
    if "--port" in words:
        k = words.index("--port")
        port = _number(words[k + 1] if k + 1 < len(words) else "")
        del words[k : k + 2]
    paths = _checked("view", words, ("--port",), most=1)
    from spd_lightning.viewer.app import launch

    launch(paths[0] if paths else None, port)


def _parts(word: str, option: str) -> list[str]:
    """`--port=7860` as two words."""
    return word.split("=", 1) if word.startswith(f"{option}=") else [word]


def _number(word: str) -> int:
    if not word.isdigit():
        raise BadInput(f"--port '{word}': not a number; for example: --port 7860")
    return int(word)


def _checked(verb: str, words: Sequence[str], options: Sequence[str] = (), most: int = 0) -> list[str]:
    """The words of a verb that are no options; whatever it does not know is refused."""
    plain = [word for word in words if not word.startswith("-")]
    for word in words:
        if word.startswith("-") and word not in options:
            raise BadInput(f"{verb}: '{word}' is none of its options; {nearest(word, options)}")
    if len(plain) > most:
        raise BadInput(f"{verb}: '{plain[most]}' is one word too many; see: python -m spd_lightning --help")
    return plain


def list_runs(words: Sequence[str]) -> None:
    """The runs there are, as lines, as a table of results, or as JSON."""
    _checked("runs", words, ("--json", "--table"))
    found = runs.runs()
    if "--json" in words:
        facts = [{"name": r.name, "path": str(r.path), "state": r.state, "summary": r.summary} for r in found]
        print(json.dumps(facts, indent=1))
    elif not found:
        print(f"no runs in '{runs.root()}' yet; make one: python -m spd_lightning fit --config tms.yaml")
    elif "--table" in words:
        print(_table([(r.name, r.summary) for r in reversed(found) if r.summary]))
    else:
        for r in found:
            print(f"{r.state:<12} {r.path}  {r.summary.get('verdict', '')}")


def _table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Runs and what they reached, a line for each of their sites."""
    lines = [f"{'run':<18} {'site':<18} {'MMCS':>6} {'ML2R':>6} {'alive':>6} {'L0':>7} {'error':>6} {'seconds':>8}"]
    for name, summary in rows:
        sites = [key.removeprefix("alive/") for key in summary if key.startswith("alive/")]
        for site in sites:
            mmcs, ml2r, l0 = (summary.get(f"{key}/{site}") for key in ("mmcs", "ml2r", "l0"))
            error = summary.get(f"identity_error/{site}", summary.get(f"dense_error/{site}"))
            first = site == sites[0]
            seconds = f"{summary.get('seconds/fit', 0):.0f}" if first else ""
            lines.append(
                f"{name if first else '':<18} {site:<18} {_figure(mmcs)} {_figure(ml2r)} {summary[f'alive/{site}']:>6}"
                f" {'' if l0 is None else f'{l0:.2f}':>7} {'' if error is None else error:>6} {seconds:>8}"
            )
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return f"{'':>6}" if value is None else f"{value:>6.3f}"


def list_configs(words: Sequence[str]) -> None:
    """The configs there are, each with the first line of its header."""
    _checked("list", words)
    for path in sorted(configs.SHIPPED.rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"{path.relative_to(configs.SHIPPED)!s:<28} {first}")


def pull(words: Sequence[str]) -> None:
    """Fetches a run from a tracker."""
    references = _checked("pull", words, most=1)
    if not references:
        raise BadInput("pull: name a run, mlflow:<run> or wandb:<entity>/<project>/<artifact>:<version>")
    path = runs.pull(references[0])
    print(f"run: {path}    see it: python -m spd_lightning view {path}")


VERBS = {
    "fit": fit,
    "validate": validate,
    "predict": predict,
    "view": view,
    "runs": list_runs,
    "list": list_configs,
    "pull": pull,
}
