"""Facts about files of rows: a file that changes is noticed, and what is wrong has its place."""

import json
import os
import pickle
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tw_jax.data.records import Example, Problem, open_records, read, to_json, write

SUFFIXES = [".jsonl", ".parquet", ".array_record"]


def problem(i, answer="1"):
    return Problem(id=f"p{i}", question=f"What is {i}?", answer=answer, task="sum")


def overwrite(path, records):
    """Writes into the file as it stands, as `cp` and a shell's `>` do."""
    write(path.with_name(f"new{path.suffix}"), records)
    data = path.with_name(f"new{path.suffix}").read_bytes()
    before = os.stat(path).st_mtime_ns
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))  # as if some time had gone by


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_overwritten_while_it_is_read_stops_the_reader(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write(path, [problem(i, "1") for i in range(4)])
    opened = open_records(path)
    assert opened[0].answer == "1"
    overwrite(path, [problem(i, "2") for i in range(4)])
    with pytest.raises(ValueError, match=r"x\.\w+ was changed while it was being read"):
        opened[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_replaced_under_its_name_is_read_on_as_it_was(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write(path, [problem(i, "1") for i in range(4)])
    opened = open_records(path)
    assert opened[0].answer == "1"
    write(path, [problem(i, "2") for i in range(3)])
    assert [record.answer for record in opened] == ["1"] * 4
    with pytest.raises(ValueError, match="was changed while it was being read"):
        opened.require_unchanged()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_pickled_copy_refuses_a_file_that_was_replaced(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write(path, [problem(1, "1")])
    pickled = pickle.dumps(open_records(path))
    assert pickle.loads(pickled)[0].answer == "1"
    write(path, [problem(1, "2")])
    with pytest.raises(ValueError, match="was changed while it was being read"):
        pickle.loads(pickled)


def test_a_file_is_closed_with_its_last_reader(tmp_path):
    write(tmp_path / "x.jsonl", [problem(1)])
    opened = open_records(tmp_path / "x.jsonl")
    held = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert str(tmp_path / "x.jsonl") in held
    del opened
    held = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert str(tmp_path / "x.jsonl") not in held


GOOD = json.dumps(to_json(problem(1)))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"question": "a", "answer": "1", "answer": "2"}', "the key 'answer' occurs twice"),
        ('{"question": "a", "answer": "1", "x": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"question": "a", "answer": "1", "x": ' + "[" * 5000 + "]" * 5000 + "}", "too deeply"),
    ],
)
def test_a_key_twice_and_deep_nesting_are_told_with_file_and_line(tmp_path, line, sentence):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    records = open_records(path)
    assert records[0] == records[2] == problem(1)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:3: .*{sentence}"):
        records[1]


def test_any_depth_of_nesting_is_read_or_told(tmp_path):
    path = tmp_path / "x.jsonl"
    for depth in range(700, 1010):
        nested = "[" * depth + "]" * depth
        path.write_text(f'{{"kind": "problem", "id": "1", "extra": {nested}}}\n')
        with pytest.raises(ValueError, match=r"x\.jsonl:1: "):
            list(read(path))


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400, "1e39"])
def test_a_log_prob_that_float32_cannot_hold_is_told_with_its_place(tmp_path, number):
    call = f'{{"path": [], "sampled": [1], "logp": [{number}], "stop_reason": "eos"}}'
    fields = {"id": "a", "question": "q", "answer": "1", "fingerprint": "f", "prompt": [1]}
    fields |= {"finish": "eos", "counts": {}, "text": "t", "extra": {}}
    row = json.dumps({"kind": "rollout", **fields})[:-1] + f', "calls": [{call}]}}'
    (tmp_path / "x.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: "):
        list(read(tmp_path / "x.jsonl"))


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


KIND = pa.array(["problem"])
TEXT = pa.array(["a"])


@pytest.mark.parametrize(
    "columns",
    [
        {"kind": pa.array([["problem"]]), "id": TEXT},
        {"kind": pa.array([7]), "id": TEXT},
        {"question": pa.array([b"q"]), "answer": TEXT},
        {"question": TEXT, "answer": pa.array([[1]])},
        {"question": TEXT, "answer": pa.array([1.5])},
        {"prompt": pa.array([[{"role": 3}]]), "answer": TEXT},
        {"question": pa.array([b"\xff"]).cast(pa.string(), safe=False), "answer": TEXT},
        {"question": TEXT, "answer": TEXT, "at": pa.array([2**62], pa.timestamp("us"))},
        {"question": TEXT, "answer": TEXT, "data_source": pa.array([3])},
        {"kind": KIND, "id": TEXT, "question": TEXT, "answer": TEXT, "task": TEXT,
         "extra": pa.array([{"a": 1}.__str__()])},
        {"kind": KIND, "id": TEXT, "question": TEXT, "answer": TEXT, "task": TEXT,
         "extra": pa.array(['{"a": 1, "a": 2}'])},
        {"kind": KIND, "id": TEXT, "question": TEXT, "answer": TEXT, "task": TEXT,
         "extra": pa.array(["[" * 100_000])},
        {"kind": KIND, "id": TEXT, "question": TEXT, "answer": TEXT, "task": TEXT,
         "extra": pa.array([5])},
    ],
)  # fmt: skip
def test_a_column_of_another_type_and_bad_json_in_one_are_told_with_file_and_row(tmp_path, columns):
    path = parquet(tmp_path / "x.parquet", **columns)
    with pytest.raises(ValueError, match=r"x\.parquet: row 0[:,] "):
        list(read(path))


def test_a_column_of_parquet_that_stands_twice_is_refused(tmp_path):
    path, names = tmp_path / "x.parquet", ["question", "answer", "answer"]
    pq.write_table(pa.Table.from_arrays([TEXT, TEXT, TEXT], names=names), path)
    with pytest.raises(ValueError, match=r"x\.parquet: the column 'answer' occurs twice\."):
        open_records(path)


def test_a_damaged_page_of_parquet_is_told_with_file_and_row(tmp_path):
    path = tmp_path / "x.parquet"
    write(path, [Example(f"e{i}", "q" * i, "r", "1", "t") for i in range(300)])
    data = bytearray(path.read_bytes())
    data[10:200] = bytes(190)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.parquet(: row 0: a column cannot be read|: not a)"):
        list(read(path))
