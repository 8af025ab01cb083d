"""Rewards the groups of a P-GRPO step, and packs them into the batch of the step.

Rewards are computed while groups are sampled, because a step samples until enough groups have
signal. The first of these groups then become the batch, and every rollout becomes a record with its
reward and advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from tw_jax.data.records import Rollout
from tw_jax.forkjoin.cost import Tags
from tw_jax.forkjoin.tries import group_tries
from tw_jax.rollouts.generate import RolloutGroup
from tw_jax.rollouts.judge import Verdict
from tw_jax.rollouts.reward import (
    CUT,
    Parts,
    Reward,
    exclude_long,
    finite_groups,
    refuse_short_rows,
    reward,
    reward_metrics,
    totals,
    trainable_groups,
)
from tw_jax.train.groups import (
    Aggregation,
    PolicyBatch,
    Scored,
    advantages,
    has_signal,
    pack_groups,
)
from tw_jax.trie.pack import Packing, PackingStats


class RewardedGroup(NamedTuple):
    """A group of K rollouts with verdicts and rewards."""

    group: RolloutGroup
    verdicts: Sequence[Verdict]
    parts: Sequence[Parts]
    rewards: np.ndarray  # [K] float64
    has_signal: bool  # all rewards are finite, they differ, and a rollout is trained


class StepBatch(NamedTuple):
    """The batch of a step, the records of its rollouts, and its metrics."""

    batch: PolicyBatch
    records: list[Rollout]
    numbers: dict[str, float]


def reward_groups(
    groups: Sequence[RolloutGroup],
    verdicts: Sequence[Sequence[Verdict]],
    cfg: Reward,
    *,
    tags: Tags,
    row_tokens: int,
) -> list[RewardedGroup]:
    """Rewards rollouts.

    Args:
      groups: P groups of K rollouts.
      verdicts: Verdicts on their answers. Every verdict except "correct" counts as not correct.
      cfg: The reward.
      tags: Ids of the tags, which some rewards read.
      row_tokens: Length of a row. Rollouts whose tries are longer are rewarded but not trained.
    """
    parts = [
        exclude_long(
            [
                reward(made, verdict, cfg, problem=group.problem, text=text, tags=tags)
                for made, verdict, text in zip(group.trajectories, found, group.texts, strict=True)
            ],
            group.trajectories,
            row_tokens,
        )
        for group, found in zip(groups, verdicts, strict=True)
    ]
    rewards = totals(parts, cfg)
    signal = finite_groups(rewards) & has_signal(rewards) & trainable_groups(parts)
    return [
        RewardedGroup(*one)
        for one in zip(groups, verdicts, parts, rewards, map(bool, signal), strict=True)
    ]


def pack_step(
    index: int,
    groups: Sequence[RewardedGroup],
    *,
    prompts: int,
    inner_steps: int,
    normalise: Literal["mean", "std"],
    aggregation: Aggregation,
    packing: Packing,
    microbatch_rows: int,
    fingerprint: str,
) -> StepBatch:
    """Packs the first groups with signal into rows; the others are recorded but not trained.

    Args:
      index: Number of the step, for messages.
      groups: All groups of the step.
      prompts: Maximum number of groups to train on.
      inner_steps: Number of updates over which the groups are divided.
      normalise: See `advantages`.
      aggregation: How tokens are averaged.
      packing: Tokens of a row.
      microbatch_rows: See `pack_groups`.
      fingerprint: Fingerprint of the tokenizer, for the records.

    Raises:
      ValueError: If every rollout is longer than a row.
    """
    parts = [one.parts for one in groups]
    rewards = np.stack([one.rewards for one in groups])
    if not trainable_groups(parts).any():
        made = [trajectory for one in groups for trajectory in one.group.trajectories]
        refuse_short_rows(index, made, packing.row_tokens)
    finite = finite_groups(rewards)
    advantage = np.zeros(rewards.shape, np.float32)
    advantage[finite] = advantages(rewards[finite], normalise)
    with_signal = np.flatnonzero([one.has_signal for one in groups])
    trained = with_signal[:prompts]
    stats = PackingStats()
    batch = pack_groups(
        [
            [scored for n in share for scored in _scored(groups[n], advantage[n], packing)]
            for share in np.array_split(trained, inner_steps)
        ],
        aggregation,
        packing=packing,
        microbatch_rows=microbatch_rows,
        stats=stats,
    )
    records = [
        rewarded.group.record(k, fingerprint=fingerprint, extra=extra)
        for n, rewarded in enumerate(groups)
        for k, extra in enumerate(_extras(n, rewarded, advantage[n], n in trained))
    ]
    verdicts = [verdict for one in groups for verdict in one.verdicts]
    finishes = [made.finish for one in groups for made in one.group.trajectories]
    numbers = {
        **reward_metrics(parts, rewards),
        "cut": float(np.mean([finish in CUT for finish in finishes])),
        "groups": len(trained),
        "groups_drawn": len(groups),
        "groups_with_signal": len(with_signal),
        "groups_not_finite": float((~finite).sum()),
        "untrained": sum(not one.is_trained for group in parts for one in group),
        "timeouts": verdicts.count("timeout"),
        "rows_filled": stats.rows_filled,
        "token_sharing": stats.token_sharing,
    }
    return StepBatch(batch, records, numbers)


def _scored(rewarded: RewardedGroup, advantage: np.ndarray, packing: Packing) -> list[Scored]:
    tries = group_tries(rewarded.group.trajectories, max_tokens=packing.row_tokens)
    is_trained = np.array([one.is_trained for one in rewarded.parts])
    return [Scored(trie, advantage, is_trained) for trie in tries]


def _extras(
    number: int, rewarded: RewardedGroup, advantage: np.ndarray, in_batch: bool
) -> list[dict[str, object]]:
    """The entries about reward and training in the record of each rollout of a group."""
    return [
        {
            **parts.record(total),
            "advantage": float(share),
            "group": number,
            "is_trained": in_batch and bool(parts.is_trained),
        }
        for parts, total, share in zip(rewarded.parts, rewarded.rewards, advantage, strict=True)
    ]
