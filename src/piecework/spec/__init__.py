"""Which model, compiled how: the one value that facts, keys, command lines and compiles are made of. Needs no torch."""
