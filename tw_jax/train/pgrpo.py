"""P-GRPO on the device: the clipped policy-gradient loss of sampled tokens, and the train step.

Three policies assign a log-prob to each sampled token:

- the sampler, which drew the token and recorded `sampler_logp`. It has the same parameters as the
  old policy, but other kernels and shapes, so its numbers differ by rounding;
- the old policy, `old_logp`: the trainer's own forward pass before the first update of the step;
- the current policy, whose gradient is taken.

The ratio current / old is clipped as in PPO. The ratio old / sampler is a constant weight that
corrects for the difference between sampler and trainer (truncated importance sampling), and how far
it is from 1 is logged, because a large difference means that the two run different models. With a
single update per step the old policy is the current one, so no extra forward pass is needed.

The loss of a step is a plain sum of weight * loss over tokens. `train/groups.py` computed the
weights, and with them every denominator, on the host.
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
"""Log-ratios are clipped to this size before `exp`, in nats, as in ThreadWeaver's trainer."""

_MAX_AGREE = 0.9
"""If a larger share of tokens agrees within 5 %, a mismatch is due to a few tokens."""


@configurable
class PolicyLoss:
    """The loss of a sampled token.

    Attributes:
      clip_low: A token with a negative advantage has no gradient once its ratio is below
        1 - clip_low.
      clip_high: A token with a positive advantage has no gradient once its ratio is above
        1 + clip_high.
      dual_clip: Upper bound of the loss of a token with a negative advantage A, as a multiple of
        -A; above 1. None sets no bound.
      importance: Truncated importance sampling against the sampler's log-probs: for each "token",
        for the rollout as a "sequence", or "none".
      importance_cap: Importance weights are truncated at this value.
      kl_coef: Coefficient of the KL to a reference model. If it is not 0, batches need `ref_logp`.
      entropy_coef: Coefficient of the entropy bonus.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    importance: Literal["none", "token", "sequence"] = "token"
    importance_cap: float = 2.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def check(self) -> None:
        """Raises ValueError for bounds that clip everything and for negative coefficients."""
        require(self, "clip_low", least=0, most=1)
        require(self, "clip_high", "kl_coef", "entropy_coef", least=0)
        require(self, "dual_clip", above=1)  # At most 1 would clip the loss at ratio 1.
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
    """The loss of some rows. The loss of a step is the sum over all its rows.

    total = sum over nodes of weight * (w * L + kl_coef * K - entropy_coef * H), where
    L is the clipped surrogate, see `surrogate`; w the truncated importance weight, see
    `importance`; K = exp(d) - d - 1 with d = ref_logp - logp (k3,
    http://joschu.net/blog/kl-approx); and H the entropy. Source: ThreadWeaver (arXiv:2512.07843),
    P-GRPO, and its trainer for the terms that are off by default.

    Without `old_logp` the old policy is the current one: all ratios are 1, no token is clipped and
    no second pass is made.

    Args:
      network: The model.
      params: Its parameters; the only argument with a gradient.
      batch: [R, T].
      cfg: Coefficients and bounds.
      chunk_tokens: Nodes of a row that are unembedded at a time, see `token_logp`.
      temperature: Temperature at which the rollouts were sampled; log-probs are those of
        logits / temperature.

    Returns:
      (total, sums): the metrics of `make_pgrpo_step`, summed over trained tokens except `EXTREMES`.

    Raises:
      ValueError: If `kl_coef` is not 0 and there is no `ref_logp`, or if the temperature is not
        above 0.
    """
    _check(cfg, batch, temperature)
    scores = _scores(network, params, batch.trie, chunk_tokens, temperature=temperature)
    weight, is_trained = batch.trie.weight, batch.trie.weight > 0
    # The value of the current log-probs, without their gradient. The ratio below is then exactly 1
    # and its gradient is that of logp: the plain policy gradient, advantage * grad(logp).
    old = jax.lax.stop_gradient(scores.logp) if batch.old_logp is None else batch.old_logp
    # Prompts and padding have no recorded log-prob. A gap of 0 gives them the importance weight 1,
    # and adds nothing to the sums over the tokens of a rollout.
    gap = jnp.where(is_trained, old - batch.sampler_logp, 0)
    factor, is_capped = importance(gap, batch.rollout, cfg)
    cost, clips = surrogate(scores.logp - old, batch.advantage, cfg)
    policy = (weight * factor * cost).sum()
    total = policy

    def count(values: jax.Array) -> jax.Array:
        return jnp.where(is_trained, values, 0).sum()

    sums = {
        "tokens": is_trained.sum(),
        "policy_loss": policy,
        **{name: count(clipped) for name, clipped in clips.items()},
        "update_kl": count(old - scores.logp),
        "importance_mean": count(factor),
        "importance_capped": count(is_capped),
        **_mismatch(gap, is_trained),
    }
    if batch.ref_logp is not None:
        reference = _k3(batch.ref_logp - scores.logp)
        sums["reference_kl"] = count(reference)
        if cfg.kl_coef:
            total += cfg.kl_coef * (weight * reference).sum()
    # Entropy is logged even if it is not part of the loss. Sums never have a gradient.
    entropy: Any = scores.entropy
    if cfg.entropy_coef:
        total -= cfg.entropy_coef * (weight * entropy).sum()
    sums["entropy"] = count(entropy)
    return total, jax.lax.stop_gradient(sums)


EXTREMES = {"ratio_min": (jnp.minimum, jnp.inf), "ratio_max": (jnp.maximum, -jnp.inf)}
"""The scalars of `loss_sums` that do not add up over rows: (function of two, neutral element)."""


def surrogate(
    log_ratio: jax.Array, advantage: jax.Array, cfg: PolicyLoss
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped surrogate of each token.

    With r = exp(log_ratio), L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)). If A < 0, it is
    bounded once more, L = min(L, -A dual_clip), because -A r grows without limit as r grows.
    Sources: PPO (arXiv:1707.06347), equation 7; the two bounds from DAPO (arXiv:2503.14476); the
    dual clip from arXiv:1912.09729.

    Example with A = 1 and clip_high = 0.28: at r = 1.1 L = -1.1, and its gradient raises the
    token's probability. At r = 1.5 L = -1.28, a constant, so the token has no gradient. With
    A = -1 and r = 1.5, L = 1.5: pushing the probability down again is never clipped at this bound.

    Args:
      log_ratio: [R, T] log-probs of the current policy minus those of the old one, nats.
      advantage: [R, T] A.
      cfg: The bounds.

    Returns:
      (L, flags): [R, T] loss, and for each bound [R, T] bool, the tokens that it clipped and that
      therefore have no gradient.
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
    """Truncated importance weights from the sampler to the old policy, without a gradient.

    token: min(exp(old - sampler), cap). sequence: the same for the sum of old - sampler over all
    tokens of the rollout, from all of its calls. Source: truncated importance sampling, as in
    verl's rollout correction; V-trace (arXiv:1802.01561) truncates in the same way.

    Args:
      gap: [R, T] old - sampler in nats, 0 for tokens that are not trained.
      rollout: [R, T] int32, the rollout of each token. A rollout lies in a single row.
      cfg: `importance` and `importance_cap` are read.

    Returns:
      (weights [R, T], [R, T] bool whether a weight was truncated).
    """
    if cfg.importance == "none":
        return jnp.ones_like(gap), jnp.zeros(gap.shape, bool)
    if cfg.importance == "sequence":
        # Rollouts are numbered from 0 in each row, so there are at most T of them.
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
    temperature: float,
    chunk_tokens: int = 1024,
    microbatch_rows: int = 1,
    inner_steps: int = 1,
) -> Step:
    """Builds the train step: `inner_steps` updates of the optimiser for one `PolicyBatch`.

    With one update the old policy is the current one, and its log-probs need no pass of their own.
    With several, the log-probs of all rows are computed first, with the parameters that sampled
    them, and each update trains its own rows against these.

    Args:
      network: The model.
      optim: Optimiser and schedule.
      cfg: The loss.
      steps: Number of steps of the whole run, for the schedule. All updates of a step have the same
        learning rate.
      temperature: Temperature at which the rollouts were sampled.
      chunk_tokens: Nodes of a row that are unembedded at a time, see `token_logp`.
      microbatch_rows: Rows that run at a time. It must divide the number of rows of an update.
        Microbatches after the last row with a trained token are not run.
      inner_steps: Number of updates. Update i takes the rows i, i + inner_steps, ..., the order of
        `pack_groups`.

    Returns:
      step(state, batch: `PolicyBatch` [R, T]) -> (state, metrics). It is deterministic and uses no
      key. Metrics are float32 scalars:

      - loss and policy_loss, as aggregated; tokens, the number of trained ones.
      - Means over trained tokens: clipped_high, clipped_low, clipped_dual (shares); update_kl
        (old - new, nats); importance_mean, importance_capped; entropy; reference_kl if there is a
        reference.
      - The difference between the log-probs of trainer and sampler, before any update of this step:
        ratio_min and ratio_max of the probabilities, mismatch_mean (mean absolute difference in
        nats), mismatch_kl (k3), and mismatch_within_0.1, _1 and _5 (shares of tokens whose ratio is
        within that many per cent of 1).
      - Those of `state.update`. `_of_updates` combines the metrics of several updates.
    """
    axes = network.axes()
    logp = make_logp(
        network, chunk_tokens=chunk_tokens, temperature=temperature, microbatch_rows=microbatch_rows
    )

    def one_update(state: TrainState, batch: PolicyBatch) -> tuple[TrainState, Numbers]:
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
        # A batch without trained tokens has zero gradients, but momentum and weight decay would
        # still change parameters.
        state, applied = update(state, gradients, optim, steps=steps, is_empty=tokens == 0)
        whole = {name: sums.pop(name) for name in ("policy_loss", *EXTREMES)}
        means = {name: weighted_mean(x, denominator=tokens) for name, x in sums.items()}
        return state, {"loss": total, "tokens": tokens, **whole, **means, **applied}

    def step(state: TrainState, batch: PolicyBatch) -> tuple[TrainState, Numbers]:
        if inner_steps == 1:
            state, numbers = one_update(state, batch)
            return state, _without_infinities(numbers)
        batches = split_rows(batch, inner_steps)
        if batches.old_logp is None:
            batches = batches.replace(
                old_logp=jax.lax.map(lambda trie: logp(state.params, trie), batches.trie)
            )

        def one(now: TrainState, batch: PolicyBatch) -> tuple[TrainState, Numbers]:
            now, numbers = one_update(now, batch)
            # The step counter stays, so that all updates have the learning rate of this step.
            return now.replace(step=state.step), numbers

        moved, numbers = jax.lax.scan(one, state, batches)
        return moved.replace(step=state.step + 1), _without_infinities(_of_updates(numbers))

    return step


def _of_updates(numbers: Numbers) -> Numbers:
    """Combines the metrics of the updates of a step, [inner_steps] -> [] each.

    Tokens are summed, extremes are extremes of all updates, and `skipped` is the share of updates
    that changed nothing. All other metrics are means over updates, weighted by their tokens. So an
    update without trained tokens does not count, and a mean over tokens is the mean over all tokens
    of the step.
    """
    tokens = numbers["tokens"]
    weight = jnp.where(tokens.sum() > 0, tokens, 1)
    combine = {"tokens": jnp.sum, "skipped": jnp.mean}
    combine |= {"ratio_min": jnp.min, "ratio_max": jnp.max}

    def mean(values: jax.Array) -> jax.Array:
        return weighted_mean((weight * values).sum(), denominator=weight.sum())

    return {name: combine.get(name, mean)(x) for name, x in numbers.items()}


def _without_infinities(numbers: Numbers) -> Numbers:
    """Replaces the extremes of a step without trained tokens by a ratio of 1."""
    return numbers | {name: jnp.where(numbers["tokens"] > 0, numbers[name], 1) for name in EXTREMES}


def make_logp(
    network: Network, *, chunk_tokens: int, temperature: float, microbatch_rows: int
) -> Callable[[Params, TrieBatch], jax.Array]:
    """Builds the extra forward pass that inner steps and a reference model need.

    Args:
      network: The model.
      chunk_tokens: Nodes of a row that are unembedded at a time, see `token_logp`.
      temperature: Temperature at which the rollouts were sampled.
      microbatch_rows: Rows that run at a time. It must divide the number of rows of a batch.

    Returns:
      logp(params, batch [R, T]) -> [R, T] float32 nats, 0 where the weight is 0. It computes
      `old_logp` from the parameters before the first inner step, and `ref_logp` from those of the
      reference model.
    """

    def logp(params: Params, batch: TrieBatch) -> jax.Array:
        parts = split_rows(batch, _parts(batch, microbatch_rows))

        def one(number: jax.Array, found: jax.Array) -> jax.Array:
            part = part_of(parts, number)
            scores = _scores(network, params, part, chunk_tokens, temperature=temperature)
            return found.at[number].set(jnp.where(part.weight > 0, scores.logp, 0))

        empty = constrain(jnp.zeros(parts.tokens.shape, jnp.float32), (None, "rows", "tokens"))
        found = jax.lax.fori_loop(0, _trained_parts(batch, microbatch_rows), one, empty)
        return found.swapaxes(0, 1).reshape(batch.tokens.shape)

    return logp


def _scores(
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
    """exp(d) - d - 1, d = log(q / p): an unbiased estimate of KL(p, q) from samples of p, >= 0."""
    log_ratio = jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(log_ratio) - log_ratio


def _mismatch(gap: jax.Array, is_trained: jax.Array) -> Sums:
    """Differences between trainer and sampler; `gap` is 0 for tokens that are not trained."""
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
            f"temperature = {temperature} must be above 0, because greedy sampling has no "
            "log-probs to train on."
        )
    if cfg.kl_coef and batch.ref_logp is None:
        raise ValueError(
            f"PolicyLoss.kl_coef = {cfg.kl_coef} and the batch has no ref_logp, the log-probs of a "
            "reference model. Compute them with make_logp, or set kl_coef to 0."
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
    """Number of parts to run, up to the last one that has a trained token."""
    trains = split_rows((batch.weight > 0).any(axis=1), _parts(batch, microbatch_rows)).any(axis=1)
    return jnp.max(jnp.arange(1, len(trains) + 1) * trains)


def refuse_mismatch(most: float, index: int, numbers: Mapping[str, float]) -> None:
    """Stops a run whose trainer and sampler disagree.

    The mean decides, not the extremes, because in bfloat16 one token in a million can be off by a
    factor of two in a correct run. The advice depends on how many tokens disagree.

    Args:
      most: Allowed KL in nats, `Pgrpo.max_mismatch`.
      index: Number of the step.
      numbers: Metrics of the step.

    Raises:
      ValueError: If the KL is above `most`, or is not a number.
    """
    if (kl := numbers["mismatch_kl"]) <= most:
        return
    near = numbers["mismatch_within_5"]
    if not math.isfinite(kl):
        advice = (
            "A log-prob is not a number, so the parameters have diverged. Look at grad_norm of the "
            "previous steps, and resume from an earlier checkpoint with a lower Optim.peak_lr."
        )
    elif near >= _MAX_AGREE:
        advice = (
            "Most tokens agree, and a few to which the sampler gave a low probability make the "
            "difference. Look at their logp in this step's file in rollouts/. If the cause is "
            'rounding, set Model.compute_dtype = "float32" to remove it, or raise '
            "Pgrpo.max_mismatch to allow it."
        )
    else:
        advice = (
            "Most tokens disagree. If the run was resumed before this step, its rollouts may come "
            "from another mesh or another version of the package. Run the same command again, "
            'which samples them again. Otherwise run one step with Model.compute_dtype = "float32" '
            "in another workdir. If the ratios are near 1 there, the cause is rounding. If not, it "
            "is a bug; please report it."
        )
    raise ValueError(
        f"Step {index}: the KL between sampler and trainer is {kl:.3g} nats, and "
        f"Pgrpo.max_mismatch allows {most:g}. The trainer's probability of a token is "
        f"{numbers['ratio_min']:.4g} to {numbers['ratio_max']:.4g} times the sampler's, and for "
        f"{near:.1%} of the tokens it is within 5 % of it. {advice}"
    )
