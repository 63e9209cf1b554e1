"""Routes of servers whose model encodes texts."""
