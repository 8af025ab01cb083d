"""The problems of a file whose prompts fit the sampler.

All prompts are encoded once, before anything is sampled. Otherwise a prompt that is too long would
stop a run in the middle, and again at the same step each time the run is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from tw_jax.data.problems import distinct
from tw_jax.data.records import Problem, open_records
from tw_jax.data.stored import problem_of
from tw_jax.tasks.task import has_answer


class Problems:
    """The problems of a file that can be asked, in the order of the file.

    Attributes:
      dropped: Number of problems that were left out because their prompts are too long.
      without_answer: Number of problems that were left out because their answers are not known.
    """

    def __init__(
        self,
        path: str | Path,
        prompt: Callable[[str], np.ndarray],
        *,
        limits: Mapping[str, int],
        unanswered: Literal["refuse", "drop", "keep"],
        can_grade: Callable[[Problem], bool] = has_answer,
        too_long: Literal["refuse", "drop"] = "refuse",
        option: str | None = None,
        count: int | None = None,
    ) -> None:
        """Encodes every prompt to measure its length.

        Args:
          path: A file of problems, examples or rollouts.
          prompt: Function from a question to its ids, [n] int32.
          limits: Largest number of tokens of a prompt, by the config field that sets it.
          unanswered: Treatment of problems whose answer is not known: "refuse" raises an error,
            "drop" leaves them out and counts them, "keep" keeps them.
          can_grade: Returns whether the answer of a problem is known; see `Task.can_grade`.
          too_long: Treatment of problems whose prompts are too long: "refuse" raises an error,
            "drop" leaves them out and counts them.
          option: The config field that holds `too_long`, for error messages.
          count: Number of problems to read, from the start of the file; None reads all.

        Raises:
          FileNotFoundError: If there is no such file.
          ValueError: If two problems have the same id, an answer is not known and `unanswered` is
            "refuse", a prompt is empty, a prompt is too long and `too_long` is "refuse", or no
            problem is left.
        """
        found, kept = open_records(path), []
        self._found = found
        self.dropped = self.without_answer = 0
        field = min(limits, key=lambda name: limits[name])
        for index, (problem, where) in enumerate(distinct(found, count)):
            length = len(prompt(problem.question))
            if unanswered != "keep" and not can_grade(problem):
                if unanswered == "refuse":
                    raise ValueError(
                        f"{where}: the answer of the problem {problem.id!r} is not known, so no "
                        "rollout of it can be rewarded. Add the answer, or remove the problem."
                    )
                self.without_answer += 1
            elif 1 <= length <= limits[field]:
                kept.append(index)
            elif too_long == "drop" and length:
                self.dropped += 1
            else:
                drops = "" if option is None else f" Or set {option} to 'drop'."
                raise ValueError(
                    f"{where}: the prompt of the problem {problem.id!r} has {length} tokens, and "
                    f"{field} allows 1 to {limits[field]}. Raise it or remove the problem.{drops}"
                )
        if not kept:
            raise ValueError(self._nothing(path, field, limits[field]))
        self._kept = np.array(kept, np.int64)

    def _nothing(self, path: str | Path, field: str, most: int) -> str:
        """The error message for a file of which no problem is left."""
        if not len(self._found):
            return f"{path} has no problem. It must have at least one."
        reasons = []
        if self.without_answer:
            reasons.append(f"the answers of {self.without_answer} problems are not known")
        if self.dropped:
            reasons.append(
                f"the prompts of {self.dropped} problems are longer than {field} = {most} allows"
            )
        return (
            f"{path} has no problem that can be asked: {', and '.join(reasons)}. Add answers, "
            f"raise {field}, or name another file."
        )

    def require_unchanged(self) -> None:
        """Raises ValueError if the file was overwritten or replaced since it was read."""
        self._found.require_unchanged()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Problem]:
        return (problem_of(self._found[index]) for index in self._kept.tolist())

    def drawn(self, first: int, count: int, *, seed: int) -> list[Problem]:
        """Returns problems of an endless order in which each pass is a new permutation.

        Args:
          first: Number of the first one in the order.
          count: Number of problems.
          seed: Seed of the permutations.
        """
        size, problems = len(self), []
        order, turn = self._kept, -1
        for number in range(first, first + count):
            if turn != number // size:
                turn = number // size
                order = self._kept[np.random.default_rng([seed, turn]).permutation(size)]
            problems.append(problem_of(self._found[int(order[number % size])]))
        return problems
