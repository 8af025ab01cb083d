"""`tw sft`: a run writes its files, resumes exactly, and its config reproduces it."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from tw_jax import metrics, sharding
from tw_jax.checkpoint import Checkpoints, restore_params
from tw_jax.cli import main
from tw_jax.config import load_config, operative
from tw_jax.models.transformer import network
from tw_jax.programs.sft import Sft
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import train_sentencepiece
from tw_jax.train.state import abstract_state

pytestmark = pytest.mark.usefixtures("quick_programs")


def sft(runs, folder, *words):
    sets = [f"Sft.workdir='{folder}'", *words]
    return main(["sft", str(runs / "sft.gin"), *[w for s in sets for w in ("--set", s)]])


def params(folder):
    return jax.tree.leaves(jax.device_get(restore_params(folder / "checkpoints")))


def test_a_run_leaves_metrics_checkpoints_its_config_and_its_packing(runs):
    lines = metrics.read(runs / "sft" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    packing = json.loads((runs / "sft" / "packing.json").read_text())
    assert 0.5 < packing["rows_filled"] <= 1
    assert 0 < packing["token_sharing"] < 1
    assert Checkpoints(runs / "sft" / "checkpoints", keep=2).latest() == 4
    assert (runs / "sft" / "tensorboard").is_dir()


def test_a_checkpoint_holds_the_config_and_the_data_position(runs):
    cfg = load_config(Sft, [str(runs / "sft.gin")])
    with Checkpoints(runs / "sft" / "checkpoints", keep=2) as checkpoints:
        net = network(cfg.model)
        mesh = sharding.make_mesh(cfg.mesh)
        abstract = abstract_state(net, cfg.optim, mesh=mesh, rules=cfg.rules)
        state, extra = checkpoints.restore(None, abstract)
    assert int(state.step) == 4
    assert extra["config"] == operative(cfg)
    assert extra["batches"]["stats"]["tries"] > 0


def test_rows_of_the_table_that_no_token_has_are_not_trained(runs, tolerance):
    cfg = load_config(Sft, [str(runs / "sft.gin")])
    ids = load_tokenizer(cfg.tokenizer).vocab_size
    assert ids < cfg.model.vocab_size
    before, after = (
        jax.device_get(restore_params(runs / "sft" / "checkpoints", step=step))["embed"]
        for step in (2, 4)
    )
    # Weight decay alone shrinks them, by less than a rounding of a module.
    np.testing.assert_allclose(after[ids:], before[ids:], rtol=tolerance["module"])
    assert np.abs(after[:ids] - before[:ids]).max() > 10 * tolerance["module"]


def test_running_the_written_config_is_the_same_run(runs, tmp_path):
    config = (runs / "sft" / "config.gin").read_text().replace(str(runs / "sft"), str(tmp_path))
    (tmp_path / "again.gin").write_text(config)
    assert main(["sft", str(tmp_path / "again.gin")]) == 0
    for a, b in zip(params(runs / "sft"), params(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(runs, tmp_path, monkeypatch, capsys):
    from tw_jax.train import loop

    stops = iter([False, False, True, False])
    monkeypatch.setattr(loop, "_stops", lambda caught, index: next(stops))
    assert sft(runs, tmp_path) == 130
    assert "Stopped after step 3 of 4, which is saved in" in capsys.readouterr().err
    assert sft(runs, tmp_path) == 0
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    for a, b in zip(params(runs / "sft"), params(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_another_mesh_gives_the_same_losses(runs, tmp_path, close):
    words = ["Mesh.data=2", "Mesh.fsdp=2", "Mesh.tensor=2", "Model.num_kv_heads=2"]
    wide, one = tmp_path / "wide", tmp_path / "one"
    assert sft(runs, wide, *words) == 0
    assert sft(runs, one, "Model.num_kv_heads=2") == 0
    want = [line["loss"] for line in metrics.read(one / "metrics.jsonl")]
    got = [line["loss"] for line in metrics.read(wide / "metrics.jsonl")]
    close("sharded", got, want)


def test_a_finished_run_has_nothing_left_to_do(runs, capsys):
    before = (runs / "sft" / "packing.json").read_text()
    assert main(["sft", str(runs / "sft.gin")]) == 0
    out = capsys.readouterr().out
    assert "step 4 of 4" in out
    assert "The run is finished: all 4 steps are taken." in out
    assert (runs / "sft" / "packing.json").read_text() == before


def test_a_finished_run_keeps_its_config_whatever_the_next_command_says(runs, capsys):
    folder = runs / "sft"
    before = (folder / "config.gin").read_text()
    assert sft(runs, folder, "Optim.peak_lr=2e-3", "Packing.row_tokens=512") == 2
    changes = "Packing.row_tokens = 512 (was 384); Optim.peak_lr = 0.002 (was 0.001). Set them back"
    assert changes in capsys.readouterr().err
    assert sft(runs, folder, "Sft.steps=8") == 2
    assert "Set Optim.decay_steps = 4 to keep the schedule" in capsys.readouterr().err
    assert sft(runs, folder, "Sft.steps=2", "Optim.decay_steps=4") == 2
    assert "Sft.steps = 2 (4 steps are taken)" in capsys.readouterr().err
    assert sft(runs, folder, "Sft.save_every=1") == 0
    assert (folder / "config.gin").read_text() == before
    assert not list(folder.glob("config.*.gin"))


def test_a_run_is_not_resumed_with_another_tokenizer_of_equal_size_at_the_same_path(
    runs, tmp_path, capsys
):
    path, folder = tmp_path / "tokenizer.model", runs / "sft"
    shutil.copy(runs / "data" / "tokenizer.model", path)
    words = [f"SentencePiece.path='{path}'"]
    assert sft(runs, folder, *words) == 0
    texts = [f"{n} times {n + 7} is {n * (n + 7)}, so says line {n}." for n in range(400)]
    train_sentencepiece(texts, path, 320)
    capsys.readouterr()
    assert sft(runs, folder, *words) == 2
    assert re.search(r"tokenizer: [0-9a-f]+ \(was [0-9a-f]+\)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("Model.vocab_size=300", "Model.vocab_size = 300 must be at least 320"),
        ("Packing.row_tokens=64", "makes a trie of"),
        ("Sft.accumulation_steps=3", "Sft.accumulation_steps = 3 must be a divisor"),
        ("Mesh.data=3", "Mesh.data = 3 does not divide the 8 available devices"),
        ("Data.path='nowhere.jsonl'", "nowhere.jsonl: no such file"),
    ],
)
def test_bad_settings_end_in_a_sentence(runs, tmp_path, capsys, word, sentence):
    assert sft(runs, tmp_path, word) == 2
    assert sentence in capsys.readouterr().err
