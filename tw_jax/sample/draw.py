"""From logits to a token and its log-prob.

The parameters of all rows are arrays, so no value of them compiles anything. Random keys are made
of (seed, call, position) alone: a token does not depend on the other rows of the batch, on its own
row, or on the time at which it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tw_jax.forkjoin.protocol import SamplingParams


class SamplingArrays(struct.PyTreeNode):
    """The `SamplingParams` of all rows, as arrays on the device."""

    temperature: jax.Array  # [B] float32
    top_p: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32
    seed: jax.Array  # [B] uint32


def stack_params(params: Sequence[SamplingParams]) -> SamplingArrays:
    """Arrays of the parameters of several rollouts, in order."""
    return SamplingArrays(
        temperature=jnp.asarray([p.temperature for p in params], jnp.float32),
        top_p=jnp.asarray([p.top_p for p in params], jnp.float32),
        top_k=jnp.asarray([p.top_k for p in params], jnp.int32),
        seed=jnp.asarray(np.array([p.seed % 2**32 for p in params], np.uint32)),
    )


def sampling_arrays(
    rows: int, *, temperature: float, top_p: float, top_k: int, seed: int
) -> SamplingArrays:
    """The same parameters for `rows` rollouts, with seeds `seed, seed + 1, ...`.

    Raises:
      ValueError: A number is out of its range, see `SamplingParams`.
    """
    return stack_params([SamplingParams(temperature, top_p, top_k, seed + n) for n in range(rows)])


def draw(
    logits: jax.Array, sampling: SamplingArrays, call: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws one token for each lane.

    The distribution is softmax(logits / temperature), restricted to the top_k most likely tokens,
    then to the smallest set of most likely tokens whose probability reaches top_p, renormalised.
    Tokens that tie with the last one of a set are kept.

    Args:
      logits: [B, C, V] float32.
      sampling: parameters of each row, [B].
      call: [B, C] int32, number of the call in its rollout.
      position: [B, C] int32, index of the token in its call.

    Returns:
      tokens [B, C] int32 and logp [B, C] float32, nats. logp is that of the distribution that the
      token was sampled from. At temperature 0 this would be 0 for every token; there logp is the
      model's own, at temperature 1 and over the whole vocabulary.
    """
    greedy = sampling.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None, None]
    truncates = ((sampling.top_p < 1) | (sampling.top_k > 0)) & ~greedy
    # Finding the border costs 64 passes over the logits, so it is skipped if no row needs it.
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
    # Rows at temperature 0 were divided by 1 and not restricted: logp is the model's own there.
    return tokens, jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]


def _truncate(scaled: jax.Array, sampling: SamplingArrays) -> jax.Array:
    """Logits in which all tokens outside top-k and top-p are too low to be drawn."""
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
    """The lowest border such that the weight above it is less than the limit.

    The border is found by bisection over the 32 bits of an integer, with one sum over the
    vocabulary for each bit. Sorting would be shorter, but a sort gathers a vocabulary that is split
    over devices, and on CPU it is slower.

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
