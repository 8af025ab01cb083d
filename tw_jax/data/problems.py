"""Problems as programs ask them: each id once, and a hash that tells when a problem has changed.

Rollouts and grades are kept by the id of their problem, so two problems with one id would be taken
for one, and a problem that was edited for the one that it was before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from tw_jax.data.records import Problem, Records
from tw_jax.data.stored import problem_of


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
