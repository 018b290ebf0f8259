"""Processes of one gloo group that stay up for all tests of a file: starting one takes seconds."""

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """`run(function, *args)` calls a module-level function on every rank at once."""

    def __init__(self, size: int, folder: Path):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (rank, size, str(folder / "rendezvous"), theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """What every rank returned, in their order; a rank's exception is raised as text."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self.pipes]
        for failed, answer in answers:
            if failed:
                raise RuntimeError(answer)
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(20)


def _serve(rank: int, size: int, rendezvous: str, pipe: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {name: str(value) for name, value in names.items()}  # as torchrun sets them
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size)
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                pipe.send((False, function(*args)))
        except BaseException:  # pytest.fail is no Exception
            pipe.send((True, traceback.format_exc()))
    dist.destroy_process_group()
