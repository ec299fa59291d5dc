"""When a mask, or a masked weight, that has been computed may serve again.

Note [Freshness]
    What is kept holds for one state of one ``Parameter``: the same object with the same storage, address, shape, strides and
    version, under the same pattern. Anything else is computed anew. The version counter sees every write that autograd
    would see, so this is the guarantee that autograd gives for what it saves for the backward pass. It does not see what
    goes past autograd: writes through ``.data`` or a numpy view, the replay of a CUDA graph, and fused optimizers. So what
    is kept ends with the step of any ``torch.optim.Optimizer`` in the process, and only in two spans is anything kept.

    A mask is kept while training under a `Sparsifier`, from the forward pass that computes it to the next step of an
    optimizer, or call of ``train`` or ``eval``. Values are always read live. A write that nobody sees, between a forward
    pass and that step, can leave the mask of before for that long; in evaluation, and right after a step, there is none.
    It costs a byte per masked weight between the two.

    A masked weight is kept only inside of `kept_weights`, for modules in evaluation mode and without gradients.

Note [Where nothing is kept]
    Where the rule cannot hold: for inference tensors, which count no versions; for sharded weights, which FSDP2 gathers into
    the same storage without counting; for every subclass of ``Parameter``; while tracing, under function transforms and
    dispatch modes; while a CUDA graph is captured; on the meta device. Copies and pickles of a model begin with nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_step.compiling import is_traced
from lightning_step.masked_classes import masks_of
from lightning_step.sharding import gathers

__all__ = ["Kept", "State", "drop_kept", "kept_weights"]

State = tuple[Hashable, ...]
"""What tells one state of a parameter from the next."""


class _Clock:
    """Counts the steps of all optimizers."""

    def __init__(self) -> None:
        self.steps = 0
        self._hook: Any = None

    def start(self) -> None:
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1


_clock = _Clock()


class _Entry(NamedTuple):
    parameter: weakref.ref[Tensor]
    storage: StorageWeakRef  # so that no other storage gets the same identity; its memory may go
    state: State
    value: Tensor
    version: int  # of the value: somebody may write into it


class Kept:
    """What one mask keeps. See Note [Freshness].

    Example:
        >>> kept, weight = Kept(), nn.Parameter(torch.ones(2))
        >>> kept.train(True)
        >>> kept.mask(weight, (), lambda: weight > 0) is kept.mask(weight, (), lambda: weight > 0)
        True
    """

    def __init__(self) -> None:
        self.trains = False  # whether masks are kept, see `train`
        self.prepare: Callable[[], None] | None = None  # brings masks in many at a time, this one among them; see `put`
        self.windows = 0  # how many `kept_weights` are open
        self._mask: _Entry | None = None
        self._weight: _Entry | None = None

    def train(self, on: bool, prepare: Callable[[], None] | None = None) -> None:
        """Keep masks between the steps of the optimizers, or no longer.

        Args:
            on: Whether to.
            prepare: Called when a mask is asked for that is not there; may `put` it there, and others with it.
        """
        _clock.start()
        self.trains, self.prepare = on, prepare if on else None
        self.drop()

    def mask(self, weight: Tensor, rule: tuple[Hashable, ...], make: Callable[[], Tensor]) -> Tensor:
        """The mask of a weight.

        Args:
            weight: The latent weight.
            rule: What else the mask depends on.
            make: Computes it.

        Returns:
            The mask; to be read, not written.
        """
        state = _state(weight, rule) if self.trains else None
        if state is None:
            return make()
        value = _valid(self._mask, weight, state)
        if value is None and self.prepare is not None:
            self.prepare()
            value = _valid(self._mask, weight, state)
        if value is None:
            value = make()
            self.put(weight, state, value)
        return value

    def lacking(self, weight: Tensor, rule: tuple[Hashable, ...]) -> State | None:
        """What state of a weight a mask could be kept for that is not there.

        Args:
            weight: The latent weight.
            rule: What else the mask depends on.

        Returns:
            The state, for `put`; None if nothing is to be done.
        """
        state = _state(weight, rule) if self.trains else None
        return None if state is None or _valid(self._mask, weight, state) is not None else state

    def put(self, weight: Tensor, state: State, value: Tensor) -> None:
        """Keep a mask.

        Args:
            weight: The latent weight.
            state: What it has been computed from; see `lacking`.
            value: The mask.
        """
        # autograd could not save a tensor of inference mode later
        self._mask = None if value.is_inference() else _entry(weight, state, value)

    def weight(self, weight: Tensor, rule: tuple[Hashable, ...], make: Callable[[], Tensor]) -> Tensor:
        """The masked weight, inside of `kept_weights`.

        Args:
            weight: The latent weight.
            rule: What else the masked weight depends on.
            make: Computes it.

        Returns:
            The masked weight, without gradient.
        """
        state = _state(weight, rule) if self.windows else None
        if state is None:
            return make()
        value = _valid(self._weight, weight, state)
        if value is None:
            with torch.inference_mode(False), torch.no_grad():  # with a version, whatever mode it is first read in
                value = make()
            self._weight = _entry(weight, state, value)
        return value

    def drop(self) -> None:
        """Forget all of it."""
        self._mask = self._weight = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()  # a copy has weights of its own


def _state(weight: Tensor, rule: tuple[Hashable, ...]) -> State | None:
    """What tells one state of a parameter from the next; None where nothing would, see Note [Where nothing is kept]."""
    if type(weight) is not nn.Parameter or weight.is_inference() or weight.is_meta or is_traced():
        return None
    stream: Hashable = None
    if weight.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(weight.device)  # another stream would have to wait for this one
    address = weight.untyped_storage()._cdata, weight.data_ptr()
    return _clock.steps, weight._version, address, weight.shape, weight.stride(), weight.dtype, stream, rule


def _entry(weight: Tensor, state: State, value: Tensor) -> _Entry:
    storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    return _Entry(weakref.ref(weight), storage, state, value, value._version)


def _valid(entry: _Entry | None, weight: Tensor, state: State) -> Tensor | None:
    if entry is None or entry.parameter() is not weight or entry.state != state:
        return None
    return entry.value if entry.value._version == entry.version else None


def _kept_of(model: nn.Module) -> list[Kept]:
    masks: dict[int, Any] = {id(mask): mask for module in model.modules() for mask in masks_of(module).values()}
    return [mask.kept for mask in masks.values()]


def drop_kept(model: nn.Module) -> None:
    """Forget every mask and masked weight that is kept.

    Nothing has to be dropped for a write that autograd sees. It is for writes through ``.data`` in training mode.

    Args:
        model: Any module.

    Example:
        >>> drop_kept(nn.Linear(8, 4))
    """
    for kept in _kept_of(model):
        kept.drop()


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Mask every weight once, for as long as nobody writes weights: evaluation at the cost of a dense model.

    For modules in evaluation mode, where gradients are off; everything else goes on as it does outside. The results are the
    same bit for bit. A weight that is written nevertheless is masked anew, unless it is written past autograd (through
    ``.data``). The masked weights take as much memory as the latent ones, until the end of the block.

    Args:
        model: A model with masks, or without. Models that FSDP2 shards are left as they are.

    Yields:
        Nothing.

    Example:
        >>> from lightning_step import NMPattern, apply_nm_masks
        >>> layer = nn.Linear(8, 4).eval()
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> with torch.no_grad(), kept_weights(layer):
        ...     layer.weight is layer.weight
        True
    """
    every = [] if gathers(model) else _kept_of(model)
    _clock.start()
    for kept in every:
        kept.windows += 1
    try:
        yield
    finally:
        for kept in every:
            kept.windows -= 1
            if not kept.windows:
                kept.drop()
