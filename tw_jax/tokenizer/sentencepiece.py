"""Reads SentencePiece files and trains them on a corpus. The only importer of sentencepiece."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from tw_jax import files
from tw_jax.bounds import require_text
from tw_jax.config import configurable
from tw_jax.tokenizer.backend import SPACE, TableBackend, existing, require_unicode
from tw_jax.tokenizer.control import THINK, THREADWEAVER


@configurable
class SentencePiece:
    """A SentencePiece file, as written by `train_sentencepiece`.

    Attributes:
      path: The .model file.
    """

    path: str

    def check(self) -> None:
        """Refuses a file without a name."""
        require_text(self, "path")


class SentencePieceTokenizer(TableBackend):
    """The tokenizer of a .model file."""

    kind = "_SentencePieceTokenizer"

    def __init__(self, cfg: SentencePiece, control: Sequence[str], content: bytes | None) -> None:
        data = existing(cfg.path).read_bytes() if content is None else content
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise ValueError(
                f"{cfg.path}: not a SentencePiece model. Give a .model file, such as one that "
                "train_sentencepiece writes."
            ) from None
        self._processor = processor
        eos, pad = processor.eos_id(), processor.pad_id()
        if eos < 0:
            raise ValueError(
                f"{cfg.path}: the vocabulary has no end of sequence, so sampling would never end. "
                "Train it with one, as train_sentencepiece does."
            )
        size = processor.get_piece_size()
        pieces = [processor.id_to_piece(i) for i in range(size)]
        table = [
            bytes([int(piece[1:-1], 16)])  # <0x0A>
            if processor.is_byte(i)
            else piece.replace(SPACE, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        pad = pad if pad >= 0 else eos
        super().__init__(table, pieces, (eos,), pad_id=pad, source=cfg.path, control=control)
        self._space = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.require_lossless(cfg.path)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        require_unicode(text)
        # The library would read a U+2581 of the text as a space, so it is encoded by its bytes.
        head, *tail = text.split(SPACE)
        ids = self._processor.encode(head)
        for part in tail:
            ids += self._space + self._processor.encode(part)
        return np.array(ids, np.int32)


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    *,
    control: Sequence[str] = THREADWEAVER,
) -> None:
    """Trains a SentencePiece model on a corpus and writes its file atomically.

    The model uses byte-pair merges with byte fallback, which is lossless. Control tokens,
    `<think>`, `</think>`, newline and colon are never merged with other symbols, and each digit is
    one token. So ids do not depend on where a text is cut, at a tag or after a thread's header. The
    same texts in the same order give the same file.

    Args:
      texts: The corpus. Control strings in it are control tokens.
      path: The .model file to write.
      vocab_size: Total number of ids. 285 are fixed, each frequent character has one, and the rest
        are merges.
      control: The control tokens, which are the first symbols, in this order.

    Raises:
      ValueError: If the corpus is empty, or too small for this vocabulary.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if require_unicode(line))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=[*control, *THINK, "\n", ":"],
            required_chars="0123456789",
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 24,  # bytes; the library silently drops longer lines
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "The corpus has no text."
        raise ValueError(f"train_sentencepiece: vocab_size = {vocab_size}: {reason}") from None
    with files.replacing(Path(path)) as part:
        part.write_bytes(model.getvalue())
