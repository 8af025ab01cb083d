"""Fields without a line, macros, blocks, `%gin.REQUIRED`, and interfaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from tw_jax.config import configurable, describe, interface, load_config, operative


@configurable
class Rope:
    """Rotary embedding."""

    theta: float = 1e4


@configurable
class Yarn:
    """Scaled rotary embedding."""

    theta: float = 1e4
    factor: float = 4.0


@configurable
class Lora:
    """Adapters."""

    rank: int
    alpha: float = 1.0


@configurable
class Model:
    """A decoder."""

    depth: int
    rope: Rope | Yarn
    lora: Lora | None = None


@configurable
class Mesh:
    """Axes."""

    data: int = 1
    fsdp: int = -1


@configurable
class Sampler:
    """Draws."""

    rows: int = 1
    top_k: int | None = None


@configurable
class Sample:
    """Samples a model."""

    model: Model
    sampler: Sampler = Sampler(rows=7)
    mesh: Mesh = Mesh()


@configurable
class Evaluate:
    """Samples, then grades."""

    sample: Sample
    mesh: Mesh = Mesh()
    teacher: Model | None = None
    workdir: str | None = None
    steps: int = 1


MODEL = ["Model.depth = 2", "Rope.theta = 1.0"]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# Fields without a line.


def test_required_fields_of_one_class_are_built_from_its_bindings_through_all_levels():
    built = load_config(Evaluate, [], MODEL)
    assert built.sample.model == Model(depth=2, rope=Rope(theta=1.0))
    explicit = ["Evaluate.sample = @Sample()", "Sample.model = @Model()", "Model.rope = @Rope()"]
    assert built == load_config(Evaluate, [], [*MODEL, *explicit])


def test_a_default_config_is_kept_until_its_class_is_bound():
    assert load_config(Evaluate, [], MODEL).sample.sampler == Sampler(rows=7)
    assert load_config(Evaluate, [], [*MODEL, "Sampler.top_k = 3"]).sample.sampler == Sampler(
        top_k=3
    )
    built = load_config(Evaluate, [], [*MODEL, "Mesh.data = 2"])
    assert built.mesh == built.sample.mesh == Mesh(data=2)


def test_a_default_config_is_built_if_a_class_within_it_is_bound():
    @configurable
    class Root:
        sample: Holder = Holder()

    assert load_config(Root, [], ["Mesh.data = 2"]).sample == Holder(mesh=Mesh(data=2))
    assert load_config(Root, []).sample == Holder()


@configurable
class Holder:
    """Holds a default that is a config."""

    mesh: Mesh = Mesh()


def test_a_binding_in_a_scope_wires_in_that_scope_only():
    lines = [*MODEL, "Evaluate.sample = @a/Sample()", "a/Mesh.data = 3"]
    built = load_config(Evaluate, [], lines)
    assert (built.sample.mesh.data, built.mesh.data) == (3, 1)
    with pytest.raises(ValueError, match=r"never used: b/Mesh.data"):
        load_config(Evaluate, [], [*MODEL, "b/Mesh.data = 3"])


def test_an_optional_is_switched_on_by_a_binding_of_its_class():
    assert load_config(Evaluate, [], MODEL).sample.model.lora is None
    built = load_config(Evaluate, [], [*MODEL, "Lora.rank = 8"])
    assert built.sample.model.lora == Lora(rank=8)


def test_an_optional_whose_class_has_another_holder_needs_its_line():
    assert load_config(Evaluate, [], MODEL).teacher is None
    built = load_config(
        Evaluate, [], [*MODEL, "Evaluate.teacher = @t/Model()", "t/Model.depth = 9"]
    )
    assert built.teacher == Model(depth=9, rope=Rope(theta=1.0))


def test_an_optional_of_a_class_that_is_the_root_is_not_switched_on():
    assert load_config(Node, [], ["Node.name = 'x'"]) == Node(name="x")


@configurable
class Node:
    """A list."""

    name: str = ""
    next: Node | None = None


def test_the_class_of_a_union_that_has_bindings_is_taken():
    built = load_config(Model, [], ["Model.depth = 2", "Yarn.factor = 8.0"])
    assert built.rope == Yarn(factor=8.0)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "none of them has bindings"),
        (["Rope.theta = 1.0", "Yarn.factor = 2.0"], "Rope and Yarn have bindings"),
    ],
)
def test_a_union_that_no_binding_or_several_choose_names_the_lines(lines, sentence):
    with pytest.raises(ValueError, match=r"^Model lacks Model.rope \(Rope \| Yarn\)\.") as caught:
        load_config(Model, [], ["Model.depth = 2", *lines])
    assert str(caught.value).endswith(
        f"Choose by a line, because {sentence}: Model.rope = @Rope() or Model.rope = @Yarn()."
    )


def test_a_line_beats_the_bindings_of_another_class():
    lines = ["Model.depth = 2", "Yarn.factor = 2.0", "Model.rope = @Rope()"]
    with pytest.raises(ValueError, match=r"never used: Yarn.factor.*Model.rope = @Yarn\(\)\?"):
        load_config(Model, [], lines)
    lines = ["Model.depth = 2", "Rope.theta = 2.0", "Yarn.theta = 3.0", "Model.rope = @a/Yarn()"]
    with pytest.raises(ValueError, match=r"never used: Rope.theta"):
        load_config(Model, [], lines)


def test_a_required_union_with_none_or_text_is_built_only_if_its_class_is_bound():
    @configurable
    class Root:
        lora: Lora | str

    assert load_config(Root, [], ["Lora.rank = 2"]).lora == Lora(rank=2)
    assert load_config(Root, [], ["Root.lora = none"]).lora == "none"
    with pytest.raises(ValueError, match=r"lacks Root.lora \(Lora \| str\)"):
        load_config(Root, [])


# Switching an optional off.


def test_none_switches_an_optional_off_and_its_bindings_may_stay(tmp_path):
    base = write(tmp_path / "a.gin", *MODEL, "rank = 8", "Lora.rank = %rank", "Lora.alpha = 2.0")
    later = write(tmp_path / "b.gin", "Model.lora = None")
    assert load_config(Evaluate, base).sample.model.lora == Lora(rank=8, alpha=2.0)
    assert load_config(Evaluate, base, ["Model.lora=None"]).sample.model.lora is None
    assert load_config(Evaluate, [base, later]).sample.model.lora is None


def test_a_binding_after_the_line_that_switches_its_class_off_is_refused(tmp_path):
    file = write(tmp_path / "a.gin", *MODEL, "Model.lora = None")
    with pytest.raises(ValueError, match=r"never used: Lora.rank") as caught:
        load_config(Evaluate, file, ["Lora.rank=8"])
    assert f"Model.lora = None ({file}:3) switches Lora off." in str(caught.value)


# Macros, blocks and REQUIRED, as gin has them.


def test_macros_bind_late_hold_references_and_have_scopes(tmp_path):
    file = write(
        tmp_path / "a.gin",
        "Evaluate.steps = %big/steps",
        "Evaluate.teacher = %teacher",
        "Sampler.rows = %rows",
        "teacher = @t/Model()",
        "t/Model.depth = %deep",
        "deep = %depth",
        "depth = 3",
        "big/steps = 100",
        "rows = 4",
        "rows = 5",
        *MODEL,
    )
    built = load_config(Evaluate, file)
    assert (built.steps, built.sample.sampler.rows) == (100, 5)
    assert built.teacher == Model(depth=3, rope=Rope(theta=1.0))
    assert load_config(Evaluate, file, ["rows=6"]).sample.sampler.rows == 6
    assert load_config(Evaluate, file, ["big/steps = 7"]).steps == 7


def test_a_macro_from_the_shell_is_text_where_the_field_takes_text():
    lines = [*MODEL, "Evaluate.workdir = %dir"]
    assert load_config(Evaluate, [], [*lines, "dir=2024"]).workdir == "2024"
    assert load_config(Evaluate, [], [*lines, "dir=runs/a"]).workdir == "runs/a"
    assert load_config(Evaluate, [], [*lines, "dir=None"]).workdir is None


def test_a_macro_stays_usable_when_what_used_it_is_bound_again():
    lines = [*MODEL, "steps = 3", "Evaluate.steps = %steps"]
    assert load_config(Evaluate, [], [*lines, "Evaluate.steps = 4"]).steps == 4
    with pytest.raises(ValueError, match="never used: stepss"):
        load_config(Evaluate, [], [*lines, "stepss = 4"])


def test_a_scoped_macro_that_does_not_exist_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown macro %a/steps. Known: %b/steps, %steps\."):
        load_config(Evaluate, [], [*MODEL, "steps=1", "b/steps=2", "Evaluate.steps=%a/steps"])


def test_blocks_bind_as_their_lines_do(tmp_path):
    file = write(
        tmp_path / "a.gin",
        "Model:",
        "  # The size.",
        "  depth = %depth",
        "",
        "  rope = @r/Rope()  # a comment",
        "r/Rope:",
        "    theta = 5.0",
        "depth = 4",
        "Evaluate.workdir = ('one '",
        "                    'text')",
    )
    built = load_config(Evaluate, file)
    assert built.sample.model == Model(depth=4, rope=Rope(theta=5.0))
    assert built.workdir == "one text"


def test_macros_and_blocks_mean_what_gin_itself_makes_of_them(tmp_path):
    """Gin's own interpreter is the oracle, on functions that return what they were given."""
    gin = pytest.importorskip("gin")
    names = {"Model", "Rope"}
    file = write(
        tmp_path / "a.gin",
        "depth = 1",
        "Model:",
        "  depth = %depth",
        "  rope = %rope",
        "rope = @s/t/Rope()",
        "s/Rope.theta = 3.0",
        "s/t/Rope.theta = %u/theta",
        "Rope.theta = 2.0",
        "u/theta = 4.0",
        "depth = 7",
    )

    def made(name):
        def function(**fields):
            return name, fields

        return function

    with gin.unlock_config():
        gin.clear_config()
        functions = {n: gin.external_configurable(made(n), n, module="oracle") for n in names}
        gin.parse_config_file(str(file))
        _, fields = functions["Model"]()
        gin.clear_config()
    built = load_config(Model, file)
    assert fields == {"depth": built.depth, "rope": ("Rope", vars(built.rope))}


