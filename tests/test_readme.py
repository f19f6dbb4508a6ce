"""The README and the pages of docs/ are true: the map equals the tree, files and commands exist."""

import re
import subprocess
from pathlib import Path

import pytest

from spd_lightning.commands.verbs import VERBS
from spd_lightning.config import SHIPPED

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MAP = ROOT / "docs" / "map.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    """Return the text of a page."""
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


def tracked() -> set[str]:
    """Return the files of the repository."""
    command = ["git", "ls-files", "--cached"]
    listed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    return {name for name in listed if name and (ROOT / name).exists()}


def mapped() -> list[str]:
    """Return the paths that the map names; those of folders end in a slash."""
    block = re.search(r"```text\n(.*?)```", text_of(MAP), re.DOTALL)
    assert block, "docs/map.md has no map"
    paths = []
    folders = []
    for line in block[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    return paths


def test_map_equals_the_tree():
    """Every file has a line or is in a folder whose line covers it; nothing else is named."""
    paths = mapped()
    files = tracked()
    assert len(paths) == len(set(paths))
    for path in paths:
        assert any(
            file.startswith(path) if path.endswith("/") else file == path for file in files
        ), path
    whole = {
        p for p in paths if p.endswith("/") and not any(q != p and q.startswith(p) for q in paths)
    }
    named = {p for p in paths if not p.endswith("/")}
    missing = {f for f in files if f not in named and not any(f.startswith(p) for p in whole)}
    assert not {f for f in missing if not Path(f).name.startswith(("__init__", "."))}, missing


@every_page
def test_links_and_pictures_exist(page):
    """Every relative link of a page leads to a file, and to a heading if it names one."""
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text_of(page)):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@every_page
def test_commands_are_commands(page):
    """Every verb, config and make target that a page shows exists."""
    text = text_of(page)
    for verb in re.findall(r"python -m spd_lightning (\w+)", text):
        assert verb in VERBS, verb
    for name in re.findall(r"--config (\S+?\.yaml)", text):
        assert (SHIPPED / name).exists(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for goal in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE):
        assert f"\n{goal}:" in makefile, goal


def test_the_readme_is_short_and_starts_with_commands():
    """The README has at most 200 lines, and both first commands within 20."""
    lines = text_of(README).splitlines()
    assert len(lines) <= 200
    top = "\n".join(lines[:20])
    assert "make demo" in top
    assert "pip install" in top


def test_results_in_the_readme_are_those_of_their_page():
    """The README repeats the rows of the TMS table in docs/results.md."""
    rows = re.findall(r"^\| tms_.*$", text_of(README), re.MULTILINE)
    results = text_of(ROOT / "docs" / "results.md").splitlines()
    assert rows
    assert not set(rows) - set(results)
