"""The door to gin: what configs admit, what files say, what is refused, and the round trip."""

# pyright: reportArgumentType=false
# Wrong types are what is tested here.

from __future__ import annotations

import dataclasses
import math
import pickle
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_jax.config import configurable, describe, load_config, operative


@configurable
class Model:
    """A decoder.

    Attributes:
      depth: number of layers.
      width: model width,
        depth: no, a multiple of 8.

      attention: the backend.

    Example:
      depth: not this.
    """

    depth: int
    width: int = 64
    attention: Literal["auto", "reference"] = "auto"
    rope_theta: float = 1e4

    def check(self) -> None:
        if self.width % 8:
            raise ValueError(f"Model.width = {self.width} must be a multiple of 8.")


@configurable
class Sampler:
    """Draws tokens."""

    top_k: int | None = None
    stops: tuple[str, ...] = ()


@configurable
class Multiplication:
    """Multiply two numbers."""

    digits: int = 3


@configurable
class Countdown:
    """Reach a number."""

    target: int = 24


@configurable
class Sft:
    """Supervised training."""

    model: Model
    task: Multiplication | Countdown
    train: Sampler = Sampler()
    judge: Sampler | None = None
    workdir: str | None = None
    lr: float = 1e-3
    shuffle: bool = True
    axes: tuple[tuple[str, int], ...] = (("data", 1),)
    extra: tuple[Multiplication | Countdown, ...] = ()


REST = ["Sft.model = @Model()", "Model.depth = 2", "Sft.task = @Countdown()"]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# What configs admit.


def test_a_config_is_frozen_keyword_only_hashable_and_pickles():
    model = Model(depth=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.depth = 3  # pyright: ignore
    with pytest.raises(TypeError):
        Model(2)  # pyright: ignore
    assert hash(model) == hash(Model(depth=2))
    assert pickle.loads(pickle.dumps(model)) == model


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Model(depth="seven"), "Model.depth = 'seven' must be int, but is str."),
        (lambda: Model(depth=True), "Model.depth = True must be int, but is bool."),
        (lambda: Model(depth=2.0), "Model.depth = 2.0 must be int, but is float."),
        (
            lambda: Model(depth=2, attention="flash"),
            "Model.attention = 'flash' must be Literal['auto', 'reference'], but is str.",
        ),
        (lambda: Sampler(stops="ab"), "Sampler.stops = 'ab' must be tuple[str, ...], but is str."),
        (lambda: Sampler(stops=("a", 1)), "Sampler.stops = ('a', 1) must be tuple[str, ...],"),
        (lambda: Sampler(top_k="a"), "Sampler.top_k = 'a' must be int | None, but is str."),
        (
            lambda: Sft(model=Sampler(), task=Countdown()),
            "Sft.model = Sampler(...) must be Model, but is Sampler.",
        ),
        (
            lambda: Sft(model=Model(depth=1), task=Countdown(), axes=(("a", 1, 2),)),
            "Sft.axes = (('a', 1, 2),) must be tuple[tuple[str, int], ...], but is tuple.",
        ),
    ],
)
def test_a_wrong_type_is_refused_with_field_value_and_type(make, sentence):
    with pytest.raises(TypeError) as caught:
        make()
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Model(depth=2, rope_theta=math.nan), "Model.rope_theta = nan must be a finite"),
        (lambda: Model(depth=2, rope_theta=math.inf), "Model.rope_theta = inf must be a finite"),
        (lambda: Model(depth=2, rope_theta=1e39), "Model.rope_theta = 1e+39 must be a finite"),
        (lambda: Model(depth=2, rope_theta=10**400), "Model.rope_theta = 1000"),
        (lambda: Model(depth=2**63), "Model.depth = 9223372036854775808 must be a finite number"),
        (lambda: Model(depth=16**9000), "Model.depth = a number of thousands of digits must be"),
    ],
)
def test_a_number_that_is_not_finite_or_too_large_is_refused(make, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the text is judged below)
        make()
    assert str(caught.value).startswith(sentence)
    assert len(str(caught.value)) < 300


def test_an_int_becomes_a_float_and_a_list_a_tuple():
    model = Model(depth=2, rope_theta=10_000)
    assert type(model.rope_theta) is float
    assert Sampler(stops=["a"]).stops == ("a",)  # pyright: ignore


def test_check_judges_rules_across_fields():
    with pytest.raises(ValueError, match=r"Model.width = 7 must be a multiple of 8\."):
        Model(depth=2, width=7)


