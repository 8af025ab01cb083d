"""Checks of ranges: a config's `check` needs one line for each range.

Numbers of a config are stored in 32-bit arrays. So a whole number always has an upper limit, and a
positive float must not round to 0 in float32. This file does not depend on any config class.
"""

from __future__ import annotations

from typing import Any

LARGEST = 2**31 - 1
"""The upper limit of a whole number if a check gives none: the largest 32-bit integer."""
COLDEST = 1e-4
"""The lowest temperature above 0. Logits divided by a much lower one overflow float32."""
_SMALLEST = 2.0**-126
"""The smallest normal float32; devices round smaller numbers to 0."""
_LONGEST = 120


def require(
    cfg: object,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises an error if a field of a config is out of range. None is in range.

    Args:
      cfg: the config that is checked.
      *names: fields that hold a number or None.
      least: the smallest valid value.
      above: valid values are larger. If this is 0, a float must also be above 0 in float32.
      most: the largest valid value; `LARGEST` for a whole number without `most` and `below`.
      below: valid values are smaller.

    Raises:
      ValueError: if a value is out of range; the text names field, value and range.
    """
    for name in names:
        value = getattr(cfg, name)
        if value is None:
            continue
        limits = {"at least": least, "above": above, "at most": most, "below": below}
        if isinstance(value, int) and most is None and below is None and value > LARGEST:
            limits["at most"] = LARGEST
        given = [(words, limit) for words, limit in limits.items() if limit is not None]
        if not all(_holds(value, words, limit) for words, limit in given):
            needed = " and ".join(f"{words} {limit}" for words, limit in given)
            raise ValueError(f"{type(cfg).__name__}.{name} = {shown(value)} must be {needed}.")
        if above == 0 and isinstance(value, float) and value < _SMALLEST:
            raise ValueError(
                f"{type(cfg).__name__}.{name} = {value} must be at least {_SMALLEST}, because "
                "smaller numbers are 0 in float32."
            )


def require_temperature(cfg: Any) -> None:
    """Raises ValueError if a config's temperature is neither 0 nor at least `COLDEST`."""
    require(cfg, "temperature", least=0)
    if 0 < cfg.temperature < COLDEST:
        raise ValueError(
            f"{type(cfg).__name__}.temperature = {cfg.temperature} is too low for float32. Set it "
            f"to 0, which takes the most likely token, or to at least {COLDEST}."
        )


def require_text(cfg: object, *names: str) -> None:
    """Raises an error if a text of a config is blank or contains a null character.

    Args:
      cfg: the config that is checked.
      *names: fields that hold a text, a tuple of texts, or None, which is valid.

    Raises:
      ValueError: if a text is not valid; the error names field and value.
    """
    for name in names:
        value = getattr(cfg, name)
        texts = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(not text.strip() or "\0" in text for text in texts):
            raise ValueError(
                f"{type(cfg).__name__}.{name} = {shown(value)} must not be empty or blank, nor "
                "contain a null character."
            )


def shown(value: Any) -> str:
    """Returns a value as Python writes it, cut off if that is long; for error messages."""
    try:
        text = repr(value)
    except ValueError:  # Python does not convert whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def counted(number: int, noun: str) -> str:
    """A number of things in English: "1 step", "2 steps", "3 processes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


def _holds(value: float, words: str, limit: float) -> bool:
    match words:
        case "at least":
            return value >= limit
        case "above":
            return value > limit
        case "at most":
            return value <= limit
        case _:
            return value < limit
