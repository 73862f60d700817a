"""A check of the tests: faults are put into the files that everything rests on, one at a time; do the tests see them?

    pip install cosmic-ray==8.7.0 coverage
    python benchmarks/mutants.py --jobs 2           300 mutants; hours
    python benchmarks/mutants.py --again            those that survived meet the tests once more, too
    python benchmarks/mutants.py --table            what was found, no more

Mutants are drawn with a seed from all that cosmic-ray makes of the channel algebra, the affine regions and the
fold pass, those left out that Python reads as the same program (types are not run). Coverage says first which of the
tests below run which line, and how long each takes. Each mutant then meets, in a copy of the checkout, the tests that
run what it changes, quick ones first, and those that share a fixture with them; where it is run by an import, all of
them. *killed*: a test failed, or one took several times as long. *survived* ones are listed with their change: each is
either the same behaviour in other words, and then gets a line in EQUIVALENT, or lacks a test. Rows:
`results/mutants.jsonl`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import math
import multiprocessing
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "results" / "mutants.jsonl"
COUNT, SEED = 300, 0
SECONDS, SLOWER = 20, 5  # of a processor, that a test may take beside so many times what it takes
TESTS = {
    "compressor/channels.py": ["channels", "prune", "uniform", "padding", "killers"],
    "compressor/affine.py": ["affine", "merge", "adapters", "conv_adapters", "spellings"],
    "passes/fold.py": ["fold", "scales", "composites", "camera"],
}
PRELOADED = [
    "pytest",
    "numpy",
    "scipy",
    "networkx",
    "torch.export",
    "onnx",
    "onnxscript",
    "onnxruntime",
]
# Survivors that were read and change nothing that anybody could see, by the line that they change.
EQUIVALENT = {
    "-            if given_up.get(choice.key, 0) + 1 < choice.candidates "
    "+            if given_up.get(choice.key, -1) + 1 < choice.candidates": "reads the graph once more, alike",
    "-@dataclass(frozen=True) +@dataclass(frozen=False)": "nobody writes to it",
    '-        found = [a["weight"] for k, a in bound if k == "embedding"] '
    '+        found = [a["weight"] for k, a in bound if k is "embedding"]': "one string",
    "-        random = np.random.default_rng(0) +        random = np.random.default_rng( 1)": "marks, any of them",
    '-    left, right = node.args[which == "addmm" :][:2] '
    '+    left, right = node.args[which == "addmm" :][: 3]': "a product has two factors",
    '-                    one.node, f"the weight of {site(read.user)} is shared with {site(others[0])}" '
    '+                    one.node, f"the weight of {site(read.user)} is shared with {site(others[ 1])}"': "any",
    "-            break +            continue": "nothing was given up: the graph is read again, alike",
    "-        if others and tensors[0] is not before[0]: "
    "+        if others and tensors[0] != before[0]:": "a node equals itself alone",
    "-@dataclass(frozen=True, eq=False) +@dataclass(frozen=False, eq=False)": "nobody writes to it",
    "-            mark[np.unique(classes)] += random.integers(1, 2**63, dtype=np.uint64) "
    "+            mark[np.unique(classes)] += random.integers(1, 2** 64, dtype=np.uint64)": "marks, any of them",
    "-        gone -= sum(graph.tensor(n.all_input_nodes[-1]).numel() for n in norms)  # a bias stays for each "
    "+        gone -= sum(graph.tensor(n.all_input_nodes[- 2]).numel() for n in norms)  # a bias stays for each": (
        "all tensors of a norm are equally long"
    ),
    "-        gone -= sum(graph.tensor(n.all_input_nodes[-1]).numel() for n in norms)  # a bias stays for each "
    "+        gone -= sum(graph.tensor(n.all_input_nodes[~1]).numel() for n in norms)  # a bias stays for each": (
        "all tensors of a norm are equally long"
    ),
    "-    if len(product.users) != 1 or product in graph.results or any(map(is_constant, operands.values())): "
    "+    if len(product.users) > 1 or product in graph.results or any(map(is_constant, operands.values())):": (
        "the number behind it reads it"
    ),
    "-            mark[np.unique(classes)] += random.integers(1, 2**63, dtype=np.uint64) "
    "+            mark[np.unique(classes)] += random.integers(1, 2** 62, dtype=np.uint64)": "marks, any of them",
    "-            mark[np.unique(classes)] += random.integers(1, 2**63, dtype=np.uint64) "
    "+            mark[np.unique(classes)] += random.integers( 2, 2**63, dtype=np.uint64)": "marks, any of them",
    "-    alone = Map(last.node, chain[0].source, scale.expand_as(scale "
    "+ shift), torch.zeros_like(scale + shift)) +    alone = Map(last.node, chain[ -1].source, "
    "scale.expand_as(scale + shift), torch.zeros_like(scale + shift))": "a front asks for no source",
    '-            what += f"; {before[0].target} is shared with {site(others[0])}, this site now has its own copy"'
    "  # type: ignore[union-attr] "
    '+            what += f"; {before[0].target} is shared with {site(others[ -1])}, this site now has its own copy"'
    "  # type: ignore[union-attr]": "any",
    "-            if given_up.get(choice.key, 0) + 1 < choice.candidates "
    "+            if given_up.get(choice.key, 0) ** 1 < choice.candidates": "the last candidate is read again, alike",
    "-            if len(exits) > 1 and (found.form is FEATURES or all(state == states[0] for state in states)): "
    "+            if len(exits) > 1 and (found.form is FEATURES or all(state == states[ 1] for state in "
    "states)):": "all equal to one are equal to another",
    '-        return "" if stays[c] == len(atoms.frozen) else atoms.frozen[stays[c]][1] '
    '+        return "" if stays[c] >= len(atoms.frozen) else atoms.frozen[stays[c]][1]': "no index is larger",
    "-            if given_up.get(choice.key, 0) + 1 < choice.candidates "
    "+            if given_up.get(choice.key, 0) + 1 <= choice.candidates": "the last candidate is read again, alike",
    "-    algebra: Algebra = field(repr=False) +    algebra: Algebra = field(repr=True)": "how it is printed",
    "-        steps.insert(0, (aten.add.Tensor, shift / scale)) "
    "+        steps.insert( -1, (aten.add.Tensor, shift / scale))": "in front of one step, or of none",
    "-        for (some, slices), key in zip(there, term.axes, strict=True): "
    "+        for (some, slices), key in zip(there, term.axes, strict=False):": "they are equally many",
}

Mutant = tuple[str, str, int]  # file, operator, occurrence


def mutants() -> list[Mutant]:
    """One for each place that an operator can change, in a fixed order: which of the changes it knows is drawn."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import Visitor, get_ast

    class Positions(Visitor):
        def __init__(self, operator: Any) -> None:
            self.operator = operator
            self.found: list[Any] = []

        def visit(self, node: Any) -> Any:
            self.found += [start for start, _ in self.operator.mutation_positions(node)]
            return node

    places: dict[tuple[Any, ...], list[Mutant]] = {}
    for file in TESTS:
        tree = get_ast((ROOT / file).read_text())
        for name in sorted(plugins.operator_names()):
            if plugins.get_operator(name).arguments():
                continue
            positions = Positions(plugins.get_operator(name)())
            positions.walk(tree)
            for i, start in enumerate(positions.found):
                places.setdefault((file, name.partition("_")[0], start), []).append((file, name, i))
    draw = random.Random(SEED)
    return [draw.choice(places[place]) for place in sorted(places)]


