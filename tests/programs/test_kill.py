"""`kill -9` at any point: the same command resumes, and ends like an uninterrupted run.

Real processes are killed from outside, at moments that are read from their folders. An
uninterrupted run is the oracle: metrics, the whole last checkpoint and the rollouts must equal it
bit for bit.
"""

import json
import signal
import time
from typing import NamedTuple

import numpy as np
import pytest
from faults.runner import Runner, Watch, assert_same, log_tail, phases, rollouts

from tw_jax.programs.pgrpo import Pgrpo
from tw_jax.programs.sft import Sft

STEPS = 10


class Point(NamedTuple):
    """A moment to kill: `delay` seconds after `phase` of `step`, or of a later one, began."""

    step: int
    phase: str
    delay: float

    def has_come(self, reached):
        return any(phase == self.phase and step >= self.step for phase, step in reached)


def kill(runner, folder, point):
    """Kills a run at a point; returns the phases of that moment."""
    watch = Watch(folder)
    process = runner.start(folder)
    until = time.monotonic() + 600
    try:
        while not (point.phase == "start" or point.has_come(phases(watch.new()))):
            assert process.poll() is None, f"{point} never came:\n{log_tail(folder)}"
            assert time.monotonic() < until, f"{point} never came:\n{log_tail(folder)}"
            time.sleep(0.001)
        time.sleep(point.delay)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, log_tail(folder)
    return phases(watch.new())


def points(seed, wanted):
    """A point for each phase in random order, at steps that never decrease."""
    rng = np.random.default_rng(seed)
    # The last steps are kept free, because a kill may come later than planned.
    steps = np.sort(rng.integers(0, STEPS - 4, len(wanted)))
    found = []
    for step, phase in zip(steps, rng.permutation(wanted), strict=True):
        # Starting takes seconds, the other phases milliseconds. Half of the kills have no delay.
        delay = rng.uniform(0.5, 4) if phase == "start" else rng.uniform(-0.03, 0.03)
        found.append(Point(int(step), str(phase), max(0.0, delay)))
    return found


@pytest.fixture(scope="module")
def sft(made, tmp_path_factory):
    """The runner of `tw sft`."""
    sets = [f"Sft.steps={STEPS}", "Sft.save_every=2", "Mesh.data=1", "Sft.batch_rows=4"]
    return Runner("sft", made / "sft.gin", sets, tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def trained(sft, tmp_path_factory):
    """An uninterrupted run of `tw sft`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    sft.finish(folder)
    return folder


@pytest.mark.slow
def test_sft_killed_at_five_points_ends_like_a_run_in_one_piece(sft, trained, tmp_path, numbers):
    killed = tmp_path / "killed"
    wanted = ["start", "line", "saving", "saving", "saved"]
    landed = [(point, kill(sft, killed, point)) for point in points(1, wanted)]
    seen = {phase for _, found in landed for phase, _ in found}
    assert seen >= {"line", "saving", "saved"}, landed
    sft.finish(killed)

    assert numbers(killed) == numbers(trained)
    assert [line["step"] for line in numbers(killed)] == list(range(STEPS))
    assert_same(Sft, sft.config, trained, killed)
    assert packing(killed) == packing(trained)
    # A kill after the last checkpoint loses nothing either.
    (killed / "packing.json").unlink()
    sft.finish(killed)
    assert packing(killed) == packing(trained)


@pytest.mark.slow
def test_pgrpo_killed_at_ten_points_ends_like_a_run_in_one_piece(
    made, sft, trained, tmp_path, numbers
):
    sets = [
        *(f"Pgrpo.steps={STEPS}", "Pgrpo.save_every=2", f"Pgrpo.init='{trained}/checkpoints'"),
        *("Mesh.data=1", "Pgrpo.microbatch_rows=4", "Evaluation.every=5"),
        # One group at a time, so that a batch is kept in pieces.
        *("Sampler.rows=4", "Pgrpo.rollouts=4", "Pgrpo.prompts=2"),
    ]
    pgrpo = Runner("pgrpo", made / "pgrpo.gin", sets, sft.programs)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pgrpo.finish(whole)
    assert sum(line["groups"] > 0 for line in numbers(whole)) > STEPS // 2, "it trains too little"

    wanted = ["start", *["sampling", "training", "saving"] * 2, "sampling", "line", "saved"]
    landed = [(point, kill(pgrpo, killed, point)) for point in points(5, wanted)]
    seen = {phase for _, found in landed for phase, _ in found}
    assert seen >= {"sampling", "training", "saving", "saved"}, landed
    pgrpo.finish(killed)

    assert numbers(killed) == numbers(whole)
    assert [line["step"] for line in numbers(killed)] == list(range(STEPS))
    assert_same(Pgrpo, pgrpo.config, whole, killed)
    assert rollouts(killed) == rollouts(whole)
    assert sorted(rollouts(killed)) == [f"{step:06}.jsonl" for step in range(STEPS)]


def packing(folder):
    found = json.loads((folder / "packing.json").read_text())
    return {name: value for name, value in found.items() if "second" not in name}
