"""The reward of a rollout: a correct answer, the tokens that its threads saved, and further terms.

Acceleration is computed from the calls that were made, so text that only looks parallel earns
nothing. The ways of the reference, which read the text, are available for comparison. Own terms are
config classes that inherit from `RewardTerm` (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.cost import Cost, Tags, cost_from_calls, cost_from_ids
from tw_jax.forkjoin.tries import trajectory_trie
from tw_jax.rollouts.judge import Verdict
from tw_jax.rollouts.terms import JudgedRollout, RewardTerm, SoftOverlong
from tw_jax.tasks.task import Problem

CUT = frozenset({"length", "rounds", "budget"})
"""`Trajectory.finish` of rollouts that a limit ended, not the model."""
_TAKEN = frozenset({"correctness", "acceleration", "overlong", "std"})
"""Names that a term cannot have, because their metrics exist."""


@configurable
class GroupLength:
    """A penalty on length within groups that have mostly correct answers; see `length_penalty`.

    Attributes:
      threshold: Share of correct answers from which on a group is penalised, below 1.
      strength: The penalty in a group in which all answers are correct, at full excess.
      window_tokens: Excess over the shortest correct answer at which the penalty is full.
      counted: "longest" counts the tokens on the longest path, "total" all tokens.
      epsilon: Added to numerator and denominator, so that the penalty is not 0 at the threshold.
    """

    threshold: float = 0.8
    strength: float = 0.2
    window_tokens: int = 10_000
    counted: Literal["longest", "total"] = "longest"
    epsilon: float = 1e-6

    def check(self) -> None:
        """Refuses numbers out of range, and divisors of 0."""
        require(self, "threshold", least=0, below=1)
        require(self, "strength", "epsilon", least=0)
        require(self, "window_tokens", least=1)


@configurable
class Reward:
    """Correctness plus acceleration, plus further terms.

    The defaults are those of ThreadWeaver's published runs, except for `counted`, where those read
    prompt and response. Padding a short thread to the length of its siblings raises this reward up
    to the clip although it saves no time.

    Attributes:
      correct: Reward of a correct answer.
      incorrect: Reward of any other; ThreadWeaver's code has -1, its README 0, which doubles the
        weight of acceleration against correctness.
      acceleration_factor: Factor of the acceleration, for correct answers only; 0 disables it.
      acceleration_clip: The largest acceleration that is rewarded.
      acceleration: "saved" is 1 - longest / total, "speedup" is total / longest - 1 (the README).
      counted: "calls" counts the sampled tokens by the calls that were made; "response" reads the
        blocks in the text after the prompt, "prompt_and_response" in all of it (the reference,
        where a long prompt makes the ratio small).
      overlong: Treatment of rollouts that a limit cut off: "keep" grades them like others,
        "filter" leaves their tokens out of the loss, `SoftOverlong` penalises length before the
        limit.
      group_length: A penalty on length within groups, or None.
      terms: Further terms, which are added. Each has its metric, `reward_` and its name.
    """

    correct: float = 1.0
    incorrect: float = -1.0
    acceleration_factor: float = 0.5
    acceleration_clip: float = 0.2
    acceleration: Literal["saved", "speedup"] = "saved"
    counted: Literal["calls", "response", "prompt_and_response"] = "calls"
    overlong: SoftOverlong | Literal["keep", "filter"] = "keep"
    group_length: GroupLength | None = None
    terms: tuple[RewardTerm, ...] = ()

    def check(self) -> None:
        """Refuses rewards that do not prefer a correct answer, and two terms of one name."""
        if not self.correct > self.incorrect:
            raise ValueError(
                f"Reward.correct = {self.correct} must be greater than Reward.incorrect = "
                f"{self.incorrect}."
            )
        require(self, "acceleration_factor", "acceleration_clip", least=0)
        names = [term.name for term in self.terms]
        twice = next((name for name in names if name in _TAKEN or names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"Reward.terms has a term with the name {twice!r}, and its metric reward_{twice} "
                "exists already. Give each term its own name."
            )


class Parts(NamedTuple):
    """The parts of the reward of one rollout."""

    is_correct: bool
    correctness: float
    acceleration: float
    overlong: float  # 0 or less
    terms: Mapping[str, float]  # by the names of `Reward.terms`
    is_trained: bool  # False if the tokens of the rollout are left out of the loss
    cost: Cost  # of the calls that were made
    text: Cost | None  # of the text, if `Reward.counted` reads it

    @property
    def counted(self) -> Cost:
        """The cost from which acceleration and the penalty on length are computed."""
        return self.cost if self.text is None else self.text

    @property
    def total(self) -> float:
        """The sum, before any penalty of the group."""
        return self.correctness + self.acceleration + self.overlong + sum(self.terms.values())

    def record(self, reward: float) -> dict[str, Any]:
        """Returns the parts and the final reward as JSON, with null for numbers not finite."""
        numbers = {
            "correctness": self.correctness,
            "acceleration": self.acceleration,
            "overlong": self.overlong,
            **{f"reward_{name}": score for name, score in self.terms.items()},
            "reward": reward,
        }
        return {
            "is_correct": bool(self.is_correct),
            **{name: float(x) if np.isfinite(x) else None for name, x in numbers.items()},
            "longest": int(self.cost.longest),
            "total": int(self.cost.total),
            **(
                {}
                if self.text is None
                else {"text_longest": int(self.text.longest), "text_total": int(self.text.total)}
            ),
        }


def reward(
    trajectory: Trajectory,
    verdict: Verdict,
    cfg: Reward,
    *,
    problem: Problem,
    text: str,
    tags: Tags | None = None,
) -> Parts:
    """Rewards one rollout.

    correctness = correct or incorrect
    acceleration = acceleration_factor * min(1 - longest / total, acceleration_clip), if correct
    total = correctness + acceleration + overlong + sum of the terms
    Source: ThreadWeaver (arXiv:2512.07843), P-GRPO's reward; clip and factor from its scripts.

    Args:
      trajectory: The rollout.
      verdict: The result of grading; only "correct" earns the reward of a correct answer.
      cfg: `Reward`.
      problem: The problem that was asked.
      text: The response as text, without the prompt.
      tags: Ids of the tags, which `Reward.counted` needs unless it is "calls".

    Raises:
      ValueError: If `Reward.counted` needs tags and there are none.
    """
    rollout = JudgedRollout(problem, trajectory, text, verdict, cost_from_calls(trajectory))
    read = _cost_of_text(trajectory, cfg, tags)
    counted = rollout.cost if read is None else read
    saved = counted.acceleration if cfg.acceleration == "saved" else _speedup(counted)
    earned = cfg.acceleration_factor * min(saved, cfg.acceleration_clip)
    return Parts(
        is_correct=rollout.is_correct,
        correctness=cfg.correct if rollout.is_correct else cfg.incorrect,
        acceleration=earned if rollout.is_correct else 0.0,
        overlong=0.0 if isinstance(cfg.overlong, str) else cfg.overlong.score(rollout),
        terms={term.name: float(term.score(rollout)) for term in cfg.terms},
        is_trained=not (cfg.overlong == "filter" and trajectory.finish in CUT),
        cost=rollout.cost,
        text=read,
    )


def exclude_long(
    parts: Sequence[Parts], trajectories: Sequence[Trajectory], max_tokens: int
) -> list[Parts]:
    """Marks rollouts whose tries are longer than a row as not trained; their rewards stay."""
    return [
        one._replace(is_trained=one.is_trained and len(trajectory_trie(trajectory)) <= max_tokens)
        for one, trajectory in zip(parts, trajectories, strict=True)
    ]


def refuse_short_rows(step: int, trajectories: Sequence[Trajectory], max_tokens: int) -> None:
    """Refuses a step whose rollouts are all longer than a row.

    Args:
      step: Number of the step, for the message.
      trajectories: Its rollouts.
      max_tokens: Length of a row.

    Raises:
      ValueError: If every trie has more nodes than a row has tokens.
    """
    shortest = min(map(len, map(trajectory_trie, trajectories)))
    if shortest > max_tokens:
        raise ValueError(
            f"Step {step}: every rollout is longer than a row of {max_tokens} tokens; the shortest "
            f"has {shortest} nodes. Raise Packing.row_tokens or lower ForkJoin.max_new."
        )


def totals(groups: Sequence[Sequence[Parts]], cfg: Reward) -> np.ndarray:
    """Returns the rewards from which advantages are computed, penalties of the group included.

    Args:
      groups: P prompts with K rollouts each.
      cfg: `group_length` is read.

    Returns:
      [P, K] float64.
    """
    summed = np.array([[parts.total for parts in group] for group in groups])
    if cfg.group_length is None:
        return summed
    counted = cfg.group_length.counted
    length = np.array([[getattr(parts.counted, counted) for parts in group] for group in groups])
    is_correct = np.array([[parts.is_correct for parts in group] for group in groups])
    return summed - length_penalty(is_correct, length, cfg.group_length)


def length_penalty(is_correct: np.ndarray, length: np.ndarray, cfg: GroupLength) -> np.ndarray:
    """Returns the penalty on length in groups that are mostly correct, for wrong rollouts too.

    penalty[p, k] = alpha[p] * clip((length[p, k] - shortest[p]) / window, 0, 1)
    alpha[p] = strength * (share[p] - threshold + eps) / (1 - threshold + eps), 0 below threshold
    share[p] is that of correct answers, shortest[p] the least length of one; 0 if none is correct.
    Source: the group length penalty in ThreadWeaver's trainer, where it is off by default.

    Args:
      is_correct: [P, K] bool.
      length: [P, K] tokens.
      cfg: `GroupLength`.

    Returns:
      [P, K] float64, at least 0, to be subtracted.
    """
    above = is_correct.mean(axis=1) - cfg.threshold
    alpha = cfg.strength * (above + cfg.epsilon) / (1 - cfg.threshold + cfg.epsilon)
    # Rounding may put a share such as 4/5 just below 0.8.
    alpha = np.where(above > -1e-9, alpha, 0.0)
    far = np.iinfo(np.int64).max // 2  # no excess if no answer is correct
    shortest = np.where(is_correct, length, far).min(axis=1, keepdims=True)
    return alpha[:, None] * np.clip((length - shortest) / cfg.window_tokens, 0, 1)


def finite_groups(reward: np.ndarray) -> np.ndarray:
    """Returns which groups have only finite rewards, [P, K] -> [P] bool. Do not train the others.

    The terms of an own module may return infinity or NaN. As an advantage it would spoil every
    parameter.
    """
    return np.asarray(np.isfinite(reward).all(axis=1))


def trainable_groups(groups: Sequence[Sequence[Parts]]) -> np.ndarray:
    """Returns which groups have a rollout that is trained, [P] bool."""
    return np.array([any(one.is_trained for one in group) for group in groups], bool)


def reward_metrics(groups: Sequence[Sequence[Parts]], reward: np.ndarray) -> dict[str, float]:
    """Returns the metrics of a step's rollouts: means over all of them, of finite numbers.

    Args:
      groups: P prompts with K rollouts each, those without signal included.
      reward: [P, K], the `totals`.

    Returns:
      Numbers by name. reward_std is the mean of the groups' standard deviations. Each part and each
      term has its mean, reward_NAME. Tokens and their ratio are those of the calls. If
      `Reward.counted` reads the text, its tokens have names that begin with text_.
    """
    flat = [one for group in groups for one in group]
    finite = reward[finite_groups(reward)]

    def mean(numbers: Iterable[float]) -> float:
        found = np.array([number for number in numbers if np.isfinite(number)])
        return float(found.mean()) if found.size else 0.0

    def tokens(costs: Sequence[Cost]) -> dict[str, float]:
        longest, total = mean(one.longest for one in costs), mean(one.total for one in costs)
        ratio = longest / total if total else 1.0  # as `tw evaluate` defines it
        return {"longest_tokens": longest, "total_tokens": total, "latency_ratio": ratio}

    texts = [one.text for one in flat if one.text is not None]
    return {
        "reward": mean(finite.ravel()),
        "reward_std": mean(finite.std(axis=1)),
        "correct": mean(one.is_correct for one in flat),
        "reward_correctness": mean(one.correctness for one in flat),
        "reward_acceleration": mean(one.acceleration for one in flat),
        "reward_overlong": mean(one.overlong for one in flat),
        **{f"reward_{name}": mean(one.terms[name] for one in flat) for name in flat[0].terms},
        **tokens([one.cost for one in flat]),
        **({f"text_{name}": x for name, x in tokens(texts).items()} if texts else {}),
        "longest_tokens_max": float(max(one.cost.longest for one in flat)),
        "blocks": mean(one.cost.blocks for one in flat),
    }


def _cost_of_text(trajectory: Trajectory, cfg: Reward, tags: Tags | None) -> Cost | None:
    """The cost by the text, if the reward reads it."""
    if cfg.counted == "calls":
        return None
    if tags is None:
        raise ValueError(
            f"Reward.counted = {cfg.counted!r} reads the text and needs the ids of its tags. Pass "
            "tags = tags_of(tokenizer), or set Reward.counted to 'calls'."
        )
    first = trajectory.prompt_tokens if cfg.counted == "response" else 0
    return cost_from_ids(trajectory.ids[first:], tags)


def _speedup(cost: Cost) -> float:
    return cost.total / cost.longest - 1 if cost.longest else 0.0
