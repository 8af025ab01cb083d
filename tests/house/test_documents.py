"""Documents made from the code are fresh, and the drawn example is what the code builds."""

import re

import numpy as np
import pytest
from house.documents import MADE
from house.example import example_trie, example_words
from house.sources import PACKAGE, ROOT


@pytest.mark.parametrize("name", MADE)
def test_a_made_document_is_fresh(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == MADE[name](), "run `make docs`"


def test_the_tree_of_the_architecture_page_is_the_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^[├└]── (\w+\.py) ", page, re.MULTILINE))
    for room, files in re.findall(r"^[├└]── (\w+)/ +(.+)$", page, re.MULTILINE):
        told |= {f"{room}/{name.strip()}.py" for name in files.split("·")}
    files = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")}
    assert told == {name for name in files if not name.endswith("__init__.py")}


def test_the_worked_example_is_what_the_code_builds() -> None:
    # A line of the table is a run of nodes; within a run the parent is the node before.
    page = (ROOT / "docs" / "trie.md").read_text(encoding="utf-8")
    row = r"^\| (\d+)-(\d+) \| `(.+?)` \| .*? \| (-?\d+) \| (\d+) \| (\d+) \| ([01]) \|$"
    runs = re.findall(row, page, re.MULTILINE)
    words, parent, depth, end, weight = [], [], [], [], []
    for first, last, tokens, first_parent, first_depth, run_end, run_weight in runs:
        size = int(last) - int(first) + 1
        assert int(first) == len(words), "runs follow one another"
        words += tokens.split()
        parent += [int(first_parent), *range(int(first), int(last))]
        depth += range(int(first_depth), int(first_depth) + size)
        end += [int(run_end)] * size
        weight += [float(run_weight)] * size
    trie = example_trie()
    assert words == example_words()
    np.testing.assert_array_equal(parent, trie.parent)
    np.testing.assert_array_equal(depth, trie.depth)
    np.testing.assert_array_equal(end, trie.end)
    np.testing.assert_array_equal(weight, trie.weight)