def test_an_annotation_that_no_file_could_fill_is_refused():
    @configurable
    class Odd:
        table: dict

    with pytest.raises(TypeError, match="dict is not an annotation of a config field"):
        Odd(table={})


def test_post_init_is_refused_in_favour_of_check():
    with pytest.raises(TypeError, match=r"checks its fields in check\(self\)"):

        @configurable
        class Odd:
            def __post_init__(self):
                pass


# What files say.


def test_a_file_builds_the_tree_it_shows(tmp_path):
    file = write(
        tmp_path / "run.gin",
        """
        # A lab note.
width = 32
Sft.model = @Model()
Sft.task = @Multiplication()
Sft.train = @Sampler()
Sft.lr = 3e-4
Sampler.stops = ['a', "b"]
Model:
  depth = 1_2  # a block
  width = %width
""",
    )
    assert load_config(Sft, [file]) == Sft(
        model=Model(depth=12, width=32),
        task=Multiplication(),
        train=Sampler(stops=("a", "b")),
        lr=3e-4,
    )


def test_scopes_allow_two_of_a_class_and_inherit_the_unscoped_bindings():
    lines = [
        "Sft.train = @train/Sampler()",
        "Sft.judge = @judge/Sampler()",
        "Sampler.stops = ('x',)",
        "train/Sampler.top_k = 5",
        "judge/Sampler.top_k = 1",
    ]
    sft = load_config(Sft, [], REST + lines)
    assert sft.train == Sampler(top_k=5, stops=("x",))
    assert sft.judge == Sampler(top_k=1, stops=("x",))


def test_a_reference_without_scope_stays_in_the_scope_it_is_met_in():
    @configurable
    class Pair:
        left: Sft
        right: Sft

    lines = ["Pair.left = @a/Sft()", "Pair.right = @b/Sft()", "b/Model.depth = 3"]
    pair = load_config(Pair, [], REST + lines)
    assert (pair.left.model.depth, pair.right.model.depth) == (2, 3)


def test_references_inside_tuples_are_built():
    sft = load_config(
        Sft, [], [*REST, "Sft.extra = (@Countdown(), @b/Countdown())", "b/Countdown.target=1"]
    )
    assert sft.extra == (Countdown(), Countdown(target=1))


def test_the_last_binding_wins(tmp_path):
    first = write(tmp_path / "a.gin", "\n".join(REST))
    second = write(tmp_path / "b.gin", "Model.depth = 4")
    assert load_config(Sft, [first, second]).model.depth == 4
    assert load_config(Sft, [first, second], ["Model.depth=5"]).model.depth == 5


def test_loading_leaves_nothing_behind_and_works_twice_and_for_two_roots():
    from gin import config as gin

    before = (len(gin._REGISTRY), dict(gin._CONFIG), dict(gin._OPERATIVE_CONFIG))
    assert load_config(Sft, [], REST) == load_config(Sft, [], REST)
    assert load_config(Model, [], ["Model.depth=1"]) == Model(depth=1)

    @configurable
    class Sampler:  # a namesake of the one above
        best_of: int = 1

    assert load_config(Sampler, [], ["Sampler.best_of=3"]).best_of == 3
    with pytest.raises(TypeError):
        load_config(Sft, [], ["Sft.model=3"])
    assert load_config(Sft, [], REST).model.depth == 2
    assert (len(gin._REGISTRY), gin._CONFIG, gin._OPERATIVE_CONFIG) == before


def test_only_bindings_py_imports_gin():
    package = Path(sys.modules["tw_jax.config"].__file__ or "").parent
    importers = [
        path.name
        for path in package.rglob("*.py")
        if any(
            line.startswith(("import gin", "from gin")) for line in path.read_text().splitlines()
        )
    ]
    assert importers == ["bindings.py"]


# Single bindings as a shell hands them over.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/x", "runs/x"),
        ("'runs/x'", "runs/x"),
        ("2024-run", "2024-run"),
        ("7", "7"),
        ("a#b = c", "a#b = c"),
        ("", ""),
        ("None", None),
    ],
)
def test_a_binding_takes_text_where_the_field_does(text, value):
    assert load_config(Sft, [], [*REST, f"Sft.workdir={text}"]).workdir == value


def test_a_binding_takes_a_literal_without_quotes():
    assert (
        load_config(Model, [], ["Model.depth=2", "Model.attention=reference"]).attention
        == "reference"
    )


