"""Typed configs, and the door to gin: what a run may be told, and how a file tells it.

`@configurable` makes a frozen dataclass whose fields are checked when it is built. `load_config`
reads gin files into one immutable tree of such classes; `describe` lists what may be set;
`operative` writes a tree back as gin text. Nothing global is kept, so roots can be loaded again and
side by side, and every error names the line of the binding that it is about. This file does not
know any config class; it finds them by walking the root's annotations. gin text is read by
`bindings.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from tw_jax import bindings
from tw_jax.bindings import Key, Macro, Reference
from tw_jax.bounds import shown

C = TypeVar("C")

_LARGEST_FLOAT = (2 - 2**-23) * 2.0**127
_NAMED = re.compile(r"(?:([A-Za-z_]\w*)\.)?\b([a-z_]\w*)")
"""Class.field in the text of an error, or a field alone, whose class was named before."""
_MISFIT = object()
"""What `_fit` answers for a value that an annotation does not admit; None is a value."""


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def configurable(cls: type[C]) -> type[C]:
    """Makes a keyword-only frozen dataclass whose fields are checked when it is built.

    A field is annotated with `int` (of 64 bits), `float` (an int is accepted and stored as a
    float; nan, infinities and what float32 cannot hold are refused), `bool`, `str`, `None`,
    `Literal[...]`, `tuple[X, ...]`, `tuple[X, Y]` (a list is accepted and stored as a tuple),
    another config, or a union of these. When all fields fit, the optional method `check(self)`
    judges ranges (`bounds.require`) and rules across fields; it raises ValueError, whose text names
    the field as "Class.field". The `Attributes:` section of the class docstring has an entry for
    each field.

    Args:
      cls: a class without `__post_init__`.

    Returns:
      The same class, now a dataclass.
    """
    if "__post_init__" in vars(cls):
        raise TypeError(f"{cls.__name__}.__post_init__: a config judges its fields in check(self).")
    setattr(cls, "__post_init__", _post_init)  # noqa: B010  (pyright knows no such attribute)
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def interface(cls: type[C]) -> type[C]:
    """Marks an abstract class: a field annotated with it takes every config that inherits from it.

    The class that inherits must be imported before the config is read.
    """
    setattr(cls, "_is_interface", True)  # noqa: B010  (pyright knows no such attribute)
    return cls


def load_config(root: type[C], files: Sequence[str | Path], bindings: Sequence[str] = ()) -> C:
    """Builds the root config from gin files and single bindings.

    Files and bindings are read in order; a later binding of the same field wins. A binding in a
    scope, `train/Sampler.top_k = 5`, holds for what `@train/Sampler()` builds, and goes before the
    unscoped one. A reference without a scope stays in the scope in which it is met. An include is
    looked for beside the file that includes it, then in the working directory.

    Args:
      root: the config class to build.
      files: gin files.
      bindings: single bindings as a shell hands them over, "Class.field=value". What is no gin
        value, or not one that the field takes, is text where the field takes that text:
        "Sft.workdir=runs/mine".

    Returns:
      The one instance of `root`.

    Raises:
      ValueError: a syntax error, an unknown class or field, a binding that nothing used, a field
        without default that is not bound, a number that is not finite or too large, or a config
        that refused its values in `check`; it begins with the place of the binding at fault.
      TypeError: a value that the annotation of its field does not admit.
      FileNotFoundError: a file or an include that is not there.
    """
    table = _Table(root)
    for file in files:
        table.read(Path(file))
    for binding in bindings:
        table.override(binding)
    try:
        built = table.build(root, "")
    except RecursionError:
        raise ValueError(
            f"The references and macros that {root.__name__} leads to are nested too deeply. Bind "
            "values directly."
        ) from None
    table.refuse_unused()
    return built


def describe(root: type) -> str:
    """Lists every config that the root reaches: each field's type, default and description.

    Args:
      root: a config class.

    Returns:
      Text with a paragraph for each class, the root first.
    """
    return "\n\n".join(_describe(cls) for cls in _reachable(root).values()) + "\n"


def operative(instance: object) -> str:
    """Writes a config and all it holds as gin text, defaults included; `load_config` gives it back.

    Where different values of one class occur, each but the root has a scope, which is named after
    the field that held it first.

    Args:
      instance: an instance of a config class.

    Returns:
      gin text with a paragraph for each distinct config, the root first.
    """
    holders: dict[object, str] = {}
    _collect(instance, "", holders)
    names: dict[object, str] = {}
    for value, holder in holders.items():
        name = type(value).__name__
        if value != instance and sum(type(other) is type(value) for other in holders) > 1:
            scopes = [holder, *(f"{holder}_{i}" for i in range(2, len(holders) + 2))]
            name = next(n for s in scopes if (n := f"{s}/{name}") not in names.values())
        names[value] = name
    return "\n".join(
        "".join(f"{name}.{f} = {_gin_text(getattr(v, f), names)}\n" for f in _kinds(type(v)))
        for v, name in names.items()
    )


# Types: what an annotation admits.


def _post_init(self: Any) -> None:
    cls = type(self)
    for name, kind in _kinds(cls).items():
        value = getattr(self, name)
        fitted = _fit(value, kind)
        if fitted is _MISFIT:
            raise _misfit(f"{cls.__name__}.{name}", value, value, kind)
        object.__setattr__(self, name, fitted)
    if hasattr(cls, "check"):
        self.check()


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    """The annotation of each field, in the order of declaration."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise TypeError(
            f"{cls.__name__}: its annotations name {error.name!r}, which its module does not. "
            "Declare configs at the top level of a module."
        ) from None
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _is_config(kind: object) -> bool:
    return isinstance(kind, type) and getattr(kind, "__post_init__", None) is _post_init


