"""2:4 weights in the form that sparse tensor cores multiply with, made on the device that runs them and never stored.

Note [Limits of the backends]
    ``torch`` has two. cuSPARSELt takes fp16, bf16, int8 and float8_e4m3fn; CUTLASS is for devices of compute capability 8.x
    and takes fp16, bf16 and int8. It takes fp32 as well, but as 1:2, and would drop weights of a 2:4 tensor without a word:
    float32 is never packed here. Neither looks whether a weight holds 2:4; what does not would silently lose half of itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.export.linear_weights import LinearWeight, linear_weights, shared_with, use_packed
from lightning_step.functional import find_violation
from lightning_step.parametrization import nm_masks
from lightning_step.pattern import NMPattern

__all__ = [
    "Packing",
    "SemiStructured",
    "active_backend",
    "choose_backend",
    "to_semi_structured",
    "why_no_search",
    "why_not_packed",
]

Backend = Literal["cusparselt", "cutlass"]
_TWO_FOUR = NMPattern(2, 4)

# Rows and columns of a weight must be multiples of these.
_MULTIPLES: Mapping[str, Mapping[torch.dtype, tuple[int, int]]] = {
    "cusparselt": {
        torch.float16: (16, 16),
        torch.bfloat16: (16, 16),
        torch.int8: (32, 32),
        torch.float8_e4m3fn: (32, 32),
    },
    "cutlass": {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)},
}


@dataclass(frozen=True)
class Packing:
    """What became of one layer.

    Example:
        >>> print(Packing("fc.weight", (4, 8), torch.float16, ""))
        fc.weight (4, 8) float16: 2:4
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reason: str  # why the layer stays dense; empty if it was packed
    algorithm: int | None = None  # of cuSPARSELt, if one was searched for; None: torch's default

    @property
    def packed(self) -> bool:
        """Whether sparse tensor cores will run the layer.

        Returns:
            True if it was packed.
        """
        return not self.reason

    def __str__(self) -> str:
        packed = "2:4" if self.algorithm is None else f"2:4, algorithm {self.algorithm}"
        return f"{self.name} {self.shape} {str(self.dtype)[6:]}: {f'dense, {self.reason}' if self.reason else packed}"


@dataclass(frozen=True)
class SemiStructured:
    """What became of every layer that multiplies as a Linear one.

    Example:
        >>> print(SemiStructured("cusparselt", (Packing("fc.weight", (4, 8), torch.float32, "float32"),)))
        0 of 1 Linear weights packed for cusparselt
          fc.weight (4, 8) float32: dense, float32
    """

    backend: Backend | None
    layers: tuple[Packing, ...]
    no_search: str = ""  # why no algorithm was searched for, if one was to be

    @property
    def packed(self) -> int:
        """How many weights were packed.

        Returns:
            Their number.
        """
        return sum(layer.packed for layer in self.layers)

    def __str__(self) -> str:
        head = f"{self.packed} of {len(self.layers)} Linear weights packed for {self.backend or 'no backend'}"
        head += f" (no search: {self.no_search})" if self.no_search else ""
        return "\n  ".join([head, *map(str, self.layers)])


def choose_backend(capability: tuple[int, int] | None, cusparselt: bool) -> tuple[Backend | None, str]:
    """Which backend a device has.

    Args:
        capability: Compute capability of the CUDA device; None: there is none.
        cusparselt: Whether this ``torch`` comes with cuSPARSELt.

    Returns:
        The backend and an empty string, or None and the reason.

    Example:
        >>> choose_backend((9, 0), cusparselt=True), choose_backend((8, 6), cusparselt=False)
        (('cusparselt', ''), ('cutlass', ''))
        >>> choose_backend((9, 0), cusparselt=False)
        (None, 'compute capability 9.0 needs cuSPARSELt, which this torch lacks (CUTLASS is for 8.x)')
    """
    if capability is None:
        return None, "it is not on a CUDA device"
    version = f"{capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return None, f"compute capability {version} has no sparse tensor cores (8.0 is the first)"
    if cusparselt:
        return "cusparselt", ""
    if capability[0] == 8:
        return "cutlass", ""
    return None, f"compute capability {version} needs cuSPARSELt, which this torch lacks (CUTLASS is for 8.x)"


