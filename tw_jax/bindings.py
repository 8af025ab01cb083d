"""gin text to bindings: files, their includes, and the place of each binding.

The only importer of gin, of which only the parser is used: its registry, its global table of
bindings and its current scope stay untouched. References and macros are kept as they are written.
This file does not know any config; `config.py` builds configs from what it returns.
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
"""Brackets within brackets, and files that include files, beyond which text is refused."""
_EXCERPT = 100


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/Name()`, or `@scope/Name` where it is not called."""

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
"""Scope, class and field; a macro has its name for a class and no field."""


class Bound(NamedTuple):
    """One binding of a file; `where` is its place, "file:line: " with the chain of includes."""

    key: Key
    value: Any
    where: str


def read(file: Path, includers: tuple[tuple[Path, int], ...] = ()) -> Iterator[Bound]:
    """The bindings of a file and of the files that it includes, in order.

    An include is looked for beside the file that includes it, then in the working directory.

    Args:
      file: the file as given or as written in the include.
      includers: the files that led here and the line of each include, outermost first.

    Raises:
      ValueError: a syntax error, an import, files that include one another in a circle or too
        deeply, or a file that is not text.
      FileNotFoundError: a file that is not there.
    """
    path = _find(file, includers)
    chain = "".join(f", included by {_shown(p)}:{line}" for p, line in reversed(includers))
    if path in [includer for includer, _ in includers]:
        circle = " -> ".join(_shown(p) for p in (*(p for p, _ in includers), path))
        raise ValueError(f"Files include one another in a circle: {circle}.")
    if len(includers) >= MAX_NESTING:
        raise ValueError(f"{_shown(path)} is the end of more than {MAX_NESTING} nested includes.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{_shown(path)}{chain}: byte {error.start} is not UTF-8. A config file must be text."
        ) from None
    for statement in statements(text, _shown(path), chain):
        line = statement.location.line_num
        where = f"{_shown(path)}:{line}{chain}: "
        if isinstance(statement, config_parser.IncludeStatement):
            yield from read(Path(statement.filename), (*includers, (path, line)))
        elif isinstance(statement, config_parser.ImportStatement):
            raise ValueError(f"{where}import: the root's annotations lead to every config.")
        elif isinstance(statement, config_parser.BindingStatement):
            yield Bound(
                (statement.scope, statement.selector, statement.arg_name), statement.value, where
            )


def split(name: str) -> Key:
    """The key of "scope/Class.field" or "scope/name"."""
    return config_parser.parse_binding_key(name)


def statements(text: str, file: str, chain: str = "") -> Iterator[Any]:
    """Parses gin text into gin's statements.

    Args:
      text: gin text.
      file: its name, for errors.
      chain: ", included by ..." of that file, for errors.

    Raises:
      ValueError: text that gin does not read; it points at line and column.
    """
    line, column, hint = 1, 0, " Text needs quotes, and a config is written @Name()."
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
        # gin's parser raises these for text that ends too early, or for keys without a hash.
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
    """Brackets within brackets: what, line, column."""


class _Parser(config_parser.ConfigParser):
    """gin's parser, which would end in RecursionError on deeply nested brackets."""

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
    """Keeps references and macros as they are written; gin's own delegate would look them up."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def _find(file: Path, includers: tuple[tuple[Path, int], ...]) -> Path:
    """The normalised path of a file as given or included; circles show as equal paths."""
    if "\0" in str(file):
        raise ValueError(
            f"{str(file)!r}: the name of a config file must not hold a null character."
        )
    folders = [*(path.parent for path, _ in includers[-1:]), Path.cwd()]
    for folder in folders:
        if (folder / file).is_file():
            return Path(os.path.normpath(folder / file))
    if not includers:
        raise FileNotFoundError(f"{file}: no such config file.")
    path, line = includers[-1]
    chain = "".join(f", included by {_shown(p)}:{n}" for p, n in reversed(includers[:-1]))
    raise FileNotFoundError(
        f"{_shown(path)}:{line}{chain}: there is no {str(file)!r} beside this file or in the "
        "working directory, where includes are looked for."
    )


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
