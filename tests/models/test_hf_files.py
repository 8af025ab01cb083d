"""What the small files of a Hugging Face folder say: the chat template and the ends of sequence."""

import json

import pytest
import tokenizers

from tw_jax.models import hf_files
from tw_jax.tokenizer.chat import Chat

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA += ["<|eom_id|>", "<|eot_id|>"]


def folder(special, **files):
    """The contents of a folder whose special tokens have the ids from 0 on."""
    vocabulary = {text: id for id, text in enumerate([*special, "a"])}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    built.add_special_tokens(special)
    texts = {f"{name}.json": json.dumps(fields) for name, fields in files.items()}
    return {n: t.encode() for n, t in {"tokenizer.json": built.to_str(), **texts}.items()}


def read(contents):
    chat = hf_files.chat_of(contents, source="hub")
    return chat.template, hf_files.eos_of(contents, chat, source="hub")


@pytest.mark.parametrize(
    ("contents", "template", "eos"),
    [
        (
            folder(
                QWEN,
                tokenizer_config={
                    "chat_template": "<|im_start|>{{ x }}<|im_end|>",
                    "eos_token": "<|im_end|>",
                },
                generation_config={"eos_token_id": [2, 0]},
                config={"eos_token_id": 2},
            ),
            "qwen",
            ("<|im_end|>", "<|endoftext|>"),
        ),
        # A base model ends texts with another token than answers.
        (
            folder(QWEN, tokenizer_config={"eos_token": {"content": "<|endoftext|>"}}),
            "qwen",
            ("<|im_end|>", "<|endoftext|>"),
        ),
        (
            folder(LLAMA, generation_config={"eos_token_id": [1, 4, 5]}),
            "llama",
            ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        ),
        # The template decides, whatever tokens there are besides.
        (
            folder(
                QWEN,
                tokenizer_config={"chat_template": "Q: {{ x }}", "eos_token": "<|endoftext|>"},
            ),
            "plain",
            ("<|endoftext|>",),
        ),
        (
            folder(["</s>"], config={"eos_token_id": 0, "model_type": "llama"}),
            "plain",
            ("</s>",),
        ),
        # A token that the tokenizer lacks ends nothing.
        (folder(["</s>"], config={"eos_token_id": 77}), "plain", ()),
        (folder(["</s>"], tokenizer_config={"eos_token": "<|im_end|>"}), "plain", ()),
    ],
)
def test_template_and_ends_of_sequence_are_found(contents, template, eos):
    assert read(contents) == (template, eos)


def test_a_template_in_its_own_file_counts_and_is_never_run():
    evil = "{{ raise_exception('run') }}<|start_header_id|><|eot_id|>"
    contents = {**folder(QWEN), "chat_template.jinja": evil.encode()}
    assert hf_files.chat_of(contents, source="hub") == Chat(template="llama")


def test_a_file_that_is_no_json_object_is_named():
    contents = {**folder(QWEN), "generation_config.json": b"[1]"}
    with pytest.raises(ValueError, match=r"hub/generation_config\.json: holds a list"):
        read(contents)
