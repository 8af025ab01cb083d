"""What is kept comes back: exactly, on any mesh, or with a sentence; a full disk harms nothing."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from tw_jax import checkpoint
from tw_jax.checkpoint import Checkpoints, identity, restore_params
from tw_jax.damage import DamagedError
from tw_jax.metrics import read


class State(struct.PyTreeNode):
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def make_state(seed: int = 0, width: int = 16, dtype: Any = jnp.float32) -> State:
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (8, width), dtype),
        "layers": {"w": jax.random.normal(key, (2, width, 8), jnp.bfloat16)},
    }
    optim = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(step=jnp.int32(seed), params=params, opt_state=optim.init(params), key=key)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def abstract(tree: Any, sharding: Any = None) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def partial_saves(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.isdigit()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1 and 3, to read only."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep=2) as out:
        out.save(1, make_state(1), {"position": [1, 2]})
        out.save(3, make_state(3), {"position": [3, 4], "config": "Sft.steps = 5\n"})
    return folder


# Round trip.


def test_a_state_and_its_extra_come_back_exactly(saved):
    with Checkpoints(saved, keep=2) as kept:
        assert kept.latest() == 3
        state, extra = kept.restore(None, abstract(make_state()))
        assert_same(state, make_state(3))
        assert isinstance(state, State)
        assert extra == {"position": [3, 4], "config": "Sft.steps = 5\n"}
        state, extra = kept.restore(1, abstract(make_state()))
        assert_same(state, make_state(1))
        assert extra == {"position": [1, 2]}


def test_a_state_may_stand_for_its_own_abstract(saved):
    with Checkpoints(saved, keep=2) as kept:
        assert_same(kept.restore(1, make_state())[0], make_state(1))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_survive_with_their_generator(impl, tmp_path):
    state = {"one": jax.random.key(5, impl=impl), "many": jax.random.split(jax.random.key(6), 4)}
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(0, state, {})
        restored, _ = kept.restore(0, abstract(state))
    assert_same(restored, state)
    np.testing.assert_array_equal(
        jax.random.normal(restored["one"], (3,)), jax.random.normal(state["one"], (3,))
    )


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
    devices = np.array(jax.devices()[:8])
    line = jax.sharding.Mesh(devices, ("fsdp",))
    square = jax.sharding.Mesh(devices.reshape(2, 4), ("data", "tensor"))
    w = jax.random.normal(jax.random.key(0), (16, 8))
    keys = jax.random.split(jax.random.key(1), 8)
    state = jax.device_put({"w": w, "keys": keys}, NamedSharding(line, P("fsdp")))
    one = SingleDeviceSharding(jax.devices()[5])
    targets = [
        {"w": NamedSharding(square, P("tensor", "data")), "keys": NamedSharding(square, P("data"))},
        {"w": NamedSharding(square, P()), "keys": NamedSharding(square, P())},
        {"w": one, "keys": one},
    ]
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(0, state, {})
        for target in targets:
            wanted = {
                k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=target[k])
                for k, v in state.items()
            }
            restored, _ = kept.restore(None, wanted)
            for name, array in restored.items():
                assert array.sharding.is_equivalent_to(target[name], array.ndim)
            assert_same(restored, {"w": w, "keys": keys})


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    before = jax.random.normal(jax.random.key(0), (512, 512))
    copy = np.array(before)
    overwrite = jax.jit(lambda x: x * 0, donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(0, {"w": before}, {})
        overwrite(before).block_until_ready()
        restored, _ = kept.restore(0, {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)})
    np.testing.assert_array_equal(restored["w"], copy)


def test_the_newest_are_kept_and_steps_only_grow(tmp_path):
    with Checkpoints(tmp_path, keep=2) as kept:
        assert kept.latest() is None
        for step in (1, 2, 10):
            kept.save(step, {"x": jnp.float32(step)}, {})
        kept.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2"]
        with pytest.raises(ValueError, match=r"step = 9: .* already has step 10\. Delete"):
            kept.save(9, {"x": jnp.float32(9)}, {})
    with pytest.raises(ValueError, match="keep = 0 must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_saving_and_restoring_warn_of_nothing(tmp_path, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        with Checkpoints(tmp_path, keep=1) as kept:
            kept.save(0, make_state(), {"a": 1})
            kept.wait()
        with Checkpoints(tmp_path, keep=1) as kept:
            kept.restore(None, abstract(make_state()))
        restore_params(tmp_path)
    assert [record.getMessage() for record in caplog.records] == []


# Parameters alone.


def test_parameters_are_read_without_knowing_the_optimiser(saved):
    params = restore_params(saved)
    assert_same(params, make_state(3).params)
    assert {len(x.devices()) for x in jax.tree.leaves(params)} == {1}
    assert_same(restore_params(saved, step=1), make_state(1).params)


def test_parameters_go_where_their_abstract_says(saved):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("d",))
    wanted = abstract(make_state().params, NamedSharding(mesh, P(None, "d")))
    params = restore_params(saved, abstract=wanted)
    assert_same(params, make_state(3).params)
    assert {x.sharding for x in jax.tree.leaves(params)} == {NamedSharding(mesh, P(None, "d"))}


def test_a_checkpoint_of_the_core_alone_is_read_as_that_and_a_whole_one_as_a_whole(saved):
    core = abstract(make_state().params)
    whole = {**core, "more": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert_same(restore_params(saved, abstract=whole, core=core), make_state(3).params)
    part = {"embed": core["embed"]}
    assert_same(restore_params(saved, abstract=core, core=part), make_state(3).params)
    with pytest.raises(ValueError, match=r"params.more is missing there and \[3\] float32 here"):
        restore_params(saved, abstract=whole, core=part)
    wrong = {**core, "embed": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"params\.embed is"):
        restore_params(saved, abstract={**wrong, "more": whole["more"]}, core=wrong)


def test_reading_parameters_leaves_a_save_in_progress_alone(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/7.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert_same(restore_params(tmp_path / "run"), make_state(3).params)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_state_without_params_is_refused(tmp_path):
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(0, {"w": jnp.ones(3)}, {})
    with pytest.raises(ValueError, match=r"/0 has no params\. Its state has w\."):
        restore_params(tmp_path)


# What does not fit.


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (
            make_state(width=24),
            r"/3 does not fit: params.embed is \[8, 16\] float32 there and \[8, 24\] float32 here\."
            " Build the state from the config",
        ),
        (
            make_state(dtype=jnp.bfloat16),
            r"params.embed is \[8, 16\] float32 there and \[8, 16\] bfloat16 here",
        ),
        (
            make_state().replace(opt_state={"mu": jnp.ones(2)}),
            r"opt_state.mu is missing there and \[2\] float32 here",
        ),
        (
            make_state().replace(opt_state=()),
            r"opt_state.1.0.count is \[\] int32 there and missing here",
        ),
        (
            make_state().replace(key=jax.random.key(0, impl="rbg")),
            r"key is \[2\] uint32 there and \[4\] uint32 here",
        ),
    ],
)
def test_the_first_leaf_that_differs_is_named(wanted, sentence, saved):
    with Checkpoints(saved, keep=2) as kept, pytest.raises(ValueError, match=sentence):
        kept.restore(None, abstract(wanted))


def test_parameters_that_differ_are_named(saved):
    with pytest.raises(ValueError, match=r"does not fit: params.embed is \[8, 16\]"):
        restore_params(saved, abstract=abstract(make_state(width=24).params))


def test_a_missing_checkpoint_is_refused_with_the_steps_that_exist(saved, tmp_path):
    wanted = abstract(make_state())
    with Checkpoints(saved, keep=2) as kept, pytest.raises(FileNotFoundError) as caught:
        kept.restore(2, wanted)
    assert str(caught.value) == f"{saved} has no checkpoint of step 2. It has 1, 3."
    with Checkpoints(tmp_path, keep=2) as kept, pytest.raises(FileNotFoundError) as caught:
        kept.restore(None, wanted)
    assert str(caught.value) == f"{tmp_path} has no checkpoint."
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder of checkpoints"):
        restore_params(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_extra_that_json_cannot_hold_is_refused(tmp_path):
    with Checkpoints(tmp_path, keep=1) as kept, pytest.raises(TypeError, match="not JSON"):
        kept.save(0, {"x": jnp.ones(1)}, {"position": np.int64(3)})


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=2) as kept:
        with monkeypatch.context() as two:
            two.setattr(checkpoint.hosts, "gather", lambda value: [value, value])
            kept.save(3, make_state(), {})
        with pytest.raises(ValueError, match="written by 2 processes, this job has 1, and each"):
            kept.restore(None, abstract(make_state()))


# Full disks and crashes.


def test_a_save_without_room_is_refused_before_it_writes(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(1, {"x": jnp.arange(100.0)}, {})
        kept.wait()
        usage = types.SimpleNamespace(free=399)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match="needs about 400 bytes, and 399 are free") as caught:
            kept.save(2, {"x": jnp.arange(100.0)}, {})
        assert caught.value.errno == errno.ENOSPC
        assert "The same command then resumes from step 1" in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        usage.free = 400
        kept.save(2, {"x": jnp.arange(100.0)}, {})
        assert kept.latest() == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's coroutines
def test_a_disk_that_fills_while_saving_leaves_earlier_checkpoints_whole(tmp_path):
    small, large = ({"x": jax.random.normal(jax.random.key(n), (n,))} for n in (10, 1_000_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(1, small, {})
        kept.wait()
        try:  # no file may grow beyond this, as no file can on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
            kept.save(2, large, {})
            with pytest.raises(OSError, match="Checkpoint 2 could not be written to") as caught:
                kept.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert "needs about 4,000,000 bytes" in str(caught.value)
        assert "resumes from step 1." in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        assert_same(kept.restore(None, abstract(small))[0], small)
        kept.save(2, large, {})
        assert_same(kept.restore(2, abstract(large))[0], large)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_remains_of_a_save_are_no_checkpoint_and_are_deleted(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    shutil.copytree(saved / "3", tmp_path / "run/7.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path / "run", keep=2) as kept:
        assert kept.latest() == 3
    assert partial_saves(tmp_path / "run") == []


TWO_PROCESSES = """
import sys, jax, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
port, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from tw_jax import checkpoint
from tw_jax.checkpoint import Checkpoints
from tw_jax.damage import DamagedError
from tw_jax.metrics import Metrics
mesh = Mesh(np.array(jax.devices()), ("d",))
split, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
state = {"x": jax.jit(lambda: jnp.arange(8.0), out_shardings=split)(),
         "key": jax.jit(lambda: jax.random.key(3), out_shardings=whole)()}
