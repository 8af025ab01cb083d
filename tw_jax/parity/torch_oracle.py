"""The PyTorch side of a comparison: transformers' model, the reference's losses, torch's AdamW.

This is the only importer of torch and transformers; arguments and results are numpy arrays. It
imports no other module of this package and computes everything differently: visibility by walking
parents, the reference's labels by stock transformers, P-GRPO with one row per call, and threads by
a plain loop.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

transformers.utils.logging.disable_progress_bar()

IGNORED = -100
"""The label that the loss of transformers ignores."""


# Folders of models.


def write_random(folder: str | Path, fields: Mapping[str, Any], *, seed: int) -> None:
    """Makes a random model from fields of a `config.json` and saves it in float32.

    Norm scales are random as well, so that a scale that is never applied is noticed.

    Args:
      folder: Folder of `config.json` and `model.safetensors`.
      fields: Fields of the config, `model_type` among them.
      seed: Seed of the weights.
    """
    kinds = dict(fields)
    cfg = transformers.AutoConfig.for_model(kinds.pop("model_type"), **kinds)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(cfg, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                # Large enough that attention is far from uniform, small enough to train.
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def write_gguf(file: str | Path, folder: str | Path) -> None:
    """Dequantises a GGUF file with transformers; saves the model in float32 and its tokenizer.

    Args:
      file: The .gguf file.
      folder: Folder of `config.json`, `model.safetensors` and `tokenizer.json`.

    Raises:
      ValueError: If the file lacks a tensor of its model, or has an unknown tensor.
    """
    home, name = os.path.split(os.path.abspath(file))
    cfg = transformers.AutoConfig.from_pretrained(home, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_config(cfg, dtype=torch.float32)
    read = load_gguf_checkpoint(os.fspath(file), return_tensors=True, model_to_load=model)
    missing, spare = model.load_state_dict(read["tensors"], strict=False)
    if spare or set(missing) - {"lm_head.weight"} or (missing and not cfg.tie_word_embeddings):
        raise ValueError(
            f"{file}: the file lacks the tensors {missing} and has the unknown tensors {spare}."
        )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(home, gguf_file=name).save_pretrained(folder)


# Input of both sides.


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of flattened tries.

    Attributes:
      tokens: [B, T] ids.
      parent: [B, T] index in the row of a node's parent; its own at roots and padding.
      depth: [B, T] positions.
      weight: [B, T] loss weights; 0 at roots and padding.
      flat_weight: [B, T] 1 where the reference's flat shift trains a node, else 0.
    """

    tokens: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    weight: np.ndarray
    flat_weight: np.ndarray


