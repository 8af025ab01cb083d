"""Limits and policies of fork and join; every method and the jitted sampler read the same ones."""

from __future__ import annotations

from typing import Literal

from tw_jax.bounds import require
from tw_jax.config import configurable


@configurable
class ForkJoin:
    """Limits and policies of fork and join.

    Attributes:
      max_context: tokens of the joined path, prompt included.
      max_new: tokens after the prompt, forced ones included.
      max_thread: sampled tokens of one thread.
      max_threads: threads of one fork; the outlines after them are dropped and counted.
      max_rounds: forks of one rollout.
      unfinished_thread: after a thread without `</Thread>`: "continue" closes it and goes on,
        "abort" also forces `</Parallel>` and ends the rollout (the reference).
      parallel: False decodes in one call that stops at an end of sequence only (the AR baseline).
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
