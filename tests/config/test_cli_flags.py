"""The command line: every spelling, right and wrong values with their sentences, and what follows from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import qlib.app
from qlib.cli import build_parser, main, parse
from qlib.config.flags.absent import why_absent
from qlib.config.flags.checks import startup_warnings
from qlib.config.flags.corrections import ROUNDINGS
from qlib.config.flags.run_config import RunConfig, settings_by_name
from qlib.config.flags.table import FLAGS
from qlib.config.flags.verb import Verb, asked, needs_folder, verb_of
from qlib.errors import ConfigError, ModelError, UsageError
from qlib.quant.clip_names import WEIGHT_CLIPS

IN_RUN = Path("run-folder")

SPELLINGS = """
-h --help
--name -n --out-dir -o --no-report --print-freq -p --verbose -v --gpus --cpu --load-serialized --seed
--deterministic --det
--summary --check
--run-config
--arch -a --pretrained --resume-from --resume --exp-load-weights-from --thinnify
--dataset --workers -j --batch-size -b --validation-split --valid-size --vs --effective-train-size --etrs
--effective-valid-size --evs --effective-test-size --etes --skip-corrupt
--evaluate -e --confusion --compare --activation-stats --act-stats --activation-histograms --act-hist --param-hist
--masks-sparsity --compare-to --engine
--compress --epochs --optimizer --lr --learning-rate --momentum --weight-decay --wd --label-smoothing --grad-clip --amp
--reset-optimizer --best-by --num-best-scores --save-untrained-model --save-every
--kd-teacher --kd-pretrained --kd-resume --kd-temperature --kd-temp --kd-distill-wt --kd-dw --kd-student-wt --kd-sw
--kd-teacher-wt --kd-tw --kd-start-epoch
--prune --prune-level --prune-pattern --prune-budget --prune-round-to --prune-scope --prune-layers --prune-repair
--prune-images --prune-steps
--quantize-eval --qe --seeds --qe-calibration --qe-calibration-split --qe-histograms --qe-stats-file --qe-dynamic
--qe-config-file
--qe-mode --qem --qe-mode-acts --qema --qe-mode-wts --qemw --qe-bits-acts --qeba --qe-bits-wts --qebw --qe-bits-accum
--qe-clip-acts --qeca --qe-clip-n-stds --qe-clip-percentile --qe-clip-p --qe-clip-wts --qe-scale
--qe-no-clip-layers --qencl --qe-no-quant-layers --qenql --qe-per-channel --qepc
--qe-scale-approx-bits --qesab --qe-reduce-range --qe-save-fp-weights --qe-convert-pytorch --qept
--qe-pytorch-backend
--ptq-equalize --ptq-absorb-bias --ptq-smooth --ptq-data-free --ptq-rounding --ptq-bn-reestimation --ptq-bias-correction
--ptq-images --ptq-iterations
--auto --auto-agree --auto-drop --auto-minutes --auto-bits
--qe-budget --qe-bits-choices
--qe-lapq --qe-coordinate-search --lapq-maxiter --lapq-maxfev --lapq-method --lapq-basinhopping --lapq-bh
--lapq-basinhopping-niter --lapq-bh-niter --lapq-init-mode --lapq-init-method --lapq-eval-size --lapq-images
--lapq-eval-memoize-dataloader --lapq-search-clipping
--sense --sense-range --sense-bits --sense-images
--export-onnx --export-opset --export-encodings --verify
"""


@pytest.fixture(autouse=True)
def _folder_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("s.yaml", "q.yaml", "m.pth.tar"):
        Path(file).touch()
    for folder in ("images", "features"):
        Path(folder).mkdir()


def _get(config: RunConfig, name: str) -> object:
    return settings_by_name(config)[name]


def _parse(words: str) -> RunConfig:
    return parse(words.split())


def test_the_flags_are_frozen() -> None:
    """People's scripts depend on these: add to the list, take nothing away."""
    actions = build_parser()._actions
    assert [name for action in actions for name in action.option_strings] == SPELLINGS.split()


def test_each_flag_sets_a_field_of_its_own() -> None:
    targets = [flag.target for flag in FLAGS if flag.name != "--resume"]
    assert len(set(targets)) == len(targets)
    for target in targets:
        _get(RunConfig(), target)


