"""From logits to a token and its log-prob under the very distribution that was sampled from.

Temperature, top-p, top-k and seeds are arrays, one for each row, so no value recompiles anything.
Keys are folded from (seed, call, position): a token never depends on its batch neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class SamplingParams(struct.PyTreeNode):
    """How each row samples."""

    temperature: jax.Array  # [B] float32, >= 0; 0 takes the likeliest token
    top_p: jax.Array  # [B] float32 in (0, 1]; 1 keeps every token
    top_k: jax.Array  # [B] int32, >= 0; 0 keeps every token
    seed: jax.Array  # [B] uint32, one for each request


def sampling_params(
    rows: int, *, temperature: float, top_p: float, top_k: int, seed: int
) -> SamplingParams:
    """The same settings for `rows` requests, with seeds `seed, seed + 1, ...`.

    Raises:
      ValueError: a setting is out of its range.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature = {temperature}: want 0 (the likeliest token) or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: want a share above 0 and at most 1 (1 keeps all).")
    if top_k < 0:
        raise ValueError(f"top_k = {top_k}: want 0 (keeps all) or more.")
    return SamplingParams(
        temperature=jnp.full(rows, temperature, jnp.float32),
        top_p=jnp.full(rows, top_p, jnp.float32),
        top_k=jnp.full(rows, top_k, jnp.int32),
        seed=jnp.asarray((seed + np.arange(rows)) % 2**32, jnp.uint32),
    )


def draw(
    logits: jax.Array, sampling: SamplingParams, call: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws one token for each lane.

    p = softmax(logits / temperature), restricted to the top_k likeliest tokens, then to the
    smallest set of likeliest tokens whose mass reaches top_p, renormalised. Ties at the border of
    a set are kept.

    Args:
      logits: [B, C, V] float32.
      sampling: one of each for each row, [B].
      call: [B, C] int32, number of the call in its rollout.
      position: [B, C] int32, index of the token in its call.

    Returns:
      tokens [B, C] int32 and logp [B, C] float32, nats, of the distribution sampled from: 0 where
      temperature is 0.
    """
    greedy = sampling.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None, None]
    truncates = ((sampling.top_p < 1) | (sampling.top_k > 0)) & ~greedy
    # Sorting a vocabulary costs more than decoding a small model: only where someone asks for it.
    kept = jax.lax.cond(
        truncates.any(), _truncate, lambda scaled, sampling: scaled, scaled, sampling
    )
    kept = jnp.where(truncates[:, None, None], kept, scaled)
    logp = jax.nn.log_softmax(kept, axis=-1)

    def one(row: jax.Array, seed: jax.Array, call: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), call), position)
        return jax.random.categorical(key, row)

    lanes = jax.vmap(one, in_axes=(0, None, 0, 0))
    sampled = jax.vmap(lanes)(logp, sampling.seed, call, position)
    tokens = jnp.where(greedy[:, None], logits.argmax(-1), sampled).astype(jnp.int32)
    drawn = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    return tokens, jnp.where(greedy[:, None], 0.0, drawn)


def _truncate(scaled: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Logits with everything outside top-k and top-p at a floor that no draw reaches."""
    order = _order(scaled)
    count = jnp.where(sampling.top_k > 0, sampling.top_k, scaled.shape[-1])[:, None, None]
    border = _lowest(order, jnp.ones_like(scaled), count.astype(scaled.dtype))
    mass = jnp.where(order >= border, jax.nn.softmax(scaled, axis=-1), 0.0)
    # Rounding can carry the sum past 1, and top_p = 1 drops nothing.
    share = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)[:, None, None]
    share *= mass.sum(axis=-1, keepdims=True)
    border = jnp.maximum(border, _lowest(order, mass, share))
    return jnp.where(order >= border, scaled, jnp.finfo(scaled.dtype).min)


def _order(x: jax.Array) -> jax.Array:
    """Integers that compare as the float32 numbers do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def _lowest(order: jax.Array, weight: jax.Array, limit: jax.Array) -> jax.Array:
    """The lowest border above which less weight lies than the limit.

    Found bit by bit, for a vocabulary that is split over devices would be gathered to be sorted.

    Args:
      order: [B, C, V] int32.
      weight: [B, C, V] float32, at least 0.
      limit: [B, 1, 1] or [B, C, 1] float32, above 0.

    Returns:
      [B, C, 1] int32.
    """
    extremes = jnp.iinfo(jnp.int32)

    def halve(_, bounds):
        fails, holds = bounds
        middle = (fails >> 1) + (holds >> 1) + (fails & holds & 1)
        above = jnp.where(order > middle, weight, 0.0).sum(axis=-1, keepdims=True)
        is_enough = above < limit
        return jnp.where(is_enough, fails, middle), jnp.where(is_enough, middle, holds)

    shape = (*order.shape[:-1], 1)
    start = (jnp.full(shape, extremes.min), jnp.full(shape, extremes.max))
    return jax.lax.fori_loop(0, 32, halve, start)[1]


def scripted(
    logits: jax.Array, script: jax.Array, call: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Takes the tokens of a script, in place of `draw`, and the model's own log-probs of them.

    Args:
      logits: [B, C, V] float32.
      script: [B, calls, tokens] int32 ids. After its ends the last call and token repeat.
      call: [B, C] int32, number of the call in its rollout.
      position: [B, C] int32, index of the token in its call.

    Returns:
      ([B, C] int32 tokens, [B, C] float32 log-probs at temperature 1, in nats).
    """
    tokens = script_tokens(script, call, position)
    logp = jax.nn.log_softmax(logits, axis=-1)
    return tokens, jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]


def script_tokens(script: jax.Array, call: jax.Array, position: jax.Array) -> jax.Array:
    """[B, C] int32 ids of a script at these calls and positions; see `scripted`."""
    row = jnp.arange(len(script))[:, None]
    last_call, last_token = script.shape[1] - 1, script.shape[2] - 1
    return script[row, jnp.minimum(call, last_call), jnp.minimum(position, last_token)]
