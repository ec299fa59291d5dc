"""Every error this package raises on purpose.

.. code-block:: text

    LightningStepError
    ├── PatternError        (ValueError)    n:m itself, or a tensor it cannot be laid over
    ├── ArgumentTypeError   (TypeError)     an argument of the wrong type
    ├── ConfigurationError  (ValueError)    arguments that contradict each other or the trainer
    ├── TargetError         (ValueError)    no tensor to mask, or a glob that matches nothing
    ├── OptimizerError      (TypeError)     an optimizer whose second moment nobody told us how to read
    ├── ResumeError         (RuntimeError)  a checkpoint of another configuration
    ├── ViolationError      (ValueError)    a tensor that does not hold its n:m pattern
    ├── ExportError         (OSError)       a file that could not be written
    └── FileFormatError     (ValueError)    a file that cannot be read back

Each is also the built-in error a caller would expect, so ``except ValueError`` keeps working.
"""

__all__ = [
    "ArgumentTypeError",
    "ConfigurationError",
    "ExportError",
    "FileFormatError",
    "LightningStepError",
    "OptimizerError",
    "PatternError",
    "ResumeError",
    "TargetError",
    "ViolationError",
]


class LightningStepError(Exception):
    """Base of every error raised on purpose by this package.

    Example:
        >>> issubclass(PatternError, LightningStepError)
        True
    """


class PatternError(LightningStepError, ValueError):
    """An n:m pattern that does not exist, or a tensor it cannot be laid over.

    Example:
        >>> from lightning_step import NMPattern
        >>> NMPattern(5, 4)
        Traceback (most recent call last):
        lightning_step.errors.PatternError: Expected 1 <= n <= m, but got n=5 and m=4. n is the number of weights KEPT ...
    """


class ArgumentTypeError(LightningStepError, TypeError):
    """An argument of the wrong type.

    Example:
        >>> from lightning_step import NMPattern
        >>> NMPattern("2:4", 4)
        Traceback (most recent call last):
        lightning_step.errors.ArgumentTypeError: Expected `n` to be an integer, but got '2:4' of type str. ...
    """


class ConfigurationError(LightningStepError, ValueError):
    """Arguments that contradict each other, or that the trainer cannot serve.

    Example:
        >>> from lightning_step import AutoSwitch
        >>> AutoSwitch(t_min=0.6, t_max=0.5)
        Traceback (most recent call last):
        lightning_step.errors.ConfigurationError: Expected `t_min` <= `t_max`, but got t_min=0.6 and t_max=0.5. ...
    """


class TargetError(LightningStepError, ValueError):
    """No tensor to mask, or a glob that matches nothing.

    Example:
        >>> import torch
        >>> from lightning_step import NMPattern, find_targets
        >>> find_targets(torch.nn.Linear(8, 8), NMPattern(2, 4), exclude=["heda"])
        Traceback (most recent call last):
        lightning_step.errors.TargetError: Expected every glob of `exclude` to match a module or a tensor, ...
    """


class OptimizerError(LightningStepError, TypeError):
    """An optimizer whose second moment no adapter knows how to read.

    Example:
        >>> import torch
        >>> from lightning_step.optim import adapter_for
        >>> adapter_for(torch.optim.SGD(torch.nn.Linear(8, 8).parameters(), lr=0.1))
        Traceback (most recent call last):
        lightning_step.errors.OptimizerError: Expected an optimizer with a registered second-moment adapter ...
    """


class ResumeError(LightningStepError, RuntimeError):
    """A checkpoint written under another pattern or recipe, or one whose parts do not fit together.

    Example:
        >>> raise ResumeError("Expected the checkpoint's pattern 2:4, but got 1:4.")
        Traceback (most recent call last):
        lightning_step.errors.ResumeError: Expected the checkpoint's pattern 2:4, but got 1:4.
    """


class ViolationError(LightningStepError, ValueError):
    """A tensor that does not hold its n:m pattern; export verifies, it never prunes.

    Example:
        >>> import torch
        >>> from lightning_step import NMPattern
        >>> from lightning_step.functional import pack_nm
        >>> pack_nm(torch.ones(1, 4), NMPattern(2, 4))
        Traceback (most recent call last):
        lightning_step.errors.ViolationError: Expected at most 2 non-zero weights in every group of 4 ...
    """


class ExportError(LightningStepError, OSError):
    """A file that could not be written, for instance on a full disk; neither the old file nor the model was touched.

    Example:
        >>> raise ExportError("Expected to write 'model.safetensors', but got: No space left on device.")
        Traceback (most recent call last):
        lightning_step.errors.ExportError: Expected to write 'model.safetensors', but got: No space left on device.
    """


class FileFormatError(LightningStepError, ValueError):
    """A file that is truncated, is not ours, or belongs to another model.

    Example:
        >>> from lightning_step import load_sparse
        >>> load_sparse("/nonexistent/model.safetensors")
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a readable file at `path`, but got '/nonexistent/model...
    """
