"""Named sizes against published counts of parameters, and gin fragments against named sizes."""

import math
from pathlib import Path

import jax
import pytest

from tw_jax import config
from tw_jax.models import presets
from tw_jax.models.transformer import Model, network

FRAGMENTS = Path(__file__).parents[2] / "configs" / "models"
NAMED = {name: model for name, model in vars(presets).items() if isinstance(model, Model)}

# Numbers of parameters on the cards of the checkpoints (tied tables counted once).
PUBLISHED = {
    "QWEN3_0_6B": 596_049_920,
    "QWEN3_1_7B": 1_720_574_976,
    "QWEN3_4B": 4_022_468_096,
    "QWEN3_8B": 8_190_735_360,
    "QWEN3_14B": 14_768_307_200,
    "QWEN3_32B": 32_762_123_264,
    "LLAMA3_2_1B": 1_235_814_400,
    "LLAMA3_2_3B": 3_212_749_824,
    "LLAMA3_1_8B": 8_030_261_248,
    "LLAMA3_1_70B": 70_553_706_496,
    "LLAMA2_7B": 6_738_415_616,
    "SMOLLM2_135M": 134_515_008,
}


def test_every_published_size_is_checked() -> None:
    assert set(NAMED) == {*PUBLISHED, "TINY"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_size_has_as_many_parameters_as_its_checkpoint(name) -> None:
    shapes = jax.eval_shape(network(NAMED[name]).init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


@pytest.mark.torch
def test_llama2_and_qwen3_agree_with_the_defaults_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    llama, ours = transformers.LlamaConfig(), presets.LLAMA2_7B
    assert (llama.vocab_size, llama.hidden_size, llama.intermediate_size) == (
        ours.vocab_size,
        ours.width,
        ours.mlp_width,
    )
    assert (llama.num_hidden_layers, llama.num_attention_heads, llama.head_dim) == (
        ours.num_layers,
        ours.num_heads,
        ours.head_width,
    )
    assert llama.rope_parameters["rope_theta"] == ours.rope.theta
    qwen3, ours = transformers.Qwen3Config(), presets.QWEN3_8B
    assert (qwen3.vocab_size, qwen3.hidden_size, qwen3.head_dim, qwen3.rms_norm_eps) == (
        ours.vocab_size,
        ours.width,
        ours.head_width,
        ours.norm_epsilon,
    )


@pytest.mark.parametrize("path", sorted(FRAGMENTS.glob("*.gin")), ids=lambda path: path.stem)
def test_a_fragment_says_what_the_named_size_says(path) -> None:
    assert config.load_config(Model, [path]) == NAMED[path.stem.upper()]


def test_every_named_size_has_a_fragment() -> None:
    assert {path.stem.upper() for path in FRAGMENTS.glob("*.gin")} == set(NAMED)
