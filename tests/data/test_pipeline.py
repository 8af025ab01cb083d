"""The pipeline: packed is what was written, positions are exact, bad input is a sentence."""

import itertools
import json
import re

import fakes
import numpy as np
import pytest

from tw_jax.data import diagnose, pipeline, records
from tw_jax.data.pipeline import Batches, Builder, Data
from tw_jax.forkjoin import tries
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.replay import replay
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.tasks import multiplication
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.trie.pack import Packing

TOKENIZER = load_tokenizer(Bytes())
TASK = multiplication.Multiplication(
    min_value=11, max_value=99, min_factors=2, max_factors=3, parallel=True, lone_pair="fork"
)
CHAT = Chat(template="plain")
LIMITS = ForkJoin(max_threads=4)
PROTOCOL = ThreadWeaver(make_table(TOKENIZER), LIMITS)


def examples(count):
    return [
        records.Example(
            id=str(n),
            question=problem.question,
            response=TASK.gold(problem),
            answer=problem.answer,
            task="multiplication",
        )
        for n, problem in enumerate(TASK.problems(seed=1, count=count))
    ]


def write(path, found):
    records.write(path, found)
    return str(path)


def open_batches(path, *, rows=2, row_tokens=3000, window=5, host=0, num_hosts=1, **data):
    cfg = Data(path=path, chat=CHAT, **data)
    packing = Packing(row_tokens=row_tokens, window=window)
    builder = Builder(cfg, TOKENIZER, PROTOCOL)
    return Batches(cfg, packing, builder, rows=rows, host=host, num_hosts=num_hosts)


def texts(batch):
    """The joined paths found in the rows: each root's path along first children to an end."""
    found = []
    for tokens, depth in zip(batch.tokens, batch.depth, strict=True):
        roots = [i for i in np.flatnonzero(depth == 0) if tokens[i]]
        for root in roots:
            length = next(
                (n for n in itertools.count(1) if root + n >= len(depth) or depth[root + n] != n), 0
            )
            found.append(TOKENIZER.decode(tokens[root : root + length]))
    return found


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "array_record"])
def test_an_epoch_holds_every_record_once_in_every_format(tmp_path, suffix):
    written = examples(10)
    batches = open_batches(write(tmp_path / f"x.{suffix}", written), window=10)
    found: list[str] = []
    while len(found) < 10:
        found += texts(next(batches))
    want = {f"{e.question}\n{e.response}" for e in written}
    assert {text.removesuffix(TOKENIZER.piece(TOKENIZER.eos_ids[0])) for text in found} == want


def test_batches_are_the_tries_of_the_replayed_texts(tmp_path):
    (written,) = examples(1)
    batch = next(open_batches(write(tmp_path / "x.jsonl", [written]), rows=1, window=1, seed=None))
    ids = CHAT.document(TOKENIZER, written.question, written.response)
    made = replay(PROTOCOL, ids, len(CHAT.prompt(TOKENIZER, written.question)))
    trie = tries.trajectory_trie(made)
    assert batch.tokens[0, : len(trie)].tolist() == trie.tokens.tolist()
    assert batch.weight[0, : len(trie)].tolist() == trie.weight.tolist()
    assert batch.weight.sum() == sum(len(call.sampled) for call in made.calls)


@pytest.mark.parametrize("drawn", [0, 1, 4, 9])
def test_a_restored_position_yields_the_same_batches(tmp_path, drawn):
    path = write(tmp_path / "x.jsonl", examples(12))
    first = open_batches(path)
    for _ in range(drawn):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    want = [next(first) for _ in range(6)]
    second = open_batches(path)
    second.set_state(state)
    for batch in want:
        again = next(second)
        for a, b in zip(vars(batch).values(), vars(again).values(), strict=True):
            np.testing.assert_array_equal(a, b)
    assert vars(second.stats) == vars(first.stats)


@pytest.mark.parametrize(
    ("count", "host", "sentence"),
    [
        (13, 0, "has changed since the position in it was saved"),
        (12, 1, "in share 0 of 2 of the records, and this process reads share 1 of 2"),
    ],
)
def test_a_position_in_another_file_or_share_is_refused(tmp_path, count, host, sentence):
    position = open_batches(write(tmp_path / "x.jsonl", examples(12)), num_hosts=2).get_state()
    path = write(tmp_path / "x.jsonl", examples(count))
    with pytest.raises(ValueError, match=sentence):
        open_batches(path, host=host, num_hosts=2).set_state(position)


def test_hosts_share_the_records_without_overlap(tmp_path):
    path = write(tmp_path / "x.jsonl", examples(12))
    seen = []
    for host in range(3):
        batches = open_batches(path, window=4, host=host, num_hosts=3)
        found: list[str] = []
        while len(found) < 4:
            found += texts(next(batches))
        seen.append(set(found))
    assert [len(some) for some in seen] == [4, 4, 4]
    assert len(set.union(*seen)) == 12


