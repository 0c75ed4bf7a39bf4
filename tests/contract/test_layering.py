"""The architecture: imports go downward only, and some things live in one place only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LINES = (
    ("errors",),
    ("system",),
    ("registry", "progress", "files", "streams", "yaml_tree", "values", "quant.spec", "data.names", "users_code"),
    ("quant.clip_names",),
    ("quant.affine", "quant.plan", "config", "data", "metrics", "runlog", "tensor_file", "prune.masks"),
    ("graph",),
    ("stats",),
    ("quant", "clip"),
    ("lower", "ptq"),
    ("correct", "search", "deploy", "checkpoint"),
    ("prune",),
    ("regularize",),
    ("models",),
    ("report", "train", "surgery"),
    ("qat", "distill"),
    ("app",),
    ("cli",),
    ("compress",),
)
"""Each line imports only from the lines before it; a package may import its own modules of its own line or before."""

HOME = {
    "argparse": {"cli"},
    "onnx": {"deploy"},
    "onnx_ir": {"deploy"},
    "onnxruntime": {"deploy"},
    "onnxscript": {"deploy"},
    "yaml": {"config", "yaml_tree", "quant.plan_file", "quant.plan_schema", "stats.stats_file"},
}
"""Modules of others that only some of ours import."""

WRITES = {"rename", "renames", "symlink_to", "write_bytes", "write_text"}
"""Methods that change the disk."""

MAY_OPEN = {"checkpoint.write": "the temporary file of write_whole", "streams": "os.devnull, and logs, which grow"}
"""Modules beside `files` that open a file to write into it."""

NOWHERE = ("torch.ao", "torch.quantization")
MAY_PRINT = {"cli", "compress"}
LIGHT = ("errors", "system", "registry", "files", "streams", "yaml_tree", "values", "config", "cli")
"""What ``--help`` imports: nothing heavy."""


def rank(module: str) -> int | None:
    """The line of a module of ours, found by its longest known prefix."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        for line, members in enumerate(LINES):
            if prefix in members:
                return line
    return None


def belongs(module: str, members: set[str]) -> bool:
    return any(module == member or module.startswith(member + ".") for member in members)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            bare = node.module in ("qlib", "torch")
            names = [f"{node.module}.{alias.name}" for alias in node.names] if bare else [str(node.module)]
            yield from ((node.lineno, name) for name in names)


def violations(module: str, source: str) -> list[str]:
    """What a module of ours (named without ``qlib.``) does that the architecture forbids."""
    tree, found = ast.parse(source), []
    own = rank(module)
    if own is None:
        return [f"{module} has no place in LINES"]
    for line, name in imports(tree):
        where = f"{module}:{line} imports {name}"
        if name.startswith("qlib."):
            target = name.removeprefix("qlib.")
            theirs, same = rank(target), target.split(".")[0] == module.split(".")[0]
            if theirs is None or theirs > own or (theirs == own and not same):
                found.append(f"{where}, which is not below it")
        if any(name == banned or name.startswith(banned + ".") for banned in NOWHERE):
            found.append(f"{where}, which is being deleted")
        home = HOME.get(name.split(".")[0])
        if home is not None and not belongs(module, home):
            found.append(f"{where}, which only {sorted(home)} may")
    if module != "files":
        found += [f"{module}:{node.lineno} {what}, which only files may" for node, what in writes(tree, module)]
    if module not in MAY_PRINT:
        found += [f"{module}:{node.lineno} {what}" for node, what in prints(tree)]
    return found


def prints(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("print", "exit", "quit"):
            yield node, f"uses {node.id}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.exit", "os._exit"):
            yield node, f"uses {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(NOWHERE):
            yield node, f"uses {ast.unparse(node)}"


