"""The command line: one file per command, of which only the chosen one is imported."""
