"""A warm start from a bundle: seconds of each phase of loading, memory over torch and weights, then decode steps."""

from __future__ import annotations

from piecework.bench.memory import rss_bytes


def main() -> None:
    """Run the cell."""
    import torch  # noqa: F401, PLC0415  its memory is measured alone, before anything else is imported

    after_torch = rss_bytes()
    from piecework.bench.cells.warm_start import measure  # noqa: PLC0415  see above

    measure(after_torch=after_torch)


if __name__ == "__main__":
    main()
