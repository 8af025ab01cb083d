"""JSON as it is found in files: what Python's reader lets pass, or ends in a traceback, is refused.

An object with a key twice has two meanings, NaN is no JSON, and deep nesting ends Python's reader
in a RecursionError. This file does not know what is read; a caller puts the place before the fault.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
      json.JSONDecodeError: it is no JSON.
      ValueError: an object has a key twice, a number cannot be read, or it is nested too deeply; a
        sentence and what to do.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError(
            f"lists or objects are nested too deeply ({text[:40]}…). Remove that record, or nest "
            "it less."
        ) from None
    except KeyError as error:
        raise ValueError(
            f"the key {error.args[0]!r:.60} occurs twice in one object. Keep one of them."
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}. Write that number as a string.") from None


def check_fields(record: Any) -> None:
    """Checks the text fields and the JSON objects of a record, a dataclass.

    Raises:
      TypeError: If a field that is annotated with `str` is no text, or one that is annotated with
        `dict[str, Any]` no dict.
      ValueError: If a text cannot be encoded, because it has one half of a surrogate pair.
    """
    for field in dataclasses.fields(record):
        name, value = f"{type(record).__name__}.{field.name}", getattr(record, field.name)
        if field.type == "dict[str, Any]" and not isinstance(value, dict):
            raise TypeError(f"{name} = {value!r:.40} must be an object of JSON.")
        if field.type == "str":
            _check_text(name, value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(
            f"{name} = {value!r:.40} must be text, not {type(value).__name__}. Write it in quotes; "
            "numbers stay exact."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a surrogate pair at character {error.start}, which is not Unicode "
            "text. Replace that character."
        ) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found
