"""Scores: pass@k by counting subsets, intervals by their coverage."""

import itertools
import math

import numpy as np
import pytest

from tw_jax.rollouts.score import bootstrap, mean_at_n, pass_at_k, wilson


def test_mean_at_n_is_the_share_of_each_problem():
    correct = np.array([[True, False, False, False], [True, True, True, True]])
    np.testing.assert_array_equal(mean_at_n(correct), [0.25, 1.0])


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    correct = np.array([[i < c for i in range(n)] for c in range(n + 1)])
    for k in range(1, n + 1):
        subsets = [
            np.mean([any(row[list(subset)]) for subset in itertools.combinations(range(n), k)])
            for row in correct
        ]
        np.testing.assert_allclose(pass_at_k(correct, k), subsets, rtol=1e-12)


def test_pass_at_one_is_mean_at_n_and_pass_at_n_is_any():
    correct = np.random.default_rng(0).random((50, 16)) < 0.2
    np.testing.assert_allclose(pass_at_k(correct, 1), mean_at_n(correct), rtol=1e-12)
    np.testing.assert_array_equal(pass_at_k(correct, 16), correct.any(axis=1))


def test_pass_at_k_of_a_thousand_samples_does_not_overflow():
    correct = np.zeros((1, 1000), bool)
    correct[0, :3] = True
    want = 1 - math.prod((1000 - 3 - i) / (1000 - i) for i in range(500))
    np.testing.assert_allclose(pass_at_k(correct, 500), [want], rtol=1e-9)


@pytest.mark.parametrize("k", [0, 5])
def test_more_samples_than_there_are_cannot_pass(k):
    with pytest.raises(ValueError, match="must be 1 to 4"):
        pass_at_k(np.ones((2, 4), bool), k)


@pytest.mark.parametrize("correct", [np.ones(3, bool), np.ones((0, 3), bool), np.ones((2, 2))])
def test_a_table_that_is_no_table_of_truths_is_refused(correct):
    with pytest.raises(ValueError, match="must be bool"):
        mean_at_n(correct)


def test_wilson_has_width_where_all_or_none_are_correct():
    z2 = 1.959963984540054**2
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.0, z2 / (10 + z2)), abs=1e-12)
    assert wilson(1.0, 10) == pytest.approx((1.0, 10 / (10 + z2), 1.0), abs=1e-12)


def test_an_interval_of_none_begins_at_0_and_one_of_all_ends_at_1():
    for trials in range(1, 300):
        assert wilson(0.0, trials).low == 0
        assert wilson(1.0, trials).high == 1
        assert bootstrap(np.zeros(trials), resamples=3)[1:] == (0, 0)


def test_wilson_solves_its_own_equation():
    z = 1.959963984540054
    for share, trials in ((0.3, 17), (0.9, 200), (0.5, 1)):
        for bound in wilson(share, trials)[1:]:
            assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / trials)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = {"wilson": 0, "bootstrap": 0}
    for trial in range(300):
        problems = rng.beta(0.6, 0.4, size=60)  # true mean 0.6
        correct = rng.random((60, 8)) < problems[:, None]
        shares = mean_at_n(correct)
        intervals = {
            "wilson": wilson(float(shares.mean()), 60),
            "bootstrap": bootstrap(shares, resamples=100, seed=trial),
        }
        for name, (_, low, high) in intervals.items():
            hits[name] += low <= 0.6 <= high
    assert 0.90 < hits["bootstrap"] / 300 < 0.98
    assert hits["wilson"] / 300 > 0.94  # wider than it need be, never narrower


def test_a_bootstrap_repeats_itself_and_narrows_with_the_problems():
    values = np.random.default_rng(2).normal(1000.0, 100.0, size=400)
    assert bootstrap(values) == bootstrap(values)
    value, low, high = bootstrap(values)
    assert value == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap(values, confidence=0.5)[1] > low


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_an_impossible_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        bootstrap(np.ones(3), confidence=confidence)
