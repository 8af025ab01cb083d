"""The one mask of the project: which tokens of a trie see each other, from two integers per token.

In a trie flattened in preorder, the descendants of a node are one interval. A node is an ancestor
of every node in that interval, and of no other. So query i sees key j iff

    keys.enter[j] <= at[i] < keys.exit[j]

This needs no [T, T] array of booleans, no segment ids and no walk over parents. The same test
serves a packed row (enter = index), several tries in one row (a root ends where its trie ends) and
the slots of a sampler's cache (logical numbers; an unused slot has exit <= enter).

The functions here apply the test per pair, per row, and per pair of blocks. They accept numpy
arrays and jax arrays, traced or not, and return the same kind. The numbers are made in
`trie/tree.py` and `sample/cache.py`; attention is in `attention/`.
"""

from __future__ import annotations

import chex
import jax
import numpy as np

from tw_jax.contracts import Span

HIDDEN = -1e30
"""Score of a pair that the mask forbids: finite, because -inf minus -inf is NaN."""

LOWEST = -1e29
"""Initial value of a running maximum of scores.

It is above HIDDEN, so that `exp(HIDDEN - maximum)` is exactly 0 even for a query that sees nothing.
The weights of such a query sum to 0, and backends return zeros for it.
"""


def sees(at: jax.Array, keys: Span) -> jax.Array:
    """Tests pairs: `keys.enter <= at < keys.exit`, elementwise under broadcasting.

    Args:
      at: int32 of any shape, the numbers of the queries.
      keys: int32 spans of the keys, of a shape that broadcasts against `at`.

    Returns:
      bool of the broadcast shape.
    """
    return (keys.enter <= at) & (at < keys.exit)


def dense(at: jax.Array, keys: Span) -> jax.Array:
    """Tests every pair of a row, in O(T S). Use it for oracles, pictures and few queries.

    Args:
      at: [B, T] int32.
      keys: [B, S] int32 spans.

    Returns:
      [B, T, S] bool, True where query t sees key s.
    """
    chex.assert_rank([at, keys.enter, keys.exit], 2)
    return sees(at[:, :, None], Span(enter=keys.enter[:, None, :], exit=keys.exit[:, None, :]))


def needed(at: jax.Array, keys: Span, *, query_block: int, key_block: int) -> jax.Array:
    """Tests pairs of blocks: whether a query of one block may see a key of the other.

    A block pair is kept iff `min(enter) <= max(at)` and `min(at) < max(exit)`. Every visible pair
    of tokens is in a kept block pair. A few block pairs without a visible pair are kept too, where
    the extremes come from different keys (at blocks of 256, 5 % of the area on ThreadWeaver
    trajectories of 20k nodes). Keys with an empty interval are ignored. Costs
    O(B (T + S + T/query_block S/key_block)).

    Args:
      at: [B, T] int32, T a multiple of `query_block`.
      keys: [B, S] int32 spans, S a multiple of `key_block`.
      query_block: Queries per block.
      key_block: Keys per block.

    Returns:
      [B, T / query_block, S / key_block] bool.
    """
    chex.assert_rank([at, keys.enter, keys.exit], 2)
    chex.assert_is_divisible(at.shape[1], query_block)
    chex.assert_is_divisible(keys.enter.shape[1], key_block)
    xp = keys.enter.__array_namespace__()
    extremes = np.iinfo(np.int32)
    is_empty = keys.exit <= keys.enter
    rows = at.shape[0]
    at = at.reshape(rows, -1, 1, query_block)
    enter = xp.where(is_empty, extremes.max, keys.enter).reshape(rows, 1, -1, key_block)
    exit = xp.where(is_empty, extremes.min, keys.exit).reshape(rows, 1, -1, key_block)
    return (enter.min(-1) <= at.max(-1)) & (at.min(-1) < exit.max(-1))


def visits(need: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turns a table of needed block pairs into the list of key blocks that each query block visits.

    Args:
      need: [B, Q, K] bool, from `needed`.

    Returns:
      index: [B, Q, K] int32, key blocks: the needed ones first, ascending, then the others.
      count: [B, Q] int32, the number of needed key blocks.
    """
    chex.assert_rank(need, 3)
    xp = need.__array_namespace__()
    index = xp.argsort(~need, axis=-1, stable=True).astype(np.int32)
    return index, need.sum(-1, dtype=np.int32)
