"""Reads compiled programs as text: is an array in them that grows as the square of a row?"""

from __future__ import annotations

import math
import re

_SHAPE = re.compile(r"\b(?:pred|bf16|[suf]\d+\w*|c\d+)\[([\d,<=]+)\]")


def too_large(text: str, *, tokens: int, vocab: int, devices: int = 1) -> list[str]:
    """Shapes in a program that hold all pairs of a row, or the logits of a whole row.

    Shapes are per device, and XLA cuts and reshapes freely, so elements are counted. T^2 or more of
    them are all pairs; T or more times V are logits where a dimension is V, or what a mesh may
    leave of it to one device. Meant for programs of few layers, whose other arrays are smaller than
    T^2.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      tokens: T of a row, or slots of a cache.
      vocab: V.
      devices: of the mesh.
    """
    parts = {vocab // n for n in range(1, devices + 1) if devices % n == 0 and vocab % n == 0}
    found = set()
    for match in _SHAPE.finditer(text):
        shape = [int(size) for size in match[1].replace("<=", "").split(",")]
        elements = math.prod(shape)
        has_logits = any(size in parts and elements >= tokens * size for size in shape)
        if elements >= tokens**2 or has_logits:
            found.add(match[0])
    return sorted(found)
