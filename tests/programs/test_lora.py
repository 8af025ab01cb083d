"""Adapters in every program: trained from a model without, sampled, reinforced, merged, read."""

import itertools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tw_jax import metrics
from tw_jax.checkpoint import restore_params
from tw_jax.cli import main
from tw_jax.models.lora import trained, without_adapters
from tw_jax.rollouts import step

pytestmark = pytest.mark.usefixtures("quick_programs")
LORA = ["Model.lora=@Lora()", "Lora.rank=2", "Lora.alpha=6"]
FAST = ["Optim.warmup_steps=0", "Optim.peak_lr=0.01"]
EXPORT = """
Convert.workdir = '{folder}'
Convert.job = @Export()
Export.checkpoint = '{folder}/sft/checkpoints'
Export.dtype = 'float32'
"""
IMPORT = """
Convert.workdir = '{folder}/back'
Convert.job = @Import()
Import.source = '{folder}/hf'
Import.control_tokens = False
"""


def run(verb, file, *words):
    return main([verb, str(file), *[w for s in words for w in ("--set", s)]])


def params(folder):
    return jax.device_get(restore_params(folder / "checkpoints"))


def assert_only_adapters_moved(folder, base):
    found = params(folder)
    jax.tree.map(np.testing.assert_array_equal, without_adapters(found), params(base))
    assert len(jax.tree.leaves(trained(found))) == 14
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(trained(found)))


@pytest.fixture(scope="module")
def adapted(runs, tmp_path_factory):
    """A folder with a supervised run of adapters beside the model of `runs`."""
    folder = tmp_path_factory.mktemp("lora")
    words = [f"Sft.workdir='{folder}/sft'", f"Sft.init='{runs}/sft/checkpoints'", "Sft.steps=2"]
    assert run("sft", runs / "sft.gin", *LORA, *words, *FAST) == 0
    return folder


def test_the_first_loss_is_that_of_the_model_beneath_and_only_adapters_move(
    runs, adapted, tmp_path, close
):
    words = [f"Sft.workdir='{tmp_path}'", f"Sft.init='{runs}/sft/checkpoints'", "Sft.steps=1"]
    assert run("sft", runs / "sft.gin", *words) == 0
    (plain,) = metrics.read(tmp_path / "metrics.jsonl")
    first, _ = metrics.read(adapted / "sft" / "metrics.jsonl")
    close("equality_loss", first["loss"], plain["loss"])
    assert_only_adapters_moved(adapted / "sft", runs / "sft")


def test_rollouts_are_drawn_with_the_adapters(runs, adapted):
    words = [f"Sample.workdir='{adapted}/samples'", "Sample.count=1"]
    checkpoint = f"Sample.checkpoint='{adapted}/sft/checkpoints'"
    assert run("sample", runs / "sample.gin", *LORA, *words, checkpoint) == 0
    assert len((adapted / "samples" / "rollouts.jsonl").read_text().splitlines()) == 2


def test_a_model_without_adapters_is_not_sampled_as_one_with_them(runs, tmp_path, capsys):
    assert run("sample", runs / "sample.gin", *LORA, f"Sample.workdir='{tmp_path}'") == 2
    assert "has parameters for Model.lora = None, and the config" in capsys.readouterr().err


@pytest.mark.slow
def test_reinforcement_moves_only_adapters_and_its_reference_is_the_model_beneath(
    runs, tmp_path, monkeypatch
):
    reward, turns = step.reward, itertools.count()

    def by_turns(*args, **named):
        """One of two rollouts is called right, so that every group has signal."""
        return reward(*args, **named)._replace(correctness=float(next(turns) % 2))

    monkeypatch.setattr(step, "reward", by_turns)
    words = [f"Pgrpo.workdir='{tmp_path}'", "Pgrpo.steps=2", "PolicyLoss.kl_coef=0.1"]
    assert run("pgrpo", runs / "pgrpo.gin", *LORA, *words, *FAST) == 0
    first, second = metrics.read(tmp_path / "metrics.jsonl")
    assert first["reference_kl"] == pytest.approx(0, abs=1e-9)
    assert second["reference_kl"] > 1e-6
    for line in (first, second):
        assert 0.999 <= line["ratio_min"] <= line["ratio_max"] <= 1.001
    assert_only_adapters_moved(tmp_path, runs / "sft")


def test_an_export_is_the_merged_model_and_its_import_has_no_adapters(
    runs, adapted, tmp_path, close
):
    (tmp_path / "export.gin").write_text(EXPORT.format(folder=adapted))
    assert run("convert", tmp_path / "export.gin") == 0
    blocks = params(adapted / "sft")["blocks"]
    tensors = load_file(adapted / "hf" / "model.safetensors")
    for name, theirs, module in (
        ("q", "self_attn.q_proj", "attention"),
        ("out", "self_attn.o_proj", "attention"),
        ("down", "mlp.down_proj", "mlp"),
    ):
        weight, adapter = blocks[module][name], blocks[module][f"{name}_lora"]
        added = adapter["a"][0].reshape(-1, 2) @ adapter["b"][0].reshape(2, -1)
        got = tensors[f"model.layers.0.{theirs}.weight"].T
        want = weight[0].reshape(got.shape) + 3 * added
        close("rounding", got, want)
        assert np.abs(added).max() > 1e-3
    (tmp_path / "import.gin").write_text(IMPORT.format(folder=adapted))
    assert run("convert", tmp_path / "import.gin") == 0
    back, base = params(adapted / "back"), params(runs / "sft")
    assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, base)
    got = back["blocks"]["mlp"]["down"][0]
    np.testing.assert_array_equal(got, tensors["model.layers.0.mlp.down_proj.weight"].T)


def test_adapters_on_weights_that_know_nothing_are_refused(runs, tmp_path, capsys):
    assert run("sft", runs / "sft.gin", *LORA, f"Sft.workdir='{tmp_path}'") == 2
    assert "Model.lora is set and Sft.init is None, but adapters need" in capsys.readouterr().err
