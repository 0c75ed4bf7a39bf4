"""Users' code: what a model file, its network or its transform does is one sentence with its line, or computed."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runs import good, make_images, run

HEAD = """
import sys
import warnings
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

def pixels(image):
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255

class Net(nn.Module):
    dataset, input_shape = "imagefolder", (3, 8, 8)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        self.init()

    def init(self):
        pass

    def forward(self, x):
        return self.answer(self.fc(self.body(self.conv(x)).relu().mean((2, 3))))

    def body(self, x):
        return x

    def answer(self, x):
        return x
"""
QUANTIZE = "--qe --qe-calibration 1"


@dataclass(frozen=True)
class Row:
    """The lines of a function in the model file, the sentence, and how to run it. LINE is the last line."""

    method: str
    code: str
    sentence: str
    words: str = QUANTIZE


LINE = r"net\.py:50; "
FORWARD = rf"'net\.py:make' fails on images of 3x8x8, with {{}} at {LINE}correct its forward, or give the model an attr"
CAPTURE = "the model cannot be captured: "
TRANSFORM = r"image 'images/train/\w+/\d+\.png': the transform of 'net\.py:make' "
WEIGHTS = r"the weights '\w+\.weight' of net\.py:make are {}; they must be dense numbers of torch\.float32"

RAISED = {
    "an error": ("1 / 0", r"ZeroDivisionError \(division by zero\)"),
    "exit": ("sys.exit(0)", r"SystemExit \(0\)"),
    "GeneratorExit": ("raise GeneratorExit", "GeneratorExit"),
    "its own BaseException": ('raise type("Odd", (BaseException,), {})("why")', r"Odd \(why\)"),
    "recursion": ("self.body(x)", r"RecursionError \(maximum recursion depth exceeded.*\)"),
    "an error that has no text": ('raise type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})()', "Odd"),
    "a long text": ('raise ValueError("x y\\n" * 9000)', r"ValueError \((x y ){75}\.\.\.\)"),
}

TABLE = {
    **{f"forward: {name}": Row("body(self, x)", code, FORWARD.format(said)) for name, (code, said) in RAISED.items()},
    **{
        f"transform: {name}": Row("transform(self, x)", code, rf"{TRANSFORM}fails with {said} at {LINE}correct it")
        for name, (code, said) in RAISED.items()
        if name != "recursion"
    },
    **{
        f"construction: {name}": Row("init(self)", code, rf"'net\.py:make' fails with {said} at {LINE}correct it there")
        for name, (code, said) in RAISED.items()
        if name != "recursion"
    },
    "memory": Row("body(self, x)", "raise MemoryError", "there is not enough memory; give a lower -b or -j, a smaller"),
    "double in between": Row(
        "body(self, x)",
        "return x.double()",
        r"RuntimeError \(.* Double and Float\) in layer 'fc' at net\.py:25; correct",
    ),
    "double at the end": Row(
        "answer(self, x)",
        "return x.double()",
        rf"{CAPTURE}'cast' at net.py:25 computes in torch.float64; drop the conv",
    ),
    "a number of Python": Row(
        "body(self, x)", "return x * x.amax((1, 2, 3)).sum().item()", f"{CAPTURE}'sum' at net.py"
    ),
    "item": Row("body(self, x)", "return x * x[0, 0, 0, 0].item()", f"{CAPTURE}'select' at net.py:25 makes one number"),
    "a maximum of all": Row(
        "body(self, x)", "return x / x.max()", f"{CAPTURE}'max' at net.py:25 makes one number of a"
    ),
    "a branch": Row(
        "body(self, x)", "return x if x.max() > 0 else -x", f"{CAPTURE}it decides on the values .*, at {LINE}rewrite"
    ),
    "a mask as an index": Row(
        "body(self, x)", "return x * x[x > 0].sum()", f"{CAPTURE}'index' at net.py:25 decides by"
    ),
    "two images at once": Row("body(self, x)", "return x.view(2, 4, 6, 6)", rf"{CAPTURE}it decides .* at net\.py:24; "),
    "an exit when images come": Row(
        "body(self, x)",
        "return x if torch.compiler.is_exporting() or not x.any() else sys.exit(0)",
        FORWARD.format(r"SystemExit \(0\)"),
        "-e",
    ),
    "numpy": Row("body(self, x)", "return torch.from_numpy(x.numpy())", rf"{CAPTURE}it fails at {LINE[:-2]} .*numpy"),
    "TorchScript": Row(
        "init(self)",
        "warnings.simplefilter('ignore'); self.fc = torch.jit.trace(self.fc, torch.ones(1, 4))",
        "layer 'fc' is TorchScript, which cannot be captured; give the module that was scripted",
    ),
    "double weights": Row("init(self)", "self.double()", WEIGHTS.format(r"torch\.float64")),
    "half weights": Row("init(self)", "self.half()", WEIGHTS.format(r"torch\.float16")),
    "no weights": Row("init(self)", 'self.to("meta")', WEIGHTS.format("on the meta device")),
    "logits of integers": Row(
        "answer(self, x)", "return (9 * x).long()", r"returns logits of torch\.int64; make it ret"
    ),
    "logits of bool": Row("answer(self, x)", "return x > 0", r"returns logits of torch\.bool; make it return float32"),
    "complex logits": Row("answer(self, x)", "return torch.complex(x, x)", r"returns logits of torch\.complex64; make"),
    "NaN": Row("answer(self, x)", "return x * float('nan')", r"the output of 'mul' holds NaN or infinity, in images"),
    "NaN in evaluation": Row("answer(self, x)", "return x * float('nan')", r"gives NaN or infinity for some", "-e"),
    "one logit": Row("answer(self, x)", "return x[:, 0]", r"returns a tensor of 2 for 2 images, and the dataset has 4"),
    "few logits": Row("answer(self, x)", "return x[:, :2]", r"returns a tensor of 2x2 for 2 images, and the dataset"),
    "no logits": Row("answer(self, x)", "return None", r"returns 'NoneType' with no tensor of logits; make it return"),
    "no transform": Row("transform(self, x)", "return None", f"{TRANSFORM}returns 'NoneType'; make it return a tensor"),
    "array": Row("transform(self, x)", "return pixels(x).numpy()", f"{TRANSFORM}returns 'ndarray'; make it return a"),
    "integers": Row(
        "transform(self, x)", "return pixels(x).long()", rf"{TRANSFORM}returns a tensor of torch\.int64; m"
    ),
    "doubles": Row("transform(self, x)", "return pixels(x).double()", rf"{TRANSFORM}returns a tensor of torch\.float6"),
    "NaN pixels": Row("transform(self, x)", "return pixels(x) * float('nan')", f"{TRANSFORM}returns NaN or infinity;"),
    "other sizes": Row(
        "transform(self, x)",
        "return pixels(x)[:, : 8 - int(x.getpixel((1, 0))[0] % 2)]",
        rf"{TRANSFORM}returns a tensor of 3x7x8, and the model has input_shape = \(3, 8, 8\); make them agree",
    ),
    "a wrong attribute": Row(
        "init(self)", "self.input_shape = 'x' * 999", r"input_shape = 'x{99}\.\.\.; make it \(cha"
    ),
    "a property that fails": Row(
        "init(self)",
        "type(self).dataset = property(lambda self: 1 / 0)",
        rf"'net\.py:make' fails with ZeroDivisionError \(division by zero\) at {LINE}correct it there",
    ),
    "nothing to train": Row(
        "init(self)", "self.requires_grad_(False)", "has no parameter that can be tr", "--epochs 1"
    ),
    "in a gradient": Row(
        "body(self, x)",
        "x.register_hook(lambda _: 1 / 0) if x.requires_grad else 0; return x",
        rf"the run fails in a model file, with ZeroDivisionError \(division by zero\) at {LINE}correct it there",
        "--epochs 1",
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "images", train=6, val=6)


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    (tmp_path / "images").symlink_to(images)
    return tmp_path


def write(folder: Path, method: str, code: str, init: str = "pass") -> str:
    """Writes a model file whose line 50 is `code`, the body of a method of the network; the `-a` of its model."""
    head = HEAD.replace("pass", init, 1)
    head += "\n" * (47 - head.count("\n"))
    make = "\ndef make():\n    return Own()\n"
    (folder / "net.py").write_text(f"{head}class Own(Net):\n    def {method}:\n        {code}\n{make}")
    return "net.py:make"


@pytest.mark.parametrize("name", TABLE)
def test_users_code(folder: Path, name: str) -> None:
    row = TABLE[name]
    done = run(f"-a {write(folder, row.method, row.code)} images {row.words}", folder)
    assert done.code == 2, done
    assert re.search(row.sentence, done.err), done.err
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("compress.py: error: ")
    assert len(done.err) < 900
    assert "Traceback" not in done.out + done.err + done.log


IMPORTS = {
    "exit": ("import sys\nsys.exit(0)\n", r"'f\.py' fails with SystemExit \(0\) at f\.py:2; correct it there"),
    "GeneratorExit": ("raise GeneratorExit\n", r"'f\.py' fails with GeneratorExit at f\.py:1; correct"),
    "syntax": ("import sys\n\ndef f(:\n", r"'f\.py' fails with SyntaxError \(.*\) at f\.py:3; correct"),
    "a zero byte": ("x = 1\0\n", r"'f\.py' fails with SyntaxError \(.*null bytes\)"),
    "what stands beside it": (
        "import beside\n",
        r"'f\.py' fails with ZeroDivisionError .* at .*/beside\.py:1; correct",
    ),
    "a package that is not there": (
        "import no_such\n",
        r"'f\.py' fails with ModuleNotFoundError \(No .*\) at f\.py:1;",
    ),
    "an argument": ("def make(depth): pass\n", r"'f\.py:make' fails with TypeError \(.*depth.*\) at f\.py:1; correct"),
    "no module": ("def make(): return 3\n", r"'f\.py:make' returns 'int', not an nn\.Module; make it return the model"),
}


@pytest.mark.parametrize(("text", "sentence"), IMPORTS.values(), ids=IMPORTS)
def test_imports(folder: Path, text: str, sentence: str) -> None:
    (folder / "beside.py").write_text("x = 1 / 0\n")
    (folder / "f.py").write_text(text)
    done = run("-a f.py:make images -e", folder)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done
    assert re.search(sentence, done.err), done.err


def test_ctrl_c_stays_one(folder: Path) -> None:
    assert run(f"-a {write(folder, 'body(self, x)', 'raise KeyboardInterrupt')} images -e", folder).code == 130


def test_a_transform_in_worker_processes(folder: Path) -> None:
    done = run(f"-a {write(folder, 'transform(self, x)', 'sys.exit(0)')} images -e", folder, workers=2)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done
    assert re.search(rf"error: {TRANSFORM.replace('train', 'val')}fails with SystemExit \(0\) at {LINE}", done.err)


COMPUTED = {
    "layers with odd names, of three dimensions, without sizes": (
        'setattr(self, "class", nn.Conv2d(4, 4, 1)); self.wide, self.lazy = nn.Conv3d(1, 1, 1), nn.LazyConv2d(4, 1)',
        'return self.lazy(self.wide(getattr(self, "class")(x)[:, None])[:, 0])',
        ("class_", "wide", "lazy"),
    ),
    "an LSTM": (
        "self.lstm = nn.LSTM(36, 36, batch_first=True)",
        "return self.lstm(x.flatten(2))[0].unflatten(2, (6, 6))",
        ("lstm",),
    ),
    "several results, masks, indices": (
        "self.table = nn.Embedding(9, 4)",
        "x = torch.where(x > 0, x, 0.1 * x) - x.max(1, keepdim=True)[0];"
        " return x + self.table((9 * x[:, 0].sigmoid()).long().clamp(0, 8)).permute(0, 3, 1, 2)",
        ("where", "amax", "table"),
    ),
}


@pytest.mark.parametrize(("init", "body", "layers"), COMPUTED.values(), ids=COMPUTED)
def test_what_is_computed(folder: Path, init: str, body: str, layers: tuple[str, ...]) -> None:
    write(folder, "body(self, x)", body, init)
    done = good(f"-a net.py:make images {QUANTIZE} --export-onnx --verify 4", folder)
    assert "verification: exact" in done.lines
    plan = (done.folder / "layer_quant_params.yaml").read_text()
    assert [layer for layer in layers if not re.search(rf"^  {layer}\w*:$", plan, re.MULTILINE)] == []
    assert abs(float(done.metrics("quantized")["loss"]) - float(done.metrics("fp32")["loss"])) < 0.1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("return F.dropout(x, 0.5)", id="random"),
        pytest.param("self.seen = getattr(self, 'seen', 0) + 1; return x * self.seen", id="of what it keeps"),
    ],
)
def test_a_model_that_does_not_repeat_itself(folder: Path, body: str) -> None:
    done = good(f"-a {write(folder, 'body(self, x)', body)} images -e", folder)
    assert sum("Warning: net.py:make answers the same images in another way each time" in line for line in done.lines)
    done = good(f"-a {write(folder, 'body(self, x)', 'return x')} images -e", folder)
    assert not any("another way" in line for line in done.lines)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("return x - x.mean(0)", id="mean"),
        pytest.param("return x - x[0]", id="first image"),
        pytest.param("return x.cumsum(0)", id="order"),
        pytest.param("return F.batch_norm(x, None, None, training=True)", id="norm of the batch"),
    ],
)
def test_a_model_whose_answer_depends_on_the_batch(folder: Path, body: str) -> None:
    done = run(f"-a {write(folder, 'body(self, x)', body)} images -e", folder)
    assert done.code == 2
    assert "'net.py:make' answers an image alone in another way than in a batch, where its logits depend" in done.err


@pytest.mark.parametrize("where", ["file", "function"])
def test_what_a_model_file_sets_for_the_process_is_set_back(folder: Path, where: str) -> None:
    write(folder, "init(self)", "pass")
    lines = [
        "import os; os.chdir('/')",
        "warnings.simplefilter('error')",
        "torch.set_grad_enabled(False)",
        "torch.set_default_device('meta')",
        "torch.set_default_dtype(torch.float64)",
    ]
    text = (folder / "net.py").read_text()
    made = "def make(num_classes):\n    model = Net()\n    {}\n    return model\n".format("\n    ".join(lines))
    (folder / "net.py").write_text(text + ("\n".join(lines) if where == "file" else made))
    filters = list(warnings.filters)
    good("-a net.py:make images --epochs 1" if where == "function" else "-a net.py:make images -e", folder)
    assert warnings.filters == filters
    assert torch.is_grad_enabled()
    assert (torch.get_default_dtype(), torch.get_default_device()) == (torch.float32, torch.device("cpu"))
    assert list((folder / "logs").iterdir())


def test_a_forward_method_without_self(folder: Path) -> None:
    write(folder, "init(self)", "pass")
    text = "\nOwn.forward = staticmethod(lambda x: torch.cat([x.mean((2, 3)), x[:, :1, 0, 0]], 1))\n"
    (folder / "net.py").write_text((folder / "net.py").read_text() + text)
    good("-a net.py:make images -e", folder)
