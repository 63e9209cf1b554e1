"""From a module to pieces: capture, stacks and templates, split, fingerprint, dedupe."""