@pytest.mark.parametrize("constant", ["%gin.REQUIRED", "%REQUIRED"])
def test_required_must_be_bound_by_a_later_line(constant, tmp_path):
    file = write(tmp_path / "a.gin", *MODEL, f"Evaluate.steps = {constant}")
    with pytest.raises(ValueError, match=f"Evaluate.steps is {constant} and must") as caught:
        load_config(Evaluate, file)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert str(caught.value).endswith("with --set Evaluate.steps=VALUE.")
    assert load_config(Evaluate, file, ["Evaluate.steps=5"]).steps == 5
    assert load_config(Evaluate, [file, write(tmp_path / "b.gin", "Evaluate.steps = 6")]).steps == 6


def test_a_required_macro_is_named_with_its_place(tmp_path):
    file = write(tmp_path / "a.gin", *MODEL, "steps = %gin.REQUIRED", "Evaluate.steps = %steps")
    with pytest.raises(ValueError, match=r"%steps is %gin.REQUIRED .* --set steps=VALUE") as caught:
        load_config(Evaluate, file)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert load_config(Evaluate, file, ["steps=5"]).steps == 5


# Interfaces.


@interface
class Term:
    """A term of a reward."""


@configurable
class Correct(Term):
    """Right or wrong.

    Attributes:
      weight: its weight.
    """

    weight: float = 1.0


