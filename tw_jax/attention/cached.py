"""Attention to a cache that holds all layers: that of prefill and of every step of decoding.

A step of decoding is bound by the bytes it reads. So keys and values are read where they lie, a
block of slots at a time and only blocks that some row needs: to cut a layer out of the cache first
would write and read it once more, and a cache is made larger than what is in it. No derivative is
needed or given. The file knows the interval mask and nothing of models or devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from tw_jax.attention.blockwise import fold_in, nothing, pad
from tw_jax.contracts import Span
from tw_jax.trie.mask import needed, visits

_SHARE = 8
"""Blocks of a cache: more of them skip more, and each costs a turn of a loop."""
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
    """`reference.attend(q, k[layer], v[layer], ...)`, without its gradient.

    Args:
      q: [B, N, T, H] floating, N a multiple of G.
      k: [L, B, G, S, H] floating.
      v: [L, B, G, S, H] floating.
      layer: [] int32, less than L.
      at: [B, T] int32, where the queries stand.
      keys: [B, S] int32 spans.
      scale: factor on the scores, usually H ** -0.5.

    Returns:
      [B, N, T, H] in the dtype of `q`.
    """
    rows, heads, queries, width = q.shape
    groups, slots = k.shape[2:4]
    block = min(-(-slots // (_SHARE * _GRAIN)) * _GRAIN, slots)
    stacked = q.reshape(rows, groups, -1, width)
    stands = jnp.tile(at, (1, heads // groups))
    padded = jax.tree.map(lambda x: pad(x, 1, block), keys)
    need = needed(at, padded, query_block=queries, key_block=block).any(axis=0, keepdims=True)
    index, count = visits(need)

    def visit(step, carry):
        first = index[0, 0, step] * block
        start = jnp.minimum(first, slots - block)
        zero = jnp.zeros((), start.dtype)

        def cut(cache: jax.Array) -> jax.Array:
            where = (layer.astype(start.dtype), zero, zero, start, zero)
            return lax.dynamic_slice(cache, where, (1, rows, groups, block, width))[0]

        # The last block begins early where it would end behind the cache; what it then has in
        # common with the one before is hidden.
        is_own = start + jnp.arange(block) >= first
        key = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block, axis=1), keys)
        key = Span(enter=key.enter, exit=jnp.where(is_own, key.exit, key.enter))
        by_row = jax.vmap(fold_in, in_axes=(0, 0, 0, 0, 0, 0, None))
        return by_row(carry, stacked, cut(k), cut(v), stands, key, scale)

    out, _, total = lax.fori_loop(0, count[0, 0], visit, nothing(stacked))
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype).reshape(q.shape)
