"""Methods that decide what is quantized how: graph + settings + statistics -> plan, or -> modules that train on grids.

One method of training a file: it registers itself in `training.TRAINING_QUANTIZERS` when it is imported, and every
module of the package is imported here.
"""

import importlib
import pkgutil

from qlib.quantizers.post_train_linear import layer_infos, plan_post_train_linear

__all__ = ["layer_infos", "plan_post_train_linear"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
