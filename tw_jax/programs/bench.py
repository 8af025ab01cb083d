"""Times trie building, or the train step or the sampler against what they replace.

What is compared runs in one process, in turn: A B A B. The first round compiles and is not counted;
a time is the median of the others, and the fastest is printed beside it. Ratios are ratios of
medians. A bar is a number that this code is expected to reach on two quiet cores; a missed one is
printed and is no error, for machines differ. The sizes are in `data/workloads.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.contracts import Network, Params
from tw_jax.data import workloads
from tw_jax.data.workloads import SamplerCase, StepCase, TrieCase
from tw_jax.forkjoin import tries
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.threadweaver import ForkJoin, ThreadWeaver
from tw_jax.metrics import count_compiles
from tw_jax.models.transformer import Model, network
from tw_jax.sample import cache as caches
from tw_jax.sample import sampler as samplers
from tw_jax.sample.draw import Draw, draw, settings
from tw_jax.sample.flight import DONE, State
from tw_jax.sample.sampler import ForkJoinSampler, Sampler
from tw_jax.train import sft
from tw_jax.train.loss import accumulate
from tw_jax.train.state import Optim, create
from tw_jax.trie import pack
from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.tree import build

_CHUNK_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Times:
    """Measured runs of one thing, in milliseconds."""

    fastest_ms: float
    median_ms: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a benchmark found.

    Attributes:
      times: by what was run.
      values: numbers by name, those with a bar among them.
      bars: name of a value to the least ("least") or the most ("most") that it should be.
    """

    times: dict[str, Times]
    values: dict[str, float]
    bars: dict[str, tuple[str, float]]

    def meets(self, name: str) -> bool:
        """Whether a value reaches its bar."""
        kind, bar = self.bars[name]
        return self.values[name] >= bar if kind == "least" else self.values[name] <= bar


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


# tw bench trie


def bench_trie(case: TrieCase) -> Report:
    """Builds one trie from the calls of a rollout."""
    made = workloads.trajectory(case.shape, case.seed)
    times = interleave({"build": lambda _: tries.of_trajectory(made)}, case.repeats)
    nodes = len(tries.of_trajectory(made))
    values = {
        "nodes": nodes,
        "build_ms": times["build"].median_ms,
        "bytes_per_node": _peak_bytes(lambda: tries.of_trajectory(made)) / nodes,
    }
    return Report(times, values, {"build_ms": ("most", 5.0), "bytes_per_node": ("most", 64.0)})


def _peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that was held at once for a run: its result, not what existed before."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


# tw bench step


def bench_step(case: StepCase) -> Report:
    """Trains one trajectory as a trie and as one row per call, and a trie with dense attention.

    Both ways train the same tokens by the same step; the calls stand in one row without padding,
    which is kinder to them than any packing of whole calls into fixed rows. Blockwise attention is
    compared with dense attention as the model stands, and once more with both under full remat: at
    4,096 nodes the dense scores of all layers take 12 GiB, so that part of the first ratio is
    memory traffic, which the second leaves out at the price of computing everything twice.
    """
    made = workloads.trajectory(case.shape, case.seed)
    trie, rows = tries.of_trajectory(made), _of_calls(made)
    batches = {
        "trie": stack_rows([[trie]], len(trie)),
        "rows": stack_rows([rows], trie.source_tokens),
    }
    net = network(case.model)
    params = net.init(jax.random.key(0))
    loss_diff, gradient_diff = _difference(net, params, batches)
    times = interleave({n: _trainer(net, params, b) for n, b in batches.items()}, case.repeats)

    dense_nodes = min(case.dense_nodes, len(trie))
    cut = stack_rows([[pack.truncate(trie, dense_nodes)]], dense_nodes)
    for remat in ("none", "full"):
        suffix = "" if remat == "none" else "_remat"
        ways = {"dense": "reference", "blockwise": "blockwise"}
        times |= interleave(
            {
                name + suffix: _trainer(_model(case.model, attention, remat), params, cut)
                for name, attention in ways.items()
            },
            case.repeats,
        )
    token_ratio = trie.source_tokens / len(trie)
    time_ratio = times["rows"].median_ms / times["trie"].median_ms
    full_ratio, deviation = _full_token_ratio(case)
    values = {
        "nodes": len(trie),
        "row_tokens": trie.source_tokens,
        "token_ratio": token_ratio,
        "time_ratio": time_ratio,
        "time_ratio_over_token_ratio": time_ratio / token_ratio,
        "token_ratio_full": full_ratio,
        "token_ratio_full_deviation": deviation,
        "loss_rel_diff": loss_diff,
        "grad_rel_l2": gradient_diff,
        "dense_nodes": dense_nodes,
        "blockwise_over_dense": times["dense"].median_ms / times["blockwise"].median_ms,
        "blockwise_over_dense_remat": times["dense_remat"].median_ms
        / times["blockwise_remat"].median_ms,
    }
    bars = {
        "time_ratio_over_token_ratio": ("least", 0.75),
        "loss_rel_diff": ("most", 1e-5),
        "grad_rel_l2": ("most", 1e-5),
        "blockwise_over_dense": ("least", 4.0),
    }
    return Report(times, values, bars)