@configurable
class Short(Term):
    """Few tokens."""

    tokens: int = 10


@configurable
class Reward:
    """A sum of terms."""

    first: Term
    terms: tuple[Term, ...] = ()
    last: Term | str = "none"


def test_a_field_of_an_interface_admits_every_config_that_inherits_from_it():
    reward = Reward(first=Correct(), terms=[Short(), Correct(weight=2)], last=Short())
    assert reward.terms == (Short(), Correct(weight=2.0))
    with pytest.raises(TypeError, match=r"Reward.first = Mesh\(...\) must be Term, but is Mesh\."):
        Reward(first=Mesh())
    with pytest.raises(TypeError, match=r"Reward.terms = .* must be tuple\[Term, ...\]"):
        Reward(first=Correct(), terms=(Mesh(),))
    with pytest.raises(TypeError, match="must be Term, but is Term"):
        Reward(first=Term())


def test_files_choose_among_the_classes_of_an_interface(tmp_path):
    built = load_config(Reward, [], ["Short.tokens = 3", "Reward.terms = (@Short(), @Correct())"])
    assert built == Reward(first=Short(tokens=3), terms=(Short(tokens=3), Correct()))
    assert load_config(Reward, write(tmp_path / "a.gin", operative(built))) == built
    with pytest.raises(ValueError, match=r"Reward.first = @Correct\(\) or Reward.first = @Short"):
        load_config(Reward, [])


def test_describe_lists_the_classes_of_an_interface():
    text = describe(Reward)
    assert "first: Term" in text
    assert "Correct: Right or wrong.\n  weight: float = 1.0  its weight." in text


def test_an_interface_without_classes_says_that_none_is_imported():
    @interface
    class Empty:
        pass

    @configurable
    class Root:
        part: int

    Root.__annotations__ = {"part": Empty}
    with pytest.raises(ValueError, match=r"Root lacks .* No imported class fits Empty\."):
        load_config(Root, [])
