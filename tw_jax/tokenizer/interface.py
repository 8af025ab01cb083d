"""The interface of a tokenizer, and checks of a tokenizer.

A tokenizer here is lossless, and each control token is one id. `encode` is for documents, whose
control strings become control tokens. `encode_plain` is for untrusted text, whose control strings
are encoded as plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Converts text to ids and back, without loss.

    Attributes:
      vocab_size: Number of ids, all special tokens included.
      eos_ids: Ids that end a sampled text. The first one ends a plain document.
      pad_id: Id of padding, which no computation reads.
      fingerprint: sha256 of the vocabulary in hex. Equal fingerprints mean equal ids.
      source: Name in errors: the file that it was read from, or its kind.
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
        """Ids of a document, [n] int32. A control string in it becomes its control id."""
        ...

    def encode_plain(self, text: str) -> np.ndarray:
        """Ids of untrusted text, [n] int32. No control string in it becomes a control id."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of [n] ids, with the text of special tokens. Invalid UTF-8 becomes U+FFFD."""
        ...

    def piece(self, id: int) -> str:
        """Text of one id; U+FFFD if it is a part of a character."""
        ...

    def id_of(self, text: str) -> int:
        """The id whose text is `text`; raises ValueError if there is none."""
        ...


def require_single_ids(tokenizer: Tokenizer, strings: Iterable[str]) -> None:
    """Refuses a tokenizer in which one of the strings is not exactly one id.

    Raises:
      ValueError: If there is such a string. The message names all of them with their ids.
    """
    wrong = {text: tokenizer.encode(text).tolist() for text in strings}
    wrong = {t: ids for t, ids in wrong.items() if len(ids) != 1 or tokenizer.piece(ids[0]) != t}
    if wrong:
        named = ", ".join(f"{text!r} is {ids}" for text, ids in wrong.items())
        raise ValueError(
            f"{tokenizer.source}: {named}. Each must be one id of its own, because threads are "
            "forced, stopped and joined by id. Use the hf/tokenizer.json that `tw convert` writes, "
            "or a SentencePiece file of train_sentencepiece: both have the control tokens."
        )


def check_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Refuses a model whose embedding table has fewer rows than the tokenizer has ids.

    Raises:
      ValueError: If it has fewer.
    """
    if rows < tokenizer.vocab_size:
        raise ValueError(
            f"Model.vocab_size = {rows} must be at least {tokenizer.vocab_size}, the number of the "
            "tokenizer's ids. Raise it, or use the model's own tokenizer."
        )
