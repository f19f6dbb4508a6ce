"""Names of components, as graphs write them: `layer:pos:component`, or `layer:component` at all
positions.

Nothing here needs torch: a name can be checked against a run's files before its model is loaded.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from spd_lightning.errors import BadInput, nearest

Base = Literal["unmasked", "ci"]
BASES: tuple[Base, ...] = ("unmasked", "ci")
"""The models that interventions edit: the target itself, or under its importances."""

DIGITS = 5
"""A position has no more digits: tables hold 65536 of them."""


class Place(NamedTuple):
    """A component of a site, at some positions; at all of them where positions is None."""

    site: str
    component: int
    positions: tuple[int, ...] | None = None


def place(counts: Mapping[str, int], name: str) -> Place:
    """Return the place that a name means; pos is a number or a range, `3-5`.

    Args:
        counts: the number of components of each site.
        name: `layer:pos:component` or `layer:component`.

    Raises:
        BadInput: the name has another form, or there is no such site or component.
    """
    site, *numbers = name.strip(" ").split(":")
    if not 1 <= len(numbers) <= 2 or not _is_number(numbers[-1]):
        raise BadInput(
            f"component '{name}': write layer:pos:component, or layer:component for all positions"
        )
    if len(numbers[-1]) > 2 * DIGITS:
        raise BadInput(
            f"component '{name}': no site has that many components; take a smaller number"
        )
    positions = _positions(name, numbers[0]) if len(numbers) == 2 else None
    found = Place(site, int(numbers[-1]), positions)
    known(counts, found)
    return found


def _is_number(word: str) -> bool:
    """Whether a word is a number in the digits 0 to 9."""
    return word.isascii() and word.isdecimal()


def _positions(name: str, word: str) -> tuple[int, ...]:
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
    found = tuple(range(int(first), int(last or first) + 1))
    if not found:
        raise BadInput(
            f"component '{name}': positions '{word}' end before they begin; write the smaller one "
            "first"
        )
    return found


def known(counts: Mapping[str, int], at: Place) -> None:
    """Raise BadInput if there is no such site or component."""
    if at.site not in counts:
        raise BadInput(
            f"site '{at.site}': not one of the decomposition; {nearest(at.site, counts)}"
        )
    if not 0 <= at.component < (count := counts[at.site]):
        raise BadInput(
            f"component {at.component} of '{at.site}': it has {count}; take one from 0 to "
            f"{count - 1}"
        )


def within(at: Place, length: int) -> None:
    """Raise BadInput if a place lies beyond the end of a prompt of `length` positions."""
    late = [pos for pos in at.positions or () if not 0 <= pos < length]
    if late:
        raise BadInput(
            f"position {late[0]} of '{at.site}': the prompt has {length}; take one from 0 to "
            f"{length - 1}"
        )
