"""Where bundles and artifacts live. Needs no torch."""
