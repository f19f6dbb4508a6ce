"""Settings of all tests, and what no test may leave behind for the next.

No deadline for one example: the first one pays for what is loaded and compiled. One thread a
process, those that tests start included: there are as many test processes as cores, and small
matrices only wait for one another.
"""

import os
import signal
import sys

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
