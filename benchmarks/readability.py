"""Measures of how easy the code is to read: `python benchmarks/readability.py [FOLDER …]`.

- Nodes per line: the number of syntax nodes per body line of a function; the median over functions.
  Python's markers for reading and writing a name are not counted.
- Long: the number of lines of more than 100 characters.
- Guesses: calls of `getattr` and `hasattr` with a literal name, which a protocol could replace.
- Suppressed: comments that silence the type checker.
- Largest package: its share of the lines of all packages.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 100


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def density(function: ast.FunctionDef | ast.AsyncFunctionDef) -> float | None:
    """Return the expressions and statements per line of a function; None if its body is empty."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return None
    nodes = sum(
        isinstance(node, ast.expr | ast.stmt) for statement in body for node in ast.walk(statement)
    )
    lines = {
        line
        for statement in body
        for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
    }
    return nodes / len(lines)


def guesses(tree: ast.AST) -> int:
    """Count the calls of getattr and hasattr with a literal name."""
    return sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and isinstance(node.args[1], ast.Constant)
        for node in ast.walk(tree)
    )


def report(folder: Path) -> str:
    """Return the line of the table for a folder."""
    densities, totals = list[float](), Counter[str]()
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        found = (density(function) for function in functions(tree))
        densities += [value for value in found if value is not None]
        lines = text.splitlines()
        totals["lines"] += len(lines)
        totals["long"] += sum(len(line) > LONGEST for line in lines)
        totals["guesses"] += guesses(tree)
        totals["suppressed"] += len(re.findall(r"# (?:pyright|type): ?ignore", text))
    name = str(folder.relative_to(ROOT))
    return (
        f"{name:<28} {totals['lines']:>7} {median(densities or [0]):>11.1f} {totals['long']:>6} "
        f"{totals['guesses']:>8} {totals['suppressed']:>11}"
    )


def largest_package() -> str:
    """Return a line with the largest package, and its share of the lines of all packages."""
    sizes = {
        package.name: sum(len(path.read_text().splitlines()) for path in package.rglob("*.py"))
        for package in (ROOT / "spd_lightning").iterdir()
        if (package / "__init__.py").exists()
    }
    name = max(sizes, key=lambda package: sizes[package])
    return f"largest package: {name}, {100 * sizes[name] / sum(sizes.values()):.1f} % of the lines"


if __name__ == "__main__":
    packages = [
        p for p in sorted((ROOT / "spd_lightning").iterdir()) if (p / "__init__.py").exists()
    ]
    given = [Path(name).resolve() for name in sys.argv[1:]]
    folders = given or [ROOT / "spd_lightning", *packages]
    columns = f"{'nodes/line':>11} {'long':>6} {'guesses':>8} {'suppressed':>11}"
    print(f"{'folder':<28} {'lines':>7} {columns}")
    print(*map(report, folders), largest_package(), sep="\n")
