r"""Expressions with one value: LaTeX text to a tree, by a small and strict grammar.

math-verify is too permissive: it adds numbers that are side by side (`2(3)` is 5), drops primes and
units, and ignores case. Therefore it never gets a model's text directly. This grammar reads an
expression first, refuses ambiguous and unknown notation, and writes the expression again with
explicit products and brackets. Nothing is evaluated.

A tree is a tuple: ("num", Fraction), ("sym", name), ("const", name), ("neg", a), ("+", a, b),
("*", a, b), ("/", a, b), ("^", a, b), ("!", a), ("root", degree, a), ("binom", a, b),
("fn", name, a), ("log", base, a), ("abs", a), ("floor", a) or ("ceil", a).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]

MAX_DEPTH = 40
"""Largest depth of nesting that is read."""

_TOKEN = re.compile(
    r"\s+|(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(?P<command>\\[A-Za-z]+)|(?P<letters>[A-Za-z]+)"
    r"|(?P<mark>[-+*/^_(){}\[\]|!])"
)
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho "
    "sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
)
_FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh exp ln log"
_OTHER_NAMES = "lcm gcd max min mod det inf sup lim arg deg sgn abs sqrt pi"
GREEK = frozenset(_GREEK_NAMES.split())
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_NAMES = _FUNCTIONS | frozenset(_OTHER_NAMES.split())
LOG_BASE = "b_{log}"
"""The variable for the base of `\\log` without a subscript."""
_TIMES = ("*", "\\cdot", "\\times")
_CALLED = frozenset("fghFGHP")
_BRACKETS = {"(": ")", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}


class UnreadableError(ValueError):
    """Raised for a text that the grammar refuses. Such a text is equal only to the same text."""


def read(text: str) -> Tree:
    """Returns the tree of an expression.

    Raises:
      UnreadableError: If the text is ambiguous or outside of the grammar.
    """
    reader = _Reader(text)
    tree = reader.sum(0)
    if reader.peek():
        raise UnreadableError(text)
    return tree


def is_unfinished(tree: Tree) -> bool:
    """Returns whether arithmetic of literal numbers is left, as in `416*607` or `1+1`.

    Powers, factorials, roots and binomials count as finished. A fraction of two integers is a
    number.
    """
    if tree[0] in ("+", "*", "/"):
        terms = _terms(tree, tree[0])
        if sum(map(_is_literal, terms)) > 1 and not _is_fraction(tree):
            return True
        if tree[0] == "+" and len(set(terms)) < len(terms):
            return True  # i and -i are equal terms here, as in 607 + i - i
    return any(is_unfinished(part) for part in tree[1:] if isinstance(part, tuple))


def render(tree: Tree, names: dict[str, str]) -> str:
    """Returns the LaTeX of a tree, with explicit products and brackets.

    Args:
      tree: The expression.
      names: LaTeX of each variable and constant. Names that are missing are written unchanged.
    """
    kind, *parts = tree
    if kind == "num":
        value: Fraction = parts[0]
        if value.denominator == 1:
            return f"{value.numerator}"
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    if kind in ("sym", "const"):
        return names.get(str(parts[0]), str(parts[0]))
    inner = [render(part, names) for part in (tree[2:] if kind == "fn" else parts)]
    if kind == "fn":
        return rf"(\{parts[0]}{{({inner[0]})}})"
    if kind == "log":
        return rf"(\log_{{{inner[0]}}}{{({inner[1]})}})"
    # math-verify parses nested brackets slowly, so only necessary brackets are written.
    if kind == "+":
        return f"{inner[0]}{inner[1]}" if parts[1][0] == "neg" else f"{inner[0]}+{inner[1]}"
    if kind in ("*", "neg"):
        weak = ("+", "neg")
        inner = [f"({i})" if p[0] in weak else i for i, p in zip(inner, parts, strict=True)]
        return rf"{inner[0]} \cdot {inner[1]}" if kind == "*" else f"-{inner[0]}"
    if kind in ("^", "!"):
        is_simple = parts[0][0] == "sym" or (parts[0][0] == "num" and inner[0].isdigit())
        base = inner[0] if is_simple else f"({inner[0]})"
        return f"{base}!" if kind == "!" else f"{base}^{{{inner[1]}}}"
    forms = {
        "/": r"\frac{{{0}}}{{{1}}}",
        "root": r"\sqrt[{0}]{{{1}}}",
        "binom": r"\binom{{{0}}}{{{1}}}",
        "abs": "|({0})|",
        "floor": r"\lfloor {0} \rfloor",
        "ceil": r"\lceil {0} \rceil",
    }
    return forms[kind].format(*inner)


def has_function(tree: Tree) -> bool:
    """Returns whether a tree contains a function or a logarithm."""
    inner = (part for part in tree[1:] if isinstance(part, tuple))
    return tree[0] in ("fn", "log") or any(map(has_function, inner))


def symbols(tree: Tree) -> set[str]:
    """Returns the names of the variables in a tree, without `LOG_BASE`."""
    if tree[0] == "sym":
        return {tree[1]} - {LOG_BASE}
    return set().union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))


def _terms(tree: Tree, kind: str) -> list[Tree]:
    """Returns the terms of a sum, or the factors of a chain of products and quotients."""
    kinds = ("+",) if kind == "+" else ("*", "/")
    if tree[0] == "neg":
        return _terms(tree[1], kind)
    if tree[0] not in kinds or _is_fraction(tree):
        return [tree]
    return _terms(tree[1], kind) + _terms(tree[2], kind)


def _is_fraction(tree: Tree) -> bool:
    """Returns whether a tree is a literal number divided by another."""
    signed = [part[1] if part[0] == "neg" else part for part in tree[1:]] if tree[0] == "/" else []
    return bool(signed) and all(part[0] == "num" for part in signed)


def _is_literal(tree: Tree) -> bool:
    """Returns whether a tree is a literal number, or one in a trivial operation such as `5^1`."""
    kind, *parts = tree
    if kind in ("neg", "abs", "floor", "ceil"):
        return _is_literal(parts[0])
    if kind == "^":
        trivial = (Fraction(0), Fraction(1))
        does_nothing = _written(parts[1]) in trivial or _written(parts[0]) in trivial
        return does_nothing and _is_literal(parts[0])
    if kind == "root":  # the root of a power with the same exponent
        power = parts[1]
        return power[0] == "^" and power[2] == parts[0] and _is_literal(power[1])
    if kind == "binom":
        above, below = map(_written, parts)
        return above is not None and below in (0, 1, above - 1, above)
    if kind == "!":
        return parts[0][0] == "num" and parts[0][1] <= 2
    if kind in ("fn", "log"):  # the logarithm of a power of its own base
        base = ("const", "e") if kind == "fn" and parts[0] == "ln" else parts[0]
        power = parts[1]
        return power[0] == "^" and power[1] == base and _is_literal(power[2])
    return _written(tree) is not None


def _written(tree: Tree) -> Fraction | None:
    """Returns the value of a literal number or a fraction of two, and None for other trees."""
    if tree[0] == "neg":
        value = _written(tree[1])
        return None if value is None else -value
    if _is_fraction(tree):
        above, below = _written(tree[1]), _written(tree[2])
        return above / below if above is not None and below else None
    return tree[1] if tree[0] == "num" else None


class _Reader:
    """Recursive descent parser of one text."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise UnreadableError(text)
            at = found.end()
            if found.lastgroup == "letters":
                letters = found["letters"]
                if len(letters) > 3 or letters in _NAMES:
                    raise UnreadableError(text)
                self._tokens += [("letter", letter) for letter in letters]
            elif found.lastgroup is not None:
                self._tokens.append((found.lastgroup, str(found[0])))

    def peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def kind(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise self.unreadable()
        self._at += 1
        return token

    def unreadable(self) -> UnreadableError:
        return UnreadableError(self._text)

    def sum(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise self.unreadable()
        sign = self.take() if self.peek() in ("+", "-") else ""
        tree = self.product(depth)
        tree = ("neg", tree) if sign == "-" else tree
        while self.peek() in ("+", "-"):
            sign = self.take()
            term = self.product(depth)
            tree = ("+", tree, ("neg", term) if sign == "-" else term)
        return tree

    def product(self, depth: int) -> Tree:
        tree, is_slashed = self.factor(depth), False
        last = tree
        while True:
            token = self.peek()
            if token in _TIMES or token in ("/", "\\div"):
                self.take()
                sign = self.take() if self.peek() == "-" else ""
                last = self.factor(depth)
                factor = ("neg", last) if sign else last
                if token == "\\div":  # a calculation, where / writes a fraction
                    tree = ("*", tree, ("/", ("num", Fraction(1)), factor))
                else:
                    tree = ("*" if token in _TIMES else "/", tree, factor)
                is_slashed = token == "/" or token == "\\div"
            elif self.begins_factor():
                # 1/2x may be x/2 or 1/(2x), and two numbers side by side are not a product.
                if is_slashed or self.kind() == "number":
                    raise self.unreadable()
                tree = last = self.beside(tree, last, depth)
            else:
                return tree

    def beside(self, left: Tree, last: Tree, depth: int) -> Tree:
        """Returns the product, or the mixed number, of factors side by side.

        Args:
          left: The product so far.
          last: Its last factor.
          depth: Depth of nesting.
        """
        token, called = self.peek(), self._tokens[self._at - 1]
        is_number = last[0] == "num" and called[1] != ")"
        if token == "(" and called[0] == "letter" and called[1] in _CALLED:
            raise self.unreadable()  # f(x) is not a product
        right = self.factor(depth)
        if self._tokens[self._at - 1][1] == "}" and self.kind() == "number":
            raise self.unreadable()
        core = right[1] if right[0] in ("^", "!") else right
        plain = core[0] == "/" and all(part[0] == "num" for part in core[1:])
        if is_number and token == "\\frac" and plain:
            if left is not last or right is not core:  # 3 \cdot 2\frac12, 2\frac12^2
                raise self.unreadable()
            whole, (above, below) = left[1], (right[1][1], right[2][1])
            if whole.denominator == above.denominator == below.denominator == 1 and above < below:
                return ("num", whole + above / below)
            raise self.unreadable()
        return ("*", left, right)

    def begins_factor(self) -> bool:
        token, kind = self.peek(), self.kind()
        if kind == "command":
            name = token[1:]
            return name in GREEK | _FUNCTIONS or token in (
                "\\frac",
                "\\sqrt",
                "\\binom",
                "\\pi",
                "\\lfloor",
                "\\lceil",
            )
        return kind in ("number", "letter") or token == "("

    def factor(self, depth: int) -> Tree:
        """Reads an atom with its factorial and its exponent."""
        tree = self.atom(depth + 1)
        if self.peek() == "!":
            self.take()
            tree = ("!", tree)
            if self.peek() == "!":
                raise self.unreadable()  # n!! is not the factorial of n!
        if self.peek() == "^":
            self.take()
            tree = ("^", tree, self.exponent(depth))
            if _written(tree[1]) == _written(tree[2]) == 0:
                raise self.unreadable()  # 0^0 is either 1 or undefined
            if self.peek() in ("^", "!", "_"):
                raise self.unreadable()
        if self.peek() == "_":
            raise self.unreadable()
        return tree

    def exponent(self, depth: int) -> Tree:
        if self.kind() == "number":  # 2^10 means 2^{10}
            return _number(self.take())
        if self.peek() in ("{", "("):
            return self.group(depth)
        if self.kind() == "letter" or self.peek() == "\\pi" or self.peek()[1:] in GREEK:
            return self.atom(depth + 1)
        raise self.unreadable()

    def group(self, depth: int) -> Tree:
        closing = _BRACKETS[self.take()]
        tree = self.sum(depth + 1)
        self.take(closing)
        return tree

    def argument(self, depth: int) -> Tree:
        r"""Reads the argument of a command: a group in braces, or one character as in `\frac12`."""
        if self.peek() == "{":
            return self.group(depth)
        if self.kind() == "number":
            token = self._tokens[self._at][1]
            if "." in token:
                raise self.unreadable()
            if len(token) > 1:
                self._tokens[self._at] = ("number", token[1:])
                return _number(token[0])
        elif self.kind() != "letter" and self.peek() != "\\pi":
            raise self.unreadable()
        return self.atom(depth + 1)

    def atom(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise self.unreadable()
        kind, token = self.kind(), self.peek()
        if kind == "number":
            return _number(self.take())
        if kind == "letter":
            return self.letter()
        if token in _BRACKETS:
            names = {"\\lfloor": "floor", "\\lceil": "ceil", "|": "abs"}
            tree = self.group(depth)
            return (names[token], tree) if token in names else tree
        return self.command(depth)

    def letter(self) -> Tree:
        name = self.take()
        if self.peek() == "_":
            return ("sym", f"{name}_{{{self.subscript()}}}")
        if name in ("e", "i"):
            return ("const", name)
        return ("sym", name)

    def subscript(self) -> str:
        self.take("_")
        if self.kind() in ("number", "letter"):
            if len(self.peek()) > 1:
                raise self.unreadable()
            return self.take()
        self.take("{")
        name = ""
        while self.kind() in ("number", "letter"):
            name += self.take()
        self.take("}")
        if not name or "." in name:
            raise self.unreadable()
        return name

    def command(self, depth: int) -> Tree:
        token = self.take()
        name = token[1:]
        if token == "\\frac":
            return ("/", self.argument(depth), self.argument(depth))
        if token == "\\binom":
            return ("binom", self.argument(depth), self.argument(depth))
        if token == "\\sqrt":
            degree: Tree = ("num", Fraction(2))
            if self.peek() == "[":
                self.take()
                degree = self.sum(depth + 1)
                self.take("]")
            return ("root", degree, self.argument(depth))
        if token == "\\pi":
            return ("const", token)
        if name in GREEK:
            if self.peek() == "_":
                return ("sym", f"{token}_{{{self.subscript()}}}")
            return ("sym", token)
        if name in _FUNCTIONS:
            return self.function(name, depth)
        raise self.unreadable()

    def function(self, name: str, depth: int) -> Tree:
        base, power = None, None
        if self.peek() == "_":
            if name != "log":
                raise self.unreadable()
            self.take()
            base = self.argument(depth)
        if self.peek() == "^":
            self.take()
            power = self.exponent(depth)
            if power[0] != "num":  # sin^{-1} may be the inverse or the reciprocal
                raise self.unreadable()
        opening = self.peek()
        inner = self.group(depth) if opening in ("(", "{") else self.bare_argument(depth)
        if self.peek() in ("^", "!", "("):
            raise self.unreadable()
        if opening == "{" and self.begins_factor() and self.peek()[1:] not in _FUNCTIONS:
            raise self.unreadable()  # \sin{2}x is printed as \sin 2x
        if name == "log":
            # The base of a bare \log may be ten or e, so it gets a base that equals neither.
            tree: Tree = ("log", base or ("sym", LOG_BASE), inner)
        else:
            tree = ("fn", name, inner)
        return tree if power is None else ("^", tree, power)

    def bare_argument(self, depth: int) -> Tree:
        """Reads the factors after a function without brackets, up to a sign or another function."""
        tree: Tree | None = None
        while self.kind() in ("number", "letter") or (
            self.peek() in ("\\frac", "\\sqrt", "\\pi") or self.peek()[1:] in GREEK
        ):
            if tree is not None and self.kind() == "number":
                raise self.unreadable()
            tree = self.factor(depth) if tree is None else self.beside(tree, tree, depth)
        if tree is None or self.peek() == "/":
            raise self.unreadable()
        return tree


def _number(token: str) -> Tree:
    if len(token) > 1000:
        raise UnreadableError(token)
    return ("num", Fraction(token if token[-1] != "." else token[:-1]))
