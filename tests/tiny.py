"""The one tiny decoder of the tests; a test names the sizes that it needs to be different."""

import dataclasses
from typing import Any

from tw_jax.models.rope import Rope
from tw_jax.models.transformer import Model

MODEL = Model(
    vocab_size=40,
    num_layers=2,
    width=24,
    mlp_width=40,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    qk_norm=True,
    tie_embeddings=False,
    rope=Rope(),
    attention="reference",
)


def model(**sizes: Any) -> Model:
    """The decoder with other sizes."""
    return dataclasses.replace(MODEL, **sizes)
