"""From a piece, as a program, to an artifact: AOTInductor in worker processes, or no compiler at all."""
