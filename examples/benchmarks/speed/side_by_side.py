"""What all measures share: interleaved repeats, ratios of medians, bytes that are alive."""

from __future__ import annotations

import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[], object]
COMPILE = "LIGHTNING_STEP_COMPILE"


class Settings(NamedTuple):
    """How to measure."""

    device: torch.device
    repeats: int
    quick: bool  # small models, and no time to be exact
    largest: int  # weights of the largest model, in millions
    threads: int = 1


class Row(NamedTuple):
    """One figure."""

    part: str
    what: str
    of: str  # what it is a multiple of, or its unit
    value: float
    seconds: float | None = None  # the median it comes from


def medians(works: Mapping[str, Work], settings: Settings, *, warm: int = 2) -> dict[str, float]:
    """Seconds of each: medians of rounds in which each has its turn, forwards and backwards."""
    for work in works.values():
        for _ in range(warm):
            work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for i in range(settings.repeats):
        order = list(works) if i % 2 == 0 else list(works)[::-1]
        for name in order:
            wait(settings.device)
            start = time.perf_counter()
            works[name]()
            wait(settings.device)
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def ratios(part: str, seconds: Mapping[str, float], of: str, prefix: str = "") -> list[Row]:
    """Each as a multiple of one of them."""
    return [Row(part, prefix + name, of, value / seconds[of], value) for name, value in seconds.items() if name != of]


def wait(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Alive(TorchDispatchMode):
    """Bytes of the tensors that operations make and that are still there, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what is new."""
        given = {id(t.untyped_storage()) for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_real(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if _is_real(tensor) and id(tensor.untyped_storage()) not in given | self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most that a piece of work has allocated at a time."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        wait(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with Alive() as alive:
        work()
    peak: int = alive.peak
    return peak


def facts(settings: Settings) -> dict[str, Any]:
    """What the figures depend on."""
    cuda = settings.device.type == "cuda"
    return {
        "machine": f"{platform.system()} {platform.machine()}" + (f", {torch.cuda.get_device_name()}" if cuda else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "threads": settings.threads,
        "repeats": settings.repeats,
    }