def test_a_binding_may_bind_a_scope_and_a_macro():
    lines = ["Sft.train=@train/Sampler()", "k=4", "train/Sampler.top_k=%k"]
    assert load_config(Sft, [], REST + lines).train.top_k == 4


# What is refused.

REFUSED = {
    "misspelt field": (
        ["Model.dpeth = 3"],
        ValueError,
        "Unknown field Model.dpeth. Model has depth, width, attention, rope_theta.",
    ),
    "misspelt class": (
        ["Modle.depth = 3"],
        ValueError,
        "Unknown config class Modle. Sft reaches Countdown, Model, Multiplication, Sampler, Sft.",
    ),
    "misspelt reference": (
        ["Sft.train = @Smapler()"],
        ValueError,
        "Unknown config class @Smapler(). Sft reaches Countdown, Model, Multiplication, Sampler, "
        "Sft.",
    ),
    "nested name": (
        ["Sft.model.depth = 3"],
        ValueError,
        "Unknown config class Sft.model. Sft reaches",
    ),
    "wrong type": (
        ["Model.depth = 'seven'"],
        TypeError,
        "Model.depth = 'seven' must be int, but is str.",
    ),
    "wrong config": (
        ["Sft.model = @Countdown()"],
        TypeError,
        "Sft.model = @Countdown() must be Model, but is Countdown.",
    ),
    "class for config": (
        ["Sft.train = @Sampler"],
        ValueError,
        "@Sampler is a class, not a config. Write @Sampler().",
    ),
    "dead binding": (
        ["Multiplication.digits = 3"],
        ValueError,
        "Bound but never used: Multiplication.digits. Does Sft reach it, with a line like "
        "Sft.task = @Multiplication()?",
    ),
    "dead scope": (
        ["a/Multiplication.digits = 3"],
        ValueError,
        "Bound but never used: a/Multiplication.digits. Does Sft reach it, with a line like "
        "Sft.task = @a/Multiplication()?",
    ),
    "dead macro": (["steps = 3"], ValueError, "Bound but never used: steps. A field is bound as"),
    "unknown macro": (
        ["a = 3", "Model.depth = %b"],
        ValueError,
        "Unknown macro %b. Known: %a.",
    ),
    "macro circle": (
        ["a = %b", "b = %a", "Model.depth = %a"],
        ValueError,
        "References go in a circle: Sft -> Model -> %a -> %b -> %a.",
    ),
    "import": (["import os"], ValueError, "A config file must not import. Write --import os"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_with_its_line_and_a_sentence(case, tmp_path):
    lines, error, sentence = REFUSED[case]
    file = write(tmp_path / "run.gin", "\n".join(REST + lines))
    with pytest.raises(error) as caught:
        load_config(Sft, [file])
    if case == "macro circle":
        assert str(caught.value) == sentence
    else:
        assert str(caught.value).startswith(f"{file}:{3 + len(lines)}: {sentence}")


def test_a_single_binding_is_refused_with_a_sentence():
    for text, sentence in {
        "Model.depth=seven": "Model.depth = 'seven' must be int, but is str.",
        "Sft.model=@Model(": r"Sft.model = '@Model\(' must be Model, but is str.",
        "Model.depth": "'Model.depth' is not a binding. Write Class.field=value.",
        "Modle.depth=3": "Unknown config class Modle. Sft reaches ",
        "Model.dpeth=3": "Unknown field Model.dpeth. Model has depth",
    }.items():
        with pytest.raises((ValueError, TypeError), match=f"^{sentence}"):
            load_config(Sft, [], [*REST, text])


def test_missing_fields_are_all_named():
    @configurable
    class Run:
        steps: int
        rate: float
        task: Multiplication | Countdown

    with pytest.raises(
        ValueError,
        match=r"^Run lacks Run.steps \(int\), Run.rate \(float\), Run.task \(Mul.* \| Countdow",
    ):
        load_config(Run, [])
    with pytest.raises(ValueError, match=r"^a/Model lacks Model.depth \(int\)\."):
        load_config(Sft, [], ["Sft.model = @a/Model()", "Sft.task = @Countdown()"])


# A config that refuses its values: the binding at fault.


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        (["Model.width = 8", "Model.width = 7"], 5),
        (["Model.width = 7", "Model.attention = 'auto'"], 4),
    ],
)
def test_an_error_of_check_names_the_line_that_set_the_field(lines, number, tmp_path):
    file = write(tmp_path / "run.gin", "\n".join([*REST, *lines]))
    with pytest.raises(ValueError, match=r"Model\.width = 7 must be a multiple of 8") as caught:
        load_config(Sft, [file])
    assert str(caught.value).startswith(f"{file}:{number}: Model.width")


