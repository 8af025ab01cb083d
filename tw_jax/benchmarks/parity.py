"""`tw bench parity`: our SFT step against transformers with a dense 4-D mask, on the same trie.

Both sides take whole optimiser steps in float32 from the same weights, in turn in one process. The
mask is made before the clock starts. Memory is measured in a process of its own: the peak of its
resident memory during the first step, minus its resident memory before that step, when weights,
batch and (on our side) the compiled program are already in memory.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tw_jax.benchmarks.measure import BenchmarkReport, Times, interleave
from tw_jax.benchmarks.step import trainer
from tw_jax.data import workloads
from tw_jax.data.workloads import CutTrie, ParityCase
from tw_jax.forkjoin import tries
from tw_jax.models import hf
from tw_jax.models.transformer import Model, network
from tw_jax.trie import pack
from tw_jax.trie.batch import TrieBatch, stack_rows

SIDES = ("jax", "torch")


def run(case: ParityCase) -> BenchmarkReport:
    """Times both sides on every trie, and measures their memory on the largest.

    Raises:
      NotImplementedError: If PyTorch is not installed, or the system is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise NotImplementedError(
            "tw bench parity reads the memory of a process from /proc, so it needs Linux."
        )
    for cut in case.tries:
        _batch(cut)  # a case that does not fit is refused now, not after minutes
    times: dict[str, Times] = {}
    values: dict[str, float] = {}
    bars: dict[str, tuple[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        params = network(case.model).init(jax.random.key(0))
        hf.write(folder, params, case.model, dtype="float32")
        for cut, bar in zip(case.tries, (1.6, 1.9), strict=True):
            nodes = cut.nodes
            steps = {f"{side}_{nodes}": _step(side, folder, case.model, cut) for side in SIDES}
            losses = [step(None) for step in steps.values()]
            values[f"loss_rel_diff_{nodes}"] = abs(losses[0] - losses[1]) / abs(losses[1])
            times |= interleave(steps, case.repeats)
            ours, theirs = (times[name].median_ms for name in steps)
            values[f"torch_over_jax_{nodes}"] = theirs / ours
            bars |= {
                f"torch_over_jax_{nodes}": ("least", bar),
                f"loss_rel_diff_{nodes}": ("most", 1e-5),
            }
        for side in SIDES:
            values[f"{side}_mib"] = _step_memory(side, folder, case.model, case.tries[-1])
    values["memory_ratio"] = values["jax_mib"] / values["torch_mib"]
    bars["memory_ratio"] = ("most", 0.5)
    return BenchmarkReport(times, values, bars)


def _step(side: str, folder: str, model: Model, cut: CutTrie) -> Callable[[Any], float]:
    """A function that takes a step and returns its loss."""
    batch = _batch(cut)
    if side == "jax":
        params = hf.read_params(folder, model)
        take = trainer(network(model), params, batch)
        return lambda _: float(take(None)[1]["loss"])
    torch_oracle = _import_torch_oracle()
    oracle = torch_oracle.Oracle(folder, "float32", attention="sdpa")
    rows = torch_oracle.Rows(
        tokens=np.asarray(batch.tokens),
        parent=np.asarray(batch.parent),
        depth=np.asarray(batch.depth),
        weight=np.asarray(batch.weight),
        flat_weight=np.asarray(batch.weight),
    )
    # The same optimiser as that of `step.trainer`.
    recipe = torch_oracle.Recipe(
        rate=1e-4,
        schedule="constant_with_warmup",
        warmup=5,
        steps=100,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        decay=1e-4,
        clip=1.0,
    )
    take = oracle.trainer(rows, recipe)
    return lambda _: take()


def _import_torch_oracle() -> Any:
    try:
        from tw_jax.parity import torch_oracle
    except ImportError as error:
        raise NotImplementedError(
            f"tw bench parity needs PyTorch and transformers ({error}). Install them with "
            "`pip install -e '.[parity]'`."
        ) from error
    return torch_oracle


@functools.cache
def _batch(cut: CutTrie) -> TrieBatch:
    trie = tries.trajectory_trie(workloads.trajectory(cut.shape, cut.seed))
    if len(trie) < cut.nodes:
        raise ValueError(
            f"CutTrie.shape gives {len(trie)} nodes, but CutTrie.nodes = {cut.nodes}. Reduce nodes."
        )
    return stack_rows([[pack.truncate(trie, cut.nodes)]], cut.nodes)


def _step_memory(side: str, folder: str, model: Model, cut: CutTrie) -> float:
    """Mebibytes of a first step, measured in a new process."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_mebibytes, side, folder, model, cut).result()


def _mebibytes(side: str, folder: str, model: Model, cut: CutTrie) -> float:
    step = _step(side, folder, model, cut)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    step(None)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of /proc/self/status in kibibytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}.")
