"""The command line: finds the verb, and turns what went wrong into one line with exit code 2 (`--debug` shows where).

Short verbs are functions here; the others have modules of their own, which are imported when they are called. `usage`
reads the words of a verb. What a verb does not need it does not import, and torch is loaded after its words and its
run have been checked.
"""

import importlib
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence

from spd_lightning import catalogue, classes, results, runs, stopping, usage
from spd_lightning.errors import BadInput, nearest, without_passwords

log = logging.getLogger("spd_lightning")


def run(words: Sequence[str]) -> int:
    """Runs one verb and returns the exit code: 0, 2 where the input was bad, 130 after Ctrl-C, 143 after SIGTERM."""
    with stopping.listening():
        try:
            return _run(list(words))
        except stopping.Stopped as stopped:
            return stopping.report(stopped, _AGAIN if words[0] in _RESUMED else "")


_RESUMED, _AGAIN = ("fit", "predict"), "run the same command again to resume"


def _run(words: list[str]) -> int:
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _speak()
    try:
        words = _trusting(words)
        if (shown := usage.asked_for(words)) is not None:
            print(shown, end="")
            return 0
        verb = VERBS.get(words[0])
        if verb is None:
            raise BadInput(f"'{words[0]}': not a verb of spd_lightning; {nearest(words[0], VERBS)}")
        if usage.topic(words):
            verb = _elsewhere("spd_lightning.work", "describe")
        _call(verb, words[1:])
        sys.stdout.flush()
    except BadInput as error:
        if debug:
            raise
        print(f"error: {without_passwords(str(error))}", file=sys.stderr)
        return 2
    except SystemExit as done:
        if done.code:
            raise
        return 0  # --print_config has printed
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 0
        if debug:
            raise
        place = f"'{error.filename}': " if error.filename else ""
        print(f"error: {place}{error.strerror or error}; make room or choose another place (SPD_RUNS)", file=sys.stderr)
        return 2
    return 0


def _nobody_reads() -> bool:
    """Return whether stdout is a pipe whose reader has read enough; what else is printed is then dropped."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # it is no file
        return False
    pipe = select.poll()
    pipe.register(output, select.POLLOUT)
    closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed


def _call(verb: Callable[[Sequence[str]], None], words: list[str]) -> None:
    try:
        verb(words)
    except Exception:
        stopping.check()  # a library may have turned what a signal raised into an error of its own
        raise
    except KeyboardInterrupt as error:  # raised by a library, or where signals are not handled
        raise stopping.Stopped(signal.SIGINT) from error


def _trusting(words: list[str]) -> list[str]:
    """Apply every `--allow_classes PACKAGE`, and return the other words."""
    rest, packages = list[str](), list[str]()
    given = iter(words)
    for word in given:
        option, equals, value = word.partition("=")
        if option == "--allow_classes":
            packages.append(value if equals else next(given, ""))
        else:
            rest.append(word)
    classes.trust(packages)
    return rest


def _elsewhere(place: str, name: str) -> Callable[[Sequence[str]], None]:
    """Return a verb that is a function of another module, which is imported when it is called."""

    def verb(words: Sequence[str]) -> None:
        getattr(importlib.import_module(place), name)(words)

    return verb


def _speak() -> None:
    """What this tool has to say goes to the terminal as it is."""
    log.handlers = [logging.StreamHandler()]
    log.setLevel(logging.INFO)
    log.propagate = False


# ---- verbs of a few lines -------------------------------------------------------------------------------------------


def view(words: Sequence[str]) -> None:
    """Open the viewer, and a browser where there is a display."""
    asked = usage.read("view", words)
    from spd_lightning.viewer.app import launch

    launch(asked.path, asked.port, asked.host, open_browser=not asked.no_browser)


def list_runs(words: Sequence[str]) -> None:
    """Print the runs there are, as lines, as a table of results, or as JSON."""
    asked = usage.read("runs", words)
    found = runs.runs()
    if asked.json:
        facts = [
            {"name": r.name, "path": str(r.path), "state": r.state, "summary": r.summary, "problem": r.problem}
            for r in found
        ]
        print(json.dumps(facts, indent=1))
    elif not found:
        print(f"no runs in '{runs.root()}' yet; make one: python -m spd_lightning fit --config tms.yaml")
    elif asked.table:
        print(results.table([(r.name, r.summary) for r in reversed(found) if r.summary]))
    else:
        for r in found:
            problem = r.problem
            print(f"damaged      {r.path}  {problem}" if problem else _listed(r))


def _listed(run: runs.Run) -> str:
    """The line of one run."""
    return f"{run.state:<12} {run.path}  {run.summary.get('verdict', '')}"


def list_configs(words: Sequence[str]) -> None:
    """Print the configs there are, by what they are for, each with the first line of its header."""
    usage.read("list", words)
    print(catalogue.listing())


def pull(words: Sequence[str]) -> None:
    """Fetch a run from a tracker."""
    path = runs.pull(usage.read("pull", words).reference)
    print(f"run: {path}    see it: python -m spd_lightning view {path}")


VERBS = {
    "fit": _elsewhere("spd_lightning.work", "fit"),
    "plan": _elsewhere("spd_lightning.plan", "plan"),
    "sites": _elsewhere("spd_lightning.sites", "sites"),
    "validate": _elsewhere("spd_lightning.work", "validate"),
    "predict": _elsewhere("spd_lightning.work", "predict"),
    "intervene": _elsewhere("spd_lightning.intervene", "intervene"),
    "push": _elsewhere("spd_lightning.work", "push"),
    "view": view,
    "export": _elsewhere("spd_lightning.export", "export"),
    "edges": _elsewhere("spd_lightning.edges", "edges"),
    "weights": _elsewhere("spd_lightning.weights", "weights"),
    "runs": list_runs,
    "list": list_configs,
    "pull": pull,
}
