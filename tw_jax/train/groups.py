"""Groups of rollouts on the host: advantages, token weights, and rows for the device.

A group is all rollouts of one prompt. Each rollout has one advantage, which applies to every token
that it sampled. All denominators are computed here, where all rollouts of a step are known: each
token gets a weight, the loss is the weighted sum, and the device divides nothing. Therefore
padding, the order of rows, their packing and the number of microbatches cannot change a step.

For example, with `mean = "token"` and rollouts of 3 and 5 tokens, every token has weight 1 / 8.
With "sequence_mean" the tokens of the first have weight 1 / 6 and those of the second 1 / 10.
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
    """How the losses of a step's tokens are averaged; see `token_weights`.

    Attributes:
      mean: "token" is the mean over all tokens of the step (the paper's formula), "sequence_mean"
        the mean over rollouts of their token means, "sequence_sum" the mean over rollouts of their
        sums, and "micro_batch" the mean that ThreadWeaver's trainer computes.
      norm_tokens: Divisor of a rollout's sum in "sequence_sum". The longest allowed response gives
        Dr. GRPO's mean (arXiv:2503.20783).
      micro_batch_tokens: Tokens of a micro-batch in "micro_batch", contexts included.
    """

    mean: Literal["token", "sequence_mean", "sequence_sum", "micro_batch"] = "token"
    norm_tokens: int = 1
    micro_batch_tokens: int = 10_240

    def check(self) -> None:
        """Raises ValueError for sizes below 1."""
        require(self, "norm_tokens", "micro_batch_tokens", least=1)


def advantages(reward: np.ndarray, normalise: Literal["mean", "std"] = "mean") -> np.ndarray:
    """Group advantages.

    mean: A[p, k] = r[p, k] - mean_k r[p, k]. It is not divided by the standard deviation, because
    in a group where every rollout is correct that would scale the small differences in acceleration
    up to unit size. Source: ThreadWeaver (arXiv:2512.07843), P-GRPO.
    std: A[p, k] / (s[p] + 1e-6) with the unbiased standard deviation s. Source: GRPO
    (arXiv:2402.03300), as in ThreadWeaver's trainer.

    Args:
      reward: [P, K], one finite reward for each rollout.
      normalise: "mean" or "std".

    Returns:
      [P, K] float32, with zero mean over K.

    Raises:
      ValueError: If a reward is not finite, or if K is 1, so that there is nothing to compare with.
    """
    chex.assert_rank(reward, 2)
    if not np.isfinite(reward).all():
        group, rollout = np.argwhere(~np.isfinite(reward))[0]
        raise ValueError(
            f"The reward of rollout {rollout} of group {group} is {reward[group, rollout]}, which "
            "is not a finite number. Leave such groups out, and count them."
        )
    if reward.shape[1] < 2:
        raise ValueError(f"K = {reward.shape[1]} rollouts for each prompt must be at least 2.")
    reward = reward.astype(np.float64)
    centred = reward - reward.mean(axis=1, keepdims=True)
    if normalise == "std":
        centred /= reward.std(axis=1, ddof=1, keepdims=True) + 1e-6
    return centred.astype(np.float32)


def has_signal(reward: np.ndarray) -> np.ndarray:
    """Groups whose rewards vary, [P, K] -> [P] bool; in all others every advantage is 0.

    A group in which all rollouts are correct can still have signal, because their acceleration
    differs. The extremes are compared, because the computed variance of equal numbers may be above
    0.
    """
    chex.assert_rank(reward, 2)
    return reward.max(axis=1) > reward.min(axis=1)


class Scored(NamedTuple):
    """A group, or a part of one, with the advantages of its rollouts."""

    group: Group
    advantage: np.ndarray  # [K] float32, indexed by `Group.rollout`
    is_trained: np.ndarray | None = None  # [K] bool, False excludes a rollout; None trains all

    def drawn(self) -> np.ndarray:
        """Nodes to train, [n] bool."""
        drawn = self.group.trie.weight > 0
        return drawn if self.is_trained is None else drawn & self.is_trained[self.group.rollout]


def token_weights(scored: Sequence[Scored], cfg: Aggregation) -> list[np.ndarray]:
    """The weight of each token in the loss of a step: loss = sum over tokens of weight * L.

    With N trained tokens, R rollouts and n_r trained tokens of rollout r:
    token: 1 / N. sequence_mean: 1 / (R n_r). sequence_sum: 1 / (R norm_tokens).
    micro_batch: (calls in the micro-batch / calls) / tokens in the micro-batch.

    The last is that of ThreadWeaver's trainer (arXiv:2512.07843), whose rows are engine calls. In
    it the weight of a token depends on the other calls of its micro-batch. The number of
    micro-batches is the trainer's, the smallest that `micro_batch_tokens` allows. Calls are
    assigned from the longest to the shortest, each to the micro-batch with the fewest tokens; the
    trainer balances by Karmarkar-Karp and over ranks, and counts its padding rows as calls. The
    assignment of calls of equal length depends on the order of the groups. The trainer's sequence
    means are over calls, and its normalised sum has no factor 1 / R; docs/decisions.md lists all
    factors.

    Args:
      scored: All groups of the step. A part of a group counts as a group.
      cfg: The kind of mean.

    Returns:
      For each group [n] float32, 0 for nodes that are not trained.

    Raises:
      ValueError: If a call is longer than a micro-batch.
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
    """Numbers the distinct pairs of two arrays, and returns the number of each element's pair."""
    pairs = major * (minor.max(initial=0) + 1) + minor.astype(np.int64)
    return np.unique(pairs, return_inverse=True)[1]


def _micro_batch_weights(call: np.ndarray, depth: np.ndarray, limit: int) -> np.ndarray:
    """Weights of tokens, [n] float64, from the number of their call and their depth in it."""
    tokens = np.bincount(call)
    length = np.zeros_like(tokens)
    np.maximum.at(length, call, depth + 1)
    if length.max(initial=0) > limit:
        raise ValueError(
            f"Aggregation.micro_batch_tokens = {limit} must be at least {length.max()}, the length "
            "of the longest call with its context. Raise it."
        )
    load = np.zeros(min(len(length), math.ceil(length.sum() / limit)))
    part = np.zeros(len(length), np.int64)
    # Calls of equal length are ordered by their tokens, so that fewer ties depend on their order.
    for number in np.lexsort((-tokens, -length)):
        part[number] = load.argmin()
        load[part[number]] += length[number]
    calls = np.bincount(part, minlength=len(load))
    in_part = np.bincount(part, weights=tokens, minlength=len(load))
    return (calls / max(len(length), 1) / np.maximum(in_part, 1))[part[call]]


class PolicyBatch(struct.PyTreeNode):
    """Rows of groups for one step. Where the weight is 0 no other field has an effect."""

    trie: TrieBatch  # with the weights of `token_weights`
    advantage: jax.Array  # [R, T] float32, of the rollout that sampled the node
    sampler_logp: jax.Array  # [R, T] float32 nats, as recorded
    rollout: jax.Array  # [R, T] int32, from 0 in each row; also 0 on prompts and padding
    old_logp: jax.Array | None = None  # [R, T] float32 nats; None: the current policy's
    ref_logp: jax.Array | None = None  # [R, T] float32 nats of a reference model


def pack_groups(
    updates: Sequence[Sequence[Scored]],
    cfg: Aggregation = Aggregation(),  # noqa: B008  (immutable)
    *,
    packing: Packing,
    microbatch_rows: int = 1,
    stats: PackingStats | None = None,
) -> PolicyBatch:
    """Computes the token weights of a step's groups and packs the groups into rows.

    Args:
      updates: The groups of each inner step, without those that have no signal.
      cfg: The mean over the tokens of an inner step.
      packing: Only `row_tokens` is read.
      microbatch_rows: Rows that run at a time, one part of an inner step. All inner steps have the
        same number of parts, a power of two, and parts after the last group are empty. So a few
        compiled programs serve batches of all sizes.
      stats: Totals to add to; None counts nothing.

    Returns:
      A batch of numpy arrays, [R, row_tokens], without `old_logp` and `ref_logp`. Row
      (slot * parts + part) * inner steps + i belongs to inner step i, which is the order in which
      `split_rows` separates them.

    Raises:
      ValueError: If a trie is longer than a row.
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
            # Rollouts are numbered again from 0, so that a row never has more of them than tokens.
            found, local = np.unique(rollout, return_inverse=True)
            rollouts[here] = np.maximum(local - int(found[0] < 0), 0) + before
            at, before = at + len(trie), before + len(found)
    return PolicyBatch(
        trie=trie_batch,
        advantage=advantages,  # pyright: ignore[reportArgumentType]  # numpy stands in for jax.Array
        sampler_logp=logps,  # pyright: ignore[reportArgumentType]
        rollout=rollouts,  # pyright: ignore[reportArgumentType]
    )
