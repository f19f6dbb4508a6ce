"""Copies of a run in its trackers, made by background threads.

The run's metrics.jsonl is the source of truth. Training never logs to a tracker. Instead, a thread
per tracker reads new lines of the file and sends them, so a slow, locked or unreachable tracker
does not slow down training. Whatever could not be sent is sent by a later try: a few seconds later,
at the end of the command, or by `push`.

    1. connect:  reach the tracker, before anything is built. A tracker that can never work ends
                 the command.
    2. begin:    open the record and send the settings. From now on metrics are sent as they are
                 logged. Errors no longer end the command; each is logged once.
    3. complete: send the remaining metrics and the files, and close the record.

While a tracker may lack a part of the run, the run's folder contains `uncopied.json` with the
addresses of such trackers.
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
from spd_lightning.errors import BadInput, command
from spd_lightning.tracking.trackers import SPEED, Row, Tracker

log = logging.getLogger(__name__)

AT_ONCE = 5.0  # seconds that a command waits for a tracker before training starts
POLL = 2.0  # seconds between two reads of the metrics file
RETRY, RARELY = 10.0, 300.0  # initial and maximum seconds between two tries after a failure
PATIENCE = 30.0  # maximum seconds of one request at the end


# ---- new metrics ---------------------------------------------------------------------------------


class Tail:
    """Reads the new lines of a metrics file.

    A training that resumes truncates the file to its checkpoint and writes the same lines again.
    Until the file has reached its old length, nothing is new. If the last line read has changed by
    then, reading starts again from the top.

    Args:
        path: the file, which need not exist yet.
        start: position to start from, in bytes.
    """

    def __init__(self, path: Path, start: int = 0):
        self.path = path
        self.position = start
        self._last = b""  # the last line read

    def rows(self) -> list[Row]:
        """Return the new complete lines as rows; damaged lines are skipped."""
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self.position:
                    return []
                file.seek(self.position - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self.position = 0
                file.seek(self.position)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        complete = [line for line in lines if line.endswith(b"\n")]
        self.position += sum(map(len, complete))
        if complete:
            self._last = complete[-1]
        rows = map(_row, complete)
        return [row for row in rows if row]


def _row(line: bytes) -> Row | None:
    """Parse a line of a metrics file; return None if it is damaged."""
    try:
        values = dict(json.loads(line))
        return int(values.pop("step")), values
    except (ValueError, TypeError, KeyError):
        return None


# ---- copies --------------------------------------------------------------------------------------


class Copy:
    """A tracker's copy of a run, and the thread that makes it.

    Args:
        tracker: the tracker.
        needed: whether making the copy is the only purpose of the command.

    Attributes:
        error: why the last try failed; None if it succeeded.
        whole: whether everything was sent and the record is closed.
    """

    def __init__(self, tracker: Tracker, needed: bool = False):
        self.tracker = tracker
        self.error: BadInput | None = None
        self.whole = False
        self._needed = needed
        self._connected = False
        self._begun = False
        self._may_raise = True  # until `begin` returns; later errors are logged
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
        """Start the thread, which connects to the tracker.

        The library is imported before that. Lightning can fork processes for further devices, and
        an import that is under way in another thread never ends in a fork.

        Raises:
            BadInput: the tracker can never work.
        """
        try:
            importlib.import_module(self.tracker.library)
        except ImportError as error:
            raise self.tracker.trouble(error) from error
        self._thread.start()
        self._wait_for_try()

    def begin(self, settings: Mapping[str, Any] | None) -> None:
        """Let the thread open the record and send what has been logged.

        Args:
            settings: the hyperparameters of the record; None if it already has them.

        Raises:
            BadInput: the tracker can never work.
        """
        self._raise_if_hopeless()  # the thread can have failed since `connect` returned
        self._settings = settings
        has_failed = self.error is not None  # then waiting is useless
        self._tried.clear()
        self._go.set()
        self._wake.set()
        if self._needed or not has_failed:
            self._wait_for_try()
        with self._lock:
            self._raise_if_hopeless()
            self._may_raise = False

    def _wait_for_try(self) -> None:
        """Wait until the thread has tried once, but not for long."""
        timeout = PATIENCE if self._needed else AT_ONCE
        self._tried.wait(timeout)
        self._raise_if_hopeless()

    def _raise_if_hopeless(self) -> None:
        """Raise the last error, unless training can go ahead and a later try can succeed."""
        error = self.error
        can_succeed_later = isinstance(error, runs.NoAnswer) and not self._needed
        if error and not can_succeed_later:
            raise error

    def end(self, names: Sequence[str], status: str, patience: float) -> None:
        """Let the thread send the rest, and wait until it is done or takes too long."""
        self._names = names
        self._status = status
        self._deadline = time.monotonic() + patience
        self._end.set()
        self._wake.set()
        while self._thread.is_alive():
            if time.monotonic() >= self._deadline:
                break
            self._thread.join(0.05)
        if self._thread.is_alive():
            self.error = runs.NoAnswer(f"tracker '{self.tracker.address}': it takes too long")

    def _allow(self, size: int) -> None:
        """Extend the deadline by the time that an upload of `size` bytes can take."""
        ending = self._end.is_set()
        if ending and self._status == "success":
            seconds = PATIENCE + size / SPEED
            self._deadline = time.monotonic() + seconds

    def _work(self) -> None:
        """Try to bring the copy up to date, again and again, until the command ends."""
        pause = POLL
        next_pause = RETRY
        while True:
            self._wake.clear()
            ending = self._end.is_set()
            going = self._go.is_set()
            try:
                self._try(ending, going)
            except Exception as error:
                self._note(self.tracker.trouble(error))
                pause = next_pause
                next_pause = min(2 * next_pause, RARELY)
            else:
                self.error = None
                pause = POLL
                next_pause = RETRY
            self._tried.set()
            if ending:
                return
            self._wake.wait(pause if going else None)

    def _try(self, ending: bool, going: bool) -> None:
        """Bring the copy up to date once.

        Args:
            ending: whether to complete the copy and close the record.
            going: whether the record can be opened; if not, only connect.
        """
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
        if tail is None or ending:  # read the whole file at the end, and after a failure
            tail = Tail(tracker.folder / "metrics.jsonl", tracker.start())
        self._tail = None
        rows = tail.rows()
        tracker.metrics(rows, tail.position)
        self._tail = tail
        if ending:
            tracker.files(self._names)
            tracker.close(self._status)
            self.whole = True

    def _note(self, error: BadInput) -> None:
        """Store an error, and log it if it is new and `begin` does not raise it."""
        no_answer = isinstance(error, runs.NoAnswer)
        with self._lock:
            before = self.error
            self.error = error
            raised = self._needed or (self._may_raise and not no_answer)
        if raised or self._end.is_set():
            return
        if no_answer:
            if before is None:
                log.warning(
                    "%s. The work continues without it; the missing data is sent later.", error
                )
        elif before is None or isinstance(before, runs.NoAnswer):
            again = command(f"push {self.tracker.folder.name}")
            log.warning("%s. The work continues without it; send the copy later: %s", error, again)


class Copies:
    """All copies of a run. Used as a context, it closes them as failed if an error is raised.

    Args:
        trackers: the trackers.
        folder: the run's folder.
        needed: whether making the copies is the only purpose of the command.
    """

    def __init__(self, trackers: Sequence[Tracker], folder: Path, needed: bool = False):
        self._copies = [Copy(tracker, needed) for tracker in trackers]
        self.folder = folder

    def __len__(self) -> int:
        return len(self._copies)

    def connect(self) -> None:
        """Connect to the trackers; those that do not answer are tried again later.

        Raises:
            BadInput: a tracker can never work.
        """
        for copy in self._copies:
            copy.connect()

    def begin(self, settings: Mapping[str, Any] | None = None) -> None:
        """Open the records, and mark them as incomplete.

        Args:
            settings: the hyperparameters of the records; None if they already have them.

        Raises:
            BadInput: a tracker can never work.
        """
        if settings and self._copies:
            addresses = [copy.tracker.address for copy in self._copies]
            runs.write_json(self.folder / runs.UNCOPIED, {"trackers": addresses})
        for copy in self._copies:
            copy.begin(settings)

    def complete(self, names: Sequence[str] = runs.MIRRORED) -> list[BadInput]:
        """Send what the trackers still lack, and close the records.

        Args:
            names: files and folders of the run to send; all that trackers get if omitted.

        Returns:
            The errors of the copies that are still incomplete.
        """
        for copy in self._copies:
            copy.end(names, "success", PATIENCE)
        failed = [copy for copy in self._copies if not copy.whole]
        path = self.folder / runs.UNCOPIED
        if path.exists() and names is runs.MIRRORED:
            if failed:
                addresses = [copy.tracker.address for copy in failed]
                runs.write_json(path, {"trackers": addresses})
            else:
                path.unlink()
        return [copy.error for copy in failed if copy.error]

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def abandon(self) -> None:
        """Close the records as failed, if that takes no more than a moment."""
        for copy in self._copies:
            copy.end((), "failed", 2.0)
