"""Dense attention in a dozen lines: the truth that every other backend is examined against.

It writes out all T x S scores, so its memory is quadratic in a row; for short rows that is also the
fastest thing to do. It knows the interval mask and nothing of models, tries or devices.
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

    o[n, t] = sum_s softmax_s(scale q[n, t] . k[g, s] | s seen from t) v[g, s], g = n // (N / G).

    Scores, softmax and sums are float32; the weights are rounded to the dtype of `v` before they
    meet it. The query heads of a group are folded into the einsum, so neither keys nor values are
    copied or transposed. A query that sees nothing returns zeros and gets zero gradients. Hidden
    keys and values must be finite: their weight is 0, and 0 times NaN is NaN.

    Args:
      q: [B, N, T, H] floating, N a multiple of G.
      k: [B, G, S, H] floating.
      v: [B, G, S, H] floating.
      at: [B, T] int32, where the queries stand.
      keys: [B, S] int32 spans.
      scale: factor on the scores, usually H ** -0.5.

    Returns:
      [B, N, T, H] in the dtype of `q`.
    """
    rows, heads, queries, width = q.shape
    groups = k.shape[1]
    grouped = q.reshape(rows, groups, heads // groups, queries, width)
    scores = scale * jnp.einsum("bgmth,bgsh->bgmts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(dense(at, keys)[:, None, None], scores, HIDDEN)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), LOWEST)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bgmts,bgsh->bgmth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (out / jnp.where(total > 0, total, 1.0)).astype(q.dtype).reshape(q.shape)
