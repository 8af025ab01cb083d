"""Merges token sequences into a trie, flattened in preorder (numpy, on the host).

Node j is visible to the nodes i with `j <= i < end[j]`. Pass the joined path first: the ancestors
of every node are then at most two contiguous runs, and the flat order is that of ThreadWeaver's
collator. Children are in the order in which they were first seen. The time is linear in the total
number of tokens. Tags and calls have no meaning here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Trie:
    """A trie in preorder. Node i is seen by nodes `i <= q < end[i]` and by no other.

    Attributes:
      tokens: [n] int32 ids.
      parent: [n] int32, the node whose hidden state predicts this one; -1 at a root.
      depth: [n] int32 position, 0 at a root.
      end: [n] int32, one past the last descendant.
      weight: [n] float32, the loss weight of predicting this node from its parent.
      source_tokens: total length of the merged sequences; the share of tokens saved is
        `1 - len(tokens) / source_tokens`.
    """

    tokens: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    end: np.ndarray
    weight: np.ndarray
    source_tokens: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(slots=True)
class _Segment:
    """The nodes that one sequence added to the trie: its tail after the last node in common."""

    tokens: np.ndarray
    weight: np.ndarray  # float32, summed over the sequences that pass
    parent: int  # the segment of its parent node, -1 for a root
    offset: int  # index of its parent node in that segment
    children: list[tuple[int, int]]  # (offset, segment), in order of insertion
    start: int = 0  # flat index of the first node


def build(sequences: Iterable[np.ndarray], weights: Iterable[np.ndarray | None]) -> Trie:
    """Merges sequences into one trie.

    Sequences that share a prefix share its nodes. The weights of a shared node are added, so that
    sum(weight * nll) over the trie is the sum over the sequences.

    Args:
      sequences: Arrays of int32 ids, none empty, with the joined path first. They are read one at
        a time and not kept, so a generator of sequences needs memory for only one.
      weights: For each sequence its [len] float32 loss weights, or None for no loss.

    Raises:
      ValueError: If a sequence is empty, a weight has another length than its sequence, or the
        first token of a sequence has a weight (no token precedes it and could predict it).
    """
    segments: list[_Segment] = []
    child: dict[tuple[int, int, int], int] = {}
    source_tokens = 0
    for number, (sequence, weight) in enumerate(zip(sequences, weights, strict=True)):
        _check(number, sequence, weight)
        _insert(sequence, weight, segments, child)
        source_tokens += len(sequence)
    tokens, parent, depth, end = _flatten(segments)
    total = np.empty(len(tokens), np.float32)
    for segment in segments:
        total[segment.start : segment.start + len(segment.tokens)] = segment.weight
    return Trie(tokens, parent, depth, end, total, source_tokens)


def merge_on_prompt(tries: Sequence[Trie], stem: int) -> Trie:
    """Joins tries that begin with the same chain: the chain once, then each trie's other nodes.

    Nothing is merged below the chain, not even equal tokens, because each rollout of a prompt has
    its own weights and its own advantage. The nodes of one trie follow those of the trie before
    it, in their order. The weights of the chain are added.

    Args:
      tries: At least one trie.
      stem: Length of the chain: the first `stem` nodes of each trie, above all its other nodes.

    Raises:
      ValueError: If a trie has other tokens there, or branches before the end of the chain.
    """
    first = tries[0]
    for number, trie in enumerate(tries):
        if not (
            0 <= stem <= len(trie)
            and np.array_equal(trie.tokens[:stem], first.tokens[:stem])
            and (trie.end[:stem] == len(trie)).all()
        ):
            raise ValueError(
                f"Trie {number} does not begin with the chain of {stem} tokens that trie 0 begins "
                "with. All tries of a group must have one prompt. Merge only rollouts of one "
                "prompt."
            )
    # By how much the indices of the nodes below the chain grow.
    shifts = np.cumsum([0, *(len(trie) - stem for trie in tries)]).astype(np.int32)
    size = stem + int(shifts[-1])

    def join(head: np.ndarray, bodies: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([head, *bodies], dtype=head.dtype)

    parents = (
        np.where(trie.parent[stem:] < stem, trie.parent[stem:], trie.parent[stem:] + shift)
        for trie, shift in zip(tries, shifts, strict=False)
    )
    ends = (trie.end[stem:] + shift for trie, shift in zip(tries, shifts, strict=False))
    return Trie(
        tokens=join(first.tokens[:stem], (trie.tokens[stem:] for trie in tries)),
        parent=join(first.parent[:stem], parents),
        depth=join(first.depth[:stem], (trie.depth[stem:] for trie in tries)),
        end=join(np.full(stem, size, np.int32), ends),
        weight=join(
            np.stack([trie.weight[:stem] for trie in tries]).sum(axis=0),
            (trie.weight[stem:] for trie in tries),
        ),
        source_tokens=sum(trie.source_tokens for trie in tries),
    )


def flat_labels(trie: Trie, prompt_tokens: int) -> Trie:
    """The reference's labels: every node after the prompt, predicted from its flat predecessor.

    ThreadWeaver's collator shifts labels in flat order and masks only the prompt. So forced tokens
    and both copies of threads 2..n are trained, and the first node of each branch copy is predicted
    from an unrelated leaf. This is kept for comparison. `depth` and `end` are those of the tree.
    """
    index = np.arange(len(trie), dtype=np.int32)
    return dataclasses.replace(
        trie, parent=index - 1, weight=(index >= max(prompt_tokens, 1)).astype(np.float32)
    )


def _check(number: int, sequence: np.ndarray, weight: np.ndarray | None) -> None:
    if not len(sequence):
        raise ValueError(f"Sequence {number} of a trie is empty. Leave it out.")
    if weight is None:
        return
    if len(weight) != len(sequence):
        raise ValueError(
            f"Sequence {number} has {len(sequence)} tokens and {len(weight)} weights. Give one "
            "weight for each token."
        )
    if weight[0]:
        raise ValueError(
            f"The first token of sequence {number} has weight {weight[0]}, which must be 0 "
            "because no token precedes it. Begin the sequence with a prompt or a start token."
        )


def _insert(
    sequence: np.ndarray,
    weight: np.ndarray | None,
    segments: list[_Segment],
    child: dict[tuple[int, int, int], int],
) -> None:
    """Follows the sequence from the root, adds its weights, and appends its tail as a segment."""
    segment, offset, at = -1, -1, 0  # the last matched node, and the position in the sequence
    while at < len(sequence):
        found = child.get((segment, offset, int(sequence[at])))
        if found is None:
            # A copy, because a view would keep the whole sequence in memory.
            tail = sequence[at:].astype(np.int32)
            added = np.zeros(len(tail), np.float32)
            if weight is not None:
                added[:] = weight[at:]
            child[segment, offset, int(tail[0])] = len(segments)
            if segment >= 0:
                segments[segment].children.append((offset, len(segments)))
            segments.append(_Segment(tail, added, segment, offset, []))
            return
        have = segments[found].tokens
        length = min(len(have), len(sequence) - at)
        differs = have[:length] != sequence[at : at + length]
        first = int(differs.argmax())
        # argmax of all-False is 0, and the first token always matches.
        shared = first or length
        if weight is not None:
            segments[found].weight[:shared] += weight[at : at + shared]
        at += shared
        segment, offset = found, shared - 1
        # The sequence may continue in a branch that an earlier sequence added inside this segment.


def _flatten(
    segments: list[_Segment],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Preorder: a segment's run, then what hangs from it, the deepest offset first."""
    size = sum(len(segment.tokens) for segment in segments)
    tokens = np.empty(size, np.int32)
    parent = np.arange(-1, size - 1, dtype=np.int32)
    depth = np.empty(size, np.int32)
    end = np.empty(size, np.int32)
    at = 0
    for root, segment in enumerate(segments):
        if segment.parent < 0:
            at = _flatten_root(root, at, segments, (tokens, parent, depth, end))
    return tokens, parent, depth, end


