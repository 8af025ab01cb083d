"""Checks of the problems of a file: unique ids, and a hash that changes when a problem changes.

Rollouts and grades are stored by the id of their problem. Without these checks, two problems with
the same id would be confused, and so would an edited problem and its earlier version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from tw_jax.data.records import Problem, Records
from tw_jax.data.stored import problem_of


def content_hash(*problems: Problem) -> str:
    """Returns 16 hex digits that depend on all fields of the problems, and on their order.

    Raises:
      ValueError: If `extra` is nested too deeply.
    """
    digest = hashlib.sha256()
    for problem in problems:
        try:
            # Parquet has values that JSON does not have, such as dates.
            text = json.dumps(vars(problem), sort_keys=True, default=repr)
        except RecursionError:
            raise ValueError(f"Problem {problem.id!r}: extra is nested too deeply.") from None
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:16]


def require_new(seen: dict[str, int], name: str, index: int, found: Records) -> None:
    """Adds an id and its place to those seen.

    Raises:
      ValueError: If the id was seen before. Names both places.
    """
    first = seen.setdefault(name, index)
    if first != index:
        raise ValueError(
            f"{found.where(index)} has the id {name!r}, and so has {found.where(first)}. Results "
            "are stored by id. Give each record its own id, or remove one of the two."
        )


def distinct(found: Records, count: int | None = None) -> Iterator[tuple[Problem, str]]:
    """Yields the problems of a file in order, each with its file and line.

    Args:
      found: Problems, examples or rollouts.
      count: Number of problems to read, from the start; None reads all.

    Raises:
      ValueError: If two have the same id. Names both places.
    """
    seen: dict[str, int] = {}
    for index in range(len(found) if count is None else min(count, len(found))):
        problem = problem_of(found[index])
        require_new(seen, problem.id, index, found)
        yield problem, found.where(index)
