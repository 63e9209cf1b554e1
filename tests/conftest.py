"""Settings of every test: no timing is asserted, Hypothesis' deadlines included."""

from hypothesis import settings

settings.register_profile("piecework", deadline=None)
settings.load_profile("piecework")
