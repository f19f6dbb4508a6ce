"""The command line: finds the verb, and turns what went wrong into one line with exit code 2 (`--debug` shows where).

Verbs that need no network are functions here, but for `edges` and `export`; those that do are in `work`, `plan`,
`intervene` and `weights`. Whatever is elsewhere is imported when it is called. What a verb does not need it does not
import.
"""

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence

from spd_lightning import catalogue, results, runs
from spd_lightning.errors import BadInput, Options, nearest

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


def _with_trainer(place: str, name: str) -> Callable[[Sequence[str]], None]:
    """A verb in another module, which the others need not wait for; Lightning's advice is kept from the user."""

    def verb(words: Sequence[str]) -> None:
        from spd_lightning.training.session import quiet

        with quiet():
            getattr(importlib.import_module(place), name)(words)

    return verb


def _speak() -> None:
    """What this tool has to say goes to the terminal as it is."""
    log.handlers = [logging.StreamHandler()]
    log.setLevel(logging.INFO)
    log.propagate = False


# ---- verbs that need no Trainer -------------------------------------------------------------------------------------


def view(words: Sequence[str]) -> None:
    """Opens the viewer, and a browser where there is a display."""
    options = Options("view", "for example: view runs --port 7860 --host 127.0.0.1 --no-browser")
    options.add_argument("path", nargs="?")
    options.add_argument("--port")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--no-browser", action="store_true")
    asked = options.parse_args(list(words))
    port = None if asked.port is None else _number(asked.port)
    from spd_lightning.viewer.app import launch

    launch(asked.path, port, asked.host, open_browser=not asked.no_browser)


def _number(word: str) -> int:
    if not (word.isascii() and word.isdecimal()):
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


def export(words: Sequence[str]) -> None:
    """Writes one prompt's graph for other tools."""
    importlib.import_module("spd_lightning.export").export(words)


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
        print(results.table([(r.name, r.summary) for r in reversed(found) if r.summary]))
    else:
        for r in found:
            print(f"{r.state:<12} {r.path}  {r.summary.get('verdict', '')}")


def list_configs(words: Sequence[str]) -> None:
    """The configs there are, by what they are for, each with the first line of its header."""
    _checked("list", words)
    print(catalogue.listing())


def edges(words: Sequence[str]) -> None:
    """What drives a component over a corpus, and what it drives."""
    importlib.import_module("spd_lightning.edges").edges(words)


def pull(words: Sequence[str]) -> None:
    """Fetches a run from a tracker."""
    references = _checked("pull", words, most=1)
    if not references:
        raise BadInput("pull: name a run, mlflow:<run> or wandb:<entity>/<project>/<artifact>:<version>")
    path = runs.pull(references[0])
    print(f"run: {path}    see it: python -m spd_lightning view {path}")


VERBS = {
    "fit": _with_trainer("spd_lightning.work", "fit"),
    "plan": _with_trainer("spd_lightning.plan", "plan"),
    "validate": _with_trainer("spd_lightning.work", "validate"),
    "predict": _with_trainer("spd_lightning.work", "predict"),
    "intervene": _with_trainer("spd_lightning.intervene", "intervene"),
    "push": _with_trainer("spd_lightning.work", "push"),
    "view": view,
    "export": export,
    "edges": edges,
    "weights": _with_trainer("spd_lightning.weights", "weights"),
    "runs": list_runs,
    "list": list_configs,
    "pull": pull,
}
