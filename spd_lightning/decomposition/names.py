"""Names of components: `layer:pos:component`, or `layer:component` for all positions.

1. *Parse* a name into a `Place`: a site, a component and positions.
2. *Check* it: the site and the component must exist, and the positions must be in the prompt.

Graphs write these names, and interventions read them. This module does not need torch, so that a
name can be checked against the files of a run before its model is loaded.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from spd_lightning.errors import BadInput, nearest

Base = Literal["unmasked", "ci"]
BASES: tuple[Base, ...] = ("unmasked", "ci")
"""The models that interventions edit: the target itself, or the model under its importances."""

DIGITS = 5
"""Maximum number of digits of a position: tables store positions below 65536."""


class Place(NamedTuple):
    """A component of a site at some positions; if `positions` is None, at all of them."""

    site: str
    component: int
    positions: tuple[int, ...] | None = None


def parse_place(counts: Mapping[str, int], name: str) -> Place:
    """Return the place that a name refers to.

    >>> parse_place({"h.0.mlp.up": 8}, "h.0.mlp.up:3-5:7")
    Place(site='h.0.mlp.up', component=7, positions=(3, 4, 5))

    Args:
        counts: the number of components of each site.
        name: `layer:pos:component` or `layer:component`; pos is a number or a range such as `3-5`.

    Raises:
        BadInput: the name has another form, or the site or component does not exist.
    """
    stripped = name.strip(" ")
    site, *numbers = stripped.split(":")
    if not 1 <= len(numbers) <= 2 or not _is_number(numbers[-1]):
        raise BadInput(
            f"component '{name}': write layer:pos:component, or layer:component for all positions"
        )
    component = numbers[-1]
    if len(component) > 2 * DIGITS:
        raise BadInput(
            f"component '{name}': no site has that many components; take a smaller number"
        )
    positions = None
    if len(numbers) == 2:
        positions = _positions(name, numbers[0])
    parsed = Place(site, int(component), positions)  # step 1
    check_known(counts, parsed)  # step 2
    return parsed


def _is_number(word: str) -> bool:
    """Return whether a word consists of the digits 0 to 9."""
    return word.isascii() and word.isdecimal()


def _positions(name: str, word: str) -> tuple[int, ...]:
    """Return the positions of `3` or `3-5`."""
    first, dash, last = word.partition("-")
    if not _is_number(first) or (dash and not _is_number(last)):
        raise BadInput(
            f"component '{name}': position '{word}' is not a number; write 3, or 3-5 for several"
        )
    if max(len(first), len(last)) > DIGITS:
        raise BadInput(
            f"component '{name}': position '{word}' is beyond the end of any prompt; write a "
            "smaller one"
        )
    end = int(last or first)
    positions = tuple(range(int(first), end + 1))
    if not positions:
        raise BadInput(
            f"component '{name}': positions '{word}' end before they begin; write the smaller one "
            "first"
        )
    return positions


def check_known(counts: Mapping[str, int], location: Place) -> None:
    """Raise BadInput if the site or the component of a place does not exist."""
    site, component, _ = location
    if site not in counts:
        raise BadInput(f"site '{site}': not a site of the decomposition; {nearest(site, counts)}")
    count = counts[site]
    if not 0 <= component < count:
        raise BadInput(
            f"component {component} of '{site}': it has {count}; take one from 0 to {count - 1}"
        )


def check_within(location: Place, length: int) -> None:
    """Raise BadInput if a place is beyond the end of a prompt of `length` positions."""
    for pos in location.positions or ():
        if not 0 <= pos < length:
            raise BadInput(
                f"position {pos} of '{location.site}': the prompt has {length}; take one from 0 to "
                f"{length - 1}"
            )
