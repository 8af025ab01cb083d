"""The decoder against transformers' Qwen3 and Llama, tiny random weights copied by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.contracts import Span
from tw_jax.models.rope import Llama3Rope, Rope, YarnRope
from tw_jax.models.transformer import Model, network

pytestmark = pytest.mark.torch

SIZES = {
    "vocab_size": 61,
    "num_layers": 3,
    "width": 48,  # not num_heads * head_width: the two are apart in Qwen3
    "mlp_width": 80,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 16,
}
YARN = YarnRope(theta=10_000.0, factor=4.0, original_tokens=8)
LLAMA3 = Llama3Rope(theta=10_000.0, factor=8.0, original_tokens=16)
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}

CASES = {
    "qwen3": (
        "Qwen3",
        Model(**SIZES, qk_norm=True, tie_embeddings=True, rope=Rope()),
        PLAIN,
    ),
    "qwen3_untied_yarn": (
        "Qwen3",
        Model(**SIZES, qk_norm=True, tie_embeddings=False, rope=YARN),
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "llama": (
        "Llama",
        Model(**SIZES, qk_norm=False, tie_embeddings=False, rope=Rope(), norm_epsilon=1e-5),
        PLAIN,
    ),
    "llama3_tied": (
        "Llama",
        Model(**SIZES, qk_norm=False, tie_embeddings=True, rope=LLAMA3, norm_epsilon=1e-5),
        {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}


def oracle(family: str, model: Model, rope_parameters: dict):
    """A random torch model in float32; its norms are random too, lest a scale be missed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg = getattr(transformers, f"{family}Config")(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_width,
        tie_word_embeddings=model.tie_embeddings,
        rms_norm_eps=model.norm_epsilon,
        max_position_embeddings=32,
        rope_parameters=rope_parameters,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(cfg).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            noise = 0.2 * torch.randn_like(parameter)
            parameter.copy_(1 + noise if parameter.ndim == 1 else noise)
    return torch, made


def copied(model: Model, state: dict) -> dict:
    """Our parameters, filled from a torch state dict: matrices transposed, heads split."""
    heads, kv_heads, head, width = (
        model.num_heads,
        model.num_kv_heads,
        model.head_width,
        model.width,
    )

    def of(name: str, *shape: int) -> np.ndarray:
        layers = [state[f"model.layers.{i}.{name}.weight"].numpy() for i in range(model.num_layers)]
        return np.stack([x.T.reshape(shape) if shape else x for x in layers])

    def matrix(name: str) -> np.ndarray:
        return of(name).swapaxes(1, 2)

    attention = {
        "q": of("self_attn.q_proj", width, heads, head),
        "k": of("self_attn.k_proj", width, kv_heads, head),
        "v": of("self_attn.v_proj", width, kv_heads, head),
        "out": of("self_attn.o_proj", heads, head, width),
    }
    if model.qk_norm:
        attention["q_norm"] = {"scale": of("self_attn.q_norm")}
        attention["k_norm"] = {"scale": of("self_attn.k_norm")}
    params = {
        "embed": state["model.embed_tokens.weight"].numpy(),
        "blocks": {
            "attention_norm": {"scale": of("input_layernorm")},
            "attention": attention,
            "mlp_norm": {"scale": of("post_attention_layernorm")},
            "mlp": {name: matrix(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
        },
        "norm": {"scale": state["model.norm.weight"].numpy()},
    }
    if not model.tie_embeddings:
        params["unembed"] = state["lm_head.weight"].numpy()
    return params


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tolerance) -> None:
    family, model, rope_parameters = CASES[case]
    torch, made = oracle(family, model, rope_parameters)
    net = network(model)
    params = copied(model, made.state_dict())
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(net.init, jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == shapes

    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 30))
    with torch.no_grad():
        want = made(torch.from_numpy(tokens)).logits.numpy()
    depth = jnp.broadcast_to(jnp.arange(30, dtype=jnp.int32), tokens.shape)
    span = Span(enter=depth, exit=jnp.full_like(depth, 30))

    @jax.jit
    def logits(params, tokens):
        return net.unembed(params, net.apply(params, tokens, depth, span)[0])

    got = logits(params, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(got, want, atol=tolerance["model"] * np.abs(want).max())
