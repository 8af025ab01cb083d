"""Random calls, and in float64 numpy what `fakes.path_network` says after one plain sequence.

The oracle knows neither rows nor spans nor parents: it is given the tokens of a call, or those of a
node's ancestors, and answers for the token that follows.
"""

from __future__ import annotations

import jax
import numpy as np
import oracles

from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.tree import Trie, build

VOCAB, WIDTH = 32, 16

Call = tuple[np.ndarray, np.ndarray]
"""Tokens [n] int32 and loss weights [n] float32."""


def logp_after(params, prefix: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[V] float64 log-probs of what follows a plain sequence."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    angle = np.arange(len(prefix))[:, None] * np.linspace(0.002, 0.06, WIDTH)
    hidden = np.tanh((p["embed"][prefix] * np.cos(angle)).sum(0) / 2)
    logits = hidden @ p["out"] / temperature
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def logp_of_node(params, trie, row, node, temperature=1.0):
    """[V] float64 log-probs of what follows the ancestors of a node, one plain sequence."""
    path, at = [], trie.parent[row, node]
    while True:
        path.append(int(trie.tokens[row, at]))
        if trie.parent[row, at] == at:
            break
        at = trie.parent[row, at]
    return logp_after(params, np.array(path[::-1]), temperature)


def nll(params, calls: list[Call]) -> float:
    """Sum of weight * nll over calls, token by token."""
    return -sum(
        weight[i] * logp_after(params, tokens[:i])[tokens[i]]
        for tokens, weight in calls
        for i in np.flatnonzero(weight)
    )


def random_tries(seed: int, num_tries: int) -> tuple[list[list[Call]], list[Trie]]:
    """The calls of some trajectories, which share prefixes, and a trie for each trajectory."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(num_tries):
        count = int(rng.integers(2, 6))
        drawn = oracles.random_sequences(rng, count=count, longest=7, vocabulary=VOCAB)
        weights = [rng.integers(0, 4, len(tokens)).astype(np.float32) / 2 for tokens in drawn]
        for weight in weights:
            weight[0] = 0
        groups.append(list(zip(drawn, weights, strict=True)))
    return groups, [build([t for t, _ in calls], [w for _, w in calls]) for calls in groups]


def rows_of(rows: list[list[Trie]]) -> TrieBatch:
    """Rows just long enough for the fullest, and three nodes of padding."""
    return stack_rows(rows, max(sum(map(len, tries)) for tries in rows) + 3)
