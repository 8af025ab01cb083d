"""`tw plot` draws the files that it is given, and refuses those that are not there."""

import json

import pytest

from tw_jax.data import records
from tw_jax.forkjoin import threadweaver
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


def test_a_run_writes_the_pictures_that_it_names(tmp_path, capsys) -> None:
    with Metrics(tmp_path) as log:
        for step in range(3):
            log.write(step, {"loss": 3.0 - step, "accuracy": step / 3})
    report, rollouts = tmp_path / "graded.jsonl", tmp_path / "examples.jsonl"
    report.write_text("".join(json.dumps(line) + "\n" for line in GRADED))
    example = records.Example(id="a", question="b?", response=RESPONSE, answer="", task="")
    records.write(rollouts, [example])
    drawn = plot.StoredRollout(
        path=str(rollouts),
        tokenizer=Bytes(),
        chat=Chat(template="plain"),
        forkjoin=threadweaver.ForkJoin(),
    )
    folder = tmp_path / "pictures"
    runs = (("sft", str(tmp_path / "metrics.jsonl")),)
    plot.run(plot.Plot(workdir=str(folder), metrics=runs, graded=str(report), trajectory=drawn))
    names = ["latency.png", "loss.png", "trie.png"]
    assert sorted(path.name for path in folder.glob("*.png")) == names
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert "loss.png" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"StoredRollout\.index = 4: want at least 0 and less than 1"
    ):
        plot.run(plot.Plot(workdir=str(folder), trajectory=_with(drawn, index=4)))


def _with(drawn: plot.StoredRollout, **changes) -> plot.StoredRollout:
    return plot.StoredRollout(**{**vars(drawn), **changes})


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
    [({}, "nothing to draw"), ({"metrics": (("a", "x"), ("a", "y"))}, "want each once")],
)
def test_a_config_without_a_picture_or_with_two_runs_of_one_name_is_refused(
    fields, sentence
) -> None:
    with pytest.raises(ValueError, match=sentence):
        plot.Plot(workdir="w", **fields)
