"""The systems that are measured: piecework, torch.compile in two ways, eager, and vLLM where it is installed."""
