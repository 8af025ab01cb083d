"""The reader of compiled programs sees what it is there to see, and nothing else."""

import jax
import jax.numpy as jnp
import pytest
from compiled import too_large

from tw_jax.attention import blockwise, reference
from tw_jax.contracts import Span

TOKENS, VOCAB = 1024, 1500
SIZES = {"tokens": TOKENS, "vocab": VOCAB}


def text(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(jax.value_and_grad(function)).lower(*arrays).compile().as_text()


def attended(attend):
    """The program of a row of one head of 8."""

    def total(q):
        at = jnp.arange(TOKENS, dtype=jnp.int32)[None]
        keys = Span(enter=at, exit=jnp.full_like(at, TOKENS))
        return attend(q, q, q, at=at, keys=keys, scale=1.0).sum()

    return text(total, (1, 1, TOKENS, 8))


def unembedded(chunk):
    """The program of log-sums of a row of width 8, so many tokens at a time."""

    def total(hidden, table):
        score = jax.checkpoint(lambda hidden: jax.nn.logsumexp(hidden @ table, axis=-1))
        return jax.lax.map(score, hidden).sum()

    return text(total, (TOKENS // chunk, chunk, 8), (8, VOCAB))


def test_all_pairs_of_a_row_are_seen():
    found = too_large(attended(reference.attend), **SIZES)
    assert any(f"{TOKENS},{TOKENS}" in shape for shape in found)


def test_logits_of_a_whole_row_are_seen():
    assert too_large(unembedded(TOKENS), **SIZES)


@pytest.mark.parametrize(
    ("program", "made"), [(attended, blockwise.attend), (unembedded, TOKENS // 4)]
)
def test_blocks_and_chunks_are_not_taken_for_them(program, made):
    compiled = program(made)
    assert "f32[" in compiled
    assert too_large(compiled, **SIZES) == []


@pytest.mark.parametrize(
    ("shape", "is_large"),
    [
        ("pred[1024,1024]{1,0}", True),
        ("bf16[4,4,256,256]{3,2,1,0:T(8,128)(2,1)}", True),
        ("s32[<=1048576]{0}", True),
        ("f32[2,8,1024]{2,1,0}", False),
        ("f32[1,1024,375]{2,1,0}", True),  # V over four devices
        ("f32[1,1024,300]{2,1,0}", False),  # V over five is not V over four
        ("f32[256,1500]{1,0}", False),
        ("f32[4,256,1500]{2,1,0}", True),
        ("f32[1500,64]{1,0}", False),
    ],
)
def test_a_shape_is_judged_by_its_elements(shape, is_large):
    line = f"  %fusion.1 = {shape} fusion(%p), kind=kLoop"
    want = [shape.partition("{")[0]] if is_large else []
    assert too_large(line, **SIZES, devices=4) == want
