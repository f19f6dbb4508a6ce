"""The examples in docstrings run, and every public object has one."""

import ast
import doctest
import importlib
from functools import partial
from pathlib import Path

import pytest

import spd_lightning

ROOT = Path(spd_lightning.__file__).parent
PUBLIC = spd_lightning.__all__
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST


def modules_with_examples() -> list[str]:
    """Return the modules with examples in docstrings other than those of public objects."""
    modules = []
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if ">>>" not in text:
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, documented) or getattr(node, "name", "") in PUBLIC:
                continue
            if ">>>" in (ast.get_docstring(node) or ""):
                name = path.relative_to(ROOT.parent).with_suffix("")
                modules.append(".".join(name.parts))
                break
    return modules


def run_example(example: doctest.DocTest) -> None:
    """Run the lines of an example, each with the output that its docstring promises."""
    report = list[str]()
    runner = doctest.DocTestRunner(verbose=False, optionflags=OPTIONS)
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.fixture
def quiet_folder(tmp_path, monkeypatch):
    """Run in an empty folder, on the CPU, without the progress that trainers print."""
    import lightning

    trainer = partial(
        lightning.Trainer,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    monkeypatch.setattr(lightning, "Trainer", trainer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))


@pytest.mark.usefixtures("quiet_folder")
@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_object_has_an_example_that_runs(name):
    from spd_lightning.training.session import quiet

    docstring = getattr(spd_lightning, name).__doc__
    parser = doctest.DocTestParser()
    # Without any names to start from: an example imports all that it needs.
    example = parser.get_doctest(docstring, {}, name, None, None)
    assert example.examples
    with quiet():  # Lightning's advice, which the commands hide too
        run_example(example)


@pytest.mark.usefixtures("quiet_folder")
@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_other_functions_run(name):
    module = importlib.import_module(name)
    found = doctest.DocTestFinder().find(module)
    examples = [test for test in found if test.examples and test.name.split(".")[-1] not in PUBLIC]
    assert examples
    for example in examples:
        run_example(example)
