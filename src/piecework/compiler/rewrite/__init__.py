"""What passes are made of: patterns, matches, programs with a part replaced, and checks of the result."""
