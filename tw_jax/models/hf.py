"""The door to safetensors: Hugging Face folders of Qwen3 and Llama to parameters and back.

One table says which tensor of theirs is which array of ours and how its dimensions are cut and
turned; reading and writing follow it in either direction, one tensor at a time. This file knows no
checkpoints of ours and no tokenizer; it hands `Params` to `programs/`, and arrays under their names
to what compares them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tw_jax import folders, hosts
from tw_jax.contracts import Network, Params
from tw_jax.models.hf_config import config_fields, family_of, read_json
from tw_jax.models.lora import SUFFIX, merged
from tw_jax.models.transformer import Dtype, Model, network
from tw_jax.sharding import Rules, shardings

_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5_000_000_000
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


# The table of names.


class _Row(NamedTuple):
    """One array of ours, and the tensor of theirs that holds it or, of a block, one layer of it."""

    path: tuple[str, ...]
    name: str  # {} is the layer
    theirs: str  # A letter is a dimension, see `_sizes`.
    is_turned: bool  # Ours is [in, out], theirs [out, in].


def _block(path: str, name: str, theirs: str) -> _Row:
    is_turned = len(theirs) > 1
    return _Row(("blocks", *path.split(".")), f"model.layers.{{}}.{name}.weight", theirs, is_turned)


_TABLE = (
    _Row(("embed",), "model.embed_tokens.weight", "vd", is_turned=False),
    _block("attention_norm.scale", "input_layernorm", "d"),
    _block("attention.q", "self_attn.q_proj", "qd"),
    _block("attention.k", "self_attn.k_proj", "kd"),
    _block("attention.v", "self_attn.v_proj", "kd"),
    _block("attention.out", "self_attn.o_proj", "dq"),
    _block("attention.q_norm.scale", "self_attn.q_norm", "h"),
    _block("attention.k_norm.scale", "self_attn.k_norm", "h"),
    _block("mlp_norm.scale", "post_attention_layernorm", "d"),
    _block("mlp.gate", "mlp.gate_proj", "fd"),
    _block("mlp.up", "mlp.up_proj", "fd"),
    _block("mlp.down", "mlp.down_proj", "df"),
    _Row(("norm", "scale"), "model.norm.weight", "d", is_turned=False),
    _Row(("unembed",), "lm_head.weight", "vd", is_turned=False),
)

_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")
"""Llama 2 was saved with this; it follows from the config."""


def _rows(model: Model) -> list[_Row]:
    """The rows that this model has."""
    absent = {"unembed"} if model.tie_embeddings else set()
    if not model.qk_norm:
        absent |= {"q_norm", "k_norm"}
    return [row for row in _TABLE if not absent & set(row.path)]


def _sizes(model: Model) -> dict[str, int]:
    return {
        "v": model.vocab_size,
        "d": model.width,
        "f": model.mlp_width,
        "q": model.num_heads * model.head_width,
        "k": model.num_kv_heads * model.head_width,
        "h": model.head_width,
    }


def tensor_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Hugging Face checkpoint of this model has."""
    return {name: _shape(row, model) for row, _, name in _tensors(model)}


def _tensors(model: Model) -> Iterator[tuple[_Row, int | None, str]]:
    """(row, layer, name) of every tensor, layer by layer as Hugging Face counts them."""
    rows = _rows(model)
    stacked = [row for row in rows if row.path[0] == "blocks"]
    yield rows[0], None, rows[0].name
    for layer in range(model.num_layers):
        for row in stacked:
            yield row, layer, row.name.format(layer)
    for row in rows[1:]:
        if row.path[0] != "blocks":
            yield row, None, row.name


def _shape(row: _Row, model: Model) -> tuple[int, ...]:
    sizes = _sizes(model)
    return tuple(sizes[letter] for letter in row.theirs)


# Parameters.