def _is_interface(kind: object) -> bool:
    return isinstance(kind, type) and "_is_interface" in vars(kind)


def _heirs(cls: type) -> list[type]:
    return [one for heir in cls.__subclasses__() for one in (heir, *_heirs(heir))]


def _fit(value: Any, kind: Any) -> Any:
    """The value in the form in which a field of this annotation stores it, or `_MISFIT`."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        same = (a for a in typing.get_args(kind) if type(a) is type(value) and a == value)
        return next(same, _MISFIT)
    if origin in (Union, types.UnionType):
        fitted = [f for k in typing.get_args(kind) if (f := _fit(value, k)) is not _MISFIT]
        # `float | int` keeps the int that it was given.
        return next((f for f in fitted if type(f) is type(value)), (fitted or [_MISFIT])[0])
    if origin is tuple:
        return _fit_tuple(value, typing.get_args(kind))
    if kind in (int, float) and _is_too_large(value):
        return _MISFIT
    if kind is float:
        return float(value) if type(value) is int or isinstance(value, float) else _MISFIT
    if kind in (int, bool, str, types.NoneType) or _is_config(kind):
        return value if type(value) is kind else _MISFIT
    if _is_interface(kind):
        return value if isinstance(value, kind) and _is_config(type(value)) else _MISFIT
    raise TypeError(
        f"{_type_text(kind)} is no annotation for a config field. Want int, float, bool, str, "
        "None, Literal, tuple, a config, or a union of these."
    )


def _fit_tuple(value: Any, kinds: tuple[Any, ...]) -> Any:
    if not isinstance(value, tuple | list):
        return _MISFIT
    if kinds[-1:] == (...,):
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        return _MISFIT
    fitted = tuple(_fit(v, k) for v, k in zip(value, kinds, strict=True))
    return _MISFIT if any(f is _MISFIT for f in fitted) else fitted


def _is_too_large(value: object) -> bool:
    """Whether a number is nan or does not fit a float32, or an int does not fit 64 bits."""
    if type(value) is int:
        return not -(2**63) <= value < 2**63
    return isinstance(value, float) and not abs(value) <= _LARGEST_FLOAT


def _misfit(field: str, written: object, value: object, kind: Any, where: str = "") -> Exception:
    """The error for a value that an annotation does not admit."""
    if _is_too_large(value):
        return ValueError(
            f"{where}{field} = {shown(written)} must be a finite number that fits 32 bits as a "
            "float or 64 bits as an int."
        )
    text = f"{type(value).__name__}(...)" if _is_config(type(written)) else shown(written)
    want = f"want {_type_text(kind)}, got {type(value).__name__}."
    return TypeError(f"{where}{field} = {text}: {want}")


def _type_text(kind: Any) -> str:
    """An annotation as one writes it, without module names."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type_text, args))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_text, args))}]"
    if kind in (types.NoneType, ...):
        return "None" if kind is types.NoneType else "..."
    return getattr(kind, "__name__", str(kind))


# Discovery: which configs a root reaches, and what they say of themselves.


def _configs_in(kind: Any) -> Iterator[type]:
    """The configs that an annotation names, left to right."""
    if _is_config(kind):
        yield kind
    elif _is_interface(kind):
        yield from sorted(filter(_is_config, _heirs(kind)), key=lambda one: one.__name__)
    for part in typing.get_args(kind) if typing.get_origin(kind) is not Literal else ():
        yield from _configs_in(part)


