"""Token costs of a trajectory: all tokens, tokens on the longest path, and their ratios.

There are two ways to count. `cost_from_ids` reads the structure from the text, as ThreadWeaver's
reward does. `cost_from_calls` counts the calls that were made in parallel, so threads that a model
wrote one after another save nothing.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from tw_jax.forkjoin.calls import Trajectory
from tw_jax.tokenizer.interface import Tokenizer


@dataclasses.dataclass(frozen=True)
class Tags:
    """The ids of the four tags from which the structure is read."""

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
      total: All tokens.
      longest: Tokens on the critical path. All thread tags count, but only the longest body.
      in_blocks: Tokens inside blocks, thread tags included.
      blocks: Number of blocks.
      threads: Number of threads.
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
        """Share of the tokens that are inside blocks."""
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
    """The cost of a text, read from its tags in one pass.

    Outside blocks every token is sequential. Inside a block, tokens outside threads and the thread
    tags are sequential too. The body of a thread ends at its `</Thread>` and may contain any other
    token. A thread or block that is still open ends with the text.
    Source: ThreadWeaver (arXiv:2512.07843), acceleration reward.

    Args:
      ids: [n] int32. Leave out the prompt (`ids[prompt_tokens:]`), or include it as the reference's
        reward does.
      tags: The four tag ids.
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
    """The cost in sampled tokens. On the longest path, each round costs its longest thread.

    Forced tokens and prompt tokens do not count, because they take prefill and no decoding steps.
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
