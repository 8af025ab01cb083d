"""Times the decoding of the same tokens as threads and as one lane.

Both run the sampler's program with given tokens, so that they differ only in their schedules.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import numpy as np

from tw_jax import sharding
from tw_jax.contracts import Params
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.rollouts.generate import Generator
from tw_jax.sample.draw import scripted
from tw_jax.sample.sampler import make_sampler


def wall_clock(
    generate: Generator, params: Params, trajectories: list[Trajectory], *, repeats: int = 3
) -> dict[str, float]:
    """Decodes trajectories again, one request at a time, and measures the time.

    The first round compiles both schedules and is not counted.

    Args:
      generate: Has the network, the protocol and the mesh.
      params: Parameters of the network.
      trajectories: The trajectories to decode.
      repeats: Number of counted rounds. In each, threads are followed by one lane.

    Returns:
      `wall_ratio`, threads over one lane, of the medians, and both medians in seconds.
    """
    protocol, network = generate.sampler.protocol, generate.sampler.network
    longest = max(len(t.ids) - t.prompt_tokens for t in trajectories)
    one = {"max_new": longest, "parallel": False}
    alone = ThreadWeaver(protocol.table, _with(protocol.limits, **one))
    cfg = _with(generate.sampler.cfg, rows=1)
    samplers_of = [
        (make_sampler(network, used, cfg, draw=scripted), script)
        for used, script in ((protocol, _script_of_calls), (alone, _script_of_path))
    ]
    times: list[list[float]] = [[], []]
    with sharding.use(generate.mesh, sharding.sampling(generate.rules)):
        for turn in range(repeats + 1):
            for kind, (run_sampler, script) in enumerate(samplers_of):
                spent = 0.0
                for trajectory in trajectories:
                    given = script(trajectory, trajectories)
                    prompt = trajectory.ids[: trajectory.prompt_tokens]
                    begin = time.perf_counter()
                    state = run_sampler.decode(params, [prompt], given)
                    jax.block_until_ready(state)
                    spent += time.perf_counter() - begin
                if turn:
                    times[kind].append(spent)
    threads, lane = map(statistics.median, times)
    return {
        "wall_ratio": threads / lane,
        "wall_threads_seconds": threads,
        "wall_lane_seconds": lane,
    }


def _script_of_calls(trajectory: Trajectory, among: list[Trajectory]) -> np.ndarray:
    """[1, R, N], the sampled ids of each call, in one shape for all trajectories."""
    calls = max(len(t.calls) for t in among)
    length = max(len(call.sampled) for t in among for call in t.calls)
    script = np.zeros((1, calls, length), np.int32)
    for number, call in enumerate(trajectory.calls):
        script[0, number, : len(call.sampled)] = call.sampled
    return script


def _script_of_path(trajectory: Trajectory, among: list[Trajectory]) -> np.ndarray:
    """[1, 1, N], the joined path after the prompt. One lane samples it, forced tokens included."""
    length = max(len(t.ids) - t.prompt_tokens for t in among)
    script = np.full((1, 1, length), trajectory.ids[-1], np.int32)
    path = trajectory.ids[trajectory.prompt_tokens :]
    script[0, 0, : len(path)] = path
    return script


def _with(cfg: Any, **changes: Any) -> Any:
    return type(cfg)(**{**vars(cfg), **changes})
