"""`tw plot` draws the files that it is given, and refuses those that are not there."""

import json

import pytest

from tw_jax.data import records
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.metrics import Metrics
from tw_jax.programs import plot
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat

RESPONSE = (
    "a<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>"
    "\n<Thread>\n1: aa\n</Thread><Thread>\n2: bb\n</Thread>\n</Parallel>d"
)
GRADED = [
    {"verdict": "correct", "total": 200, "longest": 100},
    {"verdict": "incorrect", "total": 150, "longest": 90},
]


def write_metrics(folder, **values) -> None:
    """A metrics file of three steps."""
    with Metrics(folder) as log:
        for step in range(3):
            log.write(step, {name: value - step for name, value in values.items()})


def write_graded(folder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in GRADED)
    (folder / "graded.jsonl").write_text(text, encoding="utf-8")


def write_examples(path):
    example = records.Example(id="a", question="b?", response=RESPONSE, answer="", task="")
    records.write(path, [example])
    return path


def stored(**fields) -> plot.StoredRollout:
    chat, limits = Chat(template="plain"), ForkJoin()
    return plot.StoredRollout(tokenizer=Bytes(), chat=chat, forkjoin=limits, **fields)


def pictures(folder) -> list[str]:
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    return sorted(path.name for path in folder.glob("*.png"))


def test_a_run_writes_the_pictures_that_it_names(tmp_path, capsys) -> None:
    write_metrics(tmp_path, loss=3.0, accuracy=1.0)
    write_graded(tmp_path)
    examples = str(write_examples(tmp_path / "examples.jsonl"))
    folder = tmp_path / "pictures"
    named = {
        "metrics": (("sft", str(tmp_path / "metrics.jsonl")),),
        "graded": str(tmp_path / "graded.jsonl"),
        "trajectory": stored(path=examples),
    }
    plot.run(plot.Plot(workdir=str(folder), **named))
    assert pictures(folder) == ["latency.png", "loss.png", "threads.png", "trie.png"]
    assert "loss.png" in capsys.readouterr().out
    wrong = stored(path=examples, index=4)
    sentence = r"StoredRollout\.index = 4 must be at least 0 and less than 1"
    with pytest.raises(ValueError, match=sentence):
        plot.run(plot.Plot(workdir=str(folder), trajectory=wrong))


def test_a_folder_is_drawn_as_far_as_its_runs_went(tmp_path) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "pictures"
    cfg = plot.Plot(workdir=str(folder), runs=str(runs), trajectory=stored())
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl, graded\.jsonl or rollouts"):
        plot.run(cfg)
    write_metrics(runs / "sft", loss=3.0)
    plot.run(cfg)
    assert pictures(folder) == ["loss.png"]
    write_metrics(runs / "pgrpo", loss=3.0, reward=1.0, longest_tokens=9.0, latency_ratio=1.0)
    write_graded(runs)
    write_graded(runs / "before")
    (runs / "samples").mkdir()
    write_examples(runs / "samples" / "rollouts.jsonl")
    plot.run(cfg)
    names = ["latency.png", "latency_before.png", "loss.png", "pgrpo.png"]
    assert pictures(folder) == [*names, "threads.png", "trie.png"]


def test_runs_of_a_folder_are_named_by_their_own_folders(tmp_path) -> None:
    for name in ("sft", "old/sft"):
        write_metrics(tmp_path / name, loss=3.0)
    assert list(plot.find_training(str(tmp_path))) == ["old/sft", "sft"]
    write_metrics(tmp_path, loss=3.0)
    assert tmp_path.name in plot.find_training(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "program"),
    [
        ({"metrics": (("sft", "gone"),)}, "tw sft"),
        ({"graded": "gone"}, "tw evaluate"),
    ],
)
def test_a_missing_file_is_refused_with_the_program_that_writes_it(
    fields, program, tmp_path
) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^gone: no such file\. .*`{program}`"):
        plot.run(plot.Plot(workdir=str(tmp_path / "new"), **fields))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"verdict": "correct", "total": 4}\n', "graded.jsonl:1: no longest"),
        (
            '{"verdict": "correct", "total": 4, "longest": 2}\n{"verd',
            "graded.jsonl:2: no JSON object",
        ),
        ("3\n", "graded.jsonl:1: no JSON object"),
        ("[" * 100_000, "graded.jsonl:1: no JSON object"),
        ('{"verdict": "correct", "total": 4, "longest": []}\n', "graded.jsonl:1: no longest"),
        ("", "graded.jsonl: the file is empty"),
    ],
)
def test_a_graded_file_that_cannot_be_drawn_is_refused(text, sentence, tmp_path) -> None:
    file = tmp_path / "graded.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        plot.run(plot.Plot(workdir=str(tmp_path), graded=str(file)))


def test_metrics_without_a_loss_are_refused(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "reward": 1.0}\n')
    with pytest.raises(ValueError, match="no line has a loss"):
        plot.run(plot.Plot(workdir=str(tmp_path), metrics=(("a", str(file)),)))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "nothing to draw"),
        ({"metrics": (("a", "x"), ("a", "y"))}, "more than once"),
        ({"trajectory": stored()}, "needs a folder to search"),
    ],
)
def test_a_config_without_a_picture_or_with_two_runs_of_one_name_is_refused(
    fields, sentence
) -> None:
    with pytest.raises(ValueError, match=sentence):
        plot.Plot(workdir="w", **fields)
