"""Stores rollouts in files, which an interrupted program continues.

`tw pgrpo` writes a file for each step: `rollouts/000012.jsonl`, and `rollouts/.000012.jsonl` while
the step is being sampled. `tw sample` writes `rollouts.jsonl`, and beside it `made_by.json`, which
records the model and the settings. Process 0 of a job reads and writes all of them and sends their
content to the others, because another host may see older content on a shared disk.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tw_jax import files, hosts, strict_json
from tw_jax.data import records
from tw_jax.data.problems import content_hash, require_new
from tw_jax.data.records import Problem, Record, Rollout
from tw_jax.data.stored import trajectory_of
from tw_jax.forkjoin.protocol import Protocol
from tw_jax.rollouts.generate import RolloutGroup

Add = Callable[[Record], None]
"""Appends a record to a file. Every process calls it, and only process 0 writes."""


@contextlib.contextmanager
def continued(
    path: Path, read: Callable[[Path], Iterable[Record]]
) -> Iterator[tuple[dict[str, Record], Add]]:
    """Opens a file that an interrupted program may have begun; see `records.append`.

    Args:
      path: A .jsonl file.
      read: Reads the records of the file that are used.

    Yields:
      (the records by id, a function that adds one), the same in every process.

    Raises:
      ValueError: In every process, if `read` refuses the file.
      OSError: In every process, if the file cannot be read or written.
    """
    with contextlib.ExitStack() as stack:

        def open_file() -> tuple[list[Record], Add]:
            if not hosts.is_first():
                return [], lambda record: None
            add = stack.enter_context(records.append(path))
            return list(read(path)), add

        found, add = hosts.together(open_file, ValueError, OSError)
        rows = hosts.gather([records.to_json(record) for record in found])[0]
        if not hosts.is_first():
            found = [
                records.from_json(row, where=f"{path}:{n + 1}", task="", index=n)
                for n, row in enumerate(rows)
            ]
        yield {record.id: record for record in found}, add


# The steps of a reinforcement run.


class UnfinishedStep:
    """The rollouts of a step that is being sampled."""

    def __init__(self, begun: Mapping[str, Record], add: Add, files_of_run: StepFiles) -> None:
        """`begun`: the records of the file, by id."""
        self._add, self._run = add, files_of_run
        # An attempt before the first checkpoint may have had other settings.
        self._begun = {
            name: record
            for name, record in begun.items()
            if isinstance(record, Rollout) and record.extra.get("run") == files_of_run.run
        }

    def find(
        self, problems: Sequence[Problem], ids: Sequence[Sequence[str]]
    ) -> list[RolloutGroup] | None:
        """The groups that an interrupted attempt sampled; None if any rollout is missing."""
        if not all(name in self._begun for names in ids for name in names):
            return None
        return [
            RolloutGroup(
                problem,
                names,
                [trajectory_of(self._run.protocol, self._begun[name]) for name in names],
                [self._begun[name].text for name in names],
            )
            for problem, names in zip(problems, ids, strict=True)
        ]

    def add(self, groups: Sequence[RolloutGroup]) -> None:
        """Appends the rollouts that the file does not have yet."""
        extra = {"run": self._run.run}
        for group in groups:
            for k, name in enumerate(group.ids):
                if name not in self._begun:
                    self._add(group.record(k, fingerprint=self._run.fingerprint, extra=extra))


class StepFiles:
    """The files of a reinforcement run, `rollouts/` in its workdir.

    Attributes:
      folder: The folder.
      run: `Identity.digest`, which distinguishes unfinished rollouts of this run from those of
        another.
      fingerprint: Fingerprint of the tokenizer.
      protocol: Rebuilds trajectories.
    """

    def __init__(
        self, workdir: str | Path, *, run: str, fingerprint: str, protocol: Protocol
    ) -> None:
        """Stores the arguments; nothing is read yet. See the attributes."""
        self.folder = Path(workdir) / "rollouts"
        self.run, self.fingerprint, self.protocol = run, fingerprint, protocol

    def delete_from(self, step: int) -> None:
        """Deletes the rollouts of `step` and all later steps, which are sampled again.

        The unfinished file of `step` itself is kept.
        """
        if not hosts.is_first():
            return
        kept = {f".{step:06}.jsonl", *(f"{n:06}.jsonl" for n in range(step))}
        for file in self.folder.glob("*.jsonl"):
            if file.stem.removeprefix(".").isdecimal() and file.name not in kept:
                file.unlink()

    @contextlib.contextmanager
    def unfinished(self, step: int) -> Iterator[UnfinishedStep]:
        """Opens the file of a step that is being sampled."""
        path = self.folder / f".{step:06}.jsonl"
        with continued(path, records.read) as (begun, add):
            yield UnfinishedStep(begun, add, self)

    def finish(self, step: int, rollouts: Iterable[Rollout]) -> None:
        """Writes the file of a step, and deletes its unfinished one."""
        if hosts.is_first():
            records.write(self.folder / f"{step:06}.jsonl", rollouts)
            (self.folder / f".{step:06}.jsonl").unlink()


# The rollouts of `tw sample`.

_INFORMATIVE = ("checkpoint", "step")
"""Fields of `made_by.json` that are not compared. The identity of the parameters is compared."""


@contextlib.contextmanager
def kept_samples(
    workdir: str | Path,
    problems: Mapping[str, Problem],
    *,
    source: str,
    maker: Mapping[str, Any],
) -> Iterator[tuple[dict[str, Record], Add]]:
    """Opens `rollouts.jsonl` to add missing rollouts.

    Args:
      workdir: Its folder.
      problems: The problem of each rollout, by the id of the rollout.
      source: Path of the file of the problems, for messages.
      maker: Model and settings that the rollouts depend on; the content of `made_by.json`.

    Yields:
      (the rollouts of the file by id, a function that adds one).

    Raises:
      ValueError: In every process, if the folder has rollouts of another maker or of a problem that
        has changed, or two with the same id.
    """
    path = Path(workdir) / "rollouts.jsonl"
    first = hosts.is_first()
    hosts.together(lambda: _require_maker(path, maker) if first else None, ValueError, OSError)
    with continued(path, lambda file: finished_samples(file, problems, source=source)) as both:
        yield both


def finished_samples(
    path: Path, problems: Mapping[str, Problem], *, source: str
) -> Iterator[Rollout]:
    """The rollouts of these problems in a file, in its order; see `kept_samples`.

    Raises:
      ValueError: If a rollout was sampled for another problem with this id, or two rollouts have
        the same id.
    """
    found, seen = records.open_records(path), {}
    hashes = {problem.id: content_hash(problem) for problem in problems.values()}
    for index, record in enumerate(found):
        require_new(seen, record.id, index, found)
        problem = problems.get(record.id)
        if problem is None:
            continue
        if not (isinstance(record, Rollout) and record.extra.get("problem") == hashes[problem.id]):
            raise ValueError(
                f"{found.where(index)} was not sampled for the problem that now has the id "
                f"{problem.id!r} in {source}: the hash of its question, answer and task differs. "
                "Set Sample.workdir to another folder, or delete this one to sample again."
            )
        yield record


def _require_maker(rollouts: Path, maker: Mapping[str, Any]) -> None:
    """Refuses to add to the rollouts of another model or of other settings."""
    folder, path = rollouts.parent, rollouts.with_name("made_by.json")
    remedy = "Set Sample.workdir to another folder, or delete this one to sample again."
    if not (rollouts.exists() and rollouts.stat().st_size):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(dict(maker), indent=2) + "\n")
        return
    if not path.exists():
        raise ValueError(
            f"{folder} has rollouts but no {path.name}, which records the model they were sampled "
            f"from. {remedy}"
        )
    try:
        before = dict(strict_json.parse(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged. {remedy}") from None
    changed = [
        name
        for name, value in maker.items()
        if name not in _INFORMATIVE and before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} has rollouts with another {', '.join(changed)}. They were sampled from "
            f"step {before.get('step')} of {before.get('checkpoint')}, and this command reads step "
            f"{maker['step']} of {maker['checkpoint']}. {remedy}"
        )
