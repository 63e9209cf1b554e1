"""From logits to tokens, in plain numpy: the sampler, random numbers, what changes logits, logprobs, grammars."""
