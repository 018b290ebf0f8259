"""What the routed layers did, counted on their device and read by Prometheus.

Counting and reading happen in different processes, which share a file of numbers: the worker (the
first of a tensor-parallel group) maps it into memory, and on a CPU counts in it directly; the
server reads it whenever it is asked for metrics.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import REGISTRY, Collector
from torch import Tensor
from vllm.v1.metrics.loggers import StatLoggerBase

from mogu_kernels.checkpoint import MoGUCheckpoint
from mogu_kernels.vllm_plugin.settings import Settings

GROUPS = 4  # of layers, in the metrics
SECONDS = 1.0  # between two copies from a device that is no CPU


class Counts:
    """Sums of one model: [layers + 1, experts + 1] of fp64.

    Row i: routed tokens of the i-th routed projection and the sums of their gates. Last row: the
    requests whose routing has ended, and by which expert they were weighed most.

    Args:
        path: of the file.
        checkpoint: of the model.
        max_requests: places in the batch.
        device: of the model.
    """

    def __init__(
        self, path: Path, checkpoint: MoGUCheckpoint, max_requests: int, device: torch.device
    ):
        shape = (len(checkpoint.modules) + 1, checkpoint.config.num_experts + 1)
        self._file = torch.from_numpy(np.memmap(path, np.float64, "w+", shape=shape))
        self._at = {name: i for i, name in enumerate(checkpoint.modules)}
        on_cpu = device.type == "cpu"
        self.sums = self._file if on_cpu else torch.zeros_like(self._file, device=device)
        self._copy = None if on_cpu else torch.zeros_like(self._file, pin_memory=True)
        self._copied = time.monotonic()
        # gates that chose answer tokens, summed over layers, by place in the batch
        self.requests = self.sums.new_zeros(max_requests + 1, shape[1] - 1)

    def add(self, module: str, gates: Tensor, mask: Tensor, rows: Tensor, answering: Tensor):
        """One pass of a projection: gates [M, E] and what `Tokens` says of the M tokens."""
        own, gates = self.sums[self._at[module]], gates.double()
        weights = mask.double()
        own[0] += weights.sum()
        own[1:] += weights @ gates
        self.requests.index_add_(0, rows, gates * answering[:, None])

    def follow(self, moved: Mapping[int, int], ended: Sequence[int], left: Sequence[int]) -> None:
        """Requests changed their places; some are not routed any longer, or left unanswered."""
        if ended:
            chosen = self.requests[self._index(ended)].argmax(1)
            experts = torch.nn.functional.one_hot(chosen, self.requests.shape[1])
            self.sums[-1, 0] += len(ended)
            self.sums[-1, 1:] += experts.sum(0)
        if gone := [*ended, *left]:
            self.requests.index_fill_(0, self._index(gone), 0)
        if any(old != new for old, new in moved.items()):
            kept = self.requests[self._index(moved)]
            self.requests.zero_()
            self.requests.index_copy_(0, self._index(moved.values()), kept)
        if self._copy is not None and time.monotonic() - self._copied > SECONDS:
            self._file.copy_(self._copy)  # what was asked for a second ago has arrived by now
            self._copy.copy_(self.sums, non_blocking=True)
            self._copied = time.monotonic()

    def _index(self, places: Iterable[int]) -> Tensor:
        """Places in the batch, on the device without waiting for it."""
        pinned = torch.tensor(list(places), pin_memory=self._copy is not None)
        return pinned.to(self.requests.device, non_blocking=True)


def path_of(settings: Settings, vllm_config: Any) -> Path:
    """Where an engine counts."""
    assert settings.metrics is not None, "engine.py makes the folder"
    return Path(settings.metrics) / f"{vllm_config.parallel_config.data_parallel_rank}.f64"


class RoutingMetrics(Collector):
    """Reads what the workers have counted.

    Args:
        folder: of the files, one for each engine.
        checkpoint: that they serve.
    """

    def __init__(self, folder: Path, checkpoint: MoGUCheckpoint):
        self.folder, self.experts = folder, checkpoint.config.expert_names
        self.modules = checkpoint.modules
        size = -(-len(self.modules) // GROUPS)
        self.groups = [
            list(range(i, min(i + size, len(self.modules))))
            for i in range(0, len(self.modules), size)
        ]

    def _sums(self) -> np.ndarray:
        shape = (len(self.modules) + 1, len(self.experts) + 1)
        sums = np.zeros(shape)
        for path in self.folder.glob("*.f64"):
            found = np.fromfile(path, np.float64)
            if found.size == sums.size:  # a file that is just being made is read the next time
                sums += found.reshape(shape)
        return sums

    def collect(self) -> Iterator[Any]:
        """See `Collector`."""
        sums = self._sums()
        tokens = CounterMetricFamily(
            "mogu:routed_tokens", "Tokens routed, averaged over the routed projections."
        )
        tokens.add_metric([], float(sums[:-1, 0].mean()))
        yield tokens
        total = CounterMetricFamily(
            "mogu:gate_sum",
            "Gates summed over routed tokens and projections.",
            labels=["expert", "modules"],
        )
        count = CounterMetricFamily(
            "mogu:gate_count", "Routed tokens times projections.", labels=["modules"]
        )
        mean = GaugeMetricFamily(
            "mogu:gate_mean", "Mean gate since the start.", labels=["expert", "modules"]
        )
        for group in self.groups:
            label, own = self._label(group), sums[group].sum(0)
            count.add_metric([label], own[0])
            for expert, gates in zip(self.experts, own[1:], strict=True):
                total.add_metric([expert, label], gates)
                mean.add_metric([expert, label], gates / own[0] if own[0] else 0.0)
        yield from (total, count, mean)
        requests = CounterMetricFamily(
            "mogu:requests",
            "Requests whose routing has ended, by their heaviest expert.",
            labels=["expert"],
        )
        for expert, chosen in zip(self.experts, sums[-1, 1:], strict=True):
            requests.add_metric([expert], chosen)
        yield requests

    def _label(self, group: list[int]) -> str:
        """A name for some modules: the first, or the first to the last."""
        names = [self.modules[group[0]], self.modules[group[-1]]]
        return names[0] if len(group) == 1 else " .. ".join(names)


class RoutingStatLogger(StatLoggerBase):
    """Registers `RoutingMetrics` where vLLM's own metrics are; has nothing to record itself."""

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        """See `StatLoggerBase`."""
        settings = Settings.of(vllm_config)
        if settings is not None and settings.metrics is not None and engine_index == 0:
            with contextlib.suppress(ValueError):  # of an earlier engine in this process
                REGISTRY.register(RoutingMetrics(Path(settings.metrics), settings.load()))

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_engine_initialized(self) -> None:
        """Nothing: the workers have said what is routed."""
