"""`tw sft`: supervised training on packed tries, from records to checkpoints.

The same program trains the sequential baseline (`Data.labels = "sequential"`) and the reference's
flat labels. Run the same command again to go on where a run stopped. With `--hosts` it is one
process of a job: the same command on every host, each with its own share of the data.
"""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax

from tw_jax import files, hosts, sharding, workdir
from tw_jax.bounds import counted, require, require_text
from tw_jax.checkpoint import Checkpoints
from tw_jax.config import configurable
from tw_jax.data.pipeline import Batches, Builder, Data
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.metrics import Metrics
from tw_jax.models.load import LanguageModel, record_model, with_added_rows
from tw_jax.models.transformer import Model, network
from tw_jax.sharding import Mesh, Rules
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.interface import Tokenizer, check_rows
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece
from tw_jax.train.identity import establish, origin_params, standing
from tw_jax.train.loop import TrainingLoop, resume
from tw_jax.train.sft import make_sft_step
from tw_jax.train.state import Optim, abstract_state, initial_state, jit_step, schedule, sizes
from tw_jax.trie.pack import Packing, PackingStats

MANY_HOSTS = True
"""`tw sft --hosts` is one process of many."""


@configurable
class Sft:
    """A supervised run.

    Attributes:
      workdir: checkpoints, metrics, config and `packing.json` go here.
      steps: optimiser steps of the whole run.
      model: the model; its vocabulary holds the tokenizer's.
      tokenizer: text to ids.
      data: which trajectories, and which of their tokens are trained.
      forkjoin: limits of the protocol that the trajectories are replayed through.
      packing: tokens of a row and what happens to long trajectories.
      batch_rows: rows of the global batch, over all devices, processes and accumulation steps.
      optim: optimiser and schedule.
      mesh: devices.
      rules: which logical axis is split over which axis of the mesh.
      accumulation_steps: parts of a batch that are run one after another.
      chunk_tokens: nodes per row that are unembedded at a time.
      save_every: steps between checkpoints.
      keep: checkpoints kept.
      seed: of the fresh parameters.
      init: folder of checkpoints whose newest parameters the run begins with, such as `tw convert`
        writes; fresh ones by default. Adapters that it lacks are fresh. Model, tokenizer, chat and
        limits that the config leaves open are those of this checkpoint.
    """

    workdir: str
    steps: int
    model: Model
    tokenizer: Bytes | SentencePiece | HuggingFace
    data: Data
    forkjoin: ForkJoin
    packing: Packing
    batch_rows: int
    optim: Optim
    mesh: Mesh = Mesh()
    rules: Rules = Rules()
    accumulation_steps: int = 1
    chunk_tokens: int = 1024
    save_every: int = 500
    keep: int = 2
    seed: int = 0
    init: str | None = None

    inherits: ClassVar[str] = "init"

    def check(self) -> None:
        """Refuses sizes that do not fit each other."""
        require_text(self, "workdir", "init")
        counts = ("steps", "batch_rows", "accumulation_steps", "chunk_tokens", "save_every", "keep")
        require(self, *counts, least=1)
        require(self, "seed", least=0)
        if self.batch_rows % self.accumulation_steps:
            raise ValueError(
                f"Sft.accumulation_steps = {self.accumulation_steps}: want a divisor of "
                f"Sft.batch_rows = {self.batch_rows}."
            )
        if self.model.lora is not None and self.init is None:
            raise ValueError(
                "Model.lora is set and Sft.init is None: want a checkpoint, for the weights beside "
                "adapters are frozen. Set Model.lora = None to train from scratch."
            )


