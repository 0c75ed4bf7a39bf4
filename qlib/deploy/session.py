"""ONNX Runtime sessions on the CPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlib.deploy.export import INPUT
from qlib.system import unwritable

if TYPE_CHECKING:
    import onnxruntime as ort

_UNWRITTEN = re.compile("serialization failed|[Nn]o space|[Rr]ead-only")

__all__ = ["open_session", "run_session"]


def open_session(
    model: Path | bytes, *, exact: bool = True, threads: int | None = None, optimized: Path | None = None
) -> ort.InferenceSession:
    """A session on a file or a serialized model.

    `threads`: as many as torch uses where None. `optimized`: where to save the graph that really runs.
    `exact`: on x86 without VNNI, int8 weights become uint8, whose products are added without saturation; elsewhere it
    changes nothing. Raises OutputError where the graph cannot be saved.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = model if isinstance(model, bytes) else str(model).encode().decode()  # it takes names in UTF-8 alone
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class and no number in common
        if optimized is not None and _UNWRITTEN.search(str(error)):
            raise unwritable("temporary file", optimized, OSError("it was not taken whole")) from error
        raise


def run_session(session: ort.InferenceSession, images: Tensor, names: Sequence[str] | None = None) -> list[Tensor]:
    """The outputs called `names` (all where None) for a batch of images."""
    outputs = session.run(list(names) if names is not None else None, {INPUT: images.cpu().numpy()})
    return [torch.from_numpy(value) for value in outputs]