def test_labels_of_the_reference_and_of_the_baseline(tmp_path):
    path = write(tmp_path / "x.jsonl", examples(1))
    calls, flat, chain = (
        next(open_batches(path, rows=1, window=1, seed=None, labels=labels))
        for labels in ("calls", "flat", "sequential")
    )
    np.testing.assert_array_equal(calls.tokens, flat.tokens)
    np.testing.assert_array_equal(calls.end, flat.end)
    assert calls.weight.sum() < flat.weight.sum()
    nodes = int((flat.tokens > 0).sum())
    assert flat.parent[0, 1:nodes].tolist() == list(range(nodes - 1))
    assert (chain.end[0, : int((chain.weight > 0).sum())] == chain.end[0, 0]).all()
    assert (chain.tokens > 0).sum() < nodes


def rollout(found, **changes):
    problem = found.problem
    ids = CHAT.document(TOKENIZER, found.question, found.response)
    made = replay(PROTOCOL, ids, len(CHAT.prompt(TOKENIZER, found.question)))
    record = records.Rollout.from_trajectory(
        made, problem, id=found.id, fingerprint=TOKENIZER.fingerprint, text=found.response
    )
    return type(record)(**{**vars(record), **changes})


def test_rollouts_are_rebuilt_from_their_ids_and_never_encoded(tmp_path):
    (written,) = examples(1)
    by_text = open_batches(write(tmp_path / "a.jsonl", [written]), rows=1, window=1)
    kept = rollout(written, text="another text altogether")
    by_ids = open_batches(write(tmp_path / "b.jsonl", [kept]), rows=1, window=1)
    for a, b in zip(vars(next(by_text)).values(), vars(next(by_ids)).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def unclosed(found):
    assert "</Parallel>" in found.response
    response = found.response.replace("</Parallel>", "", 1)
    return type(found)(**{**vars(found), "response": response})


def test_a_record_with_an_unclosed_block_names_its_line_and_place(tmp_path):
    found = examples(3)
    found[1] = unclosed(found[1])
    path = write(tmp_path / "x.jsonl", found)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: [\s\S]*<Parallel>[\s\S]*line"):
        next(open_batches(path, seed=None))


def test_a_record_behind_a_blank_line_is_told_with_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, [unclosed(e) for e in examples(1)])
    path.write_text("\n\n" + path.read_text())
    with pytest.raises(ValueError, match=r"x\.jsonl:3: "):
        next(open_batches(str(path), seed=None))


def test_a_file_that_is_overwritten_within_an_epoch_ends_it(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, examples(12))
    batches = open_batches(str(path), window=2)
    next(batches)
    text = path.read_text()
    with path.open("r+") as file:
        file.write(text.replace("multiplication", "subtraction   "))
    with pytest.raises(ValueError, match="was changed while it was being read"):
        list(itertools.islice(batches, 20))


def test_a_truncated_file_names_its_line_and_the_remedy(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, examples(3))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"x\.jsonl:3.*cut short|x\.jsonl:3.*ends inside"):
        next(open_batches(str(path), seed=None))


def test_a_token_outside_the_vocabulary_names_its_line(tmp_path):
    bad = rollout(examples(1)[0], prompt=np.array([5, 4000], np.int32))
    path = write(tmp_path / "x.jsonl", [bad])
    with pytest.raises(ValueError, match=r"x\.jsonl:1: id 4000 at position 1 is outside"):
        next(open_batches(path))


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    bad = rollout(examples(1)[0], fingerprint=fakes.Characters().fingerprint)
    path = write(tmp_path / "x.jsonl", [bad])
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the rollout has ids of the tokenizer char"):
        next(open_batches(path))


def test_a_trajectory_longer_than_a_row_names_its_line_and_the_remedy(tmp_path):
    path = write(tmp_path / "x.jsonl", examples(2))
    with pytest.raises(ValueError, match=r"x\.jsonl:1 makes a trie of \d+ nodes.*row_tokens"):
        next(open_batches(path, row_tokens=100, seed=None))


def test_unusable_records_can_be_left_out_and_are_counted(tmp_path):
    found = examples(4)
    found[1] = unclosed(found[1])
    path = write(tmp_path / "x.jsonl", found)
    batches = open_batches(path, rows=1, window=4, row_tokens=9000, unusable="drop")
    with pytest.warns(UserWarning, match=r"left out. .*x\.jsonl:2: <Parallel> is never") as told:
        list(itertools.islice(batches, 2))
    assert len(told) == 1, "the second epoch names it again"
    assert (batches.unusable, batches.stats.tries) == (1, 6)
    again = open_batches(path, rows=1, window=4, row_tokens=9000, unusable="drop")
    again.set_state(json.loads(json.dumps(batches.get_state())))
    assert again.unusable == batches.unusable


