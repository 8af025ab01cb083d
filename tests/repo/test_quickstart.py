"""The quickstart runs as it stands, on the page and as a notebook, and its names have types."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from repo.notebook import code_cells, python_blocks
from repo.sources import ROOT

import tw_jax

PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
NOTEBOOK = (ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8")
CODE = "\n".join(code_cells(NOTEBOOK))
TRAINING = (ROOT / "docs" / "api" / "training.md").read_text(encoding="utf-8")
(REINFORCEMENT,) = python_blocks(TRAINING)
FACTS = """
import json
facts = {
    "loss": float(metrics["loss"]),
    "nodes": len(trie), "source_tokens": trie.source_tokens,
    "rounds": rollout.rounds, "finish": rollout.finish,
    "threads": [tokenizer.decode(call.sampled) for call in rollout.calls if call.is_thread],
    "text": tokenizer.decode(rollout.ids), "question": question, "response": response,
    "total": tw.cost_from_calls(rollout).total, "longest": tw.cost_from_calls(rollout).longest,
    "verdict": tw.grade(tokenizer.decode(rollout.ids), "408", where="anywhere"),
}
"""
REINFORCEMENT_FACTS = """
facts["reinforcement"] = {name: float(value) for name, value in metrics.items()}
facts["drawn"] = sum(tw.cost_from_calls(made).total for made in rollouts)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def facts(folder) -> dict:
    """What the cells of the notebook, and then the lines of the API page, computed in a process."""
    script = "\n".join([CODE, FACTS, REINFORCEMENT, REINFORCEMENT_FACTS])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_notebook_has_the_code_and_the_text_of_the_page() -> None:
    assert code_cells(NOTEBOOK) == [block.strip("\n") for block in python_blocks(PAGE)]
    texts = [c["source"] for c in json.loads(NOTEBOOK)["cells"] if c["cell_type"] == "markdown"]
    assert all("".join(text) in PAGE for text in texts[1:])


def test_the_page_has_at_most_30_lines_of_python_and_no_gin() -> None:
    lines = [line for line in CODE.splitlines() if line.strip()]
    assert lines
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    assert "gin" not in CODE


def test_the_model_learns_the_text_by_heart(facts) -> None:
    assert facts["loss"] < 0.01
    assert facts["text"].startswith(f"{facts['question']}\n{facts['response']}")
    assert (facts["verdict"], facts["finish"]) == ("correct", "eos")


def test_the_rollout_forks_into_two_threads(facts) -> None:
    assert facts["rounds"] == 1
    assert facts["threads"] == [" 4 * 12 = 48\n</Thread>", " 30 * 12 = 360\n</Thread>"]


def test_the_numbers_of_the_page_are_those_of_the_run(facts) -> None:
    page = " ".join(PAGE.split())
    assert f"{facts['nodes']} nodes hold the {facts['source_tokens']} tokens" in page
    assert f"{facts['total']} sampled tokens in total, and {facts['longest']} on the long" in page
    longer, shorter = sorted(map(len, facts["threads"]), reverse=True)
    tag = len("</Thread>") - 1  # one token, not one for each byte
    assert f"threads of {longer - tag} and {shorter - tag} tokens" in page
    assert facts["total"] - facts["longest"] == shorter - tag


def test_the_picture_is_written_and_the_one_of_the_page_shows_the_same_calls(facts, folder) -> None:
    drawn = (ROOT / "docs" / "images" / "quickstart.svg").read_text(encoding="utf-8")
    titles = re.findall(r"<!-- (.*?): (\d+) decoding steps -->", drawn)
    assert [int(steps) for _, steps in titles] == [facts["longest"], facts["total"]]
    assert (folder / "rollout.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_of_reinforcement_trains_every_drawn_token_with_the_sampler_s_log_probs(
    facts,
) -> None:
    metrics = facts["reinforcement"]
    assert metrics["tokens"] == facts["drawn"]
    assert metrics["mismatch_within_5"] == 1
    assert metrics["skipped"] == 0


# Types, as pyright sees them with the settings that editors have by default.


def diagnose(folder: pathlib.Path, name: str, code: str) -> list[dict]:
    """Pyright's diagnostics of a script that uses the package."""
    pytest.importorskip("pyright", reason="pyright comes with the dev extra")
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    settings = {"include": [f"{name}.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    (folder / f"{name}.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, "-p", str(folder / f"{name}.json")],
        cwd=folder,
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)["generalDiagnostics"]


def test_the_code_of_the_page_has_no_type_error(folder) -> None:
    assert diagnose(folder, "page", CODE) == []
    assert diagnose(folder, "training", f"{CODE}\n{REINFORCEMENT}") == []


def test_every_public_name_has_a_type(folder) -> None:
    lines = ["import tw_jax as tw", *(f"reveal_type(tw.{name})" for name in tw_jax.__all__)]
    found = diagnose(folder, "names", "\n".join(lines))
    assert [one["severity"] for one in found] == ["information"] * len(tw_jax.__all__)
    types = [one["message"].partition(" is ")[2].strip('"') for one in found]
    pairs = zip(tw_jax.__all__, types, strict=True)
    untyped = [name for name, type in pairs if type in {"Any", "Unknown"} or "Unknown" in type]
    assert untyped == []


def test_results_have_types_and_wrong_uses_are_errors(folder) -> None:
    right = {
        "rollout": "Trajectory",
        "rollout.calls": "tuple[Call, ...]",
        "trie": "Trie",
        "tw.initial_state(network, optim, key=jax.random.key(0))": "TrainState",
        "tw.presets.TINY": "Model",
        "tw.Sampler().rows": "int",
    }
    wrong = {
        'tw.Sampler(rows="many")': "reportArgumentType",
        "tw.ForkJoin(most_threads=2)": "reportCallIssue",
        "tw.trajectory(tokenizer, chat, question, 408)": "reportArgumentType",
        "tw.make_sft_step(network, optim)": "reportCallIssue",
        "tw.pack([rollout], tw.Packing(row_tokens=8))": "reportArgumentType",
        "tw.config_of": "reportAttributeAccessIssue",
    }
    lines = [CODE, *(f"reveal_type({name})" for name in right), *wrong]
    found = diagnose(folder, "uses", "\n".join(lines))
    told = [one["message"] for one in found if one["severity"] == "information"]
    assert told == [f'Type of "{name}" is "{type}"' for name, type in right.items()]
    errors = [one["rule"] for one in found if one["severity"] == "error"]
    assert errors == [*wrong.values()]