def _flatten_root(
    root: int,
    at: int,
    segments: list[_Segment],
    out: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> int:
    """Writes the tree of one root, starting at flat index `at`; returns the index after it."""
    tokens, parent, depth, end = out
    # Each entry: a segment, its children that are not written yet (the next one last), and the
    # number of its nodes whose `end` is not written yet.
    stack: list[list] = []

    def lay(number: int) -> None:
        nonlocal at
        segment = segments[number]
        segment.start, size = at, len(segment.tokens)
        first = 0
        if segment.parent >= 0:
            parent[at] = segments[segment.parent].start + segment.offset
            first = int(depth[parent[at]]) + 1
        else:
            parent[at] = -1
        tokens[at : at + size] = segment.tokens
        depth[at : at + size] = np.arange(first, first + size, dtype=np.int32)
        at += size
        # Deepest offset first; at one offset, first seen first. Reversed, because of `pop`.
        order = sorted(segment.children, key=lambda pair: -pair[0])[::-1]
        stack.append([number, order, size])

    lay(root)
    while stack:
        number, order, still_open = stack[-1]
        start = segments[number].start
        if order:
            offset, next_segment = order.pop()
            # Nodes below the branching point are complete: their subtrees end here.
            end[start + offset + 1 : start + still_open] = at
            stack[-1][2] = min(still_open, offset + 1)
            lay(next_segment)
        else:
            end[start : start + still_open] = at
            stack.pop()
    return at
