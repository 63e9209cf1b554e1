"""Multi-head latent attention on the CPU as native calls: their C++ sources, and what calls them once built."""
