"""Ids as arrays: joined, and checked against a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str) -> None:
    """Refuses ids outside a vocabulary, which an embedding would clamp without a word.

    Args:
      ids: [n] integers.
      vocab_size: ids are 0..vocab_size - 1.
      where: what the ids are, to begin the sentence with.

    Raises:
      TypeError: ids that are not integers.
      ValueError: names the first id outside and its position.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{where}: ids are {array.dtype}; want integers.")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        at = int(outside[0])
        raise ValueError(
            f"{where}: id {array.flat[at]} at position {at} is outside the vocabulary of "
            f"{vocab_size} ids. Use the tokenizer that made these ids, or a model with as many "
            "rows; where a model has more rows than its tokenizer, do not sample the rest."
        )


def join_ids(parts: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    """One array of several, [n] int32."""
    return np.concatenate([np.asarray(part, np.int32) for part in parts])
