"""Names of modules as the plain model has them, whatever it is wrapped in.

Note [Wrappers]
    ``torch.compile(module)`` and activation checkpoint wrappers keep the module they wrap as a child, so its name becomes
    ``net._orig_mod.fc``. Globs, tables, resume states and exported files all speak of ``net.fc``: a run that is compiled
    and one that is not know their tensors by the same names.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["named_modules", "plain_name", "submodule"]

# Children that hold all there is: of torch.compile's OptimizedModule and of torch's CheckpointWrapper.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A name without the wrappers in it.

    Args:
        name: The dotted name of a module or tensor.

    Returns:
        Its name in the plain model.

    Example:
        >>> plain_name("net._orig_mod.fc.weight")
        'net.fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name that the state dict knows it by, wrappers left out.

    Args:
        model: Any module.

    Yields:
        Plain name and module, in the model's order. A module that is registered twice comes twice.

    Example:
        >>> import torch
        >>> fc = nn.Linear(4, 4)
        >>> [name for name, _ in named_modules(nn.ModuleDict({"one": fc, "two": torch.compile(fc, backend="eager")}))]
        ['', 'one', 'two']
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if _inside(module) is None:
            yield plain_name(name), module


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a plain name.

    Args:
        model: Any module.
        name: From `named_modules`; wrappers pass attributes on, so it is found through them.

    Returns:
        The module itself, out of its wrappers.

    Example:
        >>> import torch
        >>> submodule(nn.ModuleDict({"fc": torch.compile(nn.Linear(4, 4), backend="eager")}), "fc")
        Linear(in_features=4, out_features=4, bias=True)
    """
    module = model.get_submodule(name)
    while (inside := _inside(module)) is not None:
        module = inside
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    return next((module._modules[child] for child in _WRAPPED if child in module._modules), None)
