"""docs/method.md is the book of laws: numbered without gaps, and holding every law that code and
tests cite.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAWS = re.findall(
    r"^\*\*([A-Z]\d*)\*\*", (ROOT / "docs/method.md").read_text(encoding="utf-8"), re.MULTILINE
)
NAMED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def cited(source: str) -> set[str]:
    """The laws that a Python file names in its docstrings, or in names such as
    `test_d3_both_forms`.
    """
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, NAMED | ast.Module)]
    docstrings = [ast.get_docstring(node) or "" for node in nodes]
    names = [node.name.upper().replace("_", " ") for node in nodes if isinstance(node, NAMED)]
    return set(re.findall(r"\b[DGMLEA][1-9]\d?\b", "\n".join(docstrings + names)))


def test_laws_stand_once_and_in_order():
    chapters = {
        "D": range(1, 10),
        "G": range(1, 7),
        "M": [1],
        "L": range(1, 8),
        "E": [""],
        "A": range(1, 9),
    }
    assert [
        f"{chapter}{number}" for chapter, numbers in chapters.items() for number in numbers
    ] == LAWS


@pytest.mark.parametrize("folder", ["tests", "spd_lightning"])
def test_every_cited_law_exists(folder):
    files = list(ROOT.glob(f"{folder}/**/*.py"))
    unknown = {path.name: cited(path.read_text(encoding="utf-8")) - set(LAWS) for path in files}
    assert files
    assert {name: laws for name, laws in unknown.items() if laws} == {}


def test_a_citation_is_found_wherever_it_may_stand():
    module = '"""Checks X7 and {}."""'
    function = 'def f():\n    """Sums (see {})."""'
    name = "def test_{}_sums(): ..."
    law = "A6"
    missing = "D" + "10"
    for template in (module, function, name):
        assert cited(template.format(law)) == {"A6"}
        assert cited(template.format(missing.lower() if template is name else missing)) - set(
            LAWS
        ) == {missing}
    assert cited('"""L0 on an H100, E501."""') == set()
