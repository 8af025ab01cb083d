"""`TrieBatch`: rows of packed tries as [B, T] arrays, the input of every train step.

Tries in one row need no segment ids, because the interval of a root ends where its trie ends. Which
tries share a row is decided in `trie/pack.py`. Losses are in `train/loss.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tw_jax.contracts import Span
from tw_jax.trie.tree import Trie


class TrieBatch(struct.PyTreeNode):
    """Packed rows. Node i of a row sees node j iff `j <= i < end[j]`.

    Leading axes beyond [B, T] (gradient accumulation: [A, B, T]) are allowed.
    """

    tokens: jax.Array  # [B, T] int32 ids, 0 in padding
    parent: jax.Array  # [B, T] int32 row index of the node that predicts this one; own index at
    # roots and padding, where weight is 0
    depth: jax.Array  # [B, T] int32 positions, 0 at roots and in padding
    end: jax.Array  # [B, T] int32 row index, one past the last descendant; i + 1 in padding
    weight: jax.Array  # [B, T] float32 loss weights, 0 in padding

    @property
    def span(self) -> Span:
        """The intervals of the one mask: enter is the row index."""
        index = jnp.broadcast_to(jnp.arange(self.end.shape[-1], dtype=jnp.int32), self.end.shape)
        return Span(enter=index, exit=self.end)


def stack_rows(rows: Sequence[Sequence[Trie]], row_tokens: int) -> TrieBatch:
    """Places tries side by side in rows and pads the rest of each row.

    Args:
      rows: The tries of each row. A row may be empty.
      row_tokens: T.

    Returns:
      A `TrieBatch` of numpy arrays, [len(rows), row_tokens].

    Raises:
      ValueError: If the tries of a row are longer than the row.
    """
    shape = (len(rows), row_tokens)
    index = np.broadcast_to(np.arange(row_tokens, dtype=np.int32), shape)
    tokens, depth = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    parent, end = index.copy(), index + np.int32(1)
    weight = np.zeros(shape, np.float32)
    for b, tries in enumerate(rows):
        used = sum(len(trie) for trie in tries)
        if used > row_tokens:
            raise ValueError(
                f"Row {b} holds tries of {used} tokens together, and a row has {row_tokens}. "
                "Set Packing.row_tokens higher or put fewer tries in the row."
            )
        at = 0
        for trie in tries:
            here = slice(at, at + len(trie))
            tokens[b, here], depth[b, here] = trie.tokens, trie.depth
            root = trie.parent < 0
            parent[b, here] = np.where(root, index[b, here], trie.parent + at)
            end[b, here] = trie.end + at
            weight[b, here] = np.where(root, 0, trie.weight)
            at += len(trie)
    return TrieBatch(tokens=tokens, parent=parent, depth=depth, end=end, weight=weight)  # pyright: ignore[reportArgumentType]  # numpy stands in for jax.Array on the host
