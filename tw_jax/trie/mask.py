"""The one mask of the project: who sees whom in a trie, from two integers per token.

A node of a trie flattened in preorder is an ancestor of another exactly if the other lies in the
interval of its descendants. So query i sees key j iff

    keys.enter[j] <= at[i] < keys.exit[j]

and no [T, T] array of booleans, no segment ids and no walk over parents is needed. The same test
serves a packed row (enter = index), several tries in one row (a root ends where its trie ends) and
the slots of a sampler's cache (logical numbers; an unused slot has exit <= enter).

This file knows integers only: it neither builds the numbers (`trie/tree.py`, `sample/cache.py`) nor
computes attention. It hands on the test in three sizes: per pair, per row, and per pair of blocks.
Everything works on numpy arrays and on jax arrays, traced or not, and answers in kind.
"""

from __future__ import annotations

import chex
import jax
import numpy as np

from tw_jax.contracts import Span

HIDDEN = -1e30
"""Score of a pair that the mask forbids: finite, because -inf minus -inf is NaN."""

LOWEST = -1e29
"""Where a running maximum of scores starts. It lies above HIDDEN, so that `exp(HIDDEN - maximum)`
is exactly 0 even for a query that sees nothing: its weights sum to 0, and backends return zeros."""


def sees(at: jax.Array, keys: Span) -> jax.Array:
    """Tests pairs: `keys.enter <= at < keys.exit`, elementwise under broadcasting.

    Args:
      at: int32, any shape: where the queries stand.
      keys: int32 spans of the keys, of a shape that broadcasts against `at`.

    Returns:
      bool of the broadcast shape.
    """
    return (keys.enter <= at) & (at < keys.exit)


def dense(at: jax.Array, keys: Span) -> jax.Array:
    """Tests every pair of a row. For oracles, drawings and few queries; it is O(T S).

    Args:
      at: [B, T] int32.
      keys: [B, S] int32 spans.

    Returns:
      [B, T, S] bool, True where query t sees key s.
    """
    chex.assert_rank([at, keys.enter, keys.exit], 2)
    return sees(at[:, :, None], Span(enter=keys.enter[:, None, :], exit=keys.exit[:, None, :]))


def needed(at: jax.Array, keys: Span, *, query_block: int, key_block: int) -> jax.Array:
    """Tests pairs of blocks: may any query of the one see any key of the other?

    A block pair is kept iff `min(enter) <= max(at)` and `min(at) < max(exit)`. No pair of tokens is
    ever lost; a few block pairs are kept in vain where the extremes come from different keys (at
    blocks of 256, 5 % of the area on ThreadWeaver trajectories of 20k nodes). Keys with an empty
    interval count for nothing. Costs O(B (T + S + T/query_block S/key_block)).

    Args:
      at: [B, T] int32, T a multiple of `query_block`.
      keys: [B, S] int32 spans, S a multiple of `key_block`.
      query_block: queries per block.
      key_block: keys per block.

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
      count: [B, Q] int32, how many of them are needed.
    """
    chex.assert_rank(need, 3)
    xp = need.__array_namespace__()
    index = xp.argsort(~need, axis=-1, stable=True).astype(np.int32)
    return index, need.sum(-1, dtype=np.int32)
