"""Runs a `Protocol` over an `Engine`, in token ids: ids in, ids and log-probs out.

An engine knows no threads and a protocol knows no engine. Engines that do real work stand higher
up; replay of written text is one too (`forkjoin/replay.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol as Interface

import numpy as np

from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.protocol import Protocol, Request, Result, steps


class Engine(Interface):
    """Answers requests; those of one list may run side by side."""

    def generate(self, requests: Sequence[Request]) -> Sequence[Result]:
        """One result for each request, in order; a failed call returns empty, never raises."""
        ...


def run(protocol: Protocol, engine: Engine, prompt: np.ndarray) -> Trajectory:
    """One rollout, from a prompt to its trajectory.

    Args:
      protocol: the method.
      engine: what answers its calls.
      prompt: [n] int32 ids.
    """
    rollout = steps(protocol, prompt)
    try:
        requests = next(rollout)
        while True:
            requests = rollout.send(engine.generate(requests))
    except StopIteration as stop:
        return stop.value
