"""`tw evaluate`: sample held-out problems, grade them, and report accuracy and latency together.

Token latency is the longest chain of the calls that were made (`cost_from_calls`), as in the
reward. What the text looks like (`cost_from_ids`, the release's reading) is reported beside it,
under names that begin with text_. Wall clock is the decoding time of the same trajectories as
threads and as one lane, warm, interleaved, one request at a time. Every mean comes with its
interval and the number of problems.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax import files, strict_json, workdir
from tw_jax.bounds import require, require_text
from tw_jax.config import configurable
from tw_jax.data import records
from tw_jax.data.problems import content_hash, has_answer
from tw_jax.data.stored import trajectory_of
from tw_jax.forkjoin import cost, grammar
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.threadweaver import ThreadWeaver
from tw_jax.programs import sample
from tw_jax.programs.sample import Loaded, Sample
from tw_jax.sample import sampler as samplers
from tw_jax.tasks import score
from tw_jax.tasks.grader import Grader, GraderPool, check_truths
from tw_jax.tokenizer.interface import Tokenizer
from tw_jax.tokenizer.load import load_tokenizer

_UNKNOWN = "unknown"
"""The verdict where the right answer is not known."""


@configurable
class Evaluate:
    """Sampling, grading and a report.

    Attributes:
      workdir: where `summary.json` and `graded.jsonl` go.
      sample: what to sample; finished rollouts of an earlier attempt are kept.
      grader: how answers are judged.
      prompt_in_text: counts prompt tokens in the numbers that are read from the text, as the
        reference does.
      timed: trajectories whose decoding is timed; 0 leaves wall clock out.
      training: folder of the training run, whose packing is quoted in the summary; None for none.
      before: folder of an evaluation of the same problems to compare with, whose summary is quoted
        as "before"; None for none.
    """

    workdir: str
    sample: Sample
    grader: Grader
    prompt_in_text: bool = False
    timed: int = 8
    training: str | None = None
    before: str | None = None

    def check(self) -> None:
        """Refuses files without a name, and a number of timed rollouts below 0."""
        require_text(self, "workdir", "training", "before")
        require(self, "timed", least=0)


def run(cfg: Evaluate) -> None:
    """Samples, grades, times, prints a table and writes `summary.json`."""
    began = time.monotonic()
    tokenizer = load_tokenizer(cfg.sample.tokenizer)
    asked = sample.problems(cfg.sample, tokenizer)
    check_truths(cfg.grader, ((p.id, p.answer) for p in asked if has_answer(p)))
    before = None if cfg.before is None else _summary_of(cfg.before, asked)
    loaded = sample.load(cfg.sample, tokenizer)
    for _ in sample.rollouts(cfg.sample, loaded, asked):
        pass
    found = _in_order(cfg, asked)
    trajectories = [trajectory_of(loaded.sampler.protocol, rollout) for rollout in found]
    verdicts = grade(cfg.grader, found)
    texts = texts_of(cfg, trajectories, tokenizer)
    summary = summarise(cfg, found, trajectories, verdicts, texts)
    summary["problems_hash"] = content_hash(*asked)
    timed = [t for t in trajectories if len(t.ids) > t.prompt_tokens][: cfg.timed]
    if timed:
        summary |= wall_clock(loaded, timed)
    if cfg.training is not None:
        summary |= _packing_of(cfg.training)
    if before is not None:
        summary["before"] = before
    summary["evaluate_seconds"] = time.monotonic() - began
    summary["seconds"] = summary.get("train_seconds", 0.0) + summary["evaluate_seconds"]
    _write(Path(cfg.workdir), summary, found, trajectories, verdicts, texts)
    workdir.record(cfg)
    _print(summary)


def grade(cfg: Grader, found: list[records.Rollout]) -> list[str]:
    """A verdict for each rollout; "unknown" where the right answer is not known."""
    is_known = list(map(has_answer, found))
    items = [(r.text, r.answer) for r, known in zip(found, is_known, strict=True) if known]
    with GraderPool(cfg) as pool:
        verdicts = iter(pool.grade_all(items))
    return [next(verdicts) if known else _UNKNOWN for known in is_known]


def texts_of(
    cfg: Evaluate, trajectories: list[Trajectory], tokenizer: Tokenizer
) -> list[cost.Cost]:
    """What each trajectory costs by its text, with or without its prompt."""
    tags = cost.tags_of(tokenizer)
    skipped = [0 if cfg.prompt_in_text else t.prompt_tokens for t in trajectories]
    return [cost.cost_from_ids(t.ids[n:], tags) for t, n in zip(trajectories, skipped, strict=True)]


def summarise(
    cfg: Evaluate,
    found: list[records.Rollout],
    trajectories: list[Trajectory],
    verdicts: list[Any],
    texts: list[cost.Cost],
) -> dict[str, Any]:
    """Accuracy, format and token latency with 95 % intervals over problems."""
    reports = [grammar.well_formed(rollout.text) for rollout in found]
    well = np.array([report.trajectory_well_formed for report in reports])
    samples = cfg.sample.samples
    return {
        "problems": len(found) // samples,
        "samples": samples,
        **accuracy(verdicts, samples),
        "verdicts": dict(Counter(map(str, verdicts))),
        "format_correct": float(well.mean()),
        "format_reasons": grammar.histogram(reports),
        "has_block": float(np.mean([report.has_block for report in reports])),
        "blocks_well_formed": sum(report.blocks_well_formed for report in reports)
        / max(sum(report.blocks for report in reports), 1),
        **latency([cost.cost_from_calls(t) for t in trajectories], samples),
        **{f"text_{name}": value for name, value in latency(texts, samples).items()},
        "finish": dict(Counter(t.finish for t in trajectories)),
        "events": dict(sum((Counter(t.counts) for t in trajectories), Counter())),
        "temperature": cfg.sample.sampler.temperature,
    }


def latency(costs: list[cost.Cost], samples: int) -> dict[str, Any]:
    """Means of token counts with a 95 % interval, their ratio, and the shape of the blocks.

    Args:
      costs: of all rollouts, those of one problem side by side, all counted in one way.
      samples: rollouts of each problem.
    """
    # Samples of one problem resemble each other: intervals are over problems.
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


def accuracy(verdicts: list[str], samples: int) -> dict[str, Any]:
    """Accuracy over the problems whose answer is known; the others are counted apart.

    Args:
      verdicts: of all rollouts, those of one problem side by side.
      samples: rollouts of each problem.

    Returns:
      `exact_match` and its interval, None where no answer is known; `pass_at_k` for powers of two;
      `without_answer`, the number of problems whose answer is not known.
    """
    table = np.array(verdicts).reshape(-1, samples)
    is_known = table[:, 0] != _UNKNOWN
    numbers: dict[str, Any] = {"without_answer": int((~is_known).sum())}
    if not is_known.any():
        return numbers | {"exact_match": None, "exact_match_interval": None}
    correct = table[is_known] == "correct"
    share = score.wilson(float(score.mean_at_n(correct).mean()), len(correct))
    return {
        **numbers,
        "exact_match": share.value,
        "exact_match_interval": [share.low, share.high],
        **score.passes(correct),
    }


def wall_clock(loaded: Loaded, trajectories: list[Trajectory], repeats: int = 3) -> dict[str, Any]:
    """Decoding time of the same tokens as threads and as one lane, one request at a time.

    Both ways run the same program with given tokens, so they differ in nothing but the schedule.
    The first round of both compiles and is not counted.

    Args:
      loaded: the model.
      trajectories: what to decode again.
      repeats: counted rounds, threads and one lane in turn.

    Returns:
      `wall_ratio`, threads over one lane, of the medians, and both medians in seconds.
    """
    protocol, network = loaded.sampler.protocol, loaded.sampler.network
    longest = max(len(t.ids) - t.prompt_tokens for t in trajectories)
    one = {"max_new": longest, "parallel": False}
    alone = ThreadWeaver(protocol.table, _with(protocol.limits, **one))
    cfg = _with(loaded.sampler.cfg, rows=1)
    samplers_of = [
        (samplers.make_sampler(network, who, cfg, draw=_given), script)
        for who, script in ((protocol, _script_of_calls), (alone, _script_of_path))
    ]
    times: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for kind, (run_sampler, script) in enumerate(samplers_of):
            spent = 0.0
            for trajectory in trajectories:
                given = script(trajectory, trajectories)
                prompt = trajectory.ids[: trajectory.prompt_tokens]
                begin = time.perf_counter()
                state = run_sampler.decode(loaded.params, [prompt], given)
                jax.block_until_ready(state)
                spent += time.perf_counter() - begin
            if turn:
                times[kind].append(spent)
    threads, lane = map(statistics.median, times)
    return {
        "wall_ratio": threads / lane,
        "wall_threads_seconds": threads,
        "wall_lane_seconds": lane,
    }


def _given(
    logits: jax.Array, sampling: jax.Array, call: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws the token that stands at [row, call, position] of the script."""
    row = jnp.arange(logits.shape[0])[:, None]
    tokens = sampling[
        row, jnp.minimum(call, sampling.shape[1] - 1), jnp.minimum(position, sampling.shape[2] - 1)
    ]
    logp = jax.nn.log_softmax(logits, axis=-1)
    return tokens, jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]


