"""Hugging Face models on piecework's ops: config, weights, adapter. Only the adapter needs transformers."""
