"""Facts about record files: nothing is lost, and what is wrong is said with its place."""

import concurrent.futures
import datetime
import json
import pickle
import re
from pathlib import Path

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_jax.data.records import (
    CallRecord,
    Example,
    Problem,
    Rollout,
    append,
    from_json,
    open_records,
    read,
    to_json,
    write,
)
from tw_jax.forkjoin.calls import Call, StopReason, Trajectory

SUFFIXES = [".jsonl", ".parquet", ".array_record"]
# Characters at which some readers break lines, and others that some formats trip over.
NASTY = 'a\u2028b\u2029c\u0085d\x0be\x1cf\r\ng\x00 \ufeff"\\ é\U0001f9f5 \uffff'


def problem(i=0, **changes):
    fields = {"id": f"p{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i), "task": "sum"}
    return Problem(**fields | changes)


def rollout(**changes):
    calls = (
        CallRecord(
            (), np.array([5, 6, 7], np.int32), np.float32([-0.1, -1e-8, -30.25]), StopReason.STOP
        ),
        CallRecord((0, "1.2"), np.array([], np.int32), None, StopReason.ERROR),
        CallRecord((0, "2"), np.array([2**31 - 1], np.int32), np.float32([0]), StopReason.EOS),
    )
    fields = {
        "id": "p0#3",
        "question": NASTY,
        "answer": "9" * 5000,
        "fingerprint": "ab12",
        "prompt": np.array([1, 2], np.int32),
        "calls": calls,
        "finish": "eos",
        "counts": {"no_outline": 2},
        "text": NASTY,
    }
    return Rollout(**fields | changes)


RECORDS = {
    "problem": [
        problem(0, extra={"numbers": [3, 4], "deep": {"π": None, "x": 0.1, "yes": True}}),
        problem(1, question=NASTY, answer="9" * 5000),
        problem(2, answer="", id=""),
    ],
    "example": [Example(f"e{i}", NASTY, "<Thread>\n1: x\n</Thread>", "1", "t") for i in range(3)],
    "rollout": [rollout(), rollout(id="p0#4", calls=(), counts={}, prompt=np.zeros(0, np.int32))],
}


def lines(path, *rows):
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", RECORDS)
def test_records_come_back_as_they_were_written(tmp_path, suffix, kind):
    path = tmp_path / "made" / f"x{suffix}"
    write(path, iter(RECORDS[kind]))
    back = list(read(path))
    assert [type(record) for record in back] == [type(record) for record in RECORDS[kind]]
    assert [to_json(record) for record in back] == [to_json(record) for record in RECORDS[kind]]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_of_a_rollout_keep_type_and_bits(tmp_path, suffix):
    logp = np.random.default_rng(0).normal(size=200).astype(np.float32)
    call = CallRecord((), np.arange(200, dtype=np.int32), logp, StopReason.LENGTH)
    write(tmp_path / f"x{suffix}", [rollout(calls=(call,))])
    (back,) = read(tmp_path / f"x{suffix}")
    assert back.prompt.dtype == back.calls[0].sampled.dtype == np.int32
    assert back.calls[0].logp.dtype == np.float32
    assert back.calls[0].logp.tobytes() == logp.tobytes()
    assert back.calls[0].path == ()
    assert back.calls[0].stop_reason is StopReason.LENGTH


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=20)
@given(question=st.text(max_size=30), answer=st.text(max_size=5))
def test_any_text_comes_back_unchanged(tmp_path_factory, suffix, question, answer):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    write(path, [problem(question=question, answer=answer)])
    assert list(read(path)) == [problem(question=question, answer=answer)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_records_are_read_in_any_order_by_threads_and_after_pickling(tmp_path, suffix):
    problems = [problem(i) for i in range(700)]  # several row groups
    write(tmp_path / f"x{suffix}", problems)
    records = open_records(tmp_path / f"x{suffix}")
    assert len(records) == 700
    assert records[np.int64(-1)] == problems[-1]
    assert pickle.loads(pickle.dumps(records))[300] == problems[300]
    order = np.random.default_rng(0).permutation(700)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(records.__getitem__, order)) == [problems[i] for i in order]
    for index in (700, -701):
        with pytest.raises(IndexError, match="of 700"):
            records[index]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_grain_shuffles_an_opened_file(tmp_path, suffix):
    write(tmp_path / f"x{suffix}", [problem(i) for i in range(20)])
    shuffled = grain.MapDataset.source(open_records(tmp_path / f"x{suffix}")).shuffle(seed=1)
    ids = [record.id for record in shuffled.to_iter_dataset()]
    assert ids != [f"p{i}" for i in range(20)]
    assert sorted(ids) == sorted(f"p{i}" for i in range(20))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_records_is_a_file(tmp_path, suffix):
    write(tmp_path / f"x{suffix}", [])
    assert list(read(tmp_path / f"x{suffix}")) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write(path, [problem(1)])

    def broken():
        yield problem(2)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write(path, broken())
    assert list(read(path)) == [problem(1)]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_does_not_disturb_who_reads_the_old_file(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write(path, [problem(1)])
    with path.open("rb") as reader:
        write(path, [problem(2)])
        (tmp_path / f"old{suffix}").write_bytes(reader.read())
    assert list(read(tmp_path / f"old{suffix}")) == [problem(1)]
    assert list(read(path)) == [problem(2)]


def test_kinds_mix_in_jsonl_and_not_in_parquet(tmp_path):
    mixed = [problem(), *RECORDS["example"]]
    write(tmp_path / "x.jsonl", mixed)
    assert list(read(tmp_path / "x.jsonl")) == mixed
    with pytest.raises(ValueError, match="one kind of record, got problem and example"):
        write(tmp_path / "x.parquet", mixed)


def test_jsonl_holds_one_line_a_record(tmp_path):
    write(tmp_path / "x.jsonl", RECORDS["example"])
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 3


def test_a_rollout_keeps_what_was_drawn_of_a_trajectory():
    def call(path, sampled):
        logp = np.full(len(sampled), -0.5, np.float32)
        context = np.array([1, 2], np.int32)
        return Call(
            path, context, np.zeros(2, np.int8), np.array(sampled, np.int32), logp, StopReason.EOS
        )

    trajectory = Trajectory(
        prompt_tokens=2,
        calls=(call((), [3, 4]), call((0, "1"), [5])),
        ids=np.array([1, 2, 3, 4, 5], np.int32),
        provenance=np.array([0, 0, 1, 1, 3], np.int8),
        rounds=1,
        finish="eos",
        counts={"forced_close": 1},
    )
    kept = Rollout.from_trajectory(
        trajectory, problem(), id="p0#0", fingerprint="ab12", text="text"
    )
    row = to_json(kept)
    assert row["prompt"] == [1, 2]
    assert [(c["path"], c["sampled"]) for c in row["calls"]] == [([], [3, 4]), ([0, "1"], [5])]
    assert (row["question"], row["answer"]) == (problem().question, problem().answer)
    assert json.loads(json.dumps(row)) == row


# Adding to a file.


def test_added_records_are_in_the_file_before_it_is_closed(tmp_path):
    path = tmp_path / "made" / "x.jsonl"
    with append(path) as add:
        assert list(read(path)) == []
        for i in range(3):
            add(problem(i))
            assert list(read(path)) == [problem(j) for j in range(i + 1)]
    with append(path) as add:
        add(problem(3))
    assert list(read(path)) == [problem(i) for i in range(4)]


@pytest.mark.parametrize("cut", [1, 2, 40, 80])
def test_a_crash_at_any_byte_loses_no_finished_record(tmp_path, cut):
    path = tmp_path / "x.jsonl"
    problems = [problem(i, question="Wörter: \u2028") for i in range(3)]
    write(path, problems)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    if cut == 1:  # only the newline is gone; the record is whole
        finished = problems
        with append(path) as add:
            add(problem(9))
    else:
        finished = problems[:2]
        with pytest.warns(UserWarning, match=r"x\.jsonl:3: the last line was cut short"):  # noqa: SIM117
            with append(path) as add:
                add(problem(9))
    assert list(read(path)) == [*finished, problem(9)]


def test_every_cut_of_a_last_line_is_told_as_a_cut(tmp_path):
    path = tmp_path / "x.jsonl"
    write(
        path, [problem(1, question='ä\u2028\U0001f9f5 " \\', extra={"n": [1, {"a": "\x01"}, True]})]
    )
    data = path.read_bytes()
    for length in range(1, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"x\.jsonl:1: the line ends inside a JSON"):
            list(read(path))


def test_only_jsonl_is_appended_to(tmp_path):
    with pytest.raises(ValueError, match=r"only \.jsonl"), append(tmp_path / "x.parquet"):
        pass


# Rows of others.

QWEN_TEXT = (
    "<|im_start|>user\nFind 3. Think.<|im_end|>\n<|im_start|>assistant\n"
    "<think>\nx\n</think>\n\n\\boxed{3}<|im_end|>\n"
)
THREADWEAVER = {
    "question": "Find 3.",
    "data_source": "synthetic_multiplication",
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"split": "train", "index": 7},
    "prompt": [{"role": "user", "content": "Find 3. Think."}],
}


