"""Fields of config classes: what an annotation admits, and which classes it leads to.

`config.py` declares config classes, and `builder.py` builds them from bindings; both use this file.
It finds classes by their annotations and does not depend on any of them.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from tw_jax.bounds import shown

_LARGEST_FLOAT = (2 - 2**-23) * 2.0**127
MISFIT = object()
"""Returned by `fit` if an annotation does not admit a value. None is a value."""


# Config classes and interfaces.


def post_init(self: Any) -> None:
    """`__post_init__` of every config class: checks the type of each field, then calls `check`."""
    cls = type(self)
    for name, kind in kinds(cls).items():
        value = getattr(self, name)
        fitted = fit(value, kind)
        if fitted is MISFIT:
            raise misfit(f"{cls.__name__}.{name}", value, value, kind=kind)
        object.__setattr__(self, name, fitted)
    if hasattr(cls, "check"):
        self.check()


def is_config(kind: object) -> bool:
    """Returns whether an object is a config class."""
    return isinstance(kind, type) and getattr(kind, "__post_init__", None) is post_init


def is_interface(kind: object) -> bool:
    """Returns whether an object is a class under `@interface`; its subclasses are not."""
    return isinstance(kind, type) and "_is_interface" in vars(kind)


@functools.cache
def kinds(cls: type) -> dict[str, Any]:
    """Returns the annotation of each field, in the order of declaration."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise TypeError(
            f"{cls.__name__}: its annotations name {error.name!r}, which its module does not "
            "define. Declare config classes at the top level of a module."
        ) from None
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Returns whether a field has no default."""
    return field.default is dataclasses.MISSING


# Which config classes an annotation leads to.


def options(kind: Any) -> list[type]:
    """Returns the config classes of which a value may be an instance, left to right.

    The members of a union count, and all config classes that inherit from an interface. The
    elements of a tuple do not count.
    """
    if is_config(kind):
        return [kind]
    if is_interface(kind):
        return _implementations(kind)
    parts = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else ()
    return list(dict.fromkeys(cls for part in parts for cls in options(part)))


def configs_in(kind: Any) -> Iterator[type]:
    """Yields the config classes that an annotation leads to, the elements of tuples included."""
    if is_config(kind):
        yield kind
    elif is_interface(kind):
        yield from _implementations(kind)
    elif typing.get_origin(kind) is not Literal:
        for part in typing.get_args(kind):
            yield from configs_in(part)


def has_interface(kind: Any) -> bool:
    """Returns whether an annotation contains an interface."""
    return is_interface(kind) or any(map(has_interface, typing.get_args(kind)))


def _implementations(cls: type) -> list[type]:
    """The config classes that inherit from an interface and are imported, sorted by name."""
    found = [cls]
    for one in found:
        found += [sub for sub in one.__subclasses__() if sub not in found]
    return sorted(filter(is_config, found), key=lambda one: (one.__name__, one.__module__))


def reachable(root: type) -> dict[str, type]:
    """Returns all config classes that a root's annotations lead to.

    Args:
      root: a config class.

    Returns:
      Classes by name: the root first, then breadth first.

    Raises:
      TypeError: if the root is not a config class, or if two classes have the same name.
    """
    if not is_config(root):
        raise TypeError(f"{root!r} is not a config class. Decorate the class.")
    classes, queue = {root.__name__: root}, [root]
    for cls in queue:
        for part in (p for kind in kinds(cls).values() for p in configs_in(kind)):
            if classes.setdefault(part.__name__, part) is not part:
                other = classes[part.__name__]
                raise TypeError(
                    f"{root.__name__} reaches two config classes named {part.__name__}, in "
                    f"{other.__module__} and {part.__module__}. Rename one, because a config file "
                    "names a class without its module."
                )
            if part not in queue:
                queue.append(part)
    return classes


# Which values an annotation admits.


def fit(value: Any, kind: Any) -> Any:
    """Returns the value as a field of this annotation stores it, or `MISFIT`."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        same = (a for a in typing.get_args(kind) if type(a) is type(value) and a == value)
        return next(same, MISFIT)
    if origin in (Union, types.UnionType):
        fitted = [f for k in typing.get_args(kind) if (f := fit(value, k)) is not MISFIT]
        # `float | int` keeps the int that it was given.
        return next((f for f in fitted if type(f) is type(value)), (fitted or [MISFIT])[0])
    if origin is tuple:
        return _fit_tuple(value, typing.get_args(kind))
    if kind in (int, float) and _is_too_large(value):
        return MISFIT
    if kind is float:
        return float(value) if type(value) is int or isinstance(value, float) else MISFIT
    if kind in (int, bool, str, types.NoneType) or is_config(kind):
        return value if type(value) is kind else MISFIT
    if is_interface(kind):
        return value if is_config(type(value)) and isinstance(value, kind) else MISFIT
    raise TypeError(
        f"{type_text(kind)} is not an annotation of a config field. Use int, float, bool, str, "
        "None, Literal, tuple, a config class, an interface, or a union of these."
    )


def _fit_tuple(value: Any, kinds: tuple[Any, ...]) -> Any:
    if not isinstance(value, tuple | list):
        return MISFIT
    if kinds[-1:] == (...,):
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        return MISFIT
    fitted = tuple(fit(v, k) for v, k in zip(value, kinds, strict=True))
    return MISFIT if any(f is MISFIT for f in fitted) else fitted


def _is_too_large(value: object) -> bool:
    """Whether a number is nan or does not fit float32, or an int does not fit 64 bits."""
    if type(value) is int:
        return not -(2**63) <= value < 2**63
    return isinstance(value, float) and not abs(value) <= _LARGEST_FLOAT


def misfit(field: str, written: object, value: object, *, kind: Any, where: str = "") -> Exception:
    """Returns the error for a value that an annotation does not admit.

    Args:
      field: "Class.field".
      written: the value as the file writes it, such as a reference.
      value: the value that it stands for.
      kind: the annotation.
      where: the place of the binding, "file:line: ".
    """
    if _is_too_large(value):
        return ValueError(
            f"{where}{field} = {shown(written)} must be a finite number that fits 32 bits as a "
            "float or 64 bits as an int."
        )
    text = f"{type(value).__name__}(...)" if is_config(type(written)) else shown(written)
    needed = f"must be {type_text(kind)}, but is {type(value).__name__}."
    return TypeError(f"{where}{field} = {text} {needed}")


def type_text(kind: Any) -> str:
    """Returns an annotation as it is written in code, without module names."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if origin in (Union, types.UnionType):
        return " | ".join(map(type_text, args))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_text, args))}]"
    if kind in (types.NoneType, ...):
        return "None" if kind is types.NoneType else "..."
    return getattr(kind, "__name__", str(kind))
