"""The files of this repository for its tests; each is parsed once and never imported."""

import ast
import functools
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tw_jax"
VERBS = sorted(p.stem for p in (PACKAGE / "programs").glob("*.py") if p.stem != "__init__")
"""Each verb has a program, but `tw config` belongs to the command line and has none."""


def python_files(*folders: pathlib.Path) -> list[pathlib.Path]:
    """All Python files below the folders, by default those of the package."""
    return sorted(p for folder in folders or (PACKAGE,) for p in folder.rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    """The path relative to the root of the repository."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    """The syntax tree of one file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def has_config(verb: str) -> bool:
    """Whether a verb reads a .gin file: its program then has, or imports, a root of its name."""
    program = tree(PACKAGE / "programs" / f"{verb}.py")
    names = {node.name for node in program.body if isinstance(node, ast.ClassDef)}
    for node in program.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    return verb.capitalize() in names


def imported_names(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import and of each chain of attributes in a file."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)
