"""Settings of all tests, and what no test may leave behind for the next.

No deadline for one example: the first one pays for what is loaded and compiled. One thread a
process, those that tests start included: there are as many test processes as cores, and small
matrices only wait for one another.
"""

import os
import signal
import sys
from collections import Counter

import pytest
from hypothesis import settings
from support.shape_checks import check_shapes_where_there_are_some

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, which is later
# A background job of a script starts with Ctrl-C ignored, and one under `nohup` with hang-ups
# ignored.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
check_shapes_where_there_are_some()
settings.register_profile("spd_lightning", deadline=None)
settings.load_profile("spd_lightning")


@pytest.fixture(autouse=True)
def _whole_numbers():
    """A training that a test kills on purpose cannot put back the processor's treatment of tiny
    numbers.
    """
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


# ---- make test-fast ------------------------------------------------------------------------------

SLOW = {
    "a browser, Gradio, or many requests": ("api", "gate", "token_page", "viewer"),
    "killed processes": ("copies", "damaged_files", "resume", "stopping", "store", "tracking"),
    "commands": ("cli", "docs", "examples", "hostile_artifact", "runs", "sites", "story", "wheel"),
    "HuggingFace": ("huggingface", "gguf", "models_as_they_are", "native_decoder"),
    "trainings": ("checkpoint", "circuits", "collapse_monitor", "diverged", "evaluation"),
    "trainings of targets": ("induction", "pretraining"),
    "harvests": ("export", "frozen_harvests", "intervention", "nodes", "text_harvests"),
    "statistics": ("attribute", "queries", "statistics"),
    "large stores": ("store_compaction", "store_remote", "store_scale", "store_verb"),
    "graphs of language models": ("influence",),
    "plots": ("figures",),
    "dry runs": ("harvest_memory", "sizing"),
}
"""Test files that `make test-fast` leaves out, by what they need."""

SLOW_TESTS = (
    "test_importing_one_does_not_import",  # processes of their own
    "test_l3_two_devices_give_what_one_gives",
    "test_runs_of_the_wrong_kind_are_rejected_without_torch",
    "test_wrong_shapes_and_wrong_types_are_found",  # `make test-fast` does not check them
)
"""Single tests that `make test-fast` leaves out."""

CASES = 2
"""The number of cases of each parametrized test of a slow chapter that `make test-fast` runs."""

SAMPLED = (
    "attribution",
    "bounded",
    "closed_form",
    "components",
    "dataset_edges",
    "head_edges",
    "losses",
    "masks",
)
"""Test files of which `make test-fast` runs only some cases."""


def files(*names: str) -> set[str]:
    """Return the file names of chapters of the tests."""
    return {f"test_{name}.py" for name in names}


SLOW_FILES = files(*(name for names in SLOW.values() for name in names))
SAMPLED_FILES = files(*SAMPLED)


def pytest_ignore_collect(collection_path, config):
    """Do not even import files that are left out; some take seconds to import."""
    if config.option.markexpr == "not slow" and collection_path.name in SLOW_FILES:
        return True
    return None


LONGEST = ("copies", "cli", "sizing", "closed_form", "circuits", "resume", "intervention")
"""Test files that take longest. They begin first, so that no process ends with one of them alone.

The files `copies` and `resume` mostly wait, so each of them runs next to one that computes.
"""


def place(item) -> int:
    """Return the place of a test's file among the longest; all other files come after them."""
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items):
    """Let the longest files begin, and mark what `make test-fast` leaves out as slow."""
    items.sort(key=place)
    cases = Counter[str]()
    for item in items:
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        is_extra_case = item.path.name in SAMPLED_FILES and cases[test] > CASES
        is_slow = item.path.name in SLOW_FILES or item.originalname in SLOW_TESTS
        if is_slow or is_extra_case:
            item.add_marker(pytest.mark.slow)
