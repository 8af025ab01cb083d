r"""Units of a value: separates a unit from its value, and gives each unit one name.

A unit is text in `\text{}`, words of the table after a number, a degree sign, or a currency sign
before the number. A unit that is not in the table is equal only to itself.
"""

from __future__ import annotations

import re

DEGREE = "degree"

_NAMES = {
    "millimeter": "mm millimeter millimetre",
    "centimeter": "cm centimeter centimetre",
    "meter": "m meter metre",
    "kilometer": "km kilometer kilometre",
    "inch": "in inch inche",
    "foot": "ft foot feet",
    "yard": "yd yard",
    "mile": "mi mile",
    "milligram": "mg milligram",
    "gram": "g gram",
    "kilogram": "kg kilogram",
    "pound": "lb lbs pound",
    "ounce": "oz ounce",
    "second": "s sec second",
    "minute": "min minute",
    "hour": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "yr year",
    "liter": "l liter litre",
    "milliliter": "ml milliliter millilitre",
    "gallon": "gal gallon",
    "dollar": "dollar usd",
    "cent": "cent",
    "euro": "euro",
    "degree": "degree deg",
    "radian": "rad radian",
    "unit": "unit",
    "mile/hour": "mph",
    "meter/second": "mps",
}
_NAME_OF = {alias: name for name, aliases in _NAMES.items() for alias in aliases.split()}
_COMMAND = r"\\(?:text|textbf|textrm|textnormal|mbox|mathrm|rm)\s*"
_TEXT = re.compile(
    rf"(?P<body>.*[^\s])\s*{_COMMAND}\{{(?P<unit>[^{{}}\\]*[A-Za-z][^{{}}\\]*)\}}"
    r"(?:\^\{?(?P<power>[23])\}?)?"
)
_PLAIN = re.compile(
    r"(?P<body>.*[0-9}])\s*(?P<unit>[A-Za-z]{2,}(?: [A-Za-z]+){0,3})(?:\^\{?(?P<power>[23])\}?)?"
)
_DEGREE = re.compile(
    rf"(?P<body>.*[^\s])\s*\^\s*(?:\\circ|\{{\s*\\circ\s*\}})\s*(?:{_COMMAND}\{{\s*(?P<scale>[CF])\s*\}}"
    r"|(?P<plain>[CF]))?"
)
_JOINS = frozenset(("and", "or", "to", "if", "mod"))


def split(text: str) -> tuple[str, str]:
    """Returns a text without its unit, and the unit, which is "" if there is none."""
    if text.startswith("\\$"):
        return text[2:].strip(), "dollar"
    if text.startswith("\N{EURO SIGN}"):
        return text[1:].strip(), "euro"
    if text.count("$") == 1 and text.startswith("$"):
        return text[1:].strip(), "dollar"
    if (found := _DEGREE.fullmatch(text)) is not None:
        scale = found["scale"] or found["plain"]
        return found["body"], f"{DEGREE} {scale}" if scale else DEGREE
    if (found := _TEXT.fullmatch(text)) is not None:
        words = found["unit"].split()
        if not _JOINS & set(words):
            return found["body"], _named(words, found["power"])
    found = _PLAIN.fullmatch(text)
    if found is not None and is_known(name := _named(found["unit"].split(), found["power"])):
        return found["body"], name
    return text, ""


def is_known(unit: str) -> bool:
    """Returns whether every word of a unit is in the table."""
    names = set(_NAMES)
    words = [word.split("^")[0] for word in unit.split("/")]
    return unit in (f"{DEGREE} C", f"{DEGREE} F") or unit in names or all(w in names for w in words)


def _named(words: list[str], power: str | None) -> str:
    """Returns one name for a unit: `square inches`, `sq in` and `inches^2` become `inch^2`."""
    text = " ".join(words).replace(" per ", "/").replace(".", "")
    parts = []
    for part in text.split("/"):
        word, exponent = part.strip(), ""
        for prefix, number in (("square ", "2"), ("sq ", "2"), ("cubic ", "3"), ("cu ", "3")):
            if word.casefold().startswith(prefix):
                word, exponent = word[len(prefix) :], number
        if (raised := re.fullmatch(r"(.*?)\s*\^\s*\{?([23])\}?", word)) is not None:
            word, exponent = raised[1], raised[2]
        folded = word.casefold() if len(word) > 2 else word
        name = _NAME_OF.get(folded) or _NAME_OF.get(folded.removesuffix("s")) or folded
        parts.append(name + (f"^{exponent}" if exponent else ""))
    if power is not None:
        parts[-1] = f"{parts[-1]}^{power}"
    return "/".join(parts)
