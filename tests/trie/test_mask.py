"""The interval mask against ancestry found by walking parents, per pair and per block."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.contracts import Span
from tw_jax.trie import mask


def spans(sees: np.ndarray) -> Span:
    """Intervals read off an ancestry matrix: a node ends after the last node that sees it."""
    end = [1 + np.flatnonzero(column).max() for column in sees.T]
    return Span(enter=np.arange(len(sees), dtype=np.int32)[None], exit=np.int32(end)[None])


@st.composite
def forests(draw) -> np.ndarray:
    """Parent pointers of tries in preorder: a parent is the node before or an ancestor of it."""
    parent = [-1]
    for node in range(1, draw(st.integers(1, 70))):
        path, up = [node - 1], parent[node - 1]
        while up >= 0:
            path.append(up)
            up = parent[up]
        climb = draw(st.integers(-6, len(path)))
        parent.append(-1 if climb == len(path) else path[max(climb, 0)])
    return np.array(parent)


@given(parent=forests())
def test_the_interval_test_is_ancestry(parent):
    sees = oracles.visible_by_parents(parent)
    keys = spans(sees)
    np.testing.assert_array_equal(mask.dense(keys.enter, keys)[0], sees)
    np.testing.assert_array_equal(mask.sees(keys.enter[0, :, None], keys), sees)


def test_packed_tries_and_padding_do_not_see_each_other():
    # Two tries of 3 and 2 nodes, then two nodes of padding, each alone.
    exits = np.array([[3, 3, 3, 5, 5, 6, 7]], np.int32)
    keys = Span(enter=np.arange(7, dtype=np.int32)[None], exit=exits)
    got = mask.dense(keys.enter, keys)[0]
    blocks = [np.tri(3), np.tri(2), np.tri(1), np.tri(1)]
    want = np.zeros((7, 7), bool)
    at = 0
    for block in blocks:
        want[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    np.testing.assert_array_equal(got, want)


def test_an_unused_slot_is_seen_by_nobody_and_one_for_ever_by_all_after_it():
    forever = np.iinfo(np.int32).max
    keys = Span(enter=np.int32([[2, 4, 9]]), exit=np.int32([[forever, 4, 0]]))
    at = np.int32([[0, 2, 4, 9, forever - 1]])
    np.testing.assert_array_equal(
        mask.dense(at, keys)[0],
        [[False] * 3, [True, False, False]] + [[True, False, False]] * 3,
    )


@given(
    parent=forests(), sizes=st.tuples(*[st.sampled_from([4, 8, 16])] * 2), seed=st.integers(0, 9)
)
def test_no_needed_block_is_lost(parent, sizes, seed):
    query_block, key_block = sizes
    rng = np.random.default_rng(seed)
    keys = spans(oracles.visible_by_parents(parent))
    # Slots of a cache stand in any order, some unused; so may queries.
    order = rng.permutation(len(parent)) if seed % 2 else np.arange(len(parent))
    size = 16 * -(-len(parent) // 16)
    enter, exits = np.zeros((1, size), np.int32), np.zeros((1, size), np.int32)
    enter[0, : len(order)], exits[0, : len(order)] = keys.enter[0, order], keys.exit[0, order]
    at = rng.choice(len(parent), size).astype(np.int32)[None]
    slots = Span(enter=enter, exit=exits)
    need = mask.needed(at, slots, query_block=query_block, key_block=key_block)[0]
    pairs = mask.dense(at, slots)[0]
    pairs = pairs.reshape(size // query_block, query_block, size // key_block, key_block)
    assert np.all(need | ~pairs.any((1, 3)))


def test_only_blocks_of_the_own_trie_and_not_of_the_future_are_needed():
    # Two chains of 8 in one row, blocks of 4.
    keys = Span(enter=np.arange(16, dtype=np.int32)[None], exit=np.repeat([8, 16], 8)[None])
    need = mask.needed(keys.enter, keys, query_block=4, key_block=4)[0]
    chain = np.tri(2, dtype=bool)
    np.testing.assert_array_equal(need, np.kron(np.eye(2, dtype=bool), chain))


def test_a_sibling_that_fills_blocks_is_skipped():
    # A stem of 4 nodes and two children chains of 4: the second does not need the first's block.
    exits = np.array([[12] * 4 + [8] * 4 + [12] * 4], np.int32)
    keys = Span(enter=np.arange(12, dtype=np.int32)[None], exit=exits)
    need = mask.needed(keys.enter, keys, query_block=4, key_block=4)[0]
    np.testing.assert_array_equal(need, [[1, 0, 0], [1, 1, 0], [1, 0, 1]])


def test_empty_intervals_make_no_block_needed():
    keys = Span(enter=np.int32([[5, 0, 3, 7]]), exit=np.int32([[5, 0, 1, -7]]))
    at = np.int32([[0, 1, 5, 7]])
    assert not mask.needed(at, keys, query_block=2, key_block=2).any()
    # Nor do they widen a block with a key that only the first, or only the last, queries see.
    for enter, exits, want in (([0, 9], [2, 9], [1, 0]), ([5, 0], [9, 0], [0, 1])):
        keys = Span(enter=np.int32([enter]), exit=np.int32([exits]))
        need = mask.needed(at, keys, query_block=2, key_block=2)
        np.testing.assert_array_equal(need[0, :, 0], want)


def test_visits_list_needed_blocks_first_and_count_them():
    need = np.array([[[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]], bool)
    index, count = mask.visits(need)
    np.testing.assert_array_equal(index[0], [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]])
    np.testing.assert_array_equal(count[0], [2, 0, 4])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_numpy_and_jax_answer_alike_and_in_kind(wrap):
    keys = Span(enter=np.arange(8, dtype=np.int32)[None], exit=np.int32([[8, 4, 4, 4, 8, 8, 7, 8]]))

    def answers(at, keys):
        need = mask.needed(at, keys, query_block=2, key_block=4)
        return mask.dense(at, keys), need, *mask.visits(need)

    ours = answers(keys.enter, keys)
    theirs = wrap(answers)(*jax.tree.map(jnp.asarray, (keys.enter, keys)))
    for numpy_answer, jax_answer in zip(ours, theirs, strict=True):
        assert isinstance(numpy_answer, np.ndarray)
        assert isinstance(jax_answer, jax.Array)
        assert numpy_answer.dtype == jax_answer.dtype
        np.testing.assert_array_equal(numpy_answer, jax_answer)


def test_a_hidden_score_weighs_exactly_nothing():
    assert np.exp(np.float32(mask.HIDDEN) - np.float32(mask.LOWEST)) == 0
    assert np.isfinite(np.float32(mask.HIDDEN))


def test_blocks_that_do_not_divide_the_row_are_refused():
    keys = Span(enter=np.zeros((1, 6), np.int32), exit=np.ones((1, 6), np.int32))
    with pytest.raises(AssertionError):
        mask.needed(keys.enter, keys, query_block=4, key_block=3)
    with pytest.raises(AssertionError):
        mask.needed(keys.enter, keys, query_block=3, key_block=4)
