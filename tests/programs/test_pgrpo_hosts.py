"""`tw pgrpo --hosts`: two real processes sample, grade and train as one does, and resume."""

import signal

import jax
import numpy as np
import pytest
from programs.jobs import Job

from tw_jax import hosts
from tw_jax.checkpoint import restore_params
from tw_jax.cli import main
from tw_jax.data import records

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """An uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with Job(runs / "pgrpo.gin", folder) as job:
        job.finish()
    assert "8 devices of 2 processes" in job.output(0)
    assert f"{folder}:" not in job.output(1), "one process prints"
    return folder


def kept(folder):
    """The rollouts and rewards of every step."""
    files = sorted((folder / "rollouts").iterdir())
    assert [file.name for file in files] == [f"{step:06}.jsonl" for step in range(STEPS)]
    return [records.to_json(one) for file in files for one in records.read(file)]


def test_two_processes_draw_and_learn_what_one_does(runs, whole, tmp_path, numbers, close):
    one = tmp_path / "one"
    assert main(["pgrpo", str(runs / "pgrpo.gin"), "--set", f"Pgrpo.workdir='{one}'"]) == 0
    for mine, theirs in zip(kept(whole), kept(one), strict=True):
        assert mine["text"] == theirs["text"]
        assert mine["extra"] == pytest.approx(theirs["extra"])
    for got, want in zip(numbers(whole), numbers(one), strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            # Costs of both signs, and ratios around 1, cancel in these.
            size = 1.0 if name.endswith(("loss", "_kl", "mismatch_mean")) else None
            close("sharded", got[name], value, of=size, what=name)


def test_a_killed_process_ends_the_job_and_the_same_command_goes_on(runs, whole, tmp_path, numbers):
    config, killed = runs / "pgrpo.gin", tmp_path / "killed"
    begun = killed / "rollouts" / ".000001.jsonl"
    with Job(config, killed) as job:
        job.wait_for(lambda: begun.exists() and begun.stat().st_size)
        job.processes[1].kill()
        statuses = job.wait(seconds=3 * hosts.LOST_SECONDS)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, None)
    with Job(config, killed) as job:
        job.finish()
    assert numbers(killed) == numbers(whole)
    assert kept(killed) == kept(whole)
    for a, b in zip(params(killed), params(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def params(folder):
    return jax.tree.leaves(jax.device_get(restore_params(folder / "checkpoints")))
