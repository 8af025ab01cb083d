"""The files of rollouts: what an interrupted program left is continued, or sampled again."""

import numpy as np
import pytest
import trajectories

from tw_jax.data import records
from tw_jax.rollouts.generate import RolloutGroup
from tw_jax.rollouts.store import StepFiles, continued
from tw_jax.tasks.task import Problem

IDS = ["0/0/a/0", "0/0/a/1"]
PROBLEM = Problem("a", "1 + 1?", "2", "sums")


@pytest.fixture
def files(tmp_path):
    """The files of a run, and those of another run in the same folder."""
    return [
        StepFiles(tmp_path, run=run, fingerprint="f", protocol=trajectories.PROTOCOL)
        for run in ("0123456789abcdef", "fedcba9876543210")
    ]


@pytest.fixture
def group():
    return RolloutGroup(PROBLEM, IDS, trajectories.rollouts(1, 2), ["one", "two"])


def test_rollouts_of_later_steps_than_the_newest_checkpoint_are_deleted(files):
    run, _ = files
    run.folder.mkdir()
    names = ("000000", "000001", "000002", "000003", ".000001", ".000002", ".000003", "notes")
    for name in names:
        (run.folder / f"{name}.jsonl").touch()
    run.delete_from(2)
    assert {path.stem for path in run.folder.iterdir()} == {"000000", "000001", ".000002", "notes"}


def test_an_unfinished_step_gives_back_the_groups_that_were_added(files, group):
    run, other = files
    with run.unfinished(0) as step:
        assert step.find([PROBLEM], [IDS]) is None
        step.add([group])
    with run.unfinished(0) as step:
        (found,) = step.find([PROBLEM], [IDS])
        step.add([found])
        assert step.find([PROBLEM], [[*IDS, "0/0/a/2"]]) is None
    with other.unfinished(0) as step:
        assert step.find([PROBLEM], [IDS]) is None, "another run left them"
    assert found.texts == group.texts
    for mine, theirs in zip(found.trajectories, group.trajectories, strict=True):
        np.testing.assert_array_equal(mine.ids, theirs.ids)
        for a, b in zip(mine.calls, theirs.calls, strict=True):
            np.testing.assert_array_equal(a.logp, b.logp)
    lines = (run.folder / ".000000.jsonl").read_text().splitlines()
    assert len(lines) == 2, "a rollout is kept once"


def test_a_finished_step_has_its_file_and_no_unfinished_one(files, group):
    run, _ = files
    with run.unfinished(7) as step:
        step.add([group])
    run.finish(7, [group.record(k, fingerprint="f", extra={"reward": k}) for k in range(2)])
    assert [path.name for path in run.folder.iterdir()] == ["000007.jsonl"]
    found = list(records.read(run.folder / "000007.jsonl"))
    assert [(one.id, one.text, one.extra["reward"]) for one in found] == [
        (IDS[0], "one", 0),
        (IDS[1], "two", 1),
    ]


def test_a_file_that_its_reader_refuses_is_not_opened(tmp_path):
    def refuse(path):
        raise ValueError("two of one id")

    with (
        pytest.raises(ValueError, match="two of one id"),
        continued(tmp_path / "x.jsonl", refuse),
    ):
        raise AssertionError("it was opened")
