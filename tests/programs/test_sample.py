"""`tw sample`: rollouts are stored as ids, each has its own seed, and none is sampled twice."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tw_jax import sharding
from tw_jax.checkpoint import Checkpoints, read_note, restore_params
from tw_jax.cli import main
from tw_jax.config import load_config
from tw_jax.data import records
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.rollouts import samples, store
from tw_jax.rollouts.samples import Sample
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece


def rollouts(folder):
    return list(records.read(folder / "rollouts.jsonl"))


def test_every_problem_has_its_rollouts_with_ids_and_log_probs(runs):
    found = rollouts(runs / "samples")
    assert {r.id for r in found} == {f"held_out-{n}/{k}" for n in range(3) for k in range(2)}
    tokenizer = load_tokenizer(SentencePiece(path=str(runs / "data" / "tokenizer.model")))
    for rollout in found:
        assert rollout.fingerprint == tokenizer.fingerprint
        assert all(len(call.logp) == len(call.sampled) for call in rollout.calls)
        assert all((np.asarray(call.logp) <= 0).all() for call in rollout.calls)


def test_item_26_a_stored_rollout_has_the_response_alone_with_its_tags(runs):
    cfg = load_config(Sample, [str(runs / "sample.gin")])
    source = samples.load(cfg)
    for rollout in rollouts(runs / "samples"):
        prompt = cfg.chat.prompt(source.generate.tokenizer, rollout.question)
        assert rollout.prompt.tolist() == prompt.tolist()
        calls = [Result(call.sampled, call.logp) for call in rollout.calls]
        made = rebuild(source.generate.sampler.protocol, rollout.prompt, calls)
        assert rollout.text == source.generate.tokenizer.decode(made.ids[len(prompt) :])


def test_an_interrupted_run_makes_only_what_is_missing(runs, tmp_path, capsys):
    whole = rollouts(runs / "samples")
    shutil.copy(runs / "samples" / "made_by.json", tmp_path)
    path = tmp_path / "rollouts.jsonl"
    lines = (runs / "samples" / "rollouts.jsonl").read_bytes().split(b"\n")
    # Two complete lines and half of a third, as after a crash.
    path.write_bytes(b"\n".join(lines[:2]) + b"\n" + lines[2][:30])
    with pytest.warns(UserWarning, match="rollouts.jsonl"):
        assert (
            main(["sample", str(runs / "sample.gin"), "--set", f"Sample.workdir='{tmp_path}'"]) == 0
        )
    assert "4 new rollouts" in capsys.readouterr().out
    want = {r.id: [c.sampled.tolist() for c in r.calls] for r in whole}
    assert {r.id: [c.sampled.tolist() for c in r.calls] for r in rollouts(tmp_path)} == want


@pytest.mark.parametrize("word", ["Sampler.temperature=0.5", "ForkJoin.max_thread=19"])
def test_rollouts_of_other_settings_are_not_mixed(runs, capsys, word):
    assert main(["sample", str(runs / "sample.gin"), "--set", word]) == 2
    name = "temperature" if "temperature" in word else "forkjoin"
    assert f"has rollouts with another {name}" in capsys.readouterr().err


def test_one_four_and_eight_devices_sample_the_same_ids(runs, tmp_path, monkeypatch):
    make_mesh = sharding.make_mesh
    found = []
    for count in (1, 4, 8):
        devices = jax.devices()[:count]
        monkeypatch.setattr(sharding, "make_mesh", lambda cfg, d=devices: make_mesh(cfg, d))
        assert run(runs, tmp_path / str(count)) == 0
        made = rollouts(tmp_path / str(count))
        found.append({r.id: [call.sampled.tolist() for call in r.calls] for r in made})
    assert len(found[0]) == 6
    assert found[0] == found[1] == found[2]


def test_rows_that_the_devices_do_not_divide_are_refused(runs, tmp_path, capsys):
    assert run(runs, tmp_path, "Sampler.rows=4") == 2
    assert "Sampler.rows = 4 must be a multiple of 8" in capsys.readouterr().err


def test_a_missing_checkpoint_ends_in_a_sentence(runs, tmp_path, capsys):
    word = f"Sample.checkpoint='{tmp_path / 'none'}'"
    assert main(["sample", str(runs / "sample.gin"), "--set", word]) == 2
    assert "no such folder of checkpoints" in capsys.readouterr().err


def run(runs, folder, *words):
    words = [f"Sample.workdir='{folder}'", *words]
    return main(["sample", str(runs / "sample.gin"), *[w for s in words for w in ("--set", s)]])


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of the finished rollouts, and a copy of their problems to change."""
    shutil.copytree(runs / "samples", tmp_path / "samples")
    shutil.copy(runs / "data" / "held_out.jsonl", tmp_path)
    return tmp_path / "samples", tmp_path / "held_out.jsonl"


