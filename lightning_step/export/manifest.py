"""What a file says of itself, in the header of the safetensors file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_step.errors import ArgumentTypeError, FileFormatError, LightningStepError
from lightning_step.pattern import NMPattern
from lightning_step.version import __version__

__all__ = ["HEADER_KEY", "INDEX", "MANIFEST_VERSION", "VALUES", "Format", "Manifest", "SparseTensor"]

HEADER_KEY = "lightning_step"
VALUES, INDEX = ".nm_values", ".nm_index"  # how the two parts of a packed tensor are called
MANIFEST_VERSION = 1
_DIGEST = re.compile("[0-9a-f]{64}")
_MAX_DIMS, _MAX_ELEMENTS = 64, 2**63 - 1  # what any tensor library can address

Format = Literal["dense", "packed"]
"""``dense``: plain keys and exact zeros, read by every safetensors loader; ``packed``: half the bytes at 2:4."""


@dataclass(frozen=True)
class SparseTensor:
    """One tensor that holds an n:m pattern; it was verified when the file was written.

    Example:
        >>> SparseTensor(2, 4, 1, (8, 16)).pattern
        NMPattern(n=2, m=4)
    """

    n: int  # weights KEPT in every group
    m: int  # weights in a group
    dim: int  # the dimension that holds the groups
    shape: tuple[int, ...]  # of the dense tensor

    @property
    def pattern(self) -> NMPattern:
        """The pattern as a value.

        Returns:
            n:m.
        """
        return NMPattern(self.n, self.m)


@dataclass(frozen=True)
class Manifest:
    """The manifest of one file.

    Example:
        >>> manifest = Manifest("dense", {"weight": SparseTensor(2, 4, 1, (8, 16))})
        >>> Manifest.from_json(manifest.to_json()) == manifest
        True
    """

    format: Format
    sparse: Mapping[str, SparseTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)  # name of a tied tensor -> name it is stored under
    info: Mapping[str, Any] = field(default_factory=dict)  # recipe, switch: plain values, for people
    sha256: Mapping[str, str] = field(default_factory=dict)  # of every tensor in the file; empty: nobody took them

    def to_json(self) -> str:
        """Write it down.

        Returns:
            One line of JSON.

        Raises:
            ArgumentTypeError: If ``info`` holds what JSON cannot say.
        """
        body = {
            "version": MANIFEST_VERSION,
            "written_by": f"lightning-step {__version__}",
            "n_means": "weights kept of every m consecutive ones along dim",
            **asdict(self),
        }
        try:
            return json.dumps(body, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ArgumentTypeError(
                f"Expected `info` to hold plain values (numbers, strings, lists, dicts), but got {self.info!r} ({error})."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read it back.

        Args:
            text: From `to_json`, of this version or an older one.

        Returns:
            The manifest.

        Raises:
            FileFormatError: If it is newer than this version, or damaged.
        """
        try:
            body = _object(json.loads(text, object_pairs_hook=_unique))
            found = body["version"]
            if isinstance(found, bool) or not isinstance(found, int) or found < 1:
                raise ValueError(f"version must be a whole number from 1 on: {found!r}")
            if found > MANIFEST_VERSION:
                raise FileFormatError(
                    f"Expected a manifest of version {MANIFEST_VERSION} or older, but got version {found!r}. "
                    "Update lightning-step to read this file."
                )
            sparse = {str(name): _tensor(entry) for name, entry in _object(body["sparse"]).items()}
            if body["format"] not in ("dense", "packed"):
                raise ValueError(f"unknown format {body['format']!r}")
            digests = _digests(body.get("sha256", {}))
            return cls(body["format"], sparse, _aliases(body["aliases"]), _object(body["info"]), digests)
        except FileFormatError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, LightningStepError) as error:
            raise FileFormatError(
                f"Expected a manifest written by lightning-step, but got a damaged one ({_brief(error)}). "
                "Export the model again."
            ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):  # readers would differ in which one counts
        raise ValueError("a key occurs twice")
    return body


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"not an object: {value!r}")
    return value


def _brief(error: Exception) -> str:
    text = repr(error)
    return text if len(text) <= 300 else f"{text[:300]}..."  # a stranger's file may hold megabytes


def _aliases(value: Any) -> dict[str, str]:
    aliases = _object(value)
    for name in aliases.values():
        if not isinstance(name, str):
            raise TypeError(f"aliases must be names: {name!r}")
        if name in aliases:
            raise ValueError(f"an alias of an alias: {name!r}")
    return aliases


def _digests(value: Any) -> dict[str, str]:
    digests = _object(value)
    for found in digests.values():
        if not isinstance(found, str) or not _DIGEST.fullmatch(found):
            raise ValueError(f"not a SHA-256 in 64 hexadecimal digits: {found!r}")
    return digests


def _tensor(value: Any) -> SparseTensor:
    entry = _object(value)
    shape = tuple(entry["shape"]) if isinstance(entry["shape"], list) else (None,)
    sizes = (entry["n"], entry["m"], entry["dim"], *shape)
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise ValueError(f"n, m, dim and shape must be integers: {sizes}")
    if not 0 <= entry["dim"] < len(shape) or min(shape) < 0:
        raise ValueError(f"dim {entry['dim']} is not one of shape {shape}")
    pattern = NMPattern(entry["n"], entry["m"])  # refuses what is no pattern
    if shape[entry["dim"]] % pattern.m:
        raise ValueError(f"m does not divide shape {shape} along dim {entry['dim']}: {pattern}")
    # A size of 0 does not make room for absurd other ones.
    if len(shape) > _MAX_DIMS or max(pattern.m, math.prod(max(size, 1) for size in shape)) > _MAX_ELEMENTS:
        raise ValueError(f"no tensor has so many dimensions or elements: {shape}")
    return SparseTensor(entry["n"], entry["m"], entry["dim"], shape)
