"""Compares two sides of one computation by stage, and finds the first stage out of tolerance.

A side is a dict of stages in the order of the computation: constants, weights, hidden states,
logits, losses, gradients, a step, a curve. This module sees numpy arrays only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

Stage = np.ndarray | float | Mapping[str, np.ndarray]
"""The result of one side for a stage: an array, a number, or arrays by name of parameter."""

Side = Mapping[str, Stage]
"""Stages by name, in order."""

BANDS = (0.001, 0.01, 0.05)
"""Half widths of the bands around 1 within which ratios of probabilities are counted."""

MEANING = {
    "rope": "inverse frequencies",
    "weights": "parameters as read",
    "embed": "embedding",
    "block": "a block's output",
    "norm": "final norm",
    "logits": "logits of every node",
    "logp": "log-probs of trained nodes, read where the labels say",
    "loss": "mean over sampled tokens, labels along calls",
    "flat_loss": "the reference's shift of the flattened trie",
    "gradients": "of the loss, before clipping",
    "flat_gradients": "of the reference's loss",
    "step": "parameters after one AdamW step",
    "curve": "loss of every training step",
}
"""Descriptions of the stages for the table; "block.3" is a "block"."""


class Tolerance(NamedTuple):
    """The measure of a stage and its upper bound.

    "absolute" is the largest difference; "relative" divides it by the largest magnitude; "l2" is
    the norm of the difference over the norm of the reference.
    """

    measure: Literal["absolute", "relative", "l2"]
    most: float


TOLERANCES: dict[str, dict[str, Tolerance]] = {
    "float32": {
        # One rounding of a power and one of a division.
        "rope": Tolerance("relative", 1e-6),
        # Copied, not computed.
        "weights": Tolerance("absolute", 0.0),
        "embed": Tolerance("absolute", 0.0),
        # Sums in another order: 6e-8 a rounding, some tens of layers and of roundings in each.
        "block": Tolerance("l2", 1e-5),
        "norm": Tolerance("l2", 1e-5),
        "logits": Tolerance("relative", 2e-5),
        # Nats; a log-prob takes the error of its logit and that of the sum.
        "logp": Tolerance("absolute", 1e-3),
        "loss": Tolerance("relative", 1e-5),
        "flat_loss": Tolerance("relative", 1e-5),
        "gradients": Tolerance("l2", 1e-4),
        "flat_gradients": Tolerance("l2", 1e-4),
        # A step moves a weight by a thousandth, so a hundredth of its error remains.
        "step": Tolerance("l2", 1e-5),
        # Nats; errors grow from step to step.
        "curve": Tolerance("absolute", 1e-3),
    },
    "bfloat16": {
        "rope": Tolerance("relative", 1e-6),
        "weights": Tolerance("absolute", 0.0),
        "embed": Tolerance("absolute", 0.0),
        # Some ten roundings of 2^-9 in each of thirty layers: 2e-3 sqrt(300) = 3e-2, with room for
        # transformers' rounded cosines and sines, which we keep in float32 (3.5e-2 was seen). A
        # largest error would grow with the number of tokens, so logits and log-probs are in norm.
        "block": Tolerance("l2", 5e-2),
        "norm": Tolerance("l2", 5e-2),
        "logits": Tolerance("l2", 5e-2),
        "logp": Tolerance("l2", 5e-2),
        "loss": Tolerance("relative", 1e-2),
        "flat_loss": Tolerance("relative", 1e-2),
        "gradients": Tolerance("l2", 1e-1),
        "flat_gradients": Tolerance("l2", 1e-1),
        # Adam's first step is the sign of a gradient, which rounding turns where it is small.
        "step": Tolerance("l2", 1e-2),
        "curve": Tolerance("absolute", 5e-2),
    },
}
"""By dtype of activations and by stage. They follow from roundings, so all models share them."""


class Error(NamedTuple):
    """Distances between two arrays, by the measures of a `Tolerance`."""

    absolute: float
    relative: float
    l2: float


def error(ours: Any, theirs: Any) -> Error:
    """Compares two arrays of one shape in float64. Values that are not finite are infinitely far.

    Raises:
      ValueError: If the shapes differ.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"The shapes {ours.shape} and {theirs.shape} must be equal.")
    if not ours.size:
        return Error(0.0, 0.0, 0.0)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return Error(math.inf, math.inf, math.inf)
    apart = np.abs(ours - theirs)
    largest = float(apart.max())
    return Error(
        largest,
        _over(largest, float(np.abs(theirs).max())),
        _over(float(np.linalg.norm(apart)), float(np.linalg.norm(theirs))),
    )


def _over(difference: float, size: float) -> float:
    """The quotient, where 0 / 0 is 0."""
    if not difference:
        return 0.0
    return difference / size if size else math.inf


def kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean over nodes of KL(theirs || ours) in nats, from logits [n, V], in float64."""
    rows = (_kl_of_row(a, b) for a, b in zip(ours, theirs, strict=True))
    return float(np.mean(np.fromiter(rows, np.float64, len(ours))))


def _kl_of_row(ours: np.ndarray, theirs: np.ndarray) -> float:
    p, q = (_log_softmax(np.asarray(logits, np.float64)) for logits in (theirs, ours))
    return float(np.sum(np.exp(p) * (p - q)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def bands(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Share of tokens whose ratio of probabilities lies within each band around 1.

    The ratio is the importance ratio of a policy gradient if one side samples and the other trains.

    Args:
      ours: [n] log-probs.
      theirs: [n] log-probs of the same tokens.
    """
    ratio = np.exp(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    return {f"{band:.1%}": float(np.mean(np.abs(ratio - 1) <= band)) for band in BANDS}


@dataclasses.dataclass(frozen=True)
class Line:
    """One compared stage.

    Attributes:
      name: Name of the stage.
      worst: The parameter with the largest error; "" if the stage has no parameters.
      error: Error of the stage, or of that parameter.
      tolerance: Bound of the error.
    """

    name: str
    worst: str
    error: Error
    tolerance: Tolerance

    @property
    def is_within(self) -> bool:
        """Whether the measured error is at most the tolerance."""
        return self.measured <= self.tolerance.most

    @property
    def measured(self) -> float:
        """The error in the measure of the tolerance."""
        return getattr(self.error, self.tolerance.measure)

    @property
    def place(self) -> str:
        """The stage and its worst parameter."""
        return f"{self.name}: {self.worst}" if self.worst else self.name


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """All stages of one dtype, in order."""

    dtype: str
    lines: tuple[Line, ...]

    @property
    def first(self) -> str | None:
        """The first place out of tolerance; None if there is none."""
        return next((line.place for line in self.lines if not line.is_within), None)

    def worst(self, name: str, measure: str) -> float | None:
        """One error of a stage; None if the stage was not compared."""
        found = (getattr(line.error, measure) for line in self.lines if line.name == name)
        return next(found, None)

    def table(self) -> str:
        """A table of the stages as text, one line each."""
        head = ("stage", "max abs", "max rel", "rel L2", "tolerance", "", "")
        rows = [head, *(self._row(line) for line in self.lines)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        texts = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
        return "\n".join([f"{self.dtype}:", *(f"  {text.rstrip()}" for text in texts)])

    def _row(self, line: Line) -> tuple[str, ...]:
        errors = (f"{value:.1e}" for value in line.error)
        allowed = f"{line.tolerance.measure} {line.tolerance.most:.0e}"
        verdict = "" if line.is_within else "OUT"
        about = line.worst or MEANING[_kind(line.name)]
        return (line.name, *errors, allowed, verdict, about)

    def json(self) -> dict[str, Any]:
        """The stages as JSON values; an infinite error is None."""
        return {
            "stages": [
                {
                    "name": line.name,
                    "worst": line.worst or None,
                    **{n: finite(v) for n, v in line.error._asdict().items()},
                    "measure": line.tolerance.measure,
                    "most": line.tolerance.most,
                    "is_within": line.is_within,
                }
                for line in self.lines
            ],
        }


def report(ours: Side, theirs: Side, dtype: str) -> ParityReport:
    """Compares two sides.

    Args:
      ours: Stages of one side.
      theirs: Stages of the reference.
      dtype: Dtype of the activations, a key of `TOLERANCES`.

    Raises:
      ValueError: If the sides have different stages, or a stage has different parameters.
    """
    _require_same("stages", ours, theirs)
    return ParityReport(dtype, tuple(_lines(ours, theirs, TOLERANCES[dtype])))


def _lines(ours: Side, theirs: Side, tolerances: Mapping[str, Tolerance]) -> Iterator[Line]:
    for name, stage in theirs.items():
        tolerance = tolerances[_kind(name)]
        mine = ours[name]
        if not isinstance(stage, Mapping):
            yield Line(name, "", error(mine, stage), tolerance)
            continue
        assert isinstance(mine, Mapping)
        _require_same(f"parameters of {name}", mine, stage)
        lines = [
            # Tensors of different shapes belong to different models, so `error` raises.
            Line(name, parameter, error(mine[parameter], array), tolerance)
            for parameter, array in stage.items()
        ]
        yield max(lines, key=lambda line: line.measured)


def _require_same(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    odd = sorted(set(ours) ^ set(theirs))
    if odd:
        raise ValueError(
            f"The two sides have different {what}: {', '.join(odd[:6])} on one side only. Compare "
            "the same model and the same material on both sides."
        )


def _kind(name: str) -> str:
    return name.partition(".")[0]


def finite(value: float | None) -> float | None:
    """The value, or None if JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
