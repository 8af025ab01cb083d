"""What every benchmark measures with: runs timed in turn, and a report with bars.

What is compared runs in one process, in turn: A B A B. The first round compiles and is not counted;
a time is the median of the others, and the fastest is kept beside it. This file knows nothing of
what is timed; it hands `programs/bench.py` a `BenchmarkReport`.
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
    """Measured runs of one thing, in milliseconds."""

    fastest_ms: float
    median_ms: float


@dataclasses.dataclass(frozen=True)
class BenchmarkReport:
    """What a benchmark found.

    Attributes:
      times: by what was run.
      values: numbers by name, those with a bar among them; None where a device has no such number.
      bars: name of a value to the least ("least") or the most ("most") that it should be.
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
    """Times what is compared in turn: one round that is not counted, then `repeats` that are.

    Args:
      runs: by name; each gets what `prepare` made and returns what to wait for.
      repeats: counted rounds, at least 1.
      prepare: makes the argument of one run from its name, off the clock.
    """
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            given = jax.block_until_ready(prepare(name))
            begin = time.perf_counter()
            made = jax.block_until_ready(run(given))
            seconds = time.perf_counter() - begin
            del made  # off the clock
            if turn:
                spent[name].append(1e3 * seconds)
    return {name: Times(min(ms), statistics.median(ms)) for name, ms in spent.items()}
