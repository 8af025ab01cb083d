"""JSON as it is found in files: what Python's reader lets pass, or ends in a traceback, is refused.

An object with a key twice has two meanings, NaN is no JSON, and deep nesting ends Python's reader
in a RecursionError. This file does not know what is read; a caller puts the place before the fault.
"""

from __future__ import annotations

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


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found
