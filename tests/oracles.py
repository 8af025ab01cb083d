"""Slow, independent truths that the code under test is compared with, and random inputs."""

from __future__ import annotations

import numpy as np


def visible_by_parents(parent: np.ndarray) -> np.ndarray:
    """[n, n] bool: node j is node i or an ancestor of it, found by walking parent pointers."""
    size = len(parent)
    sees = np.zeros((size, size), bool)
    for i in range(size):
        j = i
        while j >= 0:
            sees[i, j] = True
            j = parent[j]
    return sees


class DictTrie:
    """A token trie of dictionaries with first-seen children, one node for each token."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int]] = []  # token, parent
        self.children: list[dict[int, int]] = []
        self.weight: list[float] = []
        self.roots: dict[int, int] = {}

    def insert(self, sequence, weights=None) -> None:
        level, parent = self.roots, -1
        for at, token in enumerate(map(int, sequence)):
            if token not in level:
                level[token] = len(self.nodes)
                self.nodes.append((token, parent))
                self.children.append({})
                self.weight.append(0.0)
            parent = level[token]
            self.weight[parent] += 0.0 if weights is None else float(weights[at])
            level = self.children[parent]

    def flatten(self) -> tuple[list[int], list[int], list[int], list[float]]:
        """Tokens, parents (flat), depths and weights, in first-seen preorder."""
        order, depths, flat = [], [], {}
        stack = [(node, 0) for node in reversed(self.roots.values())]
        while stack:
            node, depth = stack.pop()
            flat[node] = len(order)
            order.append(node)
            depths.append(depth)
            stack += [(child, depth + 1) for child in reversed(self.children[node].values())]
        parents = [flat.get(self.nodes[node][1], -1) for node in order]
        return (
            [self.nodes[node][0] for node in order],
            parents,
            depths,
            [self.weight[node] for node in order],
        )


def random_sequences(
    rng: np.random.Generator, *, count: int, longest: int, vocabulary: int
) -> list[np.ndarray]:
    """Sequences that share prefixes: each cuts an earlier one somewhere and goes on by itself."""
    made: list[np.ndarray] = []
    for _ in range(count):
        head = np.zeros(0, np.int32)
        if made and rng.random() < 0.8:
            earlier = made[rng.integers(len(made))]
            head = earlier[: rng.integers(0, len(earlier) + 1)]
        tail = rng.integers(0, vocabulary, rng.integers(0 if len(head) else 1, longest))
        sequence = np.concatenate([head, tail]).astype(np.int32)
        made.append(sequence if len(sequence) else np.zeros(1, np.int32))
    return made
