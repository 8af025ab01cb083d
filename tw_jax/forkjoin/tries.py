"""Builds the training tries of rollouts from their calls.

Only this file decides which tokens are trained. Sequences are merged in `trie/tree.py`. A
trajectory becomes a trie. The rollouts of one prompt become a `Group`: one trie that also records
for each node the call that drew it and the sampler's log-prob.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tw_jax.forkjoin.calls import Call, Provenance, Trajectory
from tw_jax.trie.tree import Trie, build, merge_on_prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Rollouts of one prompt in one trie: the prompt once, then the nodes of each rollout.

    Attributes:
      trie: The trie, with weight 1 on the nodes that a call drew and 0 elsewhere.
      rollout: [n] int32, the rollout of a node; -1 on the prompt.
      call: [n] int32, the call of that rollout which drew the node; -1 if it was not drawn.
      logp: [n] float32, the log-prob in nats that the sampler recorded; 0 if it was not drawn.
    """

    trie: Trie
    rollout: np.ndarray
    call: np.ndarray
    logp: np.ndarray


def trajectory_trie(trajectory: Trajectory) -> Trie:
    """The trie of a rollout: its joined path, then every call; weight 1 on sampled tokens.

    Exactly the tokens that the model drew are trained, each in the context in which it was drawn.
    Forced, returned and prompt tokens have no loss. Source: ThreadWeaver (arXiv:2512.07843), the
    figure of decomposed training.
    """
    calls = [call for call in trajectory.calls if len(call.sampled)]
    return _merge(trajectory, calls, (np.ones(len(call.sampled), np.float32) for call in calls))


def chain_trie(trajectory: Trajectory) -> Trie:
    """The sequential (AR) baseline: the joined path alone, every token after the prompt trained."""
    weight = (trajectory.provenance != Provenance.PROMPT).astype(np.float32)
    return build([trajectory.ids], [weight])


def group_tries(
    trajectories: Sequence[Trajectory], *, max_tokens: int | None = None
) -> list[Group]:
    """The rollouts of one prompt as tries that share the prompt and nothing else.

    Args:
      trajectories: K rollouts. `Group.rollout` counts them in this order, in every part.
      max_tokens: Maximum number of nodes of a trie, at most the length of a row. A larger group is
        cut between rollouts into several parts, and each has the prompt. A rollout that alone is
        larger is left out. Smaller parts fill rows better, larger ones share more. None never cuts.

    Returns:
      The parts of the group, a single one if it fits.

    Raises:
      ValueError: If the prompts differ, a call has no log-probs, or two calls of a rollout drew the
        same token in the same context.
    """
    rollouts = [_rollout(number, trajectory) for number, trajectory in enumerate(trajectories)]
    stem = trajectories[0].prompt_tokens
    most = math.inf if max_tokens is None else max_tokens
    parts: list[list[int]] = []
    size = math.inf
    for number, (trie, _, _) in enumerate(rollouts):
        if len(trie) > most:
            continue
        size += len(trie) - stem
        if size > most or not parts:
            parts.append([])
            size = len(trie)
        parts[-1].append(number)
    return [_join(rollouts, part, stem) for part in parts]


class _Rollout(NamedTuple):
    trie: Trie
    call: np.ndarray  # [n] int32, the call that drew the node, or -1
    logp: np.ndarray  # [n] float32, from the sampler


def _rollout(number: int, trajectory: Trajectory) -> _Rollout:
    drawn = [(n, call) for n, call in enumerate(trajectory.calls) if len(call.sampled)]
    calls = [call for _, call in drawn]
    logp = [np.zeros(1, np.float32)]
    for call in calls:
        if (
            call.logp is None
            or len(call.logp) != len(call.sampled)
            or not np.isfinite(call.logp).all()
        ):
            raise ValueError(
                f"Call {call.path} of rollout {number} lacks log-probs. Each of its "
                f"{len(call.sampled)} sampled tokens needs a finite one; sample with an engine "
                "that returns them."
            )
        logp.append(call.logp)
    sizes = [len(call.sampled) for call in calls]
    # Sampled tokens are numbered from 1 through all calls, and the number is the node's weight.
    bounds = np.cumsum([1, *sizes])
    counted = (np.arange(low, high, dtype=np.float32) for low, high in itertools.pairwise(bounds))
    trie = _merge(trajectory, calls, counted)
    which = trie.weight.astype(np.int64)
    # If two calls drew the same node, their weights were added. Beyond 2^24, float32 is not exact.
    # Both are found here.
    if not np.array_equal(np.sort(which[which > 0]), np.arange(1, bounds[-1])):
        raise ValueError(
            f"Two calls of rollout {number} drew the same token in the same context. Every sampled "
            "token must have a context of its own; give the calls of one rollout only."
        )
    numbers = np.repeat(np.array([-1, *(n for n, _ in drawn)], np.int32), [1, *sizes])
    trie = dataclasses.replace(trie, weight=(which > 0).astype(np.float32))
    return _Rollout(trie, numbers[which], np.concatenate(logp, dtype=np.float32)[which])


def _join(rollouts: Sequence[_Rollout], part: Sequence[int], stem: int) -> Group:
    tries = [rollouts[number].trie for number in part]
    sizes = [stem, *(len(trie) - stem for trie in tries)]

    def lay(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([arrays[0][:stem], *(array[stem:] for array in arrays)])

    return Group(
        trie=merge_on_prompt(tries, stem),
        rollout=np.repeat(np.array([-1, *part], np.int32), sizes),
        call=lay([rollouts[number].call for number in part]),
        logp=lay([rollouts[number].logp for number in part]),
    )


def _merge(trajectory: Trajectory, calls: Sequence[Call], weights: Iterable[np.ndarray]) -> Trie:
    """The trie of the joined path and of calls whose sampled tokens have weights."""
    # Generators, because the contexts of all calls are several times as large as the trie.
    sequences = (np.concatenate([call.context, call.sampled]) for call in calls)
    padded = (
        np.concatenate([np.zeros(len(call.context), np.float32), weight])
        for call, weight in zip(calls, weights, strict=True)
    )
    trie = build(itertools.chain([trajectory.ids], sequences), itertools.chain([None], padded))
    # Sharing is compared to one row per call, and the joined path is not a call.
    return dataclasses.replace(trie, source_tokens=trie.source_tokens - len(trajectory.ids))
