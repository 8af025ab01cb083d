r"""The form of a mathematical answer: a number, a word, a tuple, a set, an equation, a quantity.

Forms are compared before anything is evaluated. Two answers of different forms are different: a
tuple is not a set, `101_2` is not 101, and an equation is an answer only if its left side is a
single variable. If two forms agree, the caller's judge compares their values. This file reads text
and does not call a symbolic library.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from tw_jax.tasks import expressions, notation, units

Judge = Callable[[str, expressions.Tree, expressions.Tree], bool]
"""Takes a question and two trees, and returns the verdict.

The question "equal" is about two values. The question "equation" is about two equations, each given
as the difference of its sides.
"""

MAX_DEPTH = 8
"""Largest depth of nested forms that is read."""

MAX_ITEMS = 64
"""Largest number of items of a set or a tuple that is compared."""

_SPACES = re.compile(r"(?<!\\)\\[,:; ]|~|\\q?quad(?![A-Za-z])|\s")
_SIZES = re.compile(
    r"\\(?:(?:left|right)(?![A-Za-z])\.?|(?:[bB]igg?[lr]?|displaystyle|textstyle)(?![A-Za-z]))"
)
_JOINABLE = re.compile(r"[0-9A-Za-z.]")
"""Characters that would join the text before a size command if the command were just removed."""
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_JOINED = re.compile(
    r",?\s*(?:\\(?:text|textrm|mbox|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*"
)
_SYMBOLS = {
    "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{INFINITY}": r"\infty ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{UNION}": r"\cup ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
}
_NAMES = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
    "leq": "le",
    "leqslant": "le",
    "geq": "ge",
    "geqslant": "ge",
    "neq": "ne",
    "lt": "<",
    "gt": ">",
    "varnothing": "emptyset",
    "lbrace": "{",
    "rbrace": "}",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "lbrack": "[",
    "rbrack": "]",
    "degree": "^\\circ ",
}
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_PIECE = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN = frozenset(("(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil"))
_CLOSE = frozenset((")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil"))
_PAIRS = frozenset(("()", "[]", "(]", "[)", "\\{\\}", "\\langle\\rangle"))
_RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne", "\\in")
_MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_VARIABLE = re.compile(
    rf"(?:[A-Za-df-hj-z]|\\(?:{'|'.join(sorted(expressions.GREEK))}))"
    r"(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?"
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z '.-]*")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
)
_CHOICE = re.compile(r"\(?([A-J])\)?[.):]?")
_BASED = re.compile(r"([0-9A-Z]+)_(?:\{\s*([0-9]{1,2})\s*\}|([0-9]{1,2}))")
_PERCENT = re.compile(r"(?<=[0-9}])\s*(?:\\text\s*\{\s*(?:percent|\\?%)\s*\}|percent\b)")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)


class Form(NamedTuple):
    """The kind of an answer, and its parts.

    Attributes:
      kind: "number" (part: a `notation.Number`), "value" (part: one tree), "infinity" (tag: its
        sign), "word" (tag: the word), "based" (tag: base; parts: digits), "tuple" (tag: its
        brackets), "set" and "union" (unordered), "matrix" (tag: rows), "relation" (tag: signs;
        parts: sides), "quantity" (tag: unit; part: the form without its unit) or "text", which is
        equal only to the same text.
      parts: The forms inside this one, or the content that `kind` names.
      tag: Text that must be equal in addition to the parts.
      text: The text of the answer after `tidied`.
    """

    kind: str
    parts: tuple[Any, ...] = ()
    tag: str = ""
    text: str = ""


def read(text: str) -> Form:
    """Returns the form of an answer. If no other kind fits, the kind is "text"."""
    return _read(tidied(text), 0)


def equal(answer: Form, truth: Form, judge: Judge) -> bool:
    """Returns whether two forms are equal.

    Args:
      answer: The form of the response's answer.
      truth: The form of the correct answer.
      judge: Compares values that are not numbers. It is called only if the forms agree.
    """
    if answer.text and answer.text == truth.text:
        return True
    if truth.kind == answer.kind == "word" and truth.parts and answer.parts:
        return truth.parts == answer.parts
    if truth.kind == "word" and answer.text.casefold() == truth.tag:
        return True
    if truth.kind == "relation" or answer.kind == "relation":
        return _relations_equal(answer, truth, judge)
    if truth.kind == "quantity" or answer.kind == "quantity":
        return _quantities_equal(answer, truth, judge)
    kinds = {answer.kind, truth.kind}
    if kinds == {"number"}:
        return notation.equal(answer.parts[0], truth.parts[0])
    if kinds <= {"number", "value"}:
        return _values_equal(answer, truth, judge)
    if len(kinds) > 1 or answer.tag != truth.tag:
        return False
    if truth.kind == "infinity" or truth.kind == "word":
        return True
    if truth.kind == "based":
        return answer.parts == truth.parts
    if truth.kind in ("set", "union"):
        return _sets_equal(answer.parts, truth.parts, judge)
    if truth.kind in ("tuple", "matrix"):
        return _all_equal(answer.parts, truth.parts, judge)
    return False


def tidied(text: str) -> str:
    """Returns a text without delimiters, sizes and extra spaces, and with one name per symbol."""
    text = text.translate(str.maketrans(_SYMBOLS))
    text = notation.unwrapped(text)
    text = re.sub(r"\\!\s*", "", text).replace("{,}", ",")
    text = _SIZES.sub(lambda m: " " if _JOINABLE.match(text, m.end()) else "", text)
    text = _COMMAND.sub(lambda m: _renamed(m[1]), text)
    text = _SPACES.sub(" ", text)
    text = _PERCENT.sub(r"\\%", text)
    return notation.unwrapped(" ".join(text.split()))


def _renamed(name: str) -> str:
    new = _NAMES.get(name, name)
    if new in ("{", "}"):
        return f"\\{new}"
    return new if not new[:1].isalpha() else f"\\{new}"


def _read(text: str, depth: int) -> Form:
    if not text or depth > MAX_DEPTH:
        return Form("text", text=text)
    number = notation.read(text)
    if number is not None:
        return Form("number", (number,), text=text)
    for reader in (_word, _based, _list, _relation, _union, _matrix, _bracketed, _two_signs):
        form = reader(text, depth)
        if form is not None:
            return form._replace(text=text)
    return _value(text, depth)._replace(text=text)


def _word(text: str, depth: int) -> Form | None:
    is_text = _TEXT.fullmatch(text)
    inner = is_text[1].strip() if is_text else text
    choice = _CHOICE.fullmatch(inner)
    if choice is not None and (is_text or inner != choice[1] or depth == 0):
        return Form("word", tag=choice[1])
    if _WORDS.fullmatch(inner) and (is_text or re.search("[A-Za-z]{3}", inner)):
        is_longer = is_text or re.search("[A-Za-z]{4}", inner)
        if not is_text and depth == 0 and _JOINED.search(inner):
            return None
        if not is_longer and re.search("['-]", inner):
            return None  # abc - d
        # Three letters may be a product of variables, and the case of a variable matters.
        letters = (inner,) if not is_longer and inner.casefold() != "yes" else ()
        return Form("word", letters, " ".join(inner.casefold().split()).rstrip("."))
    if inner.casefold() in ("yes", "no"):
        return Form("word", tag=inner.casefold())
    return None


def _based(text: str, depth: int) -> Form | None:
    found = _BASED.fullmatch(text)
    if found is None or not any(c.isdigit() for c in found[1]):
        return None
    base = int(found[2] or found[3])
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in found[1]):
        return Form("text")
    if base == 10:
        return _read(found[1], depth + 1)
    return Form("based", (found[1].lstrip("0") or "0",), str(base))


def _list(text: str, depth: int) -> Form | None:
    """Reads several answers in any order: `1, 2`, `1 and 2`, `x = 1 or x = 2`."""
    parts = [notation.unwrapped(part) for part in _split(_JOINED.sub(",", text), {",", ";"})]
    if len(parts) < 2:
        return None
    if any(not part for part in parts) or len(parts) > MAX_ITEMS:
        return Form("text")
    sides = [_split(part, set(_RELATIONS)) for part in parts]
    if len(sides[0]) == 2 and all(len(side) == 1 for side in sides[1:]):  # x = 1, 2
        first = _read(parts[0], depth + 1)
        if not _is_assignment(first):
            return Form("text")
        items = (first.parts[1], *(_read(part, depth + 1) for part in parts[1:]))
        return Form("relation", (first.parts[0], _set(items)), "=")
    items = tuple(_read(part, depth + 1) for part in parts)
    if all(map(_is_assignment, items)) and len({item.parts[0].text for item in items}) == 1:
        return Form("relation", (items[0].parts[0], _set([i.parts[1] for i in items])), "=")
    return _set(items)


def _relation(text: str, depth: int) -> Form | None:
    signs: list[str] = []
    sides = _split(text, set(_RELATIONS), signs)
    if len(sides) < 2:
        return None
    if any(not side for side in sides) or len(sides) > 3:
        return Form("text")
    if len(sides) == 3 and ("=" in signs or "\\in" in signs or "\\ne" in signs):
        return Form("text")  # a chain of equations is a calculation and not an answer
    parts = tuple(_read(side, depth + 1) for side in sides)
    if signs == ["\\in"]:
        if not _VARIABLE.fullmatch(sides[0]) or parts[1].kind in ("number", "value", "infinity"):
            return Form("text")
        signs = ["="]
    return Form("relation", parts, " ".join(signs))


def _union(text: str, depth: int) -> Form | None:
    parts = _split(text, {"\\cup"})
    if len(parts) < 2:
        return None
    return Form("union", tuple(_read(part, depth + 1) for part in parts))


def _matrix(text: str, depth: int) -> Form | None:
    found = _MATRIX.fullmatch(text)
    if found is None or "\\begin" in found[2]:
        return None
    body = re.sub(r"\\\\\s*$", "", found[2].strip())
    rows = [row.split("&") for row in re.split(r"\\\\", body)]
    if len({len(row) for row in rows}) != 1:
        return Form("text")
    cells = tuple(_read(cell.strip(), depth + 1) for row in rows for cell in row)
    return Form("matrix", cells, f"{len(rows)} rows")


def _bracketed(text: str, depth: int) -> Form | None:
    if text == "\\emptyset":
        return Form("set")
    pieces = _PIECE.findall(text)
    left, right = pieces[0], pieces[-1]
    if left not in _OPEN or right not in _CLOSE or left in ("\\lfloor", "\\lceil"):
        return None
    nesting = 0
    for at, piece in enumerate(pieces):
        nesting += (piece in _OPEN) - (piece in _CLOSE)
        if nesting == 0 and at < len(pieces) - 1:
            return None
    inner = text[len(left) : -len(right)].strip()
    if left == "{" and right == "}":
        return _read(inner, depth + 1)
    if left == "\\{" and right == "\\}" and not inner:
        return Form("set")
    items = _split(inner, {",", ";"})
    if not all(items) or len(items) > MAX_ITEMS or left + right not in _PAIRS:
        return Form("text")
    if left == "\\{":
        return _set([_read(item, depth + 1) for item in items])
    if len(items) == 1:
        return _read(inner, depth + 1) if (left, right) == ("(", ")") else None
    parts = tuple(_read(item, depth + 1) for item in items)
    return Form("tuple", parts, left + right)


def _two_signs(text: str, depth: int) -> Form | None:
    r"""Returns the set of both values of a `\pm`."""
    signs = len(_PLUS_MINUS.findall(text))
    if not signs:
        return None
    if signs > 1 or "\\mp" in text:
        return Form("text")
    return _set([_read(_PLUS_MINUS.sub(sign, text).strip(), depth + 1) for sign in "+-"])


def _value(text: str, depth: int) -> Form:
    body, unit = units.split(text)
    if unit:
        measured = _read(body, depth + 1)
        is_angle = unit.startswith(units.DEGREE) and measured.kind == "value"
        is_percentage = measured.kind == "number" and measured.parts[0].is_percentage
        if measured.kind == "quantity" or is_percentage:
            return Form("text")  # 5 cm cm
        if is_angle and expressions.has_function(measured.parts[0]):
            return Form("text")  # the unit may belong to the function's argument
        return Form("quantity", (measured,), unit)
    sign, infinite = ("-", text[1:].strip()) if text[0] == "-" else ("+", text.lstrip("+ "))
    if infinite == "\\infty":
        return Form("infinity", tag=sign)
    try:
        return Form("value", (expressions.read(_REPEATING.sub(_repeated, text)),))
    except expressions.UnreadableError:
        return Form("text")


def _repeated(found: re.Match[str]) -> str:
    r"""Returns the fraction of a repeating decimal such as `0.1\overline{6}`."""
    whole, fixed, cycle = found[1], found[2], found[3]
    below = (10 ** len(cycle) - 1) * 10 ** len(fixed)
    above = int((whole + fixed or "0") + cycle) - int(whole + fixed or "0")
    return rf"(\frac{{{above}}}{{{below}}})"


def _split(text: str, marks: set[str], found: list[str] | None = None) -> list[str]:
    """Splits a text at the marks outside of all brackets, and adds the marks to `found`."""
    parts, nesting = [""], 0
    for piece in _PIECE.findall(text):
        nesting += (piece in _OPEN) - (piece in _CLOSE)
        if nesting == 0 and piece in marks:
            parts.append("")
            if found is not None:
                found.append(piece)
        else:
            parts[-1] += piece
    return [part.strip() for part in parts]


def _set(items: Any) -> Form:
    """Returns a set of forms. The two values of a plus-minus sign become items of their own."""
    flat: list[Form] = []
    for item in items:
        is_two = item.kind == "set" and _PLUS_MINUS.search(item.text)
        flat += item.parts if is_two else (item,)
    return Form("set", tuple(flat), text="")


def _is_assignment(form: Form) -> bool:
    return (
        form.kind == "relation"
        and form.tag == "="
        and len(form.parts) == 2
        and _VARIABLE.fullmatch(form.parts[0].text) is not None
        and form.parts[1].kind != "relation"
        and not _symbols(form.parts[0]) & _symbols(form.parts[1])  # x = 2x + 3 gives no value
    )


def _symbols(form: Form) -> set[str]:
    """Returns the names of the variables in the values of a form."""
    if form.kind == "value":
        return expressions.symbols(form.parts[0])
    return set().union(*(_symbols(part) for part in form.parts if isinstance(part, Form)))


def _quantities_equal(answer: Form, truth: Form, judge: Judge) -> bool:
    """Compares units if the truth has one. If it has none, any unit of the table is accepted."""
    if answer.kind != "quantity":
        return False
    if truth.kind == "quantity":
        return answer.tag == truth.tag and equal(answer.parts[0], truth.parts[0], judge)
    # pi degrees are not pi, so only a plain number may be given with a unit.
    if truth.kind != "number" or not units.is_known(answer.tag):
        return False
    return equal(answer.parts[0], truth, judge)


def _relations_equal(answer: Form, truth: Form, judge: Judge) -> bool:
    if truth.kind != "relation":
        return _is_assignment(answer) and equal(answer.parts[1], truth, judge)
    if _is_assignment(truth):
        if answer.kind != "relation":
            return equal(answer, truth.parts[1], judge)
        same = _is_assignment(answer) and answer.parts[0].text == truth.parts[0].text
        return same and equal(answer.parts[1], truth.parts[1], judge)
    if answer.kind != "relation":
        return False
    if answer.tag == truth.tag and _all_equal(answer.parts, truth.parts, judge):
        return True
    if " " not in truth.tag and "=" == truth.tag == answer.tag:
        return _equations_equal(answer, truth, judge)
    mirrored = " ".join(_MIRRORED[sign] for sign in reversed(answer.tag.split()))
    return mirrored == truth.tag and _all_equal(answer.parts[::-1], truth.parts, judge)


def _equations_equal(answer: Form, truth: Form, judge: Judge) -> bool:
    """Returns whether the difference of sides of one is a multiple of that of the other."""
    differences = []
    for form in (answer, truth):
        sides = [_tree(part) for part in form.parts]
        if None in sides:
            return False
        difference = ("+", sides[0], ("neg", sides[1]))
        if not expressions.symbols(difference):
            return False  # 6 = 5 has no variable
        differences.append(difference)
    return judge("equation", differences[0], differences[1])


def _values_equal(answer: Form, truth: Form, judge: Judge) -> bool:
    given, true = _tree(answer), _tree(truth)
    if given is None or true is None:
        return False  # a percentage is compared with numbers only
    if truth.kind == "number" and expressions.is_unfinished(given):
        return False
    if expressions.symbols(given) != expressions.symbols(true):
        return False
    return given == true or judge("equal", given, true)


def _tree(form: Form) -> expressions.Tree | None:
    if form.kind == "number":
        number = form.parts[0]
        return None if number.is_percentage else ("num", number.value)
    return form.parts[0] if form.kind == "value" else None


def _all_equal(answer: tuple[Form, ...], truth: tuple[Form, ...], judge: Judge) -> bool:
    same = len(answer) == len(truth)
    return same and all(_item_equal(a, t, judge) for a, t in zip(answer, truth, strict=True))


def _item_equal(answer: Form, truth: Form, judge: Judge) -> bool:
    """Compares as `equal` does, but a relation or a quantity matches only its own kind."""
    alike = all((answer.kind == kind) == (truth.kind == kind) for kind in ("relation", "quantity"))
    return alike and equal(answer, truth, judge)


def _sets_equal(answer: tuple[Form, ...], truth: tuple[Form, ...], judge: Judge) -> bool:
    """Returns whether both have the same items, in any order."""
    if len(answer) > MAX_ITEMS or len(truth) > MAX_ITEMS:
        return False
    return all(any(_item_equal(a, t, judge) for a in answer) for t in truth) and all(
        any(_item_equal(a, t, judge) for t in truth) for a in answer
    )
