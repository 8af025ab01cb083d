"""Problems as programs ask them: each id once, and a hash that tells when a problem has changed.

Rollouts and grades are kept by the id of their problem, so two problems with one id would be taken
for one, and a problem that was edited for the one that it was before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tw_jax.data.records import Problem, Records, open_records
from tw_jax.data.stored import problem_of


def has_answer(problem: Problem) -> bool:
    """Whether the right answer is known."""
    return bool(problem.answer.strip())


def content_hash(*problems: Problem) -> str:
    """16 hex digits that depend on all fields of the problems, and on their order.

    Raises:
      ValueError: `extra` is nested too deeply.
    """
    digest = hashlib.sha256()
    for problem in problems:
        try:
            # Parquet has values that JSON lacks, such as dates.
            text = json.dumps(vars(problem), sort_keys=True, default=repr)
        except RecursionError:
            raise ValueError(f"Problem {problem.id!r}: extra is nested too deeply.") from None
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:16]


def require_new(seen: dict[str, int], name: str, index: int, found: Records) -> None:
    """Adds an id and its place to those seen; ids name results, so none may come twice.

    Raises:
      ValueError: the id was seen before; names both places.
    """
    first = seen.setdefault(name, index)
    if first != index:
        raise ValueError(
            f"{found.where(index)} has the id {name!r}, and so has {found.where(first)}. Results "
            "are kept by id: give each record its own, or remove one of the two."
        )


def distinct(found: Records, count: int | None = None) -> Iterator[tuple[Problem, str]]:
    """The problems of a file in order, each with the place where it stands.

    Args:
      found: problems, examples or rollouts.
      count: how many of them, from the start; None for all.

    Raises:
      ValueError: two have the same id; names both places.
    """
    seen: dict[str, int] = {}
    for index in range(len(found) if count is None else min(count, len(found))):
        problem = problem_of(found[index])
        require_new(seen, problem.id, index, found)
        yield problem, found.where(index)


def read_problems(path: str | Path, count: int | None = None) -> list[Problem]:
    """The first `count` problems of a file, or all.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: it has no problem, two of one id, or a record that cannot be read.
    """
    found = open_records(path)
    if not len(found):
        raise ValueError(f"{path} has no problem: want at least one.")
    return [problem for problem, _ in distinct(found, count)]


def read_answered(path: str | Path, count: int) -> tuple[list[Problem], int]:
    """Those of the first `count` problems whose answer is known, and the number of the others.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: no answer is known, or as `read_problems`.
    """
    problems = read_problems(path, count)
    known = [problem for problem in problems if has_answer(problem)]
    if not known:
        raise ValueError(
            f"{path}: no answer of the first {len(problems)} problems is known, so none can be "
            "graded. Add answers, or name another file."
        )
    return known, len(problems) - len(known)


def require_answers(path: str | Path, found: Records) -> None:
    """Reads all problems once, and refuses those that no rollout can be rewarded for.

    Args:
      path: of the file, for messages.
      found: its problems, examples or rollouts.

    Raises:
      ValueError: there is no problem, two have one id, or the answer of one is not known.
    """
    if not len(found):
        raise ValueError(f"{path} has no problem: want at least one.")
    for problem, where in distinct(found):
        if not has_answer(problem):
            raise ValueError(
                f"{where}: the answer of the problem {problem.id!r} is not known, so no rollout of "
                "it can be rewarded. Add the answer, or remove the problem."
            )
