"""Numbers as people write them."""

from __future__ import annotations

from collections.abc import Iterable


def spell_bytes(size: int) -> str:
    """Write a number of bytes for people: "3.5 MB"."""
    for unit, scale in (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def spell_count(number: int, noun: str) -> str:
    """Write a number of things for people: "1 kernel", "2 kernels"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def spell_numbers(numbers: Iterable[int]) -> str:
    """Write numbers with their runs shortened: "0-2, 4, 6-9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