def _full_token_ratio(case: StepCase) -> tuple[float, float]:
    """Tokens of the calls over nodes of the tries, over all trajectories, and its deviation."""
    made = [workloads.trajectory(case.full_shape, seed) for seed in range(case.full_seeds)]
    full = [tries.of_trajectory(one) for one in made]
    ratio = sum(trie.source_tokens for trie in full) / sum(map(len, full))
    return ratio, statistics.pstdev(trie.source_tokens / len(trie) for trie in full)


def _model(model: Model, attention: str, remat: str) -> Network:
    changed: dict[str, Any] = {"attention": attention, "remat": remat}
    return network(dataclasses.replace(model, **changed))


def _of_calls(made: Trajectory) -> list[Any]:
    """A chain for each call: its context and what was sampled, which alone has weight."""
    chains = []
    for call in made.calls:
        weight = np.repeat(np.array([0, 1], np.float32), [len(call.context), len(call.sampled)])
        chains.append(build([np.concatenate([call.context, call.sampled])], [weight]))
    return chains


def _trainer(net: Network, params: Params, batch: TrieBatch) -> Callable[[Any], Any]:
    """Takes one step after another, each from the state that the one before left."""
    optim = Optim(peak_lr=1e-4, schedule="constant")
    pure = sft.make_step(net, optim, steps=100, chunk_tokens=_CHUNK_TOKENS)
    step = jax.jit(pure, donate_argnums=0)
    # The state is donated, and params are used again.
    state = create(jax.tree.map(jnp.copy, params), optim, key=jax.random.key(0))
    batch = jax.device_put(batch)

    def run(_: Any) -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    return run


def _difference(
    net: Network, params: Params, batches: Mapping[str, TrieBatch]
) -> tuple[float, float]:
    """Relative difference of the loss, and relative L2 of the gradient, of trie and rows."""

    def summed(params: Params, batch: TrieBatch) -> Any:
        def objective(params: Params, part: TrieBatch) -> Any:
            return sft.nll_sums(net, params, part, chunk_tokens=_CHUNK_TOKENS)

        return accumulate(objective, params, batch, accumulation_steps=1, axes=net.axes())

    with jax.default_matmul_precision("highest"):
        (g_trie, loss, _), (g_rows, want, _) = (
            jax.device_get(jax.jit(summed)(params, batches[name])) for name in ("trie", "rows")
        )
    squares = [
        sum(float(np.square(leaf.astype(np.float64)).sum()) for leaf in jax.tree.leaves(tree))
        for tree in (jax.tree.map(lambda a, b: a - b, g_trie, g_rows), g_rows)
    ]
    return float(abs(loss - want) / abs(want)), (squares[0] / squares[1]) ** 0.5


# tw bench sampler


def bench_sampler(case: SamplerCase) -> Report:
    """Decodes as lanes over one prefix, as rows with a prefix each, and in one lane.

    The program is the sampler's own, from the step after the one that encoded the prefix to the
    end: threads end by their budgets and the rollout with them, so neither prefill nor join is
    timed. Tokens are given, and the draw is made nevertheless. Every cache has the bucket that its
    last token needs from the start on, so nothing grows on the clock.
    """
    net = network(case.model)
    params = net.init(jax.random.key(0))
    times: dict[str, Times] = {}
    values: dict[str, float] = {}
    lanes = f"lanes{case.lanes}"
    for prefix in case.prefixes:
        ways = {
            f"{lanes}_{prefix}": _Decode.of_lanes(net, case, prefix),
            f"rows{case.lanes}_{prefix}": _Decode.of_rows(net, case, prefix, rows=case.lanes),
        }
        if prefix == case.prefixes[0]:
            ways[f"sequential_{prefix}"] = _Decode.of_rows(net, case, prefix, rows=1)
        ready = {name: way.encoded(params) for name, way in ways.items()}
        times |= interleave(
            {name: functools.partial(way.finish, params) for name, way in ways.items()},
            case.repeats,
            # The program is given its state for good.
            prepare=lambda name, ready=ready: jax.tree.map(jnp.copy, ready[name]),
        )
    first = case.prefixes[0]
    ms = {name: found.median_ms for name, found in times.items()}
    values[f"{lanes}_over_sequential"] = ms[f"sequential_{first}"] / ms[f"{lanes}_{first}"]
    for prefix in case.prefixes:
        rows = ms[f"rows{case.lanes}_{prefix}"]
        values[f"{lanes}_over_rows_{prefix}"] = rows / ms[f"{lanes}_{prefix}"]
    values["recompiles"] = _recompiles(net, params, case)
    bars = {f"{lanes}_over_sequential": ("least", 1.7), "recompiles": ("most", 0.0)}
    for prefix, bar in zip(case.prefixes, (1.0, 1.4), strict=False):
        bars[f"{lanes}_over_rows_{prefix}"] = ("least", bar)
    return Report(times, values, bars)


