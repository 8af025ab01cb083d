"""Two sides of one computation, stage by stage: errors, tolerances, the first stage that leaves it.

A side is a dict of stages in the order in which numbers flow: constants, weights, hidden states,
logits, losses, gradients, a step, a curve. This file knows arrays only: neither framework, nor how
they were made. It hands `programs/parity.py` a `ParityReport`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

Stage = np.ndarray | float | Mapping[str, np.ndarray]
"""What one side says of a stage: an array, a number, or an array for each parameter by name."""

Side = Mapping[str, Stage]
"""Stages by name, in order."""

BANDS = (0.001, 0.01, 0.05)
"""Half widths of the bands around 1 in which ratios of probabilities are counted."""

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
"""What a stage is, for whoever reads the table; "block.3" is a "block"."""


class Tolerance(NamedTuple):
    """How a stage is measured and how much it may differ.

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
"""By dtype of activations and by stage; from the roundings, the same for every model and run."""


class Error(NamedTuple):
    """How far one array is from another; what the measures of a `Tolerance` mean."""

    absolute: float
    relative: float
    l2: float


def error(ours: Any, theirs: Any) -> Error:
    """Compares two arrays of one shape in float64; what is not finite is infinitely far.

    Raises:
      ValueError: the shapes differ.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"Shapes {ours.shape} and {theirs.shape}: want the same on both sides.")
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
    """0 / 0 is no difference."""
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

    What a policy gradient would see as its importance ratio if one side sampled and the other
    trained.

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
      name: of the stage.
      worst: where it has parameters, the one that is furthest off; else "".
      error: of the stage, or of the worst parameter.
      tolerance: what it may be.
    """

    name: str
    worst: str
    error: Error
    tolerance: Tolerance

    @property
    def is_within(self) -> bool:
        """Whether the measured error is at most the tolerated one."""
        return self.measured <= self.tolerance.most

    @property
    def measured(self) -> float:
        """The error that counts for this stage."""
        return getattr(self.error, self.tolerance.measure)

    @property
    def place(self) -> str:
        """The stage, and the parameter in it."""
        return f"{self.name}: {self.worst}" if self.worst else self.name


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """All stages of one dtype, in order."""

    dtype: str
    lines: tuple[Line, ...]

    @property
    def first(self) -> str | None:
        """The first place that leaves its tolerance; None where none does."""
        return next((line.place for line in self.lines if not line.is_within), None)

    def worst(self, name: str, measure: str) -> float | None:
        """One error of a stage; None where the stage was not compared."""
        found = (getattr(line.error, measure) for line in self.lines if line.name == name)
        return next(found, None)

    def table(self) -> str:
        """The stages as text, a line for each."""
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
        """The stages for a program; an infinite error is null."""
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
      ours: the stages of the one.
      theirs: the same stages of the reference.
      dtype: of the activations; a row of `TOLERANCES`.

    Raises:
      ValueError: the sides have other stages, or a stage other parameters, than each other.
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
            # Tensors of another shape are of another model: no number can be put on them.
            Line(name, parameter, error(mine[parameter], array), tolerance)
            for parameter, array in stage.items()
        ]
        yield max(lines, key=lambda line: line.measured)


def _require_same(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    odd = sorted(set(ours) ^ set(theirs))
    if odd:
        raise ValueError(
            f"The two sides have other {what}: {', '.join(odd[:6])} on one side only. Want the "
            "same model and the same material on both."
        )


def _kind(name: str) -> str:
    return name.partition(".")[0]


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
