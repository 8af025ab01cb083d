"""Runs go on exactly, stop with a reason, and wait for the device no more than they must."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import path_network
from train import stub

from tw_jax import sharding
from tw_jax.checkpoint import Checkpoints
from tw_jax.metrics import Metrics, read
from tw_jax.train.loop import DivergedError, TrainingLoop, resume
from tw_jax.train.sft import make_sft_step
from tw_jax.train.state import Optim, TrainState, abstract_state, initial_state, jit_step
from tw_jax.trie.batch import stack_rows


class Draws:
    """Batches made from a seed; the position is how many were drawn."""

    def __init__(self, make, length=None):
        self.make, self.length, self.drawn = make, length, 0

    def __next__(self):
        if self.drawn == self.length:
            raise StopIteration
        self.drawn += 1
        return self.make(self.drawn - 1)


def fit(state, step, batches, *, steps, place, hooks=(), **rest):
    """A program in small: a hook returns numbers for the line of its step, or none."""
    with TrainingLoop(state, step, steps=steps, **rest) as loop:
        for index in loop:
            loop.step(loop.draw(batches, place))
            found = [hook(index + 1, loop.state) for hook in hooks]
            if any(found):
                loop.log({name: value for numbers in found for name, value in numbers.items()})
            loop.save_when_due({"drawn": batches.drawn})
    return loop.state


def resumed(checkpoints, abstract, batches):
    """The state of the newest checkpoint, or None; moves the batches to where they were."""
    state, position = resume(checkpoints, abstract)
    if state is not None:
        batches.drawn = position["drawn"]
    return state


@jax.jit
def pull(state, batch):
    """A step to check by eye: moves a number towards each batch, with noise from the key."""
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step)) / 10
    x = state.params["x"]
    moved = state.replace(step=state.step + 1, params={"x": x + (batch.mean() - x) / 4 + noise})
    return moved, {"loss": (batch.mean() - x) ** 2, "tokens": jnp.float32(batch.size)}


def at_zero():
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params={"x": jnp.zeros(())},
        opt_state=(),
        key=jax.random.key(5),
    )


def numbers(index, size=4):
    return np.random.default_rng(index).normal(size=size).astype(np.float32)


@pytest.fixture
def run(tmp_path):
    """Runs in a folder, from its checkpoint where there is one."""

    def go(steps, *, step=pull, batches=None, save_every=3, folder=tmp_path, **kwargs):
        batches = batches or Draws(numbers)
        with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
            state = resumed(checkpoints, at_zero(), batches) or at_zero()
            with Metrics(folder, step=int(state.step)) as metrics:
                return fit(
                    state,
                    step,
                    batches,
                    steps=steps,
                    save_every=save_every,
                    metrics=metrics,
                    checkpoints=checkpoints,
                    **{"place": jax.device_put} | kwargs,
                )

    return go


def lines(folder):
    timed = ("wall_seconds", "_seconds", "_per_second")
    return [
        {k: v for k, v in line.items() if not k.endswith(timed)}
        for line in read(folder / "metrics.jsonl")
    ]


def saved(folder):
    with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        return checkpoints.latest()


def signalling(at, number, times=1):
    """A hook that sends the process a signal once `at` steps are taken."""

    def hook(taken, state):
        if taken == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return {}

    return hook


# Lines.


def test_each_step_writes_one_line_of_its_own_numbers(run, tmp_path):
    state = run(5)
    assert int(state.step) == 5
    want = at_zero()
    for index, line in enumerate(lines(tmp_path)):
        want, values = pull(want, numbers(index))
        assert line == {"step": index, "loss": float(values["loss"]), "tokens": 4.0}
    assert float(state.params["x"]) == float(want.params["x"])
    assert index == 4


def test_lines_tell_speed_and_where_time_went(run, tmp_path):
    def make(index):
        time.sleep(0.05 if index == 2 else 0)
        return numbers(index)

    run(4, batches=Draws(make), save_every=4)
    written = read(tmp_path / "metrics.jsonl")
    for line in written:
        assert line["tokens_per_second"] == pytest.approx(4 * line["steps_per_second"])
    assert written[1]["data_seconds"] > 0.05  # batch 2 is drawn before the line of step 1 is due
    assert 1 / written[1]["steps_per_second"] > 0.05


def test_hooks_see_the_state_that_the_step_made_and_add_to_its_line(run, tmp_path):
    seen = []

    def hook(taken, state):
        seen.append((taken, int(state.step)))
        return {"x": float(state.params["x"])} if taken % 2 == 0 else {}

    state = run(4, hooks=[hook])
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert ["x" in line for line in lines(tmp_path)] == [False, True, False, True]
    assert lines(tmp_path)[-1]["x"] == float(state.params["x"])


def test_hooks_come_before_the_next_batch_is_drawn(run):
    order = []
    batches = Draws(lambda index: order.append(f"batch {index}") or numbers(index))
    run(2, batches=batches, hooks=[lambda taken, state: order.append(f"hook {taken}") or {}])
    assert order == ["batch 0", "hook 1", "batch 1", "hook 2"]


def test_a_step_is_read_after_the_next_one_was_called(run):
    events = []

    class Watched:
        def __init__(self, index):
            self.index = index

        def __array__(self, dtype=None, copy=None):
            events.append(f"read {self.index}")
            return np.zeros((), np.float32)

    def step(state, batch):
        index = len([event for event in events if event.startswith("call")])
        events.append(f"call {index}")
        return pull(state, batch)[0], {"loss": Watched(index)}

    run(3, step=step, save_every=100)
    assert list(dict.fromkeys(events)) == [
        "call 0",
        "call 1",
        "read 0",
        "call 2",
        "read 1",
        "read 2",
    ]


# Going on.


@pytest.mark.parametrize("save_every", [1, 3, 7])
def test_a_resumed_run_is_bit_equal_to_one_in_a_piece(run, tmp_path, save_every):
    whole = run(7, folder=tmp_path / "whole", save_every=save_every)
    with pytest.raises(RuntimeError, match="power cut"):
        run(
            7,
            folder=tmp_path / "parts",
            save_every=save_every,
            hooks=[power_cut_at(5)],
        )
    assert saved(tmp_path / "parts") == {1: 4, 3: 3, 7: None}[save_every]
    parts = run(7, folder=tmp_path / "parts", save_every=save_every)
    assert float(parts.params["x"]) == float(whole.params["x"])
    assert int(parts.step) == 7
    assert (jax.random.key_data(parts.key) == jax.random.key_data(whole.key)).all()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def power_cut_at(at):
    def hook(taken, state):
        if taken == at:
            raise RuntimeError("power cut")
        return {}

    return hook


def test_a_sharded_network_goes_on_exactly_on_its_mesh(tmp_path):
    """The real step with donated state, optimiser moments and packed tries."""
    network, optim = path_network(stub.VOCAB, stub.WIDTH), Optim(peak_lr=1e-2)
    rules = sharding.Rules()
    mesh = sharding.make_mesh(sharding.Mesh(data=2, fsdp=2, tensor=2))
    abstract = abstract_state(network, optim, mesh=mesh, rules=rules)
    pure = make_sft_step(network, optim, steps=4, chunk_tokens=64)
    compiled = jit_step(pure, abstract, mesh=mesh, rules=rules)

    def make(index):
        _, tries = stub.random_tries(seed=index, num_tries=4)
        return stack_rows([[trie] for trie in tries], row_tokens=64)

    def go(folder, hooks=()):
        batches = Draws(make)
        with Checkpoints(folder, keep=1) as checkpoints, sharding.use(mesh, rules):
            state = resumed(checkpoints, abstract, batches) or initial_state(
                network, optim, mesh=mesh, rules=rules, key=jax.random.key(0)
            )
            with Metrics(folder, step=int(state.step)) as metrics:
                return fit(
                    state,
                    compiled,
                    batches,
                    steps=4,
                    save_every=2,
                    metrics=metrics,
                    checkpoints=checkpoints,
                    place=partial(sharding.to_global, mesh=mesh, rules=rules),
                    hooks=hooks,
                )

    whole = go(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        go(tmp_path / "parts", hooks=[power_cut_at(3)])
    parts = go(tmp_path / "parts")
    for one, other in zip(
        jax.tree.leaves((parts.params, parts.opt_state)),
        jax.tree.leaves((whole.params, whole.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_run_that_is_done_does_nothing(run, tmp_path):
    run(4)
    batches = Draws(numbers)
    state = run(4, batches=batches)
    assert (int(state.step), batches.drawn) == (4, 4)
    assert len(lines(tmp_path)) == 4


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(run, tmp_path):
    run(4)
    assert int(run(6).step) == 6
    assert [line["step"] for line in lines(tmp_path)] == list(range(6))
    assert saved(tmp_path) == 6


# Stopping.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_between_two_steps(run, tmp_path, number):
    whole = run(6, folder=tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"after step 4 of 6, which is saved in .*check"):
        run(6, save_every=100, hooks=[signalling(4, number)])
    assert saved(tmp_path) == 4
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert float(run(6).params["x"]) == float(whole.params["x"])
    assert [line["step"] for line in lines(tmp_path)] == list(range(6))


def test_a_second_interrupt_stops_at_once(run, tmp_path):
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(6, save_every=100, hooks=[signalling(4, signal.SIGINT, times=2)])
    assert saved(tmp_path) is None


def test_a_run_in_another_thread_leaves_signals_alone(run):
    states = []
    thread = threading.Thread(target=lambda: states.append(run(2)))
    thread.start()
    thread.join()
    assert int(states[0].step) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_window(run, tmp_path, bad):
    batches = Draws(lambda index: np.full(4, bad, np.float32) if index == 5 else numbers(index))
    window = (
        rf"loss = {bad} at step 5 is not finite\. .* is .*/checkpoints/4\. Look at steps 4 to 5"
    )
    with pytest.raises(DivergedError, match=window):
        run(9, batches=batches, save_every=2)
    assert saved(tmp_path) == 4
    assert [line["step"] for line in lines(tmp_path)] == list(range(6))
    assert not np.isfinite(lines(tmp_path)[-1]["loss"])


def test_a_loss_that_is_not_finite_before_any_checkpoint_says_so(run, tmp_path):
    nothing = Draws(lambda index: np.full(4, np.nan, np.float32))
    with pytest.raises(DivergedError, match=r"at step 0 .*No checkpoint was saved\. Start again"):
        run(9, batches=nothing, save_every=1)
    assert saved(tmp_path) is None


def test_batches_that_end_early_are_named(run):
    with pytest.raises(ValueError, match="ended after 2 of 5 steps"):
        run(5, batches=Draws(numbers, length=2))


# Alarms.


def test_a_step_that_compiles_again_warns_with_the_shape(run):
    batches = Draws(lambda index: numbers(index, size=11 if index == 3 else 7))
    with pytest.warns(UserWarning, match=r"Step 3 was compiled again, for a batch of \[11\]"):
        run(5, batches=batches)


def test_steps_of_one_shape_warn_of_nothing(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(5)


def test_a_batch_that_was_not_placed_is_refused(run):
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(2, place=lambda batch: batch)


def test_a_run_goes_on_from_the_newest_sound_checkpoint_and_ends_the_same(run, tmp_path):
    whole = run(9, folder=tmp_path / "whole")
    run(6)
    record = tmp_path / "checkpoints/6/extra/metadata"
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"checkpoints/6 is damaged: .* continues from step 3\."):
        state = run(9)
    assert float(state.params["x"]) == float(whole.params["x"])
    assert lines(tmp_path) == lines(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["6", "6.damaged", "9"]


# Gradients that are not finite.


def overflowing(bad, empty=()):
    """A step whose gradients overflow at some steps, while its loss stays finite."""

    def step(state, batch):
        index = int(state.step)
        norm = jnp.float32(np.inf if index in bad else 1.0)
        numbers = {"loss": jnp.float32(2.0), "grad_norm": norm}
        skipped = {"skipped": jnp.float32(index in bad or index in empty)}
        return state.replace(step=jnp.int32(index + 1)), numbers | skipped

    return step


@pytest.fixture
def unguarded(monkeypatch):
    """Lets a step be a Python function, which moves numbers as it likes."""
    monkeypatch.setattr(jax, "transfer_guard", lambda _: contextlib.nullcontext())


@pytest.mark.usefixtures("unguarded")
def test_a_run_whose_gradients_are_never_finite_stops_and_says_so(run, tmp_path):
    with pytest.raises(DivergedError) as caught:
        run(20, step=overflowing(range(20)), save_every=20)
    sentence = str(caught.value)
    assert sentence.startswith("The gradients of 5 steps in a row were not finite")
    assert "grad_norm = inf at step 4" in sentence
    assert "lower Optim.peak_lr" in sentence
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert saved(tmp_path) is None


@pytest.mark.usefixtures("unguarded")
def test_a_short_run_without_one_finite_gradient_does_not_end_well(run):
    with pytest.raises(DivergedError, match=r"gradients of 2 steps in a row .*at step 1"):
        run(2, step=overflowing(range(2)))


@pytest.mark.usefixtures("unguarded")
def test_gradients_that_are_finite_now_and_then_let_a_run_go_on(run, tmp_path):
    run(12, step=overflowing({0, 1, 2, 3, 5, 6, 7, 8, 10, 11}))
    assert saved(tmp_path) == 12


@pytest.mark.usefixtures("unguarded")
def test_gradients_that_stop_being_finite_stop_the_run_where_they_began(run):
    with pytest.raises(DivergedError, match=r"5 steps in a row .*at step 11"):
        run(20, step=overflowing(range(7, 20)))


@pytest.mark.usefixtures("unguarded")
def test_batches_without_anything_to_train_do_not_hide_gradients_that_are_never_finite(run):
    with pytest.raises(DivergedError, match=r"5 steps in a row .*at step 8"):
        run(20, step=overflowing({0, 2, 4, 6, 8}, empty={1, 3, 5, 7}))