@dataclasses.dataclass(frozen=True, eq=False)
class _Decode:
    """One way to decode given tokens behind a prefix."""

    sampler: ForkJoinSampler
    prompts: list[np.ndarray]
    how: tuple[Draw, jax.Array]
    prefix: int
    tokens: int  # of one row, all its lanes together, that are decoded behind the prefix

    @classmethod
    def of_rows(cls, net: Network, case: SamplerCase, prefix: int, *, rows: int) -> _Decode:
        """Rows of one lane, each with its own prefix; together they decode what the lanes do."""
        rng = np.random.default_rng(0)
        tokens = case.lanes * case.tokens // rows
        prompt = workloads.text(rng, prefix)
        # The first token is drawn when the prefix is encoded; so many more are decoded.
        limits = ForkJoin(max_new=tokens + 1, parallel=False)
        script = np.broadcast_to(workloads.text(rng, tokens + 1), (rows, 1, tokens + 1))
        sampler = _forced(net, limits, case, rows=rows, max_prompt=prefix)
        return cls(sampler, [prompt] * rows, _how(script), prefix, tokens)

    @classmethod
    def of_lanes(cls, net: Network, case: SamplerCase, prefix: int) -> _Decode:
        """One row that forks behind the prefix; every thread ends by its budget."""
        rng = np.random.default_rng(0)
        table = workloads.table()
        plan = workloads.outlines(rng, case.lanes, workloads.LEAST_OUTLINE)
        # What each header forces: newline, tag, newline, number, colon.
        headers = sum(4 + len(table.label_ids(str(n + 1))) for n in range(case.lanes))
        prompt = workloads.text(rng, prefix - len(plan) - headers)
        budget = case.tokens + 1
        limits = ForkJoin(
            # A fork also reserves each thread's closer, a newline and one token for the parent.
            max_new=len(plan) + headers + case.lanes * (budget + 2) + 2,
            max_thread=budget,
            max_threads=case.lanes,
            unfinished_thread="abort",
        )
        script = np.zeros((1, 1 + case.lanes, max(len(plan), budget)), np.int32)
        script[0, 0, : len(plan)] = plan
        script[0, 1:] = workloads.text(rng, script.shape[2])
        sampler = _forced(net, limits, case, rows=1, max_prompt=len(prompt))
        return cls(sampler, [prompt], _how(script), prefix, case.lanes * case.tokens)

    def encoded(self, params: Params) -> State:
        """The state whose cache holds the prefix, with room for all that follows."""
        sampler, chunk = self.sampler, self.sampler.sizes.chunk
        slots = caches.bucket(self.prefix + self.tokens + chunk)
        cache = caches.empty(sampler.network, sampler.sizes.rows, slots)
        # The program comes back when a chunk has no room. Slots that hold nothing make that the
        # moment when the prefix is encoded; growing, though to the same size, drops them.
        taken = jnp.full_like(cache.used, slots - self.prefix - chunk + 1)
        state = sampler._start(self.prompts).replace(cache=cache.replace(used=taken))
        state = sampler.grow(sampler.advance(params, state, self.how), slots)
        if (np.asarray(state.cache.used) != self.prefix).any():
            raise RuntimeError(f"{state.cache.used} slots hold entries: want {self.prefix}.")
        return state

    def finish(self, params: Params, state: State) -> State:
        """Decodes to the end."""
        state = self.sampler.advance(params, state, self.how)
        if (np.asarray(state.phase) != DONE).any():
            raise RuntimeError("The cache was full before the end: want room for every token.")
        return state


