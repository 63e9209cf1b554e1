"""The parts of the sampler, in plain numpy: random numbers, what changes logits, drawing, logprobs, grammars."""
