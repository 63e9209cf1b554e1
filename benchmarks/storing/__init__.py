"""The parts of `benchmarks.store`, one to a file."""
