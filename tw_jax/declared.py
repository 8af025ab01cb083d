"""Names of all config classes and their fields, found without importing the package.

A file that many verbs include binds classes that a verb does not reach. Their names are checked
against this list: the source of the package is parsed, and classes of other modules, such as those
of `--import`, are taken from the modules that are already imported.
"""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

from tw_jax.fields import is_config, kinds

_DECORATOR = "configurable"
"""The decorator of config classes, in `tw_jax/config.py`."""
_Source = tuple[tuple[str, ...], tuple[str, ...]]
"""The fields that a class declares, and the names of the classes that it inherits from."""


def declared() -> dict[str, tuple[str, ...]]:
    """Returns the fields of every config class by the name of the class.

    Classes of the package count whether they are imported or not, other classes if their module is
    imported. If two classes have the same name, the fields of both are returned.
    """
    found = dict(_package())
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            # Some modules hold objects that run code when isinstance or getattr looks at them.
            if (
                issubclass(type(value), type)
                and "__post_init__" in vars(value)
                and is_config(value)
            ):
                fields = (*found.get(value.__name__, ()), *kinds(value))
                found[value.__name__] = tuple(dict.fromkeys(fields))
    return found


@functools.cache
def _package() -> dict[str, tuple[str, ...]]:
    """The config classes of the package, read from its source."""
    sources: dict[str, _Source] = {}
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if f"@{_DECORATOR}\n" in text else ():
            if isinstance(node, ast.ClassDef) and _is_decorated(node):
                fields, bases = sources.get(node.name, ((), ()))
                found = tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases)
                sources[node.name] = (*fields, *_own_fields(node)), (*bases, *found)
    return {name: _all_fields(name, sources, ()) for name in sources}


def _is_decorated(node: ast.ClassDef) -> bool:
    return any(ast.unparse(one).rpartition(".")[2] == _DECORATOR for one in node.decorator_list)


def _own_fields(node: ast.ClassDef) -> tuple[str, ...]:
    return tuple(
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and "ClassVar" not in ast.unparse(line.annotation)
    )


def _all_fields(name: str, sources: dict[str, _Source], seen: tuple[str, ...]) -> tuple[str, ...]:
    """The fields of a class and of the config classes that it inherits from."""
    if name in seen or name not in sources:
        return ()
    fields, bases = sources[name]
    inherited = (f for base in bases for f in _all_fields(base, sources, (*seen, name)))
    return tuple(dict.fromkeys((*inherited, *fields)))
