"""Plots of numbers: training, the tokens of rollouts, and the distance from PyTorch.

Each plot is a pure function from records to a `Figure`; the programs read the files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from tw_jax.view.style import BLUE, GREY, INK, PALE, RUNS, STYLE, blend

Runs = Mapping[str, Sequence[Mapping[str, float]]]
"""By label, the lines of a metrics file, each with its `step`."""


# Training.


def loss_figure(runs: Runs) -> Figure:
    """Loss by step, and accuracy where it was written; each run has its own colour.

    Args:
      runs: Lines with `loss` (nats) and maybe `accuracy`.

    Returns:
      The figure. A long run is drawn as its running mean over its pale raw values.
    """
    names = [n for n in ("loss", "accuracy") if any(n in line for r in runs.values() for line in r)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.7 + 2.5 * len(names)), layout="constrained")
        axes = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
        for ax, name in zip(axes, names, strict=True):
            _draw_runs(ax, runs, name)
        losses = np.array([line["loss"] for lines in runs.values() for line in lines])
        _scale_loss(axes[0], losses[np.isfinite(losses)])
        axes[0].set(title=_loss_title(runs), ylabel="loss (nats per trained token)")
        if len(runs) > 1:
            axes[0].legend()
        if len(names) > 1:
            axes[1].set_title("Share of trained tokens that are the model's first choice")
            axes[1].set(ylabel="token accuracy", ylim=(0, 1.03))
        axes[-1].set_xlabel("training step")
    return figure


POLICY = {
    "reward": ("Reward", "mean reward of a rollout"),
    "longest_tokens": ("Token latency", "tokens on the longest path"),
    "latency_ratio": ("Longest path over all tokens", "ratio"),
    "loss": ("Policy loss", "loss"),
}
"""Panels of a P-GRPO run, in reading order: metric, title, and label of the y axis."""


def policy_figure(runs: Runs) -> Figure:
    """Reward, token latency and loss of P-GRPO runs by step; each run has its own colour.

    Args:
      runs: Lines with the metrics of `POLICY`; a metric that no line has gets no panel.

    Returns:
      The figure. A long run is drawn as its running mean over its pale raw values.
    """
    names = [name for name in POLICY if any(name in line for r in runs.values() for line in r)]
    rows = -(-len(names) // 2)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.6 + 2.4 * rows), layout="constrained")
        axes = figure.subplots(rows, 2, sharex=True, squeeze=False).ravel()
        for ax, name in itertools.zip_longest(axes, names):
            if name is None:
                ax.set_visible(False)
                continue
            _draw_runs(ax, runs, name)
            title, label = POLICY[name]
            ax.set(title=title, ylabel=label)
        for ax in axes[len(names) - 2 : len(names)]:
            ax.set_xlabel("training step")
            ax.tick_params(axis="x", labelbottom=True)
        if len(runs) > 1:
            axes[0].legend()
    return figure


def _draw_runs(ax: Axes, runs: Runs, name: str) -> None:
    """One curve for each run that has the metric, over whole steps."""
    for color, (label, lines) in zip(itertools.cycle(RUNS), runs.items(), strict=False):
        curve = [(line["step"], line[name]) for line in lines if name in line]
        _draw_curve(ax, np.array(curve, float).reshape(-1, 2), color=color, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_curve(ax: Axes, curve: np.ndarray, *, color: str, label: str) -> None:
    """Draws [n, 2] steps and values; the running mean covers a fortieth of the run."""
    curve = curve[np.isfinite(curve[:, 1])]
    steps, values = curve.T
    half = len(curve) // 80
    if half:
        ax.plot(steps, values, color=blend(color, PALE), linewidth=0.8, zorder=1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(curve))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(curve))
    mean = (total[high] - total[low]) / (high - low)
    ax.plot(steps, mean, color=color, linewidth=1.8, label=label, zorder=2)


def _scale_loss(ax: Axes, losses: np.ndarray) -> None:
    """Sets a logarithmic axis if the loss spans a factor of ten or more."""
    if not len(losses) or losses.min() <= 0 or losses.max() < 10 * losses.min():
        ax.set_ylim(bottom=min(0, *losses))
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.minorticks_off()


def _loss_title(runs: Runs) -> str:
    if len(runs) > 1:
        return f"Training loss of {len(runs)} runs"
    (lines,) = runs.values()
    ends = (f"{line['loss']:.3g} at step {line['step']:,}" for line in (lines[0], lines[-1]))
    return f"Training loss: {', '.join(ends)}"


# Latency.


def latency_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Histograms of the longest path and of all tokens of rollouts, by verdict.

    Args:
      lines: Lines of `graded.jsonl`: `verdict`, and the tokens `longest` and `total`.

    Returns:
      The figure: a panel each for correct rollouts, wrong ones, and those whose answer is not
      known, if there are any.
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
    width = max(1, round(most / 50))  # whole tokens, so that all bars cover equally many counts
    bins = np.arange(0, most + 2 * width, width).tolist()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.7 + 2.1 * len(groups)), layout="constrained")
        axes = figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
        for ax, (name, group) in zip(axes, groups, strict=True):
            _draw_tokens(ax, total[group], bins, name="all tokens", color=GREY, side="left")
            _draw_tokens(ax, longest[group], bins, name="longest path", color=BLUE, side="right")
            ratio = longest[group].sum() / max(total[group].sum(), 1)
            rollouts = f"{len(lines)} rollout{'s' * (len(lines) != 1)}"
            share = f"{name}: {group.sum()} of {rollouts}"
            ax.set_title(f"{share}, longest path {ratio:.2f} of all tokens")
            ax.set(ylabel="rollouts", ylim=(0, ax.dataLim.y1 * 1.4))
            ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.grid(visible=False, axis="x")
        axes[-1].set(xlabel="tokens per rollout", xlim=(0, most * 1.15))
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_tokens(
    ax: Axes, tokens: np.ndarray, bins: list[float], *, name: str, color: str, side: str
) -> None:
    """A histogram and its median; `side` aligns the text away from the other histogram's."""
    ax.hist(tokens, bins, color=color, alpha=0.7, label=name)
    median = float(np.median(tokens))
    ax.axvline(median, color=INK, linewidth=1.2, linestyle="--")
    text = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    offset = -5 if side == "right" else 5
    label = f"{name}\nmedian {median:g}"
    ax.annotate(label, (median, 1), xytext=(offset, -3), ha=side, va="top", **text)


# Two frameworks.


def parity_figure(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Distance from PyTorch, stage by stage, and the training curves of both sides.

    Args:
      results: For each dtype the figures of `parity.json`: `stages` with their `name` and `l2`, and
        maybe a `curve` with the losses of `ours` and `theirs`.

    Returns:
      The figure. A stage without any difference has no point.
    """
    curves = {dtype: figures["curve"] for dtype, figures in results.items() if "curve" in figures}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.4 + 2.6 * bool(curves)), layout="constrained")
        axes = figure.subplots(1 + bool(curves), squeeze=False)[:, 0]
        for color, (dtype, figures) in zip(itertools.cycle(RUNS), results.items(), strict=False):
            stages = [stage for stage in figures["stages"] if stage["l2"]]
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
            axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
            axes[1].legend()
    return figure