def save(path, row):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        lines(path, row)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_threadweaver_row_with_its_text_is_an_example_of_that_text(tmp_path, suffix):
    row = THREADWEAVER | {"response": "other", "qwen_text": QWEN_TEXT}
    (example,) = read(save(tmp_path / f"mult{suffix}", row))
    assert example == Example(
        id="mult:0",
        question="Find 3. Think.",
        response="<think>\nx\n</think>\n\n\\boxed{3}",
        answer="3",
        task="synthetic_multiplication",
        extra={"ability": "math", "extra_info": {"split": "train", "index": 7}},
    )
    turns = f"{example.question}<|im_end|>\n<|im_start|>assistant\n{example.response}"
    assert f"<|im_start|>user\n{turns}<|im_end|>\n" == QWEN_TEXT
    assert example.problem == Problem(
        "mult:0", "Find 3. Think.", "3", "synthetic_multiplication", example.extra
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_threadweaver_row_without_text_is_a_problem(tmp_path, suffix):
    (read_back,) = read(save(tmp_path / f"mult{suffix}", THREADWEAVER))
    assert read_back == Problem(
        id="mult:0",
        question="Find 3. Think.",
        answer="3",
        task="synthetic_multiplication",
        extra={"ability": "math", "extra_info": {"split": "train", "index": 7}},
    )


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"question": "q", "response": "r"}, Example("aime:0", "q", "r", "", "aime")),
        ({"question": "q"}, Problem("aime:0", "q", "", "aime")),
        (
            {"question": "q", "task": "t", "extra": {"a": 1}, "b": 2},
            Problem("aime:0", "q", "", "t", {"a": 1, "b": 2}),
        ),
        (
            {"question": "q", "response": "r", "target": 24},
            Example("aime:0", "q", "r", "", "aime", {"target": 24}),
        ),
        ({"kind": "problem", "id": "a", "question": "q"}, Problem("a", "q")),
        ({"question": "q", "response": "r", "uuid": "u"}, Example("u", "q", "r", "", "aime")),
        ({"id": 4, "question": "q", "answer": "7"}, Problem("4", "q", "7", "aime")),
        ({"question": "q", "answer": 10**40 + 1}, Problem("aime:0", "q", f"1{'0' * 39}1", "aime")),
        (
            {"question": "q", "answer": "7", "level": 5, "id": None},
            Problem("aime:0", "q", "7", "aime", {"level": 5}),
        ),
        (
            {"qwen_text": QWEN_TEXT, "question": "q", "answer": None},
            Example("aime:0", "Find 3. Think.", "<think>\nx\n</think>\n\n\\boxed{3}", "", "aime"),
        ),
    ],
)
def test_columns_of_other_sets_are_understood(tmp_path, row, record):
    assert list(read(lines(tmp_path / "aime.jsonl", row))) == [record]


