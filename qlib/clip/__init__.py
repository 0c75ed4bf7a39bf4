"""Clip methods: from the statistics of a tensor to the range of values that its codes cover.

One method a file: a module of this package registers its methods in `CLIP_METHODS` when it is imported, and every
module of the package is imported here.
"""

import importlib
import pkgutil

from qlib.clip.auto import choose
from qlib.clip.base import CLIP_METHODS, ClipContext, ClipMethod

__all__ = ["CLIP_METHODS", "ClipContext", "ClipMethod", "choose"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
