"""The house stands as planned: who may import whom, what costs nothing to import, how long a file
may get.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from beartype.roar import BeartypeCallHintViolation

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "spd_lightning").rglob("*.py"))


def test_import_contracts_hold():
    """The layers of pyproject.toml, as import-linter checks them."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("spd_lightning", {"torch", "lightning", "polars", "gradio", "mlflow"}),
        ("spd_lightning.cli", {"torch", "lightning", "polars", "gradio", "mlflow", "wandb"}),
        ("spd_lightning.runs", {"torch", "lightning", "mlflow", "wandb", "polars"}),
        ("spd_lightning.store", {"torch", "lightning", "gradio"}),
        (
            "spd_lightning.attribution.autograd",
            {"lightning", "polars", "matplotlib", "gradio", "mlflow"},
        ),
        ("app", {"torch", "lightning"}),
    ],
)
def test_importing_one_does_not_import(module, absent):
    """What a part does not need it does not load, however it is reached."""
    code = f"import sys, {module}; print(*({absent!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_help_needs_nothing_heavy():
    """`--help` answers before torch, Lightning or even the command line proper is imported."""
    code = "import sys; sys.argv = ['x', '--help']; import runpy; "
    code += "runpy.run_module('spd_lightning', run_name='__main__'); "
    code += (
        "print('HEAVY', *({'torch', 'lightning', 'yaml', 'spd_lightning.cli'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].strip() == "HEAVY"
    assert "fit" in done.stdout


FIRST_WORDS = {"What", "Of", "That", "Those", "Which"}
UNNATURAL = re.compile(
    r"where left out|\banew\b|foretold|foretell|"
    r"\b(?<!there )(?:is|are) no (?:site|node|number)s?\b|"
    r"fell silent"
)
"""Words that no one says: *if omitted*, *again*, *is not a site*, *predict* and *is ablated* are
the usual ones.
"""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_can_be_read_without_the_name_above_them(path):
    """They open with a verb or a noun, as tool-tips and documentation pages show them."""
    text = path.read_text(encoding="utf-8")
    assert not UNNATURAL.findall(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            opening = (ast.get_docstring(node) or "Fine").split()[:2]
            assert opening[0] not in FIRST_WORDS, opening
            assert opening != ["The", "same"], getattr(node, "lineno", 1)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    """No file above 500 lines, no function above 80, no drawer for odds and ends."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    assert path.stem not in {"utils", "helpers", "common", "base", "misc"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno < 80, node.name


# ---- checks while tests run ----------------------------------------------------------------------


def test_wrong_shapes_and_wrong_types_are_found():
    """Every other test relies on it: shapes must agree, and other annotations are checked too."""
    import torch
    from jaxtyping import TypeCheckError

    from spd_lightning.budgets import MAX_EDGES
    from spd_lightning.decomposition.divergences import kl_rows
    from spd_lightning.errors import nearest

    assert kl_rows(torch.zeros(2, 3), torch.zeros(2, 3)).shape == (2,)
    with pytest.raises(TypeCheckError):
        kl_rows(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(BeartypeCallHintViolation):
        nearest(MAX_EDGES, ["a name"])  # pyright: ignore[reportArgumentType]
