"""The picture of one trajectory: its trie, its packed row, and the mask of that row."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tw_jax.contracts import Span
from tw_jax.forkjoin.calls import Provenance, StopReason, Trajectory
from tw_jax.forkjoin.tries import trajectory_trie
from tw_jax.trie import mask
from tw_jax.trie.tree import Trie
from tw_jax.view.style import (
    BLUE,
    CHARACTER,
    FAINT,
    FULL,
    GREY,
    INK,
    PALE,
    SMALL,
    STYLE,
    THREADS,
    blend,
)

PROMPT, PARENT = 0, 1
"""Authors. Threads have the numbers from 2 on, in the order of their calls."""


@dataclasses.dataclass(frozen=True)
class NodeRun:
    """Consecutive nodes of one author, without a branch inside.

    Attributes:
      start: Its first node.
      stop: One past its last node.
      author: `PROMPT`, `PARENT`, or the number of a thread.
      name: The author's name in the picture.
      color: The author's colour.
      is_joined: Whether it lies on the joined path.
      is_copy: Whether the parent re-reads here the text that a thread wrote elsewhere.
    """

    start: int
    stop: int
    author: int
    name: str
    color: str
    is_joined: bool
    is_copy: bool


def blocks(trajectory: Trajectory, trie: Trie) -> list[NodeRun]:
    """Divides the nodes of a row by their authors.

    Args:
      trajectory: The calls.
      trie: Its trie, the joined path first.
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
    """[n] author of each node, and [n] bool, whether it is a copy of another node's text."""
    author, is_copy = np.full(len(trie), PARENT), np.zeros(len(trie), bool)
    author[: len(trajectory.ids)][trajectory.provenance == Provenance.PROMPT] = PROMPT
    pairs = zip(trie.parent.tolist(), trie.tokens.tolist(), strict=True)
    child = {pair: node for node, pair in enumerate(pairs)}
    is_own = np.zeros(len(trie), bool)
    number, fork, returned = PARENT, 0, []
    for call in trajectory.calls:
        number += call.is_thread
        if not len(call.sampled):
            continue  # the call is not part of the trie
        path = [-1]
        for token in (*call.context.tolist(), *call.sampled.tolist()):
            path.append(child[path[-1], token])
        if not call.is_thread:
            fork = len(path)
            continue
        own = path[fork:]
        author[own] = np.where(
            is_own[own], PARENT, number
        )  # shared tokens of headers belong to no thread
        is_own[own] = True
        if len(call.sampled) > (call.stop_reason is StopReason.EOS):  # otherwise it returns nothing
            returned.append(number)
    next_returned, header = iter(returned), []
    kinds = trajectory.provenance.tolist()
    for kind, run in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        nodes = list(run)
        if kind == Provenance.RETURNED and author[nodes[0]] != (number := next(next_returned)):
            copied = [node for node in (*header, *nodes) if not is_own[node]]
            author[copied], is_copy[copied] = number, True
        header = nodes if kind == Provenance.FORCED else []
    return author, is_copy


# The picture.

LINE = SMALL * 1.4 / 72
"""Inches per line of text."""
WIDTH, MAX_LINES = 44, 10
"""Characters across a box, including its margins, and lines of text that it shows."""
GUTTER, GAP = 4, 0.8
"""Characters between the two columns of boxes, and lines between two boxes."""
DASHES = (0, (3, 2))
MAX_CELLS = 1000
"""Longest edge of the mask's image. Of a longer row every second, third, ... node is shown."""


@dataclasses.dataclass(frozen=True)
class _Box:
    """A block and its place: x in characters, y in lines from the top."""

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
      trajectory: The trajectory.
      decode: Text of [n] int32 ids.

    Returns:
      The figure. Each box holds the text of one author. The row and the mask have one column for
      each node, in the colour of its box, and paler where the node has no loss.
    """
    trie = trajectory_trie(trajectory)
    parts = blocks(trajectory, trie)
    boxes = _boxes(parts, trie, decode)
    # All sizes are in inches, so that text of a fixed size fits every picture.
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
    """Places the joined path from top to bottom, and beside each copy the thread that wrote it."""
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
    for part in own:  # not joined, because the rollout ended first or the thread wrote nothing
        y = max(free, _fork_of(part, made, trie).bottom)
        made.append(_Box(part, texts[part], WIDTH + GUTTER, y))
        free = made[-1].bottom + GAP
    return made


def _fork_of(part: NodeRun, boxes: list[_Box], trie: Trie) -> _Box:
    """The box that a branch leaves. A block has no branch inside, so the box ends at the branch."""
    return next(box for box in boxes if box.block.stop == trie.parent[part.start] + 1)


def _excerpt(text: str) -> list[str]:
    """The text in lines that fit a box; if there are too many, the middle is left out."""
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH - 2)]
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 2], "…", lines[-1]]


def _draw_tree(ax: Axes, boxes: list[_Box], trie: Trie) -> None:
    """Draws the boxes, a line to each branch, and an arrow to the copy of its text."""
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
    if any(box.x for box in boxes):  # the place beside the prompt is free then
        _draw_key(ax, WIDTH + GUTTER)


def _draw_key(ax: Axes, x: float) -> None:
    """Explains full and pale boxes."""
    for y, label, strength, style in (
        (0.2, "sampled here: trained", FULL, "-"),
        (2.0, "given, forced or re-read: no loss", PALE, DASHES),
    ):
        color = blend(FAINT, strength)
        ax.add_patch(Rectangle((x, y), 2.5, 1.3, fc=color, ec=FAINT, linestyle=style, lw=1.2))
        ax.text(x + 3.5, y + 1, label, fontsize=SMALL)


def _draw_box(ax: Axes, box: _Box, trie: Trie) -> None:
    part = box.block
    is_trained = bool(trie.weight[part.start : part.stop].any())
    color, style = blend(part.color, FULL if is_trained else PALE), "-" if is_trained else DASHES
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
    """Draws one cell for each node."""
    image = _colors(parts, trie)[None]
    ax.imshow(image, extent=(0, len(trie), 1, 0), aspect="auto", interpolation="none")
    ax.set(xticks=[], yticks=[], title="Its row")
    ax.spines[:].set_visible(True)


def _draw_mask(ax: Axes, parts: list[NodeRun], trie: Trie, *, inches: float) -> None:
    """Draws j's colour at row i and column j if node i sees node j; labels use the empty part."""
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
        if (
            tall > SMALL and wide > (len(name) / 2 + 1.5) * SMALL
        ):  # a letter is half as wide as high
            x, away, side = (middle, 7, "left") if part.is_joined else (part.start, -7, "right")
            text = {"xytext": (away, 0), "textcoords": "offset points", "fontsize": SMALL}
            ax.annotate(name, (x, middle), ha=side, va="center", **text)


def _colors(parts: list[NodeRun], trie: Trie) -> np.ndarray:
    """[n, 3] colour of each node in the row, paler where the node has no loss."""
    strength = np.where(trie.weight > 0, FULL, PALE)[:, None]
    full = np.concatenate([np.tile(to_rgb(p.color), (p.stop - p.start, 1)) for p in parts])
    return 1 - strength * (1 - full)
