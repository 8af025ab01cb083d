"""Pictures: how a run learned, what its threads save, one trajectory's trie, and two frameworks.

The only importer of matplotlib; no display is needed. Each picture is a pure function from records
to a `Figure`. This file reads no files and computes no result; `programs/` hand it what they wrote.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator

from tw_jax.contracts import Span
from tw_jax.forkjoin.calls import Provenance, StopReason, Trajectory
from tw_jax.forkjoin.tries import trajectory_trie
from tw_jax.trie import mask
from tw_jax.trie.tree import Trie

INK, FAINT = "#222222", "#8a8a8a"
GREY, BLUE = "#9a9a9a", "#56b4e9"
"""The prompt and the parent; all tokens and the longest path."""
THREADS = ("#e69f00", "#2fb58f", "#cc79a7", "#f0e442", "#d55e00")
"""Threads in the order of their outlines. All colours are Okabe and Ito's, which colour-blind
readers tell apart; the green is lightened, for boxes carry dark text."""
RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Lines of training runs, darker, for they are thin."""
FULL, PALE = 0.65, 0.2
"""How much of its colour a token keeps that is trained, and one that carries no loss."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a picture is the same everywhere
    "font.size": 9,
    "text.color": INK,
    "text.hinting": "no_hinting",  # or letters move apart, and lines leave their boxes
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "svg.hashsalt": "tw_jax",
}


def save(figure: Figure, file: str | Path | IO[bytes], format: Literal["png", "svg"]) -> None:
    """Writes a figure; the same figure makes the same bytes, for no date is written."""
    metadata = {"Date": None} if format == "svg" else None
    with mpl.rc_context(STYLE):
        figure.savefig(file, format=format, dpi=160, facecolor="white", metadata=metadata)


# Learning.


def loss_figure(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss, and accuracy where it was written, by step; one colour for each run.

    Args:
      runs: for each label the lines of a metrics file: `step`, `loss` (nats), maybe `accuracy`.

    Returns:
      The figure; a long run is its running mean over its pale raw values.
    """
    panels = [
        n for n in ("loss", "accuracy") if any(n in line for r in runs.values() for line in r)
    ]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.7 + 2.5 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for ax, name in zip(axes, panels, strict=True):
            for color, (label, lines) in zip(itertools.cycle(RUNS), runs.items(), strict=False):
                curve = [(line["step"], line[name]) for line in lines if name in line]
                _draw_curve(ax, np.array(curve, float).reshape(-1, 2), color=color, label=label)
        losses = np.array([line["loss"] for lines in runs.values() for line in lines])
        _scale_loss(axes[0], losses[np.isfinite(losses)])
        axes[0].set(title=_loss_title(runs), ylabel="loss (nats per trained token)")
        if len(runs) > 1:
            axes[0].legend()
        if len(panels) > 1:
            axes[1].set_title("Share of the trained tokens that are the model's first choice")
            axes[1].set(ylabel="token accuracy", ylim=(0, 1.03))
        axes[-1].set_xlabel("training step")
    return figure


def _draw_curve(ax: Axes, curve: np.ndarray, *, color: str, label: str) -> None:
    """[n, 2] steps and values; the mean is over a fortieth of the run."""
    curve = curve[np.isfinite(curve[:, 1])]
    steps, values = curve.T
    half = len(curve) // 80
    if half:
        ax.plot(steps, values, color=_mix(color, PALE), linewidth=0.8, zorder=1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(curve))
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(curve))
    mean = (total[high] - total[low]) / (high - low)
    ax.plot(steps, mean, color=color, linewidth=1.8, label=label, zorder=2)


def _scale_loss(ax: Axes, losses: np.ndarray) -> None:
    """A logarithmic axis where the loss spans a factor of ten or more."""
    if not len(losses) or losses.min() <= 0 or losses.max() < 10 * losses.min():
        ax.set_ylim(bottom=min(0, *losses))
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.minorticks_off()


