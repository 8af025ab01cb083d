"""Packing: every node lands in a row, rows keep to their size, policies do what they say."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracles
import pytest

from tw_jax.trie import batch, pack, tree


def random_tries(seed: int, count: int = 12):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        sequences = oracles.random_sequences(rng, count=3, longest=8, vocabulary=3)
        made.append(tree.build(sequences, [None] * 3))
    return made


@hypothesis.given(st.integers(0, 10_000))
def test_every_trie_lands_in_exactly_one_row(seed):
    tries = random_tries(seed)
    fill = pack.Fill()
    rows = pack.pack(tries, pack.Packing(row_tokens=40), fill)
    assert sorted(id(t) for row in rows for t in row) == sorted(map(id, tries))
    assert all(sum(map(len, row)) <= 40 for row in rows)
    assert fill.rows == len(rows)
    assert fill.used_tokens == sum(map(len, tries))
    assert fill.rows_filled == pytest.approx(fill.used_tokens / (40 * len(rows)))


def test_packing_many_tries_fills_rows_almost_wholly():
    tries = random_tries(0, count=400)
    fill = pack.Fill()
    pack.pack(tries, pack.Packing(row_tokens=64), fill)
    assert fill.rows_filled > 0.97


@hypothesis.given(st.integers(0, 10_000))
def test_row_neighbours_and_padding_are_invisible(seed):
    tries = random_tries(seed, count=4)
    rows = batch.stack_rows([tries[:3], tries[3:]], 100)
    index = np.arange(100)
    for b, members in enumerate((tries[:3], tries[3:])):
        interval = (index[None] <= index[:, None]) & (index[:, None] < rows.end[b][None])
        want = np.eye(100, dtype=bool)
        at = 0
        for trie in members:
            here = slice(at, at + len(trie))
            want[here, here] = oracles.visible_by_parents(trie.parent)
            at += len(trie)
        np.testing.assert_array_equal(interval, want)


def test_roots_and_padding_point_at_themselves_without_weight():
    trie = tree.build([np.array([3, 4], np.int32)], [np.array([0, 1], np.float32)])
    rows = batch.stack_rows([[trie, trie]], 6)
    assert np.asarray(rows.parent).tolist() == [[0, 0, 2, 2, 4, 5]]
    assert np.asarray(rows.weight).tolist() == [[0, 1, 0, 1, 0, 0]]
    assert np.asarray(rows.end).tolist() == [[2, 2, 4, 4, 5, 6]]


def test_a_trie_longer_than_a_row_is_refused_dropped_or_truncated():
    sequences = [np.arange(10, dtype=np.int32), np.array([0, 1, 9], np.int32)]
    trie = tree.build(sequences, [None, None])
    refuse = pack.Packing(row_tokens=6)
    with pytest.raises(ValueError, match="line 7 makes a trie of 11 nodes and a row holds 6"):
        pack.fit(trie, refuse, pack.Fill(), name="line 7")
    fill = pack.Fill()
    assert pack.fit(trie, pack.Packing(row_tokens=6, too_long="drop"), fill) is None
    cut = pack.fit(trie, pack.Packing(row_tokens=6, too_long="truncate"), fill)
    assert cut is not None
    assert cut.tokens.tolist() == [0, 1, 2, 3, 4, 5]
    assert cut.end.tolist() == [6] * 6
    assert (fill.dropped, fill.truncated) == (1, 1)


def test_truncation_cuts_branch_copies_before_the_joined_path():
    sequences = [np.arange(10, dtype=np.int32), np.array([0, 1, 50, 51], np.int32)]
    cut = pack.truncate(tree.build(sequences, [None, None]), 11)
    assert cut.tokens.tolist() == [*range(10), 50]


def test_stacking_too_much_into_a_row_is_refused():
    trie = tree.build([np.arange(5, dtype=np.int32)], [None])
    with pytest.raises(ValueError, match="Row 0 holds tries of 10 tokens together"):
        batch.stack_rows([[trie, trie]], 9)


def test_packing_says_how_long_rows_are_and_not_how_many():
    """How many there are is `Sft.batch_rows`, or `Pgrpo.microbatch_rows` and the groups."""
    with pytest.raises(TypeError, match="rows"):
        pack.Packing(row_tokens=8, rows=2)
    assert set(vars(pack.Packing(row_tokens=8))) == {"row_tokens", "too_long", "window"}
