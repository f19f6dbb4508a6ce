"""The README is true: its map is the tree, its files exist, its commands are commands."""

import re
import subprocess
from pathlib import Path

from spd_lightning.commands.verbs import VERBS
from spd_lightning.config import SHIPPED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked() -> set[str]:
    """Every file of the repository that git knows, and those about to be added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    return {name for name in listed if name and (ROOT / name).exists()}


def mapped() -> list[str]:
    """The paths that the map names, folders with a slash at their end."""
    block = re.search(r"## Map.*?```text\n(.*?)```", README, re.DOTALL)
    assert block, "the README has no map"
    paths = []
    folders = []
    for line in block[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    return paths


def test_map_equals_the_tree():
    """Every source file has its line, or lies in a folder whose line speaks for it; and nothing
    else is named.
    """
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


def test_links_and_pictures_exist():
    """Every relative link leads somewhere."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_commands_are_commands():
    """Every verb, config and make target that the README shows is one."""
    for verb in re.findall(r"python -m spd_lightning (\w+)", README):
        assert verb in VERBS, verb
    for name in re.findall(r"--config (\S+?\.yaml)", README):
        assert (SHIPPED / name).exists(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for goal in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{goal}:" in makefile, goal
