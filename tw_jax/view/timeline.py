"""The picture of a rollout in time: its threads side by side, and the same tokens in one line.

The horizontal axis counts decoding steps. A step decodes one token of the parent, or one token of
each thread that still runs; prefill takes no decoding step. The length of the upper part is the
`longest` of `forkjoin.cost.cost_from_calls`, that of the lower part its `total`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from tw_jax.forkjoin.calls import Call, Trajectory
from tw_jax.view.style import BLUE, CHARACTER, FAINT, FULL, GREY, INK, SMALL, STYLE, THREADS, blend

PARENT = 0
"""Lane of the parent; threads have lanes from 1 on, in the order of their outlines."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The tokens of one call in time.

    Attributes:
      call: The call that drew them.
      lane: `PARENT`, or the number of the thread within its round, from 1.
      start: Decoding steps before its first token.
      stop: Decoding steps after its last token.
      turn: The same as `start` if all calls ran one after another.
    """

    call: Call
    lane: int
    start: int
    stop: int
    turn: int


@dataclasses.dataclass(frozen=True)
class Fork:
    """One round of threads in time.

    Attributes:
      start: Decoding steps at the fork.
      stop: Decoding steps at the join, which waits for the longest thread.
      threads: The stretches between them.
    """

    start: int
    stop: int
    threads: tuple[Stretch, ...]


def schedule(trajectory: Trajectory) -> tuple[list[Stretch], list[Fork]]:
    """When each call of a rollout runs if every thread starts at its fork.

    Args:
      trajectory: Its calls are in the order of the protocol: a round's threads follow its fork.

    Returns:
      The calls that drew tokens, in order, and the rounds.
    """
    stretches: list[Stretch] = []
    rounds: dict[int | str, list[Stretch]] = {}
    fork = join = turn = 0
    for call in trajectory.calls:
        tokens = len(call.sampled)
        if call.is_thread:
            threads = rounds.setdefault(call.path[0], [])
            stretch = Stretch(call, len(threads) + 1, fork, fork + tokens, turn)
            threads.append(stretch)
            join = max(join, stretch.stop)
        else:
            stretch = Stretch(call, PARENT, join, join + tokens, turn)
            fork = join = stretch.stop
        turn += tokens
        stretches.append(stretch)
    forks = [
        Fork(threads[0].start, max(t.stop for t in threads), tuple(threads))
        for threads in rounds.values()
    ]
    return [stretch for stretch in stretches if len(stretch.call.sampled)], forks


WIDTH = 9.0
"""Inches across."""
LANE, BAR = 0.34, 0.62
"""Inches of a lane, and the share of it that a bar fills."""
LEFT, RIGHT = 0.95, 0.2
"""Inches left and right of the axes."""


def timeline_figure(trajectory: Trajectory, decode: Callable[[np.ndarray], str]) -> Figure:
    """A rollout's calls as bars over decoding steps, beside the same tokens one after another.

    Args:
      trajectory: The rollout.
      decode: Text of [n] int32 ids; a bar shows the beginning of its text.

    Returns:
      The figure. Colours are those of the trie picture.
    """
    stretches, forks = schedule(trajectory)
    longest = max((s.stop for s in stretches), default=0)
    total = sum(len(s.call.sampled) for s in stretches)
    lanes = 1 + max((s.lane for s in stretches), default=0)
    top, gap, bottom = 0.35, 0.52, 0.5
    height = top + lanes * LANE + gap + LANE + bottom
    wide = WIDTH - LEFT - RIGHT
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))

        def panel(y: float, lanes: int) -> Axes:
            size = (LEFT / WIDTH, 1 - (y + lanes * LANE) / height)
            ax = figure.add_axes((*size, wide / WIDTH, lanes * LANE / height))
            ax.set(xlim=(0, max(total, 1)), ylim=(lanes - 0.5, -0.5))
            ax.spines["left"].set_visible(False)
            ax.tick_params(axis="y", length=0)
            ax.grid(visible=False, axis="y")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            return ax

        per_step = wide / max(total, 1) / CHARACTER
        above, below = panel(top, lanes), panel(top + lanes * LANE + gap, 1)
        for fork in forks:
            _draw_fork(above, fork, characters=per_step)
        for s in stretches:
            text = decode(s.call.sampled)
            _draw_bar(above, s, s.start, lane=s.lane, text=text, characters=per_step)
            _draw_bar(below, s, s.turn, lane=0, text=text, characters=per_step)
        _draw_saving(above, longest, total, characters=per_step)
        above.set_yticks(range(lanes), ["parent", *(f"thread {n}" for n in range(1, lanes))])
        above.tick_params(axis="x", labelbottom=False, length=0)
        above.spines["bottom"].set_visible(False)
        above.set_title(f"Threads side by side: {longest:,} decoding steps")
        below.set_yticks([0], ["one thread"])
        below.set(title=f"The same tokens one after another: {total:,} decoding steps")
        below.set_xlabel("decoding steps")
    return figure


def _draw_bar(
    ax: Axes, stretch: Stretch, start: int, *, lane: int, text: str, characters: float
) -> None:
    """A bar in the colour of its author, with as much of its text as fits."""
    color = THREADS[(stretch.lane - 1) % len(THREADS)] if stretch.lane else BLUE
    tokens = len(stretch.call.sampled)
    box = Rectangle((start, lane - BAR / 2), tokens, BAR, fc=blend(color, FULL), ec=color, lw=1.2)
    ax.add_patch(box).set_clip_on(False)
    shown = _first_words(text, int(tokens * characters - 1.6))
    family: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": SMALL, "va": "center"}
    ax.text(start + 0.9 / characters, lane, shown, parse_math=False, **family)


def _first_words(text: str, characters: int) -> str:
    """The text in one line, cut where it is longer."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    if len(line) <= characters:
        return line
    return line[: characters - 1].rstrip() + "…" if characters >= 4 else ""


