"""The flags of post-training quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qlib.config.flags.flag import Flag, Ignored, Need, Use, shared
from qlib.config.flags.groups import IMPLICIT_CALIBRATION
from qlib.config.flags.kinds import SWITCH, choice, existing_file, fraction, names, real, schedule_file, whole
from qlib.config.flags.rows.common import HANDS_OVER
from qlib.config.flags.verb import Verb
from qlib.config.layers.keys import SCALES
from qlib.quant.clip_names import CLIP_NAMES, CLIP_PARAMETERS, HISTOGRAM_CLIPS, WEIGHT_CLIPS
from qlib.quant.spec import MODES

__all__ = ["GROUPS"]

_QUANTIZING = Need(("--quantize-eval",), also=("--check", "--sense quant"))
_COLLECTING = Need(("--qe-calibration", "--quantize-eval"), also=("--sense quant", "--auto", "--check", "--compress"))
_REPLACED = Ignored("is ignored: {qe.config_file} (--qe-config-file) replaces it", by=("--qe-config-file",))
_CHOSEN = Ignored("is ignored: --sense-bits tells which are tried", by=("--sense",))
_RANGES_GIVEN = ("--qe-stats-file", "--qe-dynamic", "--qe-config-file")

GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "Post-training quantization": (
        Flag(
            "--quantize-eval --qe",
            SWITCH,
            "quantize the model, then evaluate it; implies --evaluate",
            use=Use((*HANDS_OVER.verbs, Verb.CHECK)),
        ),
        Flag(
            "--seeds",
            whole(1, 1000),
            "times to quantize and evaluate, each with calibration images of its own: prints mean, lowest and highest",
            use=HANDS_OVER,
            needs=(Need(("--quantize-eval",)),),
            ignored=(Ignored("is ignored: with {by} no images are drawn for calibration", by=_RANGES_GIVEN),),
        ),
        Flag(
            "--qe-calibration",
            fraction(),
            f"collect activation statistics on this fraction of the split (default: {IMPLICIT_CALIBRATION})",
        ),
        Flag(
            "--qe-calibration-split",
            choice(("train", "val", "test")),
            "split that calibration reads",
            needs=(_COLLECTING,),
            ignored=(Ignored("is ignored: with {by} no images are read for calibration", by=_RANGES_GIVEN),),
        ),
        Flag(
            "--qe-histograms",
            SWITCH,
            f"collect histograms too, which {', '.join(HISTOGRAM_CLIPS)} need (collected without being asked where"
            " --quantize-eval calibrates for them)",
            needs=(_COLLECTING,),
            ignored=(Ignored("is ignored: with {by} no statistics are collected", by=_RANGES_GIVEN),),
        ),
        Flag(
            "--qe-stats-file",
            existing_file(),
            "activation statistics collected earlier, or a layer_quant_params.yaml",
            needs=(_QUANTIZING,),
        ),
        Flag("--qe-dynamic", SWITCH, "take activation ranges from each batch", needs=(_QUANTIZING,)),
        Flag(
            "--qe-config-file",
            schedule_file(),
            "quantization settings from YAML; replaces the flags below",
            needs=(_QUANTIZING,),
        ),
        *shared(
            (
                Flag("--qe-mode --qem", choice(MODES), "mode of activations and weights"),
                Flag("--qe-mode-acts --qema", choice(MODES), "mode of activations (default: --qe-mode)"),
                Flag("--qe-mode-wts --qemw", choice(MODES), "mode of weights (default: --qe-mode)"),
                Flag(
                    "--qe-bits-acts --qeba",
                    whole(2, 16, zero="left in float"),
                    "bits of activations, 0 for float",
                    ignored=(replace(_CHOSEN, unless=("--qe-bits-acts 0",)),),
                ),
                Flag(
                    "--qe-bits-wts --qebw",
                    whole(2, 16, zero="left in float"),
                    "bits of weights, 0 for float",
                    ignored=(replace(_CHOSEN, unless=("--qe-bits-wts 0",)),),
                ),
                Flag("--qe-bits-accum", whole(2, 32), "bits of the accumulator"),
                Flag("--qe-clip-acts --qeca", choice(CLIP_NAMES), "how the range of activations is clipped"),
                *(
                    Flag(each.flag, real(each.interval, metavar=each.metavar), each.help)
                    for each in CLIP_PARAMETERS.values()
                ),
                Flag("--qe-clip-wts", choice(WEIGHT_CLIPS), "how the ranges of weights are clipped"),
                Flag(
                    "--qe-scale",
                    choice(SCALES),
                    "scales are any numbers, or powers of two, so that codes are only shifted",
                ),
                Flag("--qe-no-clip-layers --qencl", names(), "layers (names or regular expressions) not to clip"),
                Flag(
                    "--qe-no-quant-layers --qenql", names(), "layers (names or regular expressions) to leave in float"
                ),
                Flag("--qe-per-channel --qepc", SWITCH, "a scale for each output channel of the weights"),
                Flag(
                    "--qe-scale-approx-bits --qesab",
                    whole(1, 31),
                    "requantize with an integer multiplier of so many bits and a shift",
                ),
            ),
            needs=(_QUANTIZING,),
            ignored=(_REPLACED,),
        ),
        Flag(
            "--qe-reduce-range",
            choice(("none", "auto", "all")),
            "weights of 7 bits, which cannot saturate on x86 without VNNI: nowhere, where 8 bits did on calibration"
            " images, everywhere",
            needs=(_QUANTIZING,),
        ),
        Flag(
            "--qe-save-fp-weights",
            SWITCH,
            "keep the float weights in the quantized model",
            use=HANDS_OVER,
            needs=(_QUANTIZING,),
            ignored=(_REPLACED,),
        ),
        Flag(
            "--qe-convert-pytorch --qept",
            SWITCH,
            "accepted: stands for the integer model of this program, which is made anyway",
            needs=(Need(("--quantize-eval",), also=("--resume-from", "--resume")),),
            ignored=(
                Ignored(
                    "stands for the integer model of this program, which is evaluated and saved anyway: PyTorch is"
                    " removing its own quantized modules; --export-onnx writes one for ONNX Runtime"
                ),
            ),
        ),
        Flag(
            "--qe-pytorch-backend",
            choice(("fbgemm", "qnnpack")),
            "backend of PyTorch's own quantized modules",
            ignored=(Ignored("is ignored: it chooses how to convert to PyTorch's own quantized modules"),),
        ),
    ),
}
