"""The one way to compare numbers: an error as a share of a size, judged by a row of the table.

A sum whose terms cancel says nothing of the rounding in it, so whoever compares such a sum names
the size of its terms. The worst error of each row is recorded for the table in conftest.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np

_TINIEST = 1e-300


def _is_list(node):
    return isinstance(node, list)


class Close:
    """Compares by the rows of the table, and remembers the worst error of each.

    Attributes:
      bounds: row -> what an error may be at most.
      worst: row -> the largest error seen and the test that saw it.
    """

    def __init__(self, bounds: Mapping[str, float]):
        self.bounds = bounds
        self.worst: dict[str, tuple[float, str]] = {}

    def __call__(self, row, got, want, *, of=None, what=""):
        """Asserts that every number of `got` is the one of `want`.

        Args:
          row: of the table.
          got: an array or a tree of arrays, any shapes and dtypes; a list of numbers is an array.
          want: the same tree, or one number for an array; the size is taken from here.
          of: the size that an error is a share of, in place of the largest entry of each array of
            `want`. A number or an array; of several arrays, a tree like `want`. 1.0 makes the error
            absolute, and `want` itself makes it relative, entry by entry. For a sum whose terms
            cancel it is the sum of the absolute terms.
          what: named if the comparison fails.
        """
        ours = jax.tree.leaves_with_path(got, is_leaf=_is_list)
        theirs = jax.tree.leaves(want, is_leaf=_is_list)
        sizes = [None] * len(theirs) if of is None else jax.tree.leaves(of, is_leaf=_is_list)
        sizes *= len(theirs) if len(sizes) == 1 else 1
        assert len(ours) == len(theirs) == len(sizes), f"{len(ours)} arrays for {len(theirs)}"
        for (path, mine), other, size in zip(ours, theirs, sizes, strict=True):
            mine, other = np.float64(mine), np.float64(other)
            assert other.shape in ((), mine.shape), f"{mine.shape} for {other.shape}"
            if mine.size:
                size = np.abs(other).max() if size is None else np.abs(np.float64(size))
                error = np.abs(mine - other) / np.maximum(size, _TINIEST)
                self.error(row, error.max(), f"{what}{jax.tree_util.keystr(path)}")

    def norm(self, row, got, want, *, of=None, what=""):
        """Asserts that two trees are equal: the L2 norm of the difference over that of `of`.

        Args:
          row: of the table.
          got: a tree of arrays.
          want: the same tree.
          of: a tree, `want` if None; for a gradient that cancels, one that does not.
          what: named if the comparison fails.
        """
        pairs = [
            (np.float64(mine), np.float64(other))
            for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        ]
        gap = np.sqrt(sum(np.square(mine - other).sum() for mine, other in pairs))
        leaves = jax.tree.leaves(want if of is None else of)
        size = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in leaves))
        self.error(row, gap / max(size, _TINIEST), what)

    def error(self, row, error, what=""):
        """Asserts that an error, worked out by the caller, is within the row's bound."""
        worst = float(error)
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        if not worst <= self.worst.get(row, (-1.0, ""))[0]:
            self.worst[row] = (worst, f"{test} {what}".strip())
        bound = self.bounds[row]
        assert worst <= bound, f"{what}: the error is {worst:.3g}, and {row} allows {bound:.3g}"
