"""The interface of a task: problems, correct responses, and a verdict on any response.

Programs hold a `Task` in a field and never ask which one it is. `tw make` writes the problems of a
task, `tw pgrpo` and `tw evaluate` grade responses with it. docs/extending.md shows how to write
one. This file knows no task and no grader.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, Literal

from tw_jax.config import interface
from tw_jax.strict_json import check_fields

Verdict = Literal["correct", "wrong", "no_answer", "timeout"]
"""The result of grading. "timeout" says nothing about the answer: grading did not finish."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, and the information that its task needs to grade a response.

    Attributes:
      id: Name of the problem, unique within a file.
      question: Text that the model is asked, without chat template or instruction.
      answer: The correct answer as text, so that large numbers stay exact. "" means unknown.
      task: Name of the task or the data set that the problem comes from.
      extra: Further fields of the task, as JSON: the numbers of Countdown, for example.
    """

    id: str
    question: str
    answer: str = ""
    task: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)


@interface
class Task(abc.ABC):
    """A source of problems, a judge of responses, or both.

    A task is a config class that inherits from `Task` and implements `grade`. Override the other
    methods where the defaults do not fit. All methods must return the same result in every process
    and on every host.

    Attributes:
      workers: Number of worker processes, which is the number of responses that are graded at a
        time. A task may declare this and the next attribute as fields.
      item_seconds: Time limit of grading one response in a worker process, in seconds.
    """

    workers: int = 2
    item_seconds: float = 5.0

    @abc.abstractmethod
    def grade(self, problem: Problem, text: str) -> Verdict:
        """Returns the verdict on a response.

        `GraderPool` calls this in a worker process. It kills the process after `item_seconds`, or
        when it uses too much memory, and counts the response as a "timeout". An exception stops
        the run: return "wrong" for a response that cannot be read.

        Args:
          problem: The problem.
          text: The response of the model, without the prompt. Never execute it.
        """

    def grade_at_once(self, problem: Problem, text: str) -> Verdict | None:
        """Returns the verdict if it needs no worker process, else None.

        It runs in the main process without a time limit, so it must be fast on every text. The
        default returns None, so that all responses go to `grade`.
        """
        return None

    def warm_up(self) -> None:  # noqa: B027  (most tasks need none)
        """Runs once in each new worker process, before the time limits begin. Import here."""

    def problems(
        self, *, seed: int, count: int, exclude: Collection[str] = frozenset()
    ) -> list[Problem]:
        """Returns the first `count` problems of a stream whose questions are new.

        Args:
          seed: Number of the stream. The training problems and the held-out problems of a run come
            from different streams.
          count: Number of problems.
          exclude: Questions that must not occur.

        Raises:
          ValueError: If the task has no problems of its own, or fewer than `count`.
        """
        raise ValueError(
            f"{type(self).__name__} has no problems of its own; it grades those of a file. Use a "
            "task that implements `problems`."
        )

    def gold(self, problem: Problem) -> str | None:
        """Returns a correct response to one of the problems of `problems`, or None."""
        return None

    def can_grade(self, problem: Problem) -> bool:
        """Returns whether responses can be graded, by default whether the answer is known."""
        return has_answer(problem)

    def check_problem(self, problem: Problem) -> None:  # noqa: B027  (most tasks need none)
        """Checks a problem before anything is sampled.

        Raises:
          ValueError: If no response to it could be correct.
        """


def has_answer(problem: Problem) -> bool:
    """Returns whether the correct answer of a problem is known."""
    return bool(problem.answer.strip())


def check_problems(task: Task, problems: Iterable[Problem]) -> None:
    """Checks all problems that a run will grade.

    Raises:
      ValueError: If no response to one of them could be correct. Names the problem.
    """
    for problem in problems:
        try:
            task.check_problem(problem)
        except ValueError as error:
            raise ValueError(f"Problem {problem.id!r}: {error}") from None
