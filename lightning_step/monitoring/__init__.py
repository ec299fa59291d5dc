r"""What is logged of masks and second moments while a model trains.

Tags begin with ``sparsity/``, or with ``sparsity/0/``, ``sparsity/1/`` and so on where several optimizers hold masked
tensors. What is sampled or measured is logged only once it is known.

| scalar | meaning |
| --- | --- |
| `phase` | 1 while the model trains dense, 2 with masks on |
| `variance_change` | Z, the newest sample of how much v moves in one step; until v freezes |
| `window_mean` | what the switch compares, the mean of Z over a full window; until v freezes |
| `threshold` | what it is compared with; until v freezes |
| `ratio` | `window_mean` / `threshold`; until v freezes |
| `v_l1` | sum of v over all masked tensors; once frozen, of the v that the preconditioner was made of |
| `v_l2` | root of the sum of squares of the same |
| `v_near_zero` | share of coordinates with sqrt(v / (1 - beta2^t)) <= eps, where Adam divides by eps; until v freezes |
| `flip_rate` | share of mask entries that changed in the optimizer step measured last; with masks on |
| `density` | share of weights that the masks in force keep; 1 while dense |
| `kept_magnitude` | share of the sum of \|w\| that the masks keep, or would keep while the model is dense |
| `lr` | learning rate of the first parameter group with a masked tensor, for the next step |
| `log10/variance_change` | decimal logarithm of the same; TensorBoard only |
| `log10/window_mean` | decimal logarithm of the same; TensorBoard only |
| `log10/threshold` | decimal logarithm of the same; TensorBoard only |
| `log10/switch` | two points, right before and at the step of a switch, over the height of the curves; TensorBoard only |
| `layer/NAME/flip_rate` | of one masked tensor; with `per_layer` |
| `layer/NAME/kept_magnitude` | of one masked tensor; with `per_layer` |
| `layer/NAME/v_l1` | of one masked tensor; with `per_layer` |
| `layer/NAME/v_l2` | of one masked tensor; with `per_layer` |

The norms and ``v_near_zero`` are there for every optimizer whose second moment can be read, under every recipe.
"""

from lightning_step.monitoring.monitor import Monitor
from lightning_step.monitoring.options import MonitorOptions, check_interval

__all__ = ["Monitor", "MonitorOptions", "check_interval"]
