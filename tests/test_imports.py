"""Who may import whom, who may touch which library, and how light the package is.

The order of the files is the architecture: data flows down TIERS, imports go up it, and files of one tier do
not know each other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import compressor

ROOT = Path(__file__).resolve().parent.parent
TIERS = [
    ["errors", "blockwise", "units", "schema", "pieces"],
    [
        "toml",
        "names",
        "tidy",
        "dialect",
        "records",
        "spill",
        "images",
        "archive",
        "unpickle",
        "expressions",
        "pytrees",
        "standins",
        "contrib",
        "nms",
        "words",
        "stable",
        "external",
        "conditions",
    ],
    ["ir"],
    [
        "ops",
        "spec",
        "receipt",
        "decoding",
        "sources",
        "camera",
        "pickles",
        "architecture",
        "device",
        "detectors",
        "accelerators",
    ],
    [
        "batches",
        "seq2seq",
        "texts",
        "checkpoint",
        "folders",
        "inplace",
        "flatten",
        "composites",
        "slices",
        "costs",
        "partitions",
    ],
    ["target", "data", "matching", "precision", "weights", "tasks", "blend", "sentence"],
    ["constants", "layout", "atoms", "evaluation", "lowering", "postprocess", "edges"],
    ["steps", "moves", "sharing", "uniform", "scales", "heads"],
    ["features", "positions", "export", "absorb", "proof"],
    ["kernels", "ties", "padding", "assembly"],
    [
        "translator",
        "affine",
        "channels",
        "statistics",
        "place",
        "elimination",
        "readers",
        "augment",
        "samples",
        "student",
        "noise",
    ],
    [
        "probe",
        "savings",
        "reconstruct",
        "quantize",
        "labels",
        "masked_norms",
        "surgery",
        "widths",
        "trainable",
        "distillation",
    ],
    ["capture", "misses", "oracle", "ledger", "learning"],
    ["gate", "huggingface", "adapters", "criteria"],
    ["load", "emit", "factors"],
    ["runtime", "handover"],
    ["verify", "apart", "publishing"],
    ["measure"],
    ["jitter", "sessions", "advice", "profiling", "progress"],
    ["pipeline", "delivery"],
    ["notices", "layers"],
    [
        "budgets",
        "survey",
        "stopwatch",
        "identities",
        "watch",
        "forms",
        "equalise",
        "detections",
        "counterparts",
    ],
    ["rebuild", "branches", "splits", "pixels", "mixed", "tables", "quantised", "divergence"],
    ["rounding", "weight_only"],
    ["passes", "targets"],
    ["report", "registry", "opening"],
    ["program", "metrics", "differences", "page"],
    ["run"],
    ["claims"],
    ["inspection"],
    ["api"],
    ["completion", "config"],
    ["console", "options"],
    ["console_times", "console_search", "console_checks", "console_layers"],
    ["commands"],
    ["cli"],
]
TIER = {name: height for height, names in enumerate(TIERS) for name in names}
# The files of compressor/search/, in the same order; the core knows none of them, but for `api`.
SEARCH = [
    ["frozen", "objectives", "space", "timing", "picture"],
    ["store"],
    ["trial"],
    ["engines"],
    ["study"],
    ["tune"],
    ["sweep", "fleet"],
]
OWNERS = {"torch.onnx": "translator", "onnxruntime": "runtime"}  # library -> the one file that imports it


# ------------------------------------------------------------------------- the walkers


def project_imports(source: str, package: str) -> Iterator[str]:
    """Dotted names of our modules that a file imports, anywhere in it: `compressor.ir`, `passes.fold`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names] if base in PACKAGES else [base]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


PACKAGES = ("compressor", "passes", "targets")


