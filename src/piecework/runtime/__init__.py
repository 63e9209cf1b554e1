"""Load a bundle and run it. Imports no compiler, no graph capture and no modelling code."""

from piecework.runtime.loading import load
from piecework.runtime.model import LoadedModel

__all__ = ["LoadedModel", "load"]