def _loss_title(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    if len(runs) > 1:
        return f"Training loss of {len(runs)} runs"
    (lines,) = runs.values()
    ends = (f"{line['loss']:.3g} at step {line['step']:,}" for line in (lines[0], lines[-1]))
    return f"Training loss: {', '.join(ends)}"


# Latency.


def latency_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Longest path against all tokens of each rollout, correct and wrong ones apart.

    Args:
      lines: those of `graded.jsonl`: `verdict`, and the tokens `longest` and `total`.

    Returns:
      The figure: a panel for the correct rollouts, one for the wrong ones and one for those whose
      answer is not known, as far as there are any.
    """
    longest, total = (np.array([line[n] for line in lines], float) for n in ("longest", "total"))
    verdict = np.array([line["verdict"] for line in lines])
    is_correct, is_unknown = verdict == "correct", verdict == "unknown"
    panels = {
        "Correct": is_correct,
        "Wrong": ~is_correct & ~is_unknown,
        "Answer not known": is_unknown,
    }
    groups = [(name, group) for name, group in panels.items() if group.any()]
    most = max(total.max(), 1)
    width = max(1, round(most / 50))  # whole tokens, or some bars hold more numbers than others
    bins = np.arange(0, most + 2 * width, width).tolist()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.7 + 2.1 * len(groups)), layout="constrained")
        axes = figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
        for ax, (name, group) in zip(axes, groups, strict=True):
            _draw_tokens(ax, total[group], bins, name="all tokens", color=GREY, side="left")
            _draw_tokens(ax, longest[group], bins, name="longest path", color=BLUE, side="right")
            ratio = longest[group].sum() / max(total[group].sum(), 1)
            share = f"{name}: {group.sum()} of {len(lines)} rollouts"
            ax.set_title(f"{share}, longest path {ratio:.2f} of all tokens")
            ax.set(ylabel="rollouts", ylim=(0, ax.dataLim.y1 * 1.4))
            ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.grid(visible=False, axis="x")
        axes[-1].set(xlabel="tokens per rollout", xlim=(0, most * 1.15))
    return figure


def _draw_tokens(
    ax: Axes, tokens: np.ndarray, bins: list[float], *, name: str, color: str, side: str
) -> None:
    """A histogram and its median; `side` aligns the text away from the other histogram's."""
    ax.hist(tokens, bins, color=color, alpha=0.7, label=name)
    median = float(np.median(tokens))
    ax.axvline(median, color=INK, linewidth=1.2, linestyle="--")
    text = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    away = -5 if side == "right" else 5
    words = f"{name}\nmedian {median:g}"
    ax.annotate(words, (median, 1), xytext=(away, -3), ha=side, va="top", **text)


# One trajectory: who wrote what.

PROMPT, PARENT = 0, 1
"""Authors; threads are numbered from 2 on, in the order of their calls."""


@dataclasses.dataclass(frozen=True)
class NodeRun:
    """A run of nodes of one author, without a branch inside it.

    Attributes:
      start: its first node.
      stop: one past its last node.
      author: `PROMPT`, `PARENT`, or the number of a thread.
      name: what a reader calls it.
      color: of the author.
      is_joined: whether it lies on the joined path.
      is_copy: whether the parent reads here what a thread wrote elsewhere.
    """

    start: int
    stop: int
    author: int
    name: str
    color: str
    is_joined: bool
    is_copy: bool


def blocks(trajectory: Trajectory, trie: Trie) -> list[NodeRun]:
    """Who wrote which nodes, in the order of the row.

    Args:
      trajectory: the calls.
      trie: its trie, the joined path first.
    """
    names, colors, in_round = ["prompt", "parent"], [GREY, BLUE], Counter[int | str]()
    for call in trajectory.calls:
        if call.is_thread:
            names.append(f"thread {call.path[1]}")
            colors.append(THREADS[in_round[call.path[0]] % len(THREADS)])
            in_round[call.path[0]] += 1
    author, is_copy = _authors(trajectory, trie)
    is_fork = np.bincount(trie.parent[trie.parent >= 0], minlength=len(trie)) > 1
    begins = (np.diff(author) != 0) | (is_copy[1:] != is_copy[:-1]) | is_fork[:-1]
    begins |= trie.parent[1:] != np.arange(len(trie) - 1)
    edges = [0, *(np.flatnonzero(begins) + 1).tolist(), len(trie)]
    made = []
    for start, stop in itertools.pairwise(edges):
        who, again = int(author[start]), bool(is_copy[start])
        name = f"{names[who]}, re-read" if again else names[who]
        is_joined = start < len(trajectory.ids)
        made.append(NodeRun(start, stop, who, name, colors[who], is_joined, again))
    return made


def _authors(trajectory: Trajectory, trie: Trie) -> tuple[np.ndarray, np.ndarray]:
    """[n] author of each node, and [n] bool, whether it is a copy of what stands elsewhere."""
    author, is_copy = np.full(len(trie), PARENT), np.zeros(len(trie), bool)
    author[: len(trajectory.ids)][trajectory.provenance == Provenance.PROMPT] = PROMPT
    pairs = zip(trie.parent.tolist(), trie.tokens.tolist(), strict=True)
    child = {pair: node for node, pair in enumerate(pairs)}
    is_own = np.zeros(len(trie), bool)
    number, fork, returned = PARENT, 0, []
    for call in trajectory.calls:
        number += call.is_thread
        if not len(call.sampled):
            continue  # it is no part of the trie
        path = [-1]
        for token in (*call.context.tolist(), *call.sampled.tolist()):
            path.append(child[path[-1], token])
        if not call.is_thread:
            fork = len(path)
            continue
        own = path[fork:]
        author[own] = np.where(is_own[own], PARENT, number)  # what headers share is nobody's
        is_own[own] = True
        if len(call.sampled) > (call.stop_reason is StopReason.EOS):  # else nothing is handed back
            returned.append(number)
    handed_back, header = iter(returned), []
    kinds = trajectory.provenance.tolist()
    for kind, run in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        nodes = list(run)
        if kind == Provenance.RETURNED and author[nodes[0]] != (number := next(handed_back)):
            copied = [node for node in (*header, *nodes) if not is_own[node]]
            author[copied], is_copy[copied] = number, True
        header = nodes if kind == Provenance.FORCED else []
    return author, is_copy


# One trajectory: the picture.

SMALL = 8.0
"""Points of the text in boxes; monospace, so that a box knows its size before it is drawn."""
CHARACTER, LINE = SMALL * 0.602 / 72, SMALL * 1.4 / 72
"""Inches per character and per line."""
WIDTH, MAX_LINES = 44, 10
"""Characters across a box, its margins included, and lines of text that it shows."""
GUTTER, GAP = 4, 0.8
"""Characters between the two columns of boxes, and lines between two boxes."""
DASHES = (0, (3, 2))
MAX_CELLS = 1000
"""Edge of the mask's image; of a longer row every second, third, ... node is shown."""


@dataclasses.dataclass(frozen=True)
class _Box:
    """A block as it is drawn; x in characters, y in lines, downwards."""

    block: NodeRun
    lines: list[str]
    x: float
    y: float

    @property
    def right(self) -> float:
        return self.x + WIDTH

    @property
    def bottom(self) -> float:
        return self.y + len(self.lines) + 1.75


def trie_figure(trajectory: Trajectory, decode: Callable[[np.ndarray], str]) -> Figure:
    """A trajectory as its trie, its packed row and the mask of that row.

    Args:
      trajectory: what to draw.
      decode: text of [n] int32 ids.

    Returns:
      The figure. Boxes are runs of one author, with their text; the row and the mask have one
      column for each node, in the colour of its box, paler where it carries no loss.
    """
    trie = trajectory_trie(trajectory)
    parts = blocks(trajectory, trie)
    boxes = _boxes(parts, trie, decode)
    # All sizes in inches, so that text fits whatever is drawn.
    tree = max(b.right for b in boxes) * CHARACTER, max(b.bottom for b in boxes) * LINE
    top, strip, left = 0.42, 0.22, tree[0] + 0.68
    mask_top = top + strip + 0.45
    side = min(max(top + tree[1] - mask_top - 0.45, 3.4), 3.7)
    width, height = left + side + 0.15, max(top + tree[1], mask_top + side + 0.45) + 0.1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))

        def panel(x: float, y: float, w: float, h: float) -> Axes:
            return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

        _draw_tree(panel(0.1, top, *tree), boxes, trie)
        row, square = panel(left, top, side, strip), panel(left, mask_top, side, side)
        _draw_row(row, parts, trie)
        _draw_mask(square, parts, trie, inches=side)
        calls = f"{len(trajectory.calls)} call{'s' * (len(trajectory.calls) > 1)}"
        held = f"{len(trie):,} nodes hold {calls} of {trie.source_tokens:,} tokens"
        for ax, note in ((row, held), (square, "i sees j iff j ≤ i < end[j]")):
            ax.set_title(note, loc="right", fontsize=SMALL, fontweight="normal")
    return figure


