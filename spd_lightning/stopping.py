"""Signals that end a command: SIGTERM, SIGINT (Ctrl-C) and SIGHUP stop every verb with one line and
code 128 + number.

1. Most work is stopped at once: the handler raises `Stopped` wherever the process is. Files appear
   whole or not at all, so that nothing half-made is left behind.
2. A training is stopped between two blocks of steps, after a checkpoint: between `hold` and
   `release` a signal is only noted. A second signal, two seconds later or more, does not wait for
   that.
3. A signal that the parent process ignores (`nohup`, a shell's background job) is ignored here too.
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
"""Seconds within which signals count as one: a terminal sends Ctrl-C to all processes, and parents
pass it on.
"""


class Stopped(SystemExit):
    """A signal ends this process; as a SystemExit it ends forked ones, too, without a traceback.

    Args:
        number: the signal.

    Attributes:
        place: where the work stood, as a part of the line that is printed; empty if that says
            nothing.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = signal.Signals(number)
        self.place = ""


_received: signal.Signals | None = None
_since = 0.0  # when it was received
_held = False  # whether the first signal is only noted
_ours: tuple[
    signal.Signals, ...
] = ()  # the signals that are handled here, while `listening` is open


def _handle(number: int, frame: FrameType | None) -> None:
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
    """While open, signals are handled as described above.

    Inside another one, and in other threads than the main one, it changes nothing.
    """
    global _received, _held, _ours
    if _ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _received, _held = None, False
    _ours = tuple(number for number, handler in before.items() if handler is not signal.SIG_IGN)
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
    """Takes the signals back from a library that has put handlers of its own in the place of
    ours.
    """
    for number in _ours:
        signal.signal(number, _handle)


def requested() -> bool:
    """Whether a signal has been received."""
    return _received is not None


def hold() -> None:
    """From now on a signal is only noted, until `release`."""
    global _held
    _held = True


def release() -> None:
    """Signals stop the process at once again.

    Raises:
        Stopped: one was received in the meantime.
    """
    global _held
    _held = False
    check()


def let_go() -> None:
    """Ends `hold` without looking whether a signal was received, for work that is ending anyway."""
    global _held
    _held = False


def check() -> None:
    """Raises Stopped if a signal was received."""
    if _received is not None:
        raise Stopped(_received)


def stop() -> NoReturn:
    """Ends this process for the signal that it, or another one of the same command, has received.

    Raises:
        Stopped: always.
    """
    raise Stopped(_received or signal.SIGTERM)


def report(stopped: Stopped, remedy: str = "") -> int:
    """Prints the line on a stopped command, from the first of its processes, and returns its exit
    code.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        parts = (f"Stopped by {stopped.number.name}", stopped.place)
        line = " ".join(filter(None, parts))
        print("; ".join(filter(None, (line, remedy))) + ".", file=sys.stderr)
    return 128 + stopped.number
