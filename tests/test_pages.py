"""The site: every code block of docs/ runs, the reference knows everything, and it builds without a warning."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import ROOT, Block, Reader, blocks, imports_from, lines

from compressor import registry, schema, target
from compressor.api import Options
from compressor.ir import Graph
from compressor.run import Run

PAGES = sorted((ROOT / "docs").rglob("*.md"))
LONG = (
    "adapters.md",
    "detectors.md",
    "text.md",
    "search.md",
)  # pages whose blocks take over twenty seconds: `make nightly` runs them
NOT_RUN = 7  # blocks of all pages together, at most


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The files that examples/playground.py makes, made once."""
    made: dict[str, Path] = {}

    def make(words: str) -> Path:
        if words not in made:
            folder = made[words] = tmp_path_factory.mktemp("playground")
            subprocess.run(
                [sys.executable, str(ROOT / "examples" / "playground.py"), *words.split()],
                cwd=folder, check=True, capture_output=True, timeout=300,
            )  # fmt: skip
        return made[words]

    return make


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """In place of `Run.baseline`: the floats of one model for one target are emitted once, not for every command."""
    kept: dict[object, object] = {}
    emit = Run.baseline

    def once(run: Run, graph: Graph) -> object:
        key = graph.fingerprint(), run.target, tuple(run.fixed(graph).items())
        if key not in kept:
            made = emit(run, graph)
            folder = tmp_path_factory.mktemp("float")
            if made is not None:
                shutil.copytree(made.path.parent, folder, dirs_exist_ok=True)
                made = dataclasses.replace(made, path=folder / made.path.name)
            kept[key] = made
        return kept[key]

    return once


@pytest.fixture
def reader(
    playground: Callable[[str], Path],
    baseline: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Reader:
    monkeypatch.setattr(Run, "baseline", baseline)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compress"])
    monkeypatch.setattr("compressor.stopwatch.TIMING_SECONDS", 0.02)
    monkeypatch.setattr("compressor.run.BENCH_SECONDS", 0.1)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return Reader(playground)


def runnable(page: Path) -> list[Block]:
    return [one for one in blocks(page) if one.why is None and one.language not in ("text", "")]


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.nightly] if p.name in LONG else []) for p in PAGES if runnable(p)],
    ids=lambda p: p.relative_to(ROOT / "docs").as_posix(),
)
def test_blocks_run(page: Path, reader: Reader, tmp_path: Path) -> None:
    with imports_from(tmp_path):
        for block in runnable(page):
            reader.run(block)


def test_nearly_all_blocks_run() -> None:
    found = [one for page in PAGES for one in blocks(page)]
    assert {one.language for one in found} <= {"bash", "python", "toml", "text"}
    skipped = [f"{one.page}: {one.why}" for one in found if one.why is not None]
    assert len(skipped) <= NOT_RUN, skipped
    fences = sum(len(re.findall(r"^ *(?:> *)?```", page.read_text(), re.M)) for page in PAGES)
    assert fences == 2 * len(found)  # none is written so that it is overlooked


def test_a_broken_block_fails(reader: Reader) -> None:
    block = Block("page", "bash", None, "compress nowhere.pt2\n", None)
    with pytest.raises(AssertionError, match="exit code 3, not 0"):
        reader.run(block)
    reader.run(dataclasses.replace(block, code="compress nowhere.pt2  # exit 3\n"))
    with pytest.raises(NameError):
        reader.run(Block("page", "python", None, "unheard_of\n", None))
    with pytest.raises(AssertionError):
        reader.run(Block("page", "bash", None, "python examples/compare_runs.py\n", None))
    assert list(lines("a \\\n b\n# c\n\nd  # exit 2\n")) == ["a   b", "d  # exit 2"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT / "docs").as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


# ----------------------------------------------------------------------- the examples

# What each is run with; a name that is missing here fails the test below.
EXAMPLES = {
    "adapters.py": "",
    "budget.py": "vision",
    "own_metric.py": "",
    "sequence_model.py": "",
}
ELSEWHERE = {
    "playground.py": "every page",
    "compare_runs.py": "how-to/ci.md",
    "load_in_app.py": "how-to/mobile.md",
    "verify_in_ci.py": "test_end_to_end",
    "digits.py": "make demo, in the tests of it",
    **dict.fromkeys(("from_python.py", "own_data.py", "prune_finetune_int8.py"), "test_docs"),
}


def test_every_example_is_run() -> None:
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, *ELSEWHERE}
    for name, where in ELSEWHERE.items():
        if where.endswith(".md"):
            assert f"python examples/{name}" in (ROOT / "docs" / where).read_text()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    if EXAMPLES[name]:
        reader.command(f"python examples/playground.py {EXAMPLES[name]}")
    reader.command(f"python examples/{name}")
    assert "wrote" in capsys.readouterr().out


