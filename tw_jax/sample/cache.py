"""`TrieCache`: keys and values stored once for every thread that shares them.

Slots fill in time order while siblings interleave, so slots carry logical numbers and the one mask
does the rest: a query at number `at` sees slot j iff `enter[j] <= at < exit[j]`. A fork gives each
thread a range of numbers; a join keeps thread 1's entries for ever, hides those of the others, and
the sampler re-encodes them. This file owns that policy and knows no tags and no sampling.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from tw_jax.contracts import KV, Network, Span

FOREVER = jnp.iinfo(jnp.int32).max
"""`exit` of an entry that everything after it may see."""

_BUCKET = 512


class TrieCache(struct.PyTreeNode):
    """Keys and values with the numbers that say who sees them."""

    kv: KV  # [L, B, G, S, H] each
    span: Span  # [B, S]; exit <= enter where nothing sees the slot
    used: jax.Array  # [B] int32, slots that hold something, dead ones included

    @property
    def slots(self) -> int:
        """S."""
        return self.span.enter.shape[1]


def empty(network: Network, rows: int, slots: int) -> TrieCache:
    """A cache of `slots` unused slots for each of `rows` rows."""
    # Distinct buffers: the state that holds them is donated.
    span = Span(enter=jnp.zeros((rows, slots), jnp.int32), exit=jnp.zeros((rows, slots), jnp.int32))
    return TrieCache(
        kv=network.empty_kv(rows, slots), span=span, used=jnp.zeros((rows,), jnp.int32)
    )


def write_spans(cache: TrieCache, span: Span) -> Span:
    """The spans of all slots once T new entries stand at `used .. used + T - 1` of each row.

    Args:
      cache: has room for T more slots in every row that is still of interest; an update slice
        beyond the end would be clamped and overwrite entries.
      span: [B, T]; an entry with `exit <= enter` takes no slot for long, the next one overwrites
        it.
    """
    put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at,)))
    return Span(
        enter=put(cache.span.enter, span.enter, cache.used),
        exit=put(cache.span.exit, span.exit, cache.used),
    )


def join(span: Span, kept: tuple[jax.Array, jax.Array], dropped: tuple[jax.Array, jax.Array]):
    """Keeps one range of numbers for ever and hides another from everything.

    Args:
      span: [B, S].
      kept: (low, high), each [B] int32: thread 1's numbers, low <= number < high.
      dropped: (low, high), each [B] int32: the other threads' numbers; an empty range drops none.

    Returns:
      The new [B, S] span.
    """

    def inside(low: jax.Array, high: jax.Array) -> jax.Array:
        written = span.exit > span.enter
        return written & (low[:, None] <= span.enter) & (span.enter < high[:, None])

    leaving = jnp.where(inside(*kept), FOREVER, span.exit)
    return Span(enter=span.enter, exit=jnp.where(inside(*dropped), span.enter, leaving))


def bucket(slots: int) -> int:
    """The smallest capacity of the ladder 512, 768, 1024, 1536, ... that holds `slots`."""
    size = _BUCKET
    while size < slots:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def grow(cache: TrieCache, slots: int) -> TrieCache:
    """Moves what is still visible to the front, in order, and sets the capacity to `slots`.

    Dead entries (the threads that a join re-encoded) are dropped on the way. `slots` is at least
    the present capacity.
    """
    live = cache.span.exit > cache.span.enter
    order = jnp.argsort(~live, axis=1, stable=True)
    used = live.sum(axis=1, dtype=jnp.int32)

    def move(array: jax.Array, axis: int, index: jax.Array) -> jax.Array:
        moved = jnp.take_along_axis(array, index, axis=axis)
        pad = [(0, 0)] * array.ndim
        pad[axis] = (0, slots - moved.shape[axis])
        return jnp.pad(moved, pad)

    index = order[None, :, None, :, None]
    span = Span(
        enter=move(jnp.where(live, cache.span.enter, 0), 1, order),
        exit=move(jnp.where(live, cache.span.exit, 0), 1, order),
    )
    kv = KV(k=move(cache.kv.k, 3, index), v=move(cache.kv.v, 3, index))
    return TrieCache(kv=kv, span=span, used=used)
