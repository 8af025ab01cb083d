"""Declares config classes, and builds them from gin files.

`@configurable` makes a frozen dataclass whose fields are checked when it is built. `@interface`
marks an abstract class that stands for all config classes that inherit from it. `load_config` reads
gin files into one immutable tree of config classes, `describe` lists the fields that a file may
set, and `operative` writes a tree as gin text. No global state is kept, so that several roots can
be loaded in one process. This file does not depend on any config class; it finds them by walking
the annotations of the root.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tw_jax.builder import Builder
from tw_jax.fields import is_config, is_required, kinds, post_init, reachable, type_text
from tw_jax.table import Table

C = TypeVar("C")


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def configurable(cls: type[C]) -> type[C]:
    """Makes a keyword-only frozen dataclass whose fields are checked when it is built.

    A field is annotated with `int` (of 64 bits), `float` (an int is accepted and stored as a
    float; nan, infinities and numbers that float32 cannot hold are refused), `bool`, `str`,
    `None`, `Literal[...]`, `tuple[X, ...]`, `tuple[X, Y]` (a list is accepted and stored as a
    tuple), another config class, an interface, or a union of these. `ClassVar`s are not fields.
    After the types are checked, the optional method `check(self)` checks ranges
    (`bounds.require`) and rules across fields. It raises ValueError with a text that names the
    field as "Class.field". The `Attributes:` section of the class docstring describes each field.

    A class may declare `inherits: ClassVar[str] = "checkpoint"`: the name of one of its fields
    (`str` or `str | None`) that holds the folder of a checkpoint. Values that the checkpoint
    records then need no line in a config file; see `load_config`.

    Args:
      cls: a class without `__post_init__`.

    Returns:
      The same class, now a dataclass.

    Raises:
      TypeError: if the class has a `__post_init__`.
    """
    if "__post_init__" in vars(cls):
        raise TypeError(f"{cls.__name__}.__post_init__: a config checks its fields in check(self).")
    setattr(cls, "__post_init__", post_init)  # noqa: B010  (not an attribute for pyright)
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def interface(cls: type[C]) -> type[C]:
    """Marks an abstract class; a field that is annotated with it admits all that inherit from it.

    The config classes are found when a root is loaded, so that a module that is imported before
    can add one: `@configurable class Mine(RewardTerm)`. The interface has no fields of its own.

    Args:
      cls: a class without fields.

    Returns:
      The same class.
    """
    setattr(cls, "_is_interface", True)  # noqa: B010  (not an attribute for pyright)
    return cls


def load_config(
    root: type[C],
    files: str | Path | Sequence[str | Path],
    bindings: Sequence[str] = (),
    *,
    inherit: Callable[[str], str] | None = None,
) -> C:
    """Builds a config from gin files and single bindings.

    Files and bindings are read in order, and a later binding of the same field wins. A binding in
    a scope, `train/Sampler.top_k = 5`, applies to the config that `@train/Sampler()` builds, and
    takes precedence over the unscoped one. A reference without a scope is built in the scope of
    the config that holds it. An include is searched for in the folder of the file that includes
    it, then in the working directory. It may bind classes and fields that this root does not use.

    A field of a config class needs no line, because the class is built from its bindings:

    - a field of one config class that has no default is always built;
    - a field whose default is a config is built if the files bind something of its class;
    - an optional field, `lora: Lora | None = None`, is built if the files bind something of its
      class and no other field leads to the class;
    - for a union or an interface, the class is taken that has bindings, if there is only one.

    Args:
      root: the config class to build.
      files: one gin file or several.
      bindings: single bindings as a shell passes them, "Class.field=value". A value is taken as
        text if it is not a gin value, or if the field does not admit the gin value but admits the
        text: "Sft.workdir=runs/mine".
      inherit: returns what a checkpoint records as gin text, given its folder. It is called for
        each class that the root reaches and that declares `inherits`, if its field holds a
        folder. The lines of the text have the lowest priority. Its root class is
        `LanguageModel`, whose lines bind the field of the same name of every class that has it.

    Returns:
      An instance of `root`.

    Raises:
      ValueError: on a syntax error, an unknown class or field, an unused binding that is not in an
        include, a field without a value, a number that is not finite or too large, or if `check`
        of a config refuses its values. The text begins with the place of the binding at fault.
      TypeError: if the annotation of a field does not admit its value.
      FileNotFoundError: if a file or an include does not exist.
    """
    table = Table(root)
    for file in [files] if isinstance(files, str | Path) else files:
        table.read(Path(file))
    for binding in bindings:
        table.override(binding)
    if inherit is not None:
        table.inherit(inherit)
    try:
        built = Builder(table).build(root, "")
    except RecursionError:
        raise ValueError(
            f"The references and macros of {root.__name__} are nested too deeply. Bind values "
            "directly."
        ) from None
    table.refuse_unused()
    return built


def describe(root: type) -> str:
    """Lists every config class that a root reaches: each field's type, default and description.

    Args:
      root: a config class.

    Returns:
      Text with a paragraph for each class, the root first.
    """
    return "\n\n".join(_describe(cls) for cls in reachable(root).values()) + "\n"


def operative(instance: object) -> str:
    """Writes a config and all that it holds as gin text, which `load_config` reads again.

    If different values of one class occur, each but the root gets a scope. The scope is named
    after the first field that holds the value.

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
        "".join(f"{name}.{f} = {_gin_text(getattr(v, f), names)}\n" for f in kinds(type(v)))
        for v, name in names.items()
    )


# Descriptions.


def _describe(cls: type) -> str:
    summary, lines = _documentation(cls)
    rows = []
    for field in dataclasses.fields(cls):
        kind = type_text(kinds(cls)[field.name])
        default = "" if is_required(field) else f" = {_gin_text(field.default, {})}"
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


# Writing gin text.


def _collect(value: object, holder: str, holders: dict[object, str]) -> None:
    """Adds each distinct config within a value, with the name of the first field that holds it."""
    if isinstance(value, tuple):
        for item in value:
            _collect(item, holder, holders)
    elif is_config(type(value)) and value not in holders:
        holders[value] = holder
        for name in kinds(type(value)):
            _collect(getattr(value, name), name, holders)


def _gin_text(value: object, names: dict[object, str]) -> str:
    if isinstance(value, tuple):
        items = ", ".join(_gin_text(item, names) for item in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if is_config(type(value)):
        return f"@{names.get(value, type(value).__name__)}()"
    return repr(value)
