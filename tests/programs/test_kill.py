"""`kill -9` at any point: the same command goes on, and ends as if nothing had happened.

Real processes are killed from outside, at moments that their folder shows. A run in one piece is
the oracle: metrics, the whole last checkpoint and the rollouts have to equal it bit for bit.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tw_jax import sharding
from tw_jax.checkpoint import Checkpoints
from tw_jax.config import load
from tw_jax.models.transformer import network
from tw_jax.programs.pgrpo import Pgrpo
from tw_jax.programs.sft import Sft
from tw_jax.train.state import abstract_state

STEPS = 10
# tensorboardX imports PyTorch where there is one, which takes seconds, and does without it too.
MAIN = """
import sys
sys.modules["torch"] = None
from tw_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Point(NamedTuple):
    """When to kill: `delay` seconds after `phase` of `step`, or of a later one, has begun."""

    step: int
    phase: str
    delay: float

    def has_come(self, reached):
        return any(phase == self.phase and step >= self.step for phase, step in reached)


class Mark(NamedTuple):
    """Something in the folder of a run: what, of which step, and what tells it from another."""

    what: str
    step: int
    version: int = 0


def marks(folder):
    """What of a run can be seen from outside; a checkpoint is one of the step before it."""
    found = set()
    for file in listed(folder):
        if file.name == "metrics.jsonl":
            found.add(Mark("line", file.read_bytes().count(b"\n") - 1, file.stat().st_ino))
    for file in listed(folder / "checkpoints"):
        step, _, rest = file.name.partition(".")
        found.add(Mark("saving" if rest else "saved", int(step) - 1))
    for file in listed(folder / "rollouts"):
        step, _, rest = file.name.lstrip(".").partition(".")
        with contextlib.suppress(FileNotFoundError):  # a batch was finished just now
            status = file.stat()
            if not file.name.startswith("."):
                found.add(Mark("batch", int(step), status.st_ino))
            elif rest == "jsonl" and status.st_size:
                found.add(Mark("sampling", int(step), status.st_size))
    return found


def phases(new):
    """What a process is doing that left these marks, as (phase, step).

    sampling: a batch of rollouts is kept in part. training: the batch is whole, and its step has no
    line yet. line: the line is written. saving: a checkpoint is half written. saved: it is whole.
    """
    last = max((mark.step for mark in new if mark.what == "line"), default=-1)
    is_trained = {mark for mark in new if mark.what == "batch" and mark.step <= last}
    return {
        ("training" if mark.what == "batch" else mark.what, mark.step) for mark in new - is_trained
    }


def listed(folder):
    return sorted(folder.iterdir()) if folder.is_dir() else []


class Runner:
    """Starts `tw` in processes of one device that share their compiled programs."""

    def __init__(self, verb, config, sets, programs):
        self.verb, self.config, self.sets, self.programs = verb, config, sets, programs

    def start(self, folder):
        words = [self.verb, str(self.config)]
        for word in (f"{self.verb.capitalize()}.workdir='{folder}'", *self.sets):
            words += ["--set", word]
        here = {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        environment = os.environ | here
        folder.mkdir(exist_ok=True)
        with (folder.parent / f"{folder.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", MAIN, *words], env=environment, stdout=log, stderr=log
            )

    def finish(self, folder):
        process = self.start(folder)
        try:
            assert process.wait(timeout=600) == 0, told(folder)
        finally:
            process.kill()

    def kill(self, folder, point):
        """Kills a run at a point; returns the phases that it was in."""
        old = marks(folder)
        saved = max((mark.step for mark in old if mark.what == "saved"), default=-1)

        def reached():
            nonlocal old
            # What was there before counts only once it was gone and came again.
            old &= (now := marks(folder))
            return phases({mark for mark in now - old if mark.step > saved})

        process = self.start(folder)
        until = time.monotonic() + 600
        try:
            while not (point.phase == "start" or point.has_come(reached())):
                assert process.poll() is None, f"{point} never came:\n{told(folder)}"
                assert time.monotonic() < until, f"{point} never came:\n{told(folder)}"
                time.sleep(0.001)
            time.sleep(point.delay)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL, told(folder)
        return reached()


def told(folder):
    return (folder.parent / f"{folder.name}.log").read_text()[-3000:]


