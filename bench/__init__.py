"""Measurements: what the kernels cost, counted and timed."""
