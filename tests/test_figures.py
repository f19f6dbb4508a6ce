"""The plots of a decomposition: every site shown, in the size of a page, however many there are."""

from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from spd_lightning.decomposition.importance import Importance
from spd_lightning.targets.toy import TMS, ResidualMLP
from spd_lightning.training import figures
from spd_lightning.training.decompose import Decomposition


def module(target, sites, lone=0):
    """A decomposition that might have been evaluated."""
    torch.manual_seed(0)
    made = Decomposition(target, sites, importance=Importance("shared_mlp", hidden=2))
    for site, C in made.model.counts.items():
        made.arrays |= {f"mean_importance/{site}": torch.rand(C), f"density/{site}": torch.zeros(C)}
        made.arrays[f"histogram/{site}"] = torch.arange(50).flip(0)
        if lone:
            made.arrays[f"alone/{site}"] = torch.rand(lone, C)
    return made


def chain(sites, width=5):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(sites)))


@pytest.mark.parametrize("sites", [1, 4, 12, 40])
def test_every_site_has_its_panel_and_no_picture_is_wider_than_a_page(sites):
    drawn = dict(figures.draw(module(chain(sites), {"*": 600})))
    assert set(drawn) == {"mean_importance", "density", "importance_histogram", "components"}
    for name, figure in drawn.items():
        width, height = figure.get_size_inches()
        assert width <= 16.1
        assert height <= 6 * -(-sites // 4)
        panels = [axis for axis in figure.axes if axis.get_title()]
        shown = min(sites, figures.MOST_MATRICES) if name == "components" else sites
        assert [axis.get_title() for axis in panels] == [str(k) for k in range(shown)]
    if sites == 12:
        drawn["components"].savefig(BytesIO(), format="png", dpi=20)
        boxes = [axis.get_window_extent() for axis in drawn["components"].axes]
        assert all(not a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])


def test_toys_have_their_own_figures():
    drawn = dict(figures.draw(module(TMS(5, 2), {"linear*": 6}, lone=5)))
    assert {"importance", "importance_permuted", "vectors"} < set(drawn)
    drawn = dict(figures.draw(module(ResidualMLP(5, 7, 4, 2), {"*": 6}, lone=5)))
    assert {"neurons_layers_0_mlp_in", "neurons_layers_1_mlp_in"} < set(drawn)


def test_lines_show_every_value_in_order():
    made = module(chain(2), {"*": 9})
    drawn = dict(figures.draw(made))["mean_importance"]
    for site in ("0", "1"):
        linear, log = (
            axis for axis in drawn.axes if axis.lines and _above(axis, drawn).get_title() == site
        )
        expected = sorted(made.arrays[f"mean_importance/{site}"].tolist(), reverse=True)
        assert (
            linear.lines[0].get_ydata().tolist()
            == log.lines[0].get_ydata().tolist()
            == pytest.approx(expected)
        )
        assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")


def _above(axis, figure):
    """The axis with the title of a panel: itself, or the one above."""
    if axis.get_title():
        return axis
    column = axis.get_subplotspec().colspan.start
    return next(
        a for a in figure.axes if a.get_title() and a.get_subplotspec().colspan.start == column
    )


def test_matrices_too_large_to_see_are_left_out(monkeypatch):
    monkeypatch.setattr(figures, "MOST_ENTRIES", 60)
    target = nn.Sequential(nn.Linear(5, 30), nn.Linear(30, 5), nn.Linear(5, 5))
    drawn = dict(figures.draw(module(target, {"*": 4})))
    assert [axis.get_title() for axis in drawn["components"].axes if axis.get_title()] == ["2"]
    monkeypatch.setattr(figures, "MOST_ENTRIES", 10)
    assert "components" not in dict(figures.draw(module(target, {"*": 4})))


@given(
    arrays.arrays(
        float, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.floats(-5, 5)
    )
)
def test_a_cell_shows_the_largest_entry_of_its_block(matrix):
    before, figures.MOST_CELLS = figures.MOST_CELLS, 5
    try:
        cells = figures._largest(matrix)
    finally:
        figures.MOST_CELLS = before
    assert cells.shape == tuple(min(n, 5) for n in matrix.shape)
    rows, columns = (
        [range(k * n // s, (k + 1) * n // s) for k in range(s)]
        for n, s in zip(matrix.shape, cells.shape, strict=True)
    )
    for i, held in enumerate(rows):
        for j, over in enumerate(columns):
            block = matrix[np.ix_(held, over)]
            assert abs(cells[i, j]) == np.abs(block).max()
            assert cells[i, j] in block


def test_a_rehearsal_fails_where_drawing_would():
    for _, figure in figures.draw(module(chain(3), {"*": 4})):
        figures._rehearse(figure)
        assert not figure.axes
    spoilt = module(chain(3), {"*": 4})
    del spoilt.arrays["density/1"]
    with pytest.raises(KeyError):
        list(figures.draw(spoilt))
