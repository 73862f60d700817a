"""Runs benchmarks and writes what they print to benchmarks/results/, with command, date, machine and versions.

    python benchmarks/run.py             all of them
    python benchmarks/run.py whole_line  one

Every script prints Markdown. Run them on a quiet machine: they time things.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import time
from pathlib import Path

from compressor import measure

HERE = Path(__file__).resolve().parent
OWN = ("hostile.py", "mutants.py", "whole_zoo.py")  # keep results of their own, and take hours


def main(names: list[str]) -> int:
    scripts = {p.stem: p for p in sorted(HERE.glob("*.py")) if p.name not in ("run.py", *OWN)}
    unknown = [name for name in names if name not in scripts]
    if unknown:
        print(f"no benchmark {unknown[0]}; there are {', '.join(scripts)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or scripts:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, scripts[name]], cwd=HERE.parent, capture_output=True, text=True, check=False
        )
        if done.returncode:
            failed += 1
            print(done.stderr[-2000:], file=sys.stderr)
            continue
        text = f"{header(name, time.perf_counter() - start)}\n{done.stdout.strip()}\n"
        (HERE / "results" / f"{name}.md").write_text(text)
        print(done.stdout)
    return 1 if failed else 0


def header(name: str, seconds: float) -> str:
    machine = measure.machine()
    versions = ", ".join(f"{k} {v}" for k, v in measure.versions().items())
    return (
        f"# {name}\n\n"
        f"- command: `python benchmarks/run.py {name}` ({seconds:.0f} s)\n"
        f"- date: {datetime.date.today().isoformat()}\n"
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['isa']}\n"
        f"- versions: {versions}\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
