"""The wheel holds all that the tool needs, and works in an empty folder without a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from support.tiny_run import lay_out

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git knows, as from a fresh clone."""
    pytest.importorskip("setuptools")
    clone = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    made = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, made], cwd=clone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (found,) = made.glob("*.whl")
    return found


def test_the_wheel_holds_every_file_of_the_package_and_every_config(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    own = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "spd_lightning").rglob("*")
        if path.is_file()
    }
    own |= {
        f"spd_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")
    }
    own = {name for name in own if "__pycache__" not in name}
    assert own == {name for name in files if ".dist-info/" not in name}
    assert {
        "spd_lightning/py.typed",
        "spd_lightning/configs/targets/tms_5-2.yaml",
        "spd_lightning/viewer/graph.js",
    } <= own


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """The folder in which the installed command runs."""
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def spd(wheel, empty, tmp_path_factory):
    """The installed command, in an environment that holds the wheel and sees the packages that it
    needs.
    """
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "env", with_pip=False)
    python = place / "env/bin/python"
    paths = {"base": str(place / "env"), "platbase": str(place / "env")}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    zipfile.ZipFile(wheel).extractall(site)
    (site / "needed.pth").write_text(
        sysconfig.get_path("purelib")
    )  # the path alone: its own .pth files are not read
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"SPD_RUNS": str(empty / "runs"), "OMP_NUM_THREADS": "1"}

    def command(*words: str) -> str:
        done = subprocess.run(
            [python, "-m", "spd_lightning", *words],
            cwd=empty,
            env=clean,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return command


def test_the_first_commands_work_in_an_empty_folder(spd, empty):
    """As after `pip install`: its configs are found, a fit leaves a run, and a harvest its
    tables.
    """
    assert "tms.yaml" in spd("list")
    assert "linear1" in spd("plan", "--config", "tms.yaml", "--device", "laptop")
    lay_out(empty, steps=5, batch=160)
    assert "run: " in spd("fit", "--config", "tiny.yaml")
    assert "harvest: " in spd("predict", "--config", "tiny.yaml")
    assert (empty / "runs/tiny/harvest/graphs-unmasked/manifest.json").exists()
    assert not (empty / "configs").exists()
