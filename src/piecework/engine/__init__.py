"""Generation over a paged KV cache: requests, block pool, scheduler, forward inputs, sampler, tokenizer."""
