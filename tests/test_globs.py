import pytest
from torch import nn

from lightning_step.errors import ArgumentTypeError, TargetError
from lightning_step.globs import Selection
from lightning_step.pattern import NMPattern


def make_model():
    blocks = nn.Sequential(*(nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 4)}) for _ in range(12)))
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(4, 4)})


def chosen(include=None, exclude=()):
    """Names of the weights that pass, judged one by one."""
    model = make_model()
    selection = Selection.over(model, include, exclude, {})
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    return [name for name in names if selection.refusal([name]) is None]


def fcs(*blocks):
    return [f"blocks.{i}.fc.weight" for i in blocks]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        pytest.param(["head"], (), ["head.weight"], id="a module covers its tensors"),
        pytest.param(["head.*"], (), ["head.weight"], id="dot-star matches a plain layer's tensors"),
        pytest.param(["head.weight"], (), ["head.weight"], id="a tensor by its full name"),
        pytest.param(["blocks.1"], ["*.out"], fcs(1), id="a container covers all beneath it, and is not a prefix of 10"),
        pytest.param(["blocks.1.*"], ["*.out"], fcs(1), id="dot-star below a container is not a prefix of 10 and 11"),
        pytest.param(["blocks.1?.fc"], (), fcs(10, 11), id="question mark is one character"),
        pytest.param(["blocks.[23].fc.weight"], (), fcs(2, 3), id="character class"),
        pytest.param(["*"], ["blocks"], ["head.weight"], id="an excluded container"),
        pytest.param(None, ["blocks.*"], ["head.weight"], id="no include lets everything in"),
        pytest.param([], (), [], id="an empty include lets nothing in"),
        pytest.param(["head"], ["head"], [], id="exclude wins over include"),
        pytest.param(["*.fc"], ["blocks.[!0]*", "blocks.0.out"], fcs(0), id="several excludes"),
    ],
)
def test_globs_choose(include, exclude, expected):
    assert chosen(include, exclude) == expected


def test_globs_are_case_sensitive():
    with pytest.raises(TargetError, match="got 'HEAD'"):
        Selection.over(make_model(), ["HEAD"], (), {})
    assert Selection(("HEAD",), (), {}).refusal(["head.weight"]) == "not named by `include`"


def test_the_model_itself_may_be_a_single_layer():
    assert Selection.over(nn.Linear(4, 4), ["weight"], (), {}).refusal(["weight"]) is None


@pytest.mark.parametrize(
    ("include", "exclude", "reason"),
    [
        (["a"], (), "not named by `include`"),
        (None, ["z", "fc*"], "excluded by 'fc*'"),
        (["fc"], ["fc.weight"], "excluded by 'fc.weight'"),
    ],
)
def test_refusal_names_the_glob(include, exclude, reason):
    assert Selection(include, exclude, {}).refusal(["fc.weight"]) == reason


def test_one_of_several_names_of_a_shared_tensor_is_enough():
    names = ["emb.weight", "head.weight"]
    assert Selection(("head",), (), {}).refusal(names) is None
    assert Selection(None, ("head",), {}).refusal(names) == "excluded by 'head'"
    assert Selection(None, (), {"head": NMPattern(1, 4)}).override(names) == NMPattern(1, 4)


@pytest.mark.parametrize(
    ("include", "overrides", "exact"),
    [
        pytest.param(("head.weight",), {}, True, id="tensor"),
        pytest.param(("head",), {}, True, id="its layer"),
        pytest.param(None, {"head": NMPattern(1, 4)}, True, id="in overrides"),
        pytest.param(("*", "hea?", "head*", "head.*"), {"*": NMPattern(1, 4)}, False, id="wildcards are not exact"),
        pytest.param(None, {}, False, id="no include"),
        pytest.param(("emb",), {}, False, id="another layer"),
    ],
)
def test_names_exactly(include, overrides, exact):
    assert Selection(include, (), overrides).names_exactly(["head.weight"]) is exact


def test_naming_the_container_is_not_naming_the_layer_exactly():
    assert not Selection(("blocks",), (), {}).names_exactly(["blocks.head.weight"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param({"fc": (1, 4), "*": (1, 8)}, (1, 8), id="last matching entry wins"),
        pytest.param({"*": (1, 8), "fc": (1, 4)}, (1, 4), id="whatever its length"),
        pytest.param({"*": (1, 8), "other": (1, 4)}, (1, 8), id="an entry that does not match is passed over"),
        pytest.param({"other": (1, 4)}, None, id="none matches"),
    ],
)
def test_override(overrides, expected):
    selection = Selection(None, (), {glob: NMPattern(*pattern) for glob, pattern in overrides.items()})
    assert selection.override(["fc.weight"]) == (expected and NMPattern(*expected))


@pytest.mark.parametrize("argument", ["include", "exclude", "overrides"])
def test_a_glob_that_matches_nothing_is_an_error_that_shows_what_there_is(argument):
    arguments = {"include": None, "exclude": (), "overrides": {}}
    arguments[argument] = {"heda": NMPattern(2, 4)} if argument == "overrides" else ["head", "heda"]
    with pytest.raises(TargetError, match=rf"glob of `{argument}` .*got 'heda', .*has: blocks, blocks\.0, .*\(\d+ in all\)"):
        Selection.over(make_model(), **arguments)


def test_the_error_lists_every_name_of_a_small_model():
    with pytest.raises(TargetError, match=r"The model has: weight, bias\.$"):
        Selection.over(nn.Linear(4, 4), None, ["x"], {})


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_single_string_is_refused_instead_of_being_read_letter_by_letter(argument):
    arguments = {"include": None, "exclude": (), "overrides": {}, argument: "head"}
    with pytest.raises(ArgumentTypeError, match=f"Expected `{argument}` to be a list of globs, but got the string 'head'"):
        Selection.over(make_model(), **arguments)
