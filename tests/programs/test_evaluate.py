"""`tw evaluate`: the summary says what the graded rollouts say."""

import json
import re

import pytest

from tw_jax.cli import main
from tw_jax.data import records


@pytest.fixture(scope="module")
def summary(runs):
    return json.loads((runs / "graded" / "summary.json").read_text())


@pytest.fixture(scope="module")
def graded(runs):
    return [
        json.loads(line) for line in (runs / "graded" / "graded.jsonl").read_text().splitlines()
    ]


def test_the_summary_has_accuracy_latency_and_packing(summary):
    assert {
        "exact_match", "exact_match_interval", "format_correct", "longest_tokens", "total_tokens",
        "latency_ratio", "wall_ratio", "rows_filled", "token_sharing", "seconds", "finish",
    } <= set(summary)  # fmt: skip
    assert (summary["problems"], summary["samples"]) == (3, 2)
    assert summary["wall_ratio"] > 0


def test_means_are_those_of_the_graded_rollouts(summary, graded, tolerance):
    assert len(graded) == 6
    right = sum(line["verdict"] == "correct" for line in graded)
    assert summary["exact_match"] == pytest.approx(right / 6)
    longest = sum(line["longest"] for line in graded) / 6
    total = sum(line["total"] for line in graded) / 6
    assert summary["longest_tokens"] == pytest.approx(longest, rel=tolerance["rounding"])
    assert summary["latency_ratio"] == pytest.approx(longest / total, rel=tolerance["rounding"])
    assert sum(summary["finish"].values()) == 6


def test_graded_lines_show_the_calls_of_each_rollout(runs, graded):
    by_id = {r.id: r for r in records.read(runs / "samples" / "rollouts.jsonl")}
    for line in graded:
        calls = by_id[line["id"]].calls
        assert [drawn for _, drawn, _ in line["calls"]] == [len(c.sampled) for c in calls]


def evaluate(runs, *words):
    sets = [w for word in words for w in ("--set", word)]
    return main(["evaluate", str(runs / "evaluate.gin"), *sets])


def test_an_earlier_evaluation_stands_beside_the_new_one(runs, summary, tmp_path, capsys):
    words = [f"Evaluate.workdir='{tmp_path}'", "Evaluate.timed=0"]
    assert evaluate(runs, *words, f"Evaluate.before='{runs / 'graded'}'") == 0
    after = json.loads((tmp_path / "summary.json").read_text())
    assert after["before"] == summary
    assert after["exact_match"] == summary["exact_match"], "the same rollouts, graded again"
    assert re.search(r"longest path +[\d.]+ \[.*\] +[\d.]+ \[", capsys.readouterr().out)


def test_an_earlier_evaluation_that_is_not_there_is_named(runs, tmp_path, capsys):
    assert evaluate(runs, f"Evaluate.before='{tmp_path}'") == 2
    assert "Run that evaluation first" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["evaluate", "pgrpo"])
def test_a_truth_that_is_no_number_is_refused_before_anything_is_sampled(made, tmp_path, verb):
    path = tmp_path / "problems.jsonl"
    rows = [
        {"id": "a", "question": "1 + 1?", "answer": "2"},
        {"id": "b", "question": "x?", "answer": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    root = {"evaluate": "Evaluate.workdir", "pgrpo": "Pgrpo.workdir"}[verb]
    problems = {"evaluate": "Sample.problems", "pgrpo": "Pgrpo.problems"}[verb]
    sets = [f"{root}='{tmp_path / 'run'}'", f"{problems}='{path}'"]
    command = [verb, str(made / f"{verb}.gin"), *[w for s in sets for w in ("--set", s)]]
    with pytest.raises(ValueError, match="Problem 'b': The truth 'x' is not a number"):
        main([*command, "--debug"])
    assert not list(tmp_path.rglob("rollouts*"))
