"""Facts about problems: ids are unique, and a changed problem has another hash."""

import re

import pytest

from tw_jax.data.problems import content_hash, distinct
from tw_jax.data.records import Problem, open_records, write


def problem(name, **changes):
    return Problem(**{"id": name, "question": "q", "answer": "1", "task": "t"} | changes)


@pytest.mark.parametrize(
    ("suffix", "first", "second"),
    [
        (".jsonl", ":2", ":4"),
        (".parquet", ": row 1", ": row 3"),
        (".array_record", ": record 1", ": record 3"),
    ],
)
def test_two_problems_of_one_id_are_refused_with_both_places(tmp_path, suffix, first, second):
    path = tmp_path / f"x{suffix}"
    write(path, [problem("a"), problem("b"), problem("c"), problem("b", question="other")])
    told = f"{path}{second} has the id 'b', and so has {path}{first}."
    with pytest.raises(ValueError, match=re.escape(told)):
        list(distinct(open_records(path)))
    assert [one.id for one, _ in distinct(open_records(path), 3)] == ["a", "b", "c"]


def test_places_are_those_of_the_file_although_lines_are_blank(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, [problem("a"), problem("b")])
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))
    assert [where for _, where in distinct(open_records(path))] == [f"{path}:2", f"{path}:4"]


def test_every_field_of_a_problem_and_their_order_change_the_hash():
    base = problem("a", extra={"x": [1, 2]})
    changes = [{"id": "b"}, {"question": "Q"}, {"answer": "01"}, {"task": "u"}, {"extra": {}}]
    assert content_hash(base) == content_hash(problem("a", extra={"x": [1, 2]}))
    hashes = {content_hash(Problem(**vars(base) | change)) for change in changes}
    assert len(hashes | {content_hash(base)}) == 6
    other = problem("b")
    assert content_hash(base, other) != content_hash(other, base)
