"""The train state and its update, by AdamW as in Hugging Face's Trainer or by Muon.

The only importer of optax. It receives gradients that are already divided, and returns the next
state. `abstract_state` describes a state by shapes and shardings without allocating arrays, so that
a step can be compiled for a mesh, or a checkpoint restored onto it, before memory is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.contracts import Network, Params
from tw_jax.models.lora import overlay, trained
from tw_jax.sharding import Rules, shardings


@configurable
class Optim:
    """AdamW or Muon with decoupled weight decay, a warm-up and a schedule.

    The defaults are those of ThreadWeaver's SFT, whose peak learning rate was 1e-5 for an 8B model.

    Attributes:
      algorithm: "adamw", or "muon", which orthogonalises the momentum of each layer's matrices and
        updates all other parameters (embeddings, unembedding, norms, biases) by AdamW. Muon is for
        training from scratch; models that AdamW pretrained are usually finetuned by AdamW.
      peak_lr: Learning rate at the end of the warm-up.
      schedule: Learning rate after the warm-up: "cosine" or "linear" decay to end_lr, or
        "constant".
      decay_steps: Length of the schedule in steps, warm-up included, as in optax. After it the rate
        stays at end_lr. None takes the steps of the run.
      end_lr: Learning rate that "cosine" and "linear" reach at the end of the schedule.
      warmup_ratio: Share of the schedule in which the rate rises linearly from 0; rounded up.
      warmup_steps: The same as a number of steps. If it is set, warmup_ratio is ignored.
      beta1: Decay rate of the first moment. It is Muon's momentum, for which 0.95 is usual.
      beta2: Decay rate of the second moment.
      epsilon: Added to the root of the second moment, after bias correction.
      weight_decay: Multiplied by the learning rate. It applies to all parameters, embeddings
        included, except norms and biases.
      clip_norm: Gradients with a larger global norm are scaled down to it. None disables clipping.
    """

    algorithm: Literal["adamw", "muon"] = "adamw"
    peak_lr: float
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    decay_steps: int | None = None
    end_lr: float = 0.0
    warmup_ratio: float = 0.05
    warmup_steps: int | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0

    def check(self) -> None:
        """Raises ValueError for values with which no step can run."""
        require(self, "peak_lr", "epsilon", "clip_norm", above=0)
        require(self, "end_lr", least=0)
        if self.end_lr > self.peak_lr:
            raise ValueError(
                f"Optim.end_lr = {self.end_lr} must not be above Optim.peak_lr = {self.peak_lr}."
            )
        require(self, "warmup_ratio", least=0, most=1)
        require(self, "warmup_steps", "weight_decay", least=0)
        require(self, "decay_steps", least=1)
        require(self, "beta1", "beta2", least=0, below=1)


class TrainState(struct.PyTreeNode):
    """Everything that a step reads and writes, and that a checkpoint stores."""

    step: jax.Array  # [] int32, steps taken, those with a skipped update included
    params: Params
    opt_state: Any  # Counts and moments. Moments are float32 and exist only for trained parameters.
    key: jax.Array  # [] typed key, never replaced; derive keys with fold_in(key, step)


Numbers = dict[str, jax.Array]
"""Float32 scalars by name."""

Step = Callable[[TrainState, Any], tuple[TrainState, Numbers]]
"""(state, batch) -> (next state, metrics); a pure function for every algorithm."""


def create(params: Params, optim: Optim, *, key: jax.Array) -> TrainState:
    """A state at step 0 with given parameters.

    Moments are float32 for any dtype of `params`. Frozen parameters have none, see `lora.trained`.
    Parameters are updated in their own dtype. A bfloat16 parameter loses every update below 2^-9 of
    its size, so keep parameters in float32 and compute in bfloat16 unless memory does not allow it.

    Args:
      params: Fresh parameters, or those of a pretrained model.
      optim: The optimiser, which determines the moments.
      key: [] typed key, stored unchanged.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=_direction(optim).init(_float32(trained(params))),
        key=key,
    )


def abstract_state(
    network: Network, optim: Optim, *, mesh: jax.sharding.Mesh, rules: Rules
) -> TrainState:
    """Shapes, dtypes and shardings of a state, without arrays.

    Moments have the sharding of their parameters. Everything else is replicated on all devices.

    Args:
      network: Its `init` and `axes` determine shapes and logical axes.
      optim: The optimiser.
      mesh: The mesh.
      rules: The mesh axes of each logical axis.

    Returns:
      A state of `jax.ShapeDtypeStruct`s with shardings, to compile a step or to restore a
      checkpoint.
    """
    state = jax.eval_shape(lambda key: create(network.init(key), optim, key=key), jax.random.key(0))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = shardings(network.axes(), state.params, mesh, rules)
    moments = optax.tree_utils.tree_map_params(
        _direction(optim),
        lambda leaf, where: leaf if _is_masked(leaf) else where,
        state.opt_state,
        trained(params),
        transform_non_params=lambda _: everywhere,
        is_leaf=_is_masked,
    )
    where = TrainState(step=everywhere, params=params, opt_state=moments, key=everywhere)  # pyright: ignore[reportArgumentType]  # shardings stand in for arrays
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        where,
    )


