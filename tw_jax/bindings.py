"""Reads gin text: files, their includes, and the place of each binding.

This is the only file that imports gin, and it uses only gin's parser. gin's registry, its global
table of bindings and its current scope are not touched. References and macros are returned as they
are written. This file does not depend on any config class.
"""

from __future__ import annotations

import dataclasses
import os
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gin import config_parser

MAX_NESTING = 50
"""The largest depth of nested brackets, and of nested includes."""
_EXCERPT = 100


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/Name()`, or `@scope/Name` if it is not called."""

    scope: str
    name: str
    is_called: bool

    def __repr__(self) -> str:
        scope = f"{self.scope}/" if self.scope else ""
        return f"@{scope}{self.name}{'()' if self.is_called else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%name`."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


Key = tuple[str, str, str]
"""Scope, class and field. For a macro: its scope, its name, and an empty field."""


class Bound(NamedTuple):
    """One binding of a text.

    Attributes:
      key: the scope, class and field that it binds.
      value: its value; references and macros are not resolved.
      where: its place, "file:line: ", with the chain of includes.
      is_included: whether its file was read through an include.
    """

    key: Key
    value: Any
    where: str
    is_included: bool = False


def read(file: Path, includers: tuple[tuple[Path, int], ...] = ()) -> Iterator[Bound]:
    """Yields the bindings of a file and of the files that it includes, in order.

    An include is searched for in the folder of the file that includes it, then in the working
    directory.

    Args:
      file: the file as given or as written in the include.
      includers: the files that led here and the line of each include, outermost first.

    Raises:
      ValueError: on a syntax error, on an import, if files include one another in a circle or too
        deeply, or if a file is not text.
      FileNotFoundError: if a file does not exist.
    """
    path = _find(file, includers)
    chain = "".join(f", included by {_shown(p)}:{line}" for p, line in reversed(includers))
    if path in [includer for includer, _ in includers]:
        circle = " -> ".join(_shown(p) for p in (*(p for p, _ in includers), path))
        raise ValueError(f"Files include one another in a circle: {circle}.")
    if len(includers) >= MAX_NESTING:
        raise ValueError(
            f"{_shown(path)} is nested in more than {MAX_NESTING} includes. Include it directly."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{_shown(path)}{chain}: byte {error.start} is not UTF-8. A config file must be text."
        ) from None
    for statement in _statements(text, _shown(path), chain):
        line = statement.location.line_num
        where = f"{_shown(path)}:{line}{chain}: "
        if isinstance(statement, config_parser.IncludeStatement):
            yield from read(Path(statement.filename), (*includers, (path, line)))
        elif isinstance(statement, config_parser.ImportStatement):
            raise ValueError(
                f"{where}A config file must not import. Write --import {statement.module} on the "
                "command line."
            )
        elif isinstance(statement, config_parser.BindingStatement):
            yield Bound(_key(statement), statement.value, where, bool(includers))


def parse(text: str, where: str = "") -> Iterator[Bound]:
    """Yields the bindings of a text that is not a file; it must hold nothing else.

    Args:
      text: gin text.
      where: the place of each binding.

    Raises:
      ValueError: if gin cannot read the text, or if it includes or imports.
    """
    for statement in _statements(text, where.rstrip(": ")):
        if isinstance(statement, config_parser.BindingStatement):
            yield Bound(_key(statement), statement.value, where)
        elif not isinstance(statement, config_parser.BlockDeclaration):
            raise ValueError(f"{where}This text must not include or import.")


def _key(statement: config_parser.BindingStatement) -> Key:
    return statement.scope, statement.selector, statement.arg_name


def split(name: str) -> Key:
    """Returns the key of "scope/Class.field" or "scope/name"."""
    return config_parser.parse_binding_key(name)


def _statements(text: str, file: str, chain: str = "") -> Iterator[Any]:
    """Parses gin text into gin's statements; an error shows line and column."""
    line, column, hint = 1, 0, " Text needs quotes, and a config class is written @Name()."
    parser = None
    try:
        parser = _Parser(text, _Delegate())
        yield from iter(parser.parse_statement, None)
        return
    except _TooDeep as error:
        (what, line, column), hint = error.args, ""
    except SyntaxError as error:
        line, column = error.lineno or 1, error.offset or 0
        what = (error.msg or "syntax error").splitlines()[-1].strip(" .")
    except tokenize.TokenError as error:
        what, (line, column) = error.args
    except (RuntimeError, TypeError, ValueError, IndexError, MemoryError) as error:
        # gin's parser raises these if the text ends too early or a key cannot be hashed.
        what = str(error).splitlines()[0].strip(" .") if str(error) else "syntax error"
        token = parser and parser.current_token
        if token:
            line, column = token.start
    _fail(text, f"{file}:{line}{chain}: {what[:_EXCERPT]}.{hint}", line, column)


def _fail(text: str, sentence: str, line: int, column: int) -> NoReturn:
    lines = text.splitlines()
    excerpt = lines[line - 1].rstrip() if line <= len(lines) else ""
    start = max(column - _EXCERPT, 0)
    excerpt, column = excerpt[start : start + 2 * _EXCERPT], max(column - start, 0)
    raise ValueError(f"{sentence}\n  {excerpt}\n  {' ' * column}^") from None


class _TooDeep(Exception):
    """Brackets are nested too deeply. Arguments: sentence, line, column."""


class _Parser(config_parser.ConfigParser):
    """gin's parser with a limit on nested brackets, which would raise RecursionError."""

    _depth = 0

    def parse_value(self) -> Any:
        if self._depth > MAX_NESTING and self.current_token is not None:
            what = f"More than {MAX_NESTING} brackets are nested in one another"
            raise _TooDeep(what, *self.current_token.start)
        self._depth += 1
        value = super().parse_value()
        self._depth -= 1
        return value


class _Delegate(config_parser.ParserDelegate):
    """Returns references and macros as they are written; gin's own delegate looks them up."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def _find(file: Path, includers: tuple[tuple[Path, int], ...]) -> Path:
    """Returns the normalised path of a file, so that a circle of includes has equal paths."""
    if "\0" in str(file):
        raise ValueError(
            f"{str(file)!r}: the name of a config file must not contain a null character."
        )
    folders = [*(path.parent for path, _ in includers[-1:]), Path.cwd()]
    for folder in folders:
        if (folder / file).is_file():
            return Path(os.path.normpath(folder / file))
    if not includers:
        raise FileNotFoundError(f"{file}: there is no such config file.")
    path, line = includers[-1]
    chain = "".join(f", included by {_shown(p)}:{n}" for p, n in reversed(includers[:-1]))
    raise FileNotFoundError(
        f"{_shown(path)}:{line}{chain}: there is no {str(file)!r} in the folder of this file or in "
        "the working directory."
    )


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
