"""Measurement for all benchmarks: runs that are timed in turn, and a report with bars.

The runs that are compared take turns in one process: A B A B. The first round compiles and is not
counted. A time is the median of the other rounds, and the fastest is reported as well.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of one run, in milliseconds."""

    fastest_ms: float
    median_ms: float


@dataclasses.dataclass(frozen=True)
class BenchmarkReport:
    """The result of a benchmark.

    Attributes:
      times: Times by name of the run.
      values: Numbers by name; None if a number does not exist for this device.
      bars: By name of a value, its lower ("least") or upper ("most") bound.
    """

    times: dict[str, Times]
    values: Mapping[str, float | None]
    bars: dict[str, tuple[str, float]]

    def meets(self, name: str) -> bool:
        """Whether a value reaches its bar."""
        kind, bar = self.bars[name]
        value = self.values[name]
        assert value is not None
        return value >= bar if kind == "least" else value <= bar


def interleave(
    runs: Mapping[str, Callable[[Any], Any]],
    repeats: int,
    *,
    prepare: Callable[[str], Any] = lambda name: None,
) -> dict[str, Times]:
    """Times runs in turn: one round that is not counted, then `repeats` rounds that are.

    Args:
      runs: Runs by name. Each receives the result of `prepare` and returns arrays to wait for.
      repeats: Counted rounds, at least 1.
      prepare: Makes the argument of a run from its name; this is not timed.
    """
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            argument = jax.block_until_ready(prepare(name))
            begin = time.perf_counter()
            result = jax.block_until_ready(run(argument))
            seconds = time.perf_counter() - begin
            del result  # freeing is not timed
            if turn:
                spent[name].append(1e3 * seconds)
    return {name: Times(min(ms), statistics.median(ms)) for name, ms in spent.items()}