def sizes(params: Params) -> tuple[int, int]:
    """Number of all parameters, and of those that training changes."""
    every, moving = (sum(x.size for x in jax.tree.leaves(p)) for p in (params, trained(params)))
    return every, moving


def initial_state(
    network: Network,
    optim: Optim,
    *,
    key: jax.Array,
    params: Params | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = Rules(),  # noqa: B008  (immutable)
) -> TrainState:
    """A state at step 0 for a train step. On a mesh it is created with its shardings at once.

    Args:
      network: Initialises the parameters that are not given.
      optim: The optimiser, the same as that of the step.
      key: [] typed key such as `jax.random.key(0)`, consumed: it is split into one for the
        parameters and one for the run.
      params: Pretrained parameters, for example those of `load_model`. They may lack the adapters
        of the network, which are then fresh. They are donated.
      mesh: Devices of the state, from `make_mesh`; None takes the default device.
      rules: The mesh axes of each logical axis.
    """
    for_params, for_run = jax.random.split(key)
    where = None
    if mesh is not None:
        where = _places(abstract_state(network, optim, mesh=mesh, rules=rules))
    if params is None:
        fresh = jax.jit(
            lambda init, run: create(network.init(init), optim, key=run), out_shardings=where
        )
        return fresh(for_params, for_run)
    around = jax.jit(
        lambda given, init, run: create(overlay(network.init(init), given), optim, key=run),
        out_shardings=where,
        donate_argnums=0,
    )
    return around(params, for_params, for_run)


