"""Text to ids and back: bytes, SentencePiece and Hugging Face files behind one protocol.

A tokenizer here is lossless, and each control token is one id. `encode` is for documents, whose
control strings are control tokens; `encode_plain` is for text from outside, in which they are only
text. This file knows no grammar of threads and no model; it hands on `Tokenizer`s, and with `Chat`
the ids of a prompt and of a whole document.
"""

from __future__ import annotations

import abc
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import sentencepiece
import tokenizers

from tw_jax import files
from tw_jax.bounds import require_text
from tw_jax.config import configurable

CONTROL = (
    "<Think>",
    "</Think>",
    "<Parallel>",
    "</Parallel>",
    "<Outlines>",
    "</Outlines>",
    "<Outline>",
    "</Outline>",
    "<Thread>",
    "</Thread>",
    "<Conclusion>",
    "</Conclusion>",
)
"""ThreadWeaver's control tokens, in the order in which they are added to a vocabulary."""

_THINK = ("<think>", "</think>")
_SPACE = "\u2581"
"""How a SentencePiece vocabulary writes a space; in a text it is an ordinary character."""
_PROBE = f" a  b\n\n\t1: 23,\u00e9{_SPACE}\u20ac\U0001f600\u2028</Thread><Thread>\n{{x}}. "
"""What a tokenizer must give back unchanged; composed characters, for Qwen composes them (NFC)."""


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


@configurable
class Bytes:
    """A vocabulary of 270: the 256 bytes, pad, end of sequence and the control tokens."""


@configurable
class SentencePiece:
    """A SentencePiece file, as written by `train_sentencepiece`.

    Attributes:
      path: the .model file.
    """

    path: str

    def check(self) -> None:
        """Refuses a file without a name."""
        require_text(self, "path")


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


@configurable
class Chat:
    r"""How a question becomes a prompt, and what ends an answer.

    plain: `{question}\n`. qwen: the Qwen3 template with one user turn. llama: the Llama 3 headers
    with one user turn. The instruction follows the question after one space, unless the
    question ends with it already, as in ThreadWeaver's tables. The newline that Qwen's template
    writes behind the last `<|im_end|>` is never sampled and thus left out.
    Source: ThreadWeaver (arXiv:2512.07843), training texts.

    Attributes:
      template: family of the tokenizer that the prompt is for.
      instruction: sentence behind every question; "" for none.
    """

    template: Literal["plain", "qwen", "llama"]
    instruction: str = ""

    def prompt(self, tokenizer: Tokenizer, question: str) -> np.ndarray:
        """Ids up to the first one that the model writes.

        Args:
          tokenizer: must know the template's special tokens.
          question: outside text; control strings in it stay text.

        Returns:
          [n] int32.

        Raises:
          ValueError: the tokenizer lacks a special token of the template.
        """
        bare = not question.endswith(self.instruction)  # "" ends every question
        user = f"{question} {self.instruction}" if bare else question
        if self.template == "plain":
            return tokenizer.encode_plain(user + "\n")
        # Between two special tokens goes one stretch of text, encoded as a whole, so that the ids
        # are those of the whole prompt encoded at once.
        if self.template == "qwen":
            start, end = (self._special(tokenizer, s) for s in ("<|im_start|>", "<|im_end|>"))
            parts = [start, f"user\n{user}", end, "\n", start, "assistant\n"]
        else:
            names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")
            start, end, turn, begin = (self._special(tokenizer, s) for s in names)
            parts = [begin, start, "user", end, f"\n\n{user}", turn]
            parts += [start, "assistant", end, "\n\n"]
        return _joined(
            [part] if isinstance(part, int) else tokenizer.encode_plain(part) for part in parts
        )

    def answer_suffix(self, tokenizer: Tokenizer) -> np.ndarray:
        """Ids that end a written answer, [1] int32; the sampler stops on the same id."""
        if self.template == "plain":
            return np.array(tokenizer.eos_ids[:1], np.int32)
        name = "<|im_end|>" if self.template == "qwen" else "<|eot_id|>"
        last = self._special(tokenizer, name)
        if last not in tokenizer.eos_ids:
            raise ValueError(
                f"Chat.template = {self.template!r}: answers end with {name} (id {last}), but the "
                f"sampler stops only on {tokenizer.eos_ids}. Add {name!r} to HuggingFace.eos."
            )
        return np.array([last], np.int32)

    def document(self, tokenizer: Tokenizer, question: str, response: str) -> np.ndarray:
        """Ids of a written trajectory, [n] int32: prompt, response (trusted), end of sequence."""
        prompt = self.prompt(tokenizer, question)
        return _joined((prompt, tokenizer.encode(response), self.answer_suffix(tokenizer)))

    def _special(self, tokenizer: Tokenizer, text: str) -> int:
        try:
            return tokenizer.id_of(text)
        except ValueError as error:
            raise ValueError(
                f"Chat.template = {self.template!r}: {error} Use a tokenizer of that family, or "
                "set Chat.template to 'plain'."
            ) from None


