"""The provider `aten`: torch's own fused operators, where there is one for an op."""

from piecework.providers.aten.norms import register

__all__ = ["register"]
