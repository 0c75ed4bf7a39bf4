"""How flags are spelt."""

from __future__ import annotations

__all__ = ["flag_of"]


def flag_of(setting: str) -> str:
    """The flag of a setting of a group with a prefix.

    >>> flag_of("ptq.bias_correction")
    '--ptq-bias-correction'
    """
    return "--" + setting.replace(".", "-").replace("_", "-")
