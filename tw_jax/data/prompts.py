"""Prompts of problems; all are encoded before anything is sampled, so a long one is found in time.

A prompt that is too long would otherwise stop a run in the middle, at the same step however often
the run is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from tw_jax.data.problems import distinct, require_answers
from tw_jax.data.records import Problem, open_records
from tw_jax.data.stored import problem_of

Encode = Callable[[str], np.ndarray]
"""A question to the ids of its prompt, [n] int32."""


def encoded(
    path: str | Path, encode: Encode, *, limits: Mapping[str, int], count: int | None = None
) -> list[np.ndarray]:
    """The prompts of the first `count` problems of a file, or of all.

    Args:
      path: a file of problems, examples or rollouts.
      encode: a question to its ids.
      limits: the most tokens that a prompt may have, by the config field that says so.
      count: how many problems, from the start of the file; None for all.

    Raises:
      ValueError: a prompt is too long; names file and line.
    """
    prompts = []
    for problem, where in distinct(open_records(path), count):
        prompts.append(encode(problem.question))
        if (fault := _fault(len(prompts[-1]), limits)) is not None:
            raise ValueError(f"{where}: the prompt of the problem {problem.id!r} {fault}")
    return prompts


class Problems:
    """The problems of a file that can be trained on, in the order of the file.

    Attributes:
      dropped: number of problems that were left out because their prompt is too long.
    """

    def __init__(
        self,
        path: str | Path,
        encode: Encode,
        *,
        limits: Mapping[str, int],
        too_long: Literal["refuse", "drop"],
    ) -> None:
        """Encodes every prompt and keeps which of them are short enough.

        Args:
          path: a file of problems, examples or rollouts.
          encode: a question to its ids.
          limits: the most tokens that a prompt may have, by the config field that says so.
          too_long: what happens to a problem whose prompt is longer: "refuse" stops with its place,
            "drop" leaves it out and counts it.

        Raises:
          FileNotFoundError: the file is not there.
          ValueError: a prompt is too long and `too_long` is "refuse", all of them are, or the file
            has faults that `require_answers` refuses.
        """
        self._found, kept = open_records(path), []
        require_answers(path, self._found)
        for index in range(len(self._found)):
            problem = problem_of(self._found[index])
            fault = _fault(len(encode(problem.question)), limits)
            if fault is None:
                kept.append(index)
            elif too_long == "refuse":
                raise ValueError(
                    f"{self._found.where(index)}: the prompt of the problem {problem.id!r} {fault} "
                    "Or set Pgrpo.long_prompts to 'drop'."
                )
        if not kept:
            raise ValueError(
                f"{path}: no prompt of its {len(self._found)} problems is within {dict(limits)} "
                "tokens. Raise these."
            )
        self._kept = np.array(kept, np.int64)
        self.dropped = len(self._found) - len(kept)
        self._found.require_unchanged()

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


def _fault(length: int, limits: Mapping[str, int]) -> str | None:
    """What is wrong with a prompt of so many tokens, to end a sentence with."""
    for field, most in limits.items():
        if not 1 <= length <= most:
            return (
                f"has {length} tokens, and {field} allows 1 to {most}. Raise it, or remove the "
                "problem."
            )
    return None
