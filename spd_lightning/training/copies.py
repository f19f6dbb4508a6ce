"""Copies of a run in its trackers, made by threads that no training waits for.

The run's own metrics.jsonl is the truth. A copy is never logged to by the training: its thread
reads what the file has gained and sends it, so that a tracker that is slow, locked, or gone costs a
training nothing. What could not be sent is sent by the next try, which is a few seconds later, or
by the end of the command, or by `push`.

    1. connect:  reach the tracker, before anything is built. One that can never work ends
                 the command.
    2. begin:    open the record and send the settings. From here on metrics are sent as they
                 come, and no error ends the command: it is logged once.
    3. complete: send the rest of the metrics and the files, and close the record.

A run of which a tracker may not have everything holds `uncopied.json`, with the addresses of such
trackers.
"""

import importlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_lightning import runs
from spd_lightning.errors import BadInput
from spd_lightning.training.trackers import SPEED, Row, Tracker

log = logging.getLogger(__name__)

AT_ONCE = 5.0  # seconds that a command waits for a tracker before the training begins without it
POLL = 2.0  # seconds between two looks at the metrics file
RETRY, RARELY = 10.0, 300.0  # seconds between two tries after a failure: at first, and at most
PATIENCE = 30.0  # seconds that one request may take at the end


# ---- what there is to send -----------------------------------------------------------------------


