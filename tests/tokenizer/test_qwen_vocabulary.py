"""Forced text meets sampled text on the borders of real tokens: the vocabulary of Qwen3."""

from pathlib import Path

import numpy as np
import pytest
from qwen import write_tokenizer

from tw_jax.data.pipeline import Builder, Data
from tw_jax.data.records import Example
from tw_jax.forkjoin import replay
from tw_jax.forkjoin.calls import Provenance
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.grammar import normalise
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.control import THREADWEAVER
from tw_jax.tokenizer.hugging_face import HuggingFace, add_control_tokens
from tw_jax.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The tokenizer.json of Qwen3."""
    path = tmp_path_factory.mktemp("qwen3") / "tokenizer.json"
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def qwen(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "tokenizer.json"
    content, added = add_control_tokens(published.read_bytes(), source="published")
    path.write_bytes(content)
    assert [token.text for token in added] == list(THREADWEAVER)
    return load_tokenizer(HuggingFace(path=str(path), eos=("<|im_end|>", "<|endoftext|>")))


@pytest.fixture(scope="module")
def protocol(qwen):
    return ThreadWeaver(make_table(qwen), ForkJoin())


def test_the_vocabulary_is_that_of_the_published_checkpoints(qwen):
    # Ids that Qwen's own documentation and configs name.
    assert qwen.id_of("<|endoftext|>") == 151_643
    assert qwen.eos_ids == (151_645, 151_643)
    assert qwen.encode("Hello world!").tolist() == [9707, 1879, 0]
    assert qwen.id_of("<think>") == 151_667


def test_control_tokens_come_behind_the_151669_published_ones(qwen):
    assert [qwen.id_of(text) for text in THREADWEAVER] == list(range(151_669, 151_681))
    # Qwen3's tables have 151,936 rows, so no row is added for them.
    assert qwen.vocab_size == 151_681


def test_words_of_control_tokens_are_encoded_without_their_brackets(published):
    content, added = add_control_tokens(published.read_bytes(), source="published")
    plain = load_tokenizer(HuggingFace(path=str(published), eos=("<|im_end|>",)))
    for token in added:
        assert plain.decode(token.word) == token.text[1:-1]
    assert add_control_tokens(content, source="converted") == (content, [])


BODIES = ["Four", "42 apples", "**bold**", "(x+1)", "乘法", "é", "$a$", "- item", "\\frac12", "..."]


def response(bodies: list[str]) -> str:
    numbers = range(1, len(bodies) + 1)
    plans = "\n".join(f"<Outline>{n}: Plan {n}.</Outline>" for n in numbers)
    threads = "".join(
        f"<Thread>\n{n}: {body}\n</Thread>" for n, body in zip(numbers, bodies, strict=True)
    )
    block = f"<Parallel>\n<Outlines>\n{plans}\n</Outlines>\n{threads}\n</Parallel>"
    return f"<think>\nSplit.\n{block}\nDone.\n</think>\n\nIt is \\boxed{{4}}."


@pytest.mark.parametrize("body", BODIES)
def test_a_written_thread_has_the_ids_that_forcing_its_header_gives(qwen, protocol, body):
    chat = Chat(template="qwen")
    written = response([body, body])
    ids = chat.document(qwen, "What is 2 + 2?", written)
    prompt = len(chat.prompt(qwen, "What is 2 + 2?"))
    made = replay.replay(protocol, ids, prompt)
    threads = [call for call in made.calls if call.path]
    assert len(threads) == 2
    for call in threads:
        # What inference forces was encoded without knowing what follows it.
        number = call.path[1]
        header = qwen.encode(f"\n<Thread>\n{number}:")
        np.testing.assert_array_equal(call.context[-len(header) :], header)
        assert qwen.decode(call.sampled) == f" {body}\n</Thread>"
    assert qwen.decode(made.ids[prompt:]) == written + "<|im_end|>"
    assert Provenance.FORCED in made.provenance


def test_a_colon_that_merges_with_what_follows_is_refused_with_its_place(qwen, protocol):
    chat = Chat(template="qwen")
    merged = qwen.encode(":\n")
    assert len(merged) == 1  # the trap: one id over the border of forced and sampled text
    ids = chat.document(qwen, "2 + 2?", response(["a", "b"]).replace("1: a", "1:\na"))
    with pytest.raises(replay.ReplayError, match=rf"is {merged[0]} where the protocol forces"):
        replay.replay(protocol, ids, len(chat.prompt(qwen, "2 + 2?")))


def test_an_empty_thread_is_named_because_normalising_does_not_help(qwen, protocol):
    written = Example(
        id="a", question="2 + 2?", response=response(["a", ""]), answer="4", task="none"
    )
    assert normalise(written.response) == response(["a", ""]).replace("2: \n", "2:\n")
    builder = Builder(Data(path="x", chat=Chat(template="qwen")), qwen, protocol)
    with pytest.raises(
        ValueError, match=r"x:1: Thread 2 is empty\. Each thread needs a text\. Correct"
    ):
        builder.trajectory(
            Example(**vars(written) | {"response": normalise(written.response)}), "x:1"
        )
