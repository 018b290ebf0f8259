"""CUDA graphs over rotated operands, timed by events: no launch overhead of the host in a figure.

    with on_stream() as stream:
        replay = captured(call, copies, stream)
        seconds_of_one_call = replay()

Warm-up and capture share one stream: what a call makes once per stream (compiled kernels, the flags
of the one-launch form) is there before the capture, and not in it.
"""

import collections
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch

LEAST_CALLS = 40  # in a graph, so that starting it does not count


@contextlib.contextmanager
def on_stream() -> Iterator[torch.cuda.Stream]:
    """A stream of its own, the current one inside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        yield stream
    torch.cuda.synchronize()


def captured(call: Callable, copies: Sequence, stream: torch.cuda.Stream) -> Callable[[], float]:
    """A function that replays `call` on every copy in turn: seconds of one call.

    Outputs live until their copy comes round again, so that they rotate too.
    """
    for copy in copies[:2]:
        call(copy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = math.ceil(LEAST_CALLS / len(copies))
    outputs = collections.deque(maxlen=len(copies))
    with torch.cuda.graph(graph, stream=stream):
        for copy in [*copies] * rounds:
            outputs.append(call(copy))
    outputs.clear()
    calls = rounds * len(copies)

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    return replay


def single(
    call: Callable, operand, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of one call and the output that every replay writes."""
    call(operand)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = call(operand)
    return graph, output
