"""Files of Hugging Face `tokenizers`: read, and given control tokens. Its only importer."""

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
    """A file of Hugging Face `tokenizers`; missing control tokens are added behind its last id.

    Attributes:
      path: the tokenizer.json of a checkpoint.
      eos: tokens that end a sampled text, such as `<|im_end|>`; the first one is also the padding.
    """

    path: str
    eos: tuple[str, ...]

    def check(self) -> None:
        """Refuses a tokenizer without an end of sequence."""
        if not self.eos:
            raise ValueError(
                "HuggingFace.eos = (): want at least one token, or sampling never ends. "
                "Set it to ('<|im_end|>',) for Qwen or ('<|eot_id|>',) for Llama 3."
            )
        require_text(self, "path", "eos")


class HuggingFaceTokenizer(Backend):
    """The tokenizer of a tokenizer.json."""

    kind = "_HuggingFaceTokenizer"

    def __init__(self, cfg: HuggingFace, control: Sequence[str], content: bytes | None) -> None:
        tokenizer = _read_hugging_face(cfg.path, content)
        # A file may carry the limits of the program that wrote it; they would cut documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_special_tokens(list(control))
        self._tokenizer = tokenizer
        known = tokenizer.get_vocab(with_added_tokens=True)
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        missing = [text for text in cfg.eos if text not in known]
        if missing:
            raise ValueError(
                f"HuggingFace.eos = {cfg.eos}: {', '.join(missing)} is no token of {cfg.path}. "
                f"Its special tokens are: {', '.join(special[:30])}."
            )
        pieces: list[str | None] = [None] * (max(known.values()) + 1)
        for text, id in known.items():
            pieces[id] = text
        eos_ids = tuple(known[text] for text in cfg.eos)
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
    """A control token that a vocabulary did not have.

    Attributes:
      text: its name.
      id: its new id.
      word: ids of its name without the outer brackets, such as `/Thread`, at least one.
    """

    text: str
    id: int
    word: list[int]


def add_control_tokens(
    content: bytes, *, source: str, control: Sequence[str] = THREADWEAVER
) -> tuple[bytes, list[AddedToken]]:
    """Adds control tokens to a tokenizer.json, for engines that read it by themselves.

    Those that it has keep their ids; the others get the ids after its last one, in order.

    Args:
      content: of the tokenizer.json of a checkpoint.
      source: what errors call it.
      control: the control tokens.

    Returns:
      The new content, and the added tokens in order. Where all are there, the old content and none.

    Raises:
      ValueError: it is not a tokenizer.json.
    """
    before = _read_hugging_face(source, content)
    known = before.get_vocab(with_added_tokens=True)
    missing = [text for text in control if text not in known]
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
    """The ids of a tokenizer.json by their names, special tokens included.

    Args:
      content: of the file.
      source: what errors call it.

    Raises:
      ValueError: it is not a tokenizer.json.
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