def order_offences(stem: str, source: str) -> list[str]:
    """Imports of `compressor/<stem>.py` that go down the tiers, or along one."""
    offences = []
    for name in project_imports(source, "compressor"):
        head, _, rest = name.partition(".")
        module = rest.split(".")[0] if head == "compressor" else head
        if head != "compressor":
            offences.append(f"{stem} imports {head}/, which only registry knows")
        elif module in TIER and module != stem and TIER[module] >= TIER[stem]:
            offences.append(f"{stem} imports {module}, which stands below or beside it")
    return offences


def plugin_offences(package: str, stem: str, source: str) -> list[str]:
    """Imports of a pass or a target that reach another one, or the parts of the core above them."""
    offences = []
    for name in project_imports(source, package):
        head, _, rest = name.partition(".")
        module = rest.split(".")[0]
        if head != "compressor" and not (head == package and stem == "__init__"):
            offences.append(f"{package}/{stem} imports {name}")
        elif head == "compressor" and module in TIER and TIER[module] >= TIER[package]:
            offences.append(f"{package}/{stem} imports {name}, which stands below it")
    return offences


def library_offences(stem: str, source: str) -> list[str]:
    """Use of torch.onnx, torch.export's functions and onnxruntime outside the owning file; types are free."""
    tree = ast.parse(source)
    origins: dict[str, str] = {}  # local name -> what it stands for
    used: list[tuple[str, ast.AST]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {alias.asname: alias.name for alias in node.names if alias.asname}
            used += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            origins |= names
            used += [(name, node) for name in names.values()]
        elif isinstance(node, ast.Attribute):
            used.append((ast.unparse(node), node))
    free = typing_only(tree)
    offences = [
        f"{stem} uses {name}, which belongs to {owner}"
        for name, node in used
        for library, owner in OWNERS.items()
        if f"{name}.".startswith(f"{library}.") and stem != owner and id(node) not in free
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and stem != "export":
            head, _, rest = ast.unparse(node.func).partition(".")
            name = ".".join(filter(None, [origins.get(head, head), rest]))
            if name.startswith("torch.export.") and name.split(".")[-1][0].islower():
                offences.append(f"{stem} calls {name}, which belongs to export")
    return offences


def typing_only(tree: ast.AST) -> set[int]:
    """Nodes below `if TYPE_CHECKING`."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


# --------------------------------------------------------------------------- the order


@pytest.mark.parametrize("path", files("compressor"), ids=lambda path: path.stem)
def test_imports_go_up_the_tiers(path: Path) -> None:
    if path.stem.startswith("__"):
        return
    assert path.stem in TIER, f"{path.name} is new: give it a place in TIERS"
    assert order_offences(path.stem, path.read_text()) == []


@pytest.mark.parametrize("path", files("compressor/search"), ids=lambda path: path.stem)
def test_a_search_stands_on_the_core(path: Path) -> None:
    height = {name: i for i, names in enumerate(SEARCH) for name in names}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        for name in names:
            if node.level == 1:
                assert height[name] < height[path.stem], f"{path.stem} imports {name}, beside or below it"
            else:
                assert name == "__version__" or TIER[name] < TIER["api"], f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", files("compressor"), ids=lambda path: path.stem)
def test_the_core_knows_no_search(path: Path) -> None:
    assert path.stem == "api" or "from .search" not in path.read_text()


@pytest.mark.parametrize(
    "path", [*files("passes"), *files("targets")], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_a_pass_knows_no_other_pass_and_no_target(path: Path) -> None:
    assert plugin_offences(path.parent.name, path.stem, path.read_text()) == []


@pytest.mark.parametrize(
    "path", [p for name in PACKAGES for p in files(name)], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_each_library_has_one_owner(path: Path) -> None:
    stem = path.stem if path.parent.name == "compressor" else f"{path.parent.name}/{path.stem}"
    assert library_offences(stem, path.read_text()) == []


@pytest.mark.parametrize(
    ("stem", "source"),
    [
        ("ir", "from .ops import kind"),
        ("ir", "from . import errors, ops"),
        ("ops", "def f():\n    from compressor.pipeline import Pass"),
        ("verify", "from .measure import bench"),
        ("capture", "import compressor.load"),
        ("pipeline", "import passes"),
        ("emit", "from targets.cpu import CPU"),
    ],
)
def test_an_import_down_the_tiers_is_found(stem: str, source: str) -> None:
    assert len(order_offences(stem, source)) == 1
    assert (
        order_offences(stem, "import numpy\nfrom .errors import UsageError\nfrom . import __version__") == []
    )


@pytest.mark.parametrize(
    ("package", "stem", "source"),
    [
        ("passes", "prune", "from .fold import Fold"),
        ("passes", "prune", "from passes.fold import Fold"),
        ("passes", "int8", "from targets import cpu"),
        ("passes", "int8", "from compressor import api"),
        ("targets", "cpu", "import passes"),
        ("targets", "__init__", "from passes import PASSES"),
    ],
)
def test_a_pass_that_knows_another_is_found(package: str, stem: str, source: str) -> None:
    assert len(plugin_offences(package, stem, source)) == 1
    assert (
        plugin_offences(package, "__init__", "from .cpu import CPU\nfrom compressor.target import Target")
        == []
    )


@pytest.mark.parametrize(
    ("stem", "source"),
    [
        ("api", "import onnxruntime"),
        ("measure", "def f():\n    import onnxruntime as ort"),
        ("passes/int8", "import torch.onnx"),
        ("api", "import torch\ndef f(p): torch.onnx.export(p)"),
        ("load", "import torch\ndef f(p): return torch.export.load(p)"),
        ("load", "from torch.export import export\nexport(1)"),
        ("load", "from torch import export as e\ne.save(1)"),
    ],
)
def test_a_stolen_library_is_found(stem: str, source: str) -> None:
    assert library_offences(stem, source)
    allowed = (
        "from typing import TYPE_CHECKING\nfrom torch.export import ExportedProgram\n"
        "if TYPE_CHECKING:\n    import onnxruntime as ort\n"
        "def f(p: ExportedProgram, s: ort.X): return p.module()"
    )
    assert library_offences(stem, allowed) == []


# ---------------------------------------------------------------------------- the weight


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after the statement."""
    code = f"import sys\ntry:\n    {statement}\nfinally:\n    print('\\n', *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "numpy", "rich", "networkx", "transformers"}


@pytest.mark.parametrize(
    "statement",
    [
        "import compressor",
        "import compressor.cli",
        "from compressor import UsageError, __version__",
        "sys.argv = ['compress', '--help']; from compressor.cli import main; main()",
        "sys.argv = ['compress', 'verfy']; from compressor.cli import main; main()",
        "sys.argv = ['compress', 'missing.pt2']; from compressor.cli import main; main()",
    ],
)
def test_nothing_heavy_is_loaded(statement: str) -> None:
    assert loaded_by(statement) & HEAVY == set()


def test_the_heavy_import_would_show() -> None:
    assert "numpy" in loaded_by("import numpy")


def test_listing_targets_needs_no_torch() -> None:
    assert loaded_by("from compressor import registry; registry.targets()") & (HEAVY - {"rich"}) == set()


def test_help_answers_within_300_ms() -> None:
    """The best of several runs: other work on the machine is not what is measured."""

    def run(*words: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(run("-m", "compressor", "--help") for _ in range(5)) < 0.3
    assert run("-c", "import time; time.sleep(0.31)") > 0.3


# ------------------------------------------------------------------------ the public names


def test_the_public_names() -> None:
    public = {
        *("CompressorError", "ContractError", "DataError", "FileError", "OutputError", "TargetError"),
        *("UnsupportedError", "UsageError", "TESTED_TORCH", "__version__", "Options", "Result", "compress"),
    }
    assert set(compressor.__all__) == public and public <= set(dir(compressor))
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        compressor.compres  # noqa: B018


def test_the_lazy_names_are_the_apis() -> None:
    from compressor import api

    assert (compressor.compress, compressor.Options, compressor.Result) == (
        api.compress,
        api.Options,
        api.Result,
    )