def test_columns_that_json_cannot_hold_are_read_and_refused_when_written(tmp_path):
    day = datetime.date(2025, 1, 2)
    path = save(tmp_path / "x.parquet", {"question": "q", "answer": "7", "day": day})
    (record,) = read(path)
    assert record.extra == {"day": day}
    with pytest.raises(ValueError, match="Problem 'x:0' does not fit into JSON"):
        write(tmp_path / "x.jsonl", [record])


def test_the_records_of_the_data_page_are_read_and_its_error_is_what_is_raised(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"```json\n(.*?)\n```", page, re.DOTALL)
    shown = re.findall(r"^problems\.jsonl:3: (.*)$", page, re.MULTILINE)
    path = lines(tmp_path / "problems.jsonl", *rows, {"question": "q", "answer": 0.5})
    assert [type(record) for record in map(open_records(path).__getitem__, (0, 1))] == [
        Problem,
        Example,
    ]
    with pytest.raises(ValueError, match="problems") as error:
        open_records(path)[2]
    assert [str(error.value)] == [f"{path}:3: {sentence}" for sentence in shown]


# What is wrong is said.

GOOD = to_json(problem())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            '{"kind": "problem", "id": "1", "quest',
            r'the line ends inside a JSON string \(…", "id": "1", "quest\)\. The file was cut '
            r"short; delete that line or write the file again\.",
        ),
        ('{"kind": "problem", "extra": {}', "the line ends inside a JSON object"),
        ("plain words", r"not JSON at column 1: Expecting value \(plain words\)\. Correct"),
        ('{"a": 1, b: 2}', "not JSON at column 10"),
        ("[1, 2]", r"\[1, 2\] must be a JSON object"),
        ('{"question": "q", "answer": NaN}', "NaN is not a JSON number"),
        (f'{{"question": "q", "answer": {"9" * 5000}}}', "4300.*Write that number as a string"),
        (GOOD | {"kind": "rolout"}, "kind = 'rolout' must be one of problem, example, rollout"),
        (GOOD | {"kind": ["problem"]}, "must be one of problem, example, rollout"),
        (
            {k: v for k, v in GOOD.items() if k != "question"} | {"anser": "4"},
            "the problem lacks question and must not have anser .*"
            "A problem must have id, question and may have answer, task, extra",
        ),
        (GOOD | {"answer": 42}, r"Problem\.answer = 42 must be text, not int\. Write it in quotes"),
        (GOOD | {"extra": [1]}, r"Problem\.extra = \[1\] must be an object of JSON"),
        (GOOD | {"question": "\ud800"}, r"Problem\.question has half a surrogate pair"),
        (
            {"a": 1, "b": 2},
            r"a, b are not those of a record \(\{'a': 1, 'b': 2\}\)\. A row must have question",
        ),
        ({"question": "q", "extra": 3}, "extra = 3 must be an object"),
        ({"question": "q", "answer": 0.5}, "answer = 0.5 must be text or a whole number"),
        ({"question": "q", "answer": True}, "answer = True must be text or a whole number"),
        ({"question": 5, "answer": "1"}, r"Problem\.question = 5 must be text"),
        ({"prompt": "q", "answer": "1"}, "prompt = 'q' must be a list of one message"),
        (
            {"prompt": [{"role": "system", "content": "s"}] * 2, "answer": "1"},
            "must be a list of one message",
        ),
        ({"qwen_text": QWEN_TEXT * 2}, "one user turn, one assistant turn and nothing else"),
        ({"qwen_text": "hello"}, "qwen_text = 'hello' must be Qwen's template"),
    ],
)
def test_a_bad_line_is_told_with_file_line_fault_and_remedy(tmp_path, line, sentence):
    path = lines(tmp_path / "problems.jsonl", GOOD, "", line, GOOD)
    records = open_records(path)
    assert len(records) == 3
    assert records[0] == records[2] == problem()
    with pytest.raises(ValueError, match=sentence) as error:
        records[1]
    assert str(error.value).startswith(f"{path}:3: ")


