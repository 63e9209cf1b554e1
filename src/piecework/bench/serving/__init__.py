"""Load on any OpenAI-compatible server, and what its answers tell."""
