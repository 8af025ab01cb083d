"""A small fault run without kills, and tests that each kind of fault is found."""

import json
import time

import flax.struct
import jax
import jax.numpy as jnp
import pytest
from faults import damages, findings, hostile, kills, texts

from tw_jax.checkpoint import Checkpoints


def test_few_hostile_texts_are_refused_or_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MATHEMATICS", 10**9)  # no worker of the grader starts
    counts, found = texts.judge_range(1, 1, 400, tmp_path)
    assert found == []
    assert counts["texts"] == 399
    seen = {"document", "no_document", "well_formed", "check_ok", "replayed", "unusable"}
    seen |= {"no_record", "lines_read", "lines_refused"}
    assert seen <= {name for name, count in counts.items() if count}
    verdicts = {f"number_{verdict}" for verdict in ("correct", "wrong", "no_answer")}
    assert verdicts <= counts.keys()


def test_a_text_is_named_by_seed_and_number():
    assert hostile.hostile(3, 14) == hostile.hostile(3, 14)
    assert hostile.hostile(3, 14) != hostile.hostile(4, 14)


def test_answers_that_are_meant_to_be_wrong_do_not_read_as_the_truth():
    made = [hostile.hostile(2, number) for number in range(3000)]
    wrong = [one for one in made if one.wrong == "value"]
    assert len(wrong) > 300
    assert not [one for one in wrong if texts.may_be(one.answer, int(one.truth))]
    for right in ("$1{,}024.0$", "\\frac{2048}{02}", "1.024e3", "1024\\%"):
        assert texts.may_be(right, 1024)


def test_a_wrong_answer_that_is_graded_correct_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MATHEMATICS", 10**9)
    monkeypatch.setattr(texts.GraderPool, "grade", lambda *_: "correct")
    _, found = texts.judge_range(1, 0, 50, tmp_path)
    assert any("a wrong answer is graded correct" in finding.what for finding in found)


def test_a_hang_is_found():
    def wait(work):
        while True:
            work()

    with pytest.raises(findings.Hang), findings.deadline(0.05, 10):
        wait(lambda: None)
    with pytest.raises(findings.Hang), findings.deadline(10, 0.05):
        wait(lambda: time.sleep(1))


class State(flax.struct.PyTreeNode):
    params: dict[str, jax.Array]
    step: jax.Array


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    values = jax.random.normal(jax.random.key(0), (2, 64, 64))
    states = [State({"w": values[n], "b": values[n, 0]}, jnp.int32(n)) for n in range(2)]
    with Checkpoints(folder, keep=2) as checkpoints:
        for n, state in enumerate(states):
            checkpoints.save(n + 1, state, {"batches": {"at": n}})
    return damages.Subject(folder, jax.eval_shape(lambda: states[0]))


def test_few_damaged_checkpoints_are_refused_or_restored_exactly(subject, tmp_path):
    counts, found = damages.damage_copies(subject, tmp_path, "small", 10, seed=0)
    assert found == []
    assert counts["damages"] == 10
    assert counts["exact"] + counts["older"] + counts["refused"] == 3 * 10


def test_other_values_and_older_ones_without_a_warning_are_found(subject, tmp_path):
    newest = subject.saved[2]
    other = newest._replace(leaves={n: leaf + 1 for n, leaf in newest.leaves.items()})

    def outcome(found):
        return damages.judge(subject, tmp_path, lambda _: found, of_params=False)[0]

    assert outcome(newest) == "exact"
    assert outcome(other) == "silent: other values"
    assert outcome(subject.saved[1]) == "silent: older without a warning"
    assert outcome(None) == "silent: starts again"


def write_run(folder, steps, *, newest):
    (folder / "checkpoints" / str(newest)).mkdir(parents=True, exist_ok=True)
    (folder / "rollouts").mkdir(exist_ok=True)
    rows = [json.dumps({"step": n, "loss": n / 7, "step_seconds": 1.0}) for n in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    for n in range(steps):
        (folder / "rollouts" / f"{n:06}.jsonl").write_text(f"{n}\n")


@pytest.fixture
def run(tmp_path):
    """A run that was killed after four steps, and its ledger."""
    write_run(tmp_path / "whole", 6, newest=6)
    write_run(tmp_path / "killed", 4, newest=3)
    ledger = kills.Ledger(tmp_path / "killed", tmp_path / "whole")
    assert ledger.look() == []
    return tmp_path / "killed", ledger


def test_lost_lines_checkpoints_and_batches_are_found(run):
    folder, ledger = run
    write_run(folder, 2, newest=3)
    assert "2 lines of metrics beside checkpoint 3" in ledger.look()
    (folder / "checkpoints" / "3").rename(folder / "checkpoints" / "1")
    assert "checkpoint 3 is gone, 1 is the newest" in ledger.look()
    (folder / "rollouts" / "000001.jsonl").write_text("other\n")
    assert "rollouts/000001.jsonl is not that of the uninterrupted run" in ledger.look()


def test_rollouts_that_were_drawn_again_are_found(run):
    folder, ledger = run
    (folder / "rollouts" / "000003.jsonl").unlink()
    part = folder / "rollouts" / ".000003.jsonl"
    part.write_text("3\n3\n")
    assert ledger.look() == []
    part.write_text("3\n3\n3\n")
    assert ledger.look() == []
    part.write_text("3\n")
    assert "rollouts/.000003.jsonl had 3 rollouts, which were drawn again" in ledger.look()
