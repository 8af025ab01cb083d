r"""Number notation: reads a text as an exact rational number.

Nothing is evaluated. A text is either one number in a listed notation or not a number. The
notations are integers (with thousands marks), decimals, fractions, mixed numbers, percentages and
scientific notation. docs/answers.md lists them with examples.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 4000
"""Largest number of digits that is read, and largest exponent of scientific notation.

Python converts at most 4300 digits.
"""

_SPACE = re.compile(r"(?<!\\)\\[,:; ]|~")
_MARKED = re.compile(r"[0-9]+|[1-9][0-9]{0,2}(?:(?P<mark>[,_ ])[0-9]{3})(?:(?P=mark)[0-9]{3})*")
_DECIMAL = re.compile(r"(.*?)\.([0-9]*)")
_RATIO = re.compile(r"([^/{}\\]+)/([^/{}\\]+)")
_FRAC = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_MIXED = re.compile(
    r"([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+) *\\[dtc]?frac(.*)|([0-9]+) +([0-9]+)/([0-9]+)"
)
_POWER_OF_TEN = re.compile(
    r"(.+?) *(?:[eE]([+-]?[0-9]{1,4})"
    r"|(?:\\times|\\cdot|\N{MULTIPLICATION SIGN}|\N{DOT OPERATOR}|\N{MIDDLE DOT}|\*)"
    r" *10 *\^ *(?:\{ *([+-]?[0-9]{1,4}) *\}|([0-9]{1,4})))"
)
_PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_WRAP = re.compile(r"\\(?:boxed|mathbf|boldsymbol)\s*\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}")


class Number(NamedTuple):
    """A number as it was written.

    Attributes:
      value: The rational number. The value of `n%` is n/100.
      is_percentage: Whether it was written with a percent sign.
    """

    value: Fraction
    is_percentage: bool = False


def equal(answer: Number, truth: Number) -> bool:
    r"""Returns whether two numbers are equal as rationals.

    A percentage is n/100, so `50\%` equals 1/2 and not 50. If the truth is an integer, a percentage
    is wrong, because `n\%` may be n with a superfluous sign.
    """
    if answer.is_percentage and not truth.is_percentage and truth.value.denominator == 1:
        return False
    return answer.value == truth.value


def read(text: str) -> Number | None:
    r"""Returns the number of a text, or None if it is not one number in a listed notation.

    Dollars or other delimiters of mathematics around the number are ignored, and so are a full stop
    and a LaTeX line break after it.
    """
    if len(text) > 3 * MAX_DIGITS:
        return None
    text = unwrapped(text)
    if (wrapped := _TEXT.fullmatch(text)) is not None:
        text = wrapped[1]
    sign, body = _unsigned(text)
    percent = body.endswith("%")
    if percent:
        body = body[:-1].removesuffix("\\").rstrip()
    value = _unsigned_value(body)
    if value is None:
        return None
    return Number(sign * value / (100 if percent else 1), percent)


def as_integer(text: str) -> int | None:
    r"""Returns the integer of a text, or None.

    A sign, dollars around the number and leading zeros are accepted. Groups of three digits may be
    separated by one mark: `,`, `{,}`, `_`, a blank or a LaTeX space. An ambiguous text such as
    `1,2` and a decimal such as `2.0` are not accepted.
    """
    sign, digits = _unsigned(text.strip().strip("$"))
    number = _natural(digits)
    return None if number is None else sign * number


def unwrapped(text: str) -> str:
    r"""Returns a text without delimiters of mathematics, bold type or `\boxed{}` around it."""
    before = None
    text = text.strip()
    while text != before:
        before = text
        while text.endswith("\\\\"):
            text = text[:-2].rstrip()
        if text.endswith(".") and text[-2:-1] != ".":
            text = text[:-1].rstrip()
        for left, right in _PAIRS:
            inner = text[len(left) : -len(right)]
            if (
                text.startswith(left)
                and text.endswith(right)
                and len(text) >= len(left) + len(right)
                and left not in inner
                and not inner.endswith("\\")
            ):
                text = inner.strip()
                break
        if (wrapped := _WRAP.fullmatch(text)) is not None:
            text = wrapped[1].strip()
    return text


def _unsigned_value(body: str) -> Fraction | None:
    """Returns the value of a number without sign and percent sign."""
    if (power := _POWER_OF_TEN.fullmatch(body)) is not None:
        mantissa, exponent = _decimal(power[1]), int(power[2] or power[3] or power[4])
        if mantissa is None or abs(exponent) > MAX_DIGITS:
            return None
        return mantissa * Fraction(10) ** exponent
    if (mixed := _MIXED.fullmatch(body)) is not None:
        return _mixed(mixed)
    if (frac := _FRAC.fullmatch(body)) is not None:
        parts = frac[1] or frac[2] or "", frac[3] or frac[4] or ""
    elif (ratio := _RATIO.fullmatch(body)) is not None:
        parts = ratio[1], ratio[2]
    else:
        return _decimal(body)
    (sign_above, above), (sign_below, below) = _unsigned(parts[0]), _unsigned(parts[1])
    top, bottom = _decimal(above), _decimal(below)
    if top is None or not bottom:
        return None
    return sign_above * sign_below * top / bottom


def _mixed(parts: re.Match[str]) -> Fraction | None:
    """Returns the value of a mixed number, or None if it could also be a product."""
    if parts[1] is not None:
        whole, frac = parts[1], _FRAC.fullmatch(f"\\frac{parts[2]}")
        if frac is None:
            return None
        above, below = frac[1] or frac[2] or "", frac[3] or frac[4] or ""
    else:
        whole, above, below = parts[3], parts[4], parts[5]
        if len(above) == 3 and len(whole) <= 3:  # 1 234/567 may mean 1234/567
            return None
    numbers = [_natural(part.strip()) for part in (whole, above, below)]
    if any(number is None for number in numbers):
        return None
    one, top, bottom = (number or 0 for number in numbers)
    return one + Fraction(top, bottom) if 0 < top < bottom else None


def _unsigned(text: str) -> tuple[int, str]:
    """Returns the sign of a number, and its text without sign and extra spaces."""
    text = text.strip().replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    text = re.sub(r"\\! *", "", text)
    text = _SPACE.sub(" ", text).strip()
    if text[:1] in ("+", "-"):
        return -1 if text[0] == "-" else 1, text[1:].lstrip()
    return 1, text


def _natural(text: str) -> int | None:
    if len(text) > MAX_DIGITS or not _MARKED.fullmatch(text):
        return None
    return int(re.sub("[,_ ]", "", text))


def _decimal(text: str) -> Fraction | None:
    """Returns the value of a decimal or a natural number without sign."""
    text = text.strip()
    point = _DECIMAL.fullmatch(text)
    if point is None:
        whole, decimals = text, ""
    else:
        whole, decimals = point[1] or ("0" if point[2] else ""), point[2]
    left, right = _natural(whole), _natural(decimals or "0")
    if left is None or right is None:
        return None
    return left + Fraction(right, 10 ** len(decimals))