def mutated(mutant: Mutant) -> str | None:
    """The file's text with the fault; None where Python reads the same program."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    file, name, occurrence = mutant
    text = (ROOT / file).read_text()
    made = mutate_code(text, plugins.get_operator(name)(), occurrence)
    return made if made is not None and _program(made) != _program(text) else None


def _program(text: str) -> str:
    """What Python runs: no types, which `annotations` leaves unread, and no words."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return text
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.arg)):
            for name in ("returns", "annotation"):
                if hasattr(node, name):
                    setattr(node, name, None)
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def sample() -> Iterator[tuple[Mutant, str]]:
    everything = mutants()
    random.Random(SEED).shuffle(everything)
    left = COUNT
    for mutant in everything:
        if left and (text := mutated(mutant)) is not None:
            left -= 1
            yield mutant, text


def pytest_in(checkout: Path, words: list[str], recorder: Any = None) -> int:
    """pytest's exit code, in this process, of the compressor that lies in `checkout`."""
    import pytest

    os.chdir(checkout)
    sys.path[:0] = [str(checkout)]
    os.environ |= {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:cov", *words], recorder and [recorder]))


class Recorder:
    """Hears from pytest which test runs, for coverage to note beside every line, and how long each takes."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration


def watch(checkout: Path, file: str, found: Path) -> None:
    """Writes down the seconds of each test of one file, and which of them run which of its lines."""
    from coverage import Coverage

    coverage = Coverage(data_file=None, config_file=False, include=[str(checkout / file)])
    recorder = Recorder(coverage)
    coverage.start()
    code = pytest_in(checkout, [f"tests/test_{name}.py" for name in TESTS[file]], recorder)
    coverage.stop()
    if code:
        sys.exit(f"the tests of {file} fail as it is")
    lines = coverage.get_data().contexts_by_lineno(str(checkout / file))
    found.write_text(json.dumps({"seconds": recorder.seconds, "lines": lines}))


class Limits:
    """Ends this process where a test takes several times its seconds of a processor."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = seconds

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        limit = time.process_time() + SECONDS + SLOWER * self.seconds.get(nodeid, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), resource.RLIM_INFINITY))


def meet(checkout: Path, tests: Mapping[str, float], words: Path) -> None:
    """Ends with the exit code of tests, in their order; what they say goes into `words`."""
    with words.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pytest_in(checkout, ["-x", "--no-header", *tests], Limits(tests)))


