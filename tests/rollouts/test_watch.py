"""The console of a reinforcement run: what a step shows, and when steps without signal are told."""

import pytest

from tw_jax.rollouts.watch import PATIENCE, SignalWatch, shown, steps_without_signal


def sentences_of(signals, *, correct=0.0):
    """The sentences about steps with these numbers of groups with signal."""
    watch = SignalWatch()
    return [
        watch.sentence(index, {"groups_with_signal": groups, "correct": correct})
        for index, groups in enumerate(signals)
    ]


def test_a_step_shows_its_reward_and_its_signal_and_not_its_loss():
    numbers = {"reward": -0.98765, "correct": 0.0625, "loss": 0.0, "skipped": 1.0}
    line = shown({**numbers, "groups_with_signal": 3.0, "groups_drawn": 24.0})
    assert line == {"reward": "-0.988", "correct": "0.0625", "signal": "3/24", "skipped": "1"}


def test_five_steps_in_a_row_without_signal_are_told_once():
    assert PATIENCE == 5
    sentences = sentences_of([1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    assert [index for index, sentence in enumerate(sentences) if sentence] == [10]
    assert sentences[10].startswith("Steps 6 to 10 had no group whose rewards differ")


@pytest.mark.parametrize(
    ("correct", "advice"), [(0.0, "Use easier problems"), (1.0, "Use harder problems")]
)
def test_the_advice_depends_on_the_share_of_correct_rollouts(correct, advice):
    sentence = sentences_of([0] * 5, correct=correct)[-1]
    assert advice in sentence
    for field in ("Sampler.temperature", "Pgrpo.rollouts", "Pgrpo.max_prompts", "Reward"):
        assert field in sentence


def test_the_end_of_a_run_counts_its_steps_without_signal():
    lines = [{"groups_with_signal": float(groups)} for groups in (0, 2, 0)]
    assert steps_without_signal(lines[1:2]) is None
    assert "2 of 3 steps did not change the model" in str(steps_without_signal(lines))
    assert "1 of 1 step did not change the model" in str(steps_without_signal(lines[:1]))
