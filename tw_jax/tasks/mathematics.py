r"""Equality of exact expressions; the door to math-verify and to sympy under it.

math-verify turns LaTeX into sympy's terms. Its own comparison is not used, because it rounds to six
digits, drops units and sides of equations, and folds case. Two values are equal here only where
sympy reduces their difference to zero; numerical values can refute an equality but never prove
one. This takes time, and on a strange text any amount of it: call it from the worker processes of
`tasks/grader.py` alone. Nothing that a model wrote is evaluated as Python.
"""

from __future__ import annotations

import functools
from typing import Any

from tw_jax.tasks import expressions, forms
from tw_jax.tasks.expressions import Tree

_REFUTED = 1e-9
"""A difference with a larger absolute value is not zero; 30 digits are computed."""


def equal(answer: str, truth: str) -> bool:
    """Whether two answers are equal as mathematics; docs/answers.md has the rules.

    Raises:
      Exception: Whatever sympy raises on a strange answer, MemoryError among it.
    """
    return forms.equal(forms.read(answer), forms.read(truth), _judge)


def _judge(question: str, answer: Tree, truth: Tree) -> bool:
    names = sorted(expressions.symbols(answer) | expressions.symbols(truth))
    latex = {name: f"x_{{{number}}}" for number, name in enumerate((*names, expressions.LOG_BASE))}
    given, wanted = (_term(expressions.render(tree, latex)) for tree in (answer, truth))
    if not (_is_exact(given) and _is_exact(wanted)):
        return False
    return _is_zero(given - wanted) if question == "equal" else _are_multiples(given, wanted)


@functools.lru_cache(maxsize=256)
def _term(latex: str) -> Any:
    """Sympy's term of a text that `expressions.render` wrote."""
    import sympy  # slow to import, and needed in worker processes only
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
    """Whether a term is provably zero."""
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
    # Of algebraic numbers `equals` asks the minimal polynomial, which is a proof.
    return bool(difference.is_algebraic and difference.equals(0) is True)


def _is_refuted(difference: Any) -> bool:
    """Whether the difference has a value that is not zero, at one point of its variables."""
    import sympy

    symbols = sorted(difference.free_symbols, key=str)
    at = {s: sympy.Rational(17 + 6 * n, 13 + 4 * n) for n, s in enumerate(symbols)}
    value = difference.subs(at).evalf(30)
    return bool(value.is_number and value.is_finite and abs(value) > _REFUTED)


def _are_multiples(one: Any, other: Any) -> bool:
    """Whether two terms differ by a constant factor that is not zero."""
    import sympy

    ratio = sympy.cancel(one / other)
    is_constant = not ratio.free_symbols and ratio.is_finite and ratio != 0
    return bool(is_constant and sympy.expand(one - ratio * other) == 0)
