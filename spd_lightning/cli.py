"""The command line: find the verb, call it, and report bad input in one line with exit code 2.

With `--debug`, the traceback is printed instead of the line. Each verb is a module of `commands`
that is imported when it is called, and `commands.options` parses its words. A verb imports only
what it needs, and loads torch after its arguments and its run have been checked.
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
    """Run one verb, and return the exit code.

    It is 0, or 2 after bad input, 130 after Ctrl-C, or 143 after SIGTERM.
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
    _print_log()
    try:
        words = _trust_packages(words)
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
        if sys.stdout is not None:  # None if the terminal was closed before the start
            sys.stdout.flush()
    except BadInput as error:
        if debug:
            raise
        print(f"error: {without_passwords(str(error))}", file=sys.stderr)
        return 2
    except SystemExit as done:
        if done.code:
            raise
        return 0  # --print_config exits this way
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return 0
        if debug:
            raise
        place = f"'{shown(str(error.filename))}': " if error.filename else ""
        reason = error.strerror or error
        print(f"error: {place}{reason}; {_remedy(error)}", file=sys.stderr)
        return 2
    return 0


def _check_folder() -> None:
    """Check that the current folder still exists; without it, torch would abort the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise BadInput(
            "the current folder was deleted; change to another one (cd) and try again"
        ) from error


def _remedy(error: OSError) -> str:
    """Return the remedy for an error of the file system."""
    if error.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if error.errno == errno.EINVAL:
        return "choose another name"
    return "make room or choose another place (SPD_RUNS)"


def _reader_has_left() -> bool:
    """Return whether stdout is a pipe that its reader has closed; if so, discard further output."""
    try:
        output = sys.stdout.fileno()
    except (OSError, AttributeError):  # not a file, or closed before the start
        return False
    pipe = select.poll()
    pipe.register(output, select.POLLOUT)
    closing = select.POLLERR | select.POLLHUP
    closed = any(event & closing for _, event in pipe.poll(0))
    if closed:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, output)
    return closed


def _call(place: str, argv: list[str]) -> None:
    """Import a module of `commands` and run its verb. place: module, or module:function."""
    name, _, function = place.partition(":")
    try:
        module = importlib.import_module(f"spd_lightning.commands.{name}")
        getattr(module, function or "main")(argv)
    except Exception:
        stopping.check()  # a library can turn the `Stopped` of a signal into another error
        raise
    except KeyboardInterrupt as error:  # raised by a library, or if signals are not handled
        raise stopping.Stopped(signal.SIGINT) from error


def _trust_packages(words: list[str]) -> list[str]:
    """Apply every `--allow_classes PACKAGE`, and return the other words."""
    rest = list[str]()
    packages = list[str]()
    remaining = iter(words)
    for word in remaining:
        option, equals, value = word.partition("=")
        if option != "--allow_classes":
            rest.append(word)
        elif equals:
            packages.append(value)
        else:
            packages.append(next(remaining, ""))
    classes.trust(packages)
    return rest


class Messages(logging.StreamHandler):
    """Prints log messages to standard error, on separate lines even during a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _print_log() -> None:
    """Print log messages to the terminal without a prefix."""
    log.handlers = [Messages()]
    log.setLevel(logging.INFO)
    log.propagate = False
