"""`tw plot`: pictures of a run: how it learned, what its threads save, and one trajectory's trie.

This file reads what `tw sft`, `tw sample` and `tw evaluate` wrote, and writes PNGs; it draws
nothing itself (`tw_jax/plots.py`) and trains, samples and grades nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tw_jax import metrics, strict_json, workdir
from tw_jax.bounds import require, require_text, shown
from tw_jax.config import configurable
from tw_jax.data.pipeline import Builder, Data
from tw_jax.data.records import open_records
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.threadweaver import ForkJoin, ThreadWeaver, make_table
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece
from tw_jax.view import plots


@configurable
class StoredRollout:
    """One trajectory of a file, and what reads it.

    Attributes:
      path: a file of examples or rollouts.
      index: which record of the file, from 0.
      tokenizer: the tokenizer of the file's ids or texts.
      chat: how a question becomes a prompt.
      forkjoin: limits and policies under which a rollout was sampled.
    """

    path: str
    index: int = 0
    tokenizer: Bytes | SentencePiece | HuggingFace
    chat: Chat
    forkjoin: ForkJoin

    def check(self) -> None:
        """Refuses a file without a name, and a record before the first."""
        require_text(self, "path")
        require(self, "index", least=0)


@configurable
class Plot:
    """Pictures of a run; what is not given is not drawn.

    Attributes:
      workdir: where `loss.png`, `latency.png` and `trie.png` go.
      metrics: (label, file) of each training run, overlaid in `loss.png`.
      graded: the `graded.jsonl` of an evaluation, for `latency.png`; None for none.
      trajectory: the trajectory of `trie.png`; None for none.
    """

    workdir: str
    metrics: tuple[tuple[str, str], ...] = ()
    graded: str | None = None
    trajectory: StoredRollout | None = None

    def check(self) -> None:
        """Refuses nothing to draw, files without a name, and labels that do not tell runs apart."""
        if not (self.metrics or self.graded or self.trajectory):
            raise ValueError(
                "Plot has nothing to draw: want metrics, graded or trajectory. Set Plot.metrics = "
                "(('sft', 'runs/demo/sft/metrics.jsonl'),), for example."
            )
        require_text(self, "workdir", "graded")
        if not all(label.strip() and path.strip() for label, path in self.metrics):
            raise ValueError(
                f"Plot.metrics = {shown(self.metrics)} must be pairs of a label and a file, "
                "neither of them empty."
            )
        labels = [label for label, _ in self.metrics]
        if len(set(labels)) < len(labels):
            raise ValueError(f"Plot.metrics has the labels {labels}: want each once. Rename one.")


def run(cfg: Plot) -> None:
    """Draws what the config names into the workdir."""
    pictures = {}
    if cfg.metrics:
        runs = {label: _metrics(path) for label, path in cfg.metrics}
        pictures["loss.png"] = plots.loss_figure(runs)
    if cfg.graded is not None:
        pictures["latency.png"] = plots.latency_figure(_graded(cfg.graded))
    if cfg.trajectory is not None:
        pictures["trie.png"] = plots.trie_figure(*_drawn(cfg.trajectory))
    folder = Path(cfg.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        plots.save(figure, folder / name, "png")
        print(folder / name)
    workdir.record(cfg)


# What the files hold.

_GRADED = {"verdict": str, "longest": int, "total": int}
"""What `latency.png` needs of a line of `graded.jsonl`."""


def _metrics(path: str) -> list[dict[str, Any]]:
    _require_file(path, "Training writes it: run `tw sft` first")
    lines = [line for line in metrics.read(path) if "loss" in line]
    if not lines:
        raise ValueError(f"{path}: no line has a loss. Name the metrics.jsonl of a training run.")
    return lines


def _graded(path: str) -> list[dict[str, Any]]:
    _require_file(path, "Evaluation writes it: run `tw evaluate` first")
    lines = []
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = strict_json.parse(text)
            fault = [f"no {n}" for n, kind in _GRADED.items() if type(line.get(n)) is not kind]
        except (ValueError, AttributeError):
            fault = ["no JSON object"]
        if fault:
            raise ValueError(
                f"{path}:{number}: {', '.join(fault)} ({text[:60]}). Write the file anew with "
                "`tw evaluate`."
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: the file is empty. Write it anew with `tw evaluate`.")
    return lines


def _drawn(cfg: StoredRollout) -> tuple[Trajectory, Callable[[np.ndarray], str]]:
    _require_file(cfg.path, "`tw make` writes examples, `tw sample` and `tw evaluate` rollouts")
    found = open_records(cfg.path)
    if not 0 <= cfg.index < len(found):
        raise ValueError(
            f"StoredRollout.index = {cfg.index}: want at least 0 and less than {len(found)}, the "
            f"number of records in {cfg.path}."
        )
    tokenizer = load_tokenizer(cfg.tokenizer)
    protocol = ThreadWeaver(make_table(tokenizer), cfg.forkjoin)
    builder = Builder(Data(path=cfg.path, chat=cfg.chat), tokenizer, protocol)
    return builder.trajectory(found[cfg.index], found.where(cfg.index)), tokenizer.decode


def _require_file(path: str, writer: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file. {writer}, or mend the path.")
