"""The device mesh, and the table that maps logical axes of arrays to axes of the mesh.

Parameters and activations have logical axis names ("heads", "rows", ...). `Rules` maps each name to
axes of the mesh ("data", "fsdp", "sequence", "tensor"). The mesh is automatic: programs put
shardings on the arguments and results of `jax.jit`, `constrain` fixes the sharding of a few
activations, and the compiler chooses the rest.
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
"""A logical name for each dimension of an array. None lets the compiler choose the sharding."""


@configurable
class Mesh:
    """Number of devices along each axis of the mesh; -1 takes the remaining devices.

    Attributes:
      data: Devices over which rows are split. Parameters are copied to each of them.
      fsdp: Devices over which both rows and parameters are split.
      sequence: Devices over which the tokens of a row are split, for rows that are too long for one
        device. Parameters are split over them as well.
      tensor: Devices over which heads, the MLP and the vocabulary are split.
    """

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1

    def check(self) -> None:
        """Raises ValueError for sizes that fit no number of devices."""
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"Mesh.{axis} = {size} must be at least 1, or -1 for the rest.")
        require(self, *MESH_AXES, least=-1)
        rest = [axis for axis, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(
                f"Mesh.{rest[0]} = -1 and Mesh.{rest[1]} = -1, but only one axis can take the "
                "remaining devices. Set one of them to a number."
            )


@configurable
class Rules:
    """The mesh axes over which each logical axis is split; () keeps it whole on every device.

    Attributes:
      layer: Stacked layers.
      embed: Model width of parameters.
      vocab: Vocabulary of the tables and of logits.
      heads: Query heads.
      kv_heads: Key/value heads.
      mlp: MLP width.
      norm: Scales of the norms.
      rank: Rank of adapters, and the rows of `Lora.token_rows`.
      rows: Rows of a batch.
      tokens: Tokens of a row.
      slots: Slots of a cache.
      head: Entries of one head in a cache.
      width: Model width of activations.
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
        """Raises ValueError if a rule names an axis of the mesh twice."""
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if len(set(axes)) < len(axes):
                raise ValueError(f"Rules.{field.name} = {axes} must name each axis once.")


def sampling(rules: Rules) -> Rules:
    """The rules for sampling rollouts: mesh axes that split tokens split rows instead.

    A row decodes a few tokens at a time, so there is no gain in splitting them.
    """
    return dataclasses.replace(rules, rows=(*rules.rows, *rules.tokens), tokens=())


# A user context is part of the cache key of jit, so a function is traced again under other rules.
_USED = jax.make_user_context(None)


