"""Rewards by hand: each part, each variant, and penalties that look at the whole group."""

import dataclasses
import itertools
import types
import typing

import numpy as np
import pytest
import trajectories

from tw_jax.forkjoin import cost
from tw_jax.forkjoin.calls import Call, StopReason, Trajectory
from tw_jax.rollouts import reward as rewards
from tw_jax.rollouts.reward import (
    GroupLength,
    Reward,
    SoftOverlong,
    finite_groups,
    length_penalty,
    reward_metrics,
    totals,
    trainable_groups,
)
from tw_jax.rollouts.terms import RewardTerm
from tw_jax.tasks.task import Problem

NOTHING = np.zeros(0, np.int32)


def call(path, sampled):
    ids = np.zeros(sampled, np.int32)
    return Call(path, NOTHING, NOTHING.astype(np.int8), ids, None, StopReason.STOP)


def made(*sizes, finish="eos", new=100):
    """A rollout of a parent call and threads of these sizes; `new` ids after a prompt of 10."""
    calls = (call((), 60), *(call((0, str(n)), size) for n, size in enumerate(sizes, 1)))
    ids = np.zeros(10 + new, np.int32)
    return Trajectory(10, calls, ids, ids.astype(np.int8), bool(sizes), finish, {})


def reward(trajectory, is_correct, cfg, *, text="", tags=None):
    """The parts of a rollout that was graded so."""
    verdict = "correct" if is_correct else "wrong"
    problem = Problem("p", "What?", "4")
    return rewards.reward(trajectory, verdict, cfg, problem=problem, text=text, tags=tags)


# Parts.


@pytest.mark.parametrize(
    ("threads", "is_correct", "correctness", "acceleration"),
    [
        ((20, 20), True, 1.0, 0.5 * 0.2),  # 1 - 80/100, just at the clip
        ((10, 30), True, 1.0, 0.5 * 0.1),  # 1 - 90/100
        ((20, 20, 20), True, 1.0, 0.5 * 0.2),  # 1 - 80/120 is clipped
        ((), True, 1.0, 0.0),
        ((20, 20), False, -1.0, 0.0),
    ],
)
def test_a_right_answer_earns_what_its_threads_saved(
    threads, is_correct, correctness, acceleration, close
):
    parts = reward(made(*threads), is_correct, Reward())
    assert parts.correctness == correctness
    close("rounding", parts.acceleration, acceleration)
    assert parts.total == parts.correctness + parts.acceleration
    assert (parts.is_correct, parts.overlong, parts.is_trained) == (is_correct, 0.0, True)


def test_the_incorrect_reward_is_what_the_config_says():
    assert reward(made(), False, Reward(incorrect=0.0)).total == 0.0


def test_the_readme_variant_pays_speedup(close):
    cfg = Reward(acceleration="speedup", acceleration_clip=1.0)
    parts = reward(made(10, 30), True, cfg)
    close("rounding", parts.acceleration, 0.5 * (100 / 90 - 1))


def test_a_rollout_that_drew_nothing_earns_no_acceleration():
    empty = dataclasses.replace(made(), calls=())
    for acceleration in ("saved", "speedup"):
        assert reward(empty, True, Reward(acceleration=acceleration)).acceleration == 0


def test_text_that_looks_parallel_earns_nothing_by_calls_and_pays_by_text(close):
    """One call that wrote both threads by itself, as the reference's sequential baseline may."""
    text = "ab<Parallel><Thread>aaaa</Thread><Thread>bbbb</Thread></Parallel>ab"
    ids, tags = trajectories.TOKENIZER.encode("abc" + text), cost.tags_of(trajectories.TOKENIZER)
    written = Trajectory(
        3, (call((), len(ids) - 3),), ids, np.zeros(len(ids), np.int8), 0, "eos", {}
    )
    total = 2 + 1 + 2 * (4 + 2) + 1 + 2
    saved = 4 / total
    wide = {"acceleration_clip": 1.0, "acceleration_factor": 1.0}
    assert reward(written, True, Reward()).acceleration == 0
    by_text = reward(written, True, Reward(counted="response", **wide), tags=tags)
    close("rounding", by_text.acceleration, saved)
    with_prompt = reward(written, True, Reward(counted="prompt_and_response", **wide), tags=tags)
    close("rounding", with_prompt.acceleration, 4 / (total + 3))
    assert with_prompt.text.total == by_text.text.total + 3
    assert with_prompt.cost == by_text.cost == cost.cost_from_calls(written)
    numbers = reward_metrics([[by_text]], np.zeros((1, 1)))
    assert numbers["latency_ratio"] == 1, "one call drew it all"
    assert numbers["text_latency_ratio"] < 1


