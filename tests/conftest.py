"""What all tests share: what torch builds anew for each export, though it is the same each time, is built once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch._export import utils as export_utils


@pytest.fixture(scope="session", autouse=True)
def _exports_share_their_tables() -> Iterator[None]:
    """Two thirds of the time of exporting a small model: its translations to ONNX, and the list of composite ops."""
    patch = pytest.MonkeyPatch()
    _keep_translations(patch)
    _keep_composite_ops(patch)
    yield
    patch.undo()


def _keep_translations(patch: pytest.MonkeyPatch) -> None:
    """Each export adds its own to a copy."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return
    build = lru_cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int) -> ONNXRegistry:
        registry = copy.copy(build(opset_version))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))


def _keep_composite_ops(patch: pytest.MonkeyPatch) -> None:
    """They are those of all operators that are registered, so as many as there are."""
    materialize = lru_cache(lambda registered: build())
    build = export_utils._materialize_cpp_cia_ops

    def counted() -> None:
        return materialize(len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")))

    patch.setattr(export_utils, "_materialize_cpp_cia_ops", counted)
