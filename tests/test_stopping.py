"""Signals end a process with one line and the code 128 + number; work that holds them ends where it
can be resumed.
"""

import os
import signal
import subprocess
import sys
import threading

import pytest

from spd_lightning import stopping

HERE = os.getpid()


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_stops_at_once(number):
    with stopping.listening(), pytest.raises(stopping.Stopped) as caught:
        os.kill(HERE, number)
    assert caught.value.code == 128 + number


def test_a_held_signal_stops_when_released():
    with stopping.listening():
        stopping.hold()
        os.kill(HERE, signal.SIGTERM)
        os.kill(HERE, signal.SIGTERM)  # counts as the same one
        assert stopping.requested()
        with pytest.raises(stopping.Stopped):
            stopping.release()


def test_a_second_signal_does_not_wait(monkeypatch):
    monkeypatch.setattr(stopping, "_PATIENCE", 0.0)
    with stopping.listening():
        stopping.hold()
        os.kill(HERE, signal.SIGINT)
        with pytest.raises(stopping.Stopped):
            os.kill(HERE, signal.SIGINT)


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.listening(), stopping.listening():
            os.kill(HERE, signal.SIGHUP)
            assert not stopping.requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_signals_alone():
    def work() -> None:
        with stopping.listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_line(capsys, monkeypatch):
    stopped = stopping.Stopped(signal.SIGTERM)
    stopped.place = "at step 1200"
    assert stopping.report(stopped, "run the same command again to resume") == 143
    assert (
        capsys.readouterr().err
        == "Stopped by SIGTERM at step 1200; run the same command again to resume.\n"
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert stopping.report(stopped) == 143
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_modules_are_imported(number):
    """A command that has hardly begun ends with the line, not with a traceback."""
    script = (
        "import os, sys\n"
        "from spd_lightning import __main__\n"
        f"sys.modules['spd_lightning.cli'] = type(sys)('half')\n"
        "sys.modules['spd_lightning.cli'].run = lambda words: os.kill(os.getpid(), "
        f"{int(number)})\n"
        "sys.argv = ['spd', 'runs']\n"
        "__main__.main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 128 + number
    assert ended.stderr == f"Stopped by {number.name}.\n"
