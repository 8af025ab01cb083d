"""`tw sample`: fork-join rollouts of a trained model, kept by ids.

Finished rollouts are appended as they come, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from tw_jax import files, strict_json, workdir
from tw_jax.bounds import require, require_text
from tw_jax.checkpoint import identity, newest, restore_params
from tw_jax.config import configurable, operative
from tw_jax.contracts import Params
from tw_jax.data import records
from tw_jax.data.problems import content_hash, require_new
from tw_jax.data.prompts import Problems
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.threadweaver import ForkJoin, ThreadWeaver, make_table
from tw_jax.metrics import progress
from tw_jax.models.transformer import Model, network
from tw_jax.sample import sampler as samplers
from tw_jax.sample.draw import sampling_params
from tw_jax.sample.sampler import ForkJoinSampler, Sampler, prompt_limits
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.interface import Tokenizer, check_rows
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece


@configurable
class Sample:
    """Rollouts for a set of problems.

    Attributes:
      workdir: where `rollouts.jsonl` goes.
      checkpoint: folder of a training run's checkpoints; the newest is read.
      model: the model that was trained.
      tokenizer: the tokenizer that it was trained with.
      chat: how a question becomes a prompt.
      forkjoin: limits and policies of fork and join.
      sampler: rows, temperature, seeds.
      problems: a file of problems or examples.
      count: how many of them, from the start of the file; None for all.
      samples: rollouts per problem.
    """

    workdir: str
    checkpoint: str
    model: Model
    tokenizer: Bytes | SentencePiece | HuggingFace
    chat: Chat
    forkjoin: ForkJoin
    sampler: Sampler
    problems: str
    count: int | None = None
    samples: int = 1

    def check(self) -> None:
        """Refuses empty runs, and samples that would all be the same."""
        require_text(self, "workdir", "checkpoint", "problems")
        require(self, "samples", "count", least=1)
        if self.samples > 1 and self.sampler.temperature == 0:
            raise ValueError(
                f"Sample.samples = {self.samples} at Sampler.temperature = 0.0 would draw the same "
                "text each time. Set a temperature above 0, or Sample.samples = 1."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to sample."""

    params: Params
    sampler: ForkJoinSampler
    tokenizer: Tokenizer
    step: int


def load(cfg: Sample, tokenizer: Tokenizer) -> Loaded:
    """Reads the newest checkpoint and builds the sampler.

    Raises:
      ValueError: the model has fewer rows than the tokenizer has ids.
    """
    check_rows(tokenizer, cfg.model.vocab_size)
    net = network(cfg.model, num_ids=tokenizer.vocab_size)
    step = newest(cfg.checkpoint)
    abstract = jax.eval_shape(net.init, jax.random.key(0))
    params = restore_params(cfg.checkpoint, step=step, abstract=abstract)
    protocol = ThreadWeaver(make_table(tokenizer), cfg.forkjoin)
    return Loaded(params, samplers.make_sampler(net, protocol, cfg.sampler), tokenizer, step)


def problems(cfg: Sample, tokenizer: Tokenizer) -> list[records.Problem]:
    """The problems to sample, from a file of problems, examples or rollouts.

    Raises:
      ValueError: the file has no problem, or two of one id; or a prompt is empty or too long.
    """
    prompt = functools.partial(cfg.chat.prompt, tokenizer)
    limits = prompt_limits(cfg.sampler, cfg.forkjoin)
    return list(Problems(cfg.problems, prompt, limits=limits, unanswered="keep", count=cfg.count))


def names(cfg: Sample, asked: list[records.Problem]) -> dict[str, records.Problem]:
    """The ids of all rollouts in order, and the problem of each."""
    return {f"{problem.id}/{k}": problem for problem in asked for k in range(cfg.samples)}


def finished(cfg: Sample, asked: list[records.Problem]) -> Iterator[records.Rollout]:
    """The rollouts of these problems that `rollouts.jsonl` holds, in the order of the file.

    Raises:
      ValueError: a rollout was sampled for another problem of this id, or two have the same id.
    """
    found = records.open_records(Path(cfg.workdir) / "rollouts.jsonl")
    hashes = {problem.id: content_hash(problem) for problem in asked}
    wanted, seen = names(cfg, asked), {}
    for index, record in enumerate(found):
        require_new(seen, record.id, index, found)
        problem = wanted.get(record.id)
        if problem is None:
            continue
        if not (
            isinstance(record, records.Rollout)
            and record.extra.get("problem") == hashes[problem.id]
        ):
            raise ValueError(
                f"{found.where(index)} was not sampled for the problem that now has the id "
                f"{problem.id!r} in {cfg.problems}: the hash of its question, answer and task "
                "differs. Set Sample.workdir to another folder, or delete this one to sample "
                "again."
            )
        yield record


