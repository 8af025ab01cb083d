"""`tw sft`: supervised training on packed tries, from records to checkpoints.

The same program trains the sequential baseline (`Data.labels = "sequential"`) and the reference's
flat labels. The same command resumes an interrupted run. With `--hosts` this is one process of a
job: the same command runs on every host, each with its own share of the data.
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
      workdir: Folder of checkpoints, metrics, config and `packing.json`.
      steps: Optimiser steps of the whole run.
      model: The model. Its vocabulary must hold the tokenizer's.
      tokenizer: The tokenizer.
      data: The trajectories, and which of their tokens are trained.
      forkjoin: Limits of the protocol by which trajectories are replayed.
      packing: Tokens of a row, and the policy for long trajectories.
      batch_rows: Rows of the global batch, over all devices, processes and accumulation steps.
      optim: Optimiser and schedule.
      mesh: Devices.
      rules: Which logical axis is split over which axis of the mesh.
      accumulation_steps: Number of parts of a batch, which are run one after another.
      chunk_tokens: Nodes per row that are unembedded at a time.
      save_every: Steps between checkpoints.
      keep: Number of checkpoints to keep.
      seed: Seed of newly initialised parameters.
      init: Folder of checkpoints, such as one of `tw convert`. The run begins with the newest
        parameters; adapters that they lack are initialised. None initialises all parameters.
        Model, tokenizer, chat and limits that the config does not set are those of the checkpoint.
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
                f"Sft.accumulation_steps = {self.accumulation_steps} must be a divisor of "
                f"Sft.batch_rows = {self.batch_rows}. Change one of them."
            )
        if self.model.lora is not None and self.init is None:
            raise ValueError(
                "Model.lora is set and Sft.init is None, but adapters need the weights of a "
                "checkpoint, which they leave unchanged. Set Sft.init, or Model.lora = None to "
                "train from scratch."
            )


def run(cfg: Sft) -> None:
    """Trains until `steps`, beginning with the newest checkpoint of the workdir if there is one."""
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
            size = f"{count:,} parameters" + (f", {moving:,} trained," if moving < count else "")
            devices = counted(mesh.size, "device")
            where = f"{devices} of {counted(jax.process_count(), 'process')}"
            print(f"{folder}: {size} on {where}, step {first} of {cfg.steps}")
            print(standing(who, first=first, steps=cfg.steps), end="")
        if first < cfg.steps:
            workdir.record(cfg)
        model = LanguageModel(
            model=cfg.model, tokenizer=cfg.tokenizer, chat=cfg.data.chat, forkjoin=cfg.forkjoin
        )
        language_model = record_model(checkpoints.directory, model, tokenizer, origin=cfg.init)
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
                note={**who.note, **language_model},
            ) as loop,
        ):
            for _ in loop:
                loop.step(
                    loop.draw(batches, partial(sharding.to_global, mesh=mesh, rules=cfg.rules))
                )
                loop.save_when_due(batches.get_state())
        packed = _of_all_shares(batches, mesh, cfg.rules)
        # A run that was killed after its last checkpoint has not written this file.
        is_due = first < cfg.steps or not (folder / "packing.json").exists()
        if hosts.is_first() and is_due:
            write_packing(folder, *packed, seconds=time.monotonic() - began)


def open_batches(cfg: Sft, mesh: jax.sharding.Mesh, tokenizer: Tokenizer) -> Batches:
    """The packed batches of this process: its share of the records and of the rows.

    Raises:
      ValueError: If the number of shares does not divide the rows of a batch, or the processes of
        this job read different files.
    """
    share, shares = sharding.row_share(mesh, cfg.rules)
    if cfg.batch_rows % shares:
        raise ValueError(
            f"Sft.batch_rows = {cfg.batch_rows} must be a multiple of {shares}, because each of "
            f"{shares} processes packs a share of the rows."
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
    """The packing statistics of all shares, and the number of unusable records in them."""
    share, _ = sharding.row_share(mesh, rules)
    gathered = hosts.gather([share, vars(batches.stats), batches.unusable])
    # Processes with the same rows have packed the same share, which counts once.
    of_share = {share: (PackingStats(**stats), unusable) for share, stats, unusable in gathered}
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
