"""Each mistake of a user: one clear sentence, exit code 2, nothing lost. Most are run in this process."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runs import CLASSES, Run, finish, good, make_images, run, start, user_model

from qlib.checkpoint.read import read_checkpoint
from qlib.checkpoint.write import write_checkpoint
from qlib.models import create_model, find_model

DIGITS = "-a digits_cnn --pretrained"
QUANTIZE = f"{DIGITS} --quantize-eval"
USER = "-a net.py:brightest images"
STATS = "stats/digits_cnn_digits.yaml"
CHECKPOINT = "quantized_checkpoint.pth.tar"
LONG = "a" * 300


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with statistics, a plan and a quantized checkpoint of digits_cnn, a model of a user's, and images."""
    folder = tmp_path_factory.mktemp("template")
    done = good(f"{QUANTIZE} --qe-calibration 0.02 --etes 0.02", folder)
    shutil.copy(done.folder / CHECKPOINT, folder)
    shutil.copy(done.folder / "layer_quant_params.yaml", folder / "plan.yaml")
    user_model(folder)
    make_images(folder / "images")
    shutil.rmtree(folder / "logs")
    (folder / "latest_log_dir").unlink()
    (folder / "latest_log_file").unlink()
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "work"))


def nothing(folder: Path) -> None:
    pass


def write(name: str, text: str) -> Callable[[Path], object]:
    """Writes a file."""
    return lambda folder: (folder / name).write_text(text)


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Replaces the first `old` in a file."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def cut(name: str) -> Callable[[Path], None]:
    """Truncates a file."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def without_hash(folder: Path) -> str:
    """Deletes the line that would tell that the statistics were changed; their text."""
    text = re.sub(r"\n  hash: .*", "", (folder / STATS).read_text())
    (folder / STATS).write_text(text)
    return text


def without_layer(folder: Path) -> None:
    """Takes `fc` out of the statistics."""
    text = without_hash(folder)
    (folder / STATS).write_text(text[: text.index("\nfc:") + 1])


def not_a_number(folder: Path) -> None:
    """Makes the first minimum of the statistics NaN."""
    text = (folder / STATS).read_text()
    (folder / STATS).write_text(re.sub(r"min: \S+", "min: .nan", text, count=1))


def empty_folders(folder: Path) -> None:
    for split in ("train", "val"):
        for name in CLASSES:
            (folder / "empty" / split / name).mkdir(parents=True)


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch harmed",)


def hostile(folder: Path) -> None:
    torch.save({"state_dict": {}, "extra": Hostile()}, folder / "hostile.pth.tar")
    legacy = [0x1950A86A20F9469CFC6C, 1001, {}, Hostile()]
    (folder / "legacy.pth.tar").write_bytes(b"".join(pickle.dumps(each, 2) for each in legacy))


def damaged_header(folder: Path) -> None:
    write_checkpoint(folder / "header.pth.tar", {"format": "qlib_quantized", "version": 1, "arch": "digits_cnn"})


def other_model(folder: Path) -> None:
    weights = torch.nn.Linear(2, 2).state_dict()
    torch.save({"state_dict": weights, "arch": "digits_cnn"}, folder / "other.pth.tar")


def distiller(folder: Path) -> None:
    """Checkpoints with what Distiller puts beside the weights."""
    weights = create_model(find_model("digits_cnn")).state_dict()
    shapes = {**weights, "fc.weight": torch.zeros(10, 100)}
    for name, more in {
        "others": {"compression_sched": {"masks_dict": {"fc.bias": None, "module.fc.weigth": torch.zeros(10, 128)}}},
        "shaped": {"masks": {"fc.weight": torch.zeros(128, 10, dtype=torch.uint8)}},
        "odd": {"compression_sched": {"masks_dict": {"fc.weight": [0, 1]}}},
        "thinned": {"thinning_recipes": ["a recipe"], "state_dict": shapes},
        "recipe": {"thinning": [{"parameter": "fc.weight", "axis": 1, "size": 99, "kept": [0, 3]}]},
        "torn": {"thinning": [{"parameter": "fc.weight", "axis": 1, "size": 99, "kept": [3, 0]}]},
        "ptq": {"quantizer_metadata": {"params": {}}, "state_dict": {**weights, "fc.w_scale": torch.ones(1)}},
    }.items():
        torch.save({"arch": "digits_cnn", "epoch": 3, "state_dict": weights, **more}, folder / f"{name}.pth.tar")


def cast(folder: Path) -> None:
    state = create_model(find_model("digits_cnn")).state_dict()
    torch.save({name: value.to(torch.int8) for name, value in state.items()}, folder / "cast.pth")


def changed_plan(folder: Path) -> None:
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    write_checkpoint(folder / CHECKPOINT, {**checkpoint, "plan": checkpoint["plan"].replace("max: ", "max: 1", 1)})


def schedule(body: str) -> Callable[[Path], None]:
    """Writes q.yaml, whose quantizer has the lines of `body` as well."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return write("q.yaml", f"quantizers:\n  ptq:\n    class: PostTrainLinearQuantizer\n{lines}")


