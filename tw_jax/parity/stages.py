"""The two sides of `tw parity`: every stage by PyTorch and by us, and what both decode.

Both are given the same packed tries and hand out stages under the same names. This file knows no
files and no verdict; `programs/parity.py` brings the material, `parity/compare.py` judges.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.contracts import Params
from tw_jax.forkjoin.threadweaver import ThreadWeaver
from tw_jax.models import hf
from tw_jax.models.rope import frequencies
from tw_jax.models.transformer import Model, network, walk
from tw_jax.sample.sampler import Sampler, make_sampler
from tw_jax.tokenizer.interface import Tokenizer
from tw_jax.train.loss import token_logp
from tw_jax.train.sft import make_sft_step, nll_sums
from tw_jax.train.state import Optim, create
from tw_jax.trie.batch import TrieBatch

if TYPE_CHECKING:
    from tw_jax.parity.torch_oracle import Oracle, Recipe, Rows

CHUNK_TOKENS = 256
"""Nodes unembedded at a time; real vocabularies are wide."""


@configurable
class Training:
    """A training curve.

    Attributes:
      steps: of the curve.
      optim: optimiser and schedule; its end_lr is 0, as in the schedules of transformers.
    """

    steps: int
    optim: Optim

    def check(self) -> None:
        """Refuses what transformers has no counterpart for."""
        require(self, "steps", least=1)
        if self.optim.algorithm != "adamw":
            raise ValueError(
                f"Optim.algorithm = {self.optim.algorithm!r}: want 'adamw', which is what "
                "transformers trains with here."
            )
        if self.optim.end_lr:
            raise ValueError(
                f"Optim.end_lr = {self.optim.end_lr}: want 0.0, the end of transformers' schedules."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """What both sides are given.

    Attributes:
      calls: packed tries, labels along calls; numpy.
      flat: the same tries with the reference's labels.
      prompts: ids that decoding goes on from.
      tokenizer: of all ids.
      protocol: of decoding.
    """

    calls: TrieBatch
    flat: TrieBatch
    prompts: list[np.ndarray]
    tokenizer: Tokenizer
    protocol: ThreadWeaver

    @property
    def is_node(self) -> np.ndarray:
        """[B, T] bool: no padding."""
        index = np.arange(self.calls.tokens.shape[1])
        return np.asarray((self.calls.parent != index) | (self.calls.end > index + 1))

    @property
    def is_trained(self) -> np.ndarray:
        """[B, T] bool: has a loss of its own."""
        return np.asarray(self.calls.weight) > 0


def their_side(
    oracle: Oracle, material: Material, training: Training | None, oracles: ModuleType
) -> dict[str, Any]:
    """Every stage by PyTorch; see `compare.MEANING`."""
    rows = _rows(material, oracles)
    weights = {name: array.copy() for name, array in oracle.weights().items()}
    side: dict[str, Any] = {"rope": oracle.frequencies(), "weights": weights}
    side |= {name: made[material.is_node] for name, made in oracle.walk(rows)}
    side["logp"] = _of_children(oracle.logp(rows), material)
    side |= {"loss": oracle.call_loss(rows), "flat_loss": oracle.flat_loss(rows)}
    if training is not None:
        once = Training(steps=1, optim=_once(training.optim))
        one = oracle.train([rows], _recipe(once, oracles))
        curve = oracle.train(_single(rows), _recipe(training, oracles))
        side |= {"gradients": one.gradients, "flat_gradients": oracle.flat_gradients(rows)}
        side |= {"step": one.params, "curve": curve.losses}
    return side


def our_side(
    model: Model, params: Params, material: Material, training: Training | None
) -> dict[str, Any]:
    """Every stage by us, under the names that transformers gives to parameters."""
    net, calls = network(model), jax.tree.map(jnp.asarray, material.calls)
    flat = jax.tree.map(jnp.asarray, material.flat)

    @jax.jit
    def forward(params: Params) -> tuple[jax.Array, jax.Array]:
        hidden, _ = net.apply(params, calls.tokens, calls.depth, calls.span)
        said = token_logp(net, params, hidden, batch=calls, chunk_tokens=CHUNK_TOKENS)
        return net.unembed(params, hidden), said.logp

    @jax.jit
    def loss(params: Params, batch: TrieBatch) -> jax.Array:
        total, sums = nll_sums(net, params, batch, chunk_tokens=CHUNK_TOKENS)
        return total / sums["weight"]

    def parameters(tree: Params) -> dict[str, np.ndarray]:
        return dict(hf.named(tree, model))

    logits, logp = forward(params)
    side: dict[str, Any] = {"rope": frequencies(model.rope, model.head_width)[0]}
    side["weights"] = parameters(params)
    for name, hidden in walk(model, params, calls.tokens, calls.depth, calls.span):
        side[name] = np.asarray(hidden.astype(jnp.float32))[material.is_node]
    side["logits"] = np.asarray(logits)[material.is_node]
    side["logp"] = _of_children(np.asarray(logp), material)
    side |= {"loss": float(loss(params, calls)), "flat_loss": float(loss(params, flat))}
    if training is not None:
        steps, optim = training.steps, training.optim
        gradient = jax.jit(jax.grad(loss))
        side["gradients"] = parameters(gradient(params, calls))
        side["flat_gradients"] = parameters(gradient(params, flat))
        _, moved = _train(net, params, [calls], _once(optim), steps=1)
        side["step"] = parameters(moved)
        side["curve"], _ = _train(net, params, _single(calls), optim, steps=steps)
    return side


def _train(
    net: Any, params: Params, batches: list[TrieBatch], optim: Optim, *, steps: int
) -> tuple[np.ndarray, Params]:
    """The loss before each step, and the parameters after the last."""
    step = jax.jit(make_sft_step(net, optim, steps=steps, chunk_tokens=CHUNK_TOKENS))
    state, losses = create(params, optim, key=jax.random.key(0)), []
    # Placed as what a step returns, or the second step would compile anew.
    state = jax.device_put(state, jax.devices()[0])
    for number in range(steps):
        state, metrics = step(state, batches[number % len(batches)])
        losses.append(float(metrics["loss"]))
    return np.array(losses), state.params


def _once(optim: Optim) -> Optim:
    """The same without a warm-up, whose first step would move nothing."""
    return dataclasses.replace(optim, warmup_steps=0)


def _recipe(training: Training, oracles: ModuleType) -> Recipe:
    steps, optim = training.steps, training.optim
    warmup = optim.warmup_steps
    if warmup is None:
        warmup = int(np.ceil(steps * optim.warmup_ratio))
    names = {"constant": "constant_with_warmup"}
    return oracles.Recipe(
        rate=optim.peak_lr,
        schedule=names.get(optim.schedule, optim.schedule),
        warmup=warmup,
        steps=steps,
        betas=(optim.beta1, optim.beta2),
        epsilon=optim.epsilon,
        decay=optim.weight_decay,
        clip=optim.clip_norm,
    )


def _rows(material: Material, oracles: ModuleType) -> Rows:
    calls = material.calls
    return oracles.Rows(
        tokens=np.asarray(calls.tokens),
        parent=np.asarray(calls.parent),
        depth=np.asarray(calls.depth),
        weight=np.asarray(calls.weight),
        flat_weight=np.asarray(material.flat.weight),
    )


def _single(batch: Any) -> list[Any]:
    """A batch for each row that trains anything."""
    kept = np.flatnonzero(np.asarray(batch.weight).any(axis=1)).tolist()
    if isinstance(batch, TrieBatch):
        return [jax.tree.map(lambda a, b=b: a[b : b + 1], batch) for b in kept]
    return [type(batch)(**{n: a[b : b + 1] for n, a in vars(batch).items()}) for b in kept]


def _of_children(logp: np.ndarray, material: Material) -> np.ndarray:
    """Log-probs [B, T] of all nodes, with 0 at roots, which nothing predicts."""
    has_parent = np.asarray(material.calls.parent) != np.arange(logp.shape[1])
    return np.where(has_parent, logp, 0)[material.is_node]


# Decoding.


def greedy_match(
    model: Model, params: Params, oracle: Oracle, material: Material, *, tokens: int
) -> float:
    """Share of the prompts after which both draw the same ids, up to an end of sequence."""
    protocol, eos = material.protocol, material.tokenizer.eos_ids
    limits = dataclasses.replace(protocol.limits, parallel=False, max_new=tokens)
    ours = _decoded(model, params, material.prompts, ThreadWeaver(protocol.table, limits))
    prompts = [prompt.tolist() for prompt in material.prompts]
    return _share_equal(ours, [oracle.greedy(p, stops=eos, limit=tokens) for p in prompts])


def forkjoin_match(
    model: Model, params: Params, oracle: Oracle, material: Material, *, oracles: ModuleType
) -> float:
    """Share of the prompts after which both write the same joined ids, threads and all."""
    limits = material.protocol.limits
    threads = oracles.Threads(
        encode=lambda text: material.tokenizer.encode(text).tolist(),
        decode=material.tokenizer.decode,
        eos=material.tokenizer.eos_ids,
        max_new=min(limits.max_new, limits.max_context),
        max_thread=limits.max_thread,
        max_threads=limits.max_threads,
        max_rounds=limits.max_rounds,
    )
    ours = _decoded(model, params, material.prompts, material.protocol)
    prompts = [prompt.tolist() for prompt in material.prompts]
    return _share_equal(ours, [oracles.fork_join(oracle, p, threads) for p in prompts])


def _decoded(
    model: Model, params: Params, prompts: list[np.ndarray], protocol: ThreadWeaver
) -> list[list[int]]:
    """Ids after each prompt, by the jitted sampler."""
    longest = max(map(len, prompts))
    sampler = Sampler(rows=len(prompts), max_prompt=longest, temperature=0.0)
    # A pretrained table may have no rows for the control tokens, which the tokenizer was given.
    net = network(model, num_ids=min(model.vocab_size, protocol.table.num_ids))
    made = make_sampler(net, protocol, sampler)(params, prompts)
    return [t.ids[t.prompt_tokens :].tolist() for t in made]


def _share_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    return float(np.mean([a == b for a, b in zip(ours, theirs, strict=True)]))
