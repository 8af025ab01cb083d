"""Verdicts: a problem without a known answer has none."""

from tw_jax.rollouts.judge import judge
from tw_jax.tasks.grader import Grader, GraderPool
from tw_jax.tasks.task import Problem


def test_a_problem_without_a_known_answer_is_neither_right_nor_wrong():
    items = [(Problem("a", "q", answer), r"</think> \boxed{5}") for answer in ("5", "6", "", " ")]
    task = Grader(mode="number")
    with GraderPool(task) as pool:
        assert judge(task, pool, items) == ["correct", "wrong", "unknown", "unknown"]
