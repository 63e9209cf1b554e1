"""One measured process per module: `python -m benchmarks.cells.NAME …` ends with one line of JSON."""
