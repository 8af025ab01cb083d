"""Runs a `Protocol` over an `Engine`: the threads of a fork are sampled at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.engine import Engine, answer
from tw_jax.forkjoin.protocol import Protocol, Request, Result, SamplingParams, steps


async def run_async(
    protocol: Protocol,
    engine: Engine,
    prompt: np.ndarray,
    *,
    sampling: SamplingParams = SamplingParams(),
    timeout: float | None = None,
) -> Trajectory:
    """One rollout, from a prompt to its trajectory.

    The trajectory does not depend on the order in which calls finish: each call has a seed of its
    own, made of the rollout's seed and the call's number. If this coroutine is cancelled, all open
    calls are cancelled, and it returns after they have ended.

    Args:
      protocol: the method.
      engine: what answers its calls.
      prompt: [n] int32 ids.
      sampling: how the rollout is sampled.
      timeout: Seconds that one call may take; None never cancels a call. A call that takes longer
        is cancelled, keeps the ids that arrived, and is counted as failed.

    Raises:
      ValueError: The prompt is empty, or the engine returns more ids than a request allows.
    """
    rollout = steps(protocol, prompt, sampling)
    try:
        requests = next(rollout)
        while True:
            requests = rollout.send(await _together(engine, requests, timeout))
    except StopIteration as stop:
        return stop.value


def run(
    protocol: Protocol,
    engine: Engine,
    prompt: np.ndarray,
    *,
    sampling: SamplingParams = SamplingParams(),
    timeout: float | None = None,
) -> Trajectory:
    """`run_async`, for code without an event loop; a notebook must await `run_async` instead."""
    return asyncio.run(run_async(protocol, engine, prompt, sampling=sampling, timeout=timeout))


async def _together(
    engine: Engine, requests: Sequence[Request], timeout: float | None
) -> list[Result]:
    """The answers in order; no call is left open when this returns or raises."""
    calls = [asyncio.ensure_future(answer(engine, r, timeout=timeout)) for r in requests]
    try:
        return await asyncio.gather(*calls)
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