# ----------------------------------------------------------------------- the reference


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """Every generated section."""
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"))["sections"]
    return {name: section() for name, section in made.items()}


def test_docstrings_are_split_by_name() -> None:
    split = runpy.run_path(str(ROOT / "docs" / "reference.py"))["split"]
    doc = """First line.

    one: of the first. two, three: of both; four: not a name. Prose: that
    stays. one (again): twice.

    More prose.
    """
    text, found = split(doc, ["one", "two", "three"])
    assert text == "First line.\n\nMore prose."
    assert found == [
        (("one",), "of the first."),
        (("two", "three"), "of both; four: not a name. Prose: that stays."),
        (("one",), "twice."),
    ]


def unexplained(section: str) -> list[str]:
    """Rows of tables with a name in the first column and nothing in the last."""
    return re.findall(r"^\| `.*\| +\|$", section, re.M)


@pytest.mark.parametrize("name", ["passes", "commands", "report"])
def test_every_option_is_explained(name: str, reference: dict[str, str]) -> None:
    assert unexplained(reference[name]) == []
    assert unexplained("| `a` | it |\n| `b` |  |") == ["| `b` |  |"]


def test_the_reference_knows_everything(reference: dict[str, str]) -> None:
    for name, cls in registry.passes().items():
        section = reference["passes"].split(f"## `{name}`\n")[1].split("\n## ")[0]
        assert all(f"| `{field.name}` |" in section for field in dataclasses.fields(cls)), name
    assert all(f"## `{name}`" in reference["targets"] for name in registry.targets())
    assert all(f"| `{field.name}` |" in reference["python"] for field in dataclasses.fields(Options))
    assert all(
        f"| `{field.name}` |" in reference["plugins"] for field in dataclasses.fields(target.QuantSpec)
    )
    asked = {m for page in PAGES for m in re.findall(r"^<!-- generated: (\w+) -->$", page.read_text(), re.M)}
    assert asked == set(reference)


def test_the_schema_knows_every_key(reader: Reader) -> None:
    from compressor.report import read_report

    reader.command("python examples/playground.py vision")
    reader.command(
        "compress net.pt2 --passes prune,int8 --calib images.npz --eval test.npz --target mobile -o out"
    )
    report = read_report("out/report.json")
    assert schema.unknown(report) == []
    assert report["outputs"][0]["shape"] == [report["inputs"][0]["shape"][0], 10]
    report["rows"][0]["surprise"] = report["emitted"]["more"] = 1
    assert schema.unknown(report) == ["emitted.more", "rows[].surprise"]
    missing = [key for key in schema.REPORT if not present(report, key.removesuffix(".*").split("."))]
    assert set(missing) <= {
        *("emitted.data_sha256", "emitted.latency.note", "emitted.postprocess", "emitted.program.*"),
        *("continued_from.*", "history", "rows[].declines[].site", "rows[].declines[].reason"),
        *(key for key in schema.REPORT if key.startswith(("emitted.latency", "latency_table"))),
    }


def present(value: object, path: list[str]) -> bool:
    if not path:
        return True
    name = path[0].removesuffix("[]")
    if not isinstance(value, dict) or name not in value:
        return False
    below = value[name] if path[0].endswith("[]") else [value[name]]
    return any(present(one, path[1:]) for one in below)


def test_the_numbers_of_the_readme_are_measured() -> None:
    """Those of its table stand in whole_line.md, row by row."""
    readme, measured = (
        (ROOT / name).read_text() for name in ("README.md", "benchmarks/results/whole_line.md")
    )
    rows = re.findall(r"^\| (digits|ResNet-20|ResNet-56)(.*)$", readme, re.M)
    assert len(rows) == 3
    for name, cells in rows:
        row = re.search(rf"^\| {name.lower().replace('-', '')}: (.*)$", measured, re.M)
        numbers = re.findall(r"\d+\.\d+", cells)
        assert row is not None and len(numbers) >= 4
        assert set(numbers) <= set(re.findall(r"\d+\.\d+", row[1])), name


# ----------------------------------------------------------------------- the site


@pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed: [docs]"
)
def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly, and nothing in it is loaded from elsewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"|<link[^>]+href="(https?:[^"]+)"', text
        )
        assert not loaded, page
        assert "<!-- generated" not in text and "<!-- table" not in text, page
    assert "Results.trainable" not in (tmp_path / "reference" / "python.html").read_text()
    assert "absorb_norms" in (tmp_path / "reference" / "passes.html").read_text()
