"""Ranges of config fields: one line of a `check` for each range, and one form for each refusal.

Numbers of a config end up in 32-bit arrays, so a whole number has an upper limit where none is
given, and a positive float must not round to 0 in float32. This file does not know any config.
"""

from __future__ import annotations

from typing import Any

LARGEST = 2**31 - 1
"""Upper limit of a whole number where a check gives none: the largest of 32 bits."""
COLDEST = 1e-4
"""The lowest temperature above 0; float32 does not hold logits divided by much smaller ones."""
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
    """Refuses fields of a config that are out of range; a field that is None passes.

    Args:
      cfg: the config, as `check` sees it.
      *names: fields that hold a number or None.
      least: smallest value allowed.
      above: largest value that is too small; a float must also be above 0 in float32 if this is 0.
      most: largest value allowed; `LARGEST` for a whole number without `most` and `below`.
      below: smallest value that is too large.

    Raises:
      ValueError: names field, value and range.
    """
    for name in names:
        value = getattr(cfg, name)
        if value is None:
            continue
        limits = {"at least": least, "above": above, "at most": most, "below": below}
        if isinstance(value, int) and most is None and below is None and value > LARGEST:
            limits["at most"] = LARGEST
        wanted = [(words, limit) for words, limit in limits.items() if limit is not None]
        if not all(_holds(value, words, limit) for words, limit in wanted):
            told = " and ".join(f"{words} {limit}" for words, limit in wanted)
            raise ValueError(f"{type(cfg).__name__}.{name} = {shown(value)} must be {told}.")
        if above == 0 and isinstance(value, float) and value < _SMALLEST:
            raise ValueError(
                f"{type(cfg).__name__}.{name} = {value} must be at least {_SMALLEST}, because "
                "smaller numbers are 0 in float32."
            )


def require_temperature(cfg: Any) -> None:
    """Refuses a config whose temperature is neither 0 nor at least `COLDEST`."""
    require(cfg, "temperature", least=0)
    if 0 < cfg.temperature < COLDEST:
        raise ValueError(
            f"{type(cfg).__name__}.temperature = {cfg.temperature} is too low for float32. Set it "
            f"to 0 for the likeliest token, or to at least {COLDEST}."
        )


def require_text(cfg: object, *names: str) -> None:
    """Refuses texts of a config that are blank or hold a null character; None passes.

    Args:
      cfg: the config, as `check` sees it.
      *names: fields that hold a text, a tuple of texts or None.

    Raises:
      ValueError: names field and value.
    """
    for name in names:
        value = getattr(cfg, name)
        texts = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(not text.strip() or "\0" in text for text in texts):
            raise ValueError(
                f"{type(cfg).__name__}.{name} = {shown(value)} must not be empty or blank, nor "
                "hold a null character."
            )


def shown(value: Any) -> str:
    """A value as a sentence shows it: as Python writes it, and cut where that is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out whole numbers of thousands of digits
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