CONFIG = f"{QUANTIZE} --qe-config-file q.yaml"


MATCH = """\
extensions:
  kd:
    class: KnowledgeDistillation
    teacher: self
    match: {stem.relux: stem.relu}
policies:
  - extension: {instance_name: kd}
    starting_epoch: 0
    ending_epoch: 2
    frequency: 1
"""


@dataclass(frozen=True)
class Row:
    """A mistake: how it comes about, the command line, and a regular expression for the sentence."""

    words: str
    sentence: str
    prepare: Callable[[Path], object] = nothing


TABLE = {
    # the dataset
    "missing folder": Row("-a resnet20_cifar no/images -e", r"there is no dataset folder 'no/images'; give the folder"),
    "no folder": Row("-a resnet20_cifar -e", r"DATASET_DIR is missing: give the folder of images"),
    "no folder for a user's model": Row("-a net.py:brightest -e", r"dataset imagefolder needs its folder; give it as"),
    "empty folder": Row(f"{USER[:-6]}empty -e", r"the 4 class folders in 'empty/val' hold no images", empty_folders),
    "no train and val": Row("-a resnet18 stats -e", r"dataset folder 'stats' has no val/; it needs train/ and val/"),
    "corrupt image": Row(
        f"{USER} -e",
        r"cannot read image 'images/val/blue/009.png', number 2 of 12 \(.*\); replace or delete it, or leave such",
        write("images/val/blue/009.png", "no image"),
    ),
    "corrupt image in calibration": Row(
        f"{USER} --qe-calibration 1",
        r"cannot read image 'images/train/red/000.png'",
        cut("images/train/red/000.png"),
    ),
    "wrong class count": Row(
        "-a resnet20_cifar images -e", r"'images' \(cifar10\) has 4 classes and the model 10; give the data that"
    ),
    "class in one split": Row(
        f"{USER} -e", r"train/ and val/ of 'images' differ in 1 class", lambda folder: (folder / "images/val/x").mkdir()
    ),
    "model of fewer classes": Row(
        f"{USER} -e",
        r"'net.py:brightest' returns a tensor of 2x4 for 2 images, and the dataset has 5 classes; make it return",
        lambda folder: [(folder / "images" / split / "white").mkdir() for split in ("train", "val")],
    ),
    "folder of nobody": Row("-a net.py:brightest ~nosuchuser/x -e", r"no dataset folder '~nosuchuser/x'; give"),
    "long name of a folder": Row(
        f"-a net.py:brightest {LONG} -e", r"cannot use 'a+.+' \(File name too long\); give a shorter name"
    ),
    "zero byte in the name of a folder": Row(
        "-a net.py:brightest --run-config c.yaml -e",
        r"there is no dataset folder 'a\\x00b'",
        write("c.yaml", 'data: "a\\0b"\n'),
    ),
    # the model
    "model file of nobody": Row("-a ~nosuchuser/n.py:f images -e", r"there is no model file '~nosuchuser/n.py'; give"),
    "long name of a model file": Row(f"-a {LONG}.py:f images -e", r"cannot use 'a+.+.py' \(File name too long\)"),
    "model file in other bytes": Row(
        "-a \udcff.py:f images -e", r"--arch '\\udcff\.py:f' cannot be used \(not UTF-8\); rename it"
    ),
    "model folder of nobody": Row("-a hf/~nosuchuser images -e", r"no model in the folder '~nosuchuser'"),
    "early exits": Row(
        "-a resnet50_earlyexit images -e",
        r"unknown model 'resnet50_earlyexit', as models with early exits are not there yet; give one of .* mean resnet",
    ),
    "unknown model": Row("-a resnet8 images -e", r"unknown model 'resnet8'; .* did you mean resnet18 or"),
    "missing model file": Row("-a no.py:make images -e", r"there is no model file 'no.py'"),
    "missing function": Row("-a net.py:brightness images -e", r"'net.py' has no function .*; did you mean brightest"),
    "no pretrained weights": Row(
        "-a resnet20_cifar --pretrained images -e", r"there are no pretrained weights for resnet20_cifar"
    ),
    "NaN weights": Row(
        "-a net.py:broken images -e", r"the weights 'conv.weight' of net.py:broken hold NaN or infinity"
    ),
    "infinite activations": Row(
        "-a net.py:overflowing images --qe-calibration 1",
        r"the output of 'conv' holds NaN or infinity, in images 0 to 15 of the calibration set; check the weights",
    ),
    "infinite logits": Row(
        "-a net.py:overflowing images -e",
        r"net.py:overflowing gives NaN or infinity for some of these images, .* --qe-calibration tells in which layer",
    ),
    # flags
    "bits 1": Row(f"{QUANTIZE} --qe-bits-acts 1", r"--qe-bits-acts '1' is not allowed: it must be 0 .* from 2 to 16"),
    "bits 33": Row(f"{QUANTIZE} --qebw 33", r"--qe-bits-wts '33' is not allowed: it must be 0 .* from 2 to 16"),
    "n_std alone": Row(f"{QUANTIZE} --qeca n_std", r"--qe-clip-acts n_std needs --qe-clip-n-stds"),
    "two sources": Row(
        f"{QUANTIZE} --qe-dynamic --qe-stats-file {STATS}", r"--qe-stats-file and --qe-dynamic cannot be combined"
    ),
    "unknown flag": Row(f"{QUANTIZE} --qe-per-chanel", r"there is no flag --qe-per-chanel; did you mean"),
    "nothing to do": Row(DIGITS, r"nothing to do: add --evaluate, --prune, --quantize-eval"),
    "float checkpoint, nothing to do": Row(
        "--resume-from f.pth.tar",
        r"nothing to do: add --evaluate",
        lambda folder: torch.save({"state_dict": torch.nn.Linear(1, 1).state_dict()}, folder / "f.pth.tar"),
    ),
    "flag for a layer that is not there": Row(
        f"{QUANTIZE} --qe-no-quant-layers wide.com",
        r"--qe-no-quant-layers: 'wide.com' matches no layer; did you mean wide.conv",
    ),
    # statistics
    "missing statistics": Row(
        f"{QUANTIZE} --qe-stats-file no.yaml", r"--qe-stats-file 'no.yaml' .* a file that exists"
    ),
    "statistics of another model": Row(
        f"{QUANTIZE} --qe-stats-file {STATS}",
        r"the statistics are of another model \(arch 'vgg11', this one is 'digits_cnn'\)",
        lambda folder: (without_hash(folder), edit(STATS, 'arch: "digits_cnn"', 'arch: "vgg11"')(folder)),
    ),
    "changed statistics": Row(
        f"{QUANTIZE} --qe-stats-file {STATS}",
        rf"the statistics in {STATS} were changed after they were collected; collect them again with",
        edit(STATS, "max: ", "max: 1"),
    ),
    "statistics of layers that are not there": Row(
        f"{QUANTIZE} --qe-stats-file {STATS}",
        rf"{STATS} holds statistics of 1 layer that the model does not have \(head\); give those of this model",
        lambda folder: (folder / STATS).write_text(f"{without_hash(folder)}head:\n  output: {{min: 0.0, max: 1.0}}\n"),
    ),
    "cast weights": Row(
        f"{DIGITS} -e --resume-from cast.pth",
        r"checkpoint 'cast.pth' holds \S+ and \d+ more as int8; allowed: float16, bfloat16, float32, float64; save",
        cast,
    ),
    "input that a layer does not have": Row(
        CONFIG,
        r"q.yaml:5: input_overrides names input 99, and fc has 1 input, from 0 on; remove it",
        schedule("overrides:\n  fc: {input_overrides: {99: {bits_activations: 4}}}"),
    ),
    "checked match of a layer that is not there": Row(
        f"{DIGITS} --check --compress kd.yaml --epochs 2",
        r"kd.yaml:2: match names 'stem.relux', which the student does not have; did you mean stem.relu",
        write("kd.yaml", MATCH),
    ),
    "changed plan in a checkpoint": Row(
        f"--resume-from {CHECKPOINT}", r"the plan or the integers in checkpoint '\S+' were changed after", changed_plan
    ),
    "statistics of other weights": Row(
        f"-a digits_cnn --quantize-eval --qe-stats-file {STATS}", r"of another model \(weights '\w{16}', this one is"
    ),
    "statistics lack a layer": Row(
        f"{QUANTIZE} --qe-stats-file {STATS}", r"the statistics lack layer 'fc'; collect them again", without_layer
    ),
    "statistics are no YAML": Row(
        f"{QUANTIZE} --qe-stats-file {STATS}",
        r"digits_cnn_digits.yaml:2: not valid YAML: .*; collect",
        write(STATS, "a: [1,\n}"),
    ),
    "statistics are no statistics": Row(
        f"{QUANTIZE} --qe-stats-file {STATS}", r"layer 'conv1' is 3, not a mapping", write(STATS, "conv1: 3\n")
    ),
    "statistics of NaN": Row(
        f"{QUANTIZE} --qe-stats-file {STATS}",
        r"min of input 0 of layer 'stem.conv' is nan; statistics must be finite: collect them again",
        not_a_number,
    ),
    # checkpoints
    "checkpoint of nobody": Row(f"{DIGITS} -e --resume-from ~nosuchuser/c", r"--resume-from '~nosuchuser/c' is not"),
    "long name of a checkpoint": Row(
        f"{DIGITS} -e --resume-from {LONG}",
        r"--resume-from '.+' cannot be used \(File name too long\); give",
    ),
    "missing checkpoint": Row(f"{DIGITS} -e --resume-from no.pth", r"--resume-from 'no.pth' .* a file that exists"),
    "not a checkpoint": Row(f"{DIGITS} -e --resume-from net.py", r"'net.py' is not a checkpoint"),
    "empty checkpoint": Row(f"{DIGITS} -e --resume-from e.pth", r"'e.pth' is empty; copy or", write("e.pth", "")),
    "truncated checkpoint": Row(f"--resume-from {CHECKPOINT}", r"is truncated or damaged; copy or", cut(CHECKPOINT)),
    "hostile checkpoint": Row(
        f"{DIGITS} -e --resume-from hostile.pth.tar", r"refers to '(posix|os|nt).system', which could run code", hostile
    ),
    "hostile legacy checkpoint": Row(
        f"{DIGITS} -e --exp-load-weights-from legacy.pth.tar", r"refers to '(posix|os|nt).system'", hostile
    ),
    "checkpoint of another model": Row(
        f"{DIGITS} -e --resume-from other.pth.tar", r"checkpoint 'other.pth.tar' does not fit the model: ", other_model
    ),
    "masks of another model": Row(
        "-e --resume-from others.pth.tar",
        r"checkpoint 'others.pth.tar' has a mask of 'fc.weigth', which the model does not have; did you mean fc.weight",
        distiller,
    ),
    "masks of another shape": Row(
        "--resume-from shaped.pth.tar --lr 0.1",
        r"checkpoint 'shaped.pth.tar' has a mask of 128x10 for 'fc.weight', whose shape is 10x128; give the model that",
        distiller,
    ),
    "masks that are none": Row(
        "-e --resume-from odd.pth.tar",
        r"checkpoint 'odd.pth.tar' holds masks that are no tensors by name; save the state_dict of its model",
        distiller,
    ),
    "a recipe of another model": Row(
        "-e --resume-from recipe.pth.tar",
        r"the thinning recipe is for another model: 'fc.weight' has 128 indices on axis 1, of 99; give the -a that",
        distiller,
    ),
    "a damaged recipe": Row(
        "-e --resume-from torn.pth.tar",
        r"checkpoint 'torn.pth.tar' has a thinning recipe that keeps no rising indices of 'fc.weight'; give",
        distiller,
    ),
    "thinned": Row(
        "-e --resume-from thinned.pth.tar",
        r"checkpoint 'thinned.pth.tar' has a thinning recipe that is none of Distiller's; give the checkpoint that it"
        r" was thinned from, and --thinnify",
        distiller,
    ),
    "quantized by Distiller": Row(
        "-e --exp-load-weights-from ptq.pth.tar",
        r"1 unexpected \(fc.w_scale\); it was quantized by Distiller, whose quantized models are not read: give the",
        distiller,
    ),
    "damaged header": Row(
        "--resume-from header.pth.tar", r"lacks dataset, num_classes, plan, state_dict", damaged_header
    ),
    "quantized already": Row(
        f"--resume-from {CHECKPOINT} --quantize-eval", rf"{CHECKPOINT} is quantized already; drop --quantize-eval"
    ),
    "summary of integers": Row(f"--resume-from {CHECKPOINT} --summary model", r"--summary needs a float model, but"),
    "quantized, of another name": Row(
        f"-a resnet18 --resume-from {CHECKPOINT}", rf"{CHECKPOINT} is a quantized digits_cnn, not resnet18; drop --arch"
    ),
    "integers as float weights": Row(
        f"{DIGITS} -e --exp-load-weights-from {CHECKPOINT}", rf"{CHECKPOINT} holds integers, not float weights"
    ),
    # settings
    "missing config": Row(f"{QUANTIZE} --qe-config-file no.yaml", r"--qe-config-file 'no.yaml' .* a file that exists"),
    "tabs": Row(CONFIG, r"q.yaml:4: .*tab", schedule("\tbits_activations: 8")),
    "duplicate keys": Row(
        CONFIG, r"q.yaml:5: .*bits_activations", schedule("bits_activations: 8\nbits_activations: 4")
    ),
    "unknown class": Row(
        CONFIG,
        r"q.yaml:3: unknown class 'PostTrainLinearQuantiser'; .* did you mean PostTrainLinearQuantizer",
        write("q.yaml", "quantizers:\n  a:\n    class: PostTrainLinearQuantiser\n"),
    ),
    "unknown key": Row(
        CONFIG, r"q.yaml:4: unknown key 'bits_activation'.* did you mean", schedule("bits_activation: 8")
    ),
    "rule without a layer": Row(
        CONFIG,
        r"q.yaml:5: 'wide.con' matches no layer; did you mean wide.conv",
        schedule("overrides:\n  wide.con: {bits_weights: 4}"),
    ),
    "bits in a config": Row(CONFIG, r"q.yaml:4: bits_activations is 17; allowed: ", schedule("bits_activations: 17")),
    "python in YAML": Row(
        CONFIG, r"q.yaml:4: ", schedule("bits_activations: !!python/object/apply:os.system ['touch harmed']")
    ),
    "empty config": Row(CONFIG, r"q.yaml:1: ", write("q.yaml", "")),
    "plan lacks a layer": Row(
        f"{QUANTIZE} --qe-config-file plan.yaml",
        r"layer 'head' is not in the model; remove it",
        edit("plan.yaml", "  fc:\n", "  head:\n"),
    ),
    "plan with wrong bits": Row(
        f"{QUANTIZE} --qe-config-file plan.yaml", r"plan.yaml:\d+: .*bits", edit("plan.yaml", "bits: 8", "bits: 88")
    ),
    "long name of a layer": Row(
        f"{QUANTIZE} --qe-dynamic --qe-no-quant-layers {LONG}", r"--qe-no-quant-layers: '.+' matches no layer"
    ),
    "settings of nobody": Row(f"{DIGITS} -e --run-config ~nosuchuser/c", r"~nosuchuser/c.*: "),
    # output
    "long name of a run": Row(
        f"{DIGITS} -e -n {LONG}", r"--name '.+' cannot be used \(File name too long\); give a shorter name"
    ),
    "long name of an output folder": Row(f"{DIGITS} -e -o {LONG}", r"--out-dir a+.+ cannot be written: File name"),
    "zero byte in the name of an output folder": Row(
        "--run-config c.yaml",
        r"--out-dir 'a\\x00b' is not allowed: it must be a path",
        write("c.yaml", 'out_dir: "a\\0b"\narch: digits_cnn\nevaluate: true\n'),
    ),
    "long name of an ONNX file": Row(
        f"{DIGITS} --export-onnx {LONG}.onnx", r"--export-onnx '.+' cannot be used \(File name too long\)"
    ),
    "output folder": Row(
        f"{DIGITS} -e -o net.py/out", r"--out-dir net.py/out cannot be written: Not a directory; give"
    ),
    "statistics folder": Row(
        f"{DIGITS} --qe-calibration 0.1",
        r"cannot write the statistics so far 'stats/\S+' \(.*\); give a folder that can be written",
        lambda folder: (shutil.rmtree(folder / "stats"), (folder / "stats").touch()),
    ),
}
SEVERAL = {"plan lacks a layer"}  # files with more than one mistake: a line for each


