"""Configs of named models: a tiny decoder for two CPU cores, and Qwen3, Llama and SmolLM2 models.

Each is a `Model`; change fields with `dataclasses.replace`. Sizes are those of the `config.json` of
the published checkpoint. `configs/models/` has the same configs as gin files. No weights are loaded
here.
"""

from __future__ import annotations

from tw_jax.models.rope import Llama3Rope, Rope
from tw_jax.models.transformer import Model

TINY = Model(
    vocab_size=384,
    num_layers=4,
    width=128,
    mlp_width=512,
    num_heads=4,
    num_kv_heads=2,
    head_width=32,
    qk_norm=False,
    tie_embeddings=False,
    rope=Rope(),
)
"""1.1 million parameters, for bytes or a small vocabulary. It trains from scratch on two cores."""


def _qwen3(
    num_layers: int, width: int, mlp_width: int, *, num_heads: int, tie_embeddings: bool
) -> Model:
    return Model(
        vocab_size=151_936,
        num_layers=num_layers,
        width=width,
        mlp_width=mlp_width,
        num_heads=num_heads,
        num_kv_heads=8,
        head_width=128,
        qk_norm=True,
        tie_embeddings=tie_embeddings,
        rope=Rope(theta=1_000_000.0),
        norm_epsilon=1e-6,
        compute_dtype="bfloat16",
        remat="full",
    )


QWEN3_0_6B = _qwen3(28, 1024, 3072, num_heads=16, tie_embeddings=True)
"""Qwen/Qwen3-0.6B."""
QWEN3_1_7B = _qwen3(28, 2048, 6144, num_heads=16, tie_embeddings=True)
"""Qwen/Qwen3-1.7B."""
QWEN3_4B = _qwen3(36, 2560, 9728, num_heads=32, tie_embeddings=True)
"""Qwen/Qwen3-4B."""
QWEN3_8B = _qwen3(36, 4096, 12_288, num_heads=32, tie_embeddings=False)
"""Qwen/Qwen3-8B."""
QWEN3_14B = _qwen3(40, 5120, 17_408, num_heads=40, tie_embeddings=False)
"""Qwen/Qwen3-14B."""
QWEN3_32B = _qwen3(64, 5120, 25_600, num_heads=64, tie_embeddings=False)
"""Qwen/Qwen3-32B."""


def _llama(
    num_layers: int,
    width: int,
    mlp_width: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_width: int,
    rope: Rope | Llama3Rope,
    vocab_size: int = 128_256,
    tie_embeddings: bool = False,
) -> Model:
    return Model(
        vocab_size=vocab_size,
        num_layers=num_layers,
        width=width,
        mlp_width=mlp_width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=head_width,
        qk_norm=False,
        tie_embeddings=tie_embeddings,
        rope=rope,
        norm_epsilon=1e-5,
        compute_dtype="bfloat16",
        remat="full",
    )


LLAMA3_2_1B = _llama(
    16,
    2048,
    8192,
    num_heads=32,
    num_kv_heads=8,
    head_width=64,
    rope=Llama3Rope(factor=32.0),
    tie_embeddings=True,
)
"""meta-llama/Llama-3.2-1B."""
LLAMA3_2_3B = _llama(
    28,
    3072,
    8192,
    num_heads=24,
    num_kv_heads=8,
    head_width=128,
    rope=Llama3Rope(factor=32.0),
    tie_embeddings=True,
)
"""meta-llama/Llama-3.2-3B."""
LLAMA3_1_8B = _llama(
    32, 4096, 14_336, num_heads=32, num_kv_heads=8, head_width=128, rope=Llama3Rope()
)
"""meta-llama/Llama-3.1-8B."""
LLAMA3_1_70B = _llama(
    80, 8192, 28_672, num_heads=64, num_kv_heads=8, head_width=128, rope=Llama3Rope()
)
"""meta-llama/Llama-3.1-70B; Llama-3.3-70B has the same sizes."""
LLAMA2_7B = _llama(
    32,
    4096,
    11_008,
    num_heads=32,
    num_kv_heads=32,
    head_width=128,
    rope=Rope(theta=10_000.0),
    vocab_size=32_000,
)
"""meta-llama/Llama-2-7b-hf: the defaults of transformers' LlamaConfig, except norm_epsilon."""
SMOLLM2_135M = _llama(
    30,
    576,
    1536,
    num_heads=9,
    num_kv_heads=3,
    head_width=64,
    rope=Rope(theta=100_000.0),
    vocab_size=49_152,
    tie_embeddings=True,
)
"""HuggingFaceTB/SmolLM2-135M."""