def visible(parent: np.ndarray) -> np.ndarray:
    """[T, T] bool: node i sees itself and what its parent sees. Parents come before children."""
    sees = np.eye(len(parent), dtype=bool)
    for node, above in enumerate(parent.tolist()):
        if above != node:
            sees[node] |= sees[above]
    return sees


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW as the Trainer of transformers runs it.

    Attributes:
      rate: Peak learning rate.
      schedule: A name of `transformers.get_scheduler`.
      warmup: Steps of the warm-up.
      steps: Steps of the schedule.
      betas: Betas of AdamW.
      epsilon: Epsilon of AdamW.
      decay: Weight decay of all parameters but norms and biases.
      clip: Largest norm of a gradient; None disables clipping.
    """

    rate: float
    schedule: Literal["cosine", "linear", "constant_with_warmup"]
    warmup: int
    steps: int
    betas: tuple[float, float]
    epsilon: float
    decay: float
    clip: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """The result of training.

    Attributes:
      losses: [steps] losses before each update.
      gradients: Gradients of the first step before clipping, by parameter.
      params: Parameters after the last step in float32, by name.
    """

    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]


class Oracle:
    """The model of a folder in transformers; eager attention for numbers, "sdpa" for speed.

    In bfloat16 the model computes in bfloat16 and keeps float32 weights for the optimiser, as mixed
    precision does.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: Literal["float32", "bfloat16"],
        attention: Literal["eager", "sdpa"] = "eager",
    ) -> None:
        """Loads the folder."""

        def load(kind: torch.dtype) -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=kind, attn_implementation=attention, local_files_only=True
            ).eval()

        self._dtype = getattr(torch, dtype)
        self._load = load
        self.model: Any = load(self._dtype)

    # Constants and weights.

    def frequencies(self) -> np.ndarray:
        """[H / 2] radians by which each pair of a head rotates from one token to the next."""
        return self.model.model.rotary_emb.inv_freq.float().numpy()

    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter in float32, by name; a tied output head is left out."""
        model = self.model if self._dtype == torch.float32 else self._load(torch.float32)
        return {name: p.detach().numpy() for name, p in model.named_parameters()}

    # Forward.

    @torch.no_grad()
    def walk(self, rows: Rows) -> Iterator[tuple[str, np.ndarray]]:
        """The names "embed", "block.0", ..., "norm", "logits" with their outputs [B, T, ...]."""
        seen: list[tuple[str, np.ndarray]] = []

        def keep(name: str) -> Callable[..., None]:
            def hook(module: Any, given: Any, made: Any) -> None:
                output = made[0] if isinstance(made, tuple) else made
                seen.append((name, output.float().numpy()))

            return hook

        inner = self.model.model
        parts = [("embed", inner.embed_tokens)]
        parts += [(f"block.{i}", layer) for i, layer in enumerate(inner.layers)]
        parts += [("norm", inner.norm)]
        handles = [part.register_forward_hook(keep(name)) for name, part in parts]
        try:
            logits = self._logits(rows)
        finally:
            for handle in handles:
                handle.remove()
        yield from seen
        yield "logits", logits.float().numpy()

    def _logits(self, rows: Rows) -> torch.Tensor:
        return self._run(rows, self._mask(rows)).logits

    def _mask(self, rows: Rows) -> torch.Tensor:
        """[B, 1, T, T] added to scores, as the reference's collator builds it."""
        sees = torch.from_numpy(np.stack([visible(parent) for parent in rows.parent]))
        blind = torch.finfo(self._dtype).min
        return torch.zeros(sees.shape, dtype=self._dtype).masked_fill(~sees, blind)[:, None]

    def _run(self, rows: Rows, mask: torch.Tensor, **more: Any) -> Any:
        return self.model(
            input_ids=_long(rows.tokens),
            attention_mask=mask,
            position_ids=_long(rows.depth),
            use_cache=False,
            **more,
        )

    # Losses.

    @torch.no_grad()
    def logp(self, rows: Rows) -> np.ndarray:
        """[B, T] log-prob of each node in nats, read from the logits of its parent."""
        return self._logp(self._logits(rows), rows).numpy()

    def _logp(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        above = _long(rows.parent)[..., None].expand(-1, -1, logits.shape[-1])
        at_parent = logits.float().gather(1, above)
        flat = functional.cross_entropy(
            at_parent.flatten(0, 1), _long(rows.tokens).flatten(), reduction="none"
        )
        return -flat.view(rows.tokens.shape)

    def _call_loss(self, rows: Rows, mask: torch.Tensor | None = None) -> torch.Tensor:
        weight = torch.from_numpy(np.asarray(rows.weight, np.float32))
        logits = self._run(rows, self._mask(rows) if mask is None else mask).logits
        return -(weight * self._logp(logits, rows)).sum() / weight.sum()

    @torch.no_grad()
    def call_loss(self, rows: Rows) -> float:
        """Mean negative log-prob of the weighted nodes, each read from its parent."""
        return self._call_loss(rows).item()

    @torch.no_grad()
    def flat_loss(self, rows: Rows) -> float:
        """The loss of stock transformers on the flattened trie, with `labels` shifted by one."""
        return self._flat_loss(rows).item()

    def flat_gradients(self, rows: Rows) -> dict[str, np.ndarray]:
        """Gradients of the flat loss, by parameter."""
        self.model.zero_grad(set_to_none=True)
        self._flat_loss(rows).backward()
        return self._gradients()

    def _flat_loss(self, rows: Rows) -> torch.Tensor:
        labels = np.where(rows.flat_weight > 0, rows.tokens, IGNORED)
        return self._run(rows, self._mask(rows), labels=_long(labels)).loss

    def pgrpo(
        self,
        rows: Sequence[tuple[np.ndarray, np.ndarray]],
        advantages: Sequence[float],
        old: Sequence[np.ndarray],
        *,
        clip: tuple[float, float] = (0.2, 0.28),
    ) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of P-GRPO with one row per call, and its gradients.

        Args:
          rows: (context, sampled) ids of each call.
          advantages: The advantage of each call's rollout.
          old: Log-probs of each call's sampled ids when they were drawn.
          clip: Distances of the ratio's bounds below and above 1.

        Returns:
          (the mean over all sampled tokens of all rows, gradients by parameter).
        """
        self.model.zero_grad(set_to_none=True)
        current = [self._sampled_logp(context, sampled) for context, sampled in rows]
        before = [torch.from_numpy(np.asarray(logp, np.float32)) for logp in old]
        loss = policy_loss(current, before, advantages, clip=clip)
        loss.backward()
        return loss.item(), self._gradients()

    def _sampled_logp(self, context: np.ndarray, sampled: np.ndarray) -> torch.Tensor:
        """[m] log-probs of the sampled ids after a context, by a plain causal pass."""
        ids = _long(np.concatenate([context, sampled]))[None]
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
        logp = functional.log_softmax(logits.float(), dim=-1)
        return logp.gather(1, _long(sampled)[:, None])[:, 0]

    # Training.

    def train(self, batches: Sequence[Rows], recipe: Recipe) -> Trained:
        """Trains on the call loss and puts the weights back.

        Args:
          batches: one a step, from the first again when they run out.
          recipe: optimiser and schedule.
        """
        parameters = dict(self.model.named_parameters())
        begin = {n: torch.from_numpy(w.copy()) for n, w in self.weights().items()}
        masters = {n: w.clone().requires_grad_() for n, w in begin.items()}
        optimizer, scheduler = _optimizer(masters, recipe)
        losses, first = [], {}
        for step in range(recipe.steps):
            self.model.zero_grad(set_to_none=True)
            loss = self._call_loss(batches[step % len(batches)])
            loss.backward()
            losses.append(loss.item())
            first = first or self._gradients()
            for name, parameter in parameters.items():
                masters[name].grad = parameter.grad.float().clone()
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(list(masters.values()), recipe.clip)
            optimizer.step()
            scheduler.step()
            self._set(masters)
        self._set(begin)
        params = {name: master.detach().numpy() for name, master in masters.items()}
        return Trained(np.array(losses), first, params)

    def trainer(self, rows: Rows, recipe: Recipe) -> Callable[[], float]:
        """A training run on one batch, in float32: each call takes a step and returns its loss.

        The mask is made here, once, so that a call is what a step is to a data loader's consumer.
        """
        mask = self._mask(rows)
        masters = dict(self.model.named_parameters())
        optimizer, scheduler = _optimizer(masters, recipe)

        def take() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = self._call_loss(rows, mask)
            loss.backward()
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(list(masters.values()), recipe.clip)
            optimizer.step()
            scheduler.step()
            return loss.item()

        return take

    def _gradients(self) -> dict[str, np.ndarray]:
        return {n: p.grad.float().numpy().copy() for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def _set(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    # Decoding.

    @torch.no_grad()
    def greedy(self, context: Sequence[int], *, stops: Sequence[int], limit: int) -> list[int]:
        """Greedy ids after a context, up to and including a stop id."""
        cache = transformers.DynamicCache(config=self.model.config)
        given, made = torch.tensor([list(context)]), []
        while len(made) < limit:
            out = self.model(input_ids=given, past_key_values=cache, use_cache=True)
            made.append(int(out.logits[0, -1].argmax()))
            if made[-1] in stops:
                break
            given = torch.tensor([[made[-1]]])
        return made


def policy_loss(
    logp: Sequence[torch.Tensor],
    old: Sequence[torch.Tensor],
    advantages: Sequence[float],
    *,
    clip: tuple[float, float] = (0.2, 0.28),
    dual: float = 3.0,
) -> torch.Tensor:
    """The clipped policy loss, a mean over all sampled tokens of all rows.

    L = max(-A r, -A clip(r, 1 - low, 1 + high)), for A < 0 at most -A dual, where
    r = exp(logp - old). Source: the released actor of ThreadWeaver (arXiv:2512.07843).

    Args:
      logp: Log-probs of each row's sampled tokens.
      old: Their log-probs when they were drawn.
      advantages: The advantage of each row.
      clip: Low and high.
      dual: Bounds the loss of a token with a negative advantage whose probability rose.
    """
    low, high = clip
    losses = []
    for now, before, advantage in zip(logp, old, advantages, strict=True):
        ratio = torch.exp((now - before).clamp(-20, 20))
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
        if advantage < 0:
            loss = loss.clamp(max=-advantage * dual)
        losses.append(loss)
    return torch.cat(losses).mean()


def _optimizer(masters: Mapping[str, torch.Tensor], recipe: Recipe) -> tuple[Any, Any]:
    """AdamW and its schedule."""
    optimizer = torch.optim.AdamW(
        list(_groups(masters, recipe.decay)),
        lr=recipe.rate,
        betas=recipe.betas,
        eps=recipe.epsilon,
    )
    scheduler = transformers.get_scheduler(
        recipe.schedule,
        optimizer,
        num_warmup_steps=recipe.warmup,
        num_training_steps=recipe.steps,
    )
    return optimizer, scheduler


def _groups(masters: Mapping[str, torch.Tensor], decay: float) -> Iterator[dict[str, Any]]:
    """Parameter groups of the Trainer: norms and biases have no weight decay."""
    for rate, is_bare in ((decay, False), (0.0, True)):
        names = [n for n in masters if ("norm" in n or n.endswith("bias")) == is_bare]
        yield {"params": [masters[n] for n in names], "weight_decay": rate}


def _long(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int64))


# Threads.


@dataclasses.dataclass(frozen=True)
class Threads:
    """Vocabulary and limits of a loop over threads.

    Attributes:
      encode: Text to ids, including control tokens.
      decode: Ids to text, including control tokens.
      eos: Ids that end a sequence.
      max_new: Limit of ids after the prompt, forced ones included.
      max_thread: Limit of ids that one thread draws.
      max_threads: Limit of threads of a fork.
      max_rounds: Limit of forks.
    """

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    eos: Sequence[int]
    max_new: int
    max_thread: int
    max_threads: int
    max_rounds: int


def fork_join(oracle: Oracle, prompt: Sequence[int], threads: Threads) -> list[int]:
    """Decodes one rollout greedily, as the released controller does with text and stop tokens.

    The model writes until `</Outlines>`. Each outline number gets its own call on the shared prefix
    and its header. Threads are joined in the order of their outlines, and the model reads the whole
    text again.

    Args:
      oracle: The model.
      prompt: Ids.
      threads: Vocabulary and limits.

    Returns:
      The joined ids after the prompt.
    """
    encode, eos = threads.encode, set(map(int, threads.eos))
    (fork,), (close,) = encode("</Outlines>"), encode("</Thread>")
    made: list[int] = []
    rounds = 0
    while len(made) < threads.max_new:
        context = [*prompt, *made]
        limit = threads.max_new - len(made)
        drawn = oracle.greedy(context, stops=[fork, *eos], limit=limit)
        made += drawn
        if drawn[-1] != fork:
            break
        numbers = _numbers(threads.decode(drawn))[: threads.max_threads]
        if not numbers:
            continue
        if rounds == threads.max_rounds:
            break
        rounds += 1
        prefix, joined = [*prompt, *made], []
        for place, number in enumerate(numbers):
            header = list(encode(f"\n<Thread>\n{number}:"))
            text = oracle.greedy([*prefix, *header], stops=[close, *eos], limit=threads.max_thread)
            joined += header if not place else list(encode(f"<Thread>\n{number}:"))
            joined += [token for token in text if token not in eos]
            if text[-1] != close:
                joined += encode("\n</Thread>")
        made += [*joined, *encode("\n")]
    return made


def _numbers(text: str) -> list[str]:
    """Outline numbers after the last `<Outlines>`, without repetitions."""
    _, tag, tail = text.rpartition("<Outlines>")
    found = re.findall(r"<Outline>\s*([0-9]+(?:\.[0-9]+)*)\s*:", tail if tag else "")
    return list(dict.fromkeys(found))