def writes(tree: ast.AST, module: str) -> Iterator[tuple[ast.AST, str]]:
    """What puts files in place by itself: a rename, a table, a temporary file, a file opened for writing."""
    callbacks = {id(each) for node in ast.walk(tree) if isinstance(node, ast.Lambda) for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            yield from ((node, f"imports {name}") for name in names & {"csv", "tempfile"})
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        own, _, method = called.rpartition(".")
        if own and method == "replace" and len(node.args) == 1 and own != "dataclasses" and not node.keywords:
            yield node, f"calls {called}"
        if own == "os" and method in ("replace", "getpid", "rename", "link", "symlink"):
            yield node, f"calls {called}"
        if own and method in WRITES and id(node) not in callbacks:  # a callback is given the temporary path
            yield node, f"calls {called}"
        mode = next((each.value for each in node.args if isinstance(each, ast.Constant) and each.value in MODES), None)
        if method == "open" and mode and module not in MAY_OPEN:
            yield node, f"opens a file with {mode!r}"


MODES = {f"{letter}{more}" for letter in "wax" for more in ("", "b", "+", "b+", "t")}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "qlib" else parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {
    module_name(path): path
    for path in [*sorted((ROOT / "qlib").rglob("*.py")), ROOT / "compress.py"]
    if path.read_text().strip() and module_name(path)
}


@pytest.mark.parametrize("module", FILES)
def test_architecture(module: str) -> None:
    source = FILES[module].read_text()
    if module == "quant":  # a package that spans lines: importing one module must not import another
        assert not list(imports(ast.parse(source)))
    else:
        assert violations(module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("graph.fuse", "from qlib.lower import lower", "graph.fuse:1 imports qlib.lower, which is not below it"),
        ("graph.fuse", "from qlib import clip", "graph.fuse:1 imports qlib.clip, which is not below it"),
        ("clip.avg", "def f():\n    import qlib.search", "clip.avg:2 imports qlib.search, which is not below it"),
        ("quant.affine", "import qlib.quant.plan_file", "imports qlib.quant.plan_file, which is not below it"),
        ("runlog", "import argparse", "which only ['cli'] may"),
        ("models.spec", "import yaml", "models.spec:1 imports yaml"),
        ("lower.exact", "from torch import ao", "imports torch.ao, which is being deleted"),
        ("lower.exact", "from torch.ao.quantization import x", "which is being deleted"),
        ("lower.exact", "import torch\ntorch.quantization.prepare(m)", "uses torch.quantization"),
        ("metrics", "print(1)", "metrics:1 uses print"),
        ("metrics", "import sys\nsys.exit(1)", "metrics:2 uses sys.exit"),
        ("report.plots", "import csv", "report.plots:1 imports csv, which only files may"),
        ("report.plots", "from tempfile import mkdtemp", "imports tempfile, which only files may"),
        ("report.plots", "import os\nos.replace(a, b)", "report.plots:2 calls os.replace"),
        ("report.plots", "temporary.replace(path)", "calls temporary.replace"),
        ("report.plots", "path.write_text('x')", "calls path.write_text"),
        ("report.plots", "path.open('wb')", "opens a file with 'wb'"),
        ("report.plots", "open(path, 'a')", "opens a file with 'a'"),
        ("nowhere", "", "nowhere has no place in LINES"),
    ],
)
def test_a_breach_is_found(module: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in violations(module, source)), violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lower.exact", "from qlib.graph import Graph\nfrom qlib.lower.ops import add"),
        ("quant.plan_file", "import yaml\nfrom qlib.quant.plan import Plan"),
        ("app.show", "x = name.replace('a', 'b')\nwith path.open('rb') as file: pass"),
        ("app.show", "write_whole(path, lambda file: file.write_bytes(b''), 'it')\ndataclasses.replace(x)"),
        ("files", "import csv, tempfile, os\nos.replace(a, b)\npath.open('w')"),
        ("cli", "import argparse, sys\nfrom qlib.config.flags.table import x\nprint(1); sys.exit(2)"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_help_imports_nothing_heavy() -> None:
    light = [module for module in FILES if belongs(module, set(LIGHT))]
    code = "\n".join(f"import qlib.{module}" for module in light)
    code += "\nimport sys; print([m for m in ('torch', 'numpy', 'scipy', 'sklearn') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_no_circle_between_packages() -> None:
    """Packages that stand on several lines could import each other in turn: they do not."""
    imported: dict[str, set[str]] = {}
    for module, path in FILES.items():
        room = module.split(".")[0]
        names = (name.split(".") for _, name in imports(ast.parse(path.read_text())) if name.startswith("qlib."))
        imported.setdefault(room, set()).update({parts[1] for parts in names} - {room})
    left = dict(imported)
    while bottom := [room for room, below in left.items() if not below & set(left)]:
        for room in bottom:
            del left[room]
    assert left == {}
