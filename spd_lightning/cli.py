"""The command line: finds the verb, and turns bad input into one line with exit code 2 (`--debug`
shows where).

Each verb is a module of `commands`, imported when it is called. `commands.options` reads its words.
A verb imports only what it needs, and loads torch after its words and its run have been checked.
"""

import errno
import importlib
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence

from spd_lightning import classes, stopping
from spd_lightning.commands import options
from spd_lightning.commands.verbs import VERBS
from spd_lightning.errors import BadInput, nearest, shown, without_passwords

log = logging.getLogger("spd_lightning")


def run(words: Sequence[str]) -> int:
    """Runs one verb and returns the exit code: 0, 2 where the input was bad, 130 after Ctrl-C, 143
    after SIGTERM.
    """
    with stopping.listening():
        try:
            return _run(list(words))
        except stopping.Stopped as stopped:
            return stopping.report(stopped, _AGAIN if words[0] in _RESUMED else "")


_RESUMED = ("fit", "predict")
_AGAIN = "run the same command again to resume"


def _run(words: list[str]) -> int:
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _speak()
    try:
        words = _trusting(words)
        if (page := options.asked_for(words)) is not None:
            print(page, end="")
            return 0
        verb = VERBS.get(words[0])
        if verb is None:
            raise BadInput(
                f"'{shown(words[0])}': not a verb of spd_lightning; {nearest(words[0], VERBS)}"
            )
        _check_folder()
        _call("settings" if options.topic(words) else verb.module or verb.name, words[1:])
        if sys.stdout is not None:  # it is None if the terminal was closed before the start
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
        place = f"'{shown(str(error.filename))}': " if error.filename else ""
        print(f"error: {place}{error.strerror or error}; {_remedy(error)}", file=sys.stderr)
        return 2
    return 0


def _check_folder() -> None:
    """Check that the current folder still exists; torch would end the process without it."""
    try:
        os.getcwd()
    except OSError as error:
        raise BadInput(
            "the current folder was deleted; change to another one (cd) and try again"
        ) from error


def _remedy(error: OSError) -> str:
    """Return what to do about an error of the file system."""
    if error.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    return "make room or choose another place (SPD_RUNS)"


def _nobody_reads() -> bool:
    """Return whether stdout is a pipe whose reader has read enough; what else is printed is then
    dropped.
    """
    try:
        output = sys.stdout.fileno()
    except (OSError, AttributeError):  # it is not a file, or was closed before the start
        return False
    pipe = select.poll()
    pipe.register(output, select.POLLOUT)
    closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed


def _call(module: str, argv: list[str]) -> None:
    """Import a module of `commands` and run its verb."""
    try:
        importlib.import_module(f"spd_lightning.commands.{module}").main(argv)
    except Exception:
        stopping.check()  # a library may have turned what a signal raised into an error of its own
        raise
    except KeyboardInterrupt as error:  # raised by a library, or where signals are not handled
        raise stopping.Stopped(signal.SIGINT) from error


def _trusting(words: list[str]) -> list[str]:
    """Apply every `--allow_classes PACKAGE`, and return the other words."""
    rest = list[str]()
    packages = list[str]()
    given = iter(words)
    for word in given:
        option, equals, value = word.partition("=")
        if option == "--allow_classes":
            packages.append(value if equals else next(given, ""))
        else:
            rest.append(word)
    classes.trust(packages)
    return rest


class Messages(logging.StreamHandler):
    """Prints messages to standard error, on lines of their own even while a progress bar is
    drawn.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _speak() -> None:
    """Print log messages to the terminal as they are."""
    log.handlers = [Messages()]
    log.setLevel(logging.INFO)
    log.propagate = False
