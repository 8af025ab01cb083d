"""`tw evaluate`: samples held-out problems, grades them, and reports accuracy and latency.

Wall clock is the decoding time of the same trajectories as threads and as one lane, after a round
that compiles, in turn, one request at a time. With `--hosts` this is one process of a job. Each
process grades a share of the rollouts, and process 0 writes and prints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tw_jax import files, hosts, strict_json, workdir
from tw_jax.bounds import counted, require, require_text
from tw_jax.config import configurable
from tw_jax.data.problems import content_hash
from tw_jax.data.records import Problem, Rollout
from tw_jax.data.stored import trajectory_of
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.cost import Cost, Tags, cost_from_calls, cost_from_ids, tags_of
from tw_jax.rollouts import samples
from tw_jax.rollouts.evaluate import summarise
from tw_jax.rollouts.judge import judge
from tw_jax.rollouts.samples import Sample
from tw_jax.rollouts.wall_clock import wall_clock
from tw_jax.tasks.grader import GraderPool
from tw_jax.tasks.task import Task, check_problems
from tw_jax.tokenizer.load import load_tokenizer

MANY_HOSTS = True
"""`tw evaluate --hosts` is one process of many."""


@configurable
class Evaluate:
    """Sampling, grading and a report.

    Attributes:
      workdir: Folder of `summary.json` and `graded.jsonl`.
      sample: The rollouts to sample. Finished rollouts of an earlier attempt are used again.
      grader: The task that grades responses.
      prompt_in_text: Whether metrics that are read from the text count prompt tokens, as in the
        reference.
      timed: Number of trajectories whose decoding is timed; 0 disables wall clock.
      training: Folder of the training run. Its packing is quoted in the summary; None for none.
      before: Folder of an evaluation of the same problems to compare with. Its summary is quoted as
        "before"; None for none.
    """

    workdir: str
    sample: Sample
    grader: Task
    prompt_in_text: bool = False
    timed: int = 8
    training: str | None = None
    before: str | None = None

    def check(self) -> None:
        """Refuses empty paths, and a negative number of timed rollouts."""
        require_text(self, "workdir", "training", "before")
        require(self, "timed", least=0)


def run(cfg: Evaluate) -> None:
    """Samples, grades, times, prints a table and writes `summary.json`."""
    began = time.monotonic()
    tokenizer = load_tokenizer(cfg.sample.tokenizer)
    problems = samples.read_problems(cfg.sample, tokenizer)
    check_problems(cfg.grader, filter(cfg.grader.can_grade, problems))
    quoted = hosts.together(lambda: _quoted(cfg, problems), ValueError, OSError)
    source = samples.load(cfg.sample)
    rollouts, _ = samples.sample(cfg.sample, source, problems)
    trajectories = [trajectory_of(source.generate.sampler.protocol, one) for one in rollouts]
    by_id = samples.by_rollout(cfg.sample, problems)
    with GraderPool(cfg.grader) as pool:
        verdicts = judge(pool, [(by_id[rollout.id], rollout.text) for rollout in rollouts])
    tags = tags_of(tokenizer)
    text_costs = [cost_of_text(made, tags, with_prompt=cfg.prompt_in_text) for made in trajectories]
    texts = [rollout.text for rollout in rollouts]
    summary = summarise(texts, trajectories, verdicts, text_costs, samples=cfg.sample.samples)
    summary["temperature"] = cfg.sample.sampler.temperature
    summary["problems_hash"] = content_hash(*problems)
    timed = [made for made in trajectories if len(made.ids) > made.prompt_tokens][: cfg.timed]
    if timed:
        summary |= wall_clock(source.generate, source.params, timed)
    summary |= quoted
    summary["evaluate_seconds"] = time.monotonic() - began
    summary["seconds"] = summary.get("train_seconds", 0.0) + summary["evaluate_seconds"]
    if hosts.is_first():
        graded = _graded(rollouts, trajectories, verdicts, text_costs)
        _write(Path(cfg.workdir), summary, graded)
        workdir.record(cfg)
        _print(summary)


def cost_of_text(trajectory: Trajectory, tags: Tags, *, with_prompt: bool) -> Cost:
    """The cost of a trajectory, read from its text."""
    return cost_from_ids(trajectory.ids[0 if with_prompt else trajectory.prompt_tokens :], tags)


def _graded(
    rollouts: Sequence[Rollout],
    trajectories: Sequence[Trajectory],
    verdicts: Sequence[str],
    text_costs: Sequence[Cost],
) -> list[dict[str, Any]]:
    """The lines of `graded.jsonl`."""
    costs = map(cost_from_calls, trajectories)
    return [
        {
            "id": rollout.id,
            "verdict": verdict,
            "answer": rollout.answer,
            "longest": cost.longest,
            "total": cost.total,
            "text_longest": text_cost.longest,
            "text_total": text_cost.total,
            "finish": made.finish,
            "calls": [[list(c.path), len(c.sampled), c.stop_reason.value] for c in made.calls],
            "text": rollout.text,
        }
        for rollout, made, verdict, cost, text_cost in zip(
            rollouts, trajectories, verdicts, costs, text_costs, strict=True
        )
    ]


def _write(folder: Path, summary: dict[str, Any], graded: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "graded.jsonl", "".join(json.dumps(line) + "\n" for line in graded))
    files.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def _quoted(cfg: Evaluate, problems: list[Problem]) -> dict[str, Any]:
    """The entries of the summary from a training run and from an earlier evaluation."""
    quoted: dict[str, Any] = {}
    if cfg.before is not None:
        quoted["before"] = _summary_of(cfg.before, problems)
    if cfg.training is not None:
        path = Path(cfg.training) / "packing.json"
        field = f"Evaluate.training = {cfg.training!r}"
        quoted |= _read(path, field, "Finish that training run first")
    return quoted


def _summary_of(folder: str, problems: list[Problem]) -> dict[str, Any]:
    """The summary of an earlier evaluation of these problems.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it was an evaluation of other problems.
    """
    path = Path(folder) / "summary.json"
    summary = _read(path, f"Evaluate.before = {folder!r}", "Run that evaluation first")
    if summary.get("problems_hash") != content_hash(*problems):
        raise ValueError(
            f"{path} is an evaluation of other problems: it has {summary.get('problems')} with the "
            f"hash {summary.get('problems_hash')}, and this one has {len(problems)} with the hash "
            f"{content_hash(*problems)}. Evaluate both on one file, or leave Evaluate.before out."
        )
    return summary


def _read(path: Path, field: str, first: str) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file, and {field} names it. {first}, or leave "
            f"{field.partition(' =')[0]} out."
        )
    try:
        return dict(strict_json.parse(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged. {first}, to write it again.") from None


def _print(summary: dict[str, Any]) -> None:
    columns = [summary] if "before" not in summary else [summary["before"], summary]
    without = summary["without_answer"]
    note = f" ({without} without an answer, left out of exact match)" if without else ""
    problems = counted(summary["problems"], "problem")
    print(f"{problems}, {counted(summary['samples'], 'sample')} each{note}:")
    if len(columns) > 1:
        print(f"  {'':32}{'before':24}after")
    for name, label, spec in (
        ("exact_match", "exact match", ".3f"),
        ("format_correct", "format correct", ".3f"),
        ("total_tokens", "total tokens", ".1f"),
        ("longest_tokens", "longest path", ".1f"),
        ("latency_ratio", "longest / total", ".3f"),
        ("threads_per_block", "threads per block", ".2f"),
        ("wall_ratio", "wall clock, threads / one lane", ".3f"),
        ("rows_filled", "rows filled in training", ".3f"),
        ("token_sharing", "tokens saved by sharing", ".3f"),
    ):
        if name in summary:
            shown = "".join(f"{_shown(column, name, spec):24}" for column in columns)
            print(f"  {label:32}{shown}".rstrip())


def _shown(summary: dict[str, Any], name: str, spec: str) -> str:
    value = "-" if summary.get(name) is None else f"{summary[name]:{spec}}"
    low_high = summary.get(f"{name}_interval")
    return value if low_high is None else f"{value} [{', '.join(f'{x:{spec}}' for x in low_high)}]"
