"""Grades the answers of rollouts; the work is shared by the processes of a job.

Each text is graded by only one process, because a deadline that is missed on one host may be met on
another. All processes then receive all verdicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from tw_jax import hosts
from tw_jax.data.records import Problem
from tw_jax.rollouts.generate import RolloutGroup
from tw_jax.tasks import task
from tw_jax.tasks.grader import GraderPool

Verdict = task.Verdict | Literal["unknown"]
"""The grader's verdict on an answer; "unknown" if the problem has no answer to compare with."""


def judge(pool: GraderPool, items: Iterable[tuple[Problem, str]]) -> list[Verdict]:
    """Grades responses to problems.

    Args:
      pool: Grades the share of this process.
      items: The problem and the text after the prompt of each rollout, the same in every process.

    Returns:
      A verdict for each item, in their order. "timeout" means that grading took too long.
    """
    items = list(items)
    can_grade = [pool.task.can_grade(problem) for problem, _ in items]
    gradable = [item for item, can in zip(items, can_grade, strict=True) if can]
    graded = iter(hosts.divide(pool.grade_all, gradable))
    return [next(graded) if can else "unknown" for can in can_grade]


def judge_groups(pool: GraderPool, groups: Sequence[RolloutGroup]) -> list[list[Verdict]]:
    """Grades the rollouts of each group; see `judge`.

    Returns:
      The verdicts on the rollouts of each group.
    """
    items = [(group.problem, text) for group in groups for text in group.texts]
    verdicts = iter(judge(pool, items))
    return [[next(verdicts) for _ in group.texts] for group in groups]
