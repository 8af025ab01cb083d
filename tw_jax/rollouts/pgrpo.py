"""The config of `tw pgrpo`, and the parts of a run that all steps share, such as the sampler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import jax

from tw_jax import hosts, sharding
from tw_jax.bounds import require, require_text
from tw_jax.config import configurable
from tw_jax.contracts import Network, Params
from tw_jax.data.prompts import Problems
from tw_jax.data.stored import fingerprint
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.models.transformer import Model, network
from tw_jax.rollouts.evaluate import Evaluation
from tw_jax.rollouts.generate import (
    Generator,
    check_sampler_rows,
    check_trainable,
    make_generator,
)
from tw_jax.rollouts.reward import Reward
from tw_jax.sample.sampler import Sampler, prompt_limits
from tw_jax.sharding import Mesh, Rules
from tw_jax.tasks.task import Task, check_problems
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.interface import Tokenizer, check_rows
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece
from tw_jax.train.groups import Aggregation
from tw_jax.train.pgrpo import PolicyLoss, make_logp
from tw_jax.train.reference import Logp, reference_logp
from tw_jax.train.state import Optim
from tw_jax.trie.pack import Packing


@configurable
class Pgrpo:
    """A reinforcement run.

    Attributes:
      workdir: Folder of checkpoints, metrics, config and `rollouts/`.
      steps: Steps of the whole run. Each samples rollouts and takes `inner_steps` updates.
      init: Folder of checkpoints. The run begins with the newest parameters; adapters that they
        lack are initialised. Model, tokenizer, chat and limits that the config does not set are
        those of the checkpoint.
      model: The model. Its vocabulary must hold the tokenizer's.
      tokenizer: The tokenizer.
      chat: The chat template.
      forkjoin: Limits of fork and join.
      problems: A file of problems or examples. They are drawn in random order, which is new in each
        epoch.
      prompts: Number of groups with signal that a step trains on.
      rollouts: K, rollouts of a group.
      max_prompts: Maximum number of prompts that a step draws to find its groups. It draws as many
        at a time as the sampler has rows. Groups whose rewards are all equal have no signal.
      inner_steps: Updates of a step, each on its share of the groups; 1 is on-policy.
      long_prompts: What happens to a problem whose prompt is longer than `Sampler.max_prompt` or
        fills `ForkJoin.max_context`. "refuse" stops at the start and names its line, "drop" leaves
        it out and counts it. Held-out problems are always refused.
      sampler: Rows, temperature and seed. `rollouts` must divide its rows.
      grader: The task that grades responses.
      reward: The reward of a rollout.
      normalise: "mean" centres the rewards of a group; "std" also divides by their deviation.
      loss: Clipping and importance weights.
      aggregation: How tokens are averaged.
      packing: Tokens of a row.
      microbatch_rows: Rows that are run at a time, over all devices. The number of microbatches of
        an update depends on its groups.
      optim: Optimiser and schedule.
      max_mismatch: Largest KL divergence (k3, in nats) from the sampler to the trainer, over the
        tokens of a step. A step with a larger one stops the run.
      evaluation: Held-out problems; None disables evaluation.
      mesh: Devices.
      rules: Which logical axis is split over which axis of the mesh.
      chunk_tokens: Nodes per row that are unembedded at a time.
      save_every: Steps between checkpoints.
      keep: Number of checkpoints to keep.
      seed: Seed of the order of the problems.
    """

    workdir: str
    steps: int
    init: str
    model: Model
    tokenizer: Bytes | SentencePiece | HuggingFace
    chat: Chat
    forkjoin: ForkJoin
    problems: str
    prompts: int
    rollouts: int
    max_prompts: int
    sampler: Sampler
    grader: Task
    reward: Reward
    loss: PolicyLoss
    aggregation: Aggregation
    packing: Packing
    microbatch_rows: int
    optim: Optim
    inner_steps: int = 1
    long_prompts: Literal["refuse", "drop"] = "refuse"
    normalise: Literal["mean", "std"] = "mean"
    max_mismatch: float = 0.01
    evaluation: Evaluation | None = None
    mesh: Mesh = Mesh()
    rules: Rules = Rules()
    chunk_tokens: int = 1024
    save_every: int = 10
    keep: int = 2
    seed: int = 0

    inherits: ClassVar[str] = "init"

    def check(self) -> None:
        """Refuses sizes that do not fit each other, and samplers that cannot be trained on."""
        require_text(self, "workdir", "init", "problems")
        counts = ("steps", "prompts", "max_prompts", "microbatch_rows", "chunk_tokens")
        require(self, *counts, "save_every", "keep", least=1)
        require(self, "rollouts", least=2)  # an advantage is relative to the mean of a group
        require(self, "seed", least=0)
        require(self, "max_mismatch", above=0)  # sampler and trainer round differently
        require(self, "max_prompts", least=self.prompts)
        require(self, "inner_steps", least=1, most=self.prompts)  # each update needs a group
        check_trainable(self.sampler)
        check_sampler_rows(self.sampler.rows, self.rollouts, "Pgrpo.rollouts")
        if self.evaluation is not None:
            check_sampler_rows(self.sampler.rows, self.evaluation.samples, "Evaluation.samples")


class Setup(NamedTuple):
    """The parts of a run that all steps share."""

    network: Network
    tokenizer: Tokenizer
    problems: Problems
    held_out: Problems | None  # those of `Pgrpo.evaluation`
    generate: Generator

    def contents(self, cfg: Pgrpo) -> dict[str, str]:
        """Fingerprints of the files that the config names."""
        found = {"problems": fingerprint(cfg.problems), "tokenizer": self.tokenizer.fingerprint}
        if cfg.evaluation is not None:
            found["held-out problems"] = fingerprint(cfg.evaluation.problems)
        return found


def prepare(cfg: Pgrpo, mesh: jax.sharding.Mesh) -> Setup:
    """Reads tokenizer and problems and builds the network and the sampler; nothing runs yet.

    Raises:
      ValueError: If there is no problem, two have the same id, one has no answer, a prompt is too
        long, or the number of devices does not divide the rows.
    """
    _check_mesh(cfg, mesh)
    tokenizer = load_tokenizer(cfg.tokenizer)
    check_rows(tokenizer, cfg.model.vocab_size)
    net = network(cfg.model, num_ids=tokenizer.vocab_size)
    read = partial(
        Problems,
        prompt=partial(cfg.chat.prompt, tokenizer),
        limits=prompt_limits(cfg.sampler, cfg.forkjoin),
    )
    problems = read(
        cfg.problems,
        unanswered="refuse",
        too_long=cfg.long_prompts,
        option="Pgrpo.long_prompts",
    )
    evaluation = cfg.evaluation
    held_out = evaluation and read(evaluation.problems, count=evaluation.count, unanswered="drop")
    # All processes of a job read the problems, and each of them samples all rollouts.
    for asked in (problems, held_out or ()):
        check_problems(cfg.grader, asked)
    generate = make_generator(
        net,
        tokenizer,
        chat=cfg.chat,
        protocol=ThreadWeaver(make_table(tokenizer), cfg.forkjoin),
        sampler=cfg.sampler,
        mesh=mesh,
        rules=cfg.rules,
    )
    setup = Setup(net, tokenizer, problems, held_out, generate)
    hosts.agree(**setup.contents(cfg))
    for asked in filter(None, (problems, held_out)):
        asked.require_unchanged()
    return setup


def _check_mesh(cfg: Pgrpo, mesh: jax.sharding.Mesh) -> None:
    samples = 1 if cfg.evaluation is None else cfg.evaluation.samples
    sampling = sharding.sampling(cfg.rules)
    for name, rows, rules in (
        ("Pgrpo.microbatch_rows", cfg.microbatch_rows, cfg.rules),
        ("Sampler.rows / Pgrpo.rollouts", cfg.sampler.rows // cfg.rollouts, sampling),
        ("Sampler.rows / Evaluation.samples", cfg.sampler.rows // samples, sampling),
    ):
        sharding.check_split(name, rows, mesh, rules)


def make_reference(
    cfg: Pgrpo, net: Network, began: Callable[[], Params], current: Params
) -> Logp | None:
    """Scores tokens by the initial model of the run; None if the loss has no KL term.

    Args:
      cfg: The run.
      net: The model.
      began: Reads the initial parameters of the run.
      current: The current parameters. Shapes and shardings of adapters are taken from them.
    """
    if not cfg.loss.kl_coef:
        return None
    logp = make_logp(
        net,
        chunk_tokens=cfg.chunk_tokens,
        temperature=cfg.sampler.temperature,
        microbatch_rows=cfg.microbatch_rows * cfg.inner_steps,
    )
    return reference_logp(logp, began(), current)
