r"""Equality of exact expressions, with math-verify and sympy.

Only this file imports the two. math-verify turns LaTeX into terms of sympy. Its own comparison is
not used, because it rounds to six digits, drops units and sides of equations, and ignores case. Two
values are equal here only if sympy reduces their difference to zero. Numerical values can refute an
equality but never prove one. A comparison may take any amount of time on unusual text, so it is
called only from the worker processes of `tasks/grader.py`. A model's text is never evaluated as
Python.
"""

from __future__ import annotations

import functools
from typing import Any

from tw_jax.tasks import expressions, forms
from tw_jax.tasks.expressions import Tree

_REFUTED = 1e-9
"""A difference with a larger absolute value is not zero. It is computed to 30 digits."""


def equal(answer: str, truth: str) -> bool:
    """Returns whether two answers are equal by the rules of docs/answers.md.

    Raises:
      Exception: Any error that sympy raises on unusual text, including MemoryError.
    """
    return forms.equal(forms.read(answer), forms.read(truth), _judge)


def _judge(question: str, answer: Tree, truth: Tree) -> bool:
    names = sorted(expressions.symbols(answer) | expressions.symbols(truth))
    latex = {name: f"x_{{{number}}}" for number, name in enumerate((*names, expressions.LOG_BASE))}
    given, true = (_term(expressions.render(tree, latex)) for tree in (answer, truth))
    if not (_is_exact(given) and _is_exact(true)):
        return False
    return _is_zero(given - true) if question == "equal" else _are_multiples(given, true)


@functools.lru_cache(maxsize=256)
def _term(latex: str) -> Any:
    """Returns the sympy term of a text that `expressions.render` wrote."""
    import sympy  # slow to import, and only worker processes need it
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify.parser import latex2sympy

    read: Any = latex2sympy(
        latex,
        is_real=None,
        normalization_config=None,
        conversion_config=ConversionConfig(
            interpret_as_mixed_fractions=False, lowercase_symbols=False
        ),
    )
    return read.subs(sympy.Symbol("i"), sympy.I).doit()


def _is_exact(term: Any) -> bool:
    import sympy

    return not term.has(sympy.Float, sympy.zoo, sympy.nan, sympy.oo)


def _is_zero(difference: Any) -> bool:
    """Returns whether a term is provably zero."""
    import sympy

    if difference == 0:
        return True
    if _is_refuted(difference):
        return False
    if sympy.expand(difference) == 0:
        return True
    if difference.free_symbols and difference.is_polynomial():
        return False
    if sympy.simplify(difference) == 0:
        return True
    # For algebraic numbers `equals` computes the minimal polynomial, which is a proof.
    return bool(difference.is_algebraic and difference.equals(0) is True)


def _is_refuted(difference: Any) -> bool:
    """Returns whether the difference is not zero at one point of its variables."""
    import sympy

    symbols = sorted(difference.free_symbols, key=str)
    at = {s: sympy.Rational(17 + 6 * n, 13 + 4 * n) for n, s in enumerate(symbols)}
    value = difference.subs(at).evalf(30)
    return bool(value.is_number and value.is_finite and abs(value) > _REFUTED)


def _are_multiples(one: Any, other: Any) -> bool:
    """Returns whether two terms differ by a constant factor that is not zero."""
    import sympy

    ratio = sympy.cancel(one / other)
    is_constant = not ratio.free_symbols and ratio.is_finite and ratio != 0
    return bool(is_constant and sympy.expand(one - ratio * other) == 0)