def test_reading_text_needs_tags():
    with pytest.raises(ValueError, match="'response' reads the text and needs the ids of its tags"):
        reward(made(), True, Reward(counted="response"))


# Overlong.


@pytest.mark.parametrize(
    ("finish", "is_trained"),
    [("eos", True), ("length", False), ("rounds", False), ("budget", False), ("error", True)],
)
def test_a_filter_leaves_out_what_a_limit_cut_off(finish, is_trained):
    rollout = made(finish=finish)
    assert reward(rollout, False, Reward(overlong="filter")).is_trained == is_trained
    assert reward(rollout, False, Reward()).is_trained


@pytest.mark.parametrize(
    ("new", "penalty"), [(0, 0.0), (60, 0.0), (70, -0.125), (100, -0.5), (120, -0.5)]
)
def test_a_soft_penalty_grows_over_the_buffer(new, penalty):
    soft = SoftOverlong(limit_tokens=100, buffer_tokens=40, weight=0.5)
    parts = reward(made(new=new), True, Reward(overlong=soft))
    assert parts.overlong == pytest.approx(penalty)
    assert parts.total == parts.correctness + parts.acceleration + parts.overlong
    assert parts.is_trained


# Terms.


class Half(RewardTerm):
    """Half a point for each letter of the response; not a config class, so no config names it."""

    def score(self, rollout):
        assert rollout.problem.question == "What?"
        assert rollout.cost == cost.cost_from_calls(rollout.trajectory)
        return 0.5 * len(rollout.text) + (10 if rollout.is_correct else 0) + rollout.num_tokens


class LengthOfURL2Text(Half):
    def score(self, rollout):
        return float("nan")


class Overlong(Half):
    pass


def test_the_name_of_a_term_is_that_of_its_class_in_snake_case():
    assert (Half().name, LengthOfURL2Text().name) == ("half", "length_of_url2_text")


def test_terms_are_added_and_each_has_its_metric_and_its_record():
    cfg = build_unchecked(Reward(), terms=(Half(),))
    group = [reward(made(new=3), right, cfg, text="ab") for right in (True, False)]
    assert [dict(parts.terms) for parts in group] == [{"half": 14.0}, {"half": 4.0}]
    got = totals([group], cfg)
    assert got.tolist() == [[1.0 + 14.0, -1.0 + 4.0]]
    assert reward_metrics([group], got)["reward_half"] == 9.0
    assert group[0].record(15.0)["reward_half"] == 14.0


def test_a_term_that_is_no_number_keeps_its_group_from_being_trained():
    cfg = build_unchecked(Reward(), terms=(LengthOfURL2Text(),))
    groups = [[reward(made(), True, cfg)], [reward(made(), True, Reward())]]
    assert finite_groups(totals(groups, cfg)).tolist() == [False, True]
    assert groups[0][0].record(np.nan)["reward_length_of_url2_text"] is None
    assert reward_metrics([groups[0]], totals([groups[0]], cfg))["reward_length_of_url2_text"] == 0


def test_two_terms_of_one_name_and_the_names_of_the_parts_are_refused():
    with pytest.raises(ValueError, match="'overlong', and its metric reward_overlong exists"):
        build_unchecked(Reward(), terms=(Overlong(),)).check()
    with pytest.raises(ValueError, match="'half', and its metric reward_half exists"):
        build_unchecked(Reward(), terms=(Half(), Half())).check()


def build_unchecked(cfg, **changes):
    """A copy with values that only a config file could not give it, as terms of no config class."""
    copied = dataclasses.replace(cfg)
    for name, value in changes.items():
        object.__setattr__(copied, name, value)
    return copied


# Groups.


def test_length_costs_in_groups_that_are_mostly_right(close):
    cfg = GroupLength(threshold=0.5, strength=0.2, window_tokens=100, epsilon=0.0)
    right = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    length = np.array([[50, 80, 400, 30], [50, 80, 400, 30], [50, 80, 400, 30]])
    got = length_penalty(right, length, cfg)
    # 3 of 4 right: alpha = 0.2 * (0.75 - 0.5) / (1 - 0.5) = 0.1, shortest right 50; a wrong rollout
    # pays for length too. 1 of 4 is below the threshold; 2 of 4 is at it, where alpha is 0.
    close("rounding", got[0], [0, 0.03, 0.1, 0])
    assert (got[1:] == 0).all()


def test_length_costs_nothing_where_no_answer_is_right():
    cfg = GroupLength(threshold=0.0)
    assert (length_penalty(np.zeros((1, 3), bool), np.array([[1, 2, 30_000]]), cfg) == 0).all()


def test_the_least_penalised_share_counts_as_reached_despite_rounding():
    right = np.array([[True] * 7 + [False] * 3])
    length = np.arange(10)[None] * 10_000
    got = length_penalty(right, length, GroupLength(threshold=0.7, strength=1.0, epsilon=0.1))
    assert got[0, 1:].tolist() == pytest.approx([0.1 / 0.4] * 9)


