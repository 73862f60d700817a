"""Tries to break it: random networks through random passes, damaged files, runs that are killed or left without room.

    python benchmarks/hostile.py 1000                     so many networks, two specs each
    python benchmarks/hostile.py 0 --files 100            so many accidents of every kind of file
    python benchmarks/hostile.py 0 --faults 50            so many faults
    python benchmarks/hostile.py 1000 --seed 1            others

Networks are judged by `tests/hostile/judgement.py`: plain PyTorch and plain ONNX Runtime, no check of ours. What is
done stands in build/hostile-SEED.jsonl, a line a case, and is not done again: a run goes on where the last one was
stopped, and a larger N adds cases. Writes results/hostile.md; what stands there below "Found" is kept. Exit code 1
where anything was wrong. `--shrink SEED:NUMBER:RUN` shrinks a network that failed, and prints the plan that is left.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "hostile"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
RESULTS = ROOT / "benchmarks" / "results" / "hostile.md"
RUNS = 2  # specs a network
CHUNK = 50  # networks of one process
SECONDS = 180  # of one run
RARE = 10  # sequences with fewer runs share a row
GOOD = ("kept", "declined", "refused", "caught")
Case = dict[str, Any]


class State:
    """The cases that are done, by part and name."""

    def __init__(self, seed: int) -> None:
        self.path = ROOT / "build" / f"hostile-{seed}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        self.cases: dict[tuple[str, str], Case] = {}
        self.read()

    def read(self) -> None:
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            case = json.loads(line)
            self.cases[case["part"], case["case"]] = case

    def add(self, **case: Any) -> None:
        self.cases[case["part"], case["case"]] = case
        with self.path.open("a") as file:
            file.write(json.dumps(case) + "\n")

    def of(self, part: str) -> list[Case]:
        return [case for (its, _), case in self.cases.items() if its == part]


# -------------------------------------------------------------------- networks


def networks(state: State, seed: int, count: int) -> None:
    for start in range(0, count, CHUNK):
        stop = min(count, start + CHUNK)
        while missing := _missing(state, start, stop):
            words = [sys.executable, __file__, "--worker", f"{seed}:{missing[0]}:{stop}"]
            code = subprocess.run(words, check=False).returncode
            state.read()
            left = _missing(state, start, stop)
            if code and left:  # the process died of a run
                state.add(part="networks", case=left[0], spec="", kind="died", words=f"exit code {code}")
            elif left == missing:
                sys.exit(f"no progress at network {left[0]}")


def _missing(state: State, start: int, stop: int) -> list[str]:
    names = [f"{number}:{run}" for number in range(start, stop) for run in range(RUNS)]
    return [name for name in names if ("networks", name) not in state.cases]


def work(seed: int, first: str, stop: int) -> None:
    """Networks from `first` on, in this process."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _late)
    state = State(seed)
    number = int(first.split(":")[0])
    for name in _missing(state, number, stop):
        start = time.perf_counter()
        signal.alarm(SECONDS)
        case = examined(seed, name)
        signal.alarm(0)
        state.add(part="networks", case=name, seconds=round(time.perf_counter() - start, 1), **case)


def _late(*_: object) -> None:
    raise TimeoutError(f"over {SECONDS} s")


def chosen(seed: int, name: str) -> tuple[Any, str, str, bool]:
    """Plan, spec, target of a run, and whether its file is made and run."""
    import judgement
    from networks import drawn

    number = name.split(":")[0]
    plan = drawn(random.Random(f"network {seed} {number}"))
    rng = random.Random(f"run {seed} {name}")
    return plan, judgement.drawn_spec(rng), rng.choice(judgement.TARGETS), rng.random() < 0.25


def examined(seed: int, name: str, plan: Any = None) -> Case:
    import judgement

    drawn, spec, target, emitted = chosen(seed, name)
    plan = plan or drawn
    case: Case = {"spec": spec, "target": target, "emitted": emitted, "words": "", "judged": ""}
    try:
        verdict = judgement.examine(plan, spec, target, emitted=emitted)
        return case | {"kind": verdict.kind, "words": verdict.words[:300], "judged": verdict.judged}
    except judgement.Wrong as error:
        return case | {"kind": "wrong", "words": str(error)}
    except Exception as error:  # what must never come through
        return case | {"kind": "crashed", "words": f"{type(error).__name__}: {str(error)[:300]}"}


