"""Packs tries into rows of a fixed length, the longest first, and counts fill and sharing.

Rows have a fixed length so that the train step is compiled only once. The data pipeline and P-GRPO
pass tries to this file. It does not depend on a model or on text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.trie.tree import Trie


@configurable
class Packing:
    """How tries are packed into rows.

    Attributes:
      row_tokens: T, tokens of a row.
      too_long: What happens to a trie that is longer than a row. "refuse" raises an error, "drop"
        leaves the trie out and counts it, and "truncate" keeps its first row_tokens nodes, as the
        reference does. Truncation cuts branch copies of the first blocks before the joined path.
      window: Trajectories that are packed together. More of them fill rows better. A resumed run
        packs at most one window again.
    """

    row_tokens: int
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    window: int = 256

    def check(self) -> None:
        """Refuses sizes that cannot hold a token."""
        require(self, "row_tokens", "window", least=1)


@dataclasses.dataclass
class PackingStats:
    """Running totals of packed tries, from which `rows_filled` and `token_sharing` are computed."""

    tries: int = 0
    rows: int = 0
    used_tokens: int = 0
    row_tokens: int = 0
    source_tokens: int = 0
    dropped: int = 0
    truncated: int = 0

    @property
    def rows_filled(self) -> float:
        """Share of the emitted row tokens that are trie nodes, in [0, 1]."""
        return self.used_tokens / max(self.row_tokens, 1)

    @property
    def token_sharing(self) -> float:
        """Share of tokens saved by merging calls: 1 - nodes / call tokens, in [0, 1)."""
        return 1 - self.used_tokens / max(self.source_tokens, 1)


def truncate(trie: Trie, length: int) -> Trie:
    """The first `length` nodes. Their ancestors are among them, because the order is preorder."""
    keep = slice(0, length)
    return Trie(
        tokens=trie.tokens[keep],
        parent=trie.parent[keep],
        depth=trie.depth[keep],
        end=np.minimum(trie.end[keep], np.int32(length)),
        weight=trie.weight[keep],
        source_tokens=trie.source_tokens,
    )


def fit_row(
    trie: Trie, cfg: Packing, stats: PackingStats, *, name: str = "a trajectory"
) -> Trie | None:
    """Applies the `too_long` policy to one trie; returns None if the trie is left out.

    Args:
      trie: The trie.
      cfg: The policy and the length of a row.
      stats: Counts dropped and truncated tries.
      name: Name of the trie, for the message.

    Raises:
      ValueError: If the trie is longer than a row and the policy is "refuse".
    """
    if len(trie) <= cfg.row_tokens:
        return trie
    if cfg.too_long == "drop":
        stats.dropped += 1
        return None
    if cfg.too_long == "truncate":
        stats.truncated += 1
        return truncate(trie, cfg.row_tokens)
    raise ValueError(
        f"{name} makes a trie of {len(trie)} nodes and a row holds {cfg.row_tokens}. Set "
        "Packing.row_tokens higher, or Packing.too_long to 'drop' or 'truncate'."
    )


def pack(
    tries: Sequence[Trie], cfg: Packing, stats: PackingStats | None = None
) -> list[list[Trie]]:
    """Packs tries into rows, the longest first. `stack_rows` makes a batch of the rows.

    Rows depend only on the tries, so a data position inside a window can be restored by packing the
    window again. Rows are returned in the order of their earliest trie, because the order of
    packing would sort batches by length.

    Args:
      tries: Tries, none longer than a row; see `fit_row`.
      cfg: Only `row_tokens` is read.
      stats: Totals to add to; None counts nothing.

    Returns:
      The tries of each row. Their lengths add up to at most `row_tokens`.
    """
    stats = PackingStats() if stats is None else stats
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(tries)), key=lambda n: -len(tries[n])):
        size = len(tries[number])
        row = next((r for r, free in enumerate(room) if size <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(cfg.row_tokens)
        rows[row].append(number)
        room[row] -= size
    stats.tries += len(tries)
    stats.rows += len(rows)
    stats.row_tokens += len(rows) * cfg.row_tokens
    stats.used_tokens += sum(map(len, tries))
    stats.source_tokens += sum(trie.source_tokens for trie in tries)
    return [[tries[n] for n in sorted(row)] for row in sorted(rows, key=min)]
