"""Loading torch and Lightning: what must be set before, what is printed meanwhile, and which advice
is kept quiet.

Verbs check their input first and open `trainer` after, so that a typo never waits for seconds of
imports.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LONG = 1.5
"""Seconds of loading after which a line says so."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def share_processors() -> None:
    """Let torch's threads sleep while they wait for each other; to be called before torch is
    loaded.

    OpenMP's threads spin by default. Where other processes are busy, the thread that is waited for
    may not be running, and spinning keeps it from running: a training step then takes 5 to 20 times
    as long. A user's own choice is kept.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # GNU OpenMP, which torch's own wheels hold
        os.environ["KMP_BLOCKTIME"] = "0"  # Intel's, which conda's builds hold


@contextmanager
def announced(what: str = "torch") -> Iterator[None]:
    """Print "loading torch ..." to a terminal's standard error once loading takes long."""

    def tell() -> None:
        print(f"loading {what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(LONG, tell)
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def trainer() -> Iterator[None]:
    """Load torch and Lightning; while open, libraries' advice on settings that are ours is kept
    from the user.
    """
    share_processors()
    with announced():
        from spd_lightning.training.session import quiet

    with quiet():
        yield
