"""Damages copies of a real checkpoint, restores them, and checks the result.

A restore may return exactly the saved state, use an older checkpoint with a warning, or raise an
error that names the folder. Any other result is silent damage.
"""

import contextlib
import io
import logging
import random
import shutil
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from faults.findings import Finding, Hang, deadline
from faults.kills import ROOTS
from faults.scene import Scene

from tw_jax import sharding
from tw_jax.checkpoint import Checkpoints, restore_params
from tw_jax.cli import USER_ERRORS
from tw_jax.config import load_config
from tw_jax.models.transformer import network
from tw_jax.train.loop import resume
from tw_jax.train.state import abstract_state

LONGEST_SENTENCE = 1000
HANG_SECONDS = 60.0
STRAYS = ("99", "0", "abc", "-1", "024", "24x", "tmp", "7.orbax-checkpoint-tmp-3", ".hidden")


class Saved(NamedTuple):
    """The content of a checkpoint: the leaves by path, and the position in the data."""

    leaves: dict[str, np.ndarray]
    position: Any

    def equals(self, other: "Saved") -> bool:
        return (
            self.position == other.position
            and self.leaves.keys() == other.leaves.keys()
            and all(np.array_equal(a, other.leaves[n]) for n, a in self.leaves.items())
        )

    def params(self) -> "Saved":
        names = [name for name in self.leaves if name.startswith("params")]
        return Saved({name: self.leaves[name] for name in names}, None)


class Subject:
    """The checkpoints of one run, and how to restore copies of them."""

    def __init__(self, folder: Path, abstract: Any) -> None:
        """Reads all checkpoints of a folder; `abstract` is the argument of `restore`."""
        self.folder, self._abstract = folder, abstract
        self.steps = sorted(int(file.name) for file in folder.iterdir())
        self.saved = {step: self._exactly(step) for step in self.steps}

    def _exactly(self, step: int) -> Saved:
        with Checkpoints(self.folder, keep=2) as checkpoints:
            state, extra = checkpoints.restore(step, self._abstract)
        return Saved(by_path(state), extra["batches"])

    def resume(self, folder: Path) -> Saved | None:
        """Restores as a resumed run does."""
        with Checkpoints(folder, keep=2) as checkpoints:
            state, position = resume(checkpoints, self._abstract)
        return None if state is None else Saved(by_path(state), position)

    def read(self, folder: Path) -> Saved:
        """Restores as an evaluation does, or a run that begins with these parameters."""
        params = restore_params(folder, abstract=self._abstract.params)
        return Saved(by_path({"params": params}), None)

    def read_all(self, folder: Path) -> Saved:
        """Restores without the abstract parameters."""
        return Saved(by_path({"params": restore_params(folder)}), None)


def subject_of(scene: Scene, verb: str) -> Subject:
    """The checkpoints of the uninterrupted run of a verb."""
    runner = scene.runners[verb]
    cfg = load_config(ROOTS[verb], [str(runner.config)], runner.sets)
    mesh = sharding.make_mesh(cfg.mesh)
    abstract = abstract_state(network(cfg.model), cfg.optim, mesh=mesh, rules=cfg.rules)
    return Subject(scene.whole(verb) / "checkpoints", abstract)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        leaves[name] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return leaves


# Damages.


