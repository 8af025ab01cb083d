"""Reads files of Hugging Face `tokenizers` and adds control tokens. The only importer of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from tw_jax.bounds import require_text
from tw_jax.config import configurable
from tw_jax.tokenizer.backend import Backend, existing, require_unicode
from tw_jax.tokenizer.control import THREADWEAVER
from tw_jax.tokenizer.ids import check_ids


@configurable
class HuggingFace:
    """A file of Hugging Face `tokenizers`. Missing control tokens are added after its last id.

    Attributes:
      path: The tokenizer.json of a checkpoint.
      eos: Tokens that end a sampled text, such as `<|im_end|>`. The first is also the padding.
    """

    path: str
    eos: tuple[str, ...]

    def check(self) -> None:
        """Refuses a tokenizer without an end of sequence."""
        if not self.eos:
            raise ValueError(
                "HuggingFace.eos = () must name at least one token, or sampling never ends. "
                "Set it to ('<|im_end|>',) for Qwen or ('<|eot_id|>',) for Llama 3."
            )
        require_text(self, "path", "eos")


class HuggingFaceTokenizer(Backend):
    """The tokenizer of a tokenizer.json."""

    kind = "_HuggingFaceTokenizer"

    def __init__(self, cfg: HuggingFace, control: Sequence[str], content: bytes | None) -> None:
        tokenizer = _read_hugging_face(cfg.path, content)
        # A file may contain the limits of the program that wrote it, which would cut documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_special_tokens(list(control))
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        missing = [text for text in cfg.eos if text not in vocabulary]
        if missing:
            raise ValueError(
                f"HuggingFace.eos = {cfg.eos}: {', '.join(missing)} is not a token of {cfg.path}. "
                f"Its special tokens are: {', '.join(special[:30])}."
            )
        pieces: list[str | None] = [None] * (max(vocabulary.values()) + 1)
        for text, id in vocabulary.items():
            pieces[id] = text
        eos_ids = tuple(vocabulary[text] for text in cfg.eos)
        super().__init__(
            pieces,
            source=cfg.path,
            eos_ids=eos_ids,
            pad_id=eos_ids[0],
            control=control,
            reserved=special,
        )
        self.require_lossless(cfg.path)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        require_unicode(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer`."""
        check_ids(ids, self.vocab_size, "decode")
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


class AddedToken(NamedTuple):
    """A control token that was added to a vocabulary.

    Attributes:
      text: Its text.
      id: Its new id.
      word: Ids of its text without the outer brackets, such as `/Thread`; at least one.
    """

    text: str
    id: int
    word: list[int]


def add_control_tokens(
    content: bytes, *, source: str, control: Sequence[str] = THREADWEAVER
) -> tuple[bytes, list[AddedToken]]:
    """Adds control tokens to a tokenizer.json, so that other engines have them too.

    Tokens that it already has keep their ids. The others get the ids after its last one, in order.

    Args:
      content: Content of the tokenizer.json of a checkpoint.
      source: Name of the file in errors.
      control: The control tokens.

    Returns:
      The new content, and the added tokens in order. If none is missing, the content is unchanged.

    Raises:
      ValueError: If it is not a tokenizer.json.
    """
    before = _read_hugging_face(source, content)
    vocabulary = before.get_vocab(with_added_tokens=True)
    missing = [text for text in control if text not in vocabulary]
    if not missing:
        return content, []
    after = _read_hugging_face(source, content)
    after.add_special_tokens(list(control))
    ids = after.get_vocab(with_added_tokens=True)
    return after.to_str(pretty=True).encode(), [
        AddedToken(text, ids[text], before.encode(text[1:-1], add_special_tokens=False).ids)
        for text in missing
    ]


def read_vocabulary(content: bytes, *, source: str) -> dict[str, int]:
    """The ids of a tokenizer.json by their texts, special tokens included.

    Args:
      content: Content of the file.
      source: Name of the file in errors.

    Raises:
      ValueError: If it is not a tokenizer.json.
    """
    return _read_hugging_face(source, content).get_vocab(with_added_tokens=True)


def _read_hugging_face(path: str | Path, content: bytes | None = None) -> tokenizers.Tokenizer:
    data = existing(path).read_bytes() if content is None else content
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no narrower class
        raise ValueError(
            f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error}). Give the "
            "tokenizer.json of a checkpoint."
        ) from None
