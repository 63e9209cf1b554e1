"""Load a bundle and run it. Imports no compiler, no graph capture and no modelling code."""

from piecework.bundle.run.loading import load
from piecework.bundle.run.model import LoadedModel

__all__ = ["LoadedModel", "load"]
