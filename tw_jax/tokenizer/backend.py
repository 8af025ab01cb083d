"""The base classes of the three tokenizers, and checks of text and files."""

from __future__ import annotations

import abc
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from tw_jax.tokenizer.control import THINK
from tw_jax.tokenizer.ids import check_ids, join_ids

SPACE = "\u2581"
"""SentencePiece vocabularies write this for a space. In a text it is an ordinary character."""
PROBE = f" a  b\n\n\t1: 23,\u00e9{SPACE}\u20ac\U0001f600\u2028</Thread><Thread>\n{{x}}. "
"""A text that a tokenizer must decode unchanged. Its accent is composed, because Qwen uses NFC."""


class Backend(abc.ABC):
    """The base class of all tokenizers; see `Tokenizer` for the methods.

    Attributes:
      pieces: Names of the ids in order, for the fingerprint; None for an unused id.
      control: Control tokens.
      reserved: Further strings that `encode_plain` never encodes as one id.
    """

    def __init__(
        self,
        pieces: Sequence[str | None],
        *,
        source: str,
        eos_ids: tuple[int, ...],
        pad_id: int,
        control: Sequence[str],
        reserved: Iterable[str] = (),
    ) -> None:
        self.source = source
        self.vocab_size = len(pieces)
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        named = json.dumps([self.kind, pieces])
        self.fingerprint = hashlib.sha256(named.encode()).hexdigest()
        self._control = tuple(control)
        strings = sorted({*control, *THINK, *reserved})
        # A lookahead consumes nothing, so it also finds occurrences that overlap.
        self._reserved = re.compile(f"(?={'|'.join(re.escape(s) for s in strings if len(s) > 1)})")

    kind: ClassVar[str]
    """Part of the fingerprint. Never change it: stored ids and checkpoints have the fingerprint."""

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        ...

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer`."""
        ...

    @property
    def control_ids(self) -> Mapping[str, int]:
        """See `Tokenizer`."""
        encoded = {text: self.encode(text).tolist() for text in self._control}
        return {
            text: ids[0]
            for text, ids in encoded.items()
            if len(ids) == 1 and self.piece(ids[0]) == text
        }

    def encode_plain(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        # Every reserved string is cut after its first character and the parts are encoded one by
        # one. So no part contains one, and the backend's handling of added tokens does not matter.
        cuts = [m.start() + 1 for m in self._reserved.finditer(text)]
        starts = [0, *cuts]
        ends = [*cuts, len(text)]
        return join_ids(self.encode(text[i:j]) for i, j in zip(starts, ends, strict=True))

    def piece(self, id: int) -> str:
        """See `Tokenizer`."""
        return self.decode([id])

    def id_of(self, text: str) -> int:
        """See `Tokenizer`."""
        ids = self.encode(text)
        if len(ids) != 1 or self.piece(int(ids[0])) != text:
            raise ValueError(f"{text!r} is not one id of this tokenizer but {ids.tolist()}.")
        return int(ids[0])

    def require_lossless(self, path: str) -> None:
        """Raises ValueError if the vocabulary changes a text with difficult characters."""
        back = self.decode(self.encode(PROBE))
        if back != PROBE:
            raise ValueError(
                f"{path}: the tokenizer changes text: {PROBE!r} comes back as {back!r}. Threads "
                "are joined by id, so every character must be kept. Use a byte-level "
                "tokenizer.json (Qwen, Llama 3), or a file written by train_sentencepiece."
            )


class TableBackend(Backend):
    """A tokenizer that decodes by a table of bytes.

    Attributes:
      table: The bytes of each id.
    """

    def __init__(
        self,
        table: list[bytes],
        pieces: Sequence[str],
        eos_ids: tuple[int, ...],
        *,
        pad_id: int,
        source: str,
        control: Sequence[str],
    ) -> None:
        super().__init__(pieces, source=source, eos_ids=eos_ids, pad_id=pad_id, control=control)
        self._table = table

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer`."""
        check_ids(ids, self.vocab_size, "decode")
        parts = [self._table[i] for i in np.asarray(ids).tolist()]
        return b"".join(parts).decode("utf-8", errors="replace")


def require_unicode(text: str) -> bytes:
    """The UTF-8 of a text; ValueError for half a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text has half a surrogate pair, U+{ord(text[error.start]):04X}, at character "
            f"{error.start}: …{text[max(0, error.start - 20) : error.start]!r}. It is not Unicode "
            "text. Read its source as UTF-8, or replace that character."
        ) from None


def existing(path: str | Path) -> Path:
    """The path of a tokenizer's file; raises FileNotFoundError if there is none."""
    if not Path(path).is_file():
        hint = "a folder; name the file in it" if Path(path).is_dir() else "not there"
        raise FileNotFoundError(f"{path}: the tokenizer file is {hint}.")
    return Path(path)