def _draw_saving(ax: Axes, longest: int, total: int, *, characters: float) -> None:
    """The end of the rollout, and an arrow to where the same tokens in one line would end."""
    ax.axvline(longest, color=INK, linewidth=1.2, linestyle="--")
    if longest == total:
        return
    arrow = {"arrowstyle": "<->", "color": FAINT, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (longest, PARENT), (total, PARENT), arrowprops=arrow)
    label = f"{1 - longest / total:.0%} fewer"
    if (total - longest) * characters > len(label):
        middle = (longest + total) / 2
        ax.text(middle, PARENT - 0.12, label, ha="center", va="bottom", fontsize=SMALL)


def _draw_fork(ax: Axes, fork: Fork, *, characters: float) -> None:
    """A line down from the parent to the threads, one up where they join, and waiting dotted."""
    last = max(thread.lane for thread in fork.threads)
    line: dict[str, Any] = {"color": INK, "linewidth": 1.2, "zorder": 1}
    for step in (fork.start, fork.stop):
        ax.plot([step, step], [PARENT, last], **line)
    ax.plot([fork.start, fork.stop], [PARENT, PARENT], color=GREY, linewidth=1.2, linestyle=":")
    ax.plot([fork.start, fork.stop], [PARENT, PARENT], "o", color=INK, markersize=3.5, zorder=3)
    if (fork.stop - fork.start) * characters > len("fork  join") + 2:
        for step, word, side, away in (
            (fork.start, "fork", "left", 5),
            (fork.stop, "join", "right", -5),
        ):
            text: dict[str, Any] = {"xytext": (away, 2), "textcoords": "offset points"}
            ax.annotate(word, (step, PARENT), ha=side, va="bottom", fontsize=SMALL, **text)
    for thread in fork.threads:
        if thread.stop < fork.stop:
            ends = [thread.stop, fork.stop], [thread.lane, thread.lane]
            ax.plot(*ends, color=GREY, linewidth=1.2, linestyle=":")
