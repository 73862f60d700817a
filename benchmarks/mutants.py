"""A check of the tests: faults are put into the files that everything rests on, one at a time; do the tests see them?

    pip install cosmic-ray==8.7.0
    python benchmarks/mutants.py                    300 mutants; hours
    python benchmarks/mutants.py --part 1/4         every fourth of them, for a process beside others
    python benchmarks/mutants.py --table            what was found, no more

Mutants are drawn with a seed from all that cosmic-ray makes of the channel algebra, the affine regions and the
fold pass, those left out that Python reads as the same program (types are not run). Each is tested in a copy of the
checkout: the file's own tests first, and if they all pass, those of what is built on it. *killed*: a test failed, or
a group of them took over 200 seconds of a processor. *survived* ones are listed with their change: each is either the
same behaviour in other words, and then gets a line in EQUIVALENT, or lacks a test. Rows: `results/mutants.jsonl`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "results" / "mutants.jsonl"
COUNT, SEED = 300, 0
SECONDS = 200  # of a processor, for one group of tests, which takes a minute or so
TESTS = {
    "compressor/channels.py": [
        ["tests/test_channels.py"],
        ["tests/test_prune.py", "tests/test_uniform.py", "tests/test_padding.py", "tests/test_killers.py"],
    ],
    "compressor/affine.py": [
        ["tests/test_affine.py"],
        ["tests/test_merge.py", "tests/test_conv_adapters.py", "tests/test_spellings.py"],
    ],
    "passes/fold.py": [["tests/test_fold.py"], ["tests/test_composites.py", "tests/test_camera.py"]],
}
# Survivors that were read and change nothing that anybody could see, by the line that they change.
EQUIVALENT = {
    "-            if given_up.get(choice.key, 0) + 1 < choice.candidates "
    "+            if given_up.get(choice.key, -1) + 1 < choice.candidates": "reads the graph once more, alike",
    "-@dataclass(frozen=True) +@dataclass(frozen=False)": "nobody writes to it",
    '-        found = [a["weight"] for k, a in bound if k == "embedding"] '
    '+        found = [a["weight"] for k, a in bound if k is "embedding"]': "one string",
    "-        random = np.random.default_rng(0) +        random = np.random.default_rng( 1)": "marks, any of them",
}

Mutant = tuple[str, str, int]  # file, operator, occurrence


def mutants() -> list[Mutant]:
    """One for each place that an operator can change, in a fixed order: which of the changes it knows is drawn."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import Visitor, get_ast

    class Positions(Visitor):
        def __init__(self, operator: Any) -> None:
            self.operator, self.found = operator, []

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


def fate(checkout: Path, mutant: Mutant, text: str) -> dict[str, object]:
    """What the tests say of one, in a copy that is as it was afterwards."""
    file = checkout / mutant[0]
    before = file.read_text()
    start = time.perf_counter()
    file.write_text(text)
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]
    state, by = "survived", ""
    try:
        for tests in TESTS[mutant[0]]:
            ended = subprocess.run(
                [*words, *tests],
                cwd=checkout,
                env=environment,
                capture_output=True,
                text=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)),
            )
            if ended.returncode:
                failed = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                state = "killed"
                by = "time" if ended.returncode < 0 else next(iter(failed), "it does not start")
                break
    finally:
        file.write_text(before)
    return {
        "mutant": list(mutant), "state": state, "by": by[:200], "change": changed(before, text),
        "seconds": round(time.perf_counter() - start),
    }  # fmt: skip


def changed(before: str, text: str) -> str:
    """The lines that differ."""
    changes = difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
    return " ".join(line for line in changes if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def known() -> dict[tuple[Mutant, str], dict[str, object]]:
    """Rows by mutant and change: where a file has changed, an occurrence is another one."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {(tuple(row["mutant"]), row["change"]): row for row in map(json.loads, lines)}


def table() -> None:
    rows = known()
    counts: dict[str, Counter[str]] = {file: Counter() for file in TESTS}
    for ((file, *_), _), row in rows.items():
        same = row["state"] == "survived" and row["change"] in EQUIVALENT
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
    parser.add_argument("--part", default="1/1", help="which share of the sample, as 2/4")
    parser.add_argument("--table", action="store_true", help="test nothing")
    options = parser.parse_args()
    if not options.table:
        part, parts = map(int, options.part.split("/"))
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            checkout = Path(folder, "checkout")
            names = subprocess.run(
                ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
            for name in names.splitlines():
                (checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, checkout / name)
            for number, (mutant, text) in enumerate(sample()):
                made = mutant, changed((ROOT / mutant[0]).read_text(), text)
                if number % parts == part - 1 and made not in known():
                    row = fate(checkout, mutant, text)
                    with ROWS.open("a") as file:
                        print(json.dumps(row), file=file)
                    print(f"{row['state']:9} {row['seconds']:4} s  {row['change']}", flush=True)
    table()


if __name__ == "__main__":
    main()
