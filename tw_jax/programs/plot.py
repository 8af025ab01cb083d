"""`tw plot`: draws training curves, token latency, and one rollout in time and as a trie.

This program reads what `tw sft`, `tw pgrpo`, `tw sample` and `tw evaluate` wrote, and writes PNGs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from tw_jax import metrics, strict_json, workdir
from tw_jax.bounds import require, require_text, shown
from tw_jax.config import configurable
from tw_jax.data.pipeline import Builder, Data
from tw_jax.data.records import open_records
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.interface import Tokenizer
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece
from tw_jax.view.plots import latency_figure, loss_figure, policy_figure
from tw_jax.view.style import Figure, save
from tw_jax.view.timeline import timeline_figure
from tw_jax.view.trie_figure import trie_figure


@configurable
class StoredRollout:
    """One trajectory of a file.

    Attributes:
      path: A file of examples or rollouts; None takes the newest `rollouts.jsonl` in `Plot.runs`.
      index: Number of the record in the file, from 0.
      tokenizer: Tokenizer of the file's ids or texts.
      chat: Template that turns a question into a prompt.
      forkjoin: Limits and policies under which a rollout was sampled.
      checkpoint: Folder of the checkpoints that it was sampled from; tokenizer, chat and limits
        that the config leaves open are those of this checkpoint.
    """

    path: str | None = None
    index: int = 0
    tokenizer: Bytes | SentencePiece | HuggingFace
    chat: Chat
    forkjoin: ForkJoin
    checkpoint: str | None = None

    inherits: ClassVar[str] = "checkpoint"

    def check(self) -> None:
        """Refuses an empty path and a negative index."""
        require_text(self, "path", "checkpoint")
        require(self, "index", least=0)


@configurable
class Plot:
    """Pictures of runs.

    Attributes:
      workdir: Folder of the pictures.
      runs: A folder; each `metrics.jsonl` and `graded.jsonl` in it or below it is drawn, under the
        name of its own folder. None draws only the files that are named below.
      metrics: (label, file) of training runs. SFT runs are overlaid in `loss.png`, P-GRPO runs in
        `pgrpo.png`.
      graded: The `graded.jsonl` of an evaluation, drawn as `latency.png`.
      trajectory: The trajectory that `threads.png` shows in time and `trie.png` as a trie.
    """

    workdir: str
    runs: str | None = None
    metrics: tuple[tuple[str, str], ...] = ()
    graded: str | None = None
    trajectory: StoredRollout | None = None

    def check(self) -> None:
        """Refuses a config without pictures, empty names, and equal labels."""
        if not (self.runs or self.metrics or self.graded or self.trajectory):
            raise ValueError(
                "Plot has nothing to draw. Set Plot.runs, metrics, graded or trajectory, for "
                "example Plot.runs = 'runs/demo'."
            )
        require_text(self, "workdir", "runs", "graded")
        if not all(label.strip() and path.strip() for label, path in self.metrics):
            raise ValueError(
                f"Plot.metrics = {shown(self.metrics)} must be pairs of a label and a file, "
                "neither of them empty."
            )
        labels = [label for label, _ in self.metrics]
        if len(set(labels)) < len(labels):
            raise ValueError(f"Plot.metrics has the labels {labels} more than once. Rename one.")
        if self.trajectory is not None and self.trajectory.path is None and self.runs is None:
            raise ValueError(
                "StoredRollout.path = None needs a folder to search. Set Plot.runs, or "
                "StoredRollout.path."
            )


def run(cfg: Plot) -> None:
    """Draws the pictures into the workdir and prints their paths."""
    training = {label: read_training(path) for label, path in cfg.metrics}
    graded = {} if cfg.graded is None else {"latency.png": read_graded(cfg.graded)}
    rollout = None if cfg.trajectory is None else cfg.trajectory.path
    if cfg.runs is not None:
        training = find_training(cfg.runs) | training
        graded = find_graded(cfg.runs) | graded
        rollout = rollout or newest_rollouts(cfg.runs)

    pictures: dict[str, Figure] = {}
    policy = {label for label, lines in training.items() if any("reward" in x for x in lines)}
    if supervised := {label: x for label, x in training.items() if label not in policy}:
        pictures["loss.png"] = loss_figure(supervised)
    if policy:
        pictures["pgrpo.png"] = policy_figure({label: training[label] for label in sorted(policy)})
    pictures |= {name: latency_figure(lines) for name, lines in graded.items()}
    if cfg.trajectory is not None and rollout is not None:
        trajectory, tokenizer = read_trajectory(cfg.trajectory, rollout)
        pictures["threads.png"] = timeline_figure(trajectory, tokenizer.decode)
        pictures["trie.png"] = trie_figure(trajectory, tokenizer.decode)
    if not pictures:
        raise FileNotFoundError(
            f"{cfg.runs}: no metrics.jsonl, graded.jsonl or rollouts.jsonl in this folder. Run "
            "`tw sft` or `tw evaluate` first, or correct Plot.runs."
        )

    folder = Path(cfg.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        save(figure, folder / name, "png")
        print(folder / name)
    workdir.record(cfg)


# Files that are named.

_GRADED = {"verdict": str, "longest": int, "total": int}
"""Fields of a line of `graded.jsonl` that the picture of latency needs, and their types."""


def read_training(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics file that have a loss."""
    _require_file(path, "Training writes it: run `tw sft` first")
    lines = [line for line in metrics.read(path) if "loss" in line]
    if not lines:
        raise ValueError(f"{path}: no line has a loss. Name the metrics.jsonl of a training run.")
    return lines


