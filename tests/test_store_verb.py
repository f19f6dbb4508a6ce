"""The verb `store`: what it prints, and the one line after bad input."""

import errno
import json
import os
from pathlib import Path

import pytest
from test_store_scale import SETTINGS, harvest

from spd_lightning import cli
from spd_lightning.store import SCHEMA_VERSION, Store, Writer


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder of runs with one run, which has two harvests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    run = tmp_path / "runs/mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    harvest(run / "harvest/graphs", [2] * 4, most=200)
    harvest(run / "harvest/nodes", [1])
    return run / "harvest"


def said(capsys, *words: str) -> str:
    """Run the verb, which succeeds, and return what it prints."""
    capsys.readouterr()
    assert cli.run(["store", *words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words: str) -> str:
    """Run the verb, which fails with one line and exit code 2, and return the line."""
    capsys.readouterr()
    assert cli.run(["store", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_info_adds_up_the_files_on_disk(here, capsys):
    out = said(capsys, "info", "mine/graphs")
    assert "complete" in out
    assert "8 prompts in 4 groups" in out
    facts = json.loads(said(capsys, "info", "mine/graphs", "--json"))
    files = list((here / "graphs").glob("*/*"))
    assert facts["files"] == len(files)
    assert facts["bytes"] == sum(path.stat().st_size for path in files)
    edges = facts["tables"]["edges"]
    assert edges["rows"] == Store(here / "graphs").scan("edges").collect().height
    assert f"{edges['bytes'] / edges['rows']:.2f} bytes per edge" in out


def test_a_harvest_is_named_by_run_or_by_folder(here, capsys, monkeypatch):
    by_name = said(capsys, "info", "mine/graphs")
    assert said(capsys, "info", str(here / "graphs")) == by_name
    monkeypatch.chdir(here.parent)
    assert "complete" in said(capsys, "info", "harvest/nodes")


def test_verify_reads_every_file(here, capsys):
    out = said(capsys, "verify", "mine/graphs")
    count = len(list((here / "graphs").glob("*/*")))
    assert f"{count} of {count} files are intact" in out


def test_compact_merges_and_says_so(here, capsys):
    assert "4 groups" in said(capsys, "compact", "mine/graphs")
    assert Store(here / "graphs").manifest["shards"] == 1
    assert "as large as they get" in said(capsys, "compact", "mine/graphs")
    assert "intact" in said(capsys, "verify", "mine/graphs")


def test_a_harvest_in_progress_answers_and_says_so(here, capsys):
    writer = Writer(here / "new", SETTINGS)
    assert "in progress" in said(capsys, "info", "mine/new")
    assert "in progress" in said(capsys, "verify", "mine/new")
    assert "another process is writing it" in refused(capsys, "compact", "mine/new")
    writer.close()
    assert "run the same predict command again" in said(capsys, "info", "mine/new")


@pytest.mark.parametrize("action", ["info", "verify", "compact"])
def test_an_unknown_harvest(here, capsys, action):
    assert "did you mean 'mine/graphs'?" in refused(capsys, action, "mine/graph")
    assert "choose from: mine/graphs, mine/nodes" in refused(capsys, action, "mine")
    assert "choose from" in refused(capsys, action, "zzz")


def test_an_unknown_action(here, capsys):
    line = refused(capsys, "verfy", "mine/graphs")
    assert "ACTION 'verfy': unknown value; did you mean 'verify'?" in line
    assert "HARVEST is missing" in refused(capsys, "verify")


@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("folder", ["edges", "index"])
def test_damaged_files_are_named_and_the_rest_is_shown(here, capsys, harm, folder):
    (path,) = (here / "graphs" / folder).glob("part-0-1.*")
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(content[:-5])
    else:
        path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    line = refused(capsys, "verify", "mine/graphs")
    assert f"{folder}/{path.name}" in line
    assert "1 of" in line
    assert "to repair" in line
    assert f"{folder}/{path.name}" in refused(capsys, "compact", "mine/graphs")
    assert "8 prompts" in said(capsys, "info", "mine/graphs")
    writer = Writer(here / "graphs", SETTINGS)  # the remedy: these prompts are harvested again
    assert len(writer.finished) == 6


@pytest.mark.parametrize(("step", "remedy"), [(1, "update spd_lightning"), (-1, "is older")])
@pytest.mark.parametrize("action", ["info", "verify", "compact"])
def test_another_schema(here, capsys, action, step, remedy):
    path = here / "graphs/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["schema_version"] = SCHEMA_VERSION + step
    path.write_text(json.dumps(manifest))
    assert remedy in refused(capsys, action, "mine/graphs")


def test_no_space_left(here, capsys, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        line = refused(capsys, "compact", "mine/graphs")
    assert "No space left on device" in line
    assert "make room" in line
    assert "4 groups" in said(capsys, "info", "mine/graphs")


def test_many_small_files_are_merged_before_an_upload(here, caplog):
    """Trackers are slow with many files; harvests of few groups, or in progress, stay."""
    from spd_lightning.tracking.publishing import MANY_GROUPS, compact_harvests

    harvest(here / "many", [1] * (MANY_GROUPS + 1))
    harvest(here / "written", [1] * (MANY_GROUPS + 1))
    writer = Writer(here / "written", SETTINGS)
    compact_harvests(here.parent)
    groups = {path.name: Store(path).manifest["shards"] for path in here.iterdir()}
    assert groups == {"graphs": 4, "nodes": 1, "many": 1, "written": MANY_GROUPS + 1}
    assert not list((here / "many").glob("*/part-*"))
    writer.close()
