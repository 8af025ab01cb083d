"""The bindings from which a root config is built: read in order, checked, and found by scope.

`Table` holds every binding of the files and of `--set`, and those that a checkpoint gives. It
refuses unknown names when it reads a binding, and unused bindings at the end. `builder.py` looks
bindings up here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tw_jax import bindings
from tw_jax.bindings import Key, Macro, Reference
from tw_jax.declared import declared
from tw_jax.fields import MISFIT, configs_in, fit, has_interface, kinds, options, reachable

CHECKPOINT = "LanguageModel"
"""The root class in the gin text of a checkpoint; see `Table.inherit`."""
REQUIRED = ("gin.REQUIRED", "REQUIRED")
"""The constant of gin, `%gin.REQUIRED`, which a later binding must replace."""


@dataclasses.dataclass
class Binding:
    """A value, and how it was bound.

    Attributes:
      value: the value; references and macros are not resolved.
      where: its place, "file:line: ", or "" for a single binding.
      order: bindings that were read later have larger numbers; inherited ones have -1.
      text: a single binding's value as it was written.
      is_included: whether it was read through an include.
      is_used: whether a config was built with it, or a binding of an inner scope was preferred.
    """

    value: Any
    where: str
    order: int
    text: str | None = None
    is_included: bool = False
    is_used: bool = False

    @property
    def is_inherited(self) -> bool:
        """Whether it is from the description of a checkpoint."""
        return self.order < 0


class Table:
    """All bindings read so far.

    Args:
      root: the config class to build.
    """

    def __init__(self, root: type) -> None:
        self.root = root
        self.classes = reachable(root)
        self._bindings: dict[Key, Binding] = {}
        self._count = itertools.count()
        self._mentioned: set[str] = set()
        """Macros that some binding's value names, even if the binding is replaced later."""
        self._off: list[tuple[Binding, str, set[str]]] = []
        """Bindings to None, their fields, and the names of the classes that they switch off."""

    @functools.cached_property
    def _all(self) -> dict[str, tuple[str, ...]]:
        """All config classes; they are searched for only if an include names an unreached one."""
        return declared()

    # Reading.

    def read(self, file: Path) -> None:
        """Reads a file and the files that it includes."""
        for key, value, where, is_included in bindings.read(file):
            self._bind(key, Binding(value, where, next(self._count), is_included=is_included))

    def override(self, text: str) -> None:
        """Reads a single binding as a shell passes it, "Class.field=value"."""
        name, equals, raw = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise ValueError(f"{text!r} is not a binding. Write Class.field=value.")
        try:
            ((_, value, _, _),) = bindings.parse(text)
        except ValueError:
            value = raw
        self._bind(bindings.split(name), Binding(value, "", next(self._count), text=raw))

    def _bind(self, key: Key, binding: Binding) -> None:
        _, name, field = key
        if field and name in self.classes:
            _check_field(name, field, tuple(kinds(self.classes[name])), where=binding.where)
        elif field and not binding.is_included:
            raise ValueError(f"{binding.where}Unknown config class {name}. {self.reaches()}")
        elif field:
            fields = _fields(name, name, self._all, where=binding.where)
            _check_field(name, field, fields, where=binding.where)
        self._mentioned.update(repr(macro) for macro in _parts(binding.value, Macro))
        self._bindings[key] = binding

    def reaches(self) -> str:
        """Returns a sentence with the names of all classes that the root reaches."""
        hint = ""
        if any(
            has_interface(kind) for cls in self.classes.values() for kind in kinds(cls).values()
        ):
            hint = " A class of another module joins them after --import MODULE."
        return f"{self.root.__name__} reaches {', '.join(sorted(self.classes))}.{hint}"

    # Looking up.

    def find(self, scope: str, name: str, field: str) -> Binding | None:
        """Returns the binding of the innermost scope; it and those of outer scopes are now used."""
        found = None
        for outer in _scopes(scope):
            if binding := self._bindings.get((outer, name, field)):
                binding.is_used, found = True, binding
        return found

    def is_bound(self, cls: type, scope: str, *, own: bool = False) -> bool:
        """Returns whether a field of a class is bound in a scope.

        Args:
          cls: a config class.
          scope: the scope in which the class would be built.
          own: whether inherited bindings do not count.
        """
        found = (
            self._bindings.get((outer, cls.__name__, field))
            for outer in _scopes(scope)
            for field in kinds(cls)
        )
        return any(binding and not (own and binding.is_inherited) for binding in found)

    def macro(self, macro: Macro, where: str) -> Binding:
        """Returns the binding of a macro."""
        scope, _, name = macro.name.rpartition("/")
        binding = self._bindings.get((scope, name, ""))
        if binding is None:
            names = sorted(
                f"%{s}/{n}" if s else f"%{n}" for s, n, field in self._bindings if not field
            )
            raise ValueError(
                f"{where}Unknown macro {macro!r}. Known: {', '.join(names) or 'none'}."
            )
        return binding

    def leaf(self, binding: Binding) -> Binding:
        """Follows macros to the binding that holds the value; a circle ends at a macro."""
        for _ in self._bindings:
            if not isinstance(binding.value, Macro) or binding.value.name in REQUIRED:
                break
            binding = self.macro(binding.value, binding.where)
        return binding

    def holders(self, cls: type) -> list[str]:
        """Returns "Class.field" of each field that leads to a class; the root adds its own name."""
        fields = [
            f"{holder.__name__}.{field}"
            for holder in self.classes.values()
            for field, kind in kinds(holder).items()
            if cls in configs_in(kind)
        ]
        return [*fields, *([cls.__name__] if cls is self.root else [])]

    # Bindings from a checkpoint.

    def inherit(self, describe: Callable[[str], str]) -> None:
        """Adds the configs that checkpoints record, with the lowest priority.

        A class that sets `inherits` names one of its fields, which holds the folder of a
        checkpoint. A line of the checkpoint's text is left out if a file or `--set` binds the same
        field in a scope that it is visible from, or if the root does not reach the class.
        `LanguageModel.x = ...` binds the field `x` of every class that has one of a fitting type.

        Args:
          describe: returns the gin text of a folder.
        """
        own = set(self._bindings)
        for cls in self.classes.values():
            name = getattr(cls, "inherits", None)
            if name is None:
                continue
            bound = {s for s, owner, field in own if (owner, field) == (cls.__name__, name)}
            for scope in sorted({"", *bound}):
                folder = self._folder(scope, cls, name)
                if folder is not None:
                    self._inherit(folder, describe(folder), scope=scope, own=own)

    def _folder(self, scope: str, cls: type, name: str) -> str | None:
        """The text that a field is bound to in a scope, or its default; None if it has neither."""
        binding = self._bindings.get((scope, cls.__name__, name))
        if binding is None:
            default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
            return default if isinstance(default, str) else None
        leaf = self.leaf(binding)
        if isinstance(leaf.value, str) or leaf.value is None:
            return leaf.value
        return None if isinstance(leaf.value, Macro | Reference) else leaf.text

    def _inherit(self, folder: str, text: str, *, scope: str, own: set[Key]) -> None:
        for (inner, name, field), written, where, _ in bindings.parse(text, f"{folder}: "):
            if not field:
                raise ValueError(f"{where}The text of a checkpoint must not define macros: {name}.")
            value = _in_scope(written, scope)
            owners = [name] if name in self.classes else []
            if owners:
                _check_field(name, field, tuple(kinds(self.classes[name])), where=where)
            if name == CHECKPOINT:
                owners = [n for n, cls in self.classes.items() if self._takes(cls, field, value)]
            for owner in owners:
                at = "/".join(filter(None, (scope, inner)))
                if not any((outer, owner, field) in own for outer in _scopes(at)):
                    self._bindings.setdefault((at, owner, field), Binding(value, where, -1))

    def _takes(self, cls: type, field: str, value: Any) -> bool:
        """Whether a class has a field of this name whose annotation admits the value."""
        kind = kinds(cls).get(field)
        if kind is None:
            return False
        if isinstance(value, Reference):
            return self.classes.get(value.name) in options(kind)
        return fit(value, kind) is not MISFIT

    # What nothing used.

    def switch_off(self, binding: Binding, field: str, classes: Iterable[type]) -> None:
        """Notes that a field with these config classes is bound to None."""
        names = {name for cls in classes for name in reachable(cls)}
        self._off.append((binding, field, names))

    def refuse_unused(self) -> None:
        """Refuses a binding that nothing used.

        Bindings of an include, of a checkpoint, and of a class that was switched off later are not
        refused. The names of classes in an include are checked.
        """
        for (scope, name, field), binding in self._bindings.items():
            if binding.is_included:
                for reference in _parts(binding.value, Reference):
                    if reference.name not in self.classes:
                        _fields(reference.name, repr(reference), self._all, where=binding.where)
            elif not field and not binding.is_used:
                self._refuse_macro(scope, name, binding)
            elif not (binding.is_used or binding.is_inherited):
                self._refuse(scope, name, field, binding)

    def _refuse_macro(self, scope: str, name: str, binding: Binding) -> None:
        path = f"{scope}/{name}" if scope else name
        if f"%{path}" not in self._mentioned:
            raise ValueError(
                f"{binding.where}Bound but never used: {path}. A field is bound as Class.{name}, "
                f"and a macro is used as %{path}."
            )

    def _refuse(self, scope: str, name: str, field: str, binding: Binding) -> None:
        path = f"{scope}/{name}" if scope else name
        off = [(by, holder) for by, holder, names in self._off if name in names]
        if any(by.order > binding.order for by, _ in off):
            return
        line = f"{self.holders(self.classes[name])[0]} = @{path}()"
        fault = f"{binding.where}Bound but never used: {path}.{field}. "
        for by, holder in off:
            place = f" ({by.where.rstrip(': ')})" if by.where else ""
            raise ValueError(
                f"{fault}{holder} = None{place} switches {name} off. Remove one of the two, or add "
                f"a line like {line}."
            )
        raise ValueError(f"{fault}Does {self.root.__name__} reach it, with a line like {line}?")


