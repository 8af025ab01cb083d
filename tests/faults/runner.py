"""Starts runs of `tw` as processes that can be killed, and reads progress from their folders."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tw_jax import sharding
from tw_jax.checkpoint import Checkpoints
from tw_jax.config import load_config
from tw_jax.models.transformer import network
from tw_jax.train.state import abstract_state

# tensorboardX imports PyTorch if it is installed, which takes seconds and is not needed.
MAIN = """
import sys
sys.modules["torch"] = None
from tw_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Mark(NamedTuple):
    """An entry in the folder of a run: its kind, its step, and a number that changes with it."""

    what: str
    step: int
    version: int = 0


def marks(folder):
    """The marks in the folder of a run. A checkpoint is a mark of the step before it."""
    found = set()
    for file in listed(folder):
        if file.name == "metrics.jsonl":
            found.add(Mark("line", file.read_bytes().count(b"\n") - 1, file.stat().st_ino))
    for file in listed(folder / "checkpoints"):
        step, _, rest = file.name.partition(".")
        if step.isdigit():
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
    """The phases of a process that left these marks, as (phase, step).

    sampling: A part of a batch of rollouts is written. training: The batch is complete, and its
    step has no line yet. line: The line is written. saving: A part of a checkpoint is written.
    saved: It is complete.
    """
    last = max((mark.step for mark in new if mark.what == "line"), default=-1)
    is_trained = {mark for mark in new if mark.what == "batch" and mark.step <= last}
    return {
        ("training" if mark.what == "batch" else mark.what, mark.step) for mark in new - is_trained
    }


def listed(folder):
    return sorted(folder.iterdir()) if folder.is_dir() else []


class Watch:
    """The marks that a process has left since it was started."""

    def __init__(self, folder):
        self._folder, self._old = folder, marks(folder)
        self._saved = max((mark.step for mark in self._old if mark.what == "saved"), default=-1)

    def new(self):
        # A mark from before counts only after it has disappeared and appeared again.
        now = marks(self._folder)
        self._old &= now
        return {mark for mark in now - self._old if mark.step > self._saved}


class Runner:
    """Starts `tw` in processes with one device, which share a cache of compiled programs."""

    def __init__(self, verb, config, sets, programs):
        self.verb, self.config, self.sets, self.programs = verb, config, sets, programs

    def start(self, folder):
        """Starts a process in its own session, so that its children can be found."""
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
                [sys.executable, "-c", MAIN, *words],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def finish(self, folder):
        process = self.start(folder)
        try:
            assert process.wait(timeout=600) == 0, log_tail(folder)
        finally:
            kill_all(process)


def kill_all(process):
    """Kills a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def survivors(process, seconds):
    """The command lines of children that are still alive some seconds after their parent."""
    until = time.monotonic() + seconds
    while (alive := members(process.pid)) and time.monotonic() < until:
        time.sleep(0.02)
    return alive


def members(session):
    """The command lines of the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended just now
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                found.append(stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def log_tail(folder):
    return (folder.parent / f"{folder.name}.log").read_text()[-3000:]


def state_of(kind, config, folder, sets=()):
    """The leaves of the last checkpoint, and the position, read onto the mesh of the config."""
    cfg = load_config(kind, [str(config)], sets)
    mesh = sharding.make_mesh(cfg.mesh)
    abstract = abstract_state(network(cfg.model), cfg.optim, mesh=mesh, rules=cfg.rules)
    with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        state, extra = checkpoints.restore(None, abstract)
    data = jax.random.key_data(state.key)
    return jax.device_get(jax.tree.leaves(state.replace(key=data))), extra["batches"]


def assert_same(kind, config, one, other, sets=()):
    """The last checkpoints of two runs are equal bit for bit, and so are their positions."""
    both = (state_of(kind, config, folder, sets) for folder in (one, other))
    (leaves, position), (others, other_position) = both
    assert position == other_position
    for a, b in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(a, b)


def rollouts(folder):
    """Batches by name, unfinished ones included."""
    return {
        file.name: file.read_bytes()
        for file in listed(folder / "rollouts")
        if file.suffix == ".jsonl"
    }