def make_mesh(cfg: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Arranges devices in the mesh ("data", "fsdp", "sequence", "tensor").

    Args:
      cfg: Sizes of the axes.
      devices: Devices to use, such as `jax.devices()[:4]`; by default all devices of the job.

    Raises:
      ValueError: If the product of the sizes is not the number of devices, or if the devices belong
        to a job that this process has not joined.
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
                f"Mesh.{axis} = {size} does not divide the {count} available devices. "
                f"Set it to {choice}."
            )
    known = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: count // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(filled.values()) != count:
        product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(
            f"The product of the mesh {product} is not the {count} available devices. Set one size "
            "to -1, which takes the rest, and choose the others so that their product divides "
            f"{count}."
        )
    return jax.make_mesh(
        tuple(filled.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh, rules: Rules) -> Iterator[None]:
    """Activates a mesh: in code that is traced inside, `constrain` shards activations over it."""
    with jax.set_mesh(mesh), _USED((rules, mesh.devices.flat[0].platform)):
        yield


def current() -> tuple[AbstractMesh, Rules] | None:
    """The mesh and the rules of the enclosing `use`; None outside of it."""
    used = _USED.value
    return None if used is None else (jax.sharding.get_abstract_mesh(), used[0])


def platform() -> str:
    """The platform for which code is traced: "cpu", "gpu" or "tpu".

    Inside `use` it is the platform of that mesh, whose devices need not be present when a program
    is compiled ahead of time. Outside it is the platform of this process.
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
    """The partition spec of one array.

    A dimension of size 1 is never split.

    Args:
      axes: A logical name for each dimension, or None to let the compiler choose.
      shape: Shape of the array.
      mesh: The mesh.
      rules: The mesh axes of each logical axis.
      name: Name of the array in error messages.

    Raises:
      ValueError: If a name is unknown, two dimensions use one mesh axis, or a size is not divisible
        by its number of devices.
    """
    table = dataclasses.asdict(rules)
    if len(axes) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions and {len(axes)} axes {axes}.")
    unknown = [axis for axis in axes if axis is not None and axis not in table]
    if unknown:
        raise ValueError(f"{name} has axis {unknown[0]!r}. It must be one of {', '.join(table)}.")
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
                f"{name} has {axis} = {size}, which must be a multiple of {split} (mesh {over}). "
                f"Change the size or the mesh, or set Rules.{axis} = () to keep it whole."
            )
        parts.append(table[axis] if split > 1 and size > 1 else None)
    return PartitionSpec(*parts)


def mesh_axes(where: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec splits over, in its order, as manual axes of `jax.shard_map`."""
    parts = [part for part in where if part not in (None, PartitionSpec.UNCONSTRAINED)]
    return tuple(axis for part in parts for axis in ((part,) if isinstance(part, str) else part))


def only(where: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """A spec restricted to the mesh axes `axes`, as `jax.shard_map` over these axes needs it."""
    kept = (
        tuple(axis for axis in mesh_axes(PartitionSpec(part)) if axis in axes) for part in where
    )
    return PartitionSpec(*(part or None for part in kept))


def shardings(axes: Any, shapes: Any, mesh: jax.sharding.Mesh | AbstractMesh, rules: Rules) -> Any:
    """The sharding of each array of a tree, from its logical axes and its shape.

    Args:
      axes: Tree of tuples of logical names, such as `Network.axes()`.
      shapes: Tree of the same structure, of arrays or `jax.ShapeDtypeStruct`s.
      mesh: The mesh.
      rules: The mesh axes of each logical axis.

    Returns:
      Tree of `NamedSharding`.

    Raises:
      ValueError: As `spec`; the message names the array by its path.
    """

    def one(path: Any, names: LogicalAxes, array: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, spec(names, array.shape, mesh, rules, name=name))

    return jax.tree_util.tree_map_with_path(
        one, axes, shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Fixes the sharding of an activation on the mesh of `use`; outside of it, returns `x`.

    Args:
      x: An array.
      axes: A logical name for each dimension, or None to let the compiler choose.

    Raises:
      ValueError: As `spec`.
    """
    found = current()
    if found is None:
        return x
    where = spec(axes, x.shape, *found, name="An activation")
    return jax.lax.with_sharding_constraint(x, where)


def put_rows(tree: Any) -> Any:
    """Puts host arrays on devices: split by rows over the mesh of `use`, outside of it on one.

    The arrays of the result share no memory, so all of them may be donated.

    Args:
      tree: Host arrays [R, ...], complete and equal on every host.

    Raises:
      ValueError: If R is not divisible by the number of devices that rows are split over.
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
    """Checks that rows can be split evenly over the devices.

    Args:
      name: Name of the config field, for the message.
      rows: Number of rows.
      mesh: The mesh.
      rules: `Rules.rows` says over which axes rows are split.

    Raises:
      ValueError: If the number of rows is not a multiple of these devices.
    """
    split = math.prod(mesh.shape[axis] for axis in rules.rows)
    if rows % split:
        raise ValueError(
            f"{name} = {rows} must be a multiple of {split}, the number of devices that rows are "
            f"split over. Change {name} or Mesh."
        )


def row_share(mesh: jax.sharding.Mesh, rules: Rules) -> tuple[int, int]:
    """The share of a batch's rows that this process holds, and the number of shares.

    Processes have the same share if their devices hold the same rows. That happens where a mesh
    axis that does not split rows spans several processes.

    Args:
      mesh: The mesh.
      rules: `Rules.rows` says over which axes rows are split.

    Returns:
      (share, number of shares). All shares have the same number of rows.

    Raises:
      ValueError: If two processes have some rows in common, but not all.
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
            f"The mesh {dict(mesh.shape)} gives two hosts rows of which they share only some. "
            "Hosts must hold either the same rows or no common rows. Set Mesh.tensor to a divisor "
            "or to a multiple of the number of devices of a host."
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def to_global(batch: Any, mesh: jax.sharding.Mesh, rules: Rules, *, rows_axis: int = 0) -> Any:
    """Combines the rows that each host holds into one global batch.

    Hosts whose devices hold the same rows must pass the same rows, see `row_share`.

    Args:
      batch: Tree of host arrays with the rows of this host. All hosts have the same number of rows.
      mesh: The mesh.
      rules: `Rules.rows` says over which axes rows are split.
      rows_axis: The dimension of rows; 1 for [A, B, T] with A batches to accumulate.

    Returns:
      The tree with global `jax.Array`s, which have the rows of all hosts.

    Raises:
      ValueError: If the rows of a host are not divisible by its share of the devices.
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
                f"{name or 'The batch'} has {rows} rows on this host, which must be a multiple of "
                f"{held}, its share of the devices that rows are split over. Change the number of "
                "rows or the mesh."
            )
        shape = list(local.shape)
        shape[rows_axis] = rows // held * split
        return jax.make_array_from_process_local_data(where, local, tuple(shape))

    return jax.tree_util.tree_map_with_path(one, batch)