def rollouts(
    cfg: Sample, loaded: Loaded, asked: list[records.Problem]
) -> Iterator[tuple[records.Rollout, Trajectory]]:
    """Rollouts that `rollouts.jsonl` does not hold yet, appended to it as they come.

    Raises:
      ValueError: the workdir holds rollouts of another model, of other settings or of other
        problems.
    """
    path = Path(cfg.workdir) / "rollouts.jsonl"
    _require_same_maker(cfg, loaded)
    wanted = list(names(cfg, asked))
    with records.append(path) as add:
        have = {record.id for record in finished(cfg, asked)}
        missing = [n for n, name in enumerate(wanted) if name not in have]
        # Seeds belong to rollouts, not to the order in which a resumed run makes them.
        sampling = sampling_params(
            max(len(wanted), 1),
            temperature=cfg.sampler.temperature,
            top_p=cfg.sampler.top_p,
            top_k=cfg.sampler.top_k,
            seed=cfg.sampler.seed,
        )
        batches = [
            missing[i : i + cfg.sampler.rows] for i in range(0, len(missing), cfg.sampler.rows)
        ]
        for batch in progress(batches, desc="sample"):
            index = np.array(batch)
            some = jax.tree.map(operator.itemgetter(index), sampling)
            questions = [asked[n // cfg.samples].question for n in batch]
            given = [cfg.chat.prompt(loaded.tokenizer, question) for question in questions]
            for n, made in zip(batch, loaded.sampler(loaded.params, given, some), strict=True):
                problem = asked[n // cfg.samples]
                rollout = records.Rollout.from_trajectory(
                    made,
                    problem,
                    id=wanted[n],
                    fingerprint=loaded.tokenizer.fingerprint,
                    text=loaded.tokenizer.decode(made.ids[made.prompt_tokens :]),
                    extra={"problem": content_hash(problem)},
                )
                add(rollout)
                yield rollout, made


def run(cfg: Sample) -> None:
    """Samples what is missing and says how the rollouts ended."""
    finishes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    tokenizer = load_tokenizer(cfg.tokenizer)
    asked = problems(cfg, tokenizer)
    for _, made in rollouts(cfg, load(cfg, tokenizer), asked):
        finishes[made.finish] += 1
        counts.update(made.counts)
    workdir.record(cfg)
    print(f"{cfg.workdir}/rollouts.jsonl: {sum(finishes.values())} new rollouts")
    print("ended by: " + (_listed(finishes) or "nothing new"))
    if counts:
        print("events: " + _listed(counts))


_TOLD = ("checkpoint", "step")
"""What `made_by.json` says for readers; the parameters themselves are compared."""


def _require_same_maker(cfg: Sample, loaded: Loaded) -> None:
    """Rollouts of two models or settings in one file would be graded as one."""
    sampler = cfg.sampler
    maker = {
        "checkpoint": cfg.checkpoint,
        "step": loaded.step,
        "model_identity": identity(cfg.checkpoint, step=loaded.step),
        "tokenizer": loaded.tokenizer.fingerprint,
        "model": operative(cfg.model),
        "chat": operative(cfg.chat),
        "forkjoin": operative(cfg.forkjoin),
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "top_k": sampler.top_k,
        "seed": sampler.seed,
    }
    path = Path(cfg.workdir) / "made_by.json"
    remedy = "Set Sample.workdir to another folder, or delete this one to sample again."
    made = path.with_name("rollouts.jsonl")
    if not (made.exists() and made.stat().st_size):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(maker, indent=2) + "\n")
        return
    if not path.exists():
        raise ValueError(
            f"{cfg.workdir} holds rollouts and no {path.name}, which would say what they were "
            f"sampled from. {remedy}"
        )
    try:
        before = dict(strict_json.parse(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged. {remedy}") from None
    changed = [n for n, value in maker.items() if n not in _TOLD and before.get(n) != value]
    if changed:
        raise ValueError(
            f"{cfg.workdir} holds rollouts with another {', '.join(changed)}. They were sampled "
            f"from step {before.get('step')} of {before.get('checkpoint')}, and this command reads "
            f"step {loaded.step} of {cfg.checkpoint}. {remedy}"
        )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
