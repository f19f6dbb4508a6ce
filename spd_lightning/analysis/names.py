"""Components of a harvest by name: `layer:component`."""

from spd_lightning.decomposition.names import parse_place
from spd_lightning.errors import BadInput, shown
from spd_lightning.store import Store

LONGEST = 300
"""The largest number of characters in a name, which can come from a browser."""

MOST_ROWS = 1 << 32
"""The largest number of rows or tokens that a query can be asked for."""


def component_of(store: Store, name: str) -> tuple[str, int]:
    """Return the layer and the number of a component.

    Raises:
        BadInput: the harvest has no such component; the message lists the nearest layers.
    """
    if len(name) > LONGEST or not name.isprintable():
        raise BadInput(f"component '{shown(name)}': write layer:component, on one line")
    place = parse_place(store.require("C").manifest["C"], name)
    if place.positions is not None:
        raise BadInput(f"component '{shown(name)}': write layer:component, without a position")
    return place.site, place.component


def component_name(layer: str, component: int) -> str:
    """Return the name of a component, which `component_of` reads."""
    return f"{layer}:{component}"
