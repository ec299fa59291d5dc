"""The folder that Hugging Face's ``from_pretrained`` loads: our dense file beside the model's own config."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_step.errors import ConfigurationError
from lightning_step.export.files import atomic_write, check_writable
from lightning_step.export.write import Exported, export_model
from lightning_step.masked_classes import original_class
from lightning_step.targets import Targets

__all__ = ["WEIGHTS_NAME", "export_folder"]

WEIGHTS_NAME = "model.safetensors"  # what from_pretrained looks for first
_OTHERS = ("*.safetensors.index.json", "adapter_config.json")  # what it would take for the model all the same


def export_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    targets: Targets | None = None,
    one_shot: bool = False,
    info: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a Hugging Face model as an ordinary dense checkpoint with exact zeros, its config beside it.

    ``AutoModel.from_pretrained(folder)`` and every server that takes such a folder load it. The config says nothing of
    sparsity: a key that does makes some of them refuse the model. The manifest is in the header of the file.

    Args:
        model: A ``transformers.PreTrainedModel`` with masks, or, with ``targets``, one whose weights hold their zeros.
        folder: Where to. Files of other names there are left alone; save the tokenizer there too.
        targets: See `export_model`.
        one_shot: See `export_model`.
        info: See `export_model`.

    Returns:
        As from `export_model`: path of the file with the weights, manifest, size.

    Raises:
        ConfigurationError: If the model has no config of its own, the folder holds weights of another form that would be
            loaded instead, or see `export_model`.

    Example:
        >>> export_folder(nn.Linear(8, 4), "out")
        Traceback (most recent call last):
        lightning_step.errors.ConfigurationError: Expected a Hugging Face model with a `config`, but got Linear. ...
    """
    save_config = getattr(getattr(model, "config", None), "save_pretrained", None)
    if save_config is None:
        raise ConfigurationError(
            f"Expected a Hugging Face model with a `config`, but got {type(model).__name__}. Pass the model itself, not "
            "what it is wrapped in, or write any other model with `export_model`."
        )
    folder = Path(folder)
    path = check_writable(folder / WEIGHTS_NAME)
    other = sorted(each.name for pattern in _OTHERS for each in folder.glob(pattern))
    if other:
        raise ConfigurationError(
            f"Expected a folder without other weights, but got {str(folder)!r} with {other[0]!r}, which would be loaded "
            "instead. Choose another folder."
        )
    configs = _configs(model)
    exported = export_model(model, path, "dense", targets=targets, one_shot=one_shot, info=info)
    for name, text in configs.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return exported


def _configs(model: Any) -> dict[str, str]:
    """The model's config files as transformers writes them, with the class that ``from_pretrained`` would also note."""
    texts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model.config.save_pretrained(scratch)
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            model.generation_config.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            texts[file.name] = file.read_text(encoding="utf-8")
    config = json.loads(texts["config.json"])
    config["architectures"] = [original_class(model).__name__]
    config["dtype"] = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    texts["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return texts
