"""On a terminal that takes ASCII or Latin-1 only, everything is printed, with stand-ins."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from spd_lightning import cli, terminal

ROOT = Path(__file__).resolve().parent.parent
ASCII = {"PYTHONIOENCODING": "ascii"}
C_LOCALE = {
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
}  # Python's own remedies switched off
LATIN = {"PYTHONIOENCODING": "latin-1"}


def printed(text: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What arrives where `text` is printed to a stream in this encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", io.StringIO())  # a stream that cannot be set up is left alone
        terminal.fit_streams()
    stream.write(text)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "in_ascii", "in_latin"),
    [
        ("a → b … 3 ± 1", "a -> b ... 3 +- 1", "a -> b ... 3 ± 1"),
        ("│é─ü│", "|e-u|", "|é-ü|"),
        ("☃ 👩 x²", "\\u2603 \\U0001f469 x2", "\\u2603 \\U0001f469 x²"),
        ("\udcff", "\\udcff", "\\udcff"),  # a byte of an argument that was not UTF-8
    ],
)
def test_stand_ins(text, in_ascii, in_latin, monkeypatch):
    assert printed(text, "ascii", monkeypatch) == in_ascii
    assert printed(text, "latin-1", monkeypatch) == in_latin
    if text.isprintable():
        assert printed(text, "utf-8", monkeypatch) == text


@pytest.mark.parametrize("environment", [ASCII, C_LOCALE, LATIN], ids=["ascii", "C", "latin-1"])
@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["list"], 0), (["runs", "--table"], 0), (["schnee-☃"], 2)],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_quick_verbs_print_in_ascii(environment, words, code, tmp_path):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))
    }
    settings = {"SPD_RUNS": str(tmp_path), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "spd_lightning", *words]
    ended = subprocess.run(command, env=inherited | settings, capture_output=True, check=False)
    said = (ended.stdout + ended.stderr).decode("latin-1")
    assert ended.returncode == code, said
    assert "Traceback" not in said
    assert environment is LATIN or said.isascii()


def test_errors_and_progress_bars_print_in_ascii(monkeypatch, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setenv("SPD_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "stderr", stream)
    terminal.fit_streams()
    assert cli.run(["view", "--schnee→☃"]) == 2
    bar = tqdm(desc="fit schnee→☃", total=10)
    bar.update(5)
    bar.close()
    stream.flush()
    said = stream.buffer.getvalue().decode("ascii")  # pyright: ignore[reportAttributeAccessIssue]
    assert "'--schnee->\\u2603'" in said
    assert "fit schnee->\\u2603:  50%|" in said
