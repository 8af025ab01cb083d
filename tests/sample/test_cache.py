"""The cache's numbers: write_spans, join, grow, against plain lists."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.contracts import Span
from tw_jax.sample import cache as caches

NETWORK = fakes.path_network(10, width=4)


def spans(enter, exit_):
    return Span(enter=jnp.array(enter, jnp.int32), exit=jnp.array(exit_, jnp.int32))


def visible(span, at):
    enter, exit_ = np.asarray(span.enter), np.asarray(span.exit)
    return [
        np.flatnonzero((e <= at) & (at < x)).tolist() for e, x in zip(enter, exit_, strict=True)
    ]


def test_an_empty_cache_is_seen_by_nothing():
    cache = caches.empty(NETWORK, rows=2, slots=5)
    assert visible(cache.span, 0) == [[], []]


def test_entries_are_announced_behind_what_each_row_uses():
    cache = caches.empty(NETWORK, rows=2, slots=6).replace(used=jnp.array([1, 3]))
    new = caches.write_spans(cache, spans([[7, 8], [7, 8]], [[99, 99], [99, 8]]))
    assert new.enter.tolist() == [[0, 7, 8, 0, 0, 0], [0, 0, 0, 7, 8, 0]]
    assert visible(new, 8) == [[1, 2], [3]]


def test_a_join_keeps_thread_one_and_hides_the_others():
    # Slots: trunk 0, 1; thread 1 owns numbers 2..5, thread 2 owns 6..9; one unused slot.
    forever = int(caches.FOREVER)
    span = spans([[0, 1, 2, 6, 3, 7, 0]], [[forever, forever, 6, 10, 6, 10, 0]])
    joined = caches.join(
        span,
        kept=(jnp.array([0]), jnp.array([6])),
        dropped=(jnp.array([6]), jnp.array([10])),
    )
    assert visible(joined, 10) == [[0, 1, 2, 4]]
    untouched = caches.join(span, *[(jnp.array([0]), jnp.array([0]))] * 2)
    np.testing.assert_array_equal(untouched.exit, span.exit)


def test_growing_keeps_visible_entries_in_order_and_drops_dead_ones():
    cache = caches.empty(NETWORK, rows=2, slots=4)
    key = jax.random.key(0)
    cache = cache.replace(
        kv=jax.tree.map(lambda a: jax.random.normal(key, a.shape), cache.kv),
        span=spans([[0, 1, 2, 3], [0, 1, 0, 0]], [[9, 1, 9, 3], [9, 9, 0, 0]]),
        used=jnp.array([4, 2]),
    )
    grown = caches.grow(cache, 8)
    assert grown.slots == 8
    assert grown.used.tolist() == [2, 2]
    assert visible(grown.span, 5) == [[0, 1], [0, 1]]
    np.testing.assert_array_equal(grown.kv.k[:, 0, :, :2], cache.kv.k[:, 0][:, :, [0, 2]])
    np.testing.assert_array_equal(grown.kv.k[:, 1, :, :2], cache.kv.k[:, 1, :, :2])


@pytest.mark.parametrize("slots", [1, 512, 513, 768, 769, 5000, 40_960])
def test_buckets_hold_what_was_asked_and_waste_at_most_half(slots):
    size = caches.bucket(slots)
    assert slots <= size
    assert size <= max(512, slots * 3 // 2 + 1)