def _reachable(root: type) -> dict[str, type]:
    """All configs that a root's annotations lead to, by name, the root first, breadth first."""
    if not _is_config(root):
        raise TypeError(f"{root!r} is no config. Decorate the class with @configurable.")
    known, queue = {root.__name__: root}, [root]
    for cls in queue:
        for part in (p for kind in _kinds(cls).values() for p in _configs_in(kind)):
            if known.setdefault(part.__name__, part) is not part:
                other = known[part.__name__]
                raise TypeError(
                    f"{root.__name__} reaches two configs named {part.__name__}, in "
                    f"{other.__module__} and {part.__module__}. Rename one: files say bare names."
                )
            if part not in queue:
                queue.append(part)
    return known


def _describe(cls: type) -> str:
    summary, lines = _documentation(cls)
    rows = []
    for field in dataclasses.fields(cls):
        kind = _type_text(_kinds(cls)[field.name])
        default = "" if _is_required(field) else f" = {_gin_text(field.default, {})}"
        rows.append((f"  {field.name}: {kind}{default}", lines.get(field.name, "")))
    width = min(max((len(left) for left, _ in rows), default=0), 48)
    body = [f"{left:<{width}}  {line}".rstrip() for left, line in rows]
    return "\n".join([f"{cls.__name__}: {summary}", *body])


