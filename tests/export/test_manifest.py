"""The manifest: its exact text, and what is refused when it is read back."""

import copy
import json
from pathlib import Path

import pytest

from lightning_step import __version__
from lightning_step.errors import ArgumentTypeError, FileFormatError
from lightning_step.export import Manifest, SparseTensor

SPARSE = {"fc.weight": SparseTensor(1, 4, 0, (8, 3))}
MANIFEST = Manifest("packed", SPARSE, {"head.weight": "fc.weight"}, {"steps": 10}, {"fc.weight": "0f" * 32})
DELETED = object()


def body():
    return json.loads(MANIFEST.to_json())


def changed(*path, value):
    """The text with one value replaced or deleted."""
    new = copy.deepcopy(body())
    place = new
    for key in path[:-1]:
        place = place[key]
    if value is DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(new)


def test_the_text_is_one_line_with_sorted_keys():
    assert MANIFEST.to_json() == (
        '{"aliases": {"head.weight": "fc.weight"}, "format": "packed", "info": {"steps": 10}, '
        '"n_means": "weights kept of every m consecutive ones along dim", '
        f'"sha256": {{"fc.weight": "{"0f" * 32}"}}, '
        '"sparse": {"fc.weight": {"dim": 0, "m": 4, "n": 1, "shape": [8, 3]}}, "version": 1, '
        f'"written_by": "lightning-step {__version__}"}}'
    )


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_what_is_written_is_read_back(format):
    manifest = Manifest(format, SPARSE, {"a": "fc.weight"}, {"x": [1, 2.5, None, "é", {"y": True}]})
    back = Manifest.from_json(manifest.to_json())
    assert back == manifest
    assert (back.sparse["fc.weight"].shape, str(back.sparse["fc.weight"].pattern)) == ((8, 3), "1:4")


def test_entries_that_a_later_writer_may_add_are_ignored():
    text = json.dumps({**body(), "comment": "added by hand", "written_by": 7, "n_means": None})
    assert Manifest.from_json(text) == MANIFEST


@pytest.mark.parametrize("version", [2, 3, 10**30])
def test_a_newer_version_says_update(version):
    message = rf"^Expected a manifest of version 1 or older, but got version {version}\. Update lightning-step to read this"
    with pytest.raises(FileFormatError, match=message):
        Manifest.from_json(changed("version", value=version))


@pytest.mark.parametrize("version", [0, -1, True, False, 1.0, "1", None, [1], {}])
def test_a_version_that_is_no_number_from_one_on_is_damage(version):
    with pytest.raises(
        FileFormatError, match=r"but got a damaged one .*version must be a whole number.*Export the model again"
    ):
        Manifest.from_json(changed("version", value=version))


@pytest.mark.parametrize("key", ["version", "format", "sparse", "aliases", "info"])
def test_every_required_key_is_missed(key):
    with pytest.raises(FileFormatError, match=rf"^Expected a manifest written by lightning-step.*KeyError\('{key}'\)"):
        Manifest.from_json(changed(key, value=DELETED))


@pytest.mark.parametrize("key", ["n", "m", "dim", "shape"])
def test_every_required_key_of_a_tensor_is_missed(key):
    with pytest.raises(FileFormatError, match=rf"KeyError\('{key}'\)"):
        Manifest.from_json(changed("sparse", "fc.weight", key, value=DELETED))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "1", '"text"', "{}", "\ud800", "[" * 100_000, "9" * 10_000, "NaN"])
def test_what_is_no_manifest_at_all_is_damage(text):
    with pytest.raises(FileFormatError, match="damaged"):
        Manifest.from_json(text)


@pytest.mark.parametrize("cut", range(0, len(MANIFEST.to_json()), 7))
def test_a_text_that_was_cut_off_is_damage(cut):
    with pytest.raises(FileFormatError, match="damaged"):
        Manifest.from_json(MANIFEST.to_json()[:cut])


@pytest.mark.parametrize("format", ["Dense", "", None, 1, ["packed"], {}])
def test_an_unknown_format_is_named(format):
    with pytest.raises(FileFormatError, match="unknown format"):
        Manifest.from_json(changed("format", value=format))


@pytest.mark.parametrize("value", [True, False, None, 1.0, "1", [1], {}])
@pytest.mark.parametrize("path", [("n",), ("m",), ("dim",), ("shape", 0), ("shape", 1)])
def test_sizes_are_integers_and_a_bool_is_none(path, value):
    with pytest.raises(FileFormatError, match="n, m, dim and shape must be integers"):
        Manifest.from_json(changed("sparse", "fc.weight", *path, value=value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dim", 2, "dim 2 is not one of shape"),
        ("dim", -1, "dim -1 is not one of shape"),
        ("dim", 10**30, "is not one of shape"),
        ("shape", [], r"dim 0 is not one of shape \(\)"),
        ("shape", [8, -3], "is not one of shape"),
        ("shape", [10, 3], r"m does not divide shape \(10, 3\) along dim 0: 1:4"),
        ("m", 10**30, "m does not divide shape"),
        ("m", 1, "Expected `m` >= 2"),
        ("m", -4, "Expected `m` >= 2"),
        ("n", 0, "Expected 1 <= n <= m"),
        ("n", 5, "Expected 1 <= n <= m"),
    ],
)
def test_sizes_that_fit_no_tensor_are_damage(key, value, message):
    with pytest.raises(FileFormatError, match=message):
        Manifest.from_json(changed("sparse", "fc.weight", key, value=value))


@pytest.mark.parametrize(
    "value", [None, 1, "fc.weight", ["fc.weight"], {"head.weight": ["fc.weight"]}, {"head.weight": None}]
)
def test_aliases_are_names_of_names(value):
    with pytest.raises(FileFormatError, match="damaged"):
        Manifest.from_json(changed("aliases", value=value))


@pytest.mark.parametrize("key", ["sparse", "info"])
@pytest.mark.parametrize("value", [None, 1, "text", [1]])
def test_tables_are_tables(key, value):
    with pytest.raises(FileFormatError, match="damaged"):
        Manifest.from_json(changed(key, value=value))


@pytest.mark.parametrize("info", [{"path": Path("x")}, {"values": {1, 2}}, {"": b"x"}, {1: 0, "a": 0}])
def test_info_that_json_cannot_say_is_refused_by_name(info):
    with pytest.raises(ArgumentTypeError, match=r"^Expected `info` to hold plain values .*, but got \{"):
        Manifest("dense", {}, {}, info).to_json()