def test_dropped_records_are_named_up_to_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_LISTED", 2)
    found = examples(5)
    found[1:] = [unclosed(one) for one in found[1:]]
    path = write(tmp_path / "x.jsonl", found)
    batches = open_batches(path, rows=1, window=5, row_tokens=9000, unusable="drop", seed=None)
    with pytest.warns(UserWarning, match="left out") as told:
        next(batches)
    assert [re.findall(r"x\.jsonl:(\d)", str(one.message)) for one in told] == [["2"], ["3"], []]
    assert batches.unusable == 4


def test_a_refusal_lists_all_unusable_records_with_line_rule_and_excerpt(tmp_path, monkeypatch):
    found = examples(6)
    one_thread = BLOCK.replace("<Thread>\n2: d\n</Thread>", "")
    renamed = BLOCK.replace("2: d", "3: d")
    for number, response in ((1, f"ab\n{one_thread}"), (3, renamed), (4, BLOCK.replace("d", ""))):
        found[number] = type(found[number])(**{**vars(found[number]), "response": response})
    found[5] = unclosed(found[5])
    path = write(tmp_path / "x.jsonl", found)
    sentence = "4 of 6 records cannot be used"
    with pytest.raises(ValueError, match=sentence) as caught:
        next(open_batches(path, seed=None))
    message = str(caught.value)
    assert re.findall(r"x\.jsonl:(\d): ", message) == ["2", "4", "5", "6"]
    assert "A block has 2 outlines and 1 thread. It needs one thread for each outline." in message
    assert "line 2, column 1:\n  <Parallel>" in message
    assert "A thread has the number 3 where its outline has 2" in message
    monkeypatch.setattr(diagnose, "MAX_LISTED", 1)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: [\s\S]*and 3 more\.$"):
        next(open_batches(path, seed=None))


def test_a_text_that_differs_from_the_protocol_is_told_in_words_with_line_and_column(tmp_path):
    found = examples(1)
    response = f"a\nb {BLOCK}".replace("</Thread>\n</Parallel>", "</Thread></Parallel>")
    found[0] = type(found[0])(**{**vars(found[0]), "response": response})
    with pytest.raises(ValueError, match="where the protocol forces") as caught:
        next(open_batches(write(tmp_path / "x.jsonl", found)))
    message = str(caught.value)
    assert "has '</Parallel>' where the protocol forces '\\n' (a join)" in message
    assert "line 11, column 10:\n  </Thread></Parallel>" in message
    assert not re.search(r"[Tt]oken \d", message)


def test_a_file_of_nothing_usable_says_so(tmp_path):
    path = write(tmp_path / "x.jsonl", [unclosed(e) for e in examples(2)])
    with (
        pytest.warns(UserWarning, match="This record is left out"),
        pytest.raises(ValueError, match="none of 5 records in a row could be used"),
    ):
        next(open_batches(path, unusable="drop"))


BLOCK = (
    "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
    "<Thread>\n1: c\n</Thread><Thread>\n2: d\n</Thread>\n</Parallel>"
)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ("<Outlines>\n</Outlines>", r"A block has no outlines[\s\S]*line 1, column 1:"),
        (
            "<Outlines><Outline>000000001: a</Outline><Outline>000000002: b</Outline></Outlines>",
            "The response has 2 threads, and the protocol forks 0",
        ),
    ],
)
def test_threads_that_nothing_forks_are_refused_and_counted(tmp_path, plan, sentence):
    found = examples(3)
    head, _, tail = BLOCK.partition("<Outlines>")
    response = f"{head}{plan}{tail.partition('</Outlines>')[2]}"
    found[1] = type(found[1])(**{**vars(found[1]), "response": response})
    path = write(tmp_path / "x.jsonl", found)
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: {sentence}"):
        next(open_batches(path, seed=None))
    batches = open_batches(path, rows=1, window=3, row_tokens=9000, unusable="drop")
    with pytest.warns(UserWarning, match="This record is left out"):
        next(batches)
    assert (batches.unusable, batches.stats.tries) == (1, 2)


@pytest.mark.parametrize(
    ("response", "helps"),
    [
        (BLOCK.replace("</Thread><", "</Thread>\n<"), True),
        (BLOCK.replace("</Thread>\n</Parallel>", "</Thread></Parallel>"), False),
    ],
)
def test_normalising_is_advised_only_where_it_helps(tmp_path, response, helps):
    found = examples(1)
    found[0] = type(found[0])(**{**vars(found[0]), "response": response})
    with pytest.raises(ValueError, match="where the protocol forces") as caught:
        next(open_batches(write(tmp_path / "x.jsonl", found)))
    assert ("and it replays" in str(caught.value)) is helps
    assert ("does not help" in str(caught.value)) is not helps


def test_problems_without_a_response_are_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [e.problem for e in examples(1)])
    with pytest.raises(ValueError, match=r"x\.jsonl:1: a problem without a response"):
        next(open_batches(path))


def test_fewer_records_than_hosts_are_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", examples(2))
    with pytest.raises(ValueError, match="2 records for 3 hosts"):
        open_batches(path, num_hosts=3)
