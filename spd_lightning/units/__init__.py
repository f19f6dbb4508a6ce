"""Units: anything with one activation per position, such as the components of a decomposition."""

from spd_lightning.units.components import ComponentUnits
from spd_lightning.units.observation import Observation, Units

__all__ = ["ComponentUnits", "Observation", "Units"]
