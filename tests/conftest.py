"""Settings of all tests: no deadline for one example, since the first one pays for what is loaded and compiled."""

from hypothesis import settings

settings.register_profile("spd_lightning", deadline=None)
settings.load_profile("spd_lightning")
