"""`tw evaluate`: the summary agrees with the graded rollouts."""

import json
import os
import re

import numpy as np
import pytest
import trajectories

from tw_jax.cli import main
from tw_jax.data import records
from tw_jax.forkjoin import cost
from tw_jax.forkjoin.calls import Call, StopReason, Trajectory
from tw_jax.programs import evaluate as program
from tw_jax.rollouts import reward
from tw_jax.rollouts.evaluate import summarise
from tw_jax.tasks.task import Problem


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


def test_means_are_those_of_the_graded_rollouts(summary, graded, close):
    assert len(graded) == 6
    right = sum(line["verdict"] == "correct" for line in graded)
    assert summary["exact_match"] == pytest.approx(right / 6)
    longest = sum(line["longest"] for line in graded) / 6
    total = sum(line["total"] for line in graded) / 6
    close("rounding", summary["longest_tokens"], longest)
    close("rounding", summary["latency_ratio"], longest / total)
    assert sum(summary["finish"].values()) == 6


def test_latency_is_counted_from_calls_as_in_the_reward_and_the_text_has_names_of_its_own(
    tolerance,
):
    """One call wrote a block by itself; in another rollout two threads drew 7 and 4 tokens."""
    nothing = np.zeros(0, np.int32)

    def call(path, ids):
        return Call(path, nothing, nothing.astype(np.int8), ids, None, StopReason.STOP)

    text = "ab<Parallel><Thread>aaaa</Thread><Thread>bbbb</Thread></Parallel>ab"
    ids = trajectories.TOKENIZER.encode("abc" + text)
    zeros = np.zeros(len(ids), np.int8)
    written = Trajectory(3, (call((), ids[3:]),), ids, zeros, 0, "eos", {})
    threads = (call((), ids[3:15]), call((0, "1"), ids[:7]), call((0, "2"), ids[:4]))
    forked = Trajectory(3, threads, ids, zeros, 1, "eos", {})
    made = [written, forked]
    tags = cost.tags_of(trajectories.TOKENIZER)
    texts = [program.cost_of_text(one, tags, with_prompt=False) for one in made]
    summary = summarise([text] * 2, made, ["correct", "wrong"], texts, samples=1)
    drawn = len(ids) - 3
    longest, total = (drawn + 12 + 7) / 2, (drawn + 12 + 7 + 4) / 2
    assert summary["longest_tokens"] == pytest.approx(longest, rel=tolerance["rounding"])
    assert summary["total_tokens"] == pytest.approx(total, rel=tolerance["rounding"])
    assert summary["latency_ratio"] == pytest.approx(longest / total, rel=tolerance["rounding"])
    assert summary["text_total_tokens"] == pytest.approx(drawn, rel=tolerance["rounding"])
    assert summary["text_longest_tokens"] == pytest.approx(drawn - 4, rel=tolerance["rounding"])
    problem, cfg = Problem("p", "q"), reward.Reward()
    parts = [[reward.reward(t, "correct", cfg, problem=problem, text="") for t in made]]
    of_reward = reward.reward_metrics(parts, np.zeros((1, 2)))
    for name in ("longest_tokens", "total_tokens", "latency_ratio"):
        assert summary[name] == pytest.approx(of_reward[name], rel=tolerance["rounding"])


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


def test_an_earlier_evaluation_of_other_problems_is_refused(runs, summary, tmp_path, capsys):
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"problems_hash": "0" * 16}))
    assert evaluate(runs, f"Evaluate.before='{tmp_path}'") == 2
    assert "summary.json is an evaluation of other problems" in capsys.readouterr().err


def test_a_training_run_that_left_no_packing_is_named(runs, tmp_path, capsys):
    words = [f"Evaluate.training='{tmp_path}'", f"Evaluate.workdir='{tmp_path}'"]
    assert evaluate(runs, *words, "Evaluate.timed=0") == 2
    assert "Finish that training run first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("Sample.problems='{folder}/none.jsonl'", "none.jsonl has no problem"),
        ("ForkJoin.max_context=5", "and ForkJoin.max_context allows 1 to 4"),
    ],
)
def test_nothing_to_evaluate_ends_in_a_sentence(runs, tmp_path, capsys, word, sentence):
    (tmp_path / "none.jsonl").touch()
    words = [f"Evaluate.workdir='{tmp_path}'", f"Sample.workdir='{tmp_path}/samples'"]
    assert evaluate(runs, *words, word.format(folder=tmp_path)) == 2
    assert sentence in capsys.readouterr().err


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    program._write(tmp_path, {"problems": 1}, [])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        program._write(tmp_path, {"problems": 2}, [])
    assert json.loads((tmp_path / "summary.json").read_text()) == {"problems": 1}


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