def _boxes(parts: list[NodeRun], trie: Trie, decode: Callable[[np.ndarray], str]) -> list[_Box]:
    """The joined path from top to bottom; beside a joined copy, what it is a copy of."""
    texts = {part: _excerpt(decode(trie.tokens[part.start : part.stop])) for part in parts}
    own = [part for part in parts if not part.is_joined]
    made: list[_Box] = []
    y = free = 0.0
    for part in (part for part in parts if part.is_joined):
        beside = [p for p in own if part.is_copy and p.author == part.author]
        free = y = max(y, free) if beside else y
        made.append(_Box(part, texts[part], 0, y))
        y = made[-1].bottom + GAP
        for other in beside:
            own.remove(other)
            made.append(_Box(other, texts[other], WIDTH + GUTTER, free))
            free = made[-1].bottom + GAP
    for part in own:  # never joined: the rollout ended first, or the thread wrote nothing
        y = max(free, _fork_of(part, made, trie).bottom)
        made.append(_Box(part, texts[part], WIDTH + GUTTER, y))
        free = made[-1].bottom + GAP
    return made


def _fork_of(part: NodeRun, boxes: list[_Box], trie: Trie) -> _Box:
    """The box that a branch leaves; it ends there, for no block has a branch inside it."""
    return next(box for box in boxes if box.block.stop == trie.parent[part.start] + 1)


