"""Dense attention in a dozen lines, the definition that every other backend is tested against.

It computes all T x S scores, so its memory is quadratic in the length of a row. For short rows it
is also the fastest backend.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tw_jax.contracts import Span
from tw_jax.trie.mask import HIDDEN, LOWEST, dense


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, at: jax.Array, keys: Span, scale: float
) -> jax.Array:
    """Softmax attention over all pairs that the mask allows.

    o[n, t] = sum_s softmax_s(scale q[n, t] . k[g, s]) v[g, s], where s runs over the keys that
    query t sees, and g = n // (N / G) is the key/value head of query head n.

    Scores, softmax and sums are float32; the weights are rounded to the dtype of `v` before the
    product with it. The einsums have a dimension M = N / G for the query heads of a group, so keys
    and values are neither copied nor transposed. A query that sees nothing returns zeros and has
    zero gradients. Hidden keys and values must be finite, because their weight is 0, and 0 times
    NaN is NaN.

    Args:
      q: [B, N, T, H] floating, N a multiple of G.
      k: [B, G, S, H] floating.
      v: [B, G, S, H] floating.
      at: [B, T] int32, the number of each query, which keys' intervals are compared with.
      keys: [B, S] int32 spans.
      scale: Factor of the scores, usually H ** -0.5.

    Returns:
      [B, N, T, H] in the dtype of `q`.
    """
    rows, heads, queries, width = q.shape
    groups = k.shape[1]
    grouped = q.reshape(rows, groups, heads // groups, queries, width)
    scores = scale * jnp.einsum("bgmth,bgsh->bgmts", grouped, k, preferred_element_type=jnp.float32)
    # HIDDEN is finite, because in a row without visible keys the softmax would subtract -inf from
    # -inf. The maximum is at least LOWEST > HIDDEN, so all weights of such a row are exactly 0.
    scores = jnp.where(dense(at, keys)[:, None, None], scores, HIDDEN)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), LOWEST)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bgmts,bgsh->bgmth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (out / jnp.where(total > 0, total, 1.0)).astype(q.dtype).reshape(q.shape)