def _forced(
    net: Network, limits: ForkJoin, case: SamplerCase, *, rows: int, max_prompt: int
) -> ForkJoinSampler:
    """A sampler that draws as always and then takes the token that its script has there."""

    def forced(
        logits: jax.Array, how: tuple[Draw, jax.Array], call: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        given, script = how
        row = jnp.arange(logits.shape[0])[:, None]
        last_call, last_token = script.shape[1] - 1, script.shape[2] - 1
        at = jnp.minimum(call, last_call), jnp.minimum(position, last_token)
        # The log-prob is that of the drawn token, so the draw cannot be left out.
        return script[row, *at], draw(logits, given, call, position)[1]

    protocol = ThreadWeaver(workloads.table(), limits)
    cfg = Sampler(rows=rows, max_prompt=max_prompt, prefill_chunk=case.prefill_chunk)
    return samplers.make_sampler(net, protocol, cfg, draw=forced)


def _how(script: np.ndarray) -> tuple[Draw, jax.Array]:
    given = settings(len(script), temperature=1.0, top_p=1.0, top_k=0, seed=0)
    return given, jnp.asarray(script)


def _recompiles(net: Network, params: Params, case: SamplerCase) -> int:
    """Programs compiled by whole rollouts once one was made, whatever settings and prompts say."""
    rng = np.random.default_rng(0)
    limits = ForkJoin(max_new=case.tokens // 4 + 1, max_threads=case.lanes)
    protocol = ThreadWeaver(workloads.table(), limits)
    cfg = Sampler(
        rows=len(case.prompts), max_prompt=max(case.prompts), prefill_chunk=case.prefill_chunk
    )
    sampler = samplers.make_sampler(net, protocol, cfg)

    def rollouts(lengths: Sequence[int], **given: Any) -> None:
        prompts = [workloads.text(rng, length) for length in lengths]
        sampler(params, prompts, settings(len(prompts), **given))

    rollouts(case.prompts, temperature=1.0, top_p=1.0, top_k=0, seed=0)
    with count_compiles() as compiles:
        rollouts(case.prompts[::-1], temperature=0.0, top_p=1.0, top_k=0, seed=1)
        rollouts(case.prompts, temperature=0.7, top_p=0.9, top_k=0, seed=2)
        rollouts(sorted(case.prompts), temperature=1.3, top_p=0.5, top_k=20, seed=3)
    return compiles.count


# The verb.

BENCHMARKS: dict[str, tuple[Callable[[Any], Report], Any]] = {
    "trie": (bench_trie, workloads.TRIE),
    "step": (bench_step, workloads.STEP),
    "sampler": (bench_sampler, workloads.SAMPLER),
}


def main(argv: Sequence[str]) -> int:
    """Runs one benchmark and prints its table; with `--json`, one object on the last line.

    Raises:
      ValueError: no benchmark has this name.
    """
    parser = argparse.ArgumentParser(prog="tw bench", description=__doc__)
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line too")
    args = parser.parse_args(argv)
    if args.name not in BENCHMARKS:
        raise ValueError(f"{args.name!r} is no benchmark. Benchmarks: {', '.join(BENCHMARKS)}.")
    run, case = BENCHMARKS[args.name]
    report, where = run(case), _circumstances()
    print(f"tw bench {args.name}: {where['device']}, jax {where['versions']['jax']}")
    print(_table(report))
    if args.json:
        found = {
            "bench": args.name,
            **report.values,
            "times": {name: dataclasses.asdict(times) for name, times in report.times.items()},
            "bars": {
                name: {kind: bar, "met": report.meets(name)}
                for name, (kind, bar) in report.bars.items()
            },
            **where,
        }
        print(json.dumps(found))
    return 0


def _table(report: Report) -> str:
    lines = [f"\n{'milliseconds':32}{'fastest':>12}{'median':>12}"]
    for name, times in report.times.items():
        lines.append(f"  {name:30}{times.fastest_ms:12.2f}{times.median_ms:12.2f}")
    lines.append(f"\n{'':32}{'value':>12}  bar")
    for name, value in report.values.items():
        bar = ""
        if name in report.bars:
            kind, limit = report.bars[name]
            bar = f"at {kind} {limit:g}: {'met' if report.meets(name) else 'MISSED'}"
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        lines.append(f"  {name:30}{shown:>12}  {bar}".rstrip())
    return "\n".join(lines)


def _circumstances() -> dict[str, Any]:
    """Device, versions and commit."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    libraries = ("jax", "jaxlib", "numpy")
    return {
        "device": f"{device.device_kind} x{jax.device_count()}{cores}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this checkout, with "+" behind it where files differ; None outside of one."""
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # An installed package may lie inside another project's checkout, which says nothing of it.
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
