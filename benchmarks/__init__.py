"""What piecework's speed is measured by, beside other systems. Not part of the wheel.

`python -m benchmarks.NAME --out FILE`, from the repository's root; README.md has a row for each.
"""
