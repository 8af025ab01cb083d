"""Verdicts: a problem without a known answer has none."""

from tw_jax.data import records
from tw_jax.rollouts.judge import judge
from tw_jax.tasks.grader import Grader, GraderPool


def test_a_problem_without_a_known_answer_is_neither_right_nor_wrong():
    items = [
        (records.Problem("a", "q", answer, ""), r"</think> \boxed{5}")
        for answer in ("5", "6", "", " ")
    ]
    with GraderPool(Grader(mode="number")) as pool:
        assert judge(pool, items) == ["correct", "wrong", "unknown", "unknown"]
