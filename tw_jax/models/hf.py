"""Reads and writes Hugging Face folders of Qwen3 and Llama (safetensors).

A single table maps each of their tensors to one of our arrays, with its dimensions and whether it
is transposed. Reading and writing both follow this table, one tensor at a time. This is the only
file that imports safetensors.
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
    """One of our arrays, and the tensor of theirs with its values (of a block, one per layer)."""

    path: tuple[str, ...]
    name: str  # Name of their tensor; {} is the layer.
    theirs: str  # Dimensions of their tensor, one letter each, see `_sizes`.
    is_transposed: bool  # Ours is [in, out], theirs is [out, in].


def _block(path: str, name: str, theirs: str) -> _Row:
    where = ("blocks", *path.split("."))
    return _Row(where, f"model.layers.{{}}.{name}.weight", theirs, is_transposed=len(theirs) > 1)


_TABLE = (
    _Row(("embed",), "model.embed_tokens.weight", "vd", is_transposed=False),
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
    _Row(("norm", "scale"), "model.norm.weight", "d", is_transposed=False),
    _Row(("unembed",), "lm_head.weight", "vd", is_transposed=False),
)

_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")
"""A buffer in checkpoints of Llama 2. It is ignored, because it follows from the config."""


def _rows(model: Model) -> list[_Row]:
    """The rows of the table for this model."""
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
    """Name and shape of every tensor in a Hugging Face checkpoint of this model."""
    return {name: _shape(row, model) for row, _, name in _tensors(model)}


def _tensors(model: Model) -> Iterator[tuple[_Row, int | None, str]]:
    """(row, layer, name) of every tensor, layer by layer in Hugging Face's order."""
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

    The piece of a tensor that a device holds is read from the files, cast to `Model.param_dtype`
    and transferred before the next piece is read. So a host holds about one tensor, not the model.

    Args:
      folder: A folder with `model.safetensors`, or with shards and their index.
      model: The result of `read_model` for the folder; its dtypes may be changed.
      mesh: Devices to read onto; the first local device by default.
      rules: The mesh axes of each logical axis, `Rules()` by default.

    Raises:
      FileNotFoundError: If there are no weights.
      ValueError: If a file is truncated or corrupt; if tensors are missing, unknown, of another
        shape or quantised; or if `lm_head.weight` of a tied model is not its embedding.
    """
    folder = Path(folder)
    net = network(model)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    file_tensors = _open(folder)
    _refuse_others(folder, file_tensors, model)
    places = _places(net, shapes, mesh, rules)
    params: Params = {}
    for row in _rows(model):
        shape, place = (_at(tree, row.path) for tree in (shapes, places))
        _put(params, row.path, _assembled(file_tensors, row, model, shape, place))
    return params


def _places(
    net: Network, shapes: Any, mesh: jax.sharding.Mesh | None, rules: Rules | None
) -> Params:
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: here, shapes)
    return shardings(net.axes(), shapes, mesh, rules or Rules())


def _assembled(
    file_tensors: Mapping[str, Any],
    row: _Row,
    model: Model,
    shape: jax.ShapeDtypeStruct,
    place: jax.sharding.Sharding,
) -> jax.Array:
    """One of our arrays. Layers are written one by one into the stacked array on its devices."""
    if row.path[0] != "blocks":
        return _tensor(file_tensors[row.name], row, model, shape, place)
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
        new = _tensor(file_tensors[row.name.format(layer)], row, model, one, of_one)
        stack = put(stack, new, layer)
    return stack


def _tensor(
    file_tensor: Any,
    row: _Row,
    model: Model,
    shape: jax.ShapeDtypeStruct,
    place: jax.sharding.Sharding,
) -> jax.Array:
    """One tensor, read piece by piece. A piece that several devices hold is read once."""
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(shape.shape).items():
        bounds = zip(index or (), shape.shape, strict=True)
        piece = tuple(cut.indices(size)[:2] for cut, size in bounds)
        devices.setdefault(piece, []).append(device)
    arrays = []
    for piece, holders in devices.items():
        read = _read(file_tensor, row, [slice(*bounds) for bounds in piece])
        read = np.ascontiguousarray(read, shape.dtype)
        # Without waiting, the pieces of all devices would be in host memory at the same time.
        arrays += jax.block_until_ready([jax.device_put(read, device) for device in holders])
        del read
    return jax.make_array_from_single_device_arrays(shape.shape, place, arrays)


def _read(file_tensor: Any, row: _Row, piece: Sequence[slice]) -> np.ndarray:
    """A piece of our array of one layer; only this piece is read from disk."""
    return file_tensor[tuple(piece[::-1])].T if row.is_transposed else file_tensor[tuple(piece)]


def named(params: Params, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every array under Hugging Face's name and in its layout, one tensor at a time.

    In a job of many processes all take the same tensors in turn, and each gets all of them whole.

    Args:
      params: Parameters, or any tree shaped like them, for example gradients.
      model: Sizes and adapters.

    Yields:
      (name, tensor) in the order of Hugging Face's files, in the dtype of `params`. A weight with
      an adapter, or a table with trained rows, is merged with it and is float32.
    """
    for row, layer, name in _tensors(model):
        array = _of_layer(params, row.path, layer, model)
        yield name, np.ascontiguousarray(array.T if row.is_transposed else array)


