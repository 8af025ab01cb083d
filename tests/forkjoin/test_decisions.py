"""Decisions between ThreadWeaver's components that no other test shows, and the page of all."""

import re

import fakes
import numpy as np
import pytest
from repo.sources import PACKAGE, ROOT

from tw_jax.data import records
from tw_jax.forkjoin.calls import Provenance
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.protocol import Result, steps
from tw_jax.forkjoin.replay import RecordError, rebuild
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.forkjoin.tries import trajectory_trie
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.trie.tree import flat_labels

PAGE = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
TOKENIZER = fakes.Characters(extra=("12",))
TABLE = make_table(TOKENIZER)


def plan(threads: int) -> str:
    listed = "".join(f"<Outline>{n}: a</Outline>\n" for n in range(1, threads + 1))
    return f"<Parallel>\n<Outlines>\n{listed}</Outlines>"


def rolled(*sampled, prompt="abc", **limits):
    """A trajectory from what each call drew, as text or ids."""
    ids = [TOKENIZER.encode(drawn) if isinstance(drawn, str) else drawn for drawn in sampled]
    protocol = ThreadWeaver(TABLE, ForkJoin(**limits))
    return rebuild(protocol, TOKENIZER.encode(prompt), [Result(drawn) for drawn in ids])


def test_item_9_a_row_with_its_instruction_and_a_bare_one_give_one_prompt():
    rows = (
        {"prompt": [{"role": "user", "content": "Find 3. Think."}], "answer": "3"},
        {"question": "Find 3.", "answer": "3"},
    )
    carries, bare = (records.from_json(row, where="", task="", index=0) for row in rows)
    tokenizer = load_tokenizer(Bytes())
    np.testing.assert_array_equal(
        Chat(template="plain").prompt(tokenizer, carries.question),
        Chat(template="plain", instruction="Think.").prompt(tokenizer, bare.question),
    )


def test_item_13_flat_labels_train_both_copies_and_one_wrong_target_for_each_branch():
    threads = " a\n</Thread>", " b\n</Thread>", " c\n</Thread>"
    made = rolled(plan(2), *threads[:2], "</Parallel>" + plan(3), *threads, "</Parallel><eos>")
    trie = trajectory_trie(made)
    flat = flat_labels(trie, made.prompt_tokens)
    assert ((flat.weight > 0) & (flat.parent != trie.parent)).sum() == (2 - 1) + (3 - 1)
    returned = np.flatnonzero(made.provenance == Provenance.RETURNED)
    assert flat.weight[returned].all()
    first = [len(call.sampled) for call in made.calls if call.path[1:] == ("1",)]
    assert trie.weight[returned].sum() == sum(first)  # no joined copy of threads 2 and 3


def test_item_16_ids_that_no_tokenizer_would_choose_survive_fork_and_join():
    apart = np.concatenate([TOKENIZER.encode(piece) for piece in ("1", "2", "\n</Thread>")])
    assert len(apart) > len(TOKENIZER.encode("12\n</Thread>"))
    made = rolled(plan(2), apart, " b\n</Thread>", "</Parallel><eos>")
    for ids in (made.ids, made.calls[-1].context):
        runs = np.lib.stride_tricks.sliding_window_view(ids, len(apart))
        assert (runs == apart).all(axis=1).any()


def test_item_18_outlines_that_end_by_an_end_of_sequence_fork_nothing():
    made = rolled(plan(2).replace("</Outlines>", "<eos>"))
    assert (made.finish, made.rounds, len(made.calls)) == ("eos", 0, 1)


def test_p10_all_threads_of_a_fork_are_asked_for_at_once():
    rollout = steps(ThreadWeaver(TABLE, ForkJoin(max_threads=12)), TOKENIZER.encode("abc"))
    (parent,) = next(rollout)
    requests = rollout.send([Result(TOKENIZER.encode(plan(12)))])
    assert [request.path for request in requests] == [(0, str(n)) for n in range(1, 13)]
    shared = len(parent.context) + len(TOKENIZER.encode(plan(12)))
    assert {request.shared for request in requests} == {shared}


THREAD = " b\n</Thread>"


@pytest.mark.parametrize(
    ("drawn", "under", "limits", "sentence"),
    [
        ((plan(1), " aaa", "<eos>"), {"max_thread": 4}, {}, r"Call 1 \(0, '1'\) ends after 4 tok"),
        ((plan(2), THREAD, THREAD, "<eos>"), {}, {"max_threads": 1}, r"Call 2 \(\) ends after"),
        ((plan(1), THREAD, "<eos>"), {}, {"parallel": False}, r"Call 0 \(\) ends after"),
        ((plan(1), THREAD, plan(1)), {"max_rounds": 1}, {}, r"asks for call 3 \(1, '1'\) and 3"),
        ((plan(1), THREAD) * 2 + ("<eos>",), {}, {"max_rounds": 1}, "5 calls .* protocol makes 3"),
    ],
)
def test_m13_calls_that_were_drawn_under_other_limits_are_refused(drawn, under, limits, sentence):
    assert len(rolled(*drawn, **under).calls) == len(drawn)
    with pytest.raises(RecordError, match=sentence):
        rolled(*drawn, **limits)


# The page.


def test_every_item_has_its_row_or_is_said_to_be_open():
    counts = {"": 36, "B": 18, "P": 11, "M": 16}
    want = {f"{kind}{n}" for kind, last in counts.items() for n in range(1, last + 1)}
    decided, _, still_open = PAGE.partition("## Not decided here yet")
    rows = re.findall(r"^\| ([BPM]?\d+) \|", decided, re.MULTILINE)
    assert len(rows) == len(set(rows))
    listed = re.findall(r"^- ((?:[BPM]?\d+,? ?)+):", still_open, re.MULTILINE)
    assert set(rows) | set(", ".join(listed).split(", ")) == want


def test_every_test_and_file_that_the_page_names_exists():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.M)}
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= defined
    files = set(re.findall(r"`((?:\w+/)?\w+\.py)`", PAGE))
    assert [name for name in files if not (PACKAGE / name).is_file()] == []
