"""Files appear whole, their names reach the disk, and what killed processes left is removed."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from spd_lightning import files


def test_content_is_synced_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    """The order that survives a loss of power: content, rename, folder."""
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(handle):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "content"
        done.append(kind)
        sync(handle)

    def rename(source, target):
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    with files.whole(tmp_path / "a.json") as temporary:
        temporary.write_text("{}")
    assert done == ["content", "rename", "folder"]


def test_two_threads_write_the_same_file(tmp_path):
    """Both hold a name to write to at the same time; the file is what the last one wrote."""
    path = tmp_path / "a.json"
    with files.whole(path) as outer:
        with files.whole(path) as inner:
            outer.write_text("outer")
            inner.write_text("inner")
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    assert [left.name for left in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def left(folder: Path, name: str, age: float = 0.0) -> Path:
    path = folder / name
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_only_what_dead_processes_left_is_swept(tmp_path, dead):
    mine = files.mark()
    day = 24 * 3600
    gone = mine.replace(f".{os.getpid()}.", f".{dead}.")
    foreign = f".00000000.{dead}.new"
    swept = [left(tmp_path, f".a{gone}"), left(tmp_path, f".b{foreign}", 2 * day)]
    kept = [
        left(tmp_path, f".a{mine}"),
        left(tmp_path, f".c{foreign}"),
        left(tmp_path, ".stranger.new"),
        left(tmp_path, "a.json"),
    ]
    (tmp_path / f".pull.x{gone}").mkdir()
    files.sweep(tmp_path)
    assert not any(path.exists() for path in swept)
    assert all(path.exists() for path in kept)
    assert not (tmp_path / f".pull.x{gone}").exists()