def _of_layer(params: Params, path: Sequence[str], layer: int | None, model: Model) -> np.ndarray:
    """One of our arrays, or one layer of it, merged with its adapter."""
    *parents, name = path
    siblings = _at(params, parents)
    adapter = siblings.get(name + SUFFIX)

    def read(array: jax.Array) -> np.ndarray:
        return hosts.to_host(array if layer is None else array[layer])

    if adapter is None:
        return read(siblings[name])
    assert model.lora is not None, "parameters have adapters and their model has none"
    return merged(read(siblings[name]), jax.tree.map(read, adapter), model.lora)


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

    Adapters are merged into their weights. The new folder is built next to the old one and replaces
    it when it is complete. After an error the old folder is unchanged.
    All processes of a job call this, and process 0 writes.

    Args:
      folder: Created if it does not exist. Its weights and config are replaced, and its other files
        are kept.
      params: Parameters on the devices of the job.
      model: Their sizes and adapters.
      dtype: Dtype of the written tensors.
      base: Fields of a `config.json` to keep, for example the longest context and the ends of
        sequence. Fields that the model determines are replaced.
      shard_bytes: Largest size of a file, in bytes; a file has at least one tensor.
      others: Content of further files by name, such as the tokenizer's.
    """
    is_first = hosts.is_first()
    with folders.replacing(folder, is_replaced) if is_first else contextlib.nullcontext() as new:
        if new is not None:
            for name, content in (others or {}).items():
                (new / name).write_bytes(content)
        _write_into(new, params, model, dtype=dtype, base=base or {}, shard_bytes=shard_bytes)
    hosts.gather("written")


def is_replaced(name: str) -> bool:
    """Whether `write` replaces or removes a file of this name."""
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
    """Assigns tensors to files, in order; a file has at least one."""
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


# Reading and checking files.


def _open(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder by name, as a slice object that reads from disk."""
    file_tensors: dict[str, Any] = {}
    for file in weight_files(folder):
        try:
            opened: Any = safe_open(file, framework="np")
        except SafetensorError as error:
            raise ValueError(
                f"{file}: not a whole safetensors file ({error}). It has "
                f"{file.stat().st_size:,} bytes; copy or download it again."
            ) from None
        file_tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return file_tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
      FileNotFoundError: If there is none, or if one that the index names is missing.
      ValueError: If the index is damaged.
    """
    index, single = folder / _INDEX, folder / "model.safetensors"
    if index.is_file():
        names = _named_shards(index)
        absent = [name for name in names if not (folder / name).is_file()]
        if absent or not names:
            raise FileNotFoundError(
                f"{index} names {', '.join(absent) or 'no file'}. Every shard must be in the same "
                "folder. Download the missing files."
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor {_INDEX}. Give a folder in the layout of the "
        "Hub. Pickled weights (.bin) are not read; save them as safetensors first."
    )


def _named_shards(index: Path) -> list[str]:
    """The files that an index names, each once."""
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


def _refuse_others(folder: Path, file_tensors: Mapping[str, Any], model: Model) -> None:
    """Raises ValueError with the names of the first tensors that do not fit the model."""
    expected = tensor_shapes(model)
    have = {name: tuple(file_tensors[name].get_shape()) for name in file_tensors}
    missing = [name for name in expected if name not in have]
    spare = [name for name in have if name not in expected and not _BUFFER.fullmatch(name)]
    if model.tie_embeddings and "lm_head.weight" in spare:
        spare.remove("lm_head.weight")
        _require_tied(folder, file_tensors)
    wrong = [
        f"{n} is {list(have[n])} and must be {list(expected[n])}"
        for n in expected
        if have.get(n, expected[n]) != expected[n]
    ]
    odd = [
        f"{n} is {file_tensors[n].get_dtype()}"
        for n in expected
        if n in have and file_tensors[n].get_dtype() not in _DTYPES
    ]
    for problem, names in (
        ("tensors are missing", missing),
        ("tensors are unknown", spare),
        ("tensors have another shape", wrong),
        (f"tensors have a dtype other than {', '.join(_DTYPES)}", odd),
    ):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            raise ValueError(
                f"{folder}: {len(names)} {problem}: {shown}. According to its config.json it must "
                f"have {len(expected)} tensors, of a {family_of(model)} with {model.num_layers} "
                "layers."
            )


def _require_tied(folder: Path, file_tensors: Mapping[str, Any]) -> None:
    embed, head = file_tensors["model.embed_tokens.weight"], file_tensors["lm_head.weight"]
    rows, step = embed.get_shape()[0], 4096
    parts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
    same = embed.get_shape() == head.get_shape() and all(
        np.array_equal(embed[part], head[part]) for part in parts
    )
    if not same:
        raise ValueError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but config.json has "
            "tie_word_embeddings = true. Set it to false if the model was trained untied."
        )


# Control tokens for a pretrained vocabulary.


def add_rows(
    params: Params, model: Model, words: Mapping[int, Sequence[int]], *, multiple: int
) -> tuple[Params, Model]:
    """Initialises the rows of new ids; each is the mean of the rows of its name's pieces.

    embed[id] = mean(embed[w] for w in words[id]), and the same for an untied unembedding. A table
    that is too short, or whose length is not a multiple of `multiple`, grows. Its other new rows
    are the mean of all old ones. A table never shrinks. Source: ThreadWeaver's SFT. An opening and
    a closing tag of the same name get the same row, so adapters alone cannot tell them apart; see
    `Lora.token_rows`.

    Args:
      params: Pretrained parameters.
      model: Their sizes.
      words: For each new id the ids of the pieces of its name without brackets, at least one.
      multiple: The number of rows becomes a multiple of this, so that a mesh can split them.

    Returns:
      (parameters, model) with the new `Model.vocab_size`.
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