def check(done: Run, name: str) -> None:
    """What each mistake has in common."""
    assert done.code == 2, done
    prefix, _, sentence = done.err.partition("error: ")
    assert prefix == "compress.py: "
    assert re.search(TABLE[name].sentence, sentence), done.err
    assert "Traceback" not in done.err + done.out
    lines = sentence.splitlines()
    assert len(lines) == 1 or (name in SEVERAL and lines[0] == f"{len(lines) - 1} problems:"), done.err
    assert sentence.endswith("\n")


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the log folders'."""
    files = (path for path in folder.rglob("*") if path.is_file() and "log" not in str(path.relative_to(folder)))
    return {str(path): path.read_bytes() for path in files if "__pycache__" not in str(path)}


@pytest.mark.parametrize("name", TABLE)
def test_mistake(folder: Path, name: str) -> None:
    row = TABLE[name]
    row.prepare(folder)
    before = contents(folder)
    done = run(row.words, folder)
    check(done, name)
    assert contents(folder) == before
    assert not (folder / "harmed").exists()
    if (folder / "logs").exists():
        (log,) = (folder / "logs").glob("*/*.log")
        assert "error: " in log.read_text()
        assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("name", ["bits 1", "corrupt image", "hostile checkpoint"])
def test_mistake_in_a_process_of_its_own(folder: Path, name: str) -> None:
    row = TABLE[name]
    row.prepare(folder)
    check(finish(start(f"{row.words} -j 2", folder), folder), name)
    assert not (folder / "harmed").exists()


def test_verbose_shows_where(folder: Path) -> None:
    done = run("-a resnet8 images -e -v", folder)
    assert done.code == 2
    assert done.err.startswith("Traceback")
    assert done.err.splitlines()[-1].startswith("compress.py: error: unknown model 'resnet8'; ")
