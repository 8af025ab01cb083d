"""A step's groups on the host: advantages, what each token weighs, and rows for the device.

One advantage for a rollout, on every token that its calls drew. How tokens are averaged is decided
here, where all rollouts of a step are known: each token gets a weight, the loss is the weighted
sum, and the device divides nothing. So padding, the order of rows, their packing and the number of
parts cannot change a step. This file knows no reward and no loss; it is given groups of rollouts
and their rewards, and hands `train/pgrpo.py` a batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import chex
import jax
import numpy as np
from flax import struct

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.forkjoin.tries import Group
from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.pack import Packing, PackingStats, pack
from tw_jax.trie.tree import Trie


@configurable
class Aggregation:
    """How the losses of a step's tokens become one number; see `token_weights`.

    Attributes:
      mean: "token" is the mean over all tokens of the step (the paper's formula), "sequence_mean"
        the mean over rollouts of their token means, "sequence_sum" the mean over rollouts of their
        sums, "micro_batch" what ThreadWeaver's trainer computes.
      norm_tokens: what "sequence_sum" divides a rollout's sum by; the longest response makes it
        Dr. GRPO's (arXiv:2503.20783).
      micro_batch_tokens: tokens of a micro-batch in "micro_batch", contexts included.
    """

    mean: Literal["token", "sequence_mean", "sequence_sum", "micro_batch"] = "token"
    norm_tokens: int = 1
    micro_batch_tokens: int = 10_240

    def check(self) -> None:
        """Refuses sizes that cannot be divided by."""
        require(self, "norm_tokens", "micro_batch_tokens", least=1)


def advantages(reward: np.ndarray, normalise: Literal["mean", "std"] = "mean") -> np.ndarray:
    """Group advantages.

    mean: A[p, k] = r[p, k] - mean_k r[p, k]. No division by the standard deviation: where every
    rollout is right, it would blow the acceleration up to unit size. Source: ThreadWeaver
    (arXiv:2512.07843), P-GRPO.
    std: A[p, k] / (s[p] + 1e-6) with the unbiased standard deviation s. Source: GRPO
    (arXiv:2402.03300), as in ThreadWeaver's trainer.

    Args:
      reward: [P, K], one for each rollout, all finite.
      normalise: "mean" or "std".

    Returns:
      [P, K] float32, zero mean over K.

    Raises:
      ValueError: a reward is not finite, or K is 1 and there is nothing to compare with.
    """
    chex.assert_rank(reward, 2)
    if not np.isfinite(reward).all():
        group, rollout = np.argwhere(~np.isfinite(reward))[0]
        raise ValueError(
            f"The reward of rollout {rollout} of group {group} is {reward[group, rollout]}: want a "
            "finite number. Count such groups and leave them out."
        )
    if reward.shape[1] < 2:
        raise ValueError(f"K = {reward.shape[1]} rollouts for each prompt: want at least 2.")
    reward = reward.astype(np.float64)
    centred = reward - reward.mean(axis=1, keepdims=True)
    if normalise == "std":
        centred /= reward.std(axis=1, ddof=1, keepdims=True) + 1e-6
    return centred.astype(np.float32)


def has_signal(reward: np.ndarray) -> np.ndarray:
    """Groups whose rewards vary, [P, K] -> [P] bool; all others have advantage 0 throughout.

    It is the variance that counts, not a mean of 0 or 1: where all are right, what they saved still
    differs. Compared are the extremes, for a computed variance of equal numbers need not be 0.
    """
    chex.assert_rank(reward, 2)
    return reward.max(axis=1) > reward.min(axis=1)


class Scored(NamedTuple):
    """A group, or a part of one, and what its rollouts are worth."""

    group: Group
    advantage: np.ndarray  # [K] float32, by `Group.rollout`
    is_trained: np.ndarray | None = None  # [K] bool, False leaves a rollout out; None trains all

    def drawn(self) -> np.ndarray:
        """The nodes to train, [n] bool."""
        drawn = self.group.trie.weight > 0
        return drawn if self.is_trained is None else drawn & self.is_trained[self.group.rollout]


def token_weights(scored: Sequence[Scored], cfg: Aggregation) -> list[np.ndarray]:
    """What each token weighs in the loss of a step: loss = sum over tokens of weight * L.

    With N tokens, R rollouts and n_r tokens of rollout r, counting only what is trained:
    token: 1 / N. sequence_mean: 1 / (R n_r). sequence_sum: 1 / (R norm_tokens).
    micro_batch: (calls in the micro-batch / calls) / tokens in the micro-batch.

    The last is ThreadWeaver's trainer (arXiv:2512.07843), whose rows are engine calls and whose
    means depend on the company of a token. Its number of micro-batches is kept, the least one for
    `micro_batch_tokens`; calls go, the longest first, to the shortest micro-batch, where the
    trainer balances by Karmarkar-Karp, over ranks, and lets its padding rows count as calls. Which
    of two calls of one length goes where depends on the order of the groups. The trainer's sequence
    means are over calls, and its normalised sum has no 1 / R; docs/decisions.md has all factors.

    Args:
      scored: all groups of the step. Parts of a group count as if they were whole.
      cfg: `Aggregation`.

    Returns:
      For each group [n] float32, 0 on nodes that are not trained.

    Raises:
      ValueError: a call is longer than a micro-batch.
    """
    if not scored:
        return []
    trained = np.concatenate([s.drawn() for s in scored])
    sizes = [len(s.group.trie) for s in scored]
    owner = _numbers(
        np.repeat(np.arange(len(scored)), sizes)[trained],
        np.concatenate([s.group.rollout for s in scored])[trained],
    )
    weight = np.zeros(len(trained))
    if cfg.mean == "token":
        weight[trained] = 1 / max(trained.sum(), 1)
    elif cfg.mean == "micro_batch":
        owner = _numbers(owner, np.concatenate([s.group.call for s in scored])[trained])
        depth = np.concatenate([s.group.trie.depth for s in scored])[trained]
        weight[trained] = _micro_batch_weights(owner, depth, cfg.micro_batch_tokens)
    else:
        tokens = np.bincount(owner)
        each = tokens if cfg.mean == "sequence_mean" else np.full_like(tokens, cfg.norm_tokens)
        weight[trained] = (1 / (len(tokens) * each))[owner]
    return np.split(weight.astype(np.float32), np.cumsum(sizes)[:-1])


def _numbers(major: np.ndarray, minor: np.ndarray) -> np.ndarray:
    """Counts the distinct pairs of two arrays of numbers; for each place, which pair it has."""
    pairs = major * (minor.max(initial=0) + 1) + minor.astype(np.int64)
    return np.unique(pairs, return_inverse=True)[1]


def _micro_batch_weights(call: np.ndarray, depth: np.ndarray, limit: int) -> np.ndarray:
    """For tokens with the number of their call and their depth in it, [n] float64."""
    tokens = np.bincount(call)
    length = np.zeros_like(tokens)
    np.maximum.at(length, call, depth + 1)
    if length.max(initial=0) > limit:
        raise ValueError(
            f"Aggregation.micro_batch_tokens = {limit}: want at least {length.max()}, the longest "
            "call with its context."
        )
    load = np.zeros(min(len(length), math.ceil(length.sum() / limit)))
    part = np.zeros(len(length), np.int64)
    # Equal lengths in the order of their tokens, so that fewer ties depend on the order of calls.
    for number in np.lexsort((-tokens, -length)):
        part[number] = load.argmin()
        load[part[number]] += length[number]
    calls = np.bincount(part, minlength=len(load))
    in_part = np.bincount(part, weights=tokens, minlength=len(load))
    return (calls / max(len(length), 1) / np.maximum(in_part, 1))[part[call]]


class PolicyBatch(struct.PyTreeNode):
    """Rows of groups for one step. What is not trained has weight 0, and no other field matters."""

    trie: TrieBatch  # its weight is the one of `token_weights`
    advantage: jax.Array  # [R, T] float32, of the rollout that drew the node
    sampler_logp: jax.Array  # [R, T] float32 nats, as recorded
    rollout: jax.Array  # [R, T] int32, counted from 0 in each row; 0 on prompts and padding too
    old_logp: jax.Array | None = None  # [R, T] float32 nats before the first inner step; None: now
    ref_logp: jax.Array | None = None  # [R, T] float32 nats of a reference model


def pack_groups(
    updates: Sequence[Sequence[Scored]],
    cfg: Aggregation,
    *,
    packing: Packing,
    microbatch_rows: int,
    stats: PackingStats,
) -> PolicyBatch:
    """Weighs the tokens of a step's groups and lays the groups into rows.

    Args:
      updates: for each inner step its groups; those without signal left out.
      cfg: how tokens are averaged, within an inner step.
      packing: only `row_tokens` is read.
      microbatch_rows: rows that are run at a time, one part of an inner step. All inner steps have
        as many parts, a power of two; those behind the last group hold nothing. So a few programs
        serve batches of every size.
      stats: totals to add to.

    Returns:
      A batch of numpy arrays, [R, row_tokens], without `old_logp` and `ref_logp`. Row
      (slot * parts + part) * inner steps + i stands for inner step i, as `split_rows` takes them
      apart again.

    Raises:
      ValueError: a trie is longer than a row.
    """
    laid: dict[Trie, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    packed = []
    for scored in updates:
        tries = []
        for one, weight in zip(scored, token_weights(scored, cfg), strict=True):
            trie = dataclasses.replace(one.group.trie, weight=weight)
            rollout = one.group.rollout
            advantage = np.where(weight > 0, one.advantage[rollout], 0)
            laid[trie] = advantage, one.group.logp, rollout
            tries.append(trie)
        packed.append(pack(tries, packing, stats))
    needed = max(-(-len(rows) // microbatch_rows) for rows in packed)
    parts = 1 << max(needed - 1, 0).bit_length()
    filled = [rows + [[]] * (parts * microbatch_rows - len(rows)) for rows in packed]
    rows = [
        rows[part * microbatch_rows + slot]
        for slot in range(microbatch_rows)
        for part in range(parts)
        for rows in filled
    ]
    trie_batch = stack_rows(rows, packing.row_tokens)
    shape = trie_batch.tokens.shape
    advantages, logps = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    rollouts = np.zeros(shape, np.int32)
    for b, tries in enumerate(rows):
        at = before = 0
        for trie in tries:
            here = (b, slice(at, at + len(trie)))
            advantages[here], logps[here], rollout = laid[trie]
            # Counted anew, so that a row never has more rollouts than tokens.
            found, local = np.unique(rollout, return_inverse=True)
            rollouts[here] = np.maximum(local - int(found[0] < 0), 0) + before
            at, before = at + len(trie), before + len(found)
    return PolicyBatch(
        trie=trie_batch,
        advantage=advantages,  # pyright: ignore[reportArgumentType]  # numpy stands in for jax.Array
        sampler_logp=logps,  # pyright: ignore[reportArgumentType]
        rollout=rollouts,  # pyright: ignore[reportArgumentType]
    )
