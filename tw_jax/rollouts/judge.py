"""Verdicts on the answers of rollouts, shared over the processes of a job.

Each text is judged by one process, because a deadline that is missed on one host may be met on
another. All processes then have all verdicts. This file knows no reward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from tw_jax import hosts
from tw_jax.rollouts.generate import RolloutGroup
from tw_jax.tasks.grader import GraderPool
from tw_jax.tasks.task import Problem, Task, Verdict


def judge(
    task: Task, pool: GraderPool, items: Iterable[tuple[Problem, str]]
) -> list[Verdict | Literal["unknown"]]:
    """Grades responses to problems.

    Args:
      task: says which problems can be graded.
      pool: grades the share of this process.
      items: a problem and the text after its prompt, for each rollout; the same in every process.

    Returns:
      A verdict for each item, in their order. "timeout" is a response that was not judged in time,
      and "unknown" one to a problem that cannot be graded.
    """
    items = list(items)
    can_grade = [task.can_grade(problem) for problem, _ in items]
    gradable = [item for item, can in zip(items, can_grade, strict=True) if can]
    verdicts = iter(hosts.divide(pool.grade_all, gradable))
    return [next(verdicts) if can else "unknown" for can in can_grade]


def judge_groups(pool: GraderPool, groups: Sequence[RolloutGroup]) -> list[list[Verdict]]:
    """Grades the rollouts of each group, whose problems can all be graded.

    Returns:
      For each group a verdict for each of its rollouts.
    """
    items = [(group.problem, text) for group in groups for text in group.texts]
    verdicts = iter(hosts.divide(pool.grade_all, items))
    return [[next(verdicts) for _ in group.texts] for group in groups]