def test_help_and_parsing_import_nothing_heavy() -> None:
    program = (
        "import sys, qlib.cli as c; c.parse(['-a', 'digits_cnn', '-e']); c.build_parser().format_help(); "
        "print(sorted({'torch', 'numpy', 'scipy', 'sklearn', 'torchvision'} & set(sys.modules)))"
    )
    root = Path(qlib.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_each_flag_but_the_deprecated_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [flag.name for flag in FLAGS if f"{flag.name}" not in text.replace("--resume-from", "")] == [
        "--resume-from",
        "--resume",
    ]
    assert "(default: 256)" in text
    assert "--seed N              seed of all that is random (default: 0)" in text


RIGHT = [
    ("-a ResNet18", "arch", "resnet18"),
    ("-a My/Net.py:Make", "arch", "My/Net.py:Make"),
    ("-j 0", "workers", 0),
    ("-b 1", "batch_size", 1),
    ("-b 1 -b 2", "batch_size", 2),
    ("--no-report", "no_report", True),
    ("-p 3", "print_freq", 3),
    ("--prune OBS --prune-level 0.5", "prune.method", "obs"),
    ("--prune-level 0.5", "prune.level", 0.5),
    ("--prune-pattern 2:4", "prune.pattern", "2:4"),
    ("--prune-budget macs=0.5", "prune.budget", "macs=0.5"),
    ("--prune-budget params=2MB", "prune.budget", "params=2mb"),
    ("--prune-round-to 8", "prune.round_to", 8),
    ("--prune-scope row", "prune.scope", "row"),
    ("--prune-layers conv fc", "prune.layers", ("conv", "fc")),
    ("--prune-repair norms", "prune.repair", "norms"),
    ("--prune-images 7", "prune.images", 7),
    ("--prune-steps 3", "prune.steps", 3),
    ("--compress s.yaml", "train.compress", Path("s.yaml")),
    ("--epochs 3", "train.epochs", 3),
    ("--optimizer AdamW", "train.optimizer", "adamw"),
    ("--learning-rate 0.5", "train.lr", 0.5),
    ("--momentum 0", "train.momentum", 0.0),
    ("--wd 0", "train.weight_decay", 0.0),
    ("--label-smoothing 0.1", "train.label_smoothing", 0.1),
    ("--grad-clip 5", "train.grad_clip", 5.0),
    ("--amp", "train.amp", True),
    ("--reset-optimizer", "train.reset_optimizer", True),
    ("--best-by sparsity", "train.best_by", "sparsity"),
    ("--num-best-scores 3", "train.num_best_scores", 3),
    ("--save-untrained-model", "save_untrained_model", True),
    ("--save-every 0", "train.save_every", 0.0),
    ("--kd-teacher ResNet18", "kd.teacher", "resnet18"),
    ("--kd-teacher My/Net.py:Make", "kd.teacher", "My/Net.py:Make"),
    ("--kd-pretrained", "kd.pretrained", True),
    ("--kd-resume m.pth.tar", "kd.resume", Path("m.pth.tar")),
    ("--kd-temp 4", "kd.temperature", 4.0),
    ("--kd-dw 0.7", "kd.distill_wt", 0.7),
    ("--kd-sw 0.3", "kd.student_wt", 0.3),
    ("--kd-tw 0", "kd.teacher_wt", 0.0),
    ("--kd-start-epoch 2", "kd.start_epoch", 2),
    ("-v", "verbose", True),
    ("--gpus 0,2", "gpus", (0, 2)),
    ("--cpu", "cpu", True),
    ("--load-serialized", "load_serialized", True),
    ("--seed 7", "seed", 7),
    ("--det", "deterministic", True),
    ("-n first -o out", "name", "first"),
    ("-o out", "out_dir", Path("out")),
    ("-o ~/out", "out_dir", Path.home() / "out"),
    ("--vs 0", "validation_split", 0.0),
    ("--etes 0.5", "effective_test_size", 0.5),
    ("--dataset Fashion-MNIST", "dataset", "fashion-mnist"),
    ("--summary Compute --summary model", "summary", ("compute", "model")),
    ("--summary compute,model", "summary", ("compute", "model")),
    ("--check", "check", True),
    ("--skip-corrupt", "skip_corrupt", True),
    ("--resume-from m.pth.tar", "resume_from", Path("m.pth.tar")),
    ("--resume m.pth.tar", "resume_from", Path("m.pth.tar")),
    ("--resume=m.pth.tar", "train.reset_optimizer", True),
    ("--exp-load-weights-from m.pth.tar", "exp_load_weights_from", Path("m.pth.tar")),
    ("--thinnify", "thinnify", True),
    ("--qe", "quantize_eval", True),
    ("--quantize-eval", "evaluate", True),
    ("--qem ASYM_U", "qe.mode", "asym_u"),
    ("--qema sym_restr", "qe.mode_acts", "sym_restr"),
    ("--qemw asym_s", "qe.mode_wts", "asym_s"),
    ("--qeba 0", "qe.bits_acts", 0),
    ("--qebw 16", "qe.bits_wts", 16),
    ("--qe-bits-accum 16", "qe.bits_accum", 16),
    ("--qeca LaPlace", "qe.clip_acts", "laplace"),
    ("--qeca n_std --qe-clip-n-stds 2", "qe.clip_n_stds", 2.0),
    ("--qe-histograms", "qe.histograms", True),
    ("--qeca KL", "qe.clip_acts", "kl"),
    ("--qeca percentile --qe-clip-percentile 99.9", "qe.clip_percentile", 99.9),
    ("--qeca lp --qe-clip-p 3.5", "qe.clip_p", 3.5),
    ("--qe-clip-wts MSE", "qe.clip_wts", "mse"),
    ("--qe-scale Pow2", "qe.scale", "pow2"),
    ("--qencl conv1,fc", "qe.no_clip_layers", ("conv1", "fc")),
    ("--qencl conv1 --qencl fc", "qe.no_clip_layers", ("conv1", "fc")),
    ("--qenql layer[1,2].{1,3}", "qe.no_quant_layers", ("layer[1,2].{1,3}",)),
    ("--qepc", "qe.per_channel", True),
    ("--qesab 8", "qe.scale_approx_bits", 8),
    ("--qe-save-fp-weights", "qe.save_fp_weights", True),
    ("--qept", "qe.convert_pytorch", True),
    ("--qe-pytorch-backend qnnpack", "qe.pytorch_backend", "qnnpack"),
    ("--qe-calibration 1", "qe.calibration", 1.0),
    ("--qe-calibration-split VAL", "qe.calibration_split", "val"),
    ("--qe-stats-file s.yaml", "qe.stats_file", Path("s.yaml")),
    ("--qe-dynamic", "qe.dynamic", True),
    ("--qe-config-file q.yaml", "qe.config_file", Path("q.yaml")),
    ("--ptq-equalize", "ptq.equalize", True),
    ("--ptq-absorb-bias", "ptq.absorb_bias", True),
    ("--ptq-smooth 0.5", "ptq.smooth", 0.5),
    ("--ptq-data-free", "ptq.data_free", True),
    ("--ptq-rounding QDrop", "ptq.rounding", "qdrop"),
    ("--ptq-bn-reestimation", "ptq.bn_reestimation", True),
    ("--ptq-bias-correction Empirical", "ptq.bias_correction", "empirical"),
    ("--ptq-images 64", "ptq.images", 64),
    ("--ptq-iterations 20", "ptq.iterations", 20),
    ("--qe --qe-budget 3.20mb", "qe.budget", "3.2MB"),
    ("--qe --qe-budget 4.5Bits --qe-bits-choices 8,2,4", "qe.bits_choices", (2, 4, 8)),
    ("--qe --qe-lapq", "qe.lapq", True),
    ("--qe --qe-coordinate-search", "qe.lapq", True),
    ("--lapq-maxiter 3", "lapq.maxiter", 3),
    ("--lapq-maxfev 300", "lapq.maxfev", 300),
    ("--lapq-method Nelder-Mead", "lapq.method", "nelder-mead"),
    ("--lapq-basinhopping", "lapq.basinhopping", True),
    ("--lapq-bh --lapq-bh-niter 7", "lapq.basinhopping_niter", 7),
    ("--lapq-init-mode L2", "lapq.init_mode", "l2"),
    ("--lapq-init-method COBYLA", "lapq.init_method", "cobyla"),
    ("--lapq-eval-size 0.1", "lapq.eval_size", 0.1),
    ("--lapq-images 64", "lapq.images", 64),
    ("--lapq-eval-memoize-dataloader", "lapq.eval_memoize_dataloader", True),
    ("--lapq-search-clipping", "lapq.search_clipping", True),
    ("--sense Quant", "sense", "quant"),
    ("--act-stats train Test", "activation_stats", ("train", "test")),
    ("--activation-stats valid,test --act-stats train", "activation_stats", ("valid", "test", "train")),
    ("--act-hist 0.1", "activation_histograms", 0.1),
    ("--param-hist", "param_hist", True),
    ("--masks-sparsity", "masks_sparsity", True),
    ("--sense Filter", "sense", "filter"),
    ("--sense element --sense-range 0 0.5 .1", "sense_range", (0.0, 0.5, 0.1)),
    ("--sense channel --sense-ra 0.5 1 0.25", "sense_range", (0.5, 1.0, 0.25)),
    ("--sense quant --sense-bits 4,8", "sense_bits", (4, 8)),
    ("--sense-images 16", "sense_images", 16),
    ("--auto", "automatic", True),
    ("--auto", "quantize_eval", True),
    ("--auto --auto-agree 98", "auto.agree", 98.0),
    ("--auto --auto-drop 0.5", "auto.drop", 0.5),
    ("--auto --auto-minutes 1", "auto.minutes", 1.0),
    ("--auto --auto-bits 4", "auto.bits", 4),
    ("--compare-to images", "compare_to", Path("images")),
    ("--compare images features", "compare", (Path("images"), Path("features"))),
    ("--qe --seeds 3", "seeds", 3),
    ("--engine OnnxRuntime", "engine", "onnxruntime"),
    ("--engine torch", "engine", "torch"),
    ("--qe-reduce-range AUTO", "qe.reduce_range", "auto"),
    ("--export-onnx", "export_onnx", IN_RUN),
    ("--export-onnx run-folder", "export_onnx", IN_RUN),
    ("--export-onnx m.onnx", "export_onnx", Path("m.onnx")),
    ("--export-onnx=features/m.onnx", "export_onnx", Path("features/m.onnx")),
    ("--export-opset 18", "export_opset", 18),
    ("--qe --export-encodings ort", "export_encodings", ("ort",)),
    ("--qe --export-encodings AIMET --export-encodings tensorrt", "export_encodings", ("aimet", "tensorrt")),
    ("--qe --verify", "verify", 64),
    ("--qe --veri", "verify", 64),
    ("--batch 3", "batch_size", 3),
    ("--batch=3", "batch_size", 3),
    ("--gpu 1", "gpus", (1,)),
    ("--quant --qe-stat s.yaml", "qe.stats_file", Path("s.yaml")),
    ("--valid 0.2", "validation_split", 0.2),
    ("--qe --verify 1", "verify", 1),
    ("--qe --verify=1000", "verify", 1000),
    ("--resume-from m.pth.tar --verify 5 --verify", "verify", 64),
]


@pytest.mark.parametrize(("words", "field", "expected"), RIGHT, ids=[row[0] for row in RIGHT])
def test_right_values(words: str, field: str, expected: object) -> None:
    assert _get(parse(["images", "-e", *words.split()]), field) == expected
    assert _get(parse([*words.split(), "-e", "images"]), field) == expected


def test_every_spelling_is_covered() -> None:
    used = {word.partition("=")[0] for words, _, _ in RIGHT for word in words.split()}
    canonical = {name: flag.name for flag in FLAGS for name in flag.names}
    untested = {flag.name for flag in FLAGS} - {canonical[word] for word in used if word in canonical}
    assert untested == {"--pretrained", "--evaluate", "--confusion", "--effective-train-size", "--effective-valid-size"}


BITS = "0 (left in float) or a whole number from 2 to 16"
NEW_FILE = "a file to write that ends in .onnx, in a folder that exists and can be written"
FRACTION = "a fraction above 0 and at most 1, such as 0.05 for 5 %"
BUDGET = "a number above 0 with its unit: 3.2MB of weights, 4.5bits for each weight, or 12GBOPs"
RANGE = "three numbers, START below STOP from 0 to 1 and a STEP from 0.001, such as 0 0.95 0.05"
WIDTHS = "different whole numbers from 2 to 16 with commas between them, such as 2,3,4,8"
WRONG = [
    ("-b 0", "--batch-size '0' is not allowed: it must be a whole number, 1 or more"),
    ("-b many", "--batch-size 'many' is not allowed: it must be a whole number, 1 or more"),
    ("-j -1", "--workers '-1' is not allowed: it must be a whole number, 0 or more"),
    ("-p 0", "--print-freq '0' is not allowed: it must be a whole number, 1 or more"),
    ("--epochs 0", "--epochs '0' is not allowed: it must be a whole number, 1 or more"),
    ("--lr 0", "--lr '0' is not allowed: it must be a number above 0"),
    ("--wd -1", "--weight-decay '-1' is not allowed: it must be a number from 0"),
    ("--momentum 1", "--momentum '1' is not allowed: it must be a number from 0 to below 1"),
    ("--label-smoothing 1", "--label-smoothing '1' is not allowed: it must be a number from 0 to below 1"),
    ("--optimizer rmsprop", "--optimizer 'rmsprop' is not allowed: it must be one of sgd, adam, adamw"),
    ("--kd-temp 0", "--kd-temperature '0' is not allowed: it must be a number above 0"),
    ("--kd-start-epoch -1", "--kd-start-epoch '-1' is not allowed: it must be a whole number, 0 or more"),
    ("--seed -1", "--seed '-1' is not allowed: it must be a whole number from 0 to 4294967295"),
    (
        "--gpus 0,0",
        "--gpus '0,0' is not allowed: it must be different device numbers with commas between them, such as 0 or 0,1",
    ),
    ("--vs 1", "--validation-split '1' is not allowed: it must be a fraction from 0 to below 1"),
    ("--etrs 0", f"--effective-train-size '0' is not allowed: it must be {FRACTION}"),
    ("--evs nan", f"--effective-valid-size 'nan' is not allowed: it must be {FRACTION}"),
    ("--qe-calibration 5", f"--qe-calibration '5' is not allowed: it must be {FRACTION}"),
    ("--qeba 1", f"--qe-bits-acts '1' is not allowed: it must be {BITS}"),
    ("--qebw 33", f"--qe-bits-wts '33' is not allowed: it must be {BITS}"),
    ("--qe-bits-accum 33", "--qe-bits-accum '33' is not allowed: it must be a whole number from 2 to 32"),
    ("--qesab 0", "--qe-scale-approx-bits '0' is not allowed: it must be a whole number from 1 to 31"),
    ("--qe-clip-n-stds 0", "--qe-clip-n-stds '0' is not allowed: it must be a number above 0"),
    (
        "--qe-clip-percentile 50",
        "--qe-clip-percentile '50' is not allowed: it must be a number above 50 and at most 100",
    ),
    ("--qe-clip-p 5", "--qe-clip-p '5' is not allowed: it must be a number from 1 to 4"),
    (
        "--qe-clip-wts avg",
        f"--qe-clip-wts 'avg' is not allowed: it must be one of {', '.join(WEIGHT_CLIPS)}",
    ),
    ("--qe-scale pow", "--qe-scale 'pow' is not allowed: it must be one of float, pow2; did you mean pow2?"),
    ("--qe-clip-n-stds inf", "--qe-clip-n-stds 'inf' is not allowed: it must be a number above 0"),
    ("--ptq-smooth 1.5", "--ptq-smooth '1.5' is not allowed: it must be a number from 0 to 1"),
    ("--ptq-images 0", "--ptq-images '0' is not allowed: it must be a whole number, 1 or more"),
    (
        "--ptq-rounding brec",
        f"--ptq-rounding 'brec' is not allowed: it must be one of {', '.join(ROUNDINGS)}; did you mean brecq?",
    ),
    ("--qe --qe-budget 3", f"--qe-budget '3' is not allowed: it must be {BUDGET}"),
    ("--qe --qe-budget 0MB", f"--qe-budget '0MB' is not allowed: it must be {BUDGET}"),
    (
        "--qe --qe-budget -1bits",
        "--qe-budget needs a number above 0 with its unit: 3.2MB of weights, 4.5bits for each weight, or 12GBOPs",
    ),
    ("--cpu=yes", "--cpu takes no value, but 'yes' was given; write --cpu alone"),
    ("--export-encodings=", "--export-encodings '' is not allowed: it must be one of ort, tensorrt, aimet"),
    ("--arch=", "--arch '' is not allowed: it must be a model's name"),
    ("--compare-to=", "--compare-to '' is not allowed: it must be the folder of a run, which exists"),
    ("--qe --qe-budget 4kbits", f"--qe-budget '4kbits' is not allowed: it must be {BUDGET}"),
    (
        "--auto --auto-agree 101",
        "--auto-agree '101' is not allowed: it must be a number above 0 and at most 100, in percent",
    ),
    ("--auto --auto-drop -1", "--auto-drop '-1' is not allowed: it must be a number from 0 to 100, in points of Top1"),
    ("--auto --auto-minutes 0", "--auto-minutes '0' is not allowed: it must be a number above 0"),
    ("--auto --auto-bits 1", "--auto-bits '1' is not allowed: it must be a whole number from 2 to 16"),
    (
        "--auto --qe-dynamic",
        "--auto and --qe-dynamic cannot be combined: --auto chooses the settings itself, and --qe-dynamic has no fixed "
        "ranges, which its trials need; drop one of them",
    ),
    (
        "--compare no",
        "--compare 'no' is not allowed: it must be the folder of a run, a folder of such, or a report.json, which"
        " exists",
    ),
    ("--compare-to no", "--compare-to 'no' is not allowed: it must be the folder of a run, which exists"),
    ("--qe --seeds 0", "--seeds '0' is not allowed: it must be a whole number from 1 to 1000"),
    ("--qe-budget 4bits", "--qe-budget needs --quantize-eval, which quantizes the model and evaluates it"),
    ("--qe-lapq", "--qe-lapq needs --quantize-eval, which quantizes the model and evaluates it"),
    ("--qe --qe-bits-choices 4,4", f"--qe-bits-choices '4,4' is not allowed: it must be {WIDTHS}"),
    (
        "--act-stats trains",
        "--activation-stats 'trains' is not allowed: it must be one of train, valid, test; did you mean train?",
    ),
    ("--act-stats", "--activation-stats needs one of train, valid, test"),
    (
        "--sense filter --sense-range 0 0.5",
        "--sense-range needs three numbers, START below STOP from 0 to 1 and a STEP from 0.001, such as 0 0.95 0.05",
    ),
    ("--sense filter --sense-range 0 1.5 0.1", f"--sense-range '0 1.5 0.1' is not allowed: it must be {RANGE}"),
    ("--sense filter --sense-range 0.5 0.5 0.1", f"--sense-range '0.5 0.5 0.1' is not allowed: it must be {RANGE}"),
    ("--sense filter --sense-range 0 0.5 0", f"--sense-range '0 0.5 0' is not allowed: it must be {RANGE}"),
    ("--sense filter --sense-range 0 0.5 nan", f"--sense-range '0 0.5 nan' is not allowed: it must be {RANGE}"),
    ("--sense quant --sense-bits 1,8", f"--sense-bits '1,8' is not allowed: it must be {WIDTHS}"),
    ("--sense quant --sense-bits many", f"--sense-bits 'many' is not allowed: it must be {WIDTHS}"),
    (
        "--sense filters",
        "--sense 'filters' is not allowed: it must be one of element, filter, channel, quant; did you mean filter?",
    ),
    (
        "--sense quant --qe-dynamic",
        "--sense and --qe-dynamic cannot be combined: --sense needs ranges that are the same for all images; "
        "drop one of them",
    ),
    (
        "--lapq-init-mode L4",
        "--lapq-init-mode 'L4' is not allowed: it must be one of none, avg, laplace, gauss, l1, l2, l3",
    ),
    ("--lapq-method bfgs", "--lapq-method 'bfgs' is not allowed: it must be one of powell, nelder-mead, cobyla"),
    ("--lapq-eval-size 2", f"--lapq-eval-size '2' is not allowed: it must be {FRACTION}"),
    (
        "--qem asym",
        "--qe-mode 'asym' is not allowed: it must be one of sym, sym_restr, asym_s, asym_u; "
        "did you mean sym or asym_u or asym_s?",
    ),
    ("--qe-stats-file no.yaml", "--qe-stats-file 'no.yaml' is not allowed: it must be a file that exists"),
    ("--qe-stats-file images", "--qe-stats-file 'images' is not allowed: it must be a file that exists"),
    ("--resume-from no.tar", "--resume-from 'no.tar' is not allowed: it must be a file that exists"),
    (
        "-n a/b",
        "--name 'a/b' is not allowed: it must be a name that does not begin with a dot and has no slash in it, "
        "as a folder is called so",
    ),
    ("--qeca n_std", "--qe-clip-acts n_std needs --qe-clip-n-stds, the number of standard deviations to keep, above 0"),
    (
        "--qe-dynamic --qe-stats-file s.yaml",
        "--qe-stats-file and --qe-dynamic cannot be combined: --qe-stats-file reads activation ranges from a file, "
        "and --qe-dynamic computes activation ranges for each batch; drop one of them",
    ),
    (
        "--qe-calibration 0.1 --qe-config-file q.yaml",
        "--qe-calibration and --qe-config-file cannot be combined: --qe-calibration collects activation ranges first, "
        "and --qe-config-file takes all quantization settings from a file; drop one of them",
    ),
    (
        "--resume-from m.pth.tar --exp-load-weights-from m.pth.tar",
        "--resume-from and --exp-load-weights-from cannot be combined: --resume-from loads a checkpoint with all that "
        "belongs to it, and --exp-load-weights-from loads only the weights of a checkpoint; drop one of them",
    ),
    (
        "--engine onnx",
        "--engine 'onnx' is not allowed: it must be one of torch, onnxruntime",
    ),
    ("--engine", "--engine needs one of torch, onnxruntime"),
    ("--qe-reduce-range some", "--qe-reduce-range 'some' is not allowed: it must be one of none, auto, all"),
    ("--export-onnx model.pb", f"--export-onnx 'model.pb' is not allowed: it must be {NEW_FILE}"),
    ("--export-onnx no/m.onnx", f"--export-onnx 'no/m.onnx' is not allowed: it must be {NEW_FILE}"),
    ("--export-onnx no/such/images", f"--export-onnx 'no/such/images' is not allowed: it must be {NEW_FILE}"),
    ("--export-onnx=images", f"--export-onnx 'images' is not allowed: it must be {NEW_FILE}"),
    ("--export-onnx=", f"--export-onnx '' is not allowed: it must be {NEW_FILE}"),
    ("--export-onnx --export-opset 17", "--export-opset '17' is not allowed: it must be a whole number from 18 to 23"),
    ("--export-opset 24", "--export-opset '24' is not allowed: it must be a whole number from 18 to 23"),
    (
        "--qe --export-encodings onnx",
        "--export-encodings 'onnx' is not allowed: it must be one of ort, tensorrt, aimet",
    ),
    ("--qe --verify 0", "--verify '0' is not allowed: it must be a whole number, 1 or more"),
    ("--qe --verify x", "--verify 'x' is not allowed: it must be a whole number, 1 or more"),
    ("--qe --verify=-3", "--verify '-3' is not allowed: it must be a whole number, 1 or more"),
    ("--qe --verify 5 6", "one DATASET_DIR is allowed, not 2: images 6"),
    (
        "--verify",
        "--verify needs a quantized model: add --quantize-eval, or --resume-from a quantized checkpoint",
    ),
    (
        "--exp-load-weights-from m.pth.tar --verify 3",
        "--verify needs a quantized model: add --quantize-eval, or --resume-from a quantized checkpoint",
    ),
    (
        "--export-onnx --export-encodings ort",
        "--export-encodings needs a quantized model: add --quantize-eval, or --resume-from a quantized checkpoint",
    ),
    ("--qe-bit-wts 4", "there is no flag --qe-bit-wts; did you mean --qe-bits-wts or --qe-bits-acts or --qe-clip-wts?"),
    (
        "--qe-bits=4",
        "--qe-bits is ambiguous: it may be --qe-bits-acts, --qe-bits-wts, --qe-bits-accum or --qe-bits-choices; write"
        " more of it",
    ),
    ("--resu m.pth.tar", "--resu is ambiguous: it may be --resume-from or --resume; write more of it"),
    ("--save 5", "--save is ambiguous: it may be --save-untrained-model or --save-every; write more of it"),
    ("--=5", "there is no flag --=5; did you mean --wd or --vs or --qe?"),
    ("--xyzzy", "there is no flag --xyzzy; --help lists the flags"),
    ("-b", "--batch-size needs a whole number, 1 or more"),
    ("features", "one DATASET_DIR is allowed, not 2: images features"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_values_end_in_one_sentence_and_exit_code_2(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["images", "-e", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"compress.py: error: {sentence}\n"
    assert captured.out == ""


GREEDY = "is not there: --prune chooses what goes over all layers at once"
BUDGET = "is not there, nor is reinforcement learning: --qe-budget chooses the bits of each layer under a budget"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param("--greedy-pruning-step=0.1", f"--greedy-pruning-step {GREEDY}", id="="),
        pytest.param("--greedy --greedy-target-density=0.5", f"--greedy {GREEDY}", id="greedy"),
        pytest.param("--greedy-ft-epochs 3", f"--greedy-ft-epochs {GREEDY}", id="greedy's others"),
        pytest.param(
            "--earlyexit_thresholds 1.2 0.9", "--earlyexit_thresholds is not there yet, as early exits", id="exits"
        ),
        pytest.param("--amc-target-density 0.5", f"--amc-target-density {BUDGET}", id="AMC"),
        pytest.param("--netadapt", f"--netadapt {BUDGET}", id="NetAdapt"),
    ],
)
def test_flags_of_distiller_that_are_not_there_say_what_to_do_instead(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["images", "-e", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"compress.py: error: {sentence}")


def test_a_flag_is_there_or_absent_and_not_both() -> None:
    assert not [name for flag in FLAGS for name in flag.names if why_absent(name)]


def test_a_command_line_that_asks_for_nothing() -> None:
    nothing = "^nothing to do: add --evaluate, --prune, --quantize-eval, --qe-calibration, --compress, --epochs or --lr"
    for words in ("", "--wd 0.1 --momentum 0.5"):
        with pytest.raises(UsageError, match=nothing):
            parse(["images", *words.split()])


MISSING = [
    ("-e", "DATASET_DIR is missing: give the folder of images, or -a digits_cnn, whose images are built in"),
    ("--qe --qencl conv1 fc", "DATASET_DIR is missing (conv1, fc: taken as layer names, as none is a folder): give "),
    ("--qe --qencl images", "--qe-no-clip-layers needs at least one layer name before the DATASET_DIR images"),
]


@pytest.mark.parametrize(("words", "sentence"), MISSING, ids=[row[0] for row in MISSING])
def test_no_dataset(words: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(words.split())
    assert str(error.value).startswith(sentence)


DATASETS = [
    ("list last, folder first", "images --qe --qencl conv1 fc", "images", ("conv1", "fc")),
    ("folder after the list", "--qe --qencl conv1 fc images", "images", ("conv1", "fc")),
    ("folder inside the list", "--qe --qencl images conv1 fc", "images", ("conv1", "fc")),
    ("flag between", "--qencl conv1 fc --qe images", "images", ("conv1", "fc")),
    ("list before another flag", "--qencl conv1 fc images --qe", "images", ("conv1", "fc")),
    ("path that does not exist", "--qe --qencl conv1 fc no/such", "no/such", ("conv1", "fc")),
    ("layer called as a folder", "--qe --qencl features ./images", "images", ("features",)),
    ("a positional is enough", "--qencl features --qe images", "images", ("features",)),
    ("after two dashes", "--qe --qencl conv1 -- images", "images", ("conv1",)),
    ("regular expression", "--qe --qencl .*conv1 images", "images", (".*conv1",)),
    ("digits need none", "-a digits_cnn --qe --qencl features", None, ("features",)),
    ("digits by --dataset", "--dataset digits --qe --qencl features", None, ("features",)),
    ("export takes no folder", "--qe --qencl conv1 fc --export-onnx images", "images", ("conv1", "fc")),
    ("export to a file", "--qe --qencl conv1 --export-onnx m.onnx images", "images", ("conv1",)),
    ("verify takes no folder", "--qencl conv1 --qe --verify ./images", "images", ("conv1",)),
    ("digits on a folder", "-a digits_cnn --qe --qencl conv1 ./images", "images", ("conv1",)),
]


@pytest.mark.parametrize(("words", "folder", "layers"), [row[1:] for row in DATASETS], ids=[row[0] for row in DATASETS])
def test_a_list_does_not_swallow_the_dataset(words: str, folder: str | None, layers: tuple[str, ...]) -> None:
    config = parse(words.split())
    assert config.data == (None if folder is None else Path(folder))
    assert config.qe.no_clip_layers == layers


def test_a_folder_in_the_second_list_is_found() -> None:
    config = _parse("--qe --qencl conv1 --qenql fc images")
    assert (config.data, config.qe.no_clip_layers, config.qe.no_quant_layers) == (Path("images"), ("conv1",), ("fc",))


NO_IMAGES = ["--summary model", "--check", "-e -a my.py:net", "-e --resume-from m.pth.tar", "--export-onnx"]
NO_IMAGES += ["--export-onnx m.onnx --engine onnxruntime", "--resume-from m.pth.tar --export-encodings ort"]
NO_IMAGES += ["--epochs 3 --export-onnx"]  # which trains nothing, and says so


@pytest.mark.parametrize("words", NO_IMAGES)
def test_runs_that_may_do_without_a_dataset(words: str) -> None:
    config = parse(words.split())
    assert config.data is None
    assert not needs_folder(config)


WARNINGS = [
    ("nothing to say", "--qe --qeba 4", []),
    ("a budget of weights leaves activations", "--qe --qe-budget 1MB --qeba 4 --sense-images 9", []),
    (
        "bits beside a budget",
        "--qe --qe-budget 1GBOPs --qeba 4 --qebw 0",
        ["--qe-bits-acts is ignored: --qe-budget tells which are tried"],
    ),
    ("sensitivity of given settings", "--sense quant --qe-stats-file s.yaml --qepc --sense-bits 4", []),
    (
        "sensitivity only",
        "--sense quant --qe --qebw 4",
        [
            "--quantize-eval has no effect: --sense only analyses",
            "--qe-bits-wts is ignored: --sense-bits tells which are tried",
        ],
    ),
    (
        "searches that are not asked for",
        "--qe --qe-bits-choices 4 --sense-bits 4 --sense-images 9 --lapq-maxiter 3",
        [
            "--qe-bits-choices has no effect without --qe-budget",
            "--lapq-maxiter has no effect without --qe-lapq",
            "--sense-bits has no effect without --sense quant",
            "--sense-images has no effect without --sense quant or --qe-budget",
        ],
    ),
    (
        "what LAPQ does not need",
        "--qe --qe-lapq --lapq-eval-memoize-dataloader --lapq-bh-niter 3 --lapq-init-method powell"
        " --lapq-init-mode avg",
        [
            "--lapq-basinhopping-niter has no effect without --lapq-basinhopping",
            "--lapq-init-method has no effect with --lapq-init-mode avg",
            "--lapq-eval-memoize-dataloader is ignored: the images are always kept in memory",
        ],
    ),
    (
        "config file",
        "--qe --qe-config-file q.yaml --qeba 4 --qepc",
        [
            "--qe-bits-acts is ignored: q.yaml (--qe-config-file) replaces it",
            "--qe-per-channel is ignored: q.yaml (--qe-config-file) replaces it",
        ],
    ),
    ("not quantizing", "-e --qeba 4", ["--qe-bits-acts has no effect without --quantize-eval"]),
    ("checking only", "--check --qeba 4", []),
    (
        "split without calibration",
        "--qe --qe-dynamic --qe-calibration-split val",
        ["--qe-calibration-split is ignored: with --qe-dynamic no images are read for calibration"],
    ),
    ("n stds", "--qe --qe-clip-n-stds 2", ["--qe-clip-n-stds is ignored: --qe-clip-acts is none, not n_std"]),
    (
        "histograms of nothing",
        "--qe --qe-stats-file s.yaml --qe-histograms",
        ["--qe-histograms is ignored: with --qe-stats-file no statistics are collected"],
    ),
    (
        "percentile and power",
        "--qe --qeca kl --qe-clip-percentile 99 --qe-clip-p 3",
        [
            "--qe-clip-percentile is ignored: neither --qe-clip-acts nor --qe-clip-wts is percentile or auto",
            "--qe-clip-p is ignored: neither --qe-clip-acts nor --qe-clip-wts is lp or auto",
        ],
    ),
    ("power of weights", "--qe --qe-clip-wts lp --qe-clip-p 3", []),
    ("old name", "-e --resume m.pth.tar", ["--resume is deprecated: use --resume-from"]),
    (
        "old name of another thing",
        "--resume m.pth.tar --epochs 9",
        [
            "--resume is deprecated: it begins again at epoch 0 with a new optimizer; use --resume-from, which goes on,"
            " or add --reset-optimizer to it"
        ],
    ),
    ("training by its rate", "--lr 0.1 --wd 0 --kd-teacher self --kd-dw 1", []),
    ("rate of no training", "-e --lr 0.1", ["--lr is ignored: with --evaluate nothing is trained"]),
    ("serialized", "-e --load-serialized", ["--load-serialized is ignored: a model is never spread over several GPUs"]),
    (
        "PyTorch's own modules",
        "--qe --qept --qe-pytorch-backend fbgemm",
        [
            "--qe-convert-pytorch stands for the integer model of this program, which is evaluated and saved anyway:"
            " PyTorch is removing its own quantized modules; --export-onnx writes one for ONNX Runtime",
            "--qe-pytorch-backend is ignored: it chooses how to convert to PyTorch's own quantized modules",
        ],
    ),
    ("PyTorch's modules of floats", "-e --qept", ["--qe-convert-pytorch has no effect without --quantize-eval"]),
    (
        "two sources of weights",
        "-e --pretrained --resume-from m.pth.tar",
        ["--pretrained is ignored: --resume-from gives the weights"],
    ),
    ("cpu", "-e --cpu --gpus 0", ["--gpus is ignored: --cpu overrides it"]),
    ("exported and proved", "--qe --export-onnx --export-opset 21 --verify --engine onnxruntime", []),
    ("opset of a verified file", "--qe --verify 3 --export-opset 21", []),
    ("float engine", "-e --engine onnxruntime --export-opset 21", []),
    ("checkpoint in another engine", "--resume-from m.pth.tar --engine onnxruntime", []),
    ("a search that only prints", "--auto --check", ["--auto is ignored: --check only prints"]),
    (
        "compared while training",
        "--epochs 1 --compare-to images",
        ["--compare-to is ignored: training writes no predictions"],
    ),
    (
        "compared while exporting",
        "--export-onnx m.onnx --compare-to images",
        ["--compare-to has no effect without --evaluate"],
    ),
    ("a target without a search", "--qe --auto-agree 98", ["--auto-agree has no effect without --auto"]),
    ("seeds of a float model", "-e --seeds 3", ["--seeds has no effect without --quantize-eval"]),
    (
        "seeds of known ranges",
        "--qe --seeds 3 --qe-stats-file s.yaml",
        ["--seeds is ignored: with --qe-stats-file no images are drawn for calibration"],
    ),
    (
        "compared without a result",
        "--qe-calibration 1 --compare-to images",
        ["--compare-to has no effect: --qe-calibration alone only collects"],
    ),
    ("opset alone", "--qe --export-opset 20", ["--export-opset has no effect without --export-onnx"]),
    (
        "opset of encodings",
        "--qe --export-encodings ort --export-opset 20",
        ["--export-opset has no effect without --export-onnx"],
    ),
    ("engine of nothing", "--export-onnx --engine onnxruntime", ["--engine has no effect without --evaluate"]),
    (
        "engine of a checkpoint that is only exported",
        "--resume-from m.pth.tar --verify --engine onnxruntime",
        ["--engine has no effect without --evaluate"],
    ),
    ("range", "-e --qe-reduce-range all", ["--qe-reduce-range has no effect without --quantize-eval"]),
    ("range beside a config file", "--qe --qe-config-file q.yaml --qe-reduce-range all", []),
    (
        "printing",
        "--summary model --export-onnx --engine torch",
        ["--engine is ignored: --summary only prints", "--export-onnx is ignored: --summary only prints"],
    ),
    (
        "printing of a quantized run",
        "--check --qe --verify --export-encodings ort --export-opset 20",
        [
            "--export-opset is ignored: --check only prints",
            "--export-encodings is ignored: --check only prints",
            "--verify is ignored: --check only prints",
        ],
    ),
    (
        "collecting",
        "--qe-calibration 0.1 --export-onnx",
        ["--export-onnx has no effect: --qe-calibration alone only collects"],
    ),
    (
        "analysing instead of exporting",
        "--sense quant --export-onnx --engine onnxruntime",
        [
            "--engine has no effect: --sense only analyses",
            "--export-onnx has no effect: --sense only analyses",
        ],
    ),
    (
        "each method that auto tries",
        "--qe --qeca auto --qe-clip-n-stds 2 --qe-clip-percentile 99 --qe-clip-p 3",
        [],
    ),
    (
        "collecting instead of evaluating",
        "-e --qe-calibration 0.1 --export-onnx",
        [
            "--evaluate has no effect: --qe-calibration alone only collects",
            "--export-onnx has no effect: --qe-calibration alone only collects",
        ],
    ),
    ("a value twice", "-e --seed 1 --seed 2", ["--seed is given more than once: the last value counts, 2"]),
    ("two spellings", "-e -b 3 --batch-size 3", ["--batch-size is given more than once: the last value counts, 3"]),
    ("a switch twice", "-e --evaluate", ["--evaluate is given more than once"]),
    ("lists that add up", "--summary model --summary compute", []),
    (
        "images that are not tested on",
        "--qe-calibration 0.1 --etes 0.5",
        ["--effective-test-size has no effect: --qe-calibration alone only collects"],
    ),
    (
        "nothing collected",
        "-e --qe-histograms --qe-calibration-split val",
        [
            "--qe-calibration-split has no effect without --qe-calibration or --quantize-eval",
            "--qe-histograms has no effect without --qe-calibration or --quantize-eval",
        ],
    ),
    (
        "printing instead of evaluating",
        "--summary model -e --confusion",
        ["--evaluate is ignored: --summary only prints", "--confusion is ignored: --summary only prints"],
    ),
    (
        "settings of what only prints",
        "--summary model --check --qe --qem sym",
        [f"{flag} is ignored: --summary only prints" for flag in ("--check", "--quantize-eval", "--qe-mode")],
    ),
    (
        "corrections of what only analyses",
        "--sense quant --ptq-rounding gptq",
        ["--ptq-rounding has no effect: --sense only analyses"],
    ),
]


def test_repeated_flags_are_no_settings() -> None:
    once, twice = parse(["-e", "--seed", "2", "images"]), parse(["-e", "--seed", "1", "--seed", "2", "images"])
    assert once == twice
    assert once.to_yaml() == twice.to_yaml()


@pytest.mark.parametrize(("words", "expected"), [row[1:] for row in WARNINGS], ids=[row[0] for row in WARNINGS])
def test_flags_without_effect_are_named(words: str, expected: list[str]) -> None:
    assert startup_warnings(parse([*words.split(), "images"])) == expected


OF_DATA = "-j 2|-b 8|--vs 0.2|--etrs 0.5|--evs 0.5|--etes 0.5|--skip-corrupt|-p 5|--confusion|--compare-to images"
READING = {"-j 2", "--skip-corrupt"}
TESTING = {*READING, "-b 8", "--etes 0.5", "-p 5", "--confusion"}
USED = {
    "--summary modules": set(),
    "--check --qe": set(),
    "--export-onnx a.onnx": set(),
    "--resume-from m.pth.tar --verify 9": {*READING},
    "--qe-calibration 0.1": {*READING, "-p 5"},
    "--sense quant": {*READING, "-p 5"},
    "--sense filter": {*READING, "-p 5", "--etes 0.5"},
    "--act-hist 0.5": {*READING, "-p 5"},
    "-e --act-stats valid": {*TESTING, "--compare-to images", "--vs 0.2", "--etrs 0.5", "--evs 0.5"},
    "-e": {*TESTING, "--compare-to images"},
    "--qe": {*TESTING, "--compare-to images"},
    "--resume-from m.pth.tar": {*TESTING, "--compare-to images"},
    "--epochs 3": {*TESTING, "--vs 0.2", "--etrs 0.5", "--evs 0.5"},
}


@pytest.mark.parametrize("words", USED)
def test_flags_that_what_is_done_does_not_use_are_named(words: str) -> None:
    used = {each for each in OF_DATA.split("|") if not startup_warnings(parse([*f"{words} {each}".split(), "images"]))}
    assert used == USED[words]


def test_why_a_flag_is_not_used() -> None:
    words = "--resume-from m.pth.tar --verify 9 -b 8 --vs 0 -p 5 images"
    assert startup_warnings(parse(words.split())) == [
        "--print-freq is ignored: with --verify no progress is shown",
        "--batch-size is ignored: with --verify nothing is evaluated",
        "--validation-split is ignored: with --verify nothing is trained",
    ]


VERBS = [
    ("-e", Verb.EVALUATE),
    ("--qe", Verb.QUANTIZE),
    ("--qe-calibration 0.1 -e", Verb.CALIBRATE),
    ("--qe-calibration 0.1 --qe", Verb.QUANTIZE),
    ("--sense quant --qe", Verb.SENSE),
    ("--sense filter --qe", Verb.SENSE_PRUNING),
    ("--check --qe --compress s.yaml", Verb.CHECK),
    ("--summary model --check", Verb.SUMMARY),
    ("--compare images --summary model", Verb.COMPARE),
    ("--export-onnx", Verb.EXPORT),
    ("--resume-from m.pth.tar --verify", Verb.EXPORT),
    ("--epochs 90", Verb.TRAIN),
    ("--compress s.yaml", Verb.TRAIN),
    ("--learning-rate 0.3 --wd 0", Verb.TRAIN),
    ("--act-hist 0.1 -e", Verb.HISTOGRAMS),
    ("--compress s.yaml -e", Verb.EVALUATE),
    ("--compress s.yaml --export-onnx", Verb.EXPORT),
    ("--resume-from m.pth.tar", Verb.NOTHING),
]


@pytest.mark.parametrize(("words", "verb"), VERBS)
def test_what_a_command_line_does(words: str, verb: Verb) -> None:
    config = parse([*words.split(), "images"])
    assert verb_of(config) is verb
    assert asked(config)[:1] == ((verb,) if verb is not Verb.NOTHING else ())


def test_each_verb_is_named_by_a_flag() -> None:
    assert {flag for verb in Verb for flag in verb.flags} <= {flag.name for flag in FLAGS}


def test_a_row_names_flags_that_exist() -> None:
    """A misspelt flag in `needs` or `ignored` would never be found on a command line."""
    known = {flag.name for flag in FLAGS}
    words = [need.flags + need.also for flag in FLAGS for need in flag.needs]
    words += [each.by + each.unless for flag in FLAGS for each in flag.ignored]
    words += [flag.use.also for flag in FLAGS]
    assert {word.split()[0] for group in words for word in group} <= known


@pytest.mark.parametrize(("words", "field", "expected"), RIGHT, ids=[row[0] for row in RIGHT])
def test_a_saved_config_repeats_the_run(words: str, field: str, expected: object) -> None:
    config = parse(["images", "-e", *words.split()])
    Path("run.yaml").write_text(config.to_yaml())
    named = words.split() if ".py:" in words else []  # only the command line may name a Python file
    again = parse(["--run-config", "run.yaml", *named])
    assert again == config
    assert again.to_yaml() == config.to_yaml()


def test_the_command_line_overrides_a_saved_config() -> None:
    Path("run.yaml").write_text(_parse("images --qe --qeba 4 -b 8").to_yaml())
    config = _parse("--run-config run.yaml --qeba 6 features")
    assert (config.qe.bits_acts, config.batch_size, config.data) == (6, 8, Path("features"))
    assert config.given == {"--quantize-eval", "--qe-bits-acts", "--batch-size"}


def test_a_saved_run_of_the_old_resume_begins_at_epoch_0_again() -> None:
    config = _parse("images --resume m.pth.tar --epoch 3")
    Path("run.yaml").write_text(config.to_yaml())
    assert config.train.reset_optimizer
    assert _parse("--run-config run.yaml") == config


SAVED = [
    (
        "unknown setting",
        "evaluate: true\nbatchsize: 3\n",
        ConfigError,
        "run.yaml:2: there is no setting 'batchsize'; did you",
    ),
    (
        "unknown qe setting",
        "qe:\n  bit_acts: 3\n",
        ConfigError,
        "run.yaml:2: there is no setting 'qe.bit_acts'; did you mean",
    ),
    ("wrong value", "batch_size: [1, 2]\n", UsageError, "--batch-size '1,2' is not allowed: it must be a whole number"),
    ("wrong switch", "cpu: 3\n", UsageError, "--cpu '3' is not allowed: it must be true or false"),
    ("not a mapping", "- 3\n", ConfigError, "run.yaml:1: 'setting: value' lines are expected here"),
    ("wrong flag", "given: [--foo]\n", ConfigError, "run.yaml: 'given' names flags that do not exist: --foo"),
    ("abbreviation", "given: [--batch]\n", ConfigError, "run.yaml: 'given' names flags that do not exist: --batch"),
    ("abbreviated setting", "batch: 3\n", ConfigError, "run.yaml:1: there is no setting 'batch'"),
]


@pytest.mark.parametrize(("text", "kind", "sentence"), [row[1:] for row in SAVED], ids=[row[0] for row in SAVED])
def test_mistakes_in_a_saved_config(text: str, kind: type[Exception], sentence: str) -> None:
    Path("run.yaml").write_text(text)
    with pytest.raises(kind) as error:
        parse(["--run-config", "run.yaml", "-e", "images"])
    assert str(error.value).startswith(sentence)


def _application(monkeypatch: pytest.MonkeyPatch, outcome: int | BaseException) -> None:
    def run(config: RunConfig) -> int:
        if isinstance(outcome, int):
            return outcome
        raise outcome

    module = ModuleType("qlib.app.run")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qlib.app.run", module)
    monkeypatch.setattr(qlib.app, "run", module, raising=False)


OUTCOMES = [
    ("success", 0, 0, ""),
    ("mistake", ModelError("unknown model 'x'"), 2, "compress.py: error: unknown model 'x'\n"),
    ("interrupt", KeyboardInterrupt("resume with: A"), 130, "compress.py: resume with: A\n"),
    ("bare interrupt", KeyboardInterrupt(), 130, "compress.py: interrupted\n"),
]


@pytest.mark.parametrize(("outcome", "code", "text"), [row[1:] for row in OUTCOMES], ids=[row[0] for row in OUTCOMES])
def test_exit_codes(
    outcome: int | BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _application(monkeypatch, outcome)
    assert main(["images", "-e"]) == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("verbose", ["-v", "--verb"])
def test_verbose_shows_the_traceback_too(
    verbose: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _application(monkeypatch, ModelError("unknown model 'x'"))
    assert main(["images", "-e", verbose]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert text.endswith("compress.py: error: unknown model 'x'\n")


def test_a_failure_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    _application(monkeypatch, ZeroDivisionError("oops"))
    with pytest.raises(ZeroDivisionError, match="oops"):
        main(["images", "-e"])


def test_compress_py_is_the_same_program() -> None:
    root = Path(qlib.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "compress.py"), "-b", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == "compress.py: error: --batch-size '0' is not allowed: it must be a whole number, 1 or more\n"


def test_the_installed_command_says_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/compress_classifier", "-b", "0"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("compress_classifier: error: --batch-size '0'")
    assert build_parser().format_help().startswith("usage: compress_classifier [flags] DATASET_DIR")


def test_the_parser_takes_no_abbreviations() -> None:
    """They are written out before it sees them, as a flag without its value is."""
    assert not build_parser().allow_abbrev
