"""From the config of a tokenizer to the tokenizer."""

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
    """Builds the tokenizer of a config.

    Args:
      cfg: which one.
      control: the control tokens of the method that the ids are for, in order.
      content: of its file, where the caller has read it; `cfg.path` then only names it in errors.

    Raises:
      FileNotFoundError: its file is not there.
      ValueError: the file is no tokenizer, has no end of sequence, or changes the text it encodes.
    """
    match cfg:
        case Bytes():
            return ByteTokenizer(control)
        case SentencePiece():
            return SentencePieceTokenizer(cfg, control, content)
        case HuggingFace():
            return HuggingFaceTokenizer(cfg, control, content)