def _script_of_calls(trajectory: Trajectory, among: list[Trajectory]) -> jax.Array:
    """[1, R, N] the ids that each call drew; one shape for all trajectories, to compile once."""
    calls = max(len(t.calls) for t in among)
    length = max(len(call.sampled) for t in among for call in t.calls)
    script = np.zeros((1, calls, length), np.int32)
    for number, call in enumerate(trajectory.calls):
        script[0, number, : len(call.sampled)] = call.sampled
    return jnp.asarray(script)


def _script_of_path(trajectory: Trajectory, among: list[Trajectory]) -> jax.Array:
    """[1, 1, N] the joined path behind the prompt, forced tokens too: one lane draws it all."""
    length = max(len(t.ids) - t.prompt_tokens for t in among)
    script = np.full((1, 1, length), trajectory.ids[-1], np.int32)
    path = trajectory.ids[trajectory.prompt_tokens :]
    script[0, 0, : len(path)] = path
    return jnp.asarray(script)


def _with(cfg: Any, **changes: Any) -> Any:
    return type(cfg)(**{**vars(cfg), **changes})


def _in_order(cfg: Evaluate, asked: list[records.Problem]) -> list[records.Rollout]:
    """The rollouts of this evaluation in the order of its problems, whatever the file holds."""
    by_id = {rollout.id: rollout for rollout in sample.finished(cfg.sample, asked)}
    return [by_id[name] for name in sample.names(cfg.sample, asked)]