def _files(rng: random.Random, folder: Path) -> list[Path]:
    """The files of a checkpoint, in a random order; those with content first."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    rng.shuffle(files)
    return sorted(files, key=lambda file: not file.stat().st_size)


def _flip(rng: random.Random, folder: Path) -> str:
    file = _files(rng, folder)[0]
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= rng.choice((1, 2, 128, 255))
    file.write_bytes(data)
    return f"byte {at} of {file} is flipped"


def _scramble(rng: random.Random, folder: Path) -> str:
    file = _files(rng, folder)[0]
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    data[at : at + 64] = rng.randbytes(len(data[at : at + 64]))
    file.write_bytes(data)
    return f"64 bytes from {at} of {file} are scrambled"


def _cut(rng: random.Random, folder: Path) -> str:
    file = _files(rng, folder)[0]
    size = rng.choice((0, rng.randrange(file.stat().st_size)))
    with file.open("r+b") as opened:
        opened.truncate(size)
    return f"{file} is cut to {size} bytes"


def _delete(rng: random.Random, folder: Path) -> str:
    file = rng.choice(_files(rng, folder))
    file.unlink()
    return f"{file} is deleted"


def _delete_folder(rng: random.Random, folder: Path) -> str:
    inner = rng.choice(sorted(path for path in folder.rglob("*") if path.is_dir()))
    shutil.rmtree(inner)
    return f"{inner} is deleted"


def _delete_metadata(rng: random.Random, folder: Path) -> str:
    names = ("*METADATA", "metadata", "manifest.ocdbt", "_sharding", "commit_success.txt")
    files = [file for name in names for file in sorted(folder.rglob(name)) if file.is_file()]
    file = rng.choice(files)
    file.unlink()
    return f"{file} is deleted"


def _stray(rng: random.Random, folder: Path) -> str:
    stray = folder.parent / rng.choice(STRAYS)
    stray.mkdir()
    if rng.random() < 0.5:
        inner = stray / rng.choice(("state", "x"))
        inner.mkdir()
        (inner / "_METADATA").write_bytes(rng.randbytes(20))
    return f"{stray} is a folder that does not belong there"


DAMAGES: tuple[Callable[[random.Random, Path], str], ...] = (
    *(_flip, _flip, _flip, _scramble, _cut, _cut, _delete, _delete_folder, _delete_metadata),
    _stray,
)


# Results.


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Collects warnings, log records and both standard streams until the block ends."""
    words = io.StringIO()
    handler = logging.StreamHandler(words)
    handler.addFilter(lambda record: record.name != "absl")  # not for users
    logging.getLogger().addHandler(handler)
    try:
        with (
            contextlib.redirect_stdout(words),
            contextlib.redirect_stderr(words),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: print(message, file=words)
            yield words
    finally:
        logging.getLogger().removeHandler(handler)


def judge(
    subject: Subject, folder: Path, restore: Callable[[Path], Saved | None], *, of_params: bool
) -> tuple[str, str]:
    """(outcome, details); the outcome is "exact", "older", "refused" or begins with "silent"."""
    with _captured() as words:
        try:
            with deadline(HANG_SECONDS, HANG_SECONDS):
                found = restore(folder)
        except USER_ERRORS as error:
            message = str(error)
            is_ours = not isinstance(error, UnicodeError) and len(message) < LONGEST_SENTENCE
            is_sentence = is_ours and str(folder) in message
            return ("refused" if is_sentence else "silent: no sentence"), repr(error)[:700]
        except (Exception, Hang) as error:
            return "silent: traceback", f"{type(error).__name__}: {error}"[:700]
    if found is None:
        return "silent: starts again", words.getvalue()[:700]
    for step in reversed(subject.steps):
        saved = subject.saved[step]
        if found.equals(saved.params() if of_params else saved):
            if step == subject.steps[-1]:
                return "exact", ""
            is_named = str(subject.steps[-1]) in words.getvalue()
            return ("older" if is_named else "silent: older without a warning"), words.getvalue()
    return "silent: other values", words.getvalue()[:700]


def damage(scene: Scene, verb: str, count: int, seed: int) -> tuple[Counter[str], list[Finding]]:
    """Damages copies of a verb's checkpoints; returns the counts and the findings."""
    try:
        return damage_copies(subject_of(scene, verb), scene.folder, verb, count, seed)
    except Exception:
        traceback.print_exc()
        return Counter(), [Finding("silent", traceback.format_exc()[-500:], str(scene.folder))]


def damage_copies(
    subject: Subject, folder: Path, name: str, count: int, seed: int
) -> tuple[Counter[str], list[Finding]]:
    """Damages each copy in one way. Copies without a finding are deleted."""
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    for number in range(count):
        rng = random.Random(f"{seed} {name} {number}")
        copy = folder / f"damaged_{name}_{number}"
        shutil.copytree(subject.folder, copy)
        step = subject.steps[-1] if rng.random() < 0.85 else rng.choice(subject.steps)
        description = rng.choice(DAMAGES)(rng, copy / str(step))
        before = len(findings)
        # Resuming may rename entries of the folder, so it is last.
        for way in ("read", "read_all", "resume"):
            restore = getattr(subject, way)
            outcome, details = judge(subject, copy, restore, of_params=way != "resume")
            counts[outcome.partition(":")[0]] += 1
            if outcome.startswith("silent"):
                findings.append(Finding("silent", f"{way}: {outcome}: {details}", description))
                print(f"faults: {findings[-1]}", file=sys.stderr)
        counts["damages"] += 1
        if len(findings) == before:
            shutil.rmtree(copy)
    return counts, findings
