"""The numbers of an evaluation, by hand."""

from tw_jax.rollouts.evaluate import accuracy


def test_accuracy_is_over_the_problems_whose_answer_is_known():
    numbers = accuracy(["correct", "wrong", "unknown", "unknown", "wrong", "wrong"], 2)
    assert numbers["exact_match"] == 0.25
    assert numbers["pass_at_2"] == 0.5
    assert numbers["without_answer"] == 1
    none = accuracy(["unknown"] * 2, 1)
    assert (none["exact_match"], none["without_answer"]) == (None, 2)
