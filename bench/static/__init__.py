"""The static gate: what the kernels compile to, on GPUs that are not here.

compiling.py  makes an op call compile its launches for a target instead of running them
cases.py      the op calls: every tile config that `tuning` ships, aligned and not
plain.py      the same GEMMs without MoGU, to compare with
resources.py  registers, spills, shared memory and instructions of a compiled kernel
checks.py     the limits, and the comparison with the committed table
table.py      that table: bench/results/static.json, static.md and the terminal
__main__.py   the command
"""
