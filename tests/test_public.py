"""What is public: sorted, complete, documented, annotated, and of the version the changelog says."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lightning_step

ROOT = Path(__file__).parents[1]
# `__main__` would run the program.
NAMES = [
    info.name for info in pkgutil.walk_packages(lightning_step.__path__, "lightning_step.") if "__main__" not in info.name
]
MODULES = {name: importlib.import_module(name) for name in ["lightning_step", *NAMES]}
PACKAGES = {name: module for name, module in MODULES.items() if hasattr(module, "__path__")}


def listed(kind):
    """Every function or class that some module lists as public, under the name of its definition."""
    values = [getattr(module, name) for module in MODULES.values() for name in getattr(module, "__all__", [])]
    return {f"{value.__module__}.{value.__qualname__}": value for value in values if kind(value)}


def public_methods(cls):
    """Functions of a class by name, properties and class methods among them, inherited ones not."""
    own = {name: value for name, value in vars(cls).items() if name == "__init__" or not name.startswith("_")}
    own = {name: value.fget if isinstance(value, property) else value for name, value in own.items()}
    own = {name: getattr(value, "__func__", value) for name, value in own.items()}
    return {f"{cls.__module__}.{cls.__qualname__}.{name}": value for name, value in own.items() if inspect.isfunction(value)}


FUNCTIONS, CLASSES = listed(inspect.isfunction), listed(inspect.isclass)
METHODS = {name: method for cls in CLASSES.values() for name, method in public_methods(cls).items()}


def ruff_key(name):
    """RUF022: constants, then classes, then the rest; within each, numbers count as numbers."""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def unannotated(function):
    signature = inspect.signature(function)
    bare = [name for name, p in signature.parameters.items() if p.annotation is p.empty and name not in ("self", "cls")]
    return bare + ["return"] * (signature.return_annotation is signature.empty)


def missing_sections(function):
    signature = inspect.signature(function)
    needed = ["Example"] + ["Args"] * bool(signature.parameters)
    if signature.return_annotation not in ("None", None):
        generates = inspect.isgeneratorfunction(inspect.unwrap(function))
        needed.append("Yields" if generates else "Returns")
    return [section for section in needed if not re.search(rf"^ +{section}:$", function.__doc__ or "", re.MULTILINE)]


def undescribed(function):
    """Parameters that `Args:` does not name."""
    described = re.findall(r"^ +(\w+): ", (function.__doc__ or "").partition("Args:")[2], re.MULTILINE)
    return [name for name in inspect.signature(function).parameters if name not in described]


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_as_ruff_sorts_and_every_name_is_there(name):
    listed_names = MODULES[name].__all__
    assert listed_names == sorted(set(listed_names), key=ruff_key)
    assert [missing for missing in listed_names if not hasattr(MODULES[name], missing)] == []


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_lists_exactly_its_public_names(name):
    names = {key for key, value in vars(PACKAGES[name]).items() if not key.startswith("_") and not inspect.ismodule(value)}
    assert set(PACKAGES[name].__all__) - {"__version__"} == names


def test_the_sorting_is_that_of_ruff():
    names = ["b", "a10", "a9", "_x", "Zed", "ABC", "A", "Abc", "STEPSparsity", "SparseExport", "__version__", "T1"]
    expected = ["ABC", "T1", "A", "Abc", "STEPSparsity", "SparseExport", "Zed", "__version__", "_x", "a9", "a10", "b"]
    assert sorted(names, key=ruff_key) == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_annotated_and_documented_with_an_example(name):
    function = FUNCTIONS[name]
    assert (unannotated(function), missing_sections(function), undescribed(function)) == ([], [], [])


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_documented_with_an_example(name):
    assert re.search(r"^ +Example:\n +>>> ", vars(CLASSES[name])["__doc__"], re.MULTILINE)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_annotated_and_documented(name):
    assert unannotated(METHODS[name]) == []
    documented_elsewhere = name.endswith("__init__") or getattr(METHODS[name], "__override__", False)
    assert METHODS[name].__doc__ or documented_elsewhere


def test_the_checks_see_what_is_missing():
    @contextmanager
    def generator(a: int) -> Iterator[int]:
        """Short.

        Args:
            a: A number.

        Returns:
            Wrong: it yields.

        Example:
            >>> 1
            1
        """
        yield a

    def bare(a, *, b: int = 0):
        """Short, and speaks of an Example: here."""

    def silent(a: int) -> None:
        pass

    assert (unannotated(generator), missing_sections(generator), undescribed(generator)) == ([], ["Yields"], [])
    assert (unannotated(bare), missing_sections(bare)) == (["a", "return"], ["Example", "Args", "Returns"])
    assert (unannotated(silent), missing_sections(silent), undescribed(silent)) == ([], ["Example", "Args"], ["a"])
    assert len(FUNCTIONS) > 50
    assert len(CLASSES) > 50
    assert len(METHODS) > 100


def test_the_changelog_is_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings, "the changelog has a section at least"
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[:1] in ([], [lightning_step.__version__])


def test_the_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", lightning_step.__version__)
