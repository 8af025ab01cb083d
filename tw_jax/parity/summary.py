"""The figures of `parity.json`: one dict for each dtype, computed from both sides' stages."""

from __future__ import annotations

from typing import Any

import numpy as np

from tw_jax.parity import compare
from tw_jax.parity.material import Material


def summarize(
    report: compare.ParityReport,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    *,
    material: Material,
) -> dict[str, Any]:
    """The figures of one dtype: the headline numbers, all stages, and both training curves.

    Args:
      report: The comparison of both sides.
      ours: This library's stages, see `compare.MEANING`.
      theirs: PyTorch's stages.
      material: The input of both sides.

    Returns:
      Values that JSON can hold: an infinite number is None.
    """
    trained = material.is_trained[material.is_node]
    figures = {
        "first_layer_out_of_tolerance": report.first,
        "max_abs_logit": report.worst("logits", "absolute"),
        "max_rel_logit": report.worst("logits", "relative"),
        "largest_logit": float(np.abs(theirs["logits"]).max()),
        "kl": compare.kl(ours["logits"], theirs["logits"]),
        "ratio_within": compare.bands(ours["logp"][trained], theirs["logp"][trained]),
        "max_grad_rel": report.worst("gradients", "l2"),
        "max_param_rel": report.worst("step", "l2"),
        "max_curve_diff": report.worst("curve", "absolute"),
    }
    curve = {}
    if "curve" in ours:
        curve = {"curve": {"ours": ours["curve"].tolist(), "theirs": theirs["curve"].tolist()}}
    return {**{name: _finite(value) for name, value in figures.items()}, **report.json(), **curve}


def _finite(value: Any) -> Any:
    return compare.finite(value) if isinstance(value, float) else value
