"""Tokens in total, on the longest path, and the ratios between them: one definition for all.

There are two readings. `cost_from_ids` reads the structure of a text as ThreadWeaver's reward does;
prompt tokens are out unless asked for. `cost_from_calls` counts the calls that were made in
parallel, so threads that a model wrote one after the other earn nothing.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from tw_jax.forkjoin.calls import Trajectory
from tw_jax.tokenizer.interface import Tokenizer


@dataclasses.dataclass(frozen=True)
class Tags:
    """The four ids that the structure is read from."""

    parallel: int
    end_parallel: int
    thread: int
    end_thread: int


def tags_of(tokenizer: Tokenizer) -> Tags:
    """The tags' ids in a tokenizer."""
    names = ("<Parallel>", "</Parallel>", "<Thread>", "</Thread>")
    return Tags(*(tokenizer.id_of(name) for name in names))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Token counts of one trajectory.

    Attributes:
      total: all tokens.
      longest: tokens on the critical path; thread wrappers count, of bodies only the longest.
      in_blocks: tokens inside blocks, wrappers included.
      blocks: number of blocks.
      threads: number of threads.
    """

    total: int
    longest: int
    in_blocks: int
    blocks: int
    threads: int

    @property
    def acceleration(self) -> float:
        """1 - longest / total, in [0, 1)."""
        return 1 - self.longest / self.total if self.total else 0.0

    @property
    def parallel_ratio(self) -> float:
        """Share of the tokens that stand inside blocks."""
        return self.in_blocks / self.total if self.total else 0.0

    @property
    def tokens_per_block(self) -> float:
        """Mean tokens of a block."""
        return self.in_blocks / self.blocks if self.blocks else 0.0

    @property
    def threads_per_block(self) -> float:
        """Mean threads of a block."""
        return self.threads / self.blocks if self.blocks else 0.0


def cost_from_ids(ids: np.ndarray, tags: Tags) -> Cost:
    """One pass over ids. Source: ThreadWeaver (arXiv:2512.07843), acceleration reward.

    Outside blocks every token is sequential. Inside a block but outside threads tokens, thread
    tags included, belong to the block's sequential part; a thread's body runs to its `</Thread>`,
    whatever else it holds. An open thread or block is closed at the end.

    Args:
      ids: [n] int32; leave the prompt out (`ids[prompt_tokens:]`), or keep it in as the
        reference's reward does.
      tags: the four tag ids.
    """
    sequential = longest_threads = in_threads = in_blocks = blocks = threads = 0
    inside = in_thread = False
    body = longest = 0
    for token in np.asarray(ids).tolist():
        if in_thread:
            if token == tags.end_thread:
                in_thread, longest = False, max(longest, body)
                in_threads += body
                in_blocks += 1
            else:
                body += 1
        elif not inside:
            sequential += 1
            if token == tags.parallel:
                inside, longest = True, 0
                blocks += 1
        elif token == tags.end_parallel:
            inside = False
            longest_threads += longest
            sequential += 1
        else:
            in_blocks += 1
            if token == tags.thread:
                in_thread, body = True, 0
                threads += 1
    if in_thread:
        in_threads, longest = in_threads + body, max(longest, body)
    if inside:
        longest_threads += longest
    return Cost(
        total=sequential + in_blocks + in_threads,
        longest=sequential + in_blocks + longest_threads,
        in_blocks=in_blocks + in_threads,
        blocks=blocks,
        threads=threads,
    )


def cost_from_calls(trajectory: Trajectory) -> Cost:
    """What was really sampled, and the longest chain of it: each round costs its longest thread.

    Forced and prompt tokens are out: they take prefill, not decoding steps.
    """
    parent = sum(len(call.sampled) for call in trajectory.calls if not call.is_thread)
    rounds: dict[int | str, list[int]] = defaultdict(list)
    for call in trajectory.calls:
        if call.is_thread:
            rounds[call.path[0]].append(len(call.sampled))
    in_threads = sum(map(sum, rounds.values()))
    return Cost(
        total=parent + in_threads,
        longest=parent + sum(map(max, rounds.values())),
        in_blocks=in_threads,
        blocks=len(rounds),
        threads=sum(map(len, rounds.values())),
    )
