"""Problems that cannot be asked are found before anything is sampled, with their place."""

import numpy as np
import pytest

from tw_jax.data import records
from tw_jax.data.prompts import Problems

LENGTHS = [3, 9, 4, 12, 5]


def encode(question):
    return np.zeros(len(question), np.int32)


@pytest.fixture
def path(tmp_path):
    """Problems p0 to p4 whose prompts have `LENGTHS` tokens; the second line is blank."""
    made = [
        records.Problem(id=f"p{n}", question="x" * length, answer="1", task="")
        for n, length in enumerate(LENGTHS)
    ]
    path = tmp_path / "problems.jsonl"
    records.write(path, made)
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f"{first}\n\n{rest}")
    return path


def test_a_prompt_that_is_too_long_is_refused_with_file_and_line(path):
    limits = {"Sampler.max_prompt": 8, "ForkJoin.max_context": 100}
    with pytest.raises(ValueError, match="max_prompt allows 1 to 8") as caught:
        Problems(path, encode, limits=limits, unanswered="keep", option="Pgrpo.long_prompts")
    message = str(caught.value)
    assert message.startswith(f"{path}:3: the prompt of the problem 'p1' has 9 tokens")
    assert "Or set Pgrpo.long_prompts to 'drop'" in message


def test_the_shorter_of_two_limits_is_named(path):
    limits = {"Sampler.max_prompt": 100, "ForkJoin.max_context": 11}
    with pytest.raises(ValueError, match=r"problem 'p3' has 12 tokens, and ForkJoin.max_context"):
        Problems(path, encode, limits=limits, unanswered="keep")


def test_prompts_that_are_too_long_are_dropped_and_counted_where_the_config_says_so(path):
    limits = {"Sampler.max_prompt": 8}
    found = Problems(path, encode, limits=limits, unanswered="keep", too_long="drop")
    assert [problem.id for problem in found] == ["p0", "p2", "p4"]
    assert (len(found), found.dropped) == (3, 2)
    drawn = [problem.id for problem in found.drawn(0, 9, seed=5)]
    assert [sorted(drawn[n : n + 3]) for n in (0, 3, 6)] == [["p0", "p2", "p4"]] * 3


def test_prompts_behind_the_count_are_not_asked_for_their_length(path):
    assert (
        len(Problems(path, encode, limits={"Sampler.max_prompt": 3}, unanswered="keep", count=1))
        == 1
    )


def test_a_file_of_which_no_prompt_fits_is_refused(path, tmp_path):
    with pytest.raises(
        ValueError, match=r"the prompts of 5 problems are longer than Sampler\.max_prompt = 2"
    ):
        Problems(path, encode, limits={"Sampler.max_prompt": 2}, unanswered="keep", too_long="drop")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"has no problem\. It must have at least one"):
        Problems(
            tmp_path / "empty.jsonl", encode, limits={"Sampler.max_prompt": 2}, unanswered="keep"
        )


def test_the_order_of_problems_is_a_new_permutation_in_each_pass_from_any_place(path):
    found = Problems(path, encode, limits={"Sampler.max_prompt": 100}, unanswered="keep")
    order = np.concatenate([np.random.default_rng([7, n]).permutation(5) for n in range(4)])
    want = [f"p{n}" for n in order]
    assert [p.id for p in found.drawn(0, 20, seed=7)] == want
    assert [p.id for p in found.drawn(8, 6, seed=7)] == want[8:14]


def write_without_answers(path, *answers):
    records.write(
        path,
        [records.Problem(f"p{n}", "xx", answer, task="") for n, answer in enumerate(answers)],
    )


@pytest.mark.parametrize("answer", ["", " \n"])
def test_a_training_problem_without_an_answer_is_refused_with_its_line(tmp_path, answer):
    path = tmp_path / "x.jsonl"
    write_without_answers(path, "1", answer)
    with pytest.raises(
        ValueError, match=r"x\.jsonl:2: the answer of the problem 'p1' is not known"
    ):
        Problems(path, encode, limits={"Sampler.max_prompt": 2}, unanswered="refuse")


def test_held_out_problems_without_an_answer_are_counted_apart(tmp_path):
    path, limits = tmp_path / "x.jsonl", {"Sampler.max_prompt": 2}
    write_without_answers(path, "1", "", "2", "")
    found = Problems(path, encode, limits=limits, unanswered="drop", count=3)
    assert ([one.id for one in found], found.without_answer) == (["p0", "p2"], 1)
    write_without_answers(path, "")
    with pytest.raises(ValueError, match="the answers of 1 problems are not known"):
        Problems(path, encode, limits=limits, unanswered="drop")


def test_an_empty_prompt_and_a_second_problem_of_an_id_are_refused_with_their_lines(tmp_path):
    path, limits = tmp_path / "x.jsonl", {"Sampler.max_prompt": 2}
    for second, told in (
        ("p1", "x.jsonl:2: the prompt of the problem 'p1' has 0 tokens"),
        ("p0", "x.jsonl:2 has the id 'p0', and so has .*x.jsonl:1"),
    ):
        made = [records.Problem(name, text, "1", "") for name, text in (("p0", "x"), (second, ""))]
        records.write(path, made)
        with pytest.raises(ValueError, match=told):
            Problems(path, encode, limits=limits, unanswered="keep", too_long="drop")