def read_params(
    folder: str | Path,
    model: Model,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
) -> Params:
    """Reads the weights of a Hugging Face folder onto the devices.

    Each device's piece of each tensor is cut out of the files, cast to `Model.param_dtype` and sent
    on its way before the next is read, so that a host holds about one tensor, not the model.

    Args:
      folder: `model.safetensors`, or shards with their index.
      model: what `read_model` says of the folder, with the dtypes of choice.
      mesh: where to; the first local device by default.
      rules: how the mesh splits parameters; needed with a mesh.

    Raises:
      FileNotFoundError: there are no weights.
      ValueError: a file is cut or corrupt; tensors are missing, unknown, of another shape or
        quantised; or a tied model's `lm_head.weight` is not its embedding.
    """
    folder = Path(folder)
    net = network(model)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    stored = _open(folder)
    _refuse_others(folder, stored, model)
    places = _places(net, shapes, mesh, rules)
    params: Params = {}
    for row in _rows(model):
        shape, place = (_at(tree, row.path) for tree in (shapes, places))
        _put(params, row.path, _assembled(stored, row, model, shape, place))
    return params


def _places(
    net: Network, shapes: Any, mesh: jax.sharding.Mesh | None, rules: Rules | None
) -> Params:
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: here, shapes)
    return shardings(net.axes(), shapes, mesh, rules or Rules())


def _assembled(
    stored: Mapping[str, Any],
    row: _Row,
    model: Model,
    shape: jax.ShapeDtypeStruct,
    place: jax.sharding.Sharding,
) -> jax.Array:
    """One array of ours. Layers are put into their stack one by one, where it lies."""
    if row.path[0] != "blocks":
        return _tensor(stored[row.name], row, model, shape, place)
    one = jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)
    of_one = place
    if isinstance(place, jax.sharding.NamedSharding):
        of_one = jax.sharding.NamedSharding(place.mesh, jax.P(*place.spec[1:]))
    stack = jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=place)()
    put = jax.jit(
        lambda stack, new, layer: jax.lax.dynamic_update_index_in_dim(stack, new, layer, 0),
        out_shardings=place,
        donate_argnums=0,
    )
    for layer in range(model.num_layers):
        new = _tensor(stored[row.name.format(layer)], row, model, one, of_one)
        stack = put(stack, new, layer)
    return stack


def _tensor(
    stored: Any, row: _Row, model: Model, shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding
) -> jax.Array:
    """One tensor, read piece by piece; what several devices hold is read once."""
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(shape.shape).items():
        bounds = zip(index or (), shape.shape, strict=True)
        piece = tuple(cut.indices(size)[:2] for cut, size in bounds)
        devices.setdefault(piece, []).append(device)
    arrays = []
    for piece, holders in devices.items():
        read = _read(stored, row, [slice(*bounds) for bounds in piece])
        read = np.ascontiguousarray(read, shape.dtype)
        # Waited for, or the pieces of all devices would stand in host memory together.
        arrays += jax.block_until_ready([jax.device_put(read, device) for device in holders])
        del read
    return jax.make_array_from_single_device_arrays(shape.shape, place, arrays)


def _read(stored: Any, row: _Row, piece: Sequence[slice]) -> np.ndarray:
    """A piece of one layer's array of ours, of which nothing else is read from disk."""
    return stored[tuple(piece[::-1])].T if row.is_turned else stored[tuple(piece)]


