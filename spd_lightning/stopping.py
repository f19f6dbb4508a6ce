"""Stop a command after SIGTERM, SIGINT (Ctrl-C) or SIGHUP, with one line and code 128 + number.

1. Most work stops at once: the handler raises `Stopped`, wherever the process is. Files appear
   whole or not at all, so no incomplete file is left behind.
2. A training stops between two blocks of steps, after a checkpoint: between `hold` and `release`, a
   signal is only noted. A second signal, at least two seconds later, stops the process at once.
3. A signal that the process inherits as ignored (`nohup`, a shell's background job) stays ignored.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PATIENCE = 2.0
"""Seconds within which signals count as one.

A terminal sends Ctrl-C to all processes of a command, and parent processes pass it on.
"""


class Stopped(SystemExit):
    """A signal stops this process. Being a SystemExit, it also ends forks without a traceback.

    Args:
        number: the signal.

    Attributes:
        place: how far the work was, as a part of the line that is printed; can be empty.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = signal.Signals(number)
        self.place = ""


_received: signal.Signals | None = None
_since = 0.0
"""The time at which the signal was received."""
_held = False
"""Whether the first signal is only noted."""
_ours: tuple[signal.Signals, ...] = ()
"""The signals that this module handles, while `listening` is open."""


def _handle(number: int, frame: FrameType | None) -> None:
    """Note a signal, and raise Stopped unless it is held back or counts as the previous one."""
    global _received, _since
    now = time.monotonic()
    first = _received is None
    if not first and now - _since < _PATIENCE:
        return
    _received = signal.Signals(number)
    _since = now
    if not (_held and first):
        raise Stopped(number)


@contextmanager
def listening() -> Iterator[None]:
    """Handle signals as described above, until the context is closed.

    This has no effect inside another `listening`, or outside the main thread.
    """
    global _received, _held, _ours
    if _ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ignored = [number for number in SIGNALS if before[number] is signal.SIG_IGN]
    _received = None
    _held = False
    _ours = tuple(number for number in SIGNALS if number not in ignored)
    take_back()
    try:
        yield
    finally:
        for number in _ours:
            handler = before[number]
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _received = None
        _held = False
        _ours = ()


def take_back() -> None:
    """Install the handlers again after a library has replaced them."""
    for number in _ours:
        signal.signal(number, _handle)


def requested() -> bool:
    """Return whether a signal has been received."""
    return _received is not None


def hold() -> None:
    """Only note signals from now on, until `release`."""
    global _held
    _held = True


def release() -> None:
    """Let signals stop the process at once again.

    Raises:
        Stopped: a signal was received in the meantime.
    """
    global _held
    _held = False
    check()


def let_go() -> None:
    """End `hold` without raising Stopped for a noted signal, since the work is ending anyway."""
    global _held
    _held = False


def check() -> None:
    """Raise Stopped if a signal was received."""
    if _received is not None:
        raise Stopped(_received)


def stop() -> NoReturn:
    """Stop because of the signal that this or another process of the command has received.

    Raises:
        Stopped: always.
    """
    number = _received or signal.SIGTERM
    raise Stopped(number)


def report(stopped: Stopped, remedy: str = "") -> int:
    """Print the line about a stopped command, in its first process only, and return the exit code.

    Args:
        stopped: the exception.
        remedy: the end of the line: what to do; can be empty.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        line = f"Stopped by {stopped.number.name}"
        if stopped.place:
            line += f" {stopped.place}"
        if remedy:
            line += f"; {remedy}"
        print(f"{line}.", file=sys.stderr)
    return 128 + stopped.number
