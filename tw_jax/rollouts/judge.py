"""Verdicts on the answers of rollouts, shared over the processes of a job.

Each text is judged by one process, because a deadline that is missed on one host may be met on
another. All processes then have all verdicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from tw_jax import hosts
from tw_jax.tasks import answers
from tw_jax.tasks.grader import GraderPool

Verdict = answers.Verdict | Literal["unknown"]
"""What the grader says of an answer; "unknown" where the right answer is not known."""


def judge(pool: GraderPool, texts: Iterable[str], truths: Iterable[str]) -> list[Verdict]:
    """Grades texts against right answers.

    Args:
      pool: grades the share of this process.
      texts: what the model wrote after the prompt; the same in every process.
      truths: the right answer of each; blank where none is known.

    Returns:
      A verdict for each text, in their order. "timeout" is an answer that was not judged in time.
    """
    items = list(zip(texts, truths, strict=True))
    graded = iter(hosts.divide(pool.grade_all, [item for item in items if item[1].strip()]))
    return [next(graded) if truth.strip() else "unknown" for _, truth in items]


def truths_of(answers_of_groups: Sequence[tuple[str, int]]) -> list[str]:
    """Repeats the answer of each problem for each of its rollouts.

    Args:
      answers_of_groups: (answer, number of rollouts) of each problem.
    """
    return [answer for answer, count in answers_of_groups for _ in range(count)]
