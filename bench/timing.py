"""Interleaved rounds and their statistics: machines drift, ratios within a round do not."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of some samples, in their unit."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Of one sample or more."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples: take at least one round")
    if len(ordered) == 1:
        return Spread(ordered[0], ordered[0], ordered[0])
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(median, low, high)


def interleaved(
    samplers: Mapping[str, Callable[[], float]], rounds: int, discarded: int = 1
) -> dict[str, list[float]]:
    """One sample of each, A B C A B C ...; the first `discarded` rounds only warm up."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(discarded + rounds):
        for name, sample in samplers.items():
            seconds = sample()
            if turn >= discarded:
                samples[name].append(seconds)
    return samples


def ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """Median of the ratios that the rounds gave."""
    return statistics.median(a / b for a, b in zip(samples, base, strict=True))


def sampler(
    function: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """Seconds of one call, averaged over `calls` in a row."""

    def sample() -> float:
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    return sample
