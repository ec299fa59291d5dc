"""The tree of errors: drawn in the module's docstring, and each also the built-in error a caller would expect."""

import inspect
import pickle
import re

import pytest

import lightning_step
from lightning_step import errors

TREE = {
    "PatternError": ValueError,
    "ArgumentTypeError": TypeError,
    "ConfigurationError": ValueError,
    "TargetError": ValueError,
    "OptimizerError": TypeError,
    "ResumeError": RuntimeError,
    "ViolationError": ValueError,
    "ExportError": OSError,
    "FileFormatError": ValueError,
}


def test_these_are_all_and_all_are_public():
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert classes == {"LightningStepError", *TREE} == set(errors.__all__)
    assert lightning_step.LightningStepError is errors.LightningStepError


def test_the_base_is_an_exception_and_no_more():
    assert errors.LightningStepError.__bases__ == (Exception,)


@pytest.mark.parametrize(("name", "builtin"), TREE.items())
def test_each_is_ours_and_the_built_in_one(name, builtin):
    assert getattr(errors, name).__bases__ == (errors.LightningStepError, builtin)


def test_the_drawing_is_the_tree():
    drawn = re.findall(r"[├└]── (\w+) +\((\w+)\) {2,}\S", errors.__doc__)
    assert drawn == [(name, builtin.__name__) for name, builtin in TREE.items()]


@pytest.mark.parametrize(("name", "builtin"), TREE.items())
def test_each_keeps_its_text_when_it_is_raised_and_when_it_travels_between_processes(name, builtin):
    with pytest.raises(builtin, match=r"^Expected this, but got that\.$") as caught:
        raise getattr(errors, name)("Expected this, but got that.")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (type(caught.value), "Expected this, but got that.")