def run(cfg: Sft) -> None:
    """Trains to `steps`, or goes on from the newest checkpoint of the workdir."""
    mesh = sharding.make_mesh(cfg.mesh)
    model = with_added_rows(cfg.model, Path(cfg.workdir) / "checkpoints", cfg.init)
    cfg = dataclasses.replace(cfg, model=model)
    tokenizer = load_tokenizer(cfg.tokenizer)
    check_rows(tokenizer, cfg.model.vocab_size)
    batches = open_batches(cfg, mesh, tokenizer)
    net = network(cfg.model, num_ids=tokenizer.vocab_size)
    abstract = abstract_state(net, cfg.optim, mesh=mesh, rules=cfg.rules)
    step = make_sft_step(
        net,
        cfg.optim,
        steps=cfg.steps,
        chunk_tokens=cfg.chunk_tokens,
        accumulation_steps=cfg.accumulation_steps,
    )
    compiled = jit_step(step, abstract, mesh=mesh, rules=cfg.rules)
    folder, began = Path(cfg.workdir), time.monotonic()
    with Checkpoints(folder / "checkpoints", keep=cfg.keep) as checkpoints:
        who = establish(
            cfg,
            checkpoints,
            tokenizer=tokenizer.fingerprint,
            schedule=schedule(cfg.optim, steps=cfg.steps),
        )
        state, position = resume(checkpoints, abstract)
        first = 0
        if state is not None:
            first = int(state.step)
            batches.set_state(position)
        else:
            params = None
            if cfg.init is not None and who.origin is not None:
                params = origin_params(cfg.init, who.origin, abstract.params)
            key = jax.random.key(cfg.seed)
            state = initial_state(
                net, cfg.optim, mesh=mesh, rules=cfg.rules, key=key, params=params
            )
        if hosts.is_first():
            count, moving = sizes(state.params)
            told = f"{count:,} parameters" + (f", {moving:,} trained," if moving < count else "")
            devices = counted(mesh.size, "device")
            where = f"{devices} of {counted(jax.process_count(), 'process')}"
            print(f"{folder}: {told} on {where}, step {first} of {cfg.steps}")
            print(standing(who, first=first, steps=cfg.steps), end="")
        if first < cfg.steps:
            workdir.record(cfg)
        model = LanguageModel(
            model=cfg.model, tokenizer=cfg.tokenizer, chat=cfg.data.chat, forkjoin=cfg.forkjoin
        )
        kept = record_model(checkpoints.directory, model, tokenizer, origin=cfg.init)
        with (
            Metrics(folder, step=first) as metrics,
            sharding.use(mesh, cfg.rules),
            TrainingLoop(
                state,
                compiled,
                steps=cfg.steps,
                save_every=cfg.save_every,
                metrics=metrics,
                checkpoints=checkpoints,
                note={**who.note, **kept},
            ) as loop,
        ):
            for _ in loop:
                loop.step(
                    loop.draw(batches, partial(sharding.to_global, mesh=mesh, rules=cfg.rules))
                )
                loop.save_when_due(batches.get_state())
        packed = _of_all_shares(batches, mesh, cfg.rules)
        # A run that was killed behind its last checkpoint has not written it.
        is_due = first < cfg.steps or not (folder / "packing.json").exists()
        if hosts.is_first() and is_due:
            write_packing(folder, *packed, seconds=time.monotonic() - began)


def open_batches(cfg: Sft, mesh: jax.sharding.Mesh, tokenizer: Tokenizer) -> Batches:
    """The packed batches of this process: its share of the records and of the rows.

    Raises:
      ValueError: the shares do not divide the rows of a batch, or the processes of this job read
        different files.
    """
    share, shares = sharding.row_share(mesh, cfg.rules)
    if cfg.batch_rows % shares:
        raise ValueError(
            f"Sft.batch_rows = {cfg.batch_rows}: want a multiple of {shares}, because "
            f"{shares} processes pack a share of the rows each."
        )
    protocol = ThreadWeaver(make_table(tokenizer), cfg.forkjoin)
    batches = Batches(
        cfg.data,
        cfg.packing,
        Builder(cfg.data, tokenizer, protocol),
        rows=cfg.batch_rows // shares,
        host=share,
        num_hosts=shares,
    )
    hosts.agree(data=batches.fingerprint, tokenizer=tokenizer.fingerprint)
    return batches


def _of_all_shares(
    batches: Batches, mesh: jax.sharding.Mesh, rules: Rules
) -> tuple[PackingStats, int]:
    """How all shares were packed, and the number of unusable records in them."""
    share, _ = sharding.row_share(mesh, rules)
    told = hosts.gather([share, vars(batches.stats), batches.unusable])
    # Processes that hold the same rows have packed the same share.
    of_share = {share: (PackingStats(**stats), unusable) for share, stats, unusable in told}
    all_stats, unusable = zip(*of_share.values(), strict=True)
    total = {
        name: sum(getattr(stats, name) for stats in all_stats) for name in vars(PackingStats())
    }
    return PackingStats(**total), sum(unusable)


def write_packing(folder: Path, stats: PackingStats, unusable: int, *, seconds: float) -> None:
    """Writes `packing.json` and prints how full the rows were and what sharing saved."""
    counts: dict[str, Any] = {
        "rows_filled": stats.rows_filled,
        "token_sharing": stats.token_sharing,
        "trajectories": stats.tries,
        "dropped": stats.dropped,
        "truncated": stats.truncated,
        "unusable": unusable,
        "train_seconds": seconds,
    }
    files.write_text(folder / "packing.json", json.dumps(counts, indent=2) + "\n")
    print(f"rows filled {stats.rows_filled:.3f}, tokens saved by sharing {stats.token_sharing:.3f}")
