"""Builds a root config from a table of bindings: references, macros, and fields without a line.

A field that no line binds is wired: the config class that its annotation admits is built from its
bindings. `Builder.wire` holds the rules. An error names the place of the binding at fault.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from tw_jax.bindings import Macro, Reference
from tw_jax.fields import (
    MISFIT,
    configs_in,
    fit,
    has_interface,
    is_config,
    is_required,
    kinds,
    misfit,
    options,
    type_text,
)
from tw_jax.table import REQUIRED, Binding, Table

C = TypeVar("C")

_NAMED = re.compile(r"(?:([A-Za-z_]\w*)\.)?\b([a-z_]\w*)")
"""Class.field in the text of an error, or a field alone, which belongs to the class named last."""


class MissingFieldError(ValueError):
    """A field without a default is not bound."""


class Builder:
    """Builds configs from a table, each class once in each scope.

    Args:
      table: all bindings.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._built: dict[tuple[type, str], Any] = {}
        self._places: dict[int, dict[str, Binding]] = {}
        """How the fields of a built config were bound, by its id; `_built` keeps it alive."""
        self._open: list[str] = []
        """Classes and macros that are being resolved, outermost first."""

    def build(self, cls: type[C], scope: str) -> C:
        """Returns the config of a class in a scope.

        Raises:
          ValueError: if a field has no value, if references go in a circle, or if `check` of a
            config refuses its values.
          TypeError: if the annotation of a field does not admit its value.
        """
        if (cls, scope) in self._built:
            return self._built[cls, scope]
        self._enter(f"{scope}/{cls.__name__}" if scope else cls.__name__)
        places: dict[str, Binding] = {}
        wired: dict[str, type] = {}
        missing: list[dataclasses.Field[Any]] = []
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
            binding = self.table.find(scope, cls.__name__, field.name)
            if binding and not (binding.is_inherited and self._overrides(cls, field, scope)):
                places[field.name] = binding
            elif part := self.wire(cls, field, scope):
                wired[field.name] = part
            elif is_required(field):
                missing.append(field)
        values = {name: self._evaluate(cls, name, one, scope) for name, one in places.items()}
        if missing:
            raise MissingFieldError(self._lacks(cls, missing, scope))
        values |= {name: self.build(part, scope) for name, part in wired.items()}
        self._open.pop()
        try:
            made = cls(**values)
        except (TypeError, ValueError) as error:
            where = self._blame(str(error), cls.__name__, values, places=places)
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{where}{error}") from error
        self._places[id(made)] = places
        return self._built.setdefault((cls, scope), made)

    # Fields without a line.

    def wire(self, cls: type, field: dataclasses.Field[Any], scope: str) -> type | None:
        """Returns the config class that a field without a line is built from.

        Args:
          cls: the config class that has the field.
          field: a field that is not bound.
          scope: the scope in which `cls` is built.

        Returns:
          None if the field keeps its default, or, if it has none, if a line must choose:

          - Of several classes, from a union or an interface, the only one that has bindings is
            taken. The bindings of files precede those of a checkpoint.
          - A field without default whose annotation is one config class is always built.
          - A default that is a config is replaced if the bindings reach its class, or a class
            that it would be built with.
          - An optional field is built only if the files, not a checkpoint, bind its class, and
            no other field leads to the class.
        """
        kind = kinds(cls)[field.name]
        if is_config(kind) and is_required(field):
            return kind
        chosen = self._chosen(kind, scope)
        if is_required(field):
            return chosen
        if is_config(type(field.default)):
            default = type(field.default)
            return chosen or (default if self._reaches_bindings(default, scope, ()) else None)
        if chosen and self.table.is_bound(chosen, scope, own=True):
            return chosen if len(self.table.holders(chosen)) == 1 else None
        return None

    def _bound(self, kind: Any, scope: str) -> list[type]:
        """The classes among those that an annotation admits that have bindings in a scope."""
        own = [c for c in options(kind) if self.table.is_bound(c, scope, own=True)]
        return own or [c for c in options(kind) if self.table.is_bound(c, scope)]

    def _chosen(self, kind: Any, scope: str) -> type | None:
        bound = self._bound(kind, scope)
        return bound[0] if len(bound) == 1 else None

    def _reaches_bindings(self, cls: type, scope: str, seen: tuple[type, ...]) -> bool:
        """Whether a class, or a class that it would be built with, has bindings in a scope."""
        if cls in seen:
            return False
        parts = (self.wire(cls, field, scope) for field in dataclasses.fields(cls))
        return self.table.is_bound(cls, scope) or any(
            part is not None and self._reaches_bindings(part, scope, (*seen, cls)) for part in parts
        )

    def _overrides(self, cls: type, field: dataclasses.Field[Any], scope: str) -> bool:
        """Whether the files' bindings choose another class than a checkpoint's line for a field."""
        kind = kinds(cls)[field.name]
        chosen = self._chosen(kind, scope)
        if is_config(kind) or not chosen or not self.table.is_bound(chosen, scope, own=True):
            return False
        inherited = self.table.find(scope, cls.__name__, field.name)
        value = inherited.value if inherited else None
        is_same = isinstance(value, Reference) and value.name == chosen.__name__
        return not is_same and self.wire(cls, field, scope) is chosen

    def _lacks(self, cls: type, missing: list[dataclasses.Field[Any]], scope: str) -> str:
        """The sentence for fields that have neither a line nor a default nor a class to build."""
        names = [f"{cls.__name__}.{field.name}" for field in missing]
        texts = [type_text(kinds(cls)[field.name]) for field in missing]
        listed = ", ".join(f"{n} ({t})" for n, t in zip(names, texts, strict=True))
        hints = []
        for name, field in zip(names, missing, strict=True):
            kind = kinds(cls)[field.name]
            lines = [f"{name} = @{option.__name__}()" for option in options(kind)]
            if lines:
                bound = " and ".join(option.__name__ for option in self._bound(kind, scope))
                why = f"{bound} have bindings" if bound else "none of them has bindings"
                hints.append(f"Choose by a line, because {why}: {' or '.join(lines)}.")
            elif has_interface(kind):
                hints.append(f"No imported class fits {type_text(kind)}.")
            else:
                hints.append("Bind each field without a default.")
        return " ".join([f"{self._open[-1]} lacks {listed}.", *dict.fromkeys(hints)])

    # Values.

    def _evaluate(self, cls: type, field: str, binding: Binding, scope: str) -> Any:
        """The value of a binding, with references built and macros replaced."""
        name, kind = f"{cls.__name__}.{field}", kinds(cls)[field]
        value = self._resolve(binding.value, binding.where, scope, field=name)
        if value is None and (parts := list(configs_in(kind))):
            self.table.switch_off(binding, name, parts)
        if fit(value, kind) is not MISFIT:
            return value
        leaf = self.table.leaf(binding)
        text = None if isinstance(leaf.value, Reference) else leaf.text
        if text is not None and fit(text, kind) is not MISFIT:
            return text
        raise misfit(name, binding.value, value, kind=kind, where=binding.where)

    def _resolve(self, value: Any, where: str, scope: str, *, field: str) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._resolve(item, where, scope, field=field) for item in value)
        if isinstance(value, Macro):
            return self._expand(value, where, scope, field=field)
        if not isinstance(value, Reference):
            return value
        if value.name not in self.table.classes:
            raise ValueError(f"{where}Unknown config class {value!r}. {self.table.reaches()}")
        if not value.is_called:
            raise ValueError(f"{where}{value!r} is a class, not a config. Write {value!r}().")
        return self.build(self.table.classes[value.name], value.scope or scope)

    def _expand(self, value: Macro, where: str, scope: str, *, field: str) -> Any:
        """The value of a macro; a reference in it is built in the scope in which it is used."""
        if value.name in REQUIRED:
            raise ValueError(
                f"{where}{field} is {value!r} and must be bound later: in another line or file, or "
                f"with --set {field.lstrip('%')}=VALUE."
            )
        macro = self.table.macro(value, where)
        macro.is_used = True
        self._enter(repr(value))
        resolved = self._resolve(macro.value, macro.where, scope, field=repr(value))
        self._open.pop()
        return resolved

    def _enter(self, name: str) -> None:
        if name in self._open:
            raise ValueError(f"References go in a circle: {' -> '.join((*self._open, name))}.")
        self._open.append(name)

    # Errors of `check`.

    def _blame(
        self, text: str, name: str, values: dict[str, Any], *, places: dict[str, Binding]
    ) -> str:
        """The place of the binding at fault: the last one of the fields that an error names.

        Fields are those of the config that was refused and of the configs that it holds. If the
        text names several, the values were compatible until the last one was bound.
        """
        owners = [(name, places), *self._owners(list(values.values()))]
        current, found = "", []
        for named, field in _NAMED.findall(text):
            current = named or current
            found += [
                bound[field] for owner, bound in owners if owner == current and field in bound
            ]
        found = found or list(places.values())
        return max(found, key=lambda one: one.order).where if found else ""

    def _owners(self, values: list[Any]) -> Iterator[tuple[str, dict[str, Binding]]]:
        """Names of the configs within values, and how their fields were bound."""
        for value in values:
            if isinstance(value, tuple | list):
                yield from self._owners(list(value))
            elif is_config(type(value)):
                yield type(value).__name__, self._places.get(id(value), {})
                yield from self._owners([getattr(value, f) for f in kinds(type(value))])