def named(params: Params, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Their name and their layout of every array, one tensor at a time.

    In a job of many processes all take the same tensors in turn, and each gets all of them whole.

    Args:
      params: parameters, or any tree shaped like them, gradients for instance.
      model: sizes.

    Yields:
      (name, tensor) in the order of Hugging Face's files, in the dtype that `params` has; a weight
      that has an adapter comes with it in it, in float32.
    """
    for row, layer, name in _tensors(model):
        array = _of_layer(params, row.path, layer, model)
        yield name, np.ascontiguousarray(array.T if row.is_turned else array)


def _of_layer(params: Params, path: Sequence[str], layer: int | None, model: Model) -> np.ndarray:
    """An array of ours, or one layer of it, with its adapter in it."""
    *parents, name = path
    beside = _at(params, parents)
    adapter = beside.get(name + SUFFIX)

    def read(array: jax.Array) -> np.ndarray:
        return hosts.to_host(array if layer is None else array[layer])

    if adapter is None:
        return read(beside[name])
    assert model.lora is not None, "parameters have adapters and their model has none"
    return merged(read(beside[name]), jax.tree.map(read, adapter), model.lora)


def write(
    folder: str | Path,
    params: Params,
    model: Model,
    *,
    dtype: Dtype,
    base: Mapping[str, Any] | None = None,
    others: Mapping[str, bytes] | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` loads: safetensors and `config.json`.

    Adapters are merged into their weights. The new folder is built beside the old one and takes its
    place when it is complete; after an error the old folder is as it was. In a job of many
    processes all call this and process 0 writes.

    Args:
      folder: made where it does not exist. Weights and config in it are replaced, and its other
        files are kept.
      params: parameters, on the devices of the job.
      model: their sizes.
      dtype: of the tensors written.
      base: fields of a `config.json` to keep (its longest context, its ends of sequence); the
        model's own fields replace theirs.
      others: content of further files by name, such as the tokenizer's.
      shard_bytes: a file is closed before it would grow beyond this.
    """
    is_first = hosts.is_first()
    with folders.replacing(folder, is_replaced) if is_first else contextlib.nullcontext() as new:
        if new is not None:
            for name, content in (others or {}).items():
                (new / name).write_bytes(content)
        _write_into(new, params, model, dtype=dtype, base=base or {}, shard_bytes=shard_bytes)
    hosts.gather("written")


def is_replaced(name: str) -> bool:
    """Whether `write` replaces a file of this name, or removes it where it writes none."""
    return name in ("config.json", _INDEX) or name.endswith(".safetensors")


def _write_into(
    folder: Path | None,  # None in a process that does not write
    params: Params,
    model: Model,
    *,
    dtype: Dtype,
    base: Mapping[str, Any],
    shard_bytes: int,
) -> None:
    itemsize = jnp.dtype(dtype).itemsize
    files = _plan(
        {n: itemsize * math.prod(s) for n, s in tensor_shapes(model).items()}, shard_bytes
    )
    tensors = named(params, model)
    where: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        file = "model.safetensors" if len(files) == 1 else file
        held = {
            name: tensor.astype(jnp.dtype(dtype)) if folder is not None else tensor[:0]
            for name, tensor in _take(tensors, len(names))
        }
        hosts.together(partial(_save, held, folder, file), OSError)
        where |= dict.fromkeys(held, file)
    if folder is None:
        return
    if len(files) > 1:
        size = itemsize * sum(map(math.prod, tensor_shapes(model).values()))
        _write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    _write_json(folder / "config.json", config_fields(model, dtype=dtype, base=base))


def _save(tensors: dict[str, np.ndarray], folder: Path | None, file: str) -> None:
    if folder is not None:
        save_file(tensors, folder / file, metadata={"format": "pt"})


def _take(items: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        yield next(items)


def _plan(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Which tensors go into which file, in order; a file holds at least one."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if files[-1] and used + size > shard_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# Files as they are found.


def _open(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder as a slice that reads from disk, by name."""
    stored: dict[str, Any] = {}
    for file in weight_files(folder):
        try:
            opened: Any = safe_open(file, framework="np")
        except SafetensorError as error:
            raise ValueError(
                f"{file}: not a whole safetensors file ({error}). It has "
                f"{file.stat().st_size:,} bytes; copy or download it again."
            ) from None
        stored |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return stored


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the tensors of a folder are read from.

    Raises:
      FileNotFoundError: there is none, or one that the index names is missing.
      ValueError: the index is damaged.
    """
    index, single = folder / _INDEX, folder / "model.safetensors"
    if index.is_file():
        names = _named_shards(index)
        absent = [name for name in names if not (folder / name).is_file()]
        if absent or not names:
            raise FileNotFoundError(
                f"{index} names {', '.join(absent) or 'no file'}: want every shard beside it. "
                "Download the missing files."
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    raise FileNotFoundError(
        f"{folder}: neither model.safetensors nor {_INDEX} is there. Give a folder as the Hub has "
        "it; pickled weights (.bin) are not read, save them as safetensors first."
    )


def _named_shards(index: Path) -> list[str]:
    """The files that an index names, each once; the index must map tensors to files."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict):
        found = "no weight_map" if where is None else f"a weight_map of type {type(where).__name__}"
        raise ValueError(
            f"{index} has {found}. It must be an object that maps each tensor to its file. "
            "Download the index again."
        )
    for tensor, name in where.items():
        is_file = isinstance(name, str) and name.endswith(".safetensors")
        if not is_file or name != Path(name).name or "\\" in name:
            raise ValueError(
                f"{index}: weight_map[{tensor!r}] is {name!r}. It must be the name of a "
                ".safetensors file in the same folder. Download the index again."
            )
    return sorted(set(where.values()))


def _refuse_others(folder: Path, stored: Mapping[str, Any], model: Model) -> None:
    """Raises a sentence that names the first tensors that are not the model's."""
    want = tensor_shapes(model)
    have = {name: tuple(stored[name].get_shape()) for name in stored}
    missing = [name for name in want if name not in have]
    spare = [name for name in have if name not in want and not _BUFFER.fullmatch(name)]
    if model.tie_embeddings and "lm_head.weight" in spare:
        spare.remove("lm_head.weight")
        _require_tied(folder, stored)
    wrong = [
        f"{n} is {list(have[n])}, want {list(want[n])}"
        for n in want
        if have.get(n, want[n]) != want[n]
    ]
    odd = [
        f"{n} is {stored[n].get_dtype()}"
        for n in want
        if n in have and stored[n].get_dtype() not in _DTYPES
    ]
    for problem, names in (
        ("tensors are missing", missing),
        ("tensors are unknown", spare),
        ("tensors have another shape", wrong),
        (f"tensors are of a dtype other than {', '.join(_DTYPES)}", odd),
    ):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            raise ValueError(
                f"{folder}: {len(names)} {problem}: {shown}. Want the {len(want)} tensors of a "
                f"{family_of(model)} with {model.num_layers} layers, as its config.json says."
            )


def _require_tied(folder: Path, stored: Mapping[str, Any]) -> None:
    embed, head = stored["model.embed_tokens.weight"], stored["lm_head.weight"]
    rows, step = embed.get_shape()[0], 4096
    parts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
    same = embed.get_shape() == head.get_shape() and all(
        np.array_equal(embed[part], head[part]) for part in parts
    )
    if not same:
        raise ValueError(
            f"{folder}: lm_head.weight is not model.embed_tokens.weight, but config.json says "
            "tie_word_embeddings. Set it to false there if the model was trained untied."
        )


# Control tokens for a pretrained vocabulary.


def add_rows(
    params: Params, model: Model, words: Mapping[int, Sequence[int]], *, multiple: int
) -> tuple[Params, Model]:
    """Gives new ids their rows: each starts as the mean of the rows of the word it stands for.

    embed[id] = mean(embed[w] for w in words[id]), and so for an untied unembedding. A table that is
    too short, or no multiple, grows; its other new rows are the mean of all old ones, which no
    sampler will prefer. A table never shrinks. Source: ThreadWeaver's SFT (its new control tokens).

    Args:
      params: pretrained.
      model: their sizes.
      words: ids of the pieces of each new id's name without its brackets; at least one each.
      multiple: the number of rows is one of this, so that a mesh can split them.

    Returns:
      (parameters, model) with `Model.vocab_size` as it became.
    """
    needed = max([model.vocab_size, *(new + 1 for new in words)])
    size = -(-needed // multiple) * multiple

    def extended(table: jax.Array) -> jax.Array:
        wide = table.astype(jnp.float32)
        spare = jnp.broadcast_to(wide.mean(0), (size - len(wide), wide.shape[1]))
        grown = jnp.concatenate([wide, spare])
        for new, pieces in words.items():
            grown = grown.at[new].set(wide[jnp.asarray(pieces)].mean(0))
        return grown.astype(table.dtype)

    tables = [name for name in ("embed", "unembed") if name in params]
    grown = {name: jax.jit(extended)(params[name]) for name in tables}
    return {**params, **grown}, dataclasses.replace(model, vocab_size=size)


def _at(tree: Params, path: Iterable[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: Params, path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
