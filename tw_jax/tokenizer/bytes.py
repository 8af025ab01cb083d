"""A tokenizer without a file: its ids are the bytes, followed by the control tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tw_jax.config import configurable
from tw_jax.tokenizer.backend import TableBackend, require_unicode
from tw_jax.tokenizer.ids import join_ids


@configurable
class Bytes:
    """A vocabulary of 270: the 256 bytes, pad, end of sequence and the control tokens."""


class ByteTokenizer(TableBackend):
    """The tokenizer of `Bytes`."""

    kind = "_ByteTokenizer"

    def __init__(self, control: Sequence[str]) -> None:
        table = [bytes([i]) for i in range(256)]
        table += [s.encode() for s in ("<pad>", "</s>", *control)]
        pieces = [b.decode("latin-1") for b in table]
        super().__init__(table, pieces, (257,), pad_id=256, source="Bytes()", control=control)
        # Without control tokens the pattern matches nothing.
        self._controls = re.compile(f"({'|'.join(map(re.escape, control)) or '(?!)'})")
        self._ids = {text: np.array([258 + i], np.int32) for i, text in enumerate(control)}

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        parts = self._controls.split(text)  # text, control, text, ...
        return join_ids(
            self._ids[part] if i % 2 else np.frombuffer(require_unicode(part), np.uint8)
            for i, part in enumerate(parts)
        )
