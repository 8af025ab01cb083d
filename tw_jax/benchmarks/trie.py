"""`tw bench trie`: time and memory of building one trie from the calls of a rollout."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

from tw_jax.benchmarks.measure import BenchmarkReport, interleave
from tw_jax.data import workloads
from tw_jax.data.workloads import TrieCase
from tw_jax.forkjoin import tries


def run(case: TrieCase) -> BenchmarkReport:
    """Builds one trie from the calls of a rollout."""
    made = workloads.trajectory(case.shape, case.seed)
    times = interleave({"build": lambda _: tries.trajectory_trie(made)}, case.repeats)
    nodes = len(tries.trajectory_trie(made))
    values = {
        "nodes": nodes,
        "build_ms": times["build"].median_ms,
        "bytes_per_node": _peak_bytes(lambda: tries.trajectory_trie(made)) / nodes,
    }
    return BenchmarkReport(
        times, values, {"build_ms": ("most", 5.0), "bytes_per_node": ("most", 64.0)}
    )


def _peak_bytes(run: Callable[[], Any]) -> int:
    """Peak memory of a run, its result included, above the memory before the run."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
