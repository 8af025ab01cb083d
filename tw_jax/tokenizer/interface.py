"""The interface of a tokenizer, and the checks that its users make.

A tokenizer here is lossless, and each control token is one id. `encode` is for documents, whose
control strings are control tokens; `encode_plain` is for text from outside, in which they are only
text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to ids and back, without loss.

    Attributes:
      vocab_size: number of ids, all special tokens included.
      eos_ids: ids that end a sampled text; the first one ends a written one.
      pad_id: id for places that nobody reads.
      fingerprint: sha256 of the vocabulary in hex; equal where ids mean the same.
      source: what errors call it: the file it was read from, or its kind.
    """

    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    fingerprint: str
    source: str

    @property
    def control_ids(self) -> Mapping[str, int]:
        """The id of each control token that the vocabulary has."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of a document, [n] int32; a control string in it becomes its control id."""
        ...

    def encode_plain(self, text: str) -> np.ndarray:
        """Ids of text that nobody vouches for, [n] int32; no control string becomes its id."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of [n] ids, special tokens verbatim; broken UTF-8 reads as U+FFFD."""
        ...

    def piece(self, id: int) -> str:
        """What one id contributes to a text; U+FFFD for a fraction of a character."""
        ...

    def id_of(self, text: str) -> int:
        """The one id that is `text`; ValueError where it takes several."""
        ...


def require_single_ids(tokenizer: Tokenizer, strings: Iterable[str]) -> None:
    """Refuses a tokenizer in which one of the strings is not exactly one id.

    Raises:
      ValueError: names every such string and the ids it takes.
    """
    wrong = {text: tokenizer.encode(text).tolist() for text in strings}
    wrong = {t: ids for t, ids in wrong.items() if len(ids) != 1 or tokenizer.piece(ids[0]) != t}
    if wrong:
        named = ", ".join(f"{text!r} is {ids}" for text, ids in wrong.items())
        raise ValueError(
            f"{tokenizer.source}: {named}; want one id of its own for each, for threads are "
            "forced, stopped and joined by id. Use the hf/tokenizer.json that `tw convert` writes, "
            "or a SentencePiece file of train_sentencepiece: both have the control tokens."
        )


def check_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Refuses a model whose embedding table has fewer rows than the tokenizer has ids.

    Raises:
      ValueError: so it is.
    """
    if rows < tokenizer.vocab_size:
        raise ValueError(
            f"Model.vocab_size = {rows}: want at least {tokenizer.vocab_size}, the tokenizer's ids."
        )
