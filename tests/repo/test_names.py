"""Every public name is documented; no file is too long, misnamed, or uses a banned name."""

import ast
import re
import sys

import pytest
from repo.sources import (
    PACKAGE,
    ROOT,
    VERBS,
    has_config,
    imported_names,
    name_of,
    python_files,
    tree,
)

LONGEST_FILE = 600
LONGEST_PROGRAM = 250
EMPTY_NAMES = {"utils", "util", "common", "base", "helpers", "manager", "misc", "lib"}
BANNED_WORDS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|root|home)/")
BANNED_CALLS = {"eval", "exec"}
BANNED_NAMES = {"nnx", "pjit"}

TEXTS = [
    *(ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "requirements.txt")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").rglob("*.*")),
    *sorted((ROOT / "experiments").rglob("*.md")),
]


def undocumented(path: str, body: list[ast.stmt]) -> list[str]:
    """Public classes, functions and methods without a docstring."""
    found = []
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") or _is_overload(node):
            continue
        if not ast.get_docstring(node):
            found.append(f"{path}:{node.lineno} {node.name}")
        if isinstance(node, ast.ClassDef):
            found += undocumented(path, node.body)
    return found


def _is_overload(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(d).endswith("overload") for d in node.decorator_list)


def test_every_file_opens_with_what_it_is_for() -> None:
    silent = [
        name_of(path)
        for path in python_files(PACKAGE, ROOT / "tests")
        if path.stat().st_size and not ast.get_docstring(tree(path))
    ]
    assert silent == []


def test_every_public_name_is_documented() -> None:
    found = [
        line for path in python_files() for line in undocumented(name_of(path), tree(path).body)
    ]
    assert found == []


def test_every_field_of_a_config_is_described() -> None:
    silent = []
    for path in python_files():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ClassDef):
                continue
            if "configurable" not in {ast.unparse(d) for d in node.decorator_list}:
                continue
            _, _, attributes = (ast.get_docstring(node) or "").partition("Attributes:")
            described = set(re.findall(r"^\s+(\w+):", attributes, re.MULTILINE))
            fields = {
                ast.unparse(n.target)
                for n in node.body
                if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)
            }
            silent += [f"{name_of(path)} {node.name}.{field}" for field in fields - described]
    assert silent == []


def test_no_file_is_longer_than_600_lines() -> None:
    lengths = {
        name_of(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(PACKAGE, ROOT / "tests")
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}
    programs = {name: n for name, n in lengths.items() if name.startswith("tw_jax/programs/")}
    assert {name: n for name, n in programs.items() if n > LONGEST_PROGRAM} == {}


def test_no_file_has_an_empty_name_or_one_of_a_standard_module() -> None:
    # A file with the name of a standard module shadows it if Python is started in that folder.
    banned = EMPTY_NAMES | (set(sys.stdlib_module_names) - {"__init__", "code"})
    assert [name_of(path) for path in python_files() if path.stem in banned] == []


@pytest.mark.parametrize("banned", sorted(BANNED_CALLS | BANNED_NAMES))
def test_code_never_reaches_for(banned: str) -> None:
    users = []
    for path in python_files(PACKAGE, ROOT / "tests"):
        users += [
            f"{name_of(path)}:{line}"
            for line, name in imported_names(tree(path))
            if banned in BANNED_NAMES and banned in name.split(".")
        ]
        users += [
            f"{name_of(path)}:{node.lineno}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == banned
        ]
    assert users == []


def test_nothing_is_left_to_do_and_no_machine_is_named() -> None:
    found = []
    for path in (*python_files(), *TEXTS):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if BANNED_WORDS.search(line) or MACHINE_PATHS.search(line):
                found.append(f"{name_of(path)}:{number} {line.strip()}")
    assert found == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_its_program_its_configs_and_its_tests(verb: str) -> None:
    runs = list((ROOT / "configs" / verb).glob("*.gin"))
    assert bool(runs) == has_config(verb), f"configs/{verb}/ and the root of programs/{verb}.py"
    assert (ROOT / "tests" / "programs" / f"test_{verb}.py").is_file()
