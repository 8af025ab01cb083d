"""The metrics of an evaluation: accuracy, latency and format, with intervals over problems.

`tw evaluate` and the evaluation during training compute them by the same functions. Token latency
is the length of the longest chain of calls (`cost_from_calls`), as in the reward. Metrics that are
read from the text instead (`cost_from_ids`), as in the release, have names that begin with text_.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tw_jax.bounds import require, require_temperature, require_text
from tw_jax.config import configurable
from tw_jax.contracts import Params
from tw_jax.data.prompts import Problems
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.cost import Cost, cost_from_calls
from tw_jax.forkjoin.threadweaver import grammar
from tw_jax.rollouts import score
from tw_jax.rollouts.generate import Generator
from tw_jax.rollouts.judge import judge_groups
from tw_jax.tasks.grader import GraderPool


@configurable
class Evaluation:
    """Held-out problems that are sampled during training.

    Attributes:
      problems: A file of problems or examples.
      count: Number of problems, from the start of the file.
      samples: Rollouts of each problem. If there are several, pass@k is reported for powers of two.
      every: Steps between evaluations. There is also one before the first step and one after the
        last.
      temperature: Sampling temperature of these rollouts.
    """

    problems: str
    count: int = 200
    samples: int = 1
    every: int = 10
    temperature: float = 0.0

    def check(self) -> None:
        """Refuses empty evaluations, and samples that would all be the same."""
        require_text(self, "problems")
        require(self, "count", "samples", "every", least=1)
        require_temperature(self)
        if self.samples > 1 and self.temperature <= 0:
            raise ValueError(
                f"Evaluation.samples = {self.samples} at Evaluation.temperature = "
                f"{self.temperature} would draw the same text each time. Set a temperature above "
                "0, or Evaluation.samples = 1."
            )


def evaluate_held_out(
    cfg: Evaluation, generate: Generator, params: Params, problems: Problems, pool: GraderPool
) -> dict[str, float]:
    """Samples held-out problems with the current parameters and grades them.

    Args:
      cfg: Number of samples and temperature.
      generate: Samples rollouts. The seeds begin with that of its config.
      params: Parameters of the network.
      problems: The problems of `cfg`; each has an answer.
      pool: Grades the rollouts.

    Returns:
      Metrics: `eval_correct` with its 95 % interval, `eval_pass_at_k`, token latency, and the
      number of problems that were left out because they have no answer.
    """
    asked, seed = list(problems), generate.sampler.cfg.seed
    groups = generate(
        params,
        asked,
        [[f"{problem.id}/{k}" for k in range(cfg.samples)] for problem in asked],
        seeds=range(seed, seed + len(asked) * cfg.samples),
        temperature=cfg.temperature,
    )
    verdicts = [verdict for group in judge_groups(pool, groups) for verdict in group]
    found = accuracy(verdicts, cfg.samples)
    low, high = found["exact_match_interval"]
    costs = [cost_from_calls(made) for group in groups for made in group.trajectories]
    spent = latency(costs, cfg.samples)
    names = ("longest_tokens", "total_tokens", "latency_ratio")
    return {
        "eval_without_answer": problems.without_answer,
        "eval_correct": found["exact_match"],
        "eval_correct_low": low,
        "eval_correct_high": high,
        **{f"eval_{name}": x for name, x in found.items() if name.startswith("pass_at_")},
        **{f"eval_{name}": spent[name] for name in names},
    }


def summarise(
    texts: Sequence[str],
    trajectories: Sequence[Trajectory],
    verdicts: Sequence[str],
    text_costs: Sequence[Cost],
    *,
    samples: int,
) -> dict[str, Any]:
    """Accuracy, format and token latency of rollouts, with 95 % intervals over problems.

    Args:
      texts: The text after each prompt; rollouts of one problem are adjacent.
      trajectories: The rollouts.
      verdicts: Verdicts on their answers.
      text_costs: The cost of each rollout, read from its text.
      samples: Rollouts of each problem.
    """
    reports = [grammar.well_formed(text) for text in texts]
    well = np.array([report.trajectory_well_formed for report in reports])
    return {
        "problems": len(texts) // samples,
        "samples": samples,
        **accuracy(verdicts, samples),
        "verdicts": dict(Counter(map(str, verdicts))),
        "format_correct": float(well.mean()),
        "format_reasons": grammar.histogram(reports),
        "has_block": float(np.mean([report.has_block for report in reports])),
        "blocks_well_formed": sum(report.blocks_well_formed for report in reports)
        / max(sum(report.blocks for report in reports), 1),
        **latency([cost_from_calls(made) for made in trajectories], samples),
        **{f"text_{name}": value for name, value in latency(text_costs, samples).items()},
        "finish": dict(Counter(made.finish for made in trajectories)),
        "events": dict(sum((Counter(made.counts) for made in trajectories), Counter())),
    }


def latency(costs: Sequence[Cost], samples: int) -> dict[str, Any]:
    """Means of token counts with a 95 % interval, their ratio, and the shape of the blocks.

    Args:
      costs: Costs of all rollouts, all counted in the same way; those of one problem are adjacent.
      samples: Rollouts of each problem.
    """
    # Intervals are over problems, because samples of one problem are not independent.
    longest, total = (
        score.bootstrap(np.array(values, float).reshape(-1, samples).mean(axis=1))
        for values in ([c.longest for c in costs], [c.total for c in costs])
    )
    return {
        "longest_tokens": longest.value,
        "longest_tokens_interval": [longest.low, longest.high],
        "total_tokens": total.value,
        "latency_ratio": longest.value / total.value if total.value else 1.0,
        "parallel_ratio": float(np.mean([c.parallel_ratio for c in costs])),
        "threads_per_block": sum(c.threads for c in costs) / max(sum(c.blocks for c in costs), 1),
    }


def accuracy(verdicts: Sequence[str], samples: int) -> dict[str, Any]:
    """Accuracy over the problems that have an answer; the others are counted separately.

    Args:
      verdicts: Verdicts on all rollouts; those of one problem are adjacent.
      samples: Rollouts of each problem.

    Returns:
      `exact_match` and its interval, None if no problem has an answer; `pass_at_k` for powers of
      two; and `without_answer`, the number of problems without an answer.
    """
    table = np.array(verdicts).reshape(-1, samples)
    has_truth = table[:, 0] != "unknown"
    numbers: dict[str, Any] = {"without_answer": int((~has_truth).sum())}
    if not has_truth.any():
        return numbers | {"exact_match": None, "exact_match_interval": None}
    correct = table[has_truth] == "correct"
    share = score.wilson(float(score.mean_at_n(correct).mean()), len(correct))
    return {
        **numbers,
        "exact_match": share.value,
        "exact_match_interval": [share.low, share.high],
        **score.passes(correct),
    }
