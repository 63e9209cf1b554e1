"""Text: tokenizers, chat templates, stop strings, and what becomes of a prompt."""