def load_tokenizer(
    cfg: Bytes | SentencePiece | HuggingFace,
    *,
    control: Sequence[str] = CONTROL,
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
            return _ByteTokenizer(control)
        case SentencePiece():
            return _SentencePieceTokenizer(cfg, control, content)
        case HuggingFace():
            return _HuggingFaceTokenizer(cfg, control, content)


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


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str) -> None:
    """Refuses ids outside a vocabulary, which an embedding would clamp without a word.

    Args:
      ids: [n] integers.
      vocab_size: ids are 0..vocab_size - 1.
      where: what the ids are, to begin the sentence with.

    Raises:
      TypeError: ids that are not integers.
      ValueError: names the first id outside and its position.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{where}: ids are {array.dtype}; want integers.")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        at = int(outside[0])
        raise ValueError(
            f"{where}: id {array.flat[at]} at position {at} is outside the vocabulary of "
            f"{vocab_size} ids. Use the tokenizer that made these ids, or a model with as many "
            "rows; where a model has more rows than its tokenizer, do not sample the rest."
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


class _Backend(abc.ABC):
    """What the three share: facts about the vocabulary, and ways to be careful with text.

    Attributes:
      pieces: names of the ids in order, for the fingerprint; None for a hole.
      control: control tokens.
      reserved: further strings that `encode_plain` must keep from becoming one id.
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
        named = json.dumps([type(self).__name__, pieces])
        self.fingerprint = hashlib.sha256(named.encode()).hexdigest()
        self._control = tuple(control)
        strings = sorted({*control, *_THINK, *reserved})
        # Looking ahead without consuming finds occurrences that overlap, too.
        self._reserved = re.compile(f"(?={'|'.join(re.escape(s) for s in strings if len(s) > 1)})")

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray: ...

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...

    @property
    def control_ids(self) -> Mapping[str, int]:
        encoded = {text: self.encode(text).tolist() for text in self._control}
        return {
            text: ids[0]
            for text, ids in encoded.items()
            if len(ids) == 1 and self.piece(ids[0]) == text
        }

    def encode_plain(self, text: str) -> np.ndarray:
        # Every reserved string is cut behind its first character and the parts are encoded one by
        # one, so no part contains one, whatever the backend does with its added tokens.
        cuts = [m.start() + 1 for m in self._reserved.finditer(text)]
        starts = [0, *cuts]
        ends = [*cuts, len(text)]
        return _joined(self.encode(text[i:j]) for i, j in zip(starts, ends, strict=True))

    def piece(self, id: int) -> str:
        return self.decode([id])

    def id_of(self, text: str) -> int:
        ids = self.encode(text)
        if len(ids) != 1 or self.piece(int(ids[0])) != text:
            raise ValueError(f"{text!r} is not one id of this tokenizer but {ids.tolist()}.")
        return int(ids[0])

    def _require_lossless(self, path: str) -> None:
        back = self.decode(self.encode(_PROBE))
        if back != _PROBE:
            raise ValueError(
                f"{path}: the tokenizer changes text: {_PROBE!r} comes back as {back!r}. Threads "
                "are joined by id, so want one that keeps every character: a byte-level "
                "tokenizer.json (Qwen, Llama 3), or a file written by train_sentencepiece."
            )