def jit_step(step: Step, abstract: TrainState, *, mesh: jax.sharding.Mesh, rules: Rules) -> Step:
    """Compiles a step for a mesh. The state is donated, and batches are split by rows.

    Call or lower the result inside `sharding.use(mesh, rules)`.

    Args:
      step: A pure step.
      abstract: `abstract_state` of the same mesh and rules.
      mesh: The mesh.
      rules: `Rules.rows` splits the leading dimension of the batch.

    Returns:
      The result of `jax.jit`: (state, batch) -> (state, metrics on every device).

    Raises:
      ValueError: If it is traced outside of `sharding.use(mesh, rules)`.
    """

    def traced(state: TrainState, batch: Any) -> tuple[TrainState, Numbers]:
        # Outside of `use`, `constrain` would silently do nothing.
        if jax.sharding.get_abstract_mesh() != mesh.abstract_mesh:
            raise ValueError(
                "A step was traced outside of its mesh. Call it inside `with sharding.use(mesh, "
                "rules):`, with the mesh that was passed to jit_step."
            )
        return step(state, batch)

    where = _places(abstract)
    return jax.jit(
        traced,
        in_shardings=(where, NamedSharding(mesh, PartitionSpec(rules.rows))),
        out_shardings=(where, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def learning_rate(step: jax.Array | int, optim: Optim, *, steps: int) -> jax.Array:
    """The learning rate of the update from `step` to `step` + 1.

    With w warm-up steps it is peak * step / w for step < w, so the first update of a warm-up has
    rate 0, as in Hugging Face's schedulers. After the warm-up, with n the length of the schedule
    and x = (step - w) / (n - w) clipped to [0, 1], it is
    constant: peak; linear: end + (peak - end) (1 - x);
    cosine: end + (peak - end) (1 + cos(pi x)) / 2.

    Args:
      step: [] int32, steps taken before this one.
      optim: The optimiser's config.
      steps: Number of steps of the whole run; the length of the schedule if `Optim.decay_steps` is
        None.

    Returns:
      [] float32.
    """
    length, warmup = _lengths(optim, steps)
    now = jnp.asarray(step, jnp.float32)
    x = jnp.clip((now - warmup) / max(1, length - warmup), 0, 1)
    share = {"constant": 1.0, "linear": 1 - x, "cosine": (1 + jnp.cos(jnp.pi * x)) / 2}
    after = optim.end_lr + (optim.peak_lr - optim.end_lr) * share[optim.schedule]
    return jnp.where(now < warmup, optim.peak_lr * now / max(1, warmup), after)


def schedule(optim: Optim, *, steps: int) -> str:
    """The schedule in words; two configs with equal lengths have the same text.

    Args:
      optim: The optimiser's config.
      steps: Number of steps of the whole run.
    """
    length, warmup = _lengths(optim, steps)
    after = "" if optim.schedule == "constant" else f" until step {length}"
    return f"{optim.schedule}{after} after {warmup} warm-up steps"


def _lengths(optim: Optim, steps: int) -> tuple[int, int]:
    """Number of steps of the schedule and of its warm-up."""
    length = steps if optim.decay_steps is None else optim.decay_steps
    warmup = optim.warmup_steps
    return length, math.ceil(length * optim.warmup_ratio) if warmup is None else warmup


def update(
    state: TrainState,
    gradients: Params,
    optim: Optim,
    *,
    steps: int,
    is_empty: jax.Array | bool = False,
) -> tuple[TrainState, Numbers]:
    """One step of the optimiser; a gradient whose norm is not finite changes only `step`.

    g' = g * min(1, clip / |g|);  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2
    p -= lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * p), where t counts the
    updates that were not skipped. For a matrix with R rows and C columns, Muon replaces the
    quotient by 0.2 sqrt(max(R, C)) O. O has the singular vectors of b1 m + (1 - b1) g' (both
    bias-corrected) and singular values near 1, from five Newton-Schulz steps. Its size is about
    that of AdamW's quotient, so one learning rate serves both. Sources: AdamW (arXiv:1711.05101),
    with the settings of Hugging Face's Trainer; Muon (Jordan 2024) as in arXiv:2502.16982.

    Args:
      state: State before the step.
      gradients: Gradients of the reported loss, float32, shaped like `trained(state.params)`.
      optim: The same config as in `create`.
      steps: Number of steps of the whole run, for the schedule.
      is_empty: [] bool, whether the batch trains nothing. If so, momentum and weight decay change
        nothing either.

    Returns:
      (next state, metrics). The metrics are scalars: grad_norm before clipping, param_norm before
      the update (both over trained parameters), lr, and skipped, which is 0 or 1.
    """
    before = trained(state.params)
    chex.assert_trees_all_equal_shapes(before, gradients)
    norm = optax.tree_utils.tree_norm(gradients)
    applies = jnp.isfinite(norm) & ~jnp.asarray(is_empty)
    if optim.clip_norm is not None:
        scale = jnp.minimum(1.0, optim.clip_norm / jnp.where(norm > 0, norm, 1.0))
        gradients = jax.tree.map(lambda g: g * scale, gradients)
    lr = learning_rate(state.step, optim, steps=steps)
    params = _float32(before)
    direction, opt_state = _direction(optim).update(gradients, state.opt_state, params)
    moved = jax.tree.map(
        lambda new, p, d: (p - lr * d).astype(new.dtype), before, params, direction
    )
    kept = jax.tree.map(
        lambda new, old: jnp.where(applies, new, old),
        (moved, opt_state),
        (before, state.opt_state),
    )
    metrics = {
        "grad_norm": norm,
        "param_norm": optax.tree_utils.tree_norm(params),
        "lr": lr,
        "skipped": 1.0 - applies.astype(jnp.float32),
    }
    params = overlay(state.params, kept[0])
    return state.replace(step=state.step + 1, params=params, opt_state=kept[1]), metrics


def decays(params: Params) -> Params:
    """True where weight decay applies: parameters with neither "norm" nor "bias" in their path.

    Hugging Face's Trainer excludes the same parameters by name. Embeddings are decayed.
    """

    def has_decay(path: tuple[Any, ...], _: jax.Array) -> bool:
        name = jax.tree_util.keystr(path).lower()
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(has_decay, params)


def matrices(params: Any) -> Any:
    """The axes of each parameter that Muon treats as rows and columns of a matrix.

    Leaves of "blocks" are stacked by layer, [L, rows, columns].

    Returns:
      A tree of `optax.contrib.MuonDimensionNumbers`, with None for a leaf that AdamW updates.
    """

    def dimensions(path: tuple[Any, ...], _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        is_matrix = "blocks" in name and "norm" not in name and "bias" not in name
        return optax.contrib.MuonDimensionNumbers(1, 2) if is_matrix else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _direction(optim: Optim) -> optax.GradientTransformation:
    """The direction of the step. `update` applies the learning rate and clipping, and logs them."""
    adam = optax.scale_by_adam(optim.beta1, optim.beta2, optim.epsilon)
    if optim.algorithm == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(beta=optim.beta1, weight_dimension_numbers=matrices),
            optax.stateless(_like_adam),
        )
        adam = optax.partition({"muon": muon, "adamw": adam}, _labels)
    return optax.chain(adam, optax.add_decayed_weights(optim.weight_decay, mask=decays))


def _like_adam(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
    """Scales orthogonal matrices to the root mean square that AdamW's directions usually have."""
    return jax.tree.map(lambda x: 0.2 * math.sqrt(max(x.shape[1:])) * x, updates)


def _labels(params: Params) -> Params:
    """The algorithm that updates each leaf."""
    is_leaf = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    return jax.tree.map(
        lambda dims: "adamw" if dims is None else "muon", matrices(params), is_leaf=is_leaf
    )


def _is_masked(leaf: Any) -> bool:
    """Whether a leaf of the optimiser state belongs to a parameter of the other algorithm."""
    return isinstance(leaf, optax.MaskedNode)


def _places(abstract: TrainState) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
