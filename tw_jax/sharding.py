"""Mesh and logical axes: one table says which array dimension is split over which devices.

Parameters and activations carry logical axis names ("heads", "rows", ...); `Rules` maps a name to
axes of the mesh ("data", "fsdp", "sequence", "tensor"). The mesh is automatic: programs put
shardings on the arguments and results of `jax.jit`, `constrain` pins a few activations, and the
compiler does the rest. This file knows no model and no optimiser; it hands shardings to `programs/`
and `train/state.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from tw_jax import hosts
from tw_jax.bounds import require
from tw_jax.config import configurable

MeshAxis = Literal["data", "fsdp", "sequence", "tensor"]
MESH_AXES = ("data", "fsdp", "sequence", "tensor")

LogicalAxes = tuple[str | None, ...]
"""One logical name for each dimension of an array; None leaves the dimension to the compiler."""


@configurable
class Mesh:
    """How many devices each axis of the mesh has; -1 takes the rest.

    Attributes:
      data: devices over which rows are split and parameters copied.
      fsdp: devices over which rows and parameters are split.
      sequence: devices over which the tokens of a row are split, and parameters too, for rows that
        are too long for one device.
      tensor: devices over which heads, the MLP and the vocabulary are split.
    """

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1

    def check(self) -> None:
        """Raises ValueError for sizes that no number of devices can satisfy."""
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"Mesh.{axis} = {size}: want at least 1, or -1 for the rest.")
        require(self, *MESH_AXES, least=-1)
        rest = [axis for axis, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(
                f"Mesh.{rest[0]} = -1 and Mesh.{rest[1]} = -1: want at most one -1, for only one "
                "axis can take the rest."
            )


@configurable
class Rules:
    """Over which mesh axes each logical axis is split; () keeps it whole on every device.

    Attributes:
      layer: stacked layers.
      embed: model width of parameters.
      vocab: vocabulary, of the tables and of logits.
      heads: query heads.
      kv_heads: key/value heads.
      mlp: MLP width.
      norm: scales of the norms.
      rank: rank of adapters.
      rows: rows of a batch.
      tokens: tokens of a row.
      slots: slots of a cache.
      head: entries of one head in a cache.
      width: model width of activations.
    """

    layer: tuple[MeshAxis, ...] = ()
    embed: tuple[MeshAxis, ...] = ("fsdp", "sequence")
    vocab: tuple[MeshAxis, ...] = ("tensor",)
    heads: tuple[MeshAxis, ...] = ("tensor",)
    kv_heads: tuple[MeshAxis, ...] = ("tensor",)
    mlp: tuple[MeshAxis, ...] = ("tensor",)
    norm: tuple[MeshAxis, ...] = ()
    rank: tuple[MeshAxis, ...] = ()
    rows: tuple[MeshAxis, ...] = ("data", "fsdp")
    tokens: tuple[MeshAxis, ...] = ("sequence",)
    slots: tuple[MeshAxis, ...] = ()
    head: tuple[MeshAxis, ...] = ()
    width: tuple[MeshAxis, ...] = ()

    def check(self) -> None:
        """Refuses an axis of the mesh that would split the same dimension twice."""
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if len(set(axes)) < len(axes):
                raise ValueError(f"Rules.{field.name} = {axes} must name each axis once.")


def sampling(rules: Rules) -> Rules:
    """The rules under which rollouts are sampled: what splits tokens splits rows as well.

    A row decodes a few tokens at a time, which are not worth splitting.
    """
    return dataclasses.replace(rules, rows=(*rules.rows, *rules.tokens), tokens=())


# A user context is part of jit's cache key, so a function traced under other rules is traced again.
_USED = jax.make_user_context(None)


def make_mesh(
    cfg: Mesh,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> jax.sharding.Mesh:
    """Lays devices out as the mesh ("data", "fsdp", "sequence", "tensor").

    Args:
      cfg: sizes.
      devices: all devices of the job by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or the devices are those of
        a job that this process has not joined.
    """
    if devices is None:
        hosts.require_joined()
        devices = jax.devices()
    count = len(devices)
    sizes = {axis: getattr(cfg, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        if size != -1 and count % size:
            fits = [str(n) for n in range(1, count + 1) if count % n == 0]
            choice = " or ".join(filter(None, [", ".join(fits[:-1]), fits[-1]]))
            raise ValueError(
                f"Mesh.{axis} = {size}: want a divisor of {count} devices. "
                f"Set Mesh.{axis} to {choice}."
            )
    known = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: count // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(filled.values()) != count:
        product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(
            f"Mesh of {product}: want {count} devices together. Set one size to -1, which takes "
            "the rest, and let the others multiply to a divisor."
        )
    return jax.make_mesh(
        tuple(filled.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh, rules: Rules) -> Iterator[None]:
    """Makes `constrain` act: code traced inside pins its activations to this mesh."""
    with jax.set_mesh(mesh), _USED((rules, mesh.devices.flat[0].platform)):
        yield


def current() -> tuple[AbstractMesh, Rules] | None:
    """The mesh and the rules of the enclosing `use`, or None outside of it."""
    used = _USED.value
    return None if used is None else (jax.sharding.get_abstract_mesh(), used[0])


def platform() -> str:
    """What the devices are for which code is traced: "cpu", "gpu" or "tpu".

    Those of the enclosing `use`, which need not be there when a program is compiled ahead of time;
    those of the process outside of it.
    """
    used = _USED.value
    return jax.default_backend() if used is None else used[1]


def spec(
    axes: LogicalAxes,
    shape: Sequence[int],
    mesh: jax.sharding.Mesh | AbstractMesh,
    rules: Rules,
    *,
    name: str = "array",
) -> PartitionSpec:
    """Where each dimension of one array goes.

    A dimension of size 1 stays whole, whatever its rule.

    Args:
      axes: a logical name for each dimension, or None to leave it to the compiler.
      shape: the array's shape.
      mesh: the mesh.
      rules: the table.
      name: what errors call the array.

    Raises:
      ValueError: an unknown name, two dimensions on one mesh axis, or a size that does not divide.
    """
    table = dataclasses.asdict(rules)
    if len(axes) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions and axes {axes}: want one for each.")
    unknown = [axis for axis in axes if axis is not None and axis not in table]
    if unknown:
        raise ValueError(f"{name} has axis {unknown[0]!r}: want one of {', '.join(table)}.")
    taken: dict[str, str] = {}
    for axis in filter(None, axes):
        for mesh_axis in table[axis]:
            if mesh_axis in taken:
                raise ValueError(
                    f"{name} has axes {axes}: {taken[mesh_axis]} and {axis} both go to mesh axis "
                    f"{mesh_axis!r}. Change Rules.{taken[mesh_axis]} or Rules.{axis}."
                )
            taken[mesh_axis] = axis
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is None:
            parts.append(PartitionSpec.UNCONSTRAINED)
            continue
        split = math.prod(mesh.shape[mesh_axis] for mesh_axis in table[axis])
        if split > 1 and size > 1 and size % split:
            over = " x ".join(f"{mesh_axis} {mesh.shape[mesh_axis]}" for mesh_axis in table[axis])
            raise ValueError(
                f"{name} has {axis} = {size}: want a multiple of {split} (mesh {over}). Change the "
                f"size or the mesh, or set Rules.{axis} = () to keep it whole."
            )
        parts.append(table[axis] if split > 1 and size > 1 else None)
    return PartitionSpec(*parts)


def mesh_axes(where: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec splits over, in its order: the manual ones of `jax.shard_map`."""
    parts = [part for part in where if part not in (None, PartitionSpec.UNCONSTRAINED)]
    return tuple(axis for part in parts for axis in ((part,) if isinstance(part, str) else part))


