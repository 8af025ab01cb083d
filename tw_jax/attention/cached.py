"""Attention to a cache that holds all layers, for prefill and for every decoding step.

The time of a decoding step is the time to read the cache. So this function reads keys and values
directly from the cache of all layers, one block of slots at a time, and only blocks that some row
needs. Slicing out a layer first would write it and read it once more. Skipping blocks matters
because a cache is allocated for the longest rollout and is partly empty most of the time.

No derivative is needed, and none is defined.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from tw_jax.attention.blockwise import fold_in, nothing, pad
from tw_jax.contracts import Span
from tw_jax.trie.mask import needed, visits

_SHARE = 8
"""Largest number of blocks of a cache. With more blocks more slots can be skipped, but every block
costs one iteration of a loop."""
_GRAIN = 256


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    *,
    at: jax.Array,
    keys: Span,
    scale: float,
) -> jax.Array:
    """Computes `reference.attend(q, k[layer], v[layer], ...)`, without a gradient.

    Args:
      q: [B, N, T, H] floating, N a multiple of G.
      k: [L, B, G, S, H] floating.
      v: [L, B, G, S, H] floating.
      layer: [] int32, less than L.
      at: [B, T] int32, the number of each query, which keys' intervals are compared with.
      keys: [B, S] int32 spans.
      scale: Factor of the scores, usually H ** -0.5.

    Returns:
      [B, N, T, H] in the dtype of `q`.
    """
    rows, heads, queries, width = q.shape
    groups, slots = k.shape[2:4]
    block = min(-(-slots // (_SHARE * _GRAIN)) * _GRAIN, slots)
    # The query heads that share a key head are stacked: [B, G, R, H] with R = (N / G) * T.
    stacked = q.reshape(rows, groups, -1, width)
    stacked_at = jnp.tile(at, (1, heads // groups))
    padded = jax.tree.map(lambda x: pad(x, 1, block), keys)
    # All rows visit the same blocks, the union over rows, so that one slice serves the whole batch.
    need = needed(at, padded, query_block=queries, key_block=block).any(axis=0, keepdims=True)
    index, count = visits(need)

    def visit(step, carry):
        first = index[0, 0, step] * block
        start = jnp.minimum(first, slots - block)
        zero = jnp.zeros((), start.dtype)

        def cut(cache: jax.Array) -> jax.Array:
            where = (layer.astype(start.dtype), zero, zero, start, zero)
            return lax.dynamic_slice(cache, where, (1, rows, groups, block, width))[0]

        # If the slots are not a multiple of the block, the last block starts earlier, so that it
        # ends with the cache. Its slots that the previous block has too are hidden.
        is_own = start + jnp.arange(block) >= first
        key = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block, axis=1), keys)
        key = Span(enter=key.enter, exit=jnp.where(is_own, key.exit, key.enter))
        by_row = jax.vmap(fold_in, in_axes=(0, 0, 0, 0, 0, 0, None))
        return by_row(carry, stacked, cut(k), cut(v), stacked_at, key, scale)

    out, _, total = lax.fori_loop(0, count[0, 0], visit, nothing(stacked))
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype).reshape(q.shape)
