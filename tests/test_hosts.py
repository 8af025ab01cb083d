"""Jobs of many processes, with a fake launcher; `programs/test_hosts.py` runs real ones."""

import json
import types

import jax
import numpy as np
import pytest

from tw_jax import hosts
from tw_jax.cli import main
from tw_jax.sharding import make_mesh

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def job(monkeypatch):
    """Makes this process one of several, which hand in what the test says."""

    def of(*handed_in):
        rows = [np.frombuffer(json.dumps(value).encode(), np.uint8) for value in handed_in]

        def allgather(value):
            if value.ndim == 0:
                return np.array([row.size for row in rows], np.int32)
            assert value.shape == (max(row.size for row in rows),)
            return np.stack([np.pad(row, (0, value.size - row.size)) for row in rows])

        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        fake = types.SimpleNamespace(process_allgather=allgather)
        monkeypatch.setattr(hosts, "multihost_utils", fake)

    return of


def launch(monkeypatch, *values):
    for name, value in zip(NAMES, values, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_what_every_process_hands_in_is_known_to_all_in_order(job):
    told = [{"position": 5}, {"position": 123456, "name": "größer"}]
    job(*told)
    assert hosts.gather(told[0]) == told


def test_alone_what_is_gathered_is_ones_own_as_json_holds_it():
    assert hosts.gather({"at": (1, 2)}) == [{"at": [1, 2]}]
    hosts.agree(anything="at all")


@pytest.mark.parametrize("index", [0, 1])
def test_what_is_divided_comes_together_in_order(job, monkeypatch, index):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares, seen = [["a", "c", "e"], ["b", "d"]], []

    def work(items):
        seen.extend(items)
        return [item.lower() for item in items]

    job(*shares)
    assert hosts.divide(work, list("ABCDE")) == list("abcde")
    assert seen == [item.upper() for item in shares[index]]


def test_alone_one_does_all_of_what_is_divided():
    assert hosts.divide(lambda items: [2 * item for item in items], [1, 2, 3]) == [2, 4, 6]
    assert hosts.divide(list, []) == []


def test_work_that_fails_in_one_process_fails_in_all(job):
    def work():
        raise FileNotFoundError("no tokenizer")

    job(None, "no tokenizer")
    with pytest.raises(ValueError, match=r"^no tokenizer$"):
        hosts.together(lambda: "well", ValueError, OSError)
    with pytest.raises(FileNotFoundError, match=r"^no tokenizer$"):
        hosts.together(work, ValueError, OSError)
    job(None, None)
    assert hosts.together(lambda: "well", ValueError) == "well"


def test_processes_that_agree_go_on(job):
    job({"verb": "sft", "config": "a = 1\n"}, {"verb": "sft", "config": "a = 1\n"})
    assert hosts.agree(verb="sft", config="a = 1\n") is None


def test_the_first_fact_and_line_that_differ_are_named(job):
    facts = {"verb": "sft", "config": "a = 1\nb = 2\nc = 3\n"}
    other = {**facts, "config": "a = 1\nb = 20\nc = 30\n"}
    job(facts, facts, other, other)
    with pytest.raises(ValueError, match="agree in config: process 2 has 'b = 20' where") as caught:
        hosts.agree(**facts)
    assert "process 0 has 'b = 2'; 2 of 4 differ from process 0 (2, 3)" in str(caught.value)


def test_a_process_with_one_line_more_differs(job):
    job({"config": "a = 1\n"}, {"config": "a = 1\nb = 2\n"})
    with pytest.raises(ValueError, match="process 1 has 'b = 2' where process 0 has ''"):
        hosts.agree(config="a = 1\n")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((None, None, None), "no launcher says which process of which job this is"),
        (("a:1", "2", None), "JAX_NUM_PROCESSES without JAX_PROCESS_ID: set all of"),
        (("a:1", "2", "2"), "JAX_NUM_PROCESSES = 2, JAX_PROCESS_ID = 2: the first must be"),
        (("a:1", "two", "0"), "JAX_NUM_PROCESSES = two, JAX_PROCESS_ID = 0: the first must be"),
        (("a", "2", "0"), "JAX_COORDINATOR_ADDRESS = 'a' must be host:port"),
    ],
)
def test_a_launcher_that_says_too_little_ends_in_a_sentence(monkeypatch, values, sentence):
    launch(monkeypatch, *values)

    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"must be|set|Set|Start") as caught:
        hosts.join()
    assert sentence in str(caught.value)


def test_named_processes_join_by_their_names_and_others_as_jax_finds_them(monkeypatch):
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: seen.append(how))
    launch(monkeypatch, "10.0.0.1:8476", "4", "3")
    hosts.join()
    launch(monkeypatch, None, None, None)
    hosts.join()
    assert (seen[0]["coordinator_address"], seen[0]["num_processes"]) == ("10.0.0.1:8476", 4)
    assert seen[0]["process_id"] == 3
    assert "coordinator_address" not in seen[1]


def test_one_process_of_many_is_not_run_as_if_it_were_alone(monkeypatch, capsys):
    launch(monkeypatch, "a:1", "2", "0")
    assert main(["sft", "configs/sft/demo.gin"]) == 2
    assert "JAX_NUM_PROCESSES = 2, and --hosts is not given" in capsys.readouterr().err
    launch(monkeypatch, "a:1", "1", "0")
    hosts.require_alone()


def test_devices_of_hosts_that_were_not_joined_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="those of 4 hosts, and this process has not joined"):
        make_mesh(None)


@pytest.mark.parametrize("verb", ["make", "parity", "plot"])
def test_a_program_of_one_process_refuses_hosts(verb, capsys):
    assert main([verb, "any.gin", "--hosts"]) == 2
    assert f"tw: tw {verb} runs in one process, on one host" in capsys.readouterr().err


def test_a_folder_that_others_do_not_see_is_refused(job, monkeypatch, tmp_path):
    answers = iter([["a", "b"], ["written"] * 2, [[True, True], [False, True]]])
    monkeypatch.setattr(hosts, "gather", lambda _: next(answers))
    with pytest.raises(ValueError, match="process 1 of 2 does not see what process 0 wrote there"):
        hosts.require_shared(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_bucket_is_no_workdir(capsys):
    assert main(["sft", "configs/sft/demo.gin", "--set", "Sft.workdir='gs://a/b'"]) == 2
    assert "workdir = 'gs://a/b' is a URL, and a workdir must be" in capsys.readouterr().err
