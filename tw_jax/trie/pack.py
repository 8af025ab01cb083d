"""Packing many tries into fixed rows: first fit, a truncation policy, fill and sharing ratios.

Rows are fixed so that the train step compiles once. This file knows no model and no text; the
data pipeline feeds it tries and takes full batches from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from tw_jax.config import config
from tw_jax.trie.tree import Trie


@config
class Packing:
    """How tries become rows.

    Attributes:
      row_tokens: T, tokens of a row.
      rows: B, rows of a global batch (of one accumulation step).
      too_long: what happens to a trie longer than a row: "refuse" stops with a sentence, "drop"
        leaves it out and counts it, "truncate" keeps the first row_tokens nodes, which cuts branch
        copies of the first blocks before it cuts the joined path (the reference's way, spec 2.4).
      open_rows: rows kept open at once; more of them fill better and delay a trie longer.
    """

    row_tokens: int
    rows: int
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    open_rows: int = 16

    def check(self) -> None:
        """Refuses sizes that cannot hold a token."""
        for name in ("row_tokens", "rows", "open_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"Packing.{name} = {getattr(self, name)}: want at least 1.")


@dataclasses.dataclass
class Fill:
    """Running totals of a packing, for `rows_filled` and `token_sharing`."""

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
        """Tokens saved against one row per call: 1 - nodes / call tokens, in [0, 1)."""
        return 1 - self.used_tokens / max(self.source_tokens, 1)


def truncate(trie: Trie, length: int) -> Trie:
    """The first `length` nodes. Preorder keeps every kept node's ancestors."""
    keep = slice(0, length)
    return Trie(
        tokens=trie.tokens[keep],
        parent=trie.parent[keep],
        depth=trie.depth[keep],
        end=np.minimum(trie.end[keep], np.int32(length)),
        weight=trie.weight[keep],
        source_tokens=trie.source_tokens,
    )


def fit(trie: Trie, cfg: Packing, fill: Fill, *, name: str = "a trajectory") -> Trie | None:
    """Applies the `too_long` policy to one trie; None means that it is left out.

    Raises:
      ValueError: the trie is longer than a row and the policy is "refuse"; `name` says which.
    """
    if len(trie) <= cfg.row_tokens:
        return trie
    if cfg.too_long == "drop":
        fill.dropped += 1
        return None
    if cfg.too_long == "truncate":
        fill.truncated += 1
        return truncate(trie, cfg.row_tokens)
    raise ValueError(
        f"{name} makes a trie of {len(trie)} nodes and a row holds {cfg.row_tokens}: want a trie "
        "that fits. Set Packing.row_tokens higher, or Packing.too_long to 'drop' or 'truncate'."
    )


@dataclasses.dataclass
class Packer:
    """First fit into a bounded set of open rows; its state is plain data, so it can be saved.

    Feed tries with `add`; full rows come back in the order in which they closed.
    """

    row_tokens: int
    open_rows: int
    rows: list[list[Trie]] = dataclasses.field(default_factory=list)
    room: list[int] = dataclasses.field(default_factory=list)

    def add(self, trie: Trie) -> list[Trie] | None:
        """Places one trie; returns a row that had to close for it, else None."""
        for number, room in enumerate(self.room):
            if len(trie) <= room:
                self.rows[number].append(trie)
                self.room[number] -= len(trie)
                return self._close(number) if self.room[number] == 0 else None
        closed = None
        if len(self.rows) >= self.open_rows:
            closed = self._close(int(np.argmin(self.room)))
        self.rows.append([trie])
        self.room.append(self.row_tokens - len(trie))
        return closed

    def flush(self) -> list[list[Trie]]:
        """Closes all open rows, in the order in which they were opened."""
        rows, self.rows, self.room = self.rows, [], []
        return rows

    def _close(self, number: int) -> list[Trie]:
        self.room.pop(number)
        return self.rows.pop(number)


def pack(tries: Iterable[Trie], cfg: Packing, fill: Fill) -> Iterator[list[Trie]]:
    """Yields rows of tries, counting into `fill`; the last rows may be partly empty."""
    packer = Packer(cfg.row_tokens, cfg.open_rows)

    def count(row: list[Trie]) -> list[Trie]:
        fill.rows += 1
        fill.row_tokens += cfg.row_tokens
        for trie in row:
            fill.tries += 1
            fill.used_tokens += len(trie)
            fill.source_tokens += trie.source_tokens
        return row

    for trie in tries:
        fitting = fit(trie, cfg, fill)
        if fitting is not None and (row := packer.add(fitting)) is not None:
            yield count(row)
    for row in packer.flush():
        yield count(row)
