r"""Final answers: where they stand in a response, and when two of them are equal.

There are two modes. "number" wants one number in a listed notation and compares exact rationals; it
never evaluates anything. "mathematics" compares forms (`tasks/forms.py`) and leaves expressions to
`tasks/mathematics.py`, which may hang and is called from worker processes alone.
docs/answers.md has the rules of both, with examples.
"""

from __future__ import annotations

import re
from typing import Literal, NoReturn

from tw_jax.tasks import expressions, forms, notation

Where = Literal["after_thinking", "anywhere"]
"""Which part of a response may hold the answer; see `final_answer`."""

Mode = Literal["number", "mathematics"]
"""What counts as an equal answer; see docs/answers.md."""

MAX_SYMBOLIC = 1000
"""Longest answer, in characters, that is worth a symbolic comparison."""

_BOX = "\\boxed"
_THINK_END = re.compile(r"</[tT]hink>")
_GIANT = re.compile(
    r"\^[\s{(]*-?[0-9]{5,}"  # a long exponent
    r"|\^[\s{(]*[0-9]{2,}[\s}]*\^"  # an exponent of two digits that is itself raised
    r"|\^[\s{(]*[0-9]+[\s}]*\^[\s{(]*[0-9]{2,}"  # or that is raised to such a one
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


def check_truth(truth: str, mode: Mode) -> None:
    """Refuses a right answer that no answer could equal in a mode.

    Raises:
      ValueError: In mode "number", if the truth is not a number; in either mode, if it is empty.
    """
    if not truth.strip():
        raise ValueError("The truth is empty. Every problem that is graded needs a known answer.")
    if mode == "number" and notation.read(truth) is None:
        shown = truth if len(truth) <= 80 else truth[:80] + "..."
        raise ValueError(
            f"The truth {shown!r} is not a number, and Grader.mode = 'number' compares numbers "
            "only. Correct the problem, or set Grader.mode to 'mathematics'."
        )


def exactly_equal(answer: str, truth: str, mode: Mode) -> bool | None:
    """Whether two answers are equal, or None where that takes symbolic work.

    Mode "number" always decides. In mode "mathematics" numbers, words and answers of different
    forms are decided here, and so are texts too long, or with powers and factorials that nobody
    should write out: they equal their own text only.

    Raises:
      ValueError: As `check_truth`.
    """
    check_truth(truth, mode)
    given, wanted = notation.read(answer), notation.read(truth)
    if given is not None and wanted is not None:
        return notation.equal(given, wanted)
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
    """A comparison has come to two expressions."""


def _undecided(question: str, answer: expressions.Tree, truth: expressions.Tree) -> NoReturn:
    raise _Undecided
