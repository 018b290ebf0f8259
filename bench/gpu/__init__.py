"""`make gpu`: correctness and speed on the GPU that is here, in less than eight minutes.

__main__.py     runs the steps, one after another, and writes bench/results/gpu-DEVICE.{json,md}
steps.py        the steps by name, each a process of its own with a time limit
watchdog.py     that process: killed when its time is over, reported as hung
correctness.py  the gpu-marked tests, in four processes
ceilings.py     measured copy bandwidth and bf16 matrix rate of this very card
layers.py       one layer at every M: cuBLAS, the plain GEMM, ours
contenders.py   what is timed there
operands.py     a layer's tensors on the GPU, in as many copies as the cache cannot hold
graphs.py       CUDA graphs and the time that a replay takes
replays.py      1e5 replays of the one-launch form, which nothing has proven yet
rows.py         bits of a row: alone, in any batch of the bucket, under any mask
report.py       JSON, Markdown, the terminal

Nothing here touches a GPU when it is imported.
"""