def only(where: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """A spec without mesh axes other than `axes`, as `jax.shard_map` over just these wants it."""
    kept = (
        tuple(axis for axis in mesh_axes(PartitionSpec(part)) if axis in axes) for part in where
    )
    return PartitionSpec(*(part or None for part in kept))


def shardings(axes: Any, shapes: Any, mesh: jax.sharding.Mesh | AbstractMesh, rules: Rules) -> Any:
    """A sharding for each array of a tree, from its logical axes and abstract shape.

    Args:
      axes: tree of tuples of logical names, such as `Network.axes()`.
      shapes: tree of the same structure, of arrays or `jax.ShapeDtypeStruct`s.
      mesh: the mesh.
      rules: the table.

    Returns:
      Tree of `NamedSharding`.

    Raises:
      ValueError: as `spec`, naming the array by its path.
    """

    def one(path: Any, names: LogicalAxes, array: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, spec(names, array.shape, mesh, rules, name=name))

    return jax.tree_util.tree_map_with_path(
        one, axes, shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Pins an activation to the mesh in `use`; outside of it, returns `x` untouched.

    Args:
      x: an array.
      axes: a logical name for each dimension, or None to leave it to the compiler.

    Raises:
      ValueError: as `spec`.
    """
    found = current()
    if found is None:
        return x
    where = spec(axes, x.shape, *found, name="An activation")
    return jax.lax.with_sharding_constraint(x, where)


def put_rows(tree: Any) -> Any:
    """Puts host arrays on the devices of the enclosing `use`, split by rows; outside, on one.

    No two arrays of the result share memory, so all may be donated.

    Args:
      tree: host arrays [R, ...], whole and the same on every host.

    Raises:
      ValueError: R does not divide over the devices.
    """
    found = current()
    if found is None:
        return jax.tree.map(jnp.array, tree)
    mesh, rules = jax.sharding.get_mesh(), found[1]

    def one(path: Any, array: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "The batch"
        place = NamedSharding(mesh, spec(("rows",), array.shape[:1], mesh, rules, name=name))
        return jax.make_array_from_callback(array.shape, place, lambda at: np.array(array[at]))

    return jax.tree_util.tree_map_with_path(one, tree)


def row_split() -> int:
    """Devices of the enclosing `use` that rows are split over; 1 outside."""
    found = current()
    return 1 if found is None else math.prod(found[0].shape[axis] for axis in found[1].rows)


def check_split(name: str, rows: int, mesh: jax.sharding.Mesh, rules: Rules) -> None:
    """Refuses a number of rows that the devices cannot share evenly.

    Args:
      name: of the config field, for the message.
      rows: the number.
      mesh: devices.
      rules: the table; `Rules.rows` says how rows are split.

    Raises:
      ValueError: it is no multiple of the devices.
    """
    split = math.prod(mesh.shape[axis] for axis in rules.rows)
    if rows % split:
        raise ValueError(
            f"{name} = {rows}: want a multiple of {split}, the devices that rows are split "
            "over. Change the rows, or Mesh."
        )


def row_share(mesh: jax.sharding.Mesh, rules: Rules) -> tuple[int, int]:
    """Which share of a batch's rows this process holds, and how many shares there are.

    Processes whose devices hold the same rows (a mesh axis outside of `Rules.rows` spans them) have
    the same share.

    Args:
      mesh: the mesh.
      rules: the table; `Rules.rows` says how rows are split.

    Returns:
      (share, number of shares); all shares have as many rows.

    Raises:
      ValueError: the rows of two processes overlap in part.
    """
    held: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        at = dict(zip(mesh.axis_names, place, strict=True))
        row = 0
        for axis in rules.rows:
            row = row * mesh.shape[axis] + at[axis]
        held.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    split = math.prod(mesh.shape[axis] for axis in rules.rows)
    if sum(map(len, shares)) != split or len(set(map(len, shares))) > 1:
        raise ValueError(
            f"The mesh {dict(mesh.shape)} gives two hosts rows of which they share only some: want "
            "hosts that hold the same rows or none in common. Let Mesh.tensor divide the devices "
            "of a host, or be a multiple of them."
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def to_global(batch: Any, mesh: jax.sharding.Mesh, rules: Rules, *, rows_axis: int = 0) -> Any:
    """Makes one global batch of the rows that each host holds.

    Hosts whose devices hold the same rows (a mesh axis outside of `Rules.rows` spans them) hand
    over the same rows.

    Args:
      batch: tree of host arrays with the rows of this host; every host has as many.
      mesh: the mesh.
      rules: the table; `Rules.rows` says how rows are split.
      rows_axis: which dimension is rows; 1 when [A, B, T] holds A batches to accumulate.

    Returns:
      The tree with global `jax.Array`s, of the rows of all hosts.

    Raises:
      ValueError: the rows of a host do not divide over its share of the devices.
    """
    where = NamedSharding(mesh, PartitionSpec(*(None,) * rows_axis, rules.rows))
    split = math.prod(mesh.shape[axis] for axis in rules.rows)
    parts = where.addressable_devices_indices_map((1,) * rows_axis + (split,)).values()
    held = len({part[rows_axis].indices(split) for part in parts if part is not None})

    def one(path: Any, local: np.ndarray) -> jax.Array:
        rows = local.shape[rows_axis]
        if rows % held:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{name or 'The batch'} has {rows} rows on this host: want a multiple of {held}, "
                "its share of the devices that rows are split over. Change the rows or the mesh."
            )
        shape = list(local.shape)
        shape[rows_axis] = rows // held * split
        return jax.make_array_from_process_local_data(where, local, tuple(shape))

    return jax.tree_util.tree_map_with_path(one, batch)