def state_of(kind, config, folder):
    """The last checkpoint, on another mesh than it was written from, and its data position."""
    cfg = load(kind, [str(config)])
    mesh = sharding.make_mesh(cfg.mesh)
    abstract = abstract_state(network(cfg.model), cfg.optim, mesh=mesh, rules=cfg.rules)
    with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        state, extra = checkpoints.restore(None, abstract)
    data = jax.random.key_data(state.key)
    assert int(state.step) == STEPS
    return jax.device_get(jax.tree.leaves(state.replace(key=data))), extra["batches"]


def assert_same(kind, config, one, other):
    (leaves, position), (others, other_position) = (state_of(kind, config, f) for f in (one, other))
    assert position == other_position
    for a, b in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(a, b)


def points(seed, wanted):
    """A point for each phase in a random order, at steps that do not fall."""
    rng = np.random.default_rng(seed)
    # The last steps are left to kills that come later than they should.
    steps = np.sort(rng.integers(0, STEPS - 4, len(wanted)))
    found = []
    for step, phase in zip(steps, rng.permutation(wanted), strict=True):
        # Starting takes seconds, all else milliseconds; half of the kills come at once.
        delay = rng.uniform(0.5, 4) if phase == "start" else rng.uniform(-0.03, 0.03)
        found.append(Point(int(step), str(phase), max(0.0, delay)))
    return found


@pytest.fixture(scope="module")
def sft(made, tmp_path_factory):
    """How to run `tw sft`."""
    sets = [f"Sft.steps={STEPS}", "Sft.save_every=2", "Mesh.data=1", "Packing.rows=4"]
    return Runner("sft", made / "sft.gin", sets, tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def trained(sft, tmp_path_factory):
    """A run of `tw sft` in one piece."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    sft.finish(folder)
    return folder


@pytest.mark.slow
def test_sft_killed_at_five_points_ends_like_a_run_in_one_piece(sft, trained, tmp_path, numbers):
    killed = tmp_path / "killed"
    wanted = ["start", "line", "saving", "saving", "saved"]
    landed = [(point, sft.kill(killed, point)) for point in points(1, wanted)]
    seen = {phase for _, found in landed for phase, _ in found}
    assert seen >= {"line", "saving", "saved"}, landed
    sft.finish(killed)

    assert numbers(killed) == numbers(trained)
    assert [line["step"] for line in numbers(killed)] == list(range(STEPS))
    assert_same(Sft, sft.config, trained, killed)
    assert packing(killed) == packing(trained)
    # A kill behind the last checkpoint leaves nothing undone either.
    (killed / "packing.json").unlink()
    sft.finish(killed)
    assert packing(killed) == packing(trained)


@pytest.mark.slow
def test_pgrpo_killed_at_ten_points_ends_like_a_run_in_one_piece(
    made, sft, trained, tmp_path, numbers
):
    sets = [
        *(f"Pgrpo.steps={STEPS}", "Pgrpo.save_every=2", f"Pgrpo.init='{trained}/checkpoints'"),
        *("Mesh.data=1", "Packing.rows=4", "Evaluation.every=5"),
        # One group at a time, so that a batch is kept in pieces.
        *("Sampler.rows=4", "Pgrpo.rollouts=4", "Pgrpo.prompts=2"),
    ]
    pgrpo = Runner("pgrpo", made / "pgrpo.gin", sets, sft.programs)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pgrpo.finish(whole)
    assert sum(line["groups"] > 0 for line in numbers(whole)) > STEPS // 2, "it trains too little"

    wanted = ["start", *["sampling", "training", "saving"] * 2, "sampling", "line", "saved"]
    landed = [(point, pgrpo.kill(killed, point)) for point in points(5, wanted)]
    seen = {phase for _, found in landed for phase, _ in found}
    assert seen >= {"sampling", "training", "saving", "saved"}, landed
    pgrpo.finish(killed)

    assert numbers(killed) == numbers(whole)
    assert [line["step"] for line in numbers(killed)] == list(range(STEPS))
    assert_same(Pgrpo, pgrpo.config, whole, killed)
    assert rollouts(killed) == rollouts(whole)
    assert sorted(rollouts(killed)) == [f"{step:06}.jsonl" for step in range(STEPS)]


def rollouts(folder):
    """Batches by name, those that were left unfinished too."""
    files = (folder / "rollouts").iterdir()
    return {file.name: file.read_bytes() for file in files if file.suffix == ".jsonl"}


def packing(folder):
    found = json.loads((folder / "packing.json").read_text())
    return {name: value for name, value in found.items() if "second" not in name}
