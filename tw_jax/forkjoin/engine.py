"""The interface of an engine: token ids in, a stream of token ids and log-probs out.

An engine answers one request at a time and has no notion of threads; several requests may be open
at once. Everything that samples implements this interface: a model in this process, a client of a
server, or a script in a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Protocol as Interface

import numpy as np

from tw_jax.forkjoin.protocol import Request, Result


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """The next ids of an answer, one or more.

    Attributes:
      sampled: [m] int32 ids, in order.
      logp: [m] float32, nats, as `Call.logp`; None if the engine does not return log-probs.
      failed: True in the last chunk of a call that failed; its ids may be empty.
    """

    sampled: np.ndarray
    logp: np.ndarray | None = None
    failed: bool = False


class Engine(Interface):
    """Samples from a model."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Starts one call and streams its answer.

        The stream ends after the first stop id, which is part of the answer, or after
        `request.max_tokens` ids. Closing the stream (`aclose`, or cancelling the task that reads
        it) cancels the call. The same request has the same answer whatever else runs at the time.

        A call that fails must not raise: its last chunk has `failed=True`, and the chunks before
        it hold what arrived, so that no error loses a trajectory.
        """
        ...


async def answer(engine: Engine, request: Request, *, timeout: float | None = None) -> Result:
    """Reads one call to its end.

    Args:
      engine: what answers.
      request: the call.
      timeout: Seconds that the call may take; None never cancels it. A call that takes longer is
        cancelled and counts as failed.

    Returns:
      All ids that arrived. `logp` is None if a chunk had none.
    """
    chunks: list[Chunk] = []
    late = False
    async with contextlib.aclosing(engine.generate(request)) as stream:
        try:
            async with asyncio.timeout(timeout):
                async for chunk in stream:
                    chunks.append(chunk)
        except TimeoutError:
            late = True
    logp = [chunk.logp for chunk in chunks if chunk.logp is not None]
    return Result(
        np.concatenate([np.zeros(0, np.int32), *(chunk.sampled for chunk in chunks)]),
        np.concatenate([np.zeros(0, np.float32), *logp]) if len(logp) == len(chunks) else None,
        failed=late or any(chunk.failed for chunk in chunks),
    )
