"""The reward of a rollout: a right answer, and what its threads saved; parts kept apart.

Acceleration is read from the calls that were made, so text that merely looks parallel earns
nothing; the reference's readings of the text are there to compare with. This file knows no grader
and no advantage: it is told whether the answer is right and hands on numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.cost import Cost, Tags, cost_from_calls, cost_from_ids
from tw_jax.forkjoin.tries import trajectory_trie

CUT = frozenset({"length", "rounds", "budget"})
"""`Trajectory.finish` of rollouts that a limit ended, not the model."""


@configurable
class SoftOverlong:
    """A penalty that grows with length before the limit cuts a rollout off.

    penalty = -weight * clip((length - (limit - buffer)) / buffer, 0, 1), where length is that of
    the joined path without the prompt. Source: DAPO (arXiv:2503.14476), soft overlong punishment.

    Attributes:
      limit_tokens: length from which on the whole penalty applies, as a rule `ForkJoin.max_new`.
      buffer_tokens: lengths below the limit over which the penalty grows.
      weight: the whole penalty.
    """

    limit_tokens: int
    buffer_tokens: int
    weight: float = 1.0

    def check(self) -> None:
        """Refuses a buffer that is empty or longer than the limit, and a penalty that rewards."""
        require(self, "limit_tokens", "buffer_tokens", least=1)
        require(self, "weight", least=0)
        if not 1 <= self.buffer_tokens <= self.limit_tokens:
            raise ValueError(
                f"SoftOverlong.buffer_tokens = {self.buffer_tokens}: want 1 to limit_tokens = "
                f"{self.limit_tokens}."
            )


@configurable
class GroupLength:
    """A penalty on length within groups that have mostly right answers; see `length_penalty`.

    Attributes:
      threshold: share of right answers from which on a group is penalised, below 1.
      strength: the penalty of a group in which all are right, at full excess.
      window_tokens: excess over the shortest right answer at which the penalty is full.
      counted: "longest" takes tokens on the longest path, "total" all tokens.
      epsilon: added above and below, so that the penalty is not 0 at the threshold.
    """

    threshold: float = 0.8
    strength: float = 0.2
    window_tokens: int = 10_000
    counted: Literal["longest", "total"] = "longest"
    epsilon: float = 1e-6

    def check(self) -> None:
        """Refuses what cannot be divided by."""
        require(self, "threshold", least=0, below=1)
        require(self, "strength", "epsilon", least=0)
        require(self, "window_tokens", least=1)


@configurable
class Reward:
    """Correctness plus acceleration.

    The defaults are those of ThreadWeaver's published runs but for `counted`, where these read
    prompt and response. Padding a short thread to the length of its siblings saves more by this
    formula and no time; it pays up to the clip.

    Attributes:
      correct: reward of a right answer.
      incorrect: reward of any other; ThreadWeaver's code has -1, its README 0, which doubles what
        acceleration weighs against correctness.
      acceleration_factor: times the acceleration, for right answers only; 0 rewards none.
      acceleration_clip: acceleration that is rewarded at most.
      acceleration: "saved" is 1 - longest / total, "speedup" is total / longest - 1 (the README).
      counted: "calls" counts tokens that were drawn, in parallel where calls were; "response" reads
        blocks in the text after the prompt, "prompt_and_response" in all of it (the reference,
        where a long prompt makes the ratio small).
      overlong: what happens to rollouts that a limit cut off: "keep" grades them like others,
        "filter" leaves their tokens out of the loss, `SoftOverlong` makes length cost before.
      group_length: a penalty on length within groups; None for none.
    """

    correct: float = 1.0
    incorrect: float = -1.0
    acceleration_factor: float = 0.5
    acceleration_clip: float = 0.2
    acceleration: Literal["saved", "speedup"] = "saved"
    counted: Literal["calls", "response", "prompt_and_response"] = "calls"
    overlong: SoftOverlong | Literal["keep", "filter"] = "keep"
    group_length: GroupLength | None = None

    def check(self) -> None:
        """Refuses rewards that have no order."""
        if not self.correct > self.incorrect:
            raise ValueError(
                f"Reward.correct = {self.correct}: want more than Reward.incorrect = "
                f"{self.incorrect}."
            )
        require(self, "acceleration_factor", "acceleration_clip", least=0)


class Parts(NamedTuple):
    """What a rollout earned, part by part."""

    is_correct: bool
    correctness: float
    acceleration: float
    overlong: float  # 0 or less
    is_trained: bool  # False where the rollout's tokens are to be left out of the loss
    cost: Cost  # of the calls that were made
    text: Cost | None  # of the text, where `Reward.counted` reads it

    @property
    def counted(self) -> Cost:
        """What acceleration and the penalty on length are computed from."""
        return self.cost if self.text is None else self.text

    @property
    def total(self) -> float:
        """The sum, before any penalty of the group."""
        return self.correctness + self.acceleration + self.overlong

    def told(self, reward: float) -> dict[str, Any]:
        """The parts and the reward made of them as JSON, where null is what is not finite."""
        numbers = {
            "correctness": self.correctness,
            "acceleration": self.acceleration,
            "overlong": self.overlong,
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
    trajectory: Trajectory, is_correct: bool, cfg: Reward, *, tags: Tags | None = None
) -> Parts:
    """Rewards one rollout.

    correctness = correct or incorrect
    acceleration = acceleration_factor * min(1 - longest / total, acceleration_clip), if correct
    Source: ThreadWeaver (arXiv:2512.07843), P-GRPO's reward; clip and factor from its scripts.

    Args:
      trajectory: the rollout.
      is_correct: the grader's word; what was not finished in time is not correct.
      cfg: `Reward`.
      tags: ids of the tags, for the readings that look at the text.

    Raises:
      ValueError: the text is to be read and there are no tags.
    """
    cost, text = cost_from_calls(trajectory), _text(trajectory, cfg, tags)
    counted = cost if text is None else text
    saved = counted.acceleration if cfg.acceleration == "saved" else _speedup(counted)
    earned = cfg.acceleration_factor * min(saved, cfg.acceleration_clip) if is_correct else 0.0
    overlong = 0.0
    if isinstance(cfg.overlong, SoftOverlong):
        soft = cfg.overlong
        length = len(trajectory.ids) - trajectory.prompt_tokens
        excess = (length - (soft.limit_tokens - soft.buffer_tokens)) / soft.buffer_tokens
        overlong = -soft.weight * min(max(excess, 0.0), 1.0)
    return Parts(
        is_correct=is_correct,
        correctness=cfg.correct if is_correct else cfg.incorrect,
        acceleration=earned,
        overlong=overlong,
        is_trained=not (cfg.overlong == "filter" and trajectory.finish in CUT),
        cost=cost,
        text=text,
    )


def leave_out_long(
    parts: Sequence[Parts], made: Sequence[Trajectory], max_tokens: int
) -> list[Parts]:
    """Keeps the rewards of rollouts whose tries are longer than a row, and does not train them."""
    return [
        one._replace(is_trained=one.is_trained and len(trajectory_trie(trajectory)) <= max_tokens)
        for one, trajectory in zip(parts, made, strict=True)
    ]


def refuse_short_rows(step: int, made: Sequence[Trajectory], max_tokens: int) -> None:
    """Refuses a step whose rollouts are all longer than a row.

    Args:
      step: number of the step, for the message.
      made: its rollouts.
      max_tokens: length of a row.

    Raises:
      ValueError: every trie has more nodes than a row has tokens.
    """
    shortest = min(map(len, map(trajectory_trie, made)))
    if shortest > max_tokens:
        raise ValueError(
            f"Step {step}: every rollout is longer than a row, the shortest has {shortest} nodes; "
            f"want at most {max_tokens}. Set Packing.row_tokens higher or ForkJoin.max_new lower."
        )


def totals(groups: Sequence[Sequence[Parts]], cfg: Reward) -> np.ndarray:
    """The rewards that advantages are made of, penalties of the group included.

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
    """What length costs in groups that are mostly right; wrong rollouts pay it too.

    penalty[p, k] = alpha[p] * clip((length[p, k] - shortest[p]) / window, 0, 1)
    alpha[p] = strength * (share[p] - threshold + eps) / (1 - threshold + eps), 0 below threshold
    with share[p] of right answers and shortest[p] the least length of one; 0 where none is right.
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
    # The mean of a share as 4/5 may lie a rounding below 0.8.
    alpha = np.where(above > -1e-9, alpha, 0.0)
    far = np.iinfo(np.int64).max // 2  # no excess where none is right
    shortest = np.where(is_correct, length, far).min(axis=1, keepdims=True)
    return alpha[:, None] * np.clip((length - shortest) / cfg.window_tokens, 0, 1)


def are_finite(reward: np.ndarray) -> np.ndarray:
    """Groups whose rewards are all finite numbers, [P, K] -> [P] bool: count and drop the others.

    Rewards of this file always are; a task's own may be not a number, which as an advantage would
    spoil every parameter.
    """
    return np.asarray(np.isfinite(reward).all(axis=1))


def trains(groups: Sequence[Sequence[Parts]]) -> np.ndarray:
    """Groups of which anything is left to train, [P] bool."""
    return np.array([any(one.is_trained for one in group) for group in groups], bool)


def summary(groups: Sequence[Sequence[Parts]], reward: np.ndarray) -> dict[str, float]:
    """What a step's rollouts were like: means over all of them, of what is finite.

    Args:
      groups: P prompts with K rollouts each, those without signal included.
      reward: [P, K], the `totals`.

    Returns:
      Numbers by name; reward_std is the mean of the groups' deviations. Tokens and their ratio are
      those of the calls. Where `Reward.counted` reads the text, that reading has names of its own,
      which begin with text_.
    """
    flat = [one for group in groups for one in group]
    finite = reward[are_finite(reward)]

    def mean(numbers: Iterable[float]) -> float:
        found = np.array([number for number in numbers if np.isfinite(number)])
        return float(found.mean()) if found.size else 0.0

    def tokens(costs: Sequence[Cost]) -> dict[str, float]:
        longest, total = mean(one.longest for one in costs), mean(one.total for one in costs)
        ratio = longest / total if total else 1.0  # as of an evaluation
        return {"longest_tokens": longest, "total_tokens": total, "latency_ratio": ratio}

    texts = [one.text for one in flat if one.text is not None]
    return {
        "reward": mean(finite.ravel()),
        "reward_std": mean(finite.std(axis=1)),
        "correct": mean(one.is_correct for one in flat),
        "reward_correctness": mean(one.correctness for one in flat),
        "reward_acceleration": mean(one.acceleration for one in flat),
        "reward_overlong": mean(one.overlong for one in flat),
        **tokens([one.cost for one in flat]),
        **({f"text_{name}": x for name, x in tokens(texts).items()} if texts else {}),
        "longest_tokens_max": float(max(one.cost.longest for one in flat)),
        "blocks": mean(one.cost.blocks for one in flat),
    }


def _text(trajectory: Trajectory, cfg: Reward, tags: Tags | None) -> Cost | None:
    """What the text says, where the reward reads it."""
    if cfg.counted == "calls":
        return None
    if tags is None:
        raise ValueError(
            f"Reward.counted = {cfg.counted!r} reads the text: want the ids of its tags. Give "
            "tags_of(tokenizer), or set Reward.counted to 'calls'."
        )
    first = trajectory.prompt_tokens if cfg.counted == "response" else 0
    return cost_from_ids(trajectory.ids[first:], tags)


def _speedup(cost: Cost) -> float:
    return cost.total / cost.longest - 1 if cost.longest else 0.0
