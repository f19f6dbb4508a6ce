"""Settings of all tests, and what no test may leave behind for the next.

No deadline for one example: the first one pays for what is loaded and compiled.
"""

import sys

import pytest
from hypothesis import settings

settings.register_profile("spd_lightning", deadline=None)
settings.load_profile("spd_lightning")


@pytest.fixture(autouse=True)
def _whole_numbers():
    """A training that a test kills on purpose cannot put back the processor's treatment of tiny numbers."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