class _TableBackend(_Backend):
    """A backend that decodes by itself: each id has its bytes.

    Attributes:
      table: the bytes of each id.
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
        check_ids(ids, self.vocab_size, "decode")
        parts = [self._table[i] for i in np.asarray(ids).tolist()]
        return b"".join(parts).decode("utf-8", errors="replace")


class _ByteTokenizer(_TableBackend):
    def __init__(self, control: Sequence[str]) -> None:
        table = [bytes([i]) for i in range(256)]
        table += [s.encode() for s in ("<pad>", "</s>", *control)]
        pieces = [b.decode("latin-1") for b in table]
        super().__init__(table, pieces, (257,), pad_id=256, source="Bytes()", control=control)
        # Without control tokens the pattern matches nothing.
        self._controls = re.compile(f"({'|'.join(map(re.escape, control)) or '(?!)'})")
        self._ids = {text: np.array([258 + i], np.int32) for i, text in enumerate(control)}

    def encode(self, text: str) -> np.ndarray:
        parts = self._controls.split(text)  # text, control, text, ...
        return _joined(
            self._ids[part] if i % 2 else np.frombuffer(_utf8(part), np.uint8)
            for i, part in enumerate(parts)
        )


class _SentencePieceTokenizer(_TableBackend):
    def __init__(self, cfg: SentencePiece, control: Sequence[str], content: bytes | None) -> None:
        data = _existing(cfg.path).read_bytes() if content is None else content
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise ValueError(
                f"{cfg.path}: not a SentencePiece model. Give a .model file, such as "
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
            else piece.replace(_SPACE, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        pad = pad if pad >= 0 else eos
        super().__init__(table, pieces, (eos,), pad_id=pad, source=cfg.path, control=control)
        self._space = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._require_lossless(cfg.path)

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        # The library would take a U+2581 of the text for a space, so it goes by its bytes.
        head, *tail = text.split(_SPACE)
        ids = self._processor.encode(head)
        for part in tail:
            ids += self._space + self._processor.encode(part)
        return np.array(ids, np.int32)


class _HuggingFaceTokenizer(_Backend):
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
        self._require_lossless(cfg.path)

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        check_ids(ids, self.vocab_size, "decode")
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


def train_sentencepiece(
    texts: Iterable[str], path: str | Path, vocab_size: int, *, control: Sequence[str] = CONTROL
) -> None:
    """Trains a SentencePiece file on a corpus and writes it in one move.

    Byte-pair merges with byte fallback, which lose no character; the control tokens, `<think>`,
    `</think>`, newline and colon are symbols that nothing merges with, and digits stand one by one,
    so ids do not depend on where a text is cut at a tag or behind a thread's header. The same texts
    in the same order give the same file.

    Args:
      texts: the corpus; control strings in it are control tokens.
      path: the .model file to write.
      vocab_size: ids in all. 285 are fixed and every frequent character takes one; the rest are
        merges.
      control: the control tokens, which are its first symbols in this order.

    Raises:
      ValueError: the corpus is empty, or does not carry that vocabulary.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if _utf8(line))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=[*control, *_THINK, "\n", ":"],
            required_chars="0123456789",
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 24,  # bytes; the library drops longer lines without a word
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
    content: bytes, *, source: str, control: Sequence[str] = CONTROL
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
    data = _existing(path).read_bytes() if content is None else content
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no narrower class
        raise ValueError(
            f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error}). Give the "
            "tokenizer.json of a checkpoint."
        ) from None


def _joined(parts: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text has half a surrogate pair, U+{ord(text[error.start]):04X}, at character "
            f"{error.start}: …{text[max(0, error.start - 20) : error.start]!r}. It is no Unicode "
            "text; read its source as UTF-8, or replace that character."
        ) from None


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        hint = "a folder; name the file in it" if Path(path).is_dir() else "not there"
        raise FileNotFoundError(f"{path}: the tokenizer file is {hint}.")
    return Path(path)