def read_graded(path: str) -> list[dict[str, Any]]:
    """The lines of a graded file, each with the fields of `_GRADED`."""
    _require_file(path, "Evaluation writes it: run `tw evaluate` first")
    lines = []
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = strict_json.parse(text)
            faults = [f"no {n}" for n, kind in _GRADED.items() if type(line.get(n)) is not kind]
        except (ValueError, AttributeError):
            faults = ["no JSON object"]
        if faults:
            raise ValueError(
                f"{path}:{number}: {', '.join(faults)} ({text[:60]}). Write the file again with "
                "`tw evaluate`."
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: the file is empty. Write it again with `tw evaluate`.")
    return lines


def read_trajectory(cfg: StoredRollout, path: str) -> tuple[Trajectory, Tokenizer]:
    """One record of a file, replayed or rebuilt as a trajectory."""
    _require_file(path, "`tw make` writes examples, `tw sample` and `tw evaluate` rollouts")
    records = open_records(path)
    if not 0 <= cfg.index < len(records):
        raise ValueError(
            f"StoredRollout.index = {cfg.index} must be at least 0 and less than {len(records)}, "
            f"the number of records in {path}."
        )
    tokenizer = load_tokenizer(cfg.tokenizer)
    protocol = ThreadWeaver(make_table(tokenizer), cfg.forkjoin)
    builder = Builder(Data(path=path, chat=cfg.chat), tokenizer, protocol)
    return builder.trajectory(records[cfg.index], records.where(cfg.index)), tokenizer


def _require_file(path: str, writer: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file. {writer}, or correct the path.")


# Files that a folder has.


def find_training(folder: str) -> dict[str, list[dict[str, Any]]]:
    """By run, the lines with a loss of every `metrics.jsonl`; a run without any is left out."""
    found = {}
    for path in _files(folder, "metrics.jsonl"):
        lines = [line for line in metrics.read(path) if "loss" in line]
        if lines:
            found[_run_name(folder, path)] = lines
    return found


def find_graded(folder: str) -> dict[str, list[dict[str, Any]]]:
    """By name of the picture, the lines of every `graded.jsonl`."""
    return {
        f"latency_{_run_name(folder, path).replace('/', '_')}.png"
        if path.parent != Path(folder)
        else "latency.png": read_graded(str(path))
        for path in _files(folder, "graded.jsonl")
    }


def newest_rollouts(folder: str) -> str | None:
    """The `rollouts.jsonl` that was written last, if there is one."""
    paths = _files(folder, "rollouts.jsonl")
    return str(max(paths, key=lambda path: path.stat().st_mtime)) if paths else None


def _files(folder: str, name: str) -> list[Path]:
    return sorted(Path(folder).rglob(name))


def _run_name(folder: str, path: Path) -> str:
    """The folder of a file relative to the searched folder, or the name of the latter itself."""
    relative = path.parent.relative_to(folder).as_posix()
    return Path(folder).resolve().name if relative == "." else relative
