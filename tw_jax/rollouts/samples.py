"""Samples rollouts for a file of problems and stores them, for `tw sample` and `tw evaluate`.

Finished rollouts are appended to the file at once, so an interrupted program samples only the
missing ones when it runs again.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

from tw_jax import hosts, sharding
from tw_jax.bounds import require, require_text
from tw_jax.checkpoint import identity
from tw_jax.config import configurable, operative
from tw_jax.contracts import Params
from tw_jax.data.problems import content_hash
from tw_jax.data.prompts import Problems
from tw_jax.data.records import Problem, Rollout
from tw_jax.data.stored import fingerprint
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.metrics import progress
from tw_jax.models.load import LanguageModel, load_model
from tw_jax.models.transformer import Model
from tw_jax.rollouts.generate import Generator, make_generator
from tw_jax.rollouts.store import kept_samples
from tw_jax.sample.sampler import Sampler, prompt_limits
from tw_jax.sharding import Mesh, Rules
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.interface import Tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece


@configurable
class Sample:
    """Rollouts for a set of problems.

    Attributes:
      workdir: Folder of `rollouts.jsonl`.
      checkpoint: Folder of a training run's checkpoints. The newest is read. Model,
        tokenizer, chat and limits that the config does not set are those of this checkpoint.
      model: The model that was trained.
      tokenizer: The tokenizer that it was trained with.
      chat: The chat template.
      forkjoin: Limits and policies of fork and join.
      sampler: Rows, temperature and seed.
      problems: A file of problems or examples.
      count: Number of problems, from the start of the file; None for all.
      samples: Rollouts per problem.
      mesh: Devices over which the parameters and the rows are split.
      rules: Which logical axis is split over which axis of the mesh.
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
    mesh: Mesh = Mesh()
    rules: Rules = Rules()

    inherits: ClassVar[str] = "checkpoint"

    def check(self) -> None:
        """Refuses empty runs, and samples that would all be the same."""
        require_text(self, "workdir", "checkpoint", "problems")
        require(self, "samples", "count", least=1)
        if self.samples > 1 and self.sampler.temperature == 0:
            raise ValueError(
                f"Sample.samples = {self.samples} at Sampler.temperature = 0.0 would draw the same "
                "text each time. Set a temperature above 0, or Sample.samples = 1."
            )


class Source(NamedTuple):
    """The model from which rollouts are sampled."""

    params: Params
    generate: Generator
    step: int  # of the checkpoint


def load(cfg: Sample) -> Source:
    """Reads the newest checkpoint onto the mesh and builds the sampler.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      ValueError: If the checkpoint does not fit the config, as in `load_model`, or the number of
        devices does not divide `Sampler.rows`.
    """
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_split("Sampler.rows", cfg.sampler.rows, mesh, sharding.sampling(cfg.rules))
    config = LanguageModel(
        model=cfg.model, tokenizer=cfg.tokenizer, chat=cfg.chat, forkjoin=cfg.forkjoin
    )
    loaded = load_model(cfg.checkpoint, mesh=mesh, rules=cfg.rules, config=config)
    generate = make_generator(
        loaded.network,
        loaded.tokenizer,
        chat=loaded.chat,
        protocol=loaded.protocol,
        sampler=cfg.sampler,
        mesh=mesh,
        rules=cfg.rules,
    )
    return Source(loaded.params, generate, loaded.step)


def read_problems(cfg: Sample, tokenizer: Tokenizer) -> list[Problem]:
    """The problems to sample, from a file of problems, examples or rollouts.

    Raises:
      ValueError: If the file has no problem, or two with the same id, if a prompt is empty or too
        long, or if the processes of this job read different files.
    """
    prompt = functools.partial(cfg.chat.prompt, tokenizer)
    limits = prompt_limits(cfg.sampler, cfg.forkjoin)
    found = Problems(cfg.problems, prompt, limits=limits, unanswered="keep", count=cfg.count)
    problems = list(found)
    hosts.agree(problems=fingerprint(cfg.problems), tokenizer=tokenizer.fingerprint)
    found.require_unchanged()
    return problems


def by_rollout(cfg: Sample, problems: list[Problem]) -> dict[str, Problem]:
    """The ids of all rollouts in order, and the problem of each."""
    return {f"{problem.id}/{k}": problem for problem in problems for k in range(cfg.samples)}


def sample(
    cfg: Sample, source: Source, problems: list[Problem]
) -> tuple[list[Rollout], list[Rollout]]:
    """Samples the rollouts that are missing in `rollouts.jsonl`.

    Returns:
      (all rollouts of the problems, in their order; the new ones among them).

    Raises:
      ValueError: If the workdir has rollouts of another model, of other settings or of other
        problems.
    """
    problem_of = by_rollout(cfg, problems)
    names, rows = list(problem_of), cfg.sampler.rows
    new: list[Rollout] = []
    with kept_samples(
        cfg.workdir, problem_of, source=cfg.problems, maker=_provenance(cfg, source)
    ) as (finished, add):
        missing = [n for n, name in enumerate(names) if name not in finished]
        batches = [missing[first : first + rows] for first in range(0, len(missing), rows)]
        for batch in progress(batches, desc="sample"):
            groups = source.generate(
                source.params,
                [problem_of[names[n]] for n in batch],
                [[names[n]] for n in batch],
                # Seeds belong to rollouts, not to the order in which a resumed run samples them.
                seeds=[cfg.sampler.seed + n for n in batch],
                temperature=cfg.sampler.temperature,
                top_p=cfg.sampler.top_p,
                top_k=cfg.sampler.top_k,
            )
            for group in groups:
                extra = {"problem": content_hash(group.problem)}
                fingerprint = source.generate.tokenizer.fingerprint
                new.append(group.record(0, fingerprint=fingerprint, extra=extra))
                add(new[-1])
    found = {**finished, **{rollout.id: rollout for rollout in new}}
    return [rollout for name in names if isinstance(rollout := found[name], Rollout)], new


def _provenance(cfg: Sample, source: Source) -> dict[str, Any]:
    """Everything that rollouts depend on. Rollouts that differ in it must not share a file."""
    return {
        "checkpoint": cfg.checkpoint,
        "step": source.step,
        "model_identity": identity(cfg.checkpoint, step=source.step),
        "tokenizer": source.generate.tokenizer.fingerprint,
        "model": operative(cfg.model),
        "chat": operative(cfg.chat),
        "forkjoin": operative(cfg.forkjoin),
        "temperature": cfg.sampler.temperature,
        "top_p": cfg.sampler.top_p,
        "top_k": cfg.sampler.top_k,
        "seed": cfg.sampler.seed,
    }
