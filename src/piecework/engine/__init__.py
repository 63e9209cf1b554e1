"""Generation over a paged KV cache: requests, scheduler, block pool, forward inputs, the engine and its thread."""