def finished(cfg):
    """The rollouts of a config in its folder."""
    problems = samples.by_rollout(cfg, samples.read_problems(cfg, load_tokenizer(cfg.tokenizer)))
    path = Path(cfg.workdir) / "rollouts.jsonl"
    return list(store.finished_samples(path, problems, source=cfg.problems))


@pytest.mark.parametrize("field", ["question", "answer", "task"])
def test_rollouts_of_a_changed_problems_file_are_not_reused(runs, copy, capsys, field):
    folder, path = copy
    first, second, third = records.read(path)
    records.write(path, [first, dataclasses.replace(second, **{field: "7"}), third])
    assert run(runs, folder, f"Sample.problems='{path}'") == 2
    printed = capsys.readouterr().err
    assert f"{folder}/rollouts.jsonl:3 was not sampled for the problem" in printed
    assert f"the id 'held_out-1' in {path}" in printed


def test_a_problems_file_that_grew_keeps_its_rollouts(runs, copy):
    folder, path = copy
    old = list(records.read(path))
    records.write(path, [*old, dataclasses.replace(old[0], id="new")])
    words = [f"Sample.workdir='{folder}'", f"Sample.problems='{path}'"]
    cfg = load_config(Sample, [str(runs / "sample.gin")], words)
    kept = {one.id for one in finished(cfg)}
    assert len(kept) == 6
    problem_of = samples.by_rollout(cfg, samples.read_problems(cfg, load_tokenizer(cfg.tokenizer)))
    assert [name for name in problem_of if name not in kept] == ["new/0", "new/1"]


def test_rollouts_of_another_checkpoint_at_the_same_path_are_not_reused(runs, copy, capsys):
    folder, path = copy
    place = path.with_name("checkpoints")
    shutil.copytree(runs / "sft" / "checkpoints", place)
    assert run(runs, folder, f"Sample.checkpoint='{place}'") == 0
    assert "0 new rollouts" in capsys.readouterr().out, "the same parameters at another path"
    other = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-3), restore_params(place))
    note = read_note(place)
    shutil.rmtree(place / "4")
    with Checkpoints(place, keep=9) as checkpoints:
        checkpoints.save(4, {"params": other}, note)
    assert run(runs, folder, f"Sample.checkpoint='{place}'") == 2
    assert "has rollouts with another model_identity" in capsys.readouterr().err


def test_rollouts_without_made_by_json_are_not_reused(runs, copy, capsys):
    folder, _ = copy
    (folder / "made_by.json").write_text('{"checkpoint": "')
    assert run(runs, folder) == 2
    assert "made_by.json is damaged" in capsys.readouterr().err
    (folder / "made_by.json").unlink()
    assert run(runs, folder) == 2
    assert "has rollouts but no made_by.json" in capsys.readouterr().err


def test_two_rollouts_of_one_id_are_refused_with_both_lines(runs, copy):
    folder, _ = copy
    path = folder / "rollouts.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    cfg = load_config(Sample, [str(runs / "sample.gin")], [f"Sample.workdir='{folder}'"])
    with pytest.raises(ValueError, match=rf"{path}:7 has the id '.*', and so has {path}:2\."):
        finished(cfg)


def test_two_problems_of_one_id_are_not_sampled(runs, copy, tmp_path, capsys):
    _, path = copy
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    assert run(runs, tmp_path / "new", f"Sample.problems='{path}'") == 2
    assert f"{path}:4 has the id 'held_out-0', and so has {path}:1." in capsys.readouterr().err


@pytest.mark.parametrize("word", ["Sampler.max_prompt=5", "ForkJoin.max_context=5"])
def test_a_prompt_that_is_too_long_is_named_before_anything_is_sampled(
    runs, tmp_path, capsys, word
):
    assert run(runs, tmp_path / "new", word) == 2
    printed = capsys.readouterr().err
    assert "held_out.jsonl:1: the prompt of the problem 'held_out-0' has" in printed
    assert word.partition("=")[0] in printed
    assert not (tmp_path / "new" / "made_by.json").exists()


def test_settings_without_a_rollout_are_replaced(runs, copy):
    folder, _ = copy
    made = json.loads((folder / "made_by.json").read_text())
    (folder / "made_by.json").write_text(json.dumps(made | {"temperature": 0.5}))
    (folder / "rollouts.jsonl").unlink()
    cfg = load_config(Sample, [str(runs / "sample.gin")], [f"Sample.workdir='{folder}'"])
    problems = samples.read_problems(cfg, load_tokenizer(cfg.tokenizer))
    samples.sample(cfg, samples.load(cfg), problems)
    assert json.loads((folder / "made_by.json").read_text()) == made
