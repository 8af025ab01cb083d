"""`tw evaluate`: the summary says what the graded rollouts say."""

import json

import pytest

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
