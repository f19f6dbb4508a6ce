"""Load torch and Lightning: set the environment, announce long loading, silence known warnings.

Verbs check their input before they open `trainer`, so that a typo is reported without waiting for
seconds of imports.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LONG = 1.5
"""Seconds of loading after which a line is printed."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def share_processors() -> None:
    """Let torch's threads sleep while they wait for each other; call this before loading torch.

    By default, OpenMP's threads spin while they wait. If other processes are busy, spinning can
    keep the awaited thread from running, and a training step takes 5 to 20 times as long. Settings
    that the user has made are kept.
    """
    if any(name in os.environ for name in _WAITING):
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for GNU OpenMP, in torch's wheels
    os.environ["KMP_BLOCKTIME"] = "0"  # for Intel OpenMP, in conda's builds


@contextmanager
def announced(what: str = "torch") -> Iterator[None]:
    """Print "loading torch ..." to standard error if loading takes long and it is a terminal."""

    def announce() -> None:
        print(f"loading {what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(LONG, announce)
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def trainer() -> Iterator[None]:
    """Load torch and Lightning, and silence their advice on settings that this package makes."""
    share_processors()
    with announced():
        from spd_lightning.training.session import quiet

    with quiet():
        yield
