"""Limits and policies of fork and join, for every method and for the jitted sampler."""

from __future__ import annotations

from typing import Literal

from tw_jax.bounds import require
from tw_jax.config import configurable


@configurable
class ForkJoin:
    """Limits and policies of fork and join.

    Attributes:
      max_context: Maximum tokens of the joined path, prompt included.
      max_new: Maximum tokens after the prompt, forced ones included.
      max_thread: Maximum sampled tokens of one thread.
      max_threads: Maximum threads of one fork. Further outlines are dropped and counted.
      max_rounds: Maximum forks of one rollout.
      unfinished_thread: What follows a thread without `</Thread>`. "continue" closes the thread and
        continues the rollout. "abort" also forces `</Parallel>` and ends the rollout, as the
        reference does.
      parallel: False decodes in one call that stops only at an end of sequence, as the AR baseline.
    """

    max_context: int = 40_960
    max_new: int = 40_960
    max_thread: int = 8_192
    max_threads: int = 8
    max_rounds: int = 16
    unfinished_thread: Literal["continue", "abort"] = "continue"
    parallel: bool = True

    def check(self) -> None:
        """Refuses limits that forbid every token."""
        limits = ("max_context", "max_new", "max_thread", "max_threads", "max_rounds")
        require(self, *limits, least=1)