def _excerpt(text: str) -> list[str]:
    """The text in lines that fit a box, the middle left out where they are too many."""
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH - 2)]
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 2], "…", lines[-1]]


def _draw_tree(ax: Axes, boxes: list[_Box], trie: Trie) -> None:
    """The boxes, a line from where a branch leaves, an arrow to where its text is re-read."""
    ax.set(xlim=(0, max(b.right for b in boxes)), ylim=(max(b.bottom for b in boxes), 0))
    ax.axis("off")
    ax.set_title("A trajectory as a trie")
    line: dict[str, Any] = {"color": INK, "linewidth": 1.2, "clip_on": False}
    above = None
    for box in boxes:
        if box.x:
            fork = _fork_of(box.block, boxes, trie)
            bus, high, low = box.x - GUTTER / 2, fork.bottom - 0.8, box.y + 0.8
            ax.plot([fork.right, bus, bus, box.x], [high, high, low, low], **line)
        elif above:
            ax.plot([2, 2], [above.bottom, box.y], **line)
        above = above if box.x else box
        _draw_box(ax, box, trie)
    for copy, own in itertools.product(boxes, boxes):
        if copy.block.is_copy and own.x and own.block.author == copy.block.author:
            arrow = {"arrowstyle": "->", "color": own.block.color, "linewidth": 1.4}
            ends = (copy.right, own.bottom - 0.8), (own.x, own.bottom - 0.8)
            ax.annotate("", *ends, arrowprops=arrow | {"shrinkA": 0, "shrinkB": 0})
    if any(box.x for box in boxes):  # then the place beside the prompt is free
        _draw_key(ax, WIDTH + GUTTER)


def _draw_key(ax: Axes, x: float) -> None:
    """What full and pale boxes mean."""
    for y, label, strength, style in (
        (0.2, "sampled here: trained", FULL, "-"),
        (2.0, "given, forced or re-read: no loss", PALE, DASHES),
    ):
        color = _mix(FAINT, strength)
        ax.add_patch(Rectangle((x, y), 2.5, 1.3, fc=color, ec=FAINT, linestyle=style, lw=1.2))
        ax.text(x + 3.5, y + 1, label, fontsize=SMALL)


def _draw_box(ax: Axes, box: _Box, trie: Trie) -> None:
    part = box.block
    is_trained = bool(trie.weight[part.start : part.stop].any())
    color, style = _mix(part.color, FULL if is_trained else PALE), "-" if is_trained else DASHES
    outline = {"ec": part.color, "lw": 1.2, "ls": style, "clip_on": False}
    ax.add_patch(Rectangle((box.x, box.y), WIDTH, box.bottom - box.y, fc=color, **outline))
    nodes = f"nodes {part.start}-{part.stop - 1}"
    if box.x:
        nodes += f", depth {trie.depth[part.start]}-{trie.depth[part.stop - 1]}"
    ax.text(box.x + 1, box.y + 1.1, part.name, weight="bold", fontsize=SMALL)
    ax.text(box.right - 1, box.y + 1.1, nodes, ha="right", fontsize=SMALL)
    for number, text in enumerate(box.lines):
        place = box.x + 1, box.y + number + 2.3
        ax.text(*place, text, family="DejaVu Sans Mono", fontsize=SMALL, parse_math=False)