def shrink(seed: int, name: str) -> None:
    from networks import Network, shrunken

    warnings.simplefilter("ignore")
    plan, spec, target, _ = chosen(seed, name)
    first = examined(seed, name)
    small = shrunken(plan, lambda p: examined(seed, name, p)["kind"] == first["kind"])
    print(
        f"{spec} for {target}: {first['kind']}, {first['words']}\n{small}\n{Network(small)}\n"
        f"{examined(seed, name, small)}"
    )


# -------------------------------------------------------------------- files and faults


def files(state: State, seed: int, count: int) -> None:
    import honest
    from sandbox import Sandbox

    with tempfile.TemporaryDirectory(prefix="hostile-") as folder, Sandbox(Path(folder)) as box:
        kinds = honest.kinds(box.root / "models")
        for name, kind in kinds.items():
            content = next(iter(kind.files.values()))
            for number in range(count):
                if ("files", f"{name} {number}") in state.cases:
                    continue
                rng = random.Random(f"file {seed} {name} {number}")
                shutil.rmtree(box.root / "files")
                (box.root / "files").mkdir()
                file = honest.written(
                    kind, box.root / "files", content=rng.choice(kind.changes)(content, rng)
                )
                answer = box.run(*honest.words(rng.choice(kind.commands), file, box.root / "models"))
                shown = {
                    "code": answer.code,
                    "bad": answer.bad,
                    "seconds": round(answer.seconds, 2),
                    "peak_mb": answer.peak_mb,
                }
                state.add(
                    part="files",
                    case=f"{name} {number}",
                    kind=name,
                    words=answer.said[-200:] if answer.bad else "",
                    **shown,
                )


def faults(state: State, seed: int, count: int) -> None:
    import faults as kinds
    import honest

    missing = [i for i in range(count) if ("faults", str(i)) not in state.cases]
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder, kinds.Host() as host:
        root = Path(folder)
        (root / "net.pt2").write_bytes(honest.program())
        scene = kinds.Scene(host, root / "net.pt2", root / "scene")
        mounts = kinds.can_mount(root / "try")
        for number in missing:
            name, fault = kinds.drawn(scene, random.Random(f"fault {seed} {number}"), mounts)
            state.add(part="faults", case=str(number), kind=name, bad=fault())


# -------------------------------------------------------------------- the table


def report(state: State, seconds: float) -> str:
    from run import header

    args = " ".join(sys.argv[1:])
    head = header("hostile", seconds).replace("benchmarks/run.py hostile", f"benchmarks/hostile.py {args}")
    head = head.replace(" s)\n", " s for what earlier runs had left to do)\n", 1)
    parts = [
        _networks_table(state.of("networks")),
        _files_table(state.of("files")),
        _faults_table(state.of("faults")),
    ]
    found = RESULTS.read_text().partition("\n## Found")[2] if RESULTS.exists() else ""
    return "\n\n".join([head.rstrip(), *filter(None, parts)]) + (f"\n\n## Found{found}" if found else "\n")


