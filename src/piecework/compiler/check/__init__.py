"""Whether what was compiled computes what its module does."""
