"""The small files of a Hugging Face folder: tokenizer, chat template, generation settings, licence.

An import copies them from a folder of the Hub into the folder of checkpoints, and an export copies
them from there. This file reads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tw_jax import files
from tw_jax.models import hf_config
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import AddedToken, add_control_tokens, read_vocabulary

TOKENIZER = "tokenizer.json"

NAMES = (
    *("config.json", "generation_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
"""The files that are copied beside tokenizer.json. No code and no weights are among them."""


def read(folder: Path) -> dict[str, bytes]:
    """The content of tokenizer.json and of the files of `NAMES` that a folder has, by name.

    Raises:
      ValueError: If one of them is a link that leads out of the folder.
    """
    found = [folder / name for name in (TOKENIZER, *NAMES)]
    found = [file for file in found if file.is_symlink() or file.exists()]
    for file in found:
        require_own(file, folder)
    return {file.name: file.read_bytes() for file in found}


def require_own(file: Path, folder: Path) -> None:
    """Refuses a file that is not a regular file of a folder, or of the Hub's cache around it."""
    places, inside = [folder], folder.resolve()
    # The Hub's cache keeps models--NAME/snapshots/COMMIT/FILE as links to models--NAME/blobs/HASH.
    if inside.parent.name == "snapshots" and inside.parent.parent.name.startswith("models--"):
        places.append(inside.parent.parent / "blobs")
    files.require_own(file, *places)


def parsed(contents: Mapping[str, bytes], name: str, *, source: str | Path) -> dict[str, Any]:
    """The JSON object of one of the files; {} if the file is missing.

    Raises:
      ValueError: If it is not a JSON object.
    """
    if name not in contents:
        return {}
    return hf_config.json_object(contents[name], Path(source, name))


def with_control_tokens(
    contents: Mapping[str, bytes], control: Sequence[str], *, source: str | Path
) -> tuple[dict[str, bytes], list[AddedToken]]:
    """Adds control tokens to the tokenizer's files.

    Returns:
      (all files, the added tokens).
    """
    path = f"{source}/{TOKENIZER}"
    content, added = add_control_tokens(contents[TOKENIZER], source=path, control=control)
    contents = {**contents, TOKENIZER: content}
    fields = parsed(contents, "tokenizer_config.json", source=source)
    # If this table exists, some engines read added tokens only from it.
    if added and isinstance(fields.get("added_tokens_decoder"), dict):
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for token in added:
            entry = {"content": token.text, **flags, "special": True}
            fields["added_tokens_decoder"][str(token.id)] = entry
        contents["tokenizer_config.json"] = as_json(fields)
    return contents, added


def as_json(content: Any) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def chat_of(contents: Mapping[str, bytes], *, source: str | Path) -> Chat:
    """The family of a chat template, from the template or, if there is none, from special tokens.

    A template is never executed. It is only searched for the special tokens that it writes.
    """
    fields = parsed(contents, "tokenizer_config.json", source=source)
    template = json.dumps(fields.get("chat_template") or "")
    for name in ("chat_template.jinja", "chat_template.json"):
        template += contents.get(name, b"").decode("utf-8", errors="replace")
    searched = template
    if template == '""':
        searched = "".join(read_vocabulary(contents[TOKENIZER], source=f"{source}/{TOKENIZER}"))
    if "<|im_start|>" in searched and "<|im_end|>" in searched:
        return Chat(template="qwen")
    if "<|start_header_id|>" in searched and "<|eot_id|>" in searched:
        return Chat(template="llama")
    return Chat(template="plain")


def eos_of(contents: Mapping[str, bytes], chat: Chat, *, source: str | Path) -> tuple[str, ...]:
    """The tokens that end a sampled text. The one that ends an answer of the template is first.

    The others are named by tokenizer_config.json, generation_config.json and config.json. Only
    tokens of tokenizer.json are returned.

    Returns:
      Each token once; () if none is named.
    """
    ids = read_vocabulary(contents[TOKENIZER], source=f"{source}/{TOKENIZER}")
    texts = {id: text for text, id in ids.items()}
    named: list[Any] = [{"qwen": "<|im_end|>", "llama": "<|eot_id|>"}.get(chat.template)]
    token = parsed(contents, "tokenizer_config.json", source=source).get("eos_token")
    named.append(token.get("content") if isinstance(token, dict) else token)
    for name in ("generation_config.json", "config.json"):
        given = parsed(contents, name, source=source).get("eos_token_id")
        named += [
            texts.get(id)
            for id in (given if isinstance(given, list) else [given])
            if isinstance(id, int)
        ]
    return tuple(dict.fromkeys(text for text in named if isinstance(text, str) and text in ids))
