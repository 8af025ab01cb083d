"""Joins arrays of ids, and checks ids against a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str) -> None:
    """Refuses ids outside a vocabulary, because an embedding would silently clamp them.

    Args:
      ids: [n] integers.
      vocab_size: Ids must be in 0..vocab_size - 1.
      where: Name of the ids, with which the message begins.

    Raises:
      TypeError: If the ids are not integers.
      ValueError: If an id is outside. The message names the first one and its position.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{where}: ids are {array.dtype} and must be integers.")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        at = int(outside[0])
        raise ValueError(
            f"{where}: id {array.flat[at]} at position {at} is outside the vocabulary of "
            f"{vocab_size} ids. Use the tokenizer that made these ids, or a model with enough "
            "rows. If a model has more rows than its tokenizer has ids, do not sample the others."
        )


def join_ids(parts: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Concatenates ids to one array, [n] int32."""
    return np.concatenate([np.asarray(part, np.int32) for part in parts])
