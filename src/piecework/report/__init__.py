"""What a bundle contains and why, why layers share their pieces or don't, and what a machine lacks, for people."""

from piecework.report.differences import first_difference
from piecework.report.doctor import Check, DoctorReport, Status, examine
from piecework.report.explain import ExplainReport, explain_bundle
from piecework.report.inspect import ArtifactReport, BundleReport, PieceReport, describe

__all__ = [
    "ArtifactReport",
    "BundleReport",
    "Check",
    "DoctorReport",
    "ExplainReport",
    "PieceReport",
    "Status",
    "describe",
    "examine",
    "explain_bundle",
    "first_difference",
]
