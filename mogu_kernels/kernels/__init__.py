"""Triton kernels, one family per file; nothing here imports anything but Triton.

`mogu_kernels.ops` checks the arguments, picks the tiles and launches.
"""