def _write(
    folder: Path,
    summary: dict[str, Any],
    found: list[records.Rollout],
    trajectories: list[Trajectory],
    verdicts: list[Any],
    texts: list[cost.Cost],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "id": rollout.id,
                "verdict": str(verdict),
                "answer": rollout.answer,
                "longest": spent.longest,
                "total": spent.total,
                "text_longest": read.longest,
                "text_total": read.total,
                "finish": made.finish,
                "calls": [[list(c.path), len(c.sampled), c.stop_reason.value] for c in made.calls],
                "text": rollout.text,
            }
        )
        for rollout, made, verdict, spent, read in zip(
            found,
            trajectories,
            verdicts,
            map(cost.cost_from_calls, trajectories),
            texts,
            strict=True,
        )
    ]
    files.write_text(folder / "graded.jsonl", "\n".join(lines) + "\n")
    files.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def _summary_of(folder: str, asked: list[records.Problem]) -> dict[str, Any]:
    """The figures of an earlier evaluation of these problems.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it was an evaluation of other problems.
    """
    path = Path(folder) / "summary.json"
    summary = _read(path, f"Evaluate.before = {folder!r}", "Run that evaluation first")
    if summary.get("problems_hash") != content_hash(*asked):
        raise ValueError(
            f"{path} is an evaluation of other problems: it has {summary.get('problems')} with the "
            f"hash {summary.get('problems_hash')}, and this one has {len(asked)} with the hash "
            f"{content_hash(*asked)}. Evaluate both on one file, or leave Evaluate.before out."
        )
    return summary


def _packing_of(folder: str) -> dict[str, Any]:
    """How full the rows of a training run were."""
    path = Path(folder) / "packing.json"
    return _read(path, f"Evaluate.training = {folder!r}", "Finish that training run first")


def _read(path: Path, field: str, first: str) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file, and {field} names it. {first}, or leave "
            f"{field.partition(' =')[0]} out."
        )
    try:
        return dict(strict_json.parse(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged. {first}, so that it is written again.") from None


def _print(summary: dict[str, Any]) -> None:
    columns = [summary] if "before" not in summary else [summary["before"], summary]
    without = summary["without_answer"]
    apart = f" ({without} without a known answer, left out of exact match)" if without else ""
    print(f"{summary['problems']} problems, {summary['samples']} sample(s) each{apart}:")
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