wanted = {name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=whole) for name, v in state.items()}
with Metrics(folder) as out:
    out.write(0, {"loss": jax.jit(jnp.sum, out_shardings=whole)(state["x"])})
with Checkpoints(folder + "/checkpoints", keep=2) as kept:
    kept.save(1, state, {"position": "p" * (rank + 1)})
    kept.save(2, state, {"position": "later"})
    read = checkpoint._read_extra
    if rank == 1:  # one host sees a damage that the other does not
        def damaged(path):
            if path.name == "2":
                raise DamagedError("Checkpoint 2 is damaged: here.")
            return read(path)
        checkpoint._read_extra = damaged
    restored, extra = kept.restore(None, wanted)
    assert kept.latest() == 1
assert extra == {"position": "p" * (rank + 1)}, extra
np.testing.assert_array_equal(restored["x"], np.arange(8.0))
np.testing.assert_array_equal(jax.random.key_data(restored["key"]), [0, 3])
"""


@pytest.mark.slow
def test_two_processes_keep_one_state_each_its_own_extra_and_judge_damage_alike(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", TWO_PROCESSES, port]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    jobs = [
        subprocess.Popen([*command, rank, str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    errors = [job.communicate(timeout=120)[1].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(errors)
    (line,) = read(tmp_path / "metrics.jsonl")
    assert line["loss"] == 28.0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2.damaged"]
    assert "Checkpoint 2 is damaged: here. It is kept as 2.damaged" in errors[0]
    assert "is damaged" not in errors[1]


# Identity.


def test_an_identity_depends_on_the_parameters_and_not_on_place_mesh_or_optimiser(saved, tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("d",))
    split = NamedSharding(mesh, P(None, "d"))
    same = make_state(3).replace(step=jnp.int32(9), key=jax.random.key(9))
    one_off = same.params["embed"].at[0, 0].add(1e-7)
    with Checkpoints(tmp_path, keep=3) as kept:
        kept.save(5, same.replace(params=jax.device_put(same.params, split)), {"other": 1})
        kept.save(6, same.replace(params={**same.params, "embed": one_off}), {})
        kept.save(7, {"w": jnp.ones(3)}, {})
    names = {step: identity(tmp_path, step=step) for step in (5, 6)}
    assert names[5] == identity(saved) == identity(saved, step=3)
    assert len({names[5], names[6], identity(saved, step=1)}) == 3
    assert len(names[5]) == 16
    with pytest.raises(ValueError, match=r"/7 has no params\. Its state has w\."):
        identity(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder of checkpoints"):
        identity(tmp_path / "nowhere")


# Damage.


def damaged(folder: Path, target: Path, file: str, change: Callable[[bytes], bytes | None]) -> Path:
    """A copy of a run, with one file of its newest checkpoint changed, or deleted by None."""
    shutil.copytree(folder, target)
    (path,) = sorted(target.glob(f"3/{file}"))
    content = change(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    return target


def flip(share: float) -> Callable[[bytes], bytes]:
    def flipped(content: bytes) -> bytes:
        at = int(share * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]

    return flipped


CHANGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flip_start": flip(0),
    "flip_middle": flip(0.6),
    "flip_end": flip(1),
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "other": lambda content: b"[]",
    "gone": lambda content: None,
}


def test_damage_is_named_and_an_older_checkpoint_is_used_or_nothing_was_lost(tmp_path):
    def tiny(step: int) -> dict[str, Any]:
        return {"params": {"w": jnp.arange(6.0) + step}, "key": jax.random.key(step)}

    saved = tmp_path / "saved"
    with Checkpoints(saved, keep=2) as out:
        for step in (1, 3):
            out.save(step, tiny(step), {"position": step})
    files = [path for path in (saved / "3").rglob("*") if path.is_file()]
    # Nobody reads the marks of completion again, nor the files of one process after their merge.
    unread = ("commit_success.txt", "ocdbt.process_0/")
    read = sorted(str(path.relative_to(saved / "3")) for path in files)
    read = [file for file in read if not any(name in file for name in unread)]
    outcomes = []
    for number, (file, name) in enumerate(itertools.product(read, CHANGES)):
        run = damaged(saved, tmp_path / str(number), file, CHANGES[name])
        with warnings.catch_warnings(record=True) as caught, Checkpoints(run, keep=2) as kept:
            warnings.simplefilter("always")
            state, extra = kept.restore(None, abstract(tiny(0)))
        messages = [str(w.message) for w in caught if "is damaged" in str(w.message)]
        is_aside = (run / "3.damaged").exists()
        outcomes.append(is_aside)
        assert len(messages) == is_aside, (file, name, messages)
        for sentence in messages:
            assert str(run / "3") in sentence
            assert "It is kept as 3.damaged. The run continues" in sentence
        step = 1 if is_aside else 3
        assert_same(state, tiny(step))
        assert extra == {"position": step}
    assert len(outcomes) >= 40
    assert sum(outcomes) >= 30


@pytest.fixture
def flipped(saved, tmp_path):
    return damaged(saved, tmp_path / "run", "extra/metadata", flip(0.5))


def test_a_changed_array_is_not_restored_even_where_the_store_finds_it_well(tmp_path):
    state = make_state()
    other = state.replace(params={**state.params, "embed": state.params["embed"].at[3, 2].add(1)})
    for name, content in (("a", state), ("b", other)):
        with Checkpoints(tmp_path / name, keep=1) as kept:
            kept.save(0, content, {})
    shutil.rmtree(tmp_path / "a/0/state")
    shutil.copytree(tmp_path / "b/0/state", tmp_path / "a/0/state")
    sentence = r"a/0 is damaged: the array params\.embed is not what was written\. Put back a copy"
    with pytest.raises(DamagedError, match=sentence):
        restore_params(tmp_path / "a")
    with Checkpoints(tmp_path / "a", keep=1) as kept:
        with pytest.raises(DamagedError, match=sentence):
            kept.restore(0, abstract(state))
        with pytest.raises(DamagedError, match=r"has no sound checkpoint\. Put back"):
            kept.restore(None, abstract(state))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["0"]


def test_a_position_that_was_changed_is_not_restored(saved, tmp_path):
    run = damaged(
        saved, tmp_path / "run", "extra/metadata", lambda text: text.replace(b"[3, 4]", b"[3, 5]")
    )
    with (
        Checkpoints(run, keep=2) as kept,
        pytest.warns(UserWarning, match="3 is damaged: its JSON record is not what was written"),
    ):
        assert kept.restore(None, abstract(make_state()))[1] == {"position": [1, 2]}


def test_a_reader_of_parameters_never_takes_an_older_checkpoint_by_itself(flipped):
    before = sorted(flipped.rglob("*"))
    sentence = r"run/3 is damaged: .* move the folder elsewhere to use step 1, the newest before"
    for reader in (restore_params, identity):
        with pytest.raises(DamagedError, match=sentence):
            reader(flipped)
    assert sorted(flipped.rglob("*")) == before
    assert_same(restore_params(flipped, step=1), make_state(1).params)


def test_a_checkpoint_that_goes_while_it_is_read_is_not_called_damaged(flipped, monkeypatch):
    read = checkpoint._read_extra

    def late(path: Path) -> Any:
        shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(checkpoint, "_read_extra", late)
    with pytest.raises(FileNotFoundError, match="run/3 was deleted while it was read"):
        restore_params(flipped)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    shutil.copytree(run / "1", run / "12")
    for reader in (restore_params, identity):
        with pytest.raises(DamagedError, match=r"run/12 is damaged: it was saved as step 1\."):
            reader(run)
    with (
        Checkpoints(run, keep=2) as kept,
        pytest.warns(UserWarning, match="saved as step 1.*continues from step 3"),
    ):
        assert_same(kept.restore(None, abstract(make_state()))[0], make_state(3))


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(flipped):
    with Checkpoints(flipped, keep=2) as kept:
        with pytest.warns(UserWarning, match="continues from step 1"):
            kept.restore(None, abstract(make_state()))
        assert kept.latest() == 1
        kept.save(3, make_state(3), {"position": 7})
        state, extra = kept.restore(None, abstract(make_state()))
    assert_same(state, make_state(3))
    assert extra == {"position": 7}
    assert sorted(path.name for path in flipped.iterdir()) == ["1", "3", "3.damaged"]


def test_strays_beside_checkpoints_stop_no_run(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    for folder in ("12", "abc", "3_old", "12.damaged"):
        (run / folder).mkdir()
    for file in ("7", "notes.txt"):
        (run / file).write_text("x")
    with warnings.catch_warnings(record=True) as caught, Checkpoints(run, keep=2) as kept:
        warnings.simplefilter("always")
        state, _ = kept.restore(None, abstract(make_state()))
    assert_same(state, make_state(3))
    messages = [str(w.message) for w in caught]
    assert any("7 has the name of a checkpoint and is not a folder" in text for text in messages)
    assert any(f"{run}/12 is damaged" in text and "12.damaged.2" in text for text in messages)
    names = {path.name for path in run.iterdir()}
    kept_names = {"1", "3", "7.damaged", "12.damaged", "12.damaged.2", "abc", "3_old", "notes.txt"}
    assert names == kept_names


def test_a_folder_of_damaged_checkpoints_alone_is_no_new_run(tmp_path):
    (tmp_path / "4").write_text("x")
    with pytest.raises(DamagedError, match="4 has the name of a checkpoint and is not a folder"):
        Checkpoints(tmp_path, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_a_disk_that_does_not_answer_is_no_damage(saved, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "no answer")

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", fails)
    with Checkpoints(saved, keep=2) as kept, pytest.raises(OSError, match="no answer"):
        kept.restore(None, abstract(make_state()))
    assert sorted(path.name for path in saved.iterdir()) == ["1", "3"]