def _draw_row(ax: Axes, parts: list[NodeRun], trie: Trie) -> None:
    """One cell for each node."""
    image = _colors(parts, trie)[None]
    ax.imshow(image, extent=(0, len(trie), 1, 0), aspect="auto", interpolation="none")
    ax.set(xticks=[], yticks=[], title="Its row")
    ax.spines[:].set_visible(True)


def _draw_mask(ax: Axes, parts: list[NodeRun], trie: Trie, *, inches: float) -> None:
    """Row i, column j: j's colour where node i sees node j; names stand where nothing is seen."""
    n = len(trie)
    some = np.arange(0, n, -(-n // MAX_CELLS))
    at, end = jnp.asarray(some)[None], jnp.asarray(trie.end[some])[None]
    seen = np.asarray(mask.dense(at, Span(enter=at, exit=end)))[0]
    image = np.where(seen[:, :, None], _colors(parts, trie)[some][None], 1.0)
    ax.imshow(image, extent=(0, n, n, 0), interpolation="none")
    ax.grid(visible=False)
    ax.spines[:].set_visible(True)
    ax.set(title="Its mask", xlabel="node j", ylabel="node i")
    for part in parts:
        middle = (part.start + part.stop) / 2
        name = part.name if part.is_joined else f"{part.name} sees no sibling"
        room = n - middle if part.is_joined else part.start - trie.parent[part.start]
        tall, wide = (part.stop - part.start) / n * inches * 72, room / n * inches * 72
        if tall > SMALL and wide > (len(name) / 2 + 1.5) * SMALL:  # half as wide as high
            x, away, side = (middle, 7, "left") if part.is_joined else (part.start, -7, "right")
            text = {"xytext": (away, 0), "textcoords": "offset points", "fontsize": SMALL}
            ax.annotate(name, (x, middle), ha=side, va="center", **text)


def _colors(parts: list[NodeRun], trie: Trie) -> np.ndarray:
    """[n, 3] the colour of each node in the row, paler where it carries no loss."""
    strength = np.where(trie.weight > 0, FULL, PALE)[:, None]
    full = np.concatenate([np.tile(to_rgb(p.color), (p.stop - p.start, 1)) for p in parts])
    return 1 - strength * (1 - full)


def _mix(color: str, strength: float) -> tuple[float, float, float]:
    """The colour on white."""
    red, green, blue = (1 - strength * (1 - c) for c in to_rgb(color))
    return red, green, blue


# Two frameworks.


def parity_figure(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """How far we are from PyTorch, stage by stage, and both training curves where there are any.

    Args:
      found: for each dtype what `parity.json` holds: `stages` with their `name` and `l2`, and
        maybe a `curve` with the losses of `ours` and `theirs`.

    Returns:
      The figure; a stage without any difference has no point.
    """
    curves = {dtype: numbers["curve"] for dtype, numbers in found.items() if "curve" in numbers}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.4 + 2.6 * bool(curves)), layout="constrained")
        axes = figure.subplots(1 + bool(curves), squeeze=False)[:, 0]
        for color, (dtype, numbers) in zip(itertools.cycle(RUNS), found.items(), strict=False):
            stages = [stage for stage in numbers["stages"] if stage["l2"]]
            names, errors = [s["name"] for s in stages], [s["l2"] for s in stages]
            axes[0].plot(names, errors, "o-", color=color, markersize=3, label=dtype)
            if dtype in curves:
                ours, theirs = curves[dtype]["ours"], curves[dtype]["theirs"]
                axes[1].plot(ours, color=color, linewidth=1.8, label=f"{dtype}, ours")
                axes[1].plot(theirs, color=INK, linewidth=1, linestyle=":")
        axes[0].set(title="Distance from PyTorch", ylabel="relative L2 error", yscale="log")
        axes[0].tick_params(axis="x", rotation=90)
        axes[0].legend()
        if curves:
            axes[1].set(title="Training, PyTorch dotted", ylabel="loss (nats)", xlabel="step")
            axes[1].legend()
    return figure
