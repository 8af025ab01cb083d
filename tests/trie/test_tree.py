"""The trie against a dictionary trie and against walks of parent pointers."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracles
import pytest

from tw_jax.trie import tree


def random_case(seed: int):
    rng = np.random.default_rng(seed)
    sequences = oracles.random_sequences(
        rng, count=rng.integers(1, 9), longest=9, vocabulary=rng.integers(1, 5)
    )
    weights = [
        None if rng.random() < 0.3 else rng.integers(0, 3, len(s)).astype(np.float32)
        for s in sequences
    ]
    for weight in weights:
        if weight is not None:
            weight[0] = 0
    return sequences, weights


@hypothesis.given(st.integers(0, 10_000))
def test_build_equals_a_dictionary_trie_in_first_seen_preorder(seed):
    sequences, weights = random_case(seed)
    oracle = oracles.DictTrie()
    for sequence, weight in zip(sequences, weights, strict=True):
        oracle.insert(sequence, weight)
    tokens, parents, depths, total = oracle.flatten()
    trie = tree.build(sequences, weights)
    assert trie.tokens.tolist() == tokens
    assert trie.parent.tolist() == parents
    assert trie.depth.tolist() == depths
    assert trie.weight.tolist() == total
    assert trie.source_tokens == sum(map(len, sequences))


@hypothesis.given(st.integers(0, 10_000))
def test_the_interval_test_is_ancestry(seed):
    trie = tree.build(*random_case(seed))
    index = np.arange(len(trie))
    interval = (index[None] <= index[:, None]) & (index[:, None] < trie.end[None])
    np.testing.assert_array_equal(interval, oracles.visible_by_parents(trie.parent))


def test_the_worked_example_of_the_collator_comes_out_the_same():
    outlines = ["<Os>", "<O>", "1", "o1", "</O>", "<O>", "2", "o2", "</O>", "</Os>"]
    threads = ["<T>", "N", "1", ":", "a", "b", "</T>", "<T>", "N", "2", ":", "c", "d", "</T>"]
    text = ["U", "A", "p", "<P>", "N", *outlines, "N", *threads, "N", "</P>", "q", "EOS", "NL"]
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(text))}
    ids = np.array([vocabulary[word] for word in text], np.int32)
    second = np.concatenate([ids[:18], ids[25:30]])
    trie = tree.build([ids, ids[:23], second], [None] * 3)
    assert trie.tokens[35:].tolist() == second[18:].tolist()
    assert trie.depth[35:].tolist() == [18, 19, 20, 21, 22]
    assert trie.parent[35] == 17
    assert trie.end[:18].tolist() == [40] * 18
    assert trie.end[18:35].tolist() == [35] * 17


def test_threads_ten_and_eleven_hang_off_thread_ones_digit():
    head = [7, 7]
    sequences = [[*head, 1, 5], [*head, 2, 5], [*head, 1, 0, 5], [*head, 1, 1, 5]]
    trie = tree.build([np.array(s, np.int32) for s in sequences], [None] * 4)
    assert trie.tokens.tolist() == [7, 7, 1, 5, 0, 5, 1, 5, 2, 5]


def test_flat_labels_read_every_node_from_its_flat_predecessor():
    sequences = [np.array(s, np.int32) for s in ([1, 2, 3, 4], [1, 2, 5])]
    trie = tree.flat_labels(tree.build(sequences, [None, None]), prompt_tokens=1)
    assert trie.parent.tolist() == [-1, 0, 1, 2, 3]
    assert trie.weight.tolist() == [0, 1, 1, 1, 1]
    assert trie.depth.tolist() == [0, 1, 2, 3, 2]


@pytest.mark.parametrize(
    ("sequences", "weights", "sentence"),
    [
        ([[]], [None], "Sequence 0 of a trie is empty"),
        ([[1, 2]], [[0.0]], "2 tokens and 1 weights"),
        ([[1, 2]], [[1.0, 0.0]], "first token of sequence 0 has weight"),
    ],
)
def test_bad_sequences_are_refused_in_a_sentence(sequences, weights, sentence):
    sequences = [np.array(s, np.int32) for s in sequences]
    weights = [w if w is None else np.array(w, np.float32) for w in weights]
    with pytest.raises(ValueError, match=sentence):
        tree.build(sequences, weights)


def test_a_long_chain_of_extensions_does_not_exhaust_the_stack():
    long = np.arange(1500, dtype=np.int32)
    trie = tree.build([long[: n + 1] for n in range(1500)], [None] * 1500)
    assert trie.tokens.tolist() == long.tolist()
    assert trie.end.tolist() == [1500] * 1500


# Merging on a prompt.


def grown(rng, stem):
    """A trie that begins with a chain, from sequences of which none is a prefix of the chain."""
    tails = oracles.random_sequences(rng, count=int(rng.integers(1, 6)), longest=6, vocabulary=3)
    sequences = [np.concatenate([stem, tail]).astype(np.int32) for tail in tails]
    weights = [(np.arange(len(s)) > len(stem)).astype(np.float32) for s in sequences]
    return tree.build(sequences, weights), sequences


def paths(trie):
    """For each node the tokens on its path from the root, by walking parents."""
    found = []
    for node in range(len(trie)):
        parent = trie.parent[node]
        found.append([*(found[parent] if parent >= 0 else []), int(trie.tokens[node])])
    return found


@hypothesis.given(st.integers(0, 10_000))
def test_merged_tries_have_the_chain_once_and_every_other_node_as_it_was(seed):
    rng = np.random.default_rng(seed)
    stem = rng.integers(0, 3, rng.integers(1, 5))
    tries = [grown(rng, stem)[0] for _ in range(rng.integers(1, 5))]
    made = tree.merge_on_prompt(tries, len(stem))
    want = [*paths(tries[0])[: len(stem)], *(p for t in tries for p in paths(t)[len(stem) :])]
    assert paths(made) == want
    assert made.depth.tolist() == [len(path) - 1 for path in want]
    assert made.weight[len(stem) :].tolist() == [w for t in tries for w in t.weight[len(stem) :]]
    assert made.source_tokens == sum(t.source_tokens for t in tries)
    index = np.arange(len(made))
    interval = (index[None] <= index[:, None]) & (index[:, None] < made.end[None])
    np.testing.assert_array_equal(interval, oracles.visible_by_parents(made.parent))


def test_merging_on_a_prompt_never_merges_equal_tokens_below_the_chain():
    tries = [tree.build([np.array([7, 8, 1, 2], np.int32)], [None]) for _ in range(3)]
    made = tree.merge_on_prompt(tries, 2)
    assert made.tokens.tolist() == [7, 8, 1, 2, 1, 2, 1, 2]
    assert made.parent.tolist() == [-1, 0, 1, 2, 1, 4, 1, 6]
    assert made.end.tolist() == [8, 8, 4, 4, 6, 6, 8, 8]


def test_weights_of_the_chain_are_added():
    weight = np.array([0, 2, 1], np.float32)
    tries = [tree.build([np.array([7, 8, t], np.int32)], [weight]) for t in (1, 2)]
    assert tree.merge_on_prompt(tries, 2).weight.tolist() == [0, 4, 1, 1]


@pytest.mark.parametrize(
    ("sequences", "stem"),
    [([[1, 2, 3], [1, 3, 3]], 2), ([[1, 2, 3], [1]], 2), ([[1, 2, 3]], 4), ([[1, 2]], -1)],
)
def test_tries_of_other_chains_are_not_merged(sequences, stem):
    tries = [tree.build([np.array(s, np.int32)], [None]) for s in sequences]
    with pytest.raises(ValueError, match=rf"does not begin with the chain of {stem} tokens"):
        tree.merge_on_prompt(tries, stem)


def test_a_trie_that_branches_inside_the_chain_is_not_merged():
    branches = tree.build([np.array(s, np.int32) for s in ([1, 2, 3], [1, 4])], [None, None])
    with pytest.raises(ValueError, match="Trie 0 does not begin with the chain of 2 tokens"):
        tree.merge_on_prompt([branches], 2)
