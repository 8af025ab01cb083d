"""Loads the tokenizer of a config."""

from __future__ import annotations

from collections.abc import Sequence

from tw_jax.tokenizer.bytes import Bytes, ByteTokenizer
from tw_jax.tokenizer.control import THREADWEAVER
from tw_jax.tokenizer.hugging_face import HuggingFace, HuggingFaceTokenizer
from tw_jax.tokenizer.interface import Tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece, SentencePieceTokenizer


def load_tokenizer(
    cfg: Bytes | SentencePiece | HuggingFace,
    *,
    control: Sequence[str] = THREADWEAVER,
    content: bytes | None = None,
) -> Tokenizer:
    """Loads the tokenizer of a config.

    Args:
      cfg: The config.
      control: The control tokens of the method that the tokenizer is used with, in order.
      content: The content of its file, if the caller has read it. `cfg.path` is then only the name
        of the file in errors.

    Raises:
      FileNotFoundError: If its file does not exist.
      ValueError: If the file is not a tokenizer, has no end of sequence, or changes text.
    """
    match cfg:
        case Bytes():
            return ByteTokenizer(control)
        case SentencePiece():
            return SentencePieceTokenizer(cfg, control, content)
        case HuggingFace():
            return HuggingFaceTokenizer(cfg, control, content)
