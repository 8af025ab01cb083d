"""A strict reader of JSON in files. It refuses texts that Python's reader accepts or crashes on.

An object with a repeated key is ambiguous, NaN is not JSON, and deep nesting makes Python's reader
raise a RecursionError. Callers add the file and the line to the message.
"""

from __future__ import annotations

import json
from typing import Any


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
      json.JSONDecodeError: If the text is not JSON.
      ValueError: If an object repeats a key, a number cannot be read, or the nesting is too deep.
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
