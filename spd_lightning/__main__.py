"""`python -m spd_lightning`: print help at once, and pass everything else to `cli`."""

import sys
from pathlib import Path

NEEDED = (3, 11)
DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Names for pip of the packages whose import name differs."""


def main() -> None:
    """Run one verb, and exit with 0, or with 2 if the input or the installation is wrong."""
    if sys.version_info < NEEDED:
        found = ".".join(map(str, sys.version_info[:2]))
        sys.exit(_unusable(f"this is Python {found}, and spd_lightning needs 3.11 or newer"))
    find_package()
    from spd_lightning import stopping
    from spd_lightning.commands import options
    from spd_lightning.terminal import fit_streams

    fit_streams()
    words = sys.argv[1:]
    if (page := options.asked_for(words)) is not None:
        try:
            print(page, end="", flush=True)
        except OSError as error:
            sys.stdout = None  # otherwise Python fails again when it flushes the output at exit
            if not isinstance(error, BrokenPipeError):
                print(f"error: {error.strerror}; make room for the output", file=sys.stderr)
                sys.exit(2)
        return
    with stopping.listening():  # importing takes long enough for a signal to arrive
        try:
            code = _run(words)
        except stopping.Stopped as stopped:
            code = stopping.report(stopped)
    sys.exit(code)


def find_package() -> None:
    """Find the package even in the folder that contains the checkout.

    The checkout has the name of the package, so Python takes the checkout for it, and the folder
    `runs` in it for our module `runs`.
    """
    package = sys.modules.get("spd_lightning")
    if package is None or package.__file__ is not None:
        return
    for name in list(sys.modules):
        if name.partition(".")[0] == "spd_lightning" and name != "spd_lightning.__main__":
            del sys.modules[name]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def _run(words: list[str]) -> int:
    try:
        from spd_lightning.cli import run

        return run(words)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if "--debug" in words or package == "spd_lightning":
            raise
        package = DISTRIBUTIONS.get(package, package)
        return _unusable(f"package '{package}' is not installed for {sys.executable}")


def _unusable(why: str) -> int:
    """Print why nothing can be run, and what to do."""
    remedy = (
        "activate the environment that contains it (make install, then: source .venv/bin/activate)"
    )
    print(f"error: {why}; {remedy}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
