"""What a bundle contains and why, and what a machine lacks, for people."""

from piecework.report.doctor import Check, DoctorReport, Status, examine
from piecework.report.inspect import ArtifactReport, BundleReport, PieceReport, describe

__all__ = [
    "ArtifactReport",
    "BundleReport",
    "Check",
    "DoctorReport",
    "PieceReport",
    "Status",
    "describe",
    "examine",
]