def _documentation(cls: type) -> tuple[str, dict[str, str]]:
    """The docstring's first line, and the entries of its `Attributes:` section by field."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    summary = doc.split("\n", 1)[0]
    lines = doc.partition("\nAttributes:\n")[2].splitlines()
    margin = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    entries: dict[str, str] = {}
    name = ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line and indent < margin:
            break  # the next section
        if indent == margin:
            name, _, text = line.strip().partition(":")
            entries[name] = text.strip()
        elif line:
            entries[name] += " " + line.strip()
    return summary, entries


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


# Writing: a value as gin text.


def _collect(value: object, holder: str, holders: dict[object, str]) -> None:
    """Notes each distinct config within a value, with the name of the field that first held it."""
    if isinstance(value, tuple):
        for item in value:
            _collect(item, holder, holders)
    elif _is_config(type(value)) and value not in holders:
        holders[value] = holder
        for name in _kinds(type(value)):
            _collect(getattr(value, name), name, holders)


def _gin_text(value: object, names: dict[object, str]) -> str:
    if isinstance(value, tuple):
        items = ", ".join(_gin_text(item, names) for item in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if _is_config(type(value)):
        return f"@{names.get(value, type(value).__name__)}()"
    return repr(value)


# Reading: gin's statements, and what they build.


@dataclasses.dataclass
class _Binding:
    value: Any
    where: str
    """ "file:line: ", or "" for a single binding."""
    is_used: bool = False


class _Table:
    """All bindings read so far, and the configs they built."""

    def __init__(self, root: type) -> None:
        self.root = root
        self.known = _reachable(root)
        self.bindings: dict[Key, _Binding] = {}
        self.built: dict[tuple[type, str], Any] = {}
        self.count = itertools.count()
        self.order: dict[str, int] = {}
        """When each place bound something for the last time."""
        self.places: dict[int, dict[str, str]] = {}
        """Where the fields of a built config were bound, by its id; `built` keeps it alive."""
        self.open: list[str] = []
        """What is being built, outermost first."""

    def read(self, file: Path) -> None:
        for key, value, where in bindings.read(file):
            self.bind(key, value, where)

    def override(self, text: str) -> None:
        name, equals, raw = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise ValueError(f"{text!r} is no binding. Want Class.field=value.")
        key = bindings.split(name)
        try:
            (statement,) = bindings.statements(text, "")
            value = statement.value
        except (ValueError, AttributeError):
            value = raw
        self.bind(key, value, "")
        if key[2] and not isinstance(value, Reference | Macro):
            kind = _kinds(self.known[key[1]])[key[2]]
            if _fit(value, kind) is _MISFIT and _fit(raw, kind) is not _MISFIT:
                self.bind(key, raw, "")

    def bind(self, key: Key, value: Any, where: str) -> None:
        _, name, field = key
        if field and name not in self.known:
            raise ValueError(
                f"{where}Unknown config {name}. {self.root.__name__} reaches "
                f"{', '.join(sorted(self.known))}."
            )
        if field and field not in _kinds(self.known[name]):
            fields = ", ".join(_kinds(self.known[name])) or "no fields"
            raise ValueError(f"{where}Unknown field {name}.{field}. {name} has {fields}.")
        self.bindings[key] = _Binding(value, where)
        self.order[where] = next(self.count)

    def build(self, cls: type[C], scope: str) -> C:
        if (cls, scope) in self.built:
            return self.built[cls, scope]
        values, missing, places = {}, [], {}
        self.enter(f"{scope}/{cls.__name__}" if scope else cls.__name__)
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
            binding = self.find(scope, cls.__name__, field.name)
            if binding:
                values[field.name] = self.evaluate(binding, cls, field.name, scope)
                places[field.name] = binding.where
            elif _is_required(field):
                missing.append(f"{cls.__name__}.{field.name}")
        if missing:
            kinds = (_type_text(_kinds(cls)[m.rpartition(".")[2]]) for m in missing)
            wanted = ", ".join(f"{m} ({k})" for m, k in zip(missing, kinds, strict=True))
            raise ValueError(f"{self.open[-1]} lacks {wanted}. Bind what has no default.")
        self.open.pop()
        try:
            made = cls(**values)
        except (TypeError, ValueError) as error:
            where = self.blame(str(error), cls.__name__, values, places)
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{where}{error}") from error
        self.places[id(made)] = places
        return self.built.setdefault((cls, scope), made)

    def blame(self, text: str, name: str, values: dict[str, Any], places: dict[str, str]) -> str:
        """The place of the binding at fault: the last of the fields that an error's text names.

        Fields are those of the config that was refused and of the configs that it holds. Where it
        names several, the one that was bound last met values that suited each other.
        """
        owners = [(name, places), *self.owners(list(values.values()))]
        current, found = "", []
        for named, field in _NAMED.findall(text):
            current = named or current
            found += [
                bound[field] for owner, bound in owners if owner == current and field in bound
            ]
        found = found or list(places.values())
        return max(found, key=self.order.__getitem__, default="")

    def owners(self, values: list[Any]) -> Iterator[tuple[str, dict[str, str]]]:
        """Names of configs within values, and the places where their fields were bound."""
        for value in values:
            if isinstance(value, tuple | list):
                yield from self.owners(list(value))
            elif _is_config(type(value)):
                yield type(value).__name__, self.places.get(id(value), {})
                yield from self.owners([getattr(value, f) for f in _kinds(type(value))])

    def enter(self, name: str) -> None:
        if name in self.open:
            raise ValueError(f"References go in a circle: {' -> '.join((*self.open, name))}.")
        self.open.append(name)

    def find(self, scope: str, name: str, field: str) -> _Binding | None:
        """The binding of the innermost scope. Those it hides count as used: they were heard."""
        parts, found = scope.split("/") if scope else [], None
        for n in range(len(parts) + 1):
            binding = self.bindings.get(("/".join(parts[:n]), name, field))
            if binding:
                binding.is_used, found = True, binding
        return found

    def evaluate(self, binding: _Binding, cls: type, field: str, scope: str) -> Any:
        value = self.resolve(binding.value, binding.where, scope)
        kind = _kinds(cls)[field]
        if _fit(value, kind) is _MISFIT:
            name = f"{cls.__name__}.{field}"
            raise _misfit(name, binding.value, value, kind, binding.where)
        return value

    def resolve(self, value: Any, where: str, scope: str) -> Any:
        """The value with references built and macros replaced."""
        if isinstance(value, list | tuple):
            return type(value)(self.resolve(item, where, scope) for item in value)
        if isinstance(value, Macro):
            macro_scope, _, name = value.name.rpartition("/")
            macro = self.bindings.get((macro_scope, name, ""))
            if macro is None:
                names = ", ".join(sorted(f"%{n}" for _, n, field in self.bindings if not field))
                raise ValueError(f"{where}Unknown macro {value!r}. Known: {names or 'none'}.")
            macro.is_used = True
            self.enter(repr(value))
            resolved = self.resolve(macro.value, macro.where, scope)
            self.open.pop()
            return resolved
        if not isinstance(value, Reference):
            return value
        if value.name not in self.known:
            raise ValueError(
                f"{where}Unknown config {value!r}. {self.root.__name__} reaches "
                f"{', '.join(sorted(self.known))}."
            )
        if not value.is_called:
            raise ValueError(f"{where}{value!r}: want a config, not its class. Write {value!r}().")
        return self.build(self.known[value.name], value.scope or scope)

    def refuse_unused(self) -> None:
        for (scope, name, field), binding in self.bindings.items():
            if binding.is_used:
                continue
            if not field:
                raise ValueError(
                    f"{binding.where}Bound but never used: {name}. A field is bound as "
                    f"Class.{name}, a macro is used as %{name}."
                )
            path = f"{scope}/{name}" if scope else name
            holders = (
                f"{cls.__name__}.{holder}"
                for cls in self.known.values()
                for holder, kind in _kinds(cls).items()
                if self.known[name] in _configs_in(kind)
            )
            line = f"{next(holders, self.root.__name__)} = @{path}()"
            raise ValueError(
                f"{binding.where}Bound but never used: {path}.{field}. "
                f"Does {self.root.__name__} reach it, with a line like {line}?"
            )