@pytest.mark.parametrize(("counted", "excess"), [("longest", 40), ("total", 70)])
def test_totals_subtract_the_penalty_of_the_group(counted, excess, close):
    cfg = Reward(
        group_length=GroupLength(threshold=0.5, window_tokens=100, epsilon=0.0, counted=counted)
    )
    group = [reward(made(10, 10), True, cfg), reward(made(40, 50), True, cfg)]
    got = totals([group], cfg)
    want = [group[0].total, group[1].total - 0.2 * excess / 100]
    close("rounding", got[0], want)


def test_totals_are_the_sums_of_the_parts():
    groups = [[reward(made(20, 20), True, Reward()), reward(made(), False, Reward())]]
    np.testing.assert_allclose(totals(groups, Reward()), [[1.1, -1.0]])


def test_a_summary_leaves_out_what_is_no_number():
    parts = [reward(made(10, 30), is_correct, Reward()) for is_correct in (True, False)]
    groups, rewards = [parts, parts], np.array([[1.1, -1.0], [np.nan, -1.0]])
    found = reward_metrics(groups, rewards)
    assert found["reward"] == pytest.approx(0.05)
    assert found["reward_std"] == pytest.approx(1.05)
    assert found["correct"] == 0.5
    assert (found["total_tokens"], found["longest_tokens"]) == (100, 90)
    assert parts[0].record(np.nan)["reward"] is None
    assert parts[0].record(1.1)["longest"] == 90


@pytest.mark.parametrize("drawn", [(0, 0, 1, 0), (0, 0, 0, 0)])
def test_the_latency_ratio_of_calls_without_a_fork_is_one_however_few_their_tokens(drawn):
    rollouts = [
        Trajectory(3, (call((), n),), NOTHING, NOTHING.astype(np.int8), 0, "eos", {}) for n in drawn
    ]
    parts = [reward(rollout, False, Reward()) for rollout in rollouts]
    assert reward_metrics([parts], np.zeros((1, 4)))["latency_ratio"] == 1


def test_a_group_of_rollouts_that_are_all_left_out_trains_nothing():
    cut = reward(made(10, finish="length"), False, Reward(overlong="filter"))
    whole = reward(made(10), False, Reward(overlong="filter"))
    assert trainable_groups([[cut, cut], [cut, whole]]).tolist() == [False, True]


def test_groups_with_a_reward_that_is_no_number_are_found():
    rewards = np.array([[1, 2], [np.nan, 1], [np.inf, 1], [-np.inf, 0]])
    assert finite_groups(rewards).tolist() == [True, False, False, False]


# Choices.

EXAMPLES = {
    SoftOverlong: SoftOverlong(limit_tokens=100, buffer_tokens=40),
    GroupLength: GroupLength(threshold=0.5, window_tokens=100),
}


def values(hint):
    """What a field of this type may be set to, an example for each config; none for numbers."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if hint is types.NoneType:
        return [None]
    if hint is RewardTerm:
        return []  # any, none by default
    if hint in EXAMPLES:
        return [EXAMPLES[hint]]
    return [value for part in typing.get_args(hint) for value in values(part)]


def test_m7_every_choice_of_the_reward_is_computed():
    fields = {name: values(hint) for name, hint in typing.get_type_hints(Reward).items()}
    fields = {name: found for name, found in fields.items() if found}
    assert {name: len(found) for name, found in fields.items()} == {
        "acceleration": 2,
        "counted": 3,
        "overlong": 3,
        "group_length": 2,
    }
    tags = cost.tags_of(trajectories.TOKENIZER)
    for chosen in itertools.product(*fields.values()):
        cfg = Reward(**dict(zip(fields, chosen, strict=True)))
        group = [reward(made(20, 20), right, cfg, tags=tags) for right in (True, False)]
        got = totals([group], cfg)
        assert np.isfinite(got).all(), cfg
        assert got[0, 0] > got[0, 1], cfg


# Refusals.


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Reward(correct=0.0, incorrect=0.0), "must be greater than Reward.incorrect"),
        (lambda: Reward(correct=float("inf")), "must be a finite number"),
        (lambda: Reward(acceleration_factor=-1.0), "acceleration_factor = -1.0 must be at least 0"),
        (
            lambda: SoftOverlong(limit_tokens=5, buffer_tokens=6),
            "must be 1 to SoftOverlong.limit_tokens = 5",
        ),
        (lambda: GroupLength(threshold=1.0), "must be at least 0 and below 1"),
        (lambda: GroupLength(window_tokens=0), "must be at least 1"),
    ],
)
def test_configs_without_sense_are_refused(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()
