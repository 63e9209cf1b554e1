"""One measured process per module: `python -m piecework.bench.cells.<name> MODEL …` prints one line of JSON."""