def test_an_error_of_check_about_a_field_of_a_part_names_its_line(tmp_path):
    @configurable
    class Whole:
        part: Sampler
        rows: int = 3

        def check(self):
            raise ValueError(f"Whole.rows = {self.rows} does not suit Sampler.top_k = 2.")

    file = write(tmp_path / "run.gin", "Whole.part = @Sampler()\nSampler.top_k = 2")
    with pytest.raises(ValueError, match=r"^.*run.gin:2: Whole.rows = 3 does not"):
        load_config(Whole, [file])
    with pytest.raises(ValueError, match=r"^.*run.gin:3: Whole.rows = 4 does not"):
        load_config(Whole, [write(file, f"{file.read_text()}\nWhole.rows = 4")])


def test_two_reachable_configs_of_one_name_are_refused():
    mine = Sampler

    @configurable
    class Both:
        one: mine  # pyright: ignore
        two: "Namesake"  # noqa: UP037  # pyright: ignore

    @configurable
    class Namesake:
        field: int = 1

    Namesake.__name__ = "Sampler"
    Both.__annotations__ = {"one": mine, "two": Namesake}
    with pytest.raises(TypeError, match="Both reaches two config classes named Sampler"):
        load_config(Both, [])


def test_a_root_that_is_no_config_is_refused():
    with pytest.raises(TypeError, match="is not a config class"):
        load_config(int, [])


# Discovery and the round trip.


def test_describe_lists_every_reachable_field_with_type_default_and_line():
    text = describe(Sft)
    assert [p.split(":")[0] for p in text.split("\n\n")] == [
        "Sft",
        "Model",
        "Multiplication",
        "Countdown",
        "Sampler",
    ]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Model: A decoder." in lines
    assert "depth: int number of layers." in lines
    assert "width: int = 64 model width, depth: no, a multiple of 8." in lines
    assert "attention: Literal['auto', 'reference'] = 'auto' the backend." in lines
    assert "task: Multiplication | Countdown" in lines
    assert "train: Sampler = @Sampler()" in lines
    assert "axes: tuple[tuple[str, int], ...] = (('data', 1),)" in lines


def test_operative_text_shows_defaults_and_wiring():
    text = operative(Sft(model=Model(depth=2), task=Countdown(), judge=Sampler(top_k=1)))
    assert "Sft.model = @Model()\n" in text
    assert "Sft.train = @train/Sampler()\n" in text
    assert "Sft.judge = @judge/Sampler()\n" in text
    assert "judge/Sampler.top_k = 1\n" in text
    assert "Model.width = 64\n" in text


@configurable
class Node:
    """A tree of its own kind, to make scopes as hard as they get."""

    name: str = ""
    size: float | None = None
    mode: Literal["a", 1, True, None] = "a"
    flag: bool = False
    numbers: tuple[int | float, ...] = ()
    left: Node | None = None
    right: Node | Sampler | None = None
    many: tuple[Node | Sampler, ...] = ()


samplers = st.builds(
    Sampler,
    top_k=st.none() | st.integers(-(2**63), 2**63 - 1),
    stops=st.lists(st.text(), max_size=2).map(tuple),
)
leaves = st.builds(
    Node,
    name=st.text(st.characters()),
    size=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
    mode=st.sampled_from(["a", 1, True, None]),
    flag=st.booleans(),
    numbers=st.lists(
        st.integers(-(2**63), 2**63 - 1)
        | st.floats(width=32, allow_nan=False, allow_infinity=False),
        max_size=3,
    ).map(tuple),
)
nodes = st.recursive(
    leaves,
    lambda inner: st.builds(
        Node,
        name=st.sampled_from(["", "left", "it's", 'say "x"\n%y @Z()']),
        left=st.none() | inner,
        right=st.none() | inner | samplers,
        many=st.lists(inner | samplers, max_size=2).map(tuple),
    ),
    max_leaves=6,
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(nodes)
def test_loading_the_operative_text_gives_the_config_back(tmp_path_factory, node):
    file = tmp_path_factory.mktemp("op") / "config.gin"
    file.write_text(operative(node), encoding="utf-8")
    assert load_config(Node, [file]) == node
