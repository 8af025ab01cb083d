"""`tw make`: what it writes is canonical, right, and apart from what is held out."""

import json

from tw_jax.cli import main
from tw_jax.data import records
from tw_jax.forkjoin import grammar
from tw_jax.tasks.multiplication import Multiplication

TASK = Multiplication(parallel=True)


def test_examples_are_right_well_formed_and_held_out(runs):
    train = list(records.read(runs / "data" / "train.jsonl"))
    held_out = list(records.read(runs / "data" / "held_out.jsonl"))
    assert (len(train), len(held_out)) == (40, 3)
    assert not {e.question for e in train} & {e.question for e in held_out}
    for example in [*train, *held_out]:
        assert TASK.grade(example.problem, example.response) == "correct"
        assert grammar.well_formed(example.response).trajectory_well_formed


def test_statistics_say_how_long_the_texts_are(runs):
    found = json.loads((runs / "data" / "statistics.json").read_text())
    assert found["tokens_min"] <= found["tokens_mean"] <= found["tokens_max"]
    assert found["share_under_4096"] == 1.0


def test_the_same_config_writes_the_same_files(runs, tmp_path):
    word = f"Make.workdir='{tmp_path}'"
    assert main(["make", str(runs / "make.gin"), "--set", word]) == 0
    for name in ("train.jsonl", "held_out.jsonl", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (runs / "data" / name).read_bytes()


def test_equal_seeds_are_refused(runs, capsys):
    assert main(["make", str(runs / "make.gin"), "--set", "Make.seed=100"]) == 2
    assert "want different seeds" in capsys.readouterr().err