def _with_call(**changes):
    row = to_json(rollout())
    row["calls"][0] |= changes
    return row


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            _with_call(stop_reason="bored"),
            "stop_reason = 'bored' must be one of eos, stop, length, error",
        ),
        (_with_call(logp=[0.0]), r"logp = array\(\[0.* must be 3 numbers, one for each sampled id"),
        (_with_call(logp=["a", 0, 0]), "calls: logp = .* must be numbers or null"),
        (_with_call(sampled=[1, -1, 2]), "calls: sampled = .* must be a list of token ids"),
        (_with_call(sampled=[1, 2**31, 2]), "must be a list of token ids"),
        (_with_call(sampled=[1, True, 2]), "must be a list of token ids"),
        (_with_call(path=[[0]]), r"calls: path = \[\[0\]\] must be a list of integers and strings"),
        (
            _with_call(context=[]),
            "the call must not have context .*must have path, sampled, logp, stop_reason",
        ),
        (to_json(rollout()) | {"calls": {}}, r"calls = \{\} must be a list"),
        (to_json(rollout()) | {"calls": [3]}, "calls = 3 must be an object for each call"),
        (to_json(rollout()) | {"counts": {"a": 0.5}}, "counts = .* must be an object of integers"),
        (to_json(rollout()) | {"prompt": "1 2"}, "prompt = '1 2' must be a list of token ids"),
    ],
)
def test_a_bad_rollout_is_told_by_field(row, sentence):
    with pytest.raises(ValueError, match=f"^here: .*{sentence}"):
        from_json(row, where="here", task="t", index=0)


