r"""Final answers: extraction from a response, and equality of two answers.

There are two modes. In mode "number" an answer must be one number in a listed notation, and exact
rationals are compared; nothing is evaluated. In mode "mathematics" forms are compared
(`tasks/forms.py`). Expressions are compared by `tasks/mathematics.py`, which may hang, so only
worker processes call it. docs/answers.md has the rules of both modes, with examples.
"""

from __future__ import annotations

import re
from typing import Literal, NoReturn

from tw_jax.tasks import expressions, forms, notation

Where = Literal["after_thinking", "anywhere"]
"""Which part of a response may hold the answer; see `final_answer`."""

Mode = Literal["number", "mathematics"]
"""Rules of equality; see docs/answers.md."""

MAX_SYMBOLIC = 1000
"""Longest answer, in characters, that is compared symbolically."""

_BOX = "\\boxed"
_THINK_END = re.compile(r"</[tT]hink>")
_GIANT = re.compile(
    r"\^[\s{(]*-?[0-9]{5,}"  # a long exponent
    r"|\^[\s{(]*[0-9]{2,}[\s}]*\^"  # an exponent of two digits that has an exponent
    r"|\^[\s{(]*[0-9]+[\s}]*\^[\s{(]*[0-9]{2,}"  # or whose exponent has two digits
    r"|[0-9]{5,}[\s})]*!"
)


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` with balanced braces, or None.

    A backslash escapes the brace after it. If the last box is cut off, the result is None, even if
    there is an earlier box, because a response that ends inside its answer gives no answer.
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
    r"""Returns the answer of a response, or None if there is no answer or an empty one.

    Args:
      response: The model's text without the prompt, because a box in the question is not an answer.
      where: "after_thinking" reads the text between the first and the second `</think>`; without
        `</think>` there is no answer. "anywhere" reads all of the text, so that a box inside a
        thread or an unfinished thought counts. ThreadWeaver's evaluation uses the former, and its
        reinforcement learning uses the latter.
    """
    if where == "after_thinking":
        parts = _THINK_END.split(response, maxsplit=2)
        return (last_boxed(parts[1]) or None) if len(parts) > 1 else None
    return last_boxed(response) or None


def check_truth(truth: str, mode: Mode) -> None:
    """Refuses a truth that no answer can equal in a mode.

    Raises:
      ValueError: If the truth is empty, or if it is not a number in mode "number".
    """
    if not truth.strip():
        raise ValueError("The truth is empty. Every problem that is graded needs an answer.")
    if mode == "number" and notation.read(truth) is None:
        shown = truth if len(truth) <= 80 else truth[:80] + "..."
        raise ValueError(
            f"The truth {shown!r} is not a number, and Grader.mode = 'number' compares numbers "
            "only. Correct the problem, or set Grader.mode to 'mathematics'."
        )


def exactly_equal(answer: str, truth: str, mode: Mode) -> bool | None:
    """Returns whether two answers are equal, or None if this needs symbolic work.

    Mode "number" never returns None. In mode "mathematics" numbers, words and answers of different
    forms are decided here. An answer that is too long, or that has a power or a factorial too large
    to compute, is equal only to the same text.

    Raises:
      ValueError: If `check_truth` refuses the truth.
    """
    check_truth(truth, mode)
    number, true_number = notation.read(answer), notation.read(truth)
    if number is not None and true_number is not None:
        return notation.equal(number, true_number)
    if mode == "number":
        return False
    if len(answer) > MAX_SYMBOLIC:
        return answer.strip() == truth.strip()
    form = forms.read(answer)
    if _GIANT.search(form.text):
        return form.text == forms.tidied(truth)
    try:
        return forms.equal(form, forms.read(truth), _undecided)
    except _Undecided:
        return None


class _Undecided(Exception):
    """Raised when two expressions must be compared."""


def _undecided(question: str, answer: expressions.Tree, truth: expressions.Tree) -> NoReturn:
    raise _Undecided
