"""The worked example of docs/trie.md: one question, one fork of two threads, one join."""

import numpy as np

from tw_jax.trie.tree import Trie, build


def _words(text: str) -> list[str]:
    return text.split()


PROMPT = _words("U A")
PLAN = _words(
    "p <Parallel> N <Outlines> <Outline> 1 : o1 </Outline> <Outline> 2 : o2 </Outline> </Outlines>"
)
OPEN = _words("N <Thread> N")
THREADS = (_words("1 : a b </Thread>"), _words("2 : c d </Thread>"))
HEADER = 2
"""Forced tokens of a thread: its number and the colon."""
CLOSE = _words("</Parallel> q EOS")

FORK = PROMPT + PLAN
# The join writes the later threads without their leading newline, and one newline after the last.
JOINED = [*FORK, *OPEN, *THREADS[0], *OPEN[1:], *THREADS[1], "N"]
WRITTEN = [*JOINED, *CLOSE]
VOCABULARY = sorted(set(WRITTEN))


def calls() -> list[tuple[list[str], list[str]]]:
    """Context and sampled tokens of the four engine calls, in the order of the protocol."""
    threads = [([*FORK, *OPEN, *text[:HEADER]], text[HEADER:]) for text in THREADS]
    return [(PROMPT, PLAN), *threads, (JOINED, CLOSE)]


def example_trie() -> Trie:
    """The example as the package builds it: the joined path first, then every call."""

    def ids(words: list[str]) -> np.ndarray:
        return np.array([VOCABULARY.index(word) for word in words], np.int32)

    sequences, weights = [ids(WRITTEN)], [None]
    for context, sampled in calls():
        sequences.append(ids(context + sampled))
        weights.append(np.array([0] * len(context) + [1] * len(sampled), np.float32))
    return build(sequences, weights)


def example_words() -> list[str]:
    """The token of each node."""
    return [VOCABULARY[i] for i in example_trie().tokens]
