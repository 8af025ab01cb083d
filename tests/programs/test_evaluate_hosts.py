"""`tw evaluate --hosts`: two processes sample and grade what one does, and one writes."""

import json

import pytest
from programs.jobs import Job

from tw_jax.cli import main
from tw_jax.data import records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory):
    """Evaluations by two processes and by one, each with its samples."""
    folder = tmp_path_factory.mktemp("evaluations")
    two, one = folder / "two", folder / "one"
    with Job(runs / "evaluate.gin", two, [f"Sample.workdir='{two}/samples'"]) as job:
        job.finish()
    assert "longest path" in job.output(0)
    assert "longest path" not in job.output(1), "one process prints"
    words = [f"Evaluate.workdir='{one}'", f"Sample.workdir='{one}/samples'"]
    command = ["evaluate", str(runs / "evaluate.gin")]
    assert main([*command, *[w for word in words for w in ("--set", word)]]) == 0
    return two, one


def test_two_processes_sample_the_ids_that_one_does(folders):
    two, one = (list(records.read(folder / "samples" / "rollouts.jsonl")) for folder in folders)
    assert [rollout.id for rollout in two] == [rollout.id for rollout in one]
    for mine, theirs in zip(two, one, strict=True):
        assert mine.text == theirs.text
        assert [c.sampled.tolist() for c in mine.calls] == [
            c.sampled.tolist() for c in theirs.calls
        ]


def test_two_processes_report_what_one_does(folders):
    two, one = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert two.keys() == one.keys()
    is_timed = {name for name in one if "second" in name or name == "wall_ratio"}
    assert {n: v for n, v in two.items() if n not in is_timed} == {
        n: v for n, v in one.items() if n not in is_timed
    }
    lines = [(folder / "graded.jsonl").read_text() for folder in folders]
    assert lines[0] == lines[1]


def test_two_processes_sample_only_what_is_missing(runs, folders):
    two, _ = folders
    path = two / "samples" / "rollouts.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[1:]))
    words = [f"Sample.workdir='{two}/samples'", "Evaluate.timed=0"]
    with Job(runs / "evaluate.gin", two, words) as job:
        job.finish()
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