def test_a_bad_row_of_parquet_is_told_with_its_number(tmp_path):
    rows = [{"question": "q", "answer": "1"}, {"question": None, "answer": "1"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"x\.parquet: row 1: Problem\.question = None must be text"
    ):
        list(read(tmp_path / "x.parquet"))


def test_bytes_that_are_no_utf8_are_told_with_their_place(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"question": "caf\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=re.escape('x.jsonl:1: byte 17 is not UTF-8 (…{"questio')):
        list(read(path))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    for suffix, sentence in [
        (".parquet", "not a Parquet file"),
        (".array_record", "not an ArrayRecord file"),
    ]:
        (tmp_path / f"x{suffix}").write_text("hello")
        with pytest.raises(ValueError, match=sentence):
            open_records(tmp_path / f"x{suffix}")
    path = tmp_path / "y.array_record"
    noise = np.random.default_rng(0).integers(32, 127, (200, 1000), np.uint8)
    write(path, [problem(i, question=bytes(row).decode()) for i, row in enumerate(noise)])
    data = bytearray(path.read_bytes())
    data[70_000:71_000] = bytes(1000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"y\.array_record: record \d+: damaged"):
        list(read(path))


def test_unknown_suffixes_and_missing_files_are_refused(tmp_path):
    for act in (open_records, lambda path: write(path, [])):
        with pytest.raises(ValueError, match=r"must end in \.jsonl, \.parquet, \.array_record"):
            act(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"x\.jsonl: no such file"):
        read(tmp_path / "x.jsonl")


def test_records_are_checked_when_they_are_built():
    with pytest.raises(TypeError, match=r"Example\.answer = 3 must be text, not int"):
        Example("1", "q", "r", 3, "t")
    with pytest.raises(TypeError, match="must be 1 numbers, one for each sampled id"):
        CallRecord((), np.zeros(1, np.int32), np.zeros(2, np.float32), StopReason.EOS)


def test_a_number_that_json_lacks_is_refused_when_written(tmp_path):
    call = CallRecord((), np.zeros(1, np.int32), np.float32([np.nan]), StopReason.EOS)
    for suffix in SUFFIXES:
        with pytest.raises(ValueError, match="Rollout 'p0#3' does not fit into JSON"):
            write(tmp_path / f"x{suffix}", [rollout(calls=(call,))])
    assert not list(tmp_path.iterdir())
