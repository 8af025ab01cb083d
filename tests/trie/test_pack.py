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
    stats = pack.PackingStats()
    rows = pack.pack(tries, pack.Packing(row_tokens=40), stats)
    assert sorted(id(t) for row in rows for t in row) == sorted(map(id, tries))
    assert all(sum(map(len, row)) <= 40 for row in rows)
    assert stats.rows == len(rows)
    assert stats.used_tokens == sum(map(len, tries))
    assert stats.rows_filled == pytest.approx(stats.used_tokens / (40 * len(rows)))
    assert pack.pack(tries, pack.Packing(row_tokens=40)) == rows


def test_packing_many_tries_fills_rows_almost_wholly():
    tries = random_tries(0, count=400)
    stats = pack.PackingStats()
    pack.pack(tries, pack.Packing(row_tokens=64), stats)
    assert stats.rows_filled > 0.97


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
        pack.fit_row(trie, refuse, pack.PackingStats(), name="line 7")
    stats = pack.PackingStats()
    assert pack.fit_row(trie, pack.Packing(row_tokens=6, too_long="drop"), stats) is None
    cut = pack.fit_row(trie, pack.Packing(row_tokens=6, too_long="truncate"), stats)
    assert cut is not None
    assert cut.tokens.tolist() == [0, 1, 2, 3, 4, 5]
    assert cut.end.tolist() == [6] * 6
    assert (stats.dropped, stats.truncated) == (1, 1)


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
