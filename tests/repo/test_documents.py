"""Documents made from the code are fresh, and the drawn example is what the code builds."""

import json
import re

import fakes
import numpy as np
import pytest
from repo import fits
from repo.documents import MADE
from repo.example import PROMPT, WRITTEN, calls, example_trie, example_words
from repo.sources import PACKAGE, ROOT

from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.replay import replay
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table


@pytest.mark.parametrize("name", MADE)
def test_a_made_document_is_fresh(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == MADE[name](), "run `make docs`"


def test_the_tree_of_the_architecture_page_is_the_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^[├└]── (\w+\.py) ", page, re.MULTILINE))
    room = ""
    for inner, name, files in re.findall(r"^(│   )?[├└]── (\w+)/ +(.+)$", page, re.MULTILINE):
        room = room if inner else name
        folder = f"{room}/{name}" if inner else name
        told |= {f"{folder}/{file.strip()}.py" for file in files.split("·")}
    files = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")}
    assert told == {name for name in files if not name.endswith("__init__.py")}


def test_a_page_of_what_fits_tells_sizes_and_bytes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fits, "RESULTS", tmp_path)
    sampler = {"ok": True, "peak_bytes_per_chip": 3 * 2**29, "compile_seconds": 5.2}
    error = "RESOURCE_EXHAUSTED: Of no use. Wants (22.92G) and has (15.75G). Exceeded by 7.17G."
    refused = {"ok": False, "error": error, "compile_seconds": 1.7}
    for name, found in (
        ("qwen3_8b_decode_v5p_16", sampler | {"temp_over_kv": 0.0071}),
        ("qwen3_8b_v5e_32", refused),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    rows = [line.split(" | ") for line in fits.fits().splitlines() if line.startswith("| `")]
    told = {cells[0].strip("| `"): cells[1:] for cells in rows}
    assert told["qwen3_8b_decode_v5p_16"] == [
        *("Qwen3-8B", "decode", "v5p:2x2x4", "16", "16 x 40,960"),
        *("yes", "1.5 of 95", "0.007", "5 |"),
    ]
    assert told["qwen3_8b_v5e_32"] == [
        *("Qwen3-8B", "SFT step", "v5e:4x8", "32", "32 x 40,960"),
        *("no: Wants (22.92G) and has (15.75G)", "", "", "2 |"),
    ]
    assert told["qwen3_8b_v6e_64"][5] == "not compiled yet"


def test_the_worked_example_is_replayed_to_its_calls() -> None:
    tokenizer = fakes.Characters()
    spelled = {"U": "a", "A": "b", "N": "\n", "EOS": "<eos>"}
    spelled |= {"o1": "e", "o2": "f", "p": "g", "q": "h"}

    def ids(words: list[str]) -> list[int]:
        return tokenizer.encode("".join(spelled.get(word, word) for word in words)).tolist()

    protocol = ThreadWeaver(make_table(tokenizer), ForkJoin())
    made = replay(protocol, np.array(ids(WRITTEN), np.int32), len(PROMPT))
    found = [(call.context.tolist(), call.sampled.tolist()) for call in made.calls]
    assert found == [(ids(context), ids(sampled)) for context, sampled in calls()]


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
