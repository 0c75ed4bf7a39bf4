"""Clip methods: from the statistics of a tensor to the range of values that its grid covers.

One method a file, which registers it in `CLIP_METHODS` by its name in YAML. `order` of a registration is that in which
`auto` prefers methods whose errors differ by little: simple ones first.
"""

from qlib.clip._base import CLIP_METHODS, ClipContext, ClipMethod
from qlib.clip.auto import choose

__all__ = ["CLIP_METHODS", "ClipContext", "ClipMethod", "choose"]