def apart(target: Any, *arguments: Any) -> int:
    """The exit code of a function in a process that has heavy imports behind it; negative where a signal ended it."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def tests_of(text: str, other: str, known: dict[str, Any]) -> dict[str, float]:
    """The tests that run what differs between two programs, quick ones first, with the seconds that they take; then
    those of the same functions."""
    matcher = difflib.SequenceMatcher(None, text.splitlines(), other.splitlines(), autojunk=False)
    differ = {n + 1 for tag, i, j, *_ in matcher.get_opcodes() if tag != "equal" for n in range(i, j)}
    statements = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.stmt)]
    wide = set(differ)
    for line in differ:
        around = [n for n in statements if n.lineno <= line <= (n.end_lineno or n.lineno)]
        if around:
            least = min(around, key=lambda n: (n.end_lineno or n.lineno) - n.lineno)
            wide |= set(range(least.lineno, (least.end_lineno or least.lineno) + 1))
    runs = {test for line in wide for test in known["lines"].get(str(line), [])}
    seconds: dict[str, float] = known["seconds"]
    families = {
        test.partition("[")[0] for test in runs
    }  # what a fixture of all of them ran counts for the first
    wanted = seconds if not runs or "" in runs else [t for t in seconds if t.partition("[")[0] in families]
    ordered = sorted(wanted, key=lambda test: (test not in runs, seconds[test], test))
    return {test: seconds[test] for test in ordered}


def fate(checkout: Path, mutant: Mutant, text: str, known: dict[str, Any]) -> dict[str, object]:
    """What the tests say of one, in a copy that is as it was afterwards."""
    file = checkout / mutant[0]
    before = file.read_text()
    start = time.perf_counter()
    words = checkout.parent / "words.txt"
    file.write_text(text)
    try:
        code = apart(meet, checkout, tests_of(before, text, known), words)
    finally:
        file.write_text(before)
    failed = [line for line in words.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    by = "time" if code < 0 else next(iter(failed), "it does not start")
    return {
        "mutant": list(mutant), "state": "killed" if code else "survived", "by": by[:200] if code else "",
        "change": changed(before, text), "seconds": round(time.perf_counter() - start),
    }  # fmt: skip


def copied(folder: Path) -> Path:
    """A copy of what git keeps of this checkout."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    checkout = folder / "checkout"
    for name in listed.stdout.splitlines():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    return checkout


def measure(jobs: int, again: bool) -> None:
    """Adds a row for each of the sample that has none; rows of mutants that are not in it go."""
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    drawn = {(m, changed((ROOT / m[0]).read_text(), text)): (m, text) for m, text in sample()}
    done = {key: row for key, row in known().items() if key in drawn and not (again and unexplained(row))}
    ROWS.write_text("".join(f"{json.dumps(row)}\n" for row in done.values()))
    left = [one for key, one in drawn.items() if key not in done]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for n in range(jobs):
            free.put(copied(Path(folder, str(n))))

        def watched(file: str) -> dict[str, Any]:
            checkout, found = free.get(), Path(folder, file.replace("/", "-"))
            if apart(watch, checkout, file, found):
                sys.exit(1)
            free.put(checkout)
            return json.loads(found.read_text())

        tests = dict(zip(TESTS, pool.map(watched, TESTS), strict=True))

        def met(one: tuple[Mutant, str]) -> None:
            checkout = free.get()
            row = fate(checkout, *one, tests[one[0][0]])
            free.put(checkout)
            with ROWS.open("a") as file:
                print(json.dumps(row), file=file)
            print(f"{row['state']:9} {row['seconds']:4} s  {row['change']}", flush=True)

        list(pool.map(met, left))


def changed(before: str, text: str) -> str:
    """The lines that differ."""
    changes = difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
    return " ".join(line for line in changes if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def known() -> dict[tuple[Mutant, str], dict[str, object]]:
    """Rows by mutant and change: where a file has changed, an occurrence is another one."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {(tuple(row["mutant"]), row["change"]): row for row in map(json.loads, lines)}


def unexplained(row: Mapping[str, object]) -> bool:
    return row["state"] == "survived" and row["change"] not in EQUIVALENT


def table() -> None:
    rows = known()
    counts: dict[str, Counter[str]] = {file: Counter() for file in TESTS}
    for ((file, *_), _), row in rows.items():
        same = row["state"] == "survived" and not unexplained(row)
        counts[file]["the same" if same else str(row["state"])] += 1
    print(
        "| file | mutants | the same in other words | killed | survived | share killed |\n|---|---|---|---|---|---|"
    )
    for file, one in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        real = one["killed"] + one["survived"]
        share = f"{one['killed'] / real:.1%}" if real else ""
        print(
            f"| {file} | {one.total()} | {one['the same']} | {one['killed']} | {one['survived']} | {share} |"
        )
    print()
    for ((file, name, _), _), row in rows.items():
        if row["state"] == "survived":
            why = EQUIVALENT.get(str(row["change"]))
            print(f"- {file}, {name}: `{row['change']}`" + (f" ({why})" if why else ""))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument(
        "--again", action="store_true", help="survivors that nothing explains are tested again"
    )
    parser.add_argument("--table", action="store_true", help="test nothing")
    options = parser.parse_args()
    if not options.table:
        measure(options.jobs, options.again)
    table()


if __name__ == "__main__":
    main()
