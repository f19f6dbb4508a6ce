"""The documentation site builds without warnings, and its notebook runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from support.tiny_run import lay_out, one_figure

from spd_lightning import cli
from spd_lightning.training import figures

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "one_component.ipynb"


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*predict returned None")
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Every cell, in order, on a run that took a second."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_RUNS", str(lay_out(tmp_path, steps=200, batch=160)))
    monkeypatch.setattr(figures, "draw", one_figure)
    assert cli.run(["fit", "--config", "tiny.yaml"]) == 0
    assert cli.run(["predict", "--config", "tiny.yaml"]) == 0
    capsys.readouterr()
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "outputs are not committed: they would get old"
        source = "".join(cell["source"]).replace('RUN = "tms"', 'RUN = "tiny"')
        exec(source, names)
    said = capsys.readouterr().out
    assert "-> feature" in said
    assert "linear1" in said
    ablated: Any = names["ablated"]
    assert (ablated.edited != ablated.base).any()
    figure: Any = names["figure"]
    assert len(figure.axes[0].lines) == len(names["edges"]) + 1  # every edge, and the nodes


def test_the_site_builds_without_warnings(tmp_path):
    """Strict mode: links to missing pages and objects are errors."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    (tmp_path / "spd_lightning").symlink_to(ROOT / "spd_lightning")
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "spd_lightning.harvest.graphs.PromptGraphs" in page
