"""Paths as users write them: ~ is the home folder, and `package:` leads into an installed package.

    ~/texts/novel.txt                     a path
    package:bible/data/kjv.jsonl          the file data/kjv.jsonl of the installed package `bible`

Packages are only searched for files. None is imported, so none of their code runs.
"""

from importlib.machinery import PathFinder
from pathlib import Path

from spd_lightning.errors import BadInput, shown

PACKAGE = "package:"


def expanded(reference: str) -> Path:
    """Return the path that a reference means, whether or not it exists.

    Raises:
        BadInput: the reference leads into a package that is not installed, or out of it.

    Examples:
        >>> expanded("package:yaml/__init__.py").is_file()
        True
    """
    if not reference.startswith(PACKAGE):
        return Path(reference).expanduser()
    name, _, inside = reference.removeprefix(PACKAGE).partition("/")
    parts = Path(inside).parts
    if not name.isidentifier() or not parts or ".." in parts or Path(inside).is_absolute():
        raise BadInput(
            f"'{shown(reference)}': not a file of a package; give package:NAME/FILE, for example "
            "package:bible/data/kjv.jsonl"
        )
    found = PathFinder.find_spec(name)
    if found is None:
        raise BadInput(
            f"'{shown(reference)}': the package '{name}' is not installed; install it with pip "
            "(its files are enough: pip install --no-deps)"
        )
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    candidates = [folder / inside for folder in folders]
    for path in candidates:
        if path.exists():
            return path
    raise BadInput(
        f"'{shown(reference)}': the installed package '{name}' has no such file; see what it "
        f"contains: python -m pip show --files {name}"
    )