def _networks_table(cases: list[Case]) -> str:
    if not cases:
        return ""
    counts = Counter(case["kind"] for case in cases)
    made = len({case["case"].split(":")[0] for case in cases})
    emitted = sum(bool(case.get("emitted")) and case["kind"] in ("kept", "declined") for case in cases)
    judged = Counter(case.get("judged") for case in cases if case["kind"] in ("kept", "declined"))
    bad = {kind: counts[kind] for kind in counts if kind not in GOOD}
    lines = [
        "## Networks\n",
        f"{made:,} networks, {len(cases):,} runs: {counts['kept']:,} rewritten and as promised, "
        f"{counts['declined']:,} left as they were, {counts['refused']:,} refused with a reason, "
        f"{counts['caught']:,} stopped by the run's own contracts. Wrong in silence: {counts['wrong']}. "
        f"Any other exception, or a dead process: {sum(bad.values()) - counts['wrong']}.\n",
        f"Judged by: {', '.join(f'{count:,} {name}' for name, count in judged.most_common())}. "
        f"{emitted:,} files run in plain ONNX Runtime.\n",
        "| passes | kept | declined | refused | caught | wrong | other |",
        "|---|---|---|---|---|---|---|",
    ]
    by_spec: dict[str, Counter[str]] = {}
    for case in cases:
        names = "+".join(part.split("(")[0] for part in _split(case["spec"]))
        by_spec.setdefault(names, Counter())[case["kind"]] += 1
    rare = [spec for spec, found in by_spec.items() if found.total() < RARE]
    by_spec["other sequences"] = sum((by_spec.pop(spec) for spec in rare), Counter())
    for spec, found in sorted(by_spec.items(), key=lambda entry: -entry[1].total()):
        cells = [found[kind] for kind in (*GOOD, "wrong")]
        lines.append(f"| {spec} | {' | '.join(map(str, cells))} | {found.total() - sum(cells)} |")
    return "\n".join(lines)


def _split(spec: str) -> Iterator[str]:
    depth, part = 0, ""
    for char in spec + ",":
        depth += (char == "(") - (char == ")")
        if char == "," and not depth:
            yield part
            part = ""
        else:
            part += char


def _files_table(cases: list[Case]) -> str:
    if not cases:
        return ""
    slowest, most = max(case["seconds"] for case in cases), max(case["peak_mb"] for case in cases)
    bad = [case for case in cases if case["bad"]]
    lines = [
        "## Files\n",
        f"{len(cases):,} damaged files: {sum(case['code'] == 0 for case in cases):,} were still readable, "
        f"{sum(case['code'] > 0 for case in cases):,} refused in one line. Broken rules (another exception, code run, "
        "something written elsewhere, time or memory without bounds, control characters): "
        f"{len(bad)}. The slowest took {slowest:.1f} s (it was read, and its model captured); "
        f"the process that reads never held more than {most:,.0f} MB.\n",
        "| kind | files | read | refused | broken rules |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(case["kind"] for case in cases):
        same = [case for case in cases if case["kind"] == kind]
        read = sum(case["code"] == 0 for case in same)
        lines.append(
            f"| {kind} | {len(same)} | {read} | {len(same) - read} | {sum(bool(c['bad']) for c in same)} |"
        )
    return "\n".join(lines)


def _faults_table(cases: list[Case]) -> str:
    if not cases:
        return ""
    counts, bad = (
        Counter(case["kind"] for case in cases),
        Counter(case["kind"] for case in cases if case["bad"]),
    )
    lines = [
        "## Faults\n",
        f"{len(cases):,} faults; outputs lost, mixed or littered round: {sum(bad.values())}.\n",
        "| fault | times | broken rules |",
        "|---|---|---|",
        *(f"| {name} | {count} | {bad[name]} |" for name, count in counts.most_common()),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument("--shrink", metavar="SEED:NUMBER:RUN")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shrink or options.worker:
        seed, _, rest = (options.shrink or options.worker).partition(":")
        if options.shrink:
            shrink(int(seed), rest)
        else:
            first, _, stop = rest.rpartition(":")
            work(int(seed), first, int(stop))
        return 0
    start = time.perf_counter()
    state = State(options.seed)
    parts: list[tuple[Callable[[State, int, int], None], int]] = [
        (networks, options.networks), (files, options.files), (faults, options.faults)
    ]  # fmt: skip
    for part, count in parts:
        if count:
            part(state, options.seed, count)
    RESULTS.write_text(report(state, time.perf_counter() - start))
    bad = [
        case
        for case in state.cases.values()
        if case.get("bad") or (case["part"] == "networks" and case["kind"] not in GOOD)
    ]
    for case in bad:
        print(json.dumps(case), file=sys.stderr)
    print(RESULTS.read_text())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
