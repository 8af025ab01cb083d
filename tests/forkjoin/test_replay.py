"""Replay: a written text gives the calls of inference, and non-canonical text is refused."""

import json
from pathlib import Path

import fakes
import numpy as np
import pytest

from tw_jax.forkjoin import replay, tries
from tw_jax.forkjoin.calls import Provenance
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.trie import tree

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trie.json").read_text())
TOKENIZER = fakes.Characters()
PROTOCOL = ThreadWeaver(make_table(TOKENIZER), ForkJoin(max_threads=50))
BLOCK = (
    "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>"
    "\n<Thread>\n1: aa\n</Thread><Thread>\n2: bb\n</Thread>\n</Parallel>"
)


def play(text: str, prompt: str = "abc"):
    ids = TOKENIZER.encode(prompt + text)
    return replay.replay(PROTOCOL, ids, len(TOKENIZER.encode(prompt)))


class GoldenIds:
    """A tokenizer that knows only what the golden ids mean."""

    def __init__(self):
        tags, self.eos_ids, self.vocab_size = GOLDEN["tags"], (GOLDEN["eos"],), 400
        self._text = {number: name for name, number in tags.items()}
        self._text |= {GOLDEN["digit0"] + d: str(d) for d in range(10)}
        self._text |= {GOLDEN["newline"]: "\n", GOLDEN["colon"]: ":", 300: "."}
        self._ids = {text: number for number, text in self._text.items()}

    def piece(self, token):
        return self._text.get(token, f"w{token} ")

    def id_of(self, text):
        return self._ids[text]

    def encode(self, text):
        return np.array([self._ids[c] for c in text] if len(text) < 5 else [self._ids[text]])


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_the_trie_of_a_document_equals_the_released_one(number):
    case = GOLDEN["cases"][number]
    ids = np.array(case["ids"], np.int32)
    table = make_table(GoldenIds())
    limits = ForkJoin(max_threads=50, max_rounds=50)
    # The document ends with a newline after its end of sequence, which no call samples.
    made = replay.replay(ThreadWeaver(table, limits), ids[:-1], 1)
    calls = [np.concatenate([call.context, call.sampled]) for call in made.calls]
    threads = [
        (call.path[0], len(c)) for call, c in zip(made.calls, calls, strict=True) if call.path
    ]
    rounds = sorted({path for path, _ in threads}, reverse=True)
    lengths = [length for r in rounds for path, length in threads if path == r]
    assert [len(ids), *lengths] == case["paths"]
    trie = tree.build([ids, *calls], [None] * (1 + len(calls)))
    assert trie.tokens.tolist() == case["flat_ids"]
    assert trie.depth.tolist() == case["positions"]
    assert trie.end.tolist() == case["end"]


def test_replay_makes_the_calls_of_inference():
    made = play(f"d{BLOCK}\nc<eos>")
    assert [call.path for call in made.calls] == [(), (0, "1"), (0, "2"), ()]
    sampled = [TOKENIZER.decode(call.sampled) for call in made.calls]
    head, _, tail = BLOCK.partition("\n<Thread>")
    assert sampled == ["d" + head, " aa\n</Thread>", " bb\n</Thread>", "</Parallel>\nc<eos>"]
    del tail


def test_two_blocks_and_no_block_replay():
    assert play(f"{BLOCK}d{BLOCK}<eos>").rounds == 2
    assert play("d<eos>").rounds == 0


def test_empty_threads_and_numbers_from_ten_on_replay():
    count = 12
    listed = "".join(f"<Outline>{n}: a</Outline>\n" for n in range(1, count + 1))
    threads = "".join(f"<Thread>\n{n}:\n</Thread>" for n in range(1, count + 1))
    made = play(f"<Parallel>\n<Outlines>\n{listed}</Outlines>\n{threads}\n</Parallel><eos>")
    assert len(made.calls) == count + 2