def check_names(file: Path) -> None:
    """Checks a file that no root is built from: its syntax, and the names of classes and fields.

    Raises:
      ValueError: on a syntax error or an unknown name.
      FileNotFoundError: if the file or an include does not exist.
    """
    found = declared()
    for (_, name, field), value, where, _ in bindings.read(file):
        if field:
            _check_field(name, field, _fields(name, name, found, where=where), where=where)
        for reference in _parts(value, Reference):
            _fields(reference.name, repr(reference), found, where=where)


def _fields(
    name: str, written: str, found: dict[str, tuple[str, ...]], *, where: str
) -> tuple[str, ...]:
    """The fields of a class among all declared ones; the class must exist."""
    if name not in found:
        close = difflib.get_close_matches(name, found, n=3, cutoff=0.5)
        hint = f" Similar names: {', '.join(close)}." if close else ""
        raise ValueError(f"{where}Unknown config class {written}.{hint}")
    return found[name]


def _check_field(name: str, field: str, fields: tuple[str, ...], *, where: str) -> None:
    if field not in fields:
        having = ", ".join(fields) or "no fields"
        raise ValueError(f"{where}Unknown field {name}.{field}. {name} has {having}.")


def _scopes(scope: str) -> Iterator[str]:
    """A scope and those around it, outermost first; "" is around all."""
    yield ""
    parts = scope.split("/") if scope else []
    for n in range(len(parts)):
        yield "/".join(parts[: n + 1])


def _parts(value: Any, kind: type) -> Iterator[Any]:
    """The references or macros within a value."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item, kind)


def _in_scope(value: Any, scope: str) -> Any:
    """The value with the scopes of its references put inside another scope."""
    if isinstance(value, list | tuple):
        return type(value)(_in_scope(item, scope) for item in value)
    if isinstance(value, Reference) and value.scope and scope:
        return dataclasses.replace(value, scope=f"{scope}/{value.scope}")
    return value
