"""Figures for Prometheus, under our names or those of vLLM."""
