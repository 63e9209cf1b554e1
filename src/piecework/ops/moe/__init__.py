"""Experts: who goes where, and what they compute."""
