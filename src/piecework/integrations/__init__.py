"""Where other people's entry points meet the spine: thin, and nothing of the spine imports them."""