def active_backend(device: torch.device) -> tuple[Backend | None, str]:
    """Which backend a device of this machine has.

    Args:
        device: Where the weights are.

    Returns:
        The backend and an empty string, or None and the reason.

    Example:
        >>> active_backend(torch.device("cpu"))
        (None, 'it is not on a CUDA device')
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return choose_backend(None, False)
    return choose_backend(torch.cuda.get_device_capability(device), torch.backends.cusparselt.is_available())


def why_not_packed(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> str:
    """Whether a backend takes weights of such a shape and dtype; see Note [Limits of the backends].

    Args:
        shape: Of the weight, ``(out, in)``.
        dtype: Of the weight.
        backend: The backend.

    Returns:
        The reason why not, or an empty string.

    Example:
        >>> why_not_packed((64, 64), torch.bfloat16, "cutlass")
        ''
        >>> why_not_packed((64, 72), torch.bfloat16, "cusparselt")
        'cusparselt needs multiples of 16x16 for bfloat16'
    """
    if len(shape) != 2:
        return f"it has {len(shape)} dimensions, and both backends take 2"
    if dtype not in _MULTIPLES[backend]:
        hint = "; ask for a cast with dtype=torch.bfloat16" if dtype == torch.float32 else ""
        return f"{backend} takes no {str(dtype)[6:]} 2:4 weights{hint}"
    rows, columns = _MULTIPLES[backend][dtype]
    if shape[0] % rows or shape[1] % columns or 0 in shape:
        return f"{backend} needs multiples of {rows}x{columns} for {str(dtype)[6:]}"
    return ""


def why_no_search(backend: Backend | None, tokens: int | None) -> str:
    """Whether there is an algorithm to search for.

    Args:
        backend: The backend; None: there is none.
        tokens: What was asked for.

    Returns:
        The reason why not, or an empty string if there is, or nobody asked.

    Example:
        >>> why_no_search("cusparselt", 512), why_no_search("cutlass", None)
        ('', '')
        >>> why_no_search("cutlass", 512)
        'cutlass has one algorithm for a shape'
    """
    if tokens is None or backend == "cusparselt":
        return ""
    return "cutlass has one algorithm for a shape" if backend else "nothing is packed"


@torch.no_grad()
def to_semi_structured(model: nn.Module, dtype: torch.dtype | None = None, search: int | None = None) -> SemiStructured:
    """Give every Linear layer that holds 2:4 a weight that sparse tensor cores multiply with, in place, for inference.

    A Hugging Face ``Conv1D`` counts as one; its weight is transposed on the way. Nothing is pruned: each weight is verified
    first, and one that does not hold 2:4, or that the backend does not take, stays dense; the table says why. Such a model
    no longer trains, and cannot be saved as safetensors: keep the file it came from.
    Without a suitable device nothing is changed, and a warning says why.

    Args:
        model: Without masks, its zeros in the weights, already on its device.
        dtype: Cast the whole model to this one first, ``torch.float16`` or ``torch.bfloat16``. None: float32 stays dense.
        search: Let cuSPARSELt try its algorithms on every packed weight with so many tokens (rows of the input: batch times
            sequence) and keep the fastest. Takes about a second a layer. None: torch's default algorithm.

    Returns:
        Backend and, for every such layer, whether it was packed or why not.

    Raises:
        ConfigurationError: If the model still has masks, ``dtype`` is another one, or ``search`` is below 1.
        ArgumentTypeError: If ``search`` is no number of tokens.

    Example:
        >>> import pytest
        >>> with pytest.warns(UserWarning, match="not on a CUDA device"):
        ...     print(to_semi_structured(nn.Linear(64, 64)))
        0 of 1 Linear weights packed for no backend
          weight (64, 64) float32: dense, it is not on a CUDA device
    """
    _check_arguments(model, dtype, search)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    backend, reason = active_backend(device)
    if backend is not None and dtype is not None:
        model.to(dtype)
    no_search = why_no_search(backend, search)
    found = linear_weights(model)
    others = shared_with(model, found)
    done: dict[int, tuple[nn.Parameter | None, str, int | None]] = {}
    rows = []
    for weight in found:
        key = id(weight.parameter)
        if key not in done:
            tokens = None if no_search else search
            done[key] = _packed(weight, backend, reason, others.get(key), tokens)
        parameter, why, algorithm = done[key]
        if parameter is not None:
            use_packed(weight, parameter)
        rows.append(Packing(weight.name, tuple(weight.parameter.shape), weight.parameter.dtype, why, algorithm))
    result = SemiStructured(backend, tuple(rows), no_search)
    if not result.packed:
        first = rows[0].reason if rows else "the model has no Linear layer"
        warnings.warn(f"Expected to accelerate a layer, but got none that can be: {first}. All stay dense.", stacklevel=2)
    return result


def _check_arguments(model: nn.Module, dtype: torch.dtype | None, search: int | None) -> None:
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise ConfigurationError(f"Expected `dtype` to be None, torch.float16 or torch.bfloat16, but got {dtype!r}.")
    if search is not None and (isinstance(search, bool) or not isinstance(search, int)):
        raise ArgumentTypeError(f"Expected `search` to be a number of tokens to tune for, or None, but got {search!r}.")
    if search is not None and search < 1:
        raise ConfigurationError(f"Expected `search` >= 1 (tokens to tune for), but got {search}.")
    if nm_masks(model):
        raise ConfigurationError(
            f"Expected a model without masks, but got one with {len(nm_masks(model))}. Call `strip(model)` first, or load a "
            "file that was exported."
        )


def _packed(
    weight: LinearWeight, backend: Backend | None, reason: str, other: str | None, tokens: int | None
) -> tuple[nn.Parameter | None, str, int | None]:
    """What to multiply with, or why it stays dense; and the algorithm that was found to be the fastest."""
    if backend is None:
        return None, reason, None
    if isinstance(weight.parameter, SparseSemiStructuredTensor):
        return None, "it is packed already", None
    rows = weight.rows
    why = f"it is shared with {other!r}" if other else why_not_packed(tuple(rows.shape), rows.dtype, backend)
    why = why or _why_not_two_four(rows)
    if why:
        return None, why, None
    packed_class: Any = (
        SparseSemiStructuredTensorCUSPARSELT if backend == "cusparselt" else SparseSemiStructuredTensorCUTLASS
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor", category=UserWarning)
        try:
            packed = packed_class.from_dense(rows.contiguous())
            algorithm = None if tokens is None else _fastest(packed, tokens)
            if algorithm is not None:
                packed.alg_id_cusparselt = algorithm
            return nn.Parameter(packed, requires_grad=False), "", algorithm
        except (RuntimeError, NotImplementedError) as error:
            return None, f"{backend} refused it ({str(error).splitlines()[0]})", None


def _fastest(packed: Any, tokens: int) -> int:
    """The algorithm cuSPARSELt finds the fastest, for the very product that a Linear layer makes of the packed weight."""
    least = packed._DTYPE_SHAPE_CONSTRAINTS[packed.dtype].dense_min_rows
    padded = -(-tokens // least) * least  # torch pads to this as well
    x = torch.zeros(padded, packed.shape[1], dtype=packed.dtype, device=packed.device)
    return int(torch._cslt_sparse_mm_search(packed.packed, x.t(), transpose_result=True))


def _why_not_two_four(weight: Tensor) -> str:
    bad = find_violation(weight, _TWO_FOUR, 1)
    return "" if bad is None else f"it does not hold 2:4: {bad.nonzeros} non-zero weights in group {bad.index}"
