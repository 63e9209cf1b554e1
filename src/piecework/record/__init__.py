"""What happened, as plain data; passed in, never global."""

from piecework.record.record import Record, Recorder

__all__ = ["Record", "Recorder"]
