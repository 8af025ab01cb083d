"""`TrieCache`: keys and values stored once for every thread that shares them.

Threads of a fork take turns, so their entries interleave in the slots of the cache. Order in the
cache therefore says nothing about who sees whom. Each slot carries two logical numbers instead, and
the one mask does the rest: a query at number `at` sees slot j iff `enter[j] <= at < exit[j]`.

    slot    0      1      2      3      4      5      6         trunk 0, 1; then two threads
    enter   0      1      2      6      3      7      (unused)  thread 1 has numbers 2..5,
    exit    never  never  6      10     6      10     0         thread 2 has numbers 6..9
    join:                 never  6      never  7                thread 1 is kept, thread 2 hidden

A hidden entry has `exit <= enter`, so no number sees it. It stays in its slot until `grow` moves
the visible entries to the front. This file implements that policy and does not depend on tags.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from tw_jax.contracts import KV, Network, Span

FOREVER = jnp.iinfo(jnp.int32).max
"""`exit` of an entry that all later entries may see."""

_BUCKET = 512
"""The smallest capacity. Below it a bucket would save little and would compile once more."""


class TrieCache(struct.PyTreeNode):
    """Keys and values with the numbers that say who sees them."""

    kv: KV  # [L, B, G, S, H] each
    span: Span  # [B, S]; exit <= enter if no number sees the slot
    used: jax.Array  # [B] int32, slots that hold an entry, hidden ones included

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
    """The spans of all slots after T new entries are written at `used .. used + T - 1`.

    Args:
      cache: must have room for T more slots in every row that is not done: an update slice beyond
        the end is moved back by XLA and would overwrite entries.
      span: [B, T]; padding has `exit <= enter` and is overwritten by the next write.
    """
    put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at,)))
    return Span(
        enter=put(cache.span.enter, span.enter, cache.used),
        exit=put(cache.span.exit, span.exit, cache.used),
    )


def join(span: Span, kept: tuple[jax.Array, jax.Array], dropped: tuple[jax.Array, jax.Array]):
    """Makes one range of numbers visible for ever, and hides another.

    Args:
      span: [B, S].
      kept: (low, high), each [B] int32: thread 1's numbers, low <= number < high.
      dropped: (low, high), each [B] int32: the other threads' numbers; an empty range hides none.

    Returns:
      The new [B, S] span.
    """

    def inside(low: jax.Array, high: jax.Array) -> jax.Array:
        written = span.exit > span.enter
        return written & (low[:, None] <= span.enter) & (span.enter < high[:, None])

    leaving = jnp.where(inside(*kept), FOREVER, span.exit)
    return Span(enter=span.enter, exit=jnp.where(inside(*dropped), span.enter, leaving))


def bucket(slots: int) -> int:
    """The smallest capacity of the ladder 512, 768, 1024, 1536, ... that holds `slots`.

    Each capacity is another compiled program. Steps of about 1.4 waste at most a third of the cache
    and compile two programs for each doubling.
    """
    size = _BUCKET
    while size < slots:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def grow(cache: TrieCache, slots: int) -> TrieCache:
    """Moves all visible entries to the front, in order, and sets the capacity to `slots`.

    Hidden entries, of the threads that a join encoded again, are dropped. `slots` is at least the
    present capacity. This copies the cache, so the host does it between calls of the program.
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