class Tail:
    """Reads what a metrics file has gained since the last look.

    A training that resumes cuts the file back to its checkpoint and writes the same lines again.
    Until the file has its length again there is nothing new. If the last line read is then another,
    reading begins again at the top.

    Args:
        path: the file, which need not exist yet.
        start: where to begin, in bytes.
    """

    def __init__(self, path: Path, start: int = 0):
        self.path, self.position, self._last = path, start, b""

    def rows(self) -> list[Row]:
        """Return the whole lines that were added, as rows; a torn line is passed over."""
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self.position:
                    return []
                file.seek(self.position - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self.position = 0
                file.seek(self.position)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        whole = [line for line in lines if line.endswith(b"\n")]
        self.position += sum(map(len, whole))
        if whole:
            self._last = whole[-1]
        return [row for row in map(_row, whole) if row]


def _row(line: bytes) -> Row | None:
    try:
        values = dict(json.loads(line))
        return int(values.pop("step")), values
    except (ValueError, TypeError, KeyError):
        return None


# ---- copies --------------------------------------------------------------------------------------


class Copy:
    """A tracker's copy of a run, and the thread that makes it.

    Args:
        tracker: where it goes.
        needed: whether the command has nothing else to do than to make it.

    Attributes:
        error: why the last try failed; None if it did not.
        whole: whether all was sent and the record is closed.
    """

    def __init__(self, tracker: Tracker, needed: bool = False):
        self.tracker, self._needed = tracker, needed
        self.error: BadInput | None = None
        self.whole = False
        self._connected = self._begun = False
        self._may_raise = True  # until `begin` returns; errors that come later are logged
        self._lock = threading.Lock()  # around `error` and `_may_raise`
        self._settings: Mapping[str, Any] | None = None
        self._names: Sequence[str] = ()
        self._status = "success"
        self._deadline = float("inf")
        self._go = threading.Event()
        self._end = threading.Event()
        self._wake = threading.Event()
        self._tried = threading.Event()  # set after every try, successful or not
        self._tail: Tail | None = None
        tracker.allow = self._allow
        self._thread = threading.Thread(target=self._work, daemon=True)

    def connect(self) -> None:
        """Start the thread; it connects.

        The library is imported first: devices may be forked off, and an import that another thread
        had begun would never end in a fork.

        Raises:
            BadInput: the tracker can never work.
        """
        try:
            importlib.import_module(self.tracker.library)
        except ImportError as error:
            raise self.tracker.trouble(error) from error
        self._thread.start()
        self._wait_at_once()

    def begin(self, settings: Mapping[str, Any] | None) -> None:
        """Let it open the record and send what there is.

        Raises:
            BadInput: the tracker can never work.
        """
        self._raise_if_hopeless()  # it may have failed since `connect` returned
        self._settings = settings
        known = self.error is not None  # then there is nothing to wait for
        self._tried.clear()
        self._go.set()
        self._wake.set()
        if self._needed or not known:
            self._wait_at_once()
        with self._lock:
            self._raise_if_hopeless()
            self._may_raise = False

    def _wait_at_once(self) -> None:
        self._tried.wait(PATIENCE if self._needed else AT_ONCE)
        self._raise_if_hopeless()

    def _raise_if_hopeless(self) -> None:
        if self.error and (self._needed or not isinstance(self.error, runs.NoAnswer)):
            raise self.error

    def end(self, names: Sequence[str], status: str, patience: float) -> None:
        """Let it send the rest, and wait until it has, or until it takes too long."""
        self._names, self._status = names, status
        self._deadline = time.monotonic() + patience
        self._end.set()
        self._wake.set()
        while self._thread.is_alive() and time.monotonic() < self._deadline:
            self._thread.join(0.05)
        if self._thread.is_alive():
            self.error = runs.NoAnswer(f"tracker '{self.tracker.address}': it takes too long")

    def _allow(self, size: int) -> None:
        """Something begins that may take long: how many bytes are to be sent."""
        if self._end.is_set() and self._status == "success":
            self._deadline = time.monotonic() + PATIENCE + size / SPEED

    def _work(self) -> None:
        pause, next_pause = POLL, RETRY
        while True:
            self._wake.clear()
            ending = self._end.is_set()
            going = self._go.is_set()
            try:
                self._try(ending, going)
            except Exception as error:
                self._failed(self.tracker.trouble(error))
                pause = next_pause
                next_pause = min(2 * next_pause, RARELY)
            else:
                self.error, pause, next_pause = None, POLL, RETRY
            self._tried.set()
            if ending:
                return
            self._wake.wait(pause if going else None)

    def _try(self, ending: bool, going: bool) -> None:
        tracker = self.tracker
        if not self._connected:
            tracker.connect()
            self._connected = True
        if not going:
            return
        if not self._begun:
            tracker.begin(self._settings)
            self._begun = True
        tail = self._tail
        if tail is None or ending:  # at the end, and after a failure, all is looked at again
            tail = Tail(tracker.folder / "metrics.jsonl", tracker.start())
        self._tail = None
        rows = tail.rows()
        tracker.metrics(rows, tail.position)
        self._tail = tail
        if ending:
            tracker.files(self._names)
            tracker.close(self._status)
            self.whole = True

    def _failed(self, error: BadInput) -> None:
        """Note an error, and log it if it is news and `begin` does not raise it."""
        with self._lock:
            before, self.error = self.error, error
            raised = self._needed or (self._may_raise and not isinstance(error, runs.NoAnswer))
        if raised or self._end.is_set():
            return
        if isinstance(error, runs.NoAnswer):
            if before is None:
                log.warning(
                    "%s. The work continues without it; what it misses is sent later.", error
                )
        elif before is None or isinstance(before, runs.NoAnswer):
            again = f"python -m spd_lightning push {self.tracker.folder.name}"
            log.warning("%s. The work continues without it; send the copy later: %s", error, again)


class Copies:
    """All copies of a run; a context, in which an error closes them as failed.

    Args:
        trackers: where they go.
        folder: the run's folder.
        needed: whether the command has nothing else to do than to make them.
    """

    def __init__(self, trackers: Sequence[Tracker], folder: Path, needed: bool = False):
        self._copies = [Copy(tracker, needed) for tracker in trackers]
        self.folder = folder

    def __len__(self) -> int:
        return len(self._copies)

    def connect(self) -> None:
        """Reach the trackers; one that does not answer is tried again later.

        Raises:
            BadInput: one can never work.
        """
        for copy in self._copies:
            copy.connect()

    def begin(self, settings: Mapping[str, Any] | None = None) -> None:
        """Open the records, and note that what is there is not the whole run.

        Args:
            settings: what becomes the run's hyperparameters; None if it has them already.

        Raises:
            BadInput: a tracker can never work.
        """
        if settings and self._copies:
            addresses = [copy.tracker.address for copy in self._copies]
            runs.write_json(self.folder / runs.UNCOPIED, {"trackers": addresses})
        for copy in self._copies:
            copy.begin(settings)

    def complete(self, names: Sequence[str] = runs.MIRRORED) -> list[BadInput]:
        """Send what the trackers miss of a run, and close the records.

        Args:
            names: files and folders of the run; all that trackers get, if omitted.

        Returns:
            Why some of them do not have it.
        """
        for copy in self._copies:
            copy.end(names, "success", PATIENCE)
        failed = [copy for copy in self._copies if not copy.whole]
        path = self.folder / runs.UNCOPIED
        if path.exists() and names is runs.MIRRORED:
            if failed:
                runs.write_json(path, {"trackers": [copy.tracker.address for copy in failed]})
            else:
                path.unlink()
        return [copy.error for copy in failed if copy.error]

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def abandon(self) -> None:
        """Close the records as failed, as far as that can be done in a moment."""
        for copy in self._copies:
            copy.end((), "failed", 2.0)
