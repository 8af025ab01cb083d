"""`tw bench sampler`: lanes over one prefix against rows with a prefix each, and one lane."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.benchmarks.measure import BenchmarkReport, Times, interleave
from tw_jax.contracts import Network, Params
from tw_jax.data import workloads
from tw_jax.data.workloads import SamplerCase
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.metrics import count_compiles
from tw_jax.models.transformer import network
from tw_jax.sample import sampler as samplers
from tw_jax.sample.draw import SamplingArrays, draw, sampling_arrays, script_tokens
from tw_jax.sample.sampler import ForkJoinSampler, Sampler
from tw_jax.sample.state import DONE, State


def run(case: SamplerCase) -> BenchmarkReport:
    """Decodes as lanes over one prefix, as rows with a prefix each, and in one lane.

    The timed program is that of the sampler, from the first step after the prefix is encoded to the
    end. Threads end by their budgets and the rollout ends with them, so neither prefill nor a join
    is timed. Tokens come from a script, but the draw is computed as well. Every cache is created in
    its final size, so it does not grow while the clock runs.
    """
    net = network(case.model, num_ids=workloads.table().num_ids)
    params = net.init(jax.random.key(0))
    times: dict[str, Times] = {}
    values: dict[str, float] = {}
    lanes = f"lanes{case.lanes}"
    for prefix in case.prefixes:
        ways = {
            f"{lanes}_{prefix}": Decode.of_lanes(net, case, prefix),
            f"rows{case.lanes}_{prefix}": Decode.of_rows(net, case, prefix, rows=case.lanes),
        }
        if prefix == case.prefixes[0]:
            ways[f"sequential_{prefix}"] = Decode.of_rows(net, case, prefix, rows=1)
        ready = {name: way.encoded(params) for name, way in ways.items()}
        times |= interleave(
            {name: functools.partial(way.finish, params) for name, way in ways.items()},
            case.repeats,
            # The program donates its state, so each run gets a copy.
            prepare=lambda name, ready=ready: jax.tree.map(jnp.copy, ready[name]),
        )
    first = case.prefixes[0]
    ms = {name: found.median_ms for name, found in times.items()}
    # Ideals: the ratio of steps, and the ratio of cache entries if reading the cache dominates.
    values["ideal_over_sequential"] = case.lanes
    values[f"{lanes}_over_sequential"] = ms[f"sequential_{first}"] / ms[f"{lanes}_{first}"]
    for prefix in case.prefixes:
        entries = prefix + case.lanes * case.tokens
        copied = case.lanes * (prefix + case.tokens)
        values[f"rho_{prefix}"] = 1 - entries / copied
        values[f"ideal_over_rows_{prefix}"] = copied / entries
        rows = ms[f"rows{case.lanes}_{prefix}"]
        values[f"{lanes}_over_rows_{prefix}"] = rows / ms[f"{lanes}_{prefix}"]
    values["recompiles"] = _recompiles(net, params, case)
    bars = {f"{lanes}_over_sequential": ("least", 1.7), "recompiles": ("most", 0.0)}
    for prefix, bar in zip(case.prefixes, (1.0, 1.4), strict=False):
        bars[f"{lanes}_over_rows_{prefix}"] = ("least", bar)
    return BenchmarkReport(times, values, bars)


@dataclasses.dataclass(frozen=True, eq=False)
class Decode:
    """One way to decode the tokens of a script after a prefix."""

    sampler: ForkJoinSampler
    prompts: list[np.ndarray]
    sampling: tuple[SamplingArrays, jax.Array]
    prefix: int
    tokens: int  # decoded after the prefix, by all lanes of one row together

    @classmethod
    def of_rows(cls, net: Network, case: SamplerCase, prefix: int, *, rows: int) -> Decode:
        """Rows of one lane, each with its own prefix; together they decode as many tokens."""
        rng = np.random.default_rng(0)
        tokens = case.lanes * case.tokens // rows
        prompt = workloads.text(rng, prefix)
        # The first token is drawn when the prefix is encoded, and `tokens` more are decoded.
        limits = ForkJoin(max_new=tokens + 1, parallel=False)
        script = np.broadcast_to(workloads.text(rng, tokens + 1), (rows, 1, tokens + 1))
        sampler = _scripted_sampler(net, limits, case, rows=rows, max_prompt=prefix)
        return cls(sampler, [prompt] * rows, _sampling(script), prefix, tokens)

    @classmethod
    def of_lanes(cls, net: Network, case: SamplerCase, prefix: int) -> Decode:
        """One row that forks after the prefix; every thread ends by its budget."""
        rng = np.random.default_rng(0)
        table = workloads.table()
        plan = workloads.outlines(rng, case.lanes, workloads.LEAST_OUTLINE)
        # Forced tokens of each header: newline, tag, newline, number, colon.
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
        sampler = _scripted_sampler(net, limits, case, rows=1, max_prompt=len(prompt))
        return cls(sampler, [prompt], _sampling(script), prefix, case.lanes * case.tokens)

    def encoded(self, params: Params) -> State:
        """The state after the prefix is encoded, with room in the cache for all later tokens."""
        sampler, chunk = self.sampler, self.sampler.sizes.chunk
        slots = self.prefix + max(self.tokens, chunk) + chunk
        state = sampler.empty(self.sampling, slots=slots)
        rows = range(len(self.prompts))
        state = sampler.admit(params, state, rows, self.prompts, self.sampling)
        while (np.asarray(state.cache.used) < self.prefix).any():
            state = sampler.advance(params, state, 1)
        if (np.asarray(state.cache.used) != self.prefix).any():
            raise RuntimeError(
                f"{state.cache.used} slots hold entries and not {self.prefix}. A prefix must end "
                "with a turn of the sampler."
            )
        return state

    def finish(self, params: Params, state: State) -> State:
        """Decodes to the end."""
        state = self.sampler.advance(params, state)
        if (np.asarray(state.phase) != DONE).any():
            raise RuntimeError(
                "The cache was full before the end. It must have room for all tokens."
            )
        return state


def _scripted_sampler(
    net: Network, limits: ForkJoin, case: SamplerCase, *, rows: int, max_prompt: int
) -> ForkJoinSampler:
    """A sampler that draws as usual and then takes the token of its script instead."""

    def draw_and_follow(
        logits: jax.Array,
        sampling: tuple[SamplingArrays, jax.Array],
        call: jax.Array,
        position: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        given, script = sampling
        # The log-prob is that of the drawn token, so the compiler cannot leave the draw out.
        return script_tokens(script, call, position), draw(logits, given, call, position)[1]

    protocol = ThreadWeaver(workloads.table(), limits)
    cfg = Sampler(rows=rows, max_prompt=max_prompt, prefill_chunk=case.prefill_chunk)
    return samplers.make_sampler(net, protocol, cfg, draw=draw_and_follow)


def _sampling(script: np.ndarray) -> tuple[SamplingArrays, jax.Array]:
    given = sampling_arrays(len(script), temperature=1.0, top_p=1.0, top_k=0, seed=0)
    return given, jnp.asarray(script)


def _recompiles(net: Network, params: Params, case: SamplerCase) -> int:
    """Programs that later rollouts compile, although their settings and prompts differ."""
    rng = np.random.default_rng(0)
    limits = ForkJoin(max_new=case.tokens // 4 + 1, max_threads=case.lanes)
    protocol = ThreadWeaver(workloads.table(), limits)
    cfg = Sampler(
        rows=len(case.prompts), max_prompt=max(case.prompts), prefill_chunk=case.prefill_chunk
    )
    sampler = samplers.make_sampler(net, protocol, cfg)

    def rollouts(lengths: Sequence[int], **given: Any) -> None:
        prompts = [workloads.text(rng, length) for length in lengths]
        sampler(params, prompts, sampling_arrays(len(prompts), **given))

    rollouts(case.prompts, temperature=1.0, top_p=1.0, top_k=0, seed=0)
    with count_compiles() as compiles:
        rollouts(case.prompts[::-1], temperature=0.0, top_p=1.0, top_k=0, seed=1)
        rollouts(case.prompts, temperature=0.7, top_p=0.9, top_k=0, seed=2)
        rollouts(sorted(case.prompts), temperature=1.3, top_p=0.5, top_k=20, seed=3)
    return compiles.count