def test_the_trie_trains_what_was_sampled_and_nothing_else():
    made = play(f"d{BLOCK}\nc<eos>")
    trie = tries.trajectory_trie(made)
    assert trie.weight.sum() == sum(len(call.sampled) for call in made.calls)
    assert set(trie.weight.tolist()) == {0.0, 1.0}
    joined = trie.weight[: len(made.ids)]
    # Thread 1 is on the joined path and trained there; thread 2's joined copy is not.
    assert TOKENIZER.decode(made.ids[joined > 0]) == (
        "d" + BLOCK.partition("\n<Thread>")[0] + " aa\n</Thread></Parallel>\nc<eos>"
    )
    assert TOKENIZER.decode(trie.tokens[len(made.ids) :]) == "2: bb\n</Thread>"


def test_the_chain_of_the_sequential_baseline_trains_all_after_the_prompt():
    made = play(f"d{BLOCK}\nc<eos>")
    chain = tries.chain_trie(made)
    assert chain.tokens.tolist() == made.ids.tolist()
    np.testing.assert_array_equal(chain.weight > 0, made.provenance != Provenance.PROMPT)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (BLOCK.replace("</Thread><Thread>", "</Thread>\n<Thread>") + "<eos>", "not in canonical"),
        (BLOCK.replace("\n2: bb", "\n3: bb") + "<eos>", "the header of thread 2"),
        (BLOCK.replace("\n</Parallel>", "</Parallel>") + "<eos>", r"forces .* \(a join\)"),
        (BLOCK.partition(" bb")[0], "text ends inside call"),
        (BLOCK, "text ends inside a parent call"),
        (f"{BLOCK}<eos>ab", "Cut the text at its end of sequence"),
    ],
)
def test_text_that_inference_would_not_write_is_refused_with_its_place(text, sentence):
    with pytest.raises(replay.ReplayError, match=sentence):
        play(text)


def test_recorded_calls_that_another_protocol_made_are_refused():
    prompt, alone = TOKENIZER.encode("abc"), ForkJoin(parallel=False)
    ids = TOKENIZER.encode(f"abcd{BLOCK}<eos>")
    one_call = [Result(ids[len(prompt) :])]
    sequential = ThreadWeaver(PROTOCOL.table, alone)
    assert replay.rebuild(sequential, prompt, one_call).finish == "eos"
    with pytest.raises(replay.RecordError, match="first stop id"):
        replay.rebuild(PROTOCOL, prompt, one_call)
    made = play(f"d{BLOCK}\nc<eos>")
    calls = [Result(call.sampled) for call in made.calls]
    assert replay.rebuild(PROTOCOL, prompt, calls).ids.tolist() == made.ids.tolist()
    with pytest.raises(replay.RecordError, match="asks for call 3"):
        replay.rebuild(PROTOCOL, prompt, calls[:3])
    with pytest.raises(replay.RecordError, match="5 calls were recorded"):
        replay.rebuild(PROTOCOL, prompt, [*calls, calls[-1]])


def test_a_text_that_stops_at_every_token_takes_no_memory_of_its_square():
    count = 3000
    stray = TOKENIZER.encode("</Outlines>" * count)
    made = replay.replay(PROTOCOL, np.array([3, *stray, 1], np.int32), 1)
    assert len(made.calls) == count + 1
    assert made.counts == {"stray_outlines": count}
    for number in (0, 1, count):
        assert made.calls[number].context.tolist() == [3, *stray[:number]]
        assert len(made.calls[number].provenance) == number + 1
    # All contexts are views of a few buffers, each half of the next.
    buffers = {id(call.context.base): call.context.base for call in made.calls}
    assert sum(buffer.size for buffer in buffers.values()) < 4 * count


def test_a_thread_longer_than_its_budget_is_refused():
    tight = ThreadWeaver(PROTOCOL.table, ForkJoin(max_thread=3))
    with pytest.raises(replay.ReplayError, match="its budget is 3"):
        replay.replay(tight, TOKENIZER.encode(f"a{BLOCK}<eos>"), 1)
