"""P-GRPO on the device: the clipped, importance-corrected loss of sampled tokens, and the step.

The mathematics of the loss is here; what a token weighs in it, and so every denominator, was
decided in `train/groups.py`. This file knows no text, no reward and no sampler, only the log-probs
that the sampler recorded; it hands on a pure step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.contracts import Network, Params
from tw_jax.sharding import constrain
from tw_jax.train.groups import PolicyBatch
from tw_jax.train.loss import (
    Sums,
    TokenLogp,
    accumulate,
    part_of,
    split_rows,
    token_logp,
    weighted_mean,
)
from tw_jax.train.state import Numbers, Optim, Step, TrainState, update
from tw_jax.trie.batch import TrieBatch

MAX_LOG_RATIO = 20.0
"""Where log-ratios are cut before `exp`, in nats; so does ThreadWeaver's trainer."""

_MAX_AGREE = 0.9
"""Share of tokens within 5 % above which a mismatch is due to a few tokens."""


@configurable
class PolicyLoss:
    """The loss of a sampled token.

    Attributes:
      clip_low: a ratio below 1 - clip_low is not pushed further down.
      clip_high: a ratio above 1 + clip_high is not pushed further up.
      dual_clip: most that a token of negative advantage A may cost, times -A; above 1, or None.
      importance: truncated importance sampling against the sampler's log-probs: of each "token", of
        the rollout as a "sequence", or "none".
      importance_cap: weight at which importance sampling is truncated.
      kl_coef: of the KL to a reference model; needs `PolicyBatch.ref_logp` where it is not 0.
      entropy_coef: of the entropy, which is rewarded.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    importance: Literal["none", "token", "sequence"] = "token"
    importance_cap: float = 2.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def check(self) -> None:
        """Refuses bounds that clip everything or turn a penalty into a reward."""
        require(self, "clip_low", least=0, most=1)
        require(self, "clip_high", "kl_coef", "entropy_coef", least=0)
        require(self, "dual_clip", above=1)  # the loss at ratio 1 must not be clipped
        require(self, "importance_cap", above=0)


def loss_sums(
    network: Network,
    params: Params,
    batch: PolicyBatch,
    cfg: PolicyLoss,
    *,
    chunk_tokens: int,
    temperature: float,
) -> tuple[jax.Array, Sums]:
    """The loss of some rows; the loss of a step is the sum over all its rows.

    total = sum over nodes of weight * (w * L + kl_coef * K - entropy_coef * H), where
    L is the clipped surrogate, see `surrogate`; w the truncated importance weight, see
    `importance`; K = exp(d) - d - 1 with d = ref_logp - logp (k3, http://joschu.net/blog/kl-approx)
    and H the entropy. Source: ThreadWeaver (arXiv:2512.07843), P-GRPO; its trainer for the terms
    that are off by default.

    Without `old_logp` the old policy is the current one: all ratios are 1, nothing is clipped and
    no second pass is made.

    Args:
      network: the model.
      params: its parameters; the only argument to differentiate in.
      batch: [R, T].
      cfg: `PolicyLoss`.
      chunk_tokens: nodes per row unembedded at a time, see `token_logp`.
      temperature: at which the rollouts were sampled; log-probs are those of logits / temperature.

    Returns:
      (total, sums): what `make_pgrpo_step` reports, all but `EXTREMES` summed over trained tokens.

    Raises:
      ValueError: `kl_coef` is not 0 and there is no `ref_logp`, or a bad temperature.
    """
    _check(cfg, batch, temperature)
    said = _said(network, params, batch.trie, chunk_tokens, temperature=temperature)
    weight, is_trained = batch.trie.weight, batch.trie.weight > 0
    old = jax.lax.stop_gradient(said.logp) if batch.old_logp is None else batch.old_logp
    gap = jnp.where(is_trained, old - batch.sampler_logp, 0)
    factor, is_capped = importance(gap, batch.rollout, cfg)
    cost, clips = surrogate(said.logp - old, batch.advantage, cfg)
    policy = (weight * factor * cost).sum()
    total = policy

    def count(values: jax.Array) -> jax.Array:
        return jnp.where(is_trained, values, 0).sum()

    sums = {
        "tokens": is_trained.sum(),
        "policy_loss": policy,
        **{name: count(clipped) for name, clipped in clips.items()},
        "update_kl": count(old - said.logp),
        "importance_mean": count(factor),
        "importance_capped": count(is_capped),
        **_mismatch(gap, is_trained),
    }
    if batch.ref_logp is not None:
        reference = _k3(batch.ref_logp - said.logp)
        sums["reference_kl"] = count(reference)
        if cfg.kl_coef:
            total += cfg.kl_coef * (weight * reference).sum()
    # What does not enter the loss is told all the same, but never differentiated.
    entropy: Any = said.entropy
    if cfg.entropy_coef:
        total -= cfg.entropy_coef * (weight * entropy).sum()
    sums["entropy"] = count(entropy)
    return total, jax.lax.stop_gradient(sums)


EXTREMES = {"ratio_min": (jnp.minimum, jnp.inf), "ratio_max": (jnp.maximum, -jnp.inf)}
"""The numbers of `loss_sums` that do not add up over rows."""


def surrogate(
    log_ratio: jax.Array, advantage: jax.Array, cfg: PolicyLoss
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped surrogate of each token.

    With r = exp(log_ratio), L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and for A < 0
    then L = min(L, -A dual_clip). Sources: PPO (arXiv:1707.06347), equation 7; the two bounds from
    DAPO (arXiv:2503.14476); the dual clip from arXiv:1912.09729.

    Returns:
      (L, flags): which tokens were clipped, and so have no gradient, at which bound.
    """
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    plain = -advantage * ratio
    bounded = -advantage * jnp.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
    is_clipped = bounded > plain
    cost = jnp.where(is_clipped, bounded, plain)
    is_dual = jnp.zeros_like(is_clipped)
    if cfg.dual_clip is not None:
        most = -advantage * cfg.dual_clip
        is_dual = (advantage < 0) & (cost > most)
        cost = jnp.where(is_dual, most, cost)
    return cost, {
        "clipped_high": is_clipped & (advantage > 0),
        "clipped_low": is_clipped & (advantage < 0),
        "clipped_dual": is_dual,
    }


def importance(gap: jax.Array, rollout: jax.Array, cfg: PolicyLoss) -> tuple[jax.Array, jax.Array]:
    """Truncated importance weights from the sampler to the old policy; no gradient.

    token: min(exp(old - sampler), cap). sequence: the same of the sum over all tokens of the
    rollout, whatever call drew them. Source: truncated importance sampling, as in verl's rollout
    correction; V-trace (arXiv:1802.01561) truncates in the same way.

    Args:
      gap: [R, T] old - sampler in nats, 0 where not trained.
      rollout: [R, T] int32; a rollout stands in one row.
      cfg: `importance` and `importance_cap`.

    Returns:
      (weights [R, T], which of them were truncated).
    """
    if cfg.importance == "none":
        return jnp.ones_like(gap), jnp.zeros(gap.shape, bool)
    if cfg.importance == "sequence":
        sums = jax.vmap(lambda g, r: jax.ops.segment_sum(g, r, num_segments=g.shape[0]))
        gap = jnp.take_along_axis(sums(gap, rollout), rollout, axis=1)
    factor = jnp.exp(jnp.clip(jax.lax.stop_gradient(gap), -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jnp.minimum(factor, cfg.importance_cap), factor > cfg.importance_cap


def make_pgrpo_step(
    network: Network,
    optim: Optim,
    cfg: PolicyLoss,
    *,
    steps: int,
    chunk_tokens: int,
    temperature: float,
    microbatch_rows: int,
    inner_steps: int = 1,
) -> Step:
    """Builds the train step: `inner_steps` updates of the optimiser for one `PolicyBatch`.

    With one update the old policy is the current one and needs no pass of its own. With more, the
    log-probs of all rows are computed first, with the parameters that sampled them, and each update
    trains its own rows against these.

    Args:
      network: the model.
      optim: optimiser and schedule.
      cfg: the loss.
      steps: steps of the whole run, for the schedule; the updates of one step share its rate.
      chunk_tokens: nodes per row unembedded at a time, see `token_logp`.
      temperature: at which the rollouts were sampled.
      microbatch_rows: rows run at a time; divides the rows of every update. Microbatches after the
        last row that trains anything are not run.
      inner_steps: update i takes rows i, i + inner_steps, ..., as `pack_groups` lays them.

    Returns:
      step(state, batch: `PolicyBatch` [R, T]) -> (state, metrics). Deterministic: no key is used.
      Metrics are float32 scalars. loss and policy_loss: as aggregated. tokens: trained ones. Means
      over these: clipped_high, clipped_low, clipped_dual (shares); update_kl (old - new, nats);
      importance_mean, importance_capped; entropy; reference_kl where there is a reference.
      How far the trainer's log-probs are from the sampler's, before this and other inner steps:
      ratio_min and ratio_max, of the probabilities, mismatch_mean of the absolute
      difference in nats, mismatch_kl (k3), and mismatch_within_0.1, _1 and _5, shares of tokens
      whose ratio is so many per cent from 1. And those of `state.update`. Of several updates
      see `_of_updates`.
    """
    axes = network.axes()
    logp = make_logp(
        network, chunk_tokens=chunk_tokens, temperature=temperature, microbatch_rows=microbatch_rows
    )

    def move(state: TrainState, batch: PolicyBatch) -> tuple[TrainState, Numbers]:
        def objective(params: Params, part: PolicyBatch) -> tuple[jax.Array, Sums]:
            return loss_sums(
                network, params, part, cfg, chunk_tokens=chunk_tokens, temperature=temperature
            )

        gradients, total, sums = accumulate(
            objective,
            state.params,
            batch,
            accumulation_steps=_parts(batch.trie, microbatch_rows),
            axes=axes,
            extremes=EXTREMES,
            count=_trained_parts(batch.trie, microbatch_rows),
        )
        tokens = sums.pop("tokens")
        state, moved = update(state, gradients, optim, steps=steps, is_empty=tokens == 0)
        whole = {name: sums.pop(name) for name in ("policy_loss", *EXTREMES)}
        means = {name: weighted_mean(x, denominator=tokens) for name, x in sums.items()}
        return state, {"loss": total, "tokens": tokens, **whole, **means, **moved}

    def step(state: TrainState, batch: PolicyBatch) -> tuple[TrainState, Numbers]:
        if inner_steps == 1:
            state, numbers = move(state, batch)
            return state, _without_infinities(numbers)
        batches = split_rows(batch, inner_steps)
        if batches.old_logp is None:
            batches = batches.replace(
                old_logp=jax.lax.map(lambda trie: logp(state.params, trie), batches.trie)
            )

        def one(now: TrainState, batch: PolicyBatch) -> tuple[TrainState, Numbers]:
            now, numbers = move(now, batch)
            return now.replace(step=state.step), numbers

        moved, numbers = jax.lax.scan(one, state, batches)
        return moved.replace(step=state.step + 1), _without_infinities(_of_updates(numbers))

    return step


def _of_updates(numbers: Numbers) -> Numbers:
    """One number for the updates of a step, [inner_steps] -> [] each.

    Tokens are summed, extremes are extremes, and `skipped` is the share of updates that moved
    nothing. All else is the mean over updates, weighted by their tokens. So an update without a
    trained token has no part in it, and a mean over tokens is that over all tokens of the step.
    """
    tokens = numbers["tokens"]
    weight = jnp.where(tokens.sum() > 0, tokens, 1)
    combine = {"tokens": jnp.sum, "skipped": jnp.mean}
    combine |= {"ratio_min": jnp.min, "ratio_max": jnp.max}

    def mean(values: jax.Array) -> jax.Array:
        return weighted_mean((weight * values).sum(), denominator=weight.sum())

    return {name: combine.get(name, mean)(x) for name, x in numbers.items()}


def _without_infinities(numbers: Numbers) -> Numbers:
    """A step that trains nothing has no extremes, and reports ratios of 1."""
    return numbers | {name: jnp.where(numbers["tokens"] > 0, numbers[name], 1) for name in EXTREMES}


def make_logp(
    network: Network, *, chunk_tokens: int, temperature: float, microbatch_rows: int
) -> Callable[[Params, TrieBatch], jax.Array]:
    """Builds the extra pass that inner steps and a reference model need.

    Args:
      network: the model.
      chunk_tokens: nodes per row unembedded at a time, see `token_logp`.
      temperature: at which the rollouts were sampled.
      microbatch_rows: rows run at a time; divides the rows of every batch.

    Returns:
      logp(params, batch [R, T]) -> [R, T] float32 nats, 0 where weight is 0: `old_logp` of the
      parameters before the first inner step, `ref_logp` of a reference's.
    """

    def logp(params: Params, batch: TrieBatch) -> jax.Array:
        parts = split_rows(batch, _parts(batch, microbatch_rows))

        def one(number: jax.Array, found: jax.Array) -> jax.Array:
            part = part_of(parts, number)
            said = _said(network, params, part, chunk_tokens, temperature=temperature)
            return found.at[number].set(jnp.where(part.weight > 0, said.logp, 0))

        empty = constrain(jnp.zeros(parts.tokens.shape, jnp.float32), (None, "rows", "tokens"))
        found = jax.lax.fori_loop(0, _trained_parts(batch, microbatch_rows), one, empty)
        return found.swapaxes(0, 1).reshape(batch.tokens.shape)

    return logp


def _said(
    network: Network,
    params: Params,
    batch: TrieBatch,
    chunk_tokens: int,
    *,
    temperature: float,
) -> TokenLogp:
    hidden, _ = network.apply(params, batch.tokens, batch.depth, batch.span)
    return token_logp(
        network,
        params,
        hidden,
        batch=batch,
        chunk_tokens=chunk_tokens,
        temperature=temperature,
        with_entropy=True,
    )


def _k3(log_ratio: jax.Array) -> jax.Array:
    """exp(d) - d - 1, unbiased for the KL of samples' distribution to the other, never below 0."""
    log_ratio = jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(log_ratio) - log_ratio


def _mismatch(gap: jax.Array, is_trained: jax.Array) -> Sums:
    """How far the trainer is from the sampler; `gap` is 0 where nothing is trained."""
    off = jnp.abs(jnp.expm1(jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO)))
    return {
        "ratio_min": jnp.exp(jnp.where(is_trained, gap, jnp.inf).min()),
        "ratio_max": jnp.exp(jnp.where(is_trained, gap, -jnp.inf).max()),
        "mismatch_mean": jnp.abs(gap).sum(),
        "mismatch_kl": _k3(gap).sum(),
        **{
            f"mismatch_within_{percent:g}": (is_trained & (off <= percent / 100)).sum()
            for percent in (0.1, 1, 5)
        },
    }


def _check(cfg: PolicyLoss, batch: PolicyBatch, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature = {temperature}: want above 0, for what was not drawn by chance has no "
            "log-prob to train on."
        )
    if cfg.kl_coef and batch.ref_logp is None:
        raise ValueError(
            f"PolicyLoss.kl_coef = {cfg.kl_coef} and the batch has no ref_logp: want the log-probs "
            "of a reference model. Compute them with make_logp, or set kl_coef to 0."
        )


def _parts(batch: TrieBatch, microbatch_rows: int) -> int:
    rows = batch.tokens.shape[0]
    if microbatch_rows < 1 or rows % microbatch_rows:
        raise ValueError(
            f"microbatch_rows = {microbatch_rows} does not divide the batch's {rows} rows. Set it "
            "to a divisor of them."
        )
    return rows // microbatch_rows


def _trained_parts(batch: TrieBatch, microbatch_rows: int) -> jax.Array:
    """How many parts to run: none behind the last one that trains anything."""
    trains = split_rows((batch.weight > 0).any(axis=1), _parts(batch, microbatch_rows)).any(axis=1)
    return jnp.max(jnp.arange(1, len(trains) + 1) * trains)


def refuse_mismatch(most: float, index: int, numbers: Mapping[str, float]) -> None:
    """Stops a run whose trainer and sampler disagree.

    The mean decides, not the extremes: in bfloat16 one token of a million may be off by a factor of
    two where nothing is wrong. The advice depends on how many tokens disagree.

    Args:
      most: nats of KL that are allowed.
      index: number of the step.
      numbers: its metrics.

    Raises:
      ValueError: the KL is above `most`, or is no number.
    """
    if (kl := numbers["mismatch_kl"]) <= most:
        return
    near = numbers["mismatch_within_5"]
    if not math.isfinite(kl):
        advice = (
            "A log-prob is not a number, so the parameters have diverged. Look at grad_norm of the "
            "steps before, and resume from an earlier checkpoint with a lower Optim.peak_lr."
        )
    elif near >= _MAX_AGREE:
        advice = (
            "Most tokens agree, and a few that the sampler thought improbable make up the "
            "difference. Look at their logp in this step's file in rollouts/. If it is rounding, "
            'Model.compute_dtype = "float32" removes it, and Pgrpo.max_mismatch allows it.'
        )
    else:
        advice = (
            "Most tokens disagree. If the run was resumed before this step, its rollouts may be of "
            "another mesh or package. Run the same command again, which samples it once more. "
            'Otherwise run one step with Model.compute_dtype = "float32" in another workdir. If '
            "ratios are near 1 there, it is rounding. If not, it is a fault; please report it."
        )
    raise ValueError(
        f"Step {index}: sampler and trainer are {kl:.3g} nats of KL apart, want at most {most:g}; "
        f"the trainer's probability of a token is {numbers['ratio_min']:.4g} to "
        f"{numbers['ratio_max']:.4g} times the sampler's, and for {near:.1%} of the tokens it is "
        f"within 5 % of it. {advice}"
    )
