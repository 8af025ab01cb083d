"""Problems whose prompts the sampler takes; all prompts are encoded once, before anything is drawn.

A prompt that is too long would otherwise stop a run in the middle, at the same step however often
the run is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from tw_jax.data.records import Problem, open_records
from tw_jax.data.stored import problem_of


class Problems:
    """The problems of a file whose prompts are short enough, in the order of the file.

    Attributes:
      dropped: number of problems that were left out.
    """

    def __init__(
        self,
        path: str | Path,
        prompt: Callable[[str], np.ndarray],
        *,
        limits: Mapping[str, int],
        too_long: Literal["refuse", "drop"] = "refuse",
        option: str | None = None,
        count: int | None = None,
    ) -> None:
        """Encodes every prompt and keeps only its length.

        Args:
          path: a file of problems, examples or rollouts.
          prompt: a question to its ids, [n] int32.
          limits: the most tokens that a prompt may have, by the config field that says so.
          too_long: what happens to a problem whose prompt is longer: "refuse" stops with its place,
            "drop" leaves it out and counts it.
          option: the config field that holds `too_long`, which a message may name.
          count: how many problems, from the start of the file; None for all.

        Raises:
          FileNotFoundError: the file is not there.
          ValueError: a prompt is too long and `too_long` is "refuse", or no problem is left.
        """
        found, kept = open_records(path), []
        self._found = found
        most = min(limits.values())
        field = min(limits, key=lambda name: limits[name])
        size = len(found) if count is None else min(count, len(found))
        for index in range(size):
            problem = problem_of(found[index])
            length = len(prompt(problem.question))
            if length <= most:
                kept.append(index)
            elif too_long == "refuse":
                drops = "" if option is None else f" Or set {option} to 'drop'."
                raise ValueError(
                    f"{found.where(index)}: the prompt of the problem {problem.id!r} has {length} "
                    f"tokens, and {field} allows at most {most}. Raise it or remove the problem."
                    f"{drops}"
                )
        if not size:
            raise ValueError(f"{path} has no problem: want at least one.")
        if not kept:
            raise ValueError(
                f"{found.where(0)} and all other problems of the file have prompts of more than "
                f"{most} tokens, and {field} allows no more. Raise it."
            )
        self._kept = np.array(kept, np.int64)
        self.dropped = size - len(kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Problem]:
        return (problem_of(self._found[index]) for index in self._kept.tolist())

    def drawn(self, first: int, count: int, *, seed: int) -> list[Problem]:
        """Problems of an order without end, in which each pass is a new permutation.

        Args:
          first: number of the first one in the order.
          count: how many.
          seed: of the permutations.
        """
        size, problems = len(self), []
        order, turn = self._kept, -1
        for number in range(first, first + count):
            if turn != number // size:
                turn = number // size
                order = self._kept[np.random.default_rng([seed, turn]).permutation(size)]
            problems.append(problem_of(self._found[int(order[number % size])]))
        return problems
