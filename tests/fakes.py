"""Small stand-ins: a network of one fixed layer, and a tokenizer of single characters."""

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.contracts import KV, Network
from tw_jax.tokenizer.control import THREADWEAVER


def path_network(
    vocab_size: int, width: int = 32, sharpness: float = 3.0, *, num_ids: int | None = None
) -> Network:
    """A network whose state is a sum over the visible path, so any wrong mask changes it.

    hidden_i = tanh(sum over visible j of embed[token_j] * cos(depth_j * angle)). It obeys the
    contract of `Network.apply` with and without a cache, and has no attention code of its own.
    """
    ids = vocab_size if num_ids is None else num_ids

    def init(key):
        first, second = jax.random.split(key)
        return {
            "embed": jax.random.normal(first, (vocab_size, width)),
            "out": jax.random.normal(second, (width, vocab_size)) * sharpness / width**0.5,
        }

    def entries(params, tokens, depth):
        angle = depth[..., None] * jnp.linspace(0.002, 0.06, width)
        return params["embed"][tokens] * jnp.cos(angle)

    def apply(params, tokens, depth, span, kv=None, keys=None, start=None):
        mine = entries(params, tokens, depth)
        if kv is None:
            stored, keys = mine, span
        else:
            put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at, 0)))
            stored = put(kv.k[0, :, 0], mine, start)
            kv = KV(k=stored[None, :, None], v=kv.v)
        at = span.enter[:, :, None]
        sees = (keys.enter[:, None] <= at) & (at < keys.exit[:, None])
        return jnp.tanh(jnp.einsum("bts,bsd->btd", sees.astype(mine.dtype), stored) * 0.5), kv

    return Network(
        apply=apply,
        unembed=lambda params, hidden: jnp.where(
            jnp.arange(vocab_size) < ids, hidden @ params["out"], -1e30
        ),
        init=init,
        axes=lambda: {"embed": ("vocab", "embed"), "out": ("embed", "vocab")},
        empty_kv=lambda rows, slots: KV(
            k=jnp.zeros((1, rows, 1, slots, width)), v=jnp.zeros((1, rows, 1, slots, 1))
        ),
        head=("out",),
        num_ids=ids,
    )


class Characters:
    """A tokenizer of single characters, control tokens, and two ends of sequence."""

    def __init__(self, characters: str = "0123456789.:\n abcdefgh", extra: tuple[str, ...] = ()):
        self._pieces = ["<pad>", "<eos>", "<end>", *THREADWEAVER, *extra, *characters]
        self.vocab_size = len(self._pieces)
        self.pad_id, self.eos_ids = 0, (1, 2)
        self.fingerprint = "characters"
        self.source = "characters"

    def encode(self, text: str) -> np.ndarray:
        ids = []
        while text:
            piece = max((p for p in self._pieces if text.startswith(p)), key=len)
            ids.append(self._pieces.index(piece))
            text = text[len(piece) :]
        return np.array(ids, np.int32)

    encode_plain = encode

    def decode(self, ids) -> str:
        return "".join(self._pieces[i] for i in np.asarray(ids).tolist())

    def piece(self, token: int) -> str:
        return self._pieces[token]

    def id_of(self, text: str) -> int:
        return self._pieces.index(text)
