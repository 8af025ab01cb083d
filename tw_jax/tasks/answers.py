r"""Final answers: where they stand in a response, and when two of them are equal.

Equality never passes through a float. Integers, fractions and decimals are compared exactly, and
that verdict is final; only what is none of these goes to math-verify, which is slow, may hang and
may ask for any amount of memory. It is called from the worker processes of `tasks/grader.py` alone,
and reads LaTeX through a grammar: nothing that a model wrote is ever evaluated as Python.

This file knows no task and no process; it hands on answers and whether they are equal.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from typing import Literal

Where = Literal["after_thinking", "anywhere"]
"""Which part of a response may hold the answer; see `final_answer`."""

Verdict = Literal["correct", "wrong", "no_answer", "timeout"]
"""What grading says. "timeout" is no verdict on the answer: the comparison was not finished."""

MAX_DIGITS = 4000
"""Longest number read exactly; Python itself refuses to convert more than 4300 digits."""

MAX_SYMBOLIC = 1000
"""Longest answer, in characters, that is worth a symbolic comparison."""

_BOX = "\\boxed"
_THINK_END = re.compile(r"</[tT]hink>")
_SPACE = re.compile(r"\\[,:; ]|~")
_LOOSE_BLANK = re.compile(r"(?<!\w) | (?!\w)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"(?=.*[a-z]{3})[a-z][a-z .'-]*", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+|[0-9]{1,3}(?:(?P<mark>[,_ ])[0-9]{3})(?:(?P=mark)[0-9]{3})*")
_DECIMAL = re.compile(r"(.*?)\.([0-9]*)")
_RATIO = re.compile(r"([^/{}\\]+)/([^/{}\\]+)")
_FRAC = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_GIANT = re.compile(
    r"\^[\s{(]*-?[0-9]{5,}"  # a long exponent
    r"|\^[\s{(]*[0-9]{2,}[\s})]*\^"  # an exponent of two digits that is itself raised
    r"|\^[\s{(]*[0-9]+[\s})]*\^[\s{(]*[0-9]{2,}"  # or that is raised to such a one
    r"|[0-9]{5,}[\s})]*!"
)


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` with balanced braces; None if there is none.

    A backslash escapes the brace after it. If the last box is cut off, no earlier one is taken in
    its place: a response that ends inside its answer has not answered.
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    at = start + len(_BOX)
    at += len(text[at:]) - len(text[at:].lstrip())
    if not text.startswith("{", at):
        return None
    depth, first = 0, at + 1
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[first:at].strip()
        at += 1
    return None


def final_answer(response: str, *, where: Where) -> str | None:
    r"""The answer a response gives; None if it gives none, or an empty one.

    Args:
      response: the model's text without the prompt, for a box in the question is no answer.
      where: "after_thinking" wants `</think>` and reads what stands between the first and the
        second one; "anywhere" reads all, so that a box inside a thread or an unfinished thought
        counts. ThreadWeaver's evaluation does the former, its reinforcement learning the latter.
    """
    if where == "after_thinking":
        parts = _THINK_END.split(response, maxsplit=2)
        return (last_boxed(parts[1]) or None) if len(parts) > 1 else None
    return last_boxed(response) or None


def as_integer(text: str) -> int | None:
    r"""The integer that a text writes, or None.

    Read are a sign, dollars around the whole, leading zeros, and groups of three digits parted
    throughout by one mark: `,`, `{,}`, `_`, a blank or a LaTeX space. What is ambiguous, as `1,2`,
    or not an integer in form, as `2.0`, is not read.
    """
    sign, digits = _unsigned(text)
    number = _natural(digits)
    return None if number is None else sign * number


def as_fraction(text: str) -> Fraction | None:
    r"""The rational number that a text writes, exactly, or None.

    Read are integers as in `as_integer`, decimals (`-.5`, `1,234.50`), and `a/b` and `\frac{a}{b}`
    with such numbers, with a sign before the whole.
    """
    sign, body = _unsigned(text)
    if (frac := _FRAC.fullmatch(body)) is not None:
        parts = frac[1] or frac[2] or "", frac[3] or frac[4] or ""
    elif (ratio := _RATIO.fullmatch(body)) is not None:
        parts = ratio[1], ratio[2]
    else:
        number = _decimal(body)
        return None if number is None else sign * number
    (sign_above, above), (sign_below, below) = _unsigned(parts[0]), _unsigned(parts[1])
    top, bottom = _decimal(above), _decimal(below)
    if top is None or not bottom:
        return None
    return sign * sign_above * sign_below * top / bottom


def exactly_equal(answer: str, truth: str) -> bool | None:
    """Whether two answers are equal, or None where that takes symbolic work.

    Decided are: any two numbers that `as_fraction` reads, so that a rounded decimal is not the
    fraction it stands for; equal texts; a truth in words, letter case aside; answers too long, and
    powers or factorials that nobody should write out, which are equal to their own text only.
    """
    numbers = as_fraction(answer), as_fraction(truth)
    if None not in numbers:
        return numbers[0] == numbers[1]
    given, wanted = _tidy(answer), _tidy(truth)
    if given == wanted:
        return given != ""
    if _WORDS.fullmatch(wanted):  # a symbolic reader takes them for products: cat = act
        return given.casefold() == wanted.casefold()
    if not (given and wanted) or len(given) > MAX_SYMBOLIC or _GIANT.search(given):
        return False
    return None


def symbolically_equal(answer: str, truth: str) -> bool:
    """Whether math-verify takes two answers for equal. May run for ever: see `tasks/grader.py`.

    Only its LaTeX grammar is used; its reader of plain expressions ends in Python's `eval`.

    Raises:
      Exception: whatever sympy raises on a strange answer, MemoryError among it.
    """
    import math_verify  # slow to import, and needed in worker processes only

    # Without a time limit of its own it works off the main thread, and warns about that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    target = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        return math_verify.parse(
            f"\\boxed{{{text}}}",
            target,
            fallback_mode="no_fallback",
            parsing_timeout=0,
            raise_on_error=True,
        )

    return bool(
        math_verify.verify(read(truth), read(answer), timeout_seconds=0, raise_on_error=True)
    )


def _tidy(text: str) -> str:
    r"""The text without `\text{}`, dollars around it, and blanks that part no two words."""
    text = _TEXT.sub(r"\1", text.strip().strip("$"))
    return _LOOSE_BLANK.sub("", " ".join(text.split()))


def _unsigned(text: str) -> tuple[int, str]:
    """The sign of a number, and its text without sign, dollars and odd spaces."""
    text = text.strip().strip("$").strip()
    text = text.replace("\N{MINUS SIGN}", "-").replace("\\!", "").replace("{,}", ",")
    text = _SPACE.sub(" ", text)
    if text[:1] in ("+", "-"):
        return -1 if text[0] == "-" else 1, text[1:].lstrip()
    return 1, text


def _natural(text: str) -> int | None:
    if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text):
        return None
    return int(re.sub("[,_ ]", "", text))


def _decimal(text: str) -> Fraction | None:
    """A number without sign and fraction bar."""
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
