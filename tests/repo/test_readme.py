"""Commands and links of the pages and of the Makefile exist."""

import re
import shlex

import pytest
from repo.sources import ROOT, VERBS

PAGES = [
    "README.md",
    "docs/answers.md",
    "docs/architecture.md",
    "docs/contributing.md",
    "docs/decisions.md",
    "docs/pgrpo.md",
    "docs/pods.md",
    "docs/quickstart.md",
    "docs/trie.md",
]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/|\$\(BIN\)/)?((?:tw|make) .*)$")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())


def commands(text: str) -> list[list[str]]:
    """The `tw` and `make` commands among the lines, split as a shell would."""
    found = (COMMAND.match(line.strip()) for line in text.splitlines())
    return [shlex.split(match[1], comments=True) for match in found if match]


def complaint(words: list[str]) -> str | None:
    """Why a command would fail; None if it would not."""
    program, *rest = words
    if program == "make":
        wanted = [word for word in rest if not word.startswith("-") and "=" not in word]
        unknown = [word for word in wanted if word not in TARGETS]
        return f"no such target: {unknown}" if unknown else None
    verb = rest[0]
    if verb not in {*VERBS, "config"}:
        return f"no such verb: {verb}"
    for path in (word for word in rest if word.startswith("configs/")):
        if not list(ROOT.glob(path)):
            return f"no such file: {path}"
        if verb != "config" and not path.startswith(f"configs/{verb}/"):
            return f"not a config of {verb}: {path}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    told = [(" ".join(c), complaint(c)) for block in FENCE.findall(text) for c in commands(block)]
    assert [pair for pair in told if pair[1]] == []


def test_commands_of_the_makefile_exist() -> None:
    told = [(" ".join(c), complaint(c)) for c in commands(MAKEFILE)]
    assert told, "the Makefile runs `tw` somewhere"
    assert [pair for pair in told if pair[1]] == []


def test_the_readme_says_how_to_begin() -> None:
    blocks = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    begun = [c for block in blocks for c in commands(block)]
    assert ["make", "demo"] in begun
    assert ["make", "test"] in begun, "CI runs the README's own test command"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
