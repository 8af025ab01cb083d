"""The record of a rollout: engine calls, the provenance of their tokens, and the joined path.

A call is one request to an engine: a context (ids) and the ids that were sampled from it. A
trajectory is the calls of one rollout in the order in which the protocol made them, and the joined
path, the linear text in which threads follow one another. Training, cost, grading and plots read
this record and nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

import numpy as np


class Provenance(enum.IntEnum):
    """Who produced a token of a context or of a joined path."""

    PROMPT = 0
    """Given by the user: chat template and question."""
    SAMPLED = 1
    """Drawn from the model in this very context."""
    FORCED = 2
    """Written by the protocol: thread headers, closers, the newline of a join."""
    RETURNED = 3
    """Drawn by a child call and returned to the parent at a join."""


class StopReason(enum.Enum):
    """Why a call ended."""

    EOS = "eos"
    STOP = "stop"
    """One of the protocol's stop ids other than an end of sequence; it is the last sampled id."""
    LENGTH = "length"
    """The call's own token limit; no stop id was drawn."""
    ERROR = "error"
    """The engine failed; `sampled` holds what arrived before, possibly nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One engine request and its answer.

    Attributes:
      path: () for the parent; (round, label) for a thread, label as written in its outline.
      context: [n] int32 ids that the engine was given.
      provenance: [n] int8, a `Provenance` for each context id.
      sampled: [m] int32 ids that the engine drew, the stop id or end of sequence included.
      logp: [m] float32 log-probs in nats, of the distribution that the ids were sampled from. At
        temperature 0, where all of these would be 0, they are the model's own at temperature 1.
        None if the ids were not sampled (replay of a written text).
      stop_reason: why the call ended.
    """

    path: tuple[int | str, ...]
    context: np.ndarray
    provenance: np.ndarray
    sampled: np.ndarray
    logp: np.ndarray | None
    stop_reason: StopReason

    @property
    def is_thread(self) -> bool:
        """Whether this is a thread of a fork, not the parent."""
        return bool(self.path)


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """All calls of one rollout, and the joined path that they add up to.

    Attributes:
      prompt_tokens: number of leading ids of the joined path that are the prompt.
      calls: in protocol order: parent call 0, the threads of block 1, parent call 1, ...
      ids: [n] int32, the joined path.
      provenance: [n] int8. A thread's sampled tokens are RETURNED here, because they were sampled
        in another call's context; this includes thread 1, whose context is a prefix of this path.
      rounds: number of forks.
      finish: why the rollout ended: "eos", "length", "rounds", "budget", "unfinished_thread",
        "error".
      counts: events of interest, by name, zero ones left out: "stray_outlines" (no `<Outlines>`),
        "empty_outlines" (no number), "duplicate_outline", "dropped_outline"; threads closed by
        force, "thread_eos", "thread_length", "thread_error"; "engine_error" in a parent call.
    """

    prompt_tokens: int
    calls: tuple[Call, ...]
    ids: np.ndarray
    provenance: np.ndarray
    rounds: int
    finish: str
    counts: Mapping[str, int]
