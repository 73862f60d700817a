"""sweep(): every spec of a space with several seeds on the same data, compared by means and spreads."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..errors import CompressorError, UsageError
from ..opening import Options
from ..progress import Watch
from ..report import write_text
from . import trial as trials
from .engines import Engine
from .space import Space
from .trial import DONE, FAILED, Outcome, Task
from .tune import alone, elsewhere, made_task, opened_engine

COLUMNS = (
    "macs", "macs_count", "flops", "params_count", "size_mb", "metric", "drop", "sqnr", "cosine", "agreement",
    "p50_ms", "p95_ms", "speedup", "throughput", "joules",
)  # fmt: skip
APART = 0.01  # of MACs: what asked for the same budget is comparable within this


@dataclass(frozen=True)
class Line:
    """One spec over all seeds. values: name -> (mean, spread: the standard deviation, NaN of one seed)."""

    spec: str
    seeds: int
    failed: tuple[str, ...]
    values: dict[str, tuple[float, float]]


def sweep(
    model: str | Path,
    passes: str,
    *,
    calibration: str | Path | None = None,
    target: str | None = None,
    seeds: int = 1,
    output: str | Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    ray_address: str = "auto",
    trial_cpus: float = 1.0,
    watch: Watch | None = None,
    **options: Any,
) -> tuple[list[Line], list[str]]:
    """Compiles every spec of the space `passes` with seeds 0 to seeds - 1, and answers a line for each, with notices.

    All see the same samples; a seed draws which of them are held out, and all else that is random. engine and its
    options, and watch, as for `tune`. A notice says where budgets that read alike were not reached alike (MACs over
    1 % apart).
    """
    opt = Options.of(options)
    if "seed" in options:
        raise UsageError("a sweep draws its own seeds: say how many with --seeds")
    if opt.latency_cmd:
        raise UsageError("a sweep times on this machine; time single models with --latency-cmd")
    space = Space(passes, registry.passes())
    specs = space.product()
    folder = Path(output) if output is not None else Path(f"{Path(model).resolve().name.split('.')[0]}-swept")
    found: dict[str, list[Outcome]] = {spec: [] for spec in specs}
    watch, lines = watch or Watch(), list[Line]()
    with alone(folder), opened_engine(engine, workers, ray_address, trial_cpus) as runner:
        for seed in range(seeds):
            task, *_ = made_task(
                model, calibration, target, folder / f"seed-{seed}", {**options, "seed": seed}
            )
            with watch("the original"):
                runner.alone(trials.original, task)
            with watch(f"seed {seed}", len(specs)) as advance:
                asked = [(task, i, spec) for i, spec in enumerate(specs)]
                made = runner.run(asked, lambda outcome: advance(1))
            for outcome in made:
                with watch(f"timing {outcome.spec}"):
                    timed = _timed(runner, task, outcome)
                watch.say("trial", **dataclasses.asdict(timed))
                found[outcome.spec].append(timed)
            lines = [_line(spec, outcomes) for spec, outcomes in found.items()]
            write_text(folder / "sweep.csv", as_csv(lines))
    place = elsewhere(registry.target(target))
    return lines, [*([f"timed on {place}"] if place else []), *_notices(lines)]


def _timed(engine: Engine, task: Task, outcome: Outcome) -> Outcome:
    if outcome.state != DONE:
        return outcome
    try:
        costs = engine.alone(trials.costs, task, outcome.number)
    except CompressorError as error:
        return dataclasses.replace(outcome, state=FAILED, why=str(error).splitlines()[0])
    return dataclasses.replace(outcome, values=outcome.values | costs)


def _line(spec: str, outcomes: Sequence[Outcome]) -> Line:
    done = [one for one in outcomes if one.state == DONE]
    values = {}
    for name in COLUMNS:
        seen = [one.values[name] for one in done if name in one.values]
        if seen:
            spreads = (
                len(seen) > 1 and np.isfinite(seen).all()
            )  # an exact pass has no noise: its SQNR is infinite
            values[name] = float(np.mean(seen)), float(np.std(seen, ddof=1)) if spreads else math.nan
    why = dict.fromkeys(f"{one.state}: {one.why}" for one in outcomes if one.state != DONE)
    return Line(spec, len(done), tuple(why), values)


def _notices(lines: Sequence[Line]) -> list[str]:
    """Where budgets of MACs were not reached, or not alike by lines whose budgets read alike."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for line in lines:
        asked = tuple(re.findall(r"\bmacs=([\d.]+)", line.spec))
        if asked and "macs" in line.values:
            groups.setdefault(asked, []).append(line.values["macs"][0])
    return [
        f"macs={', '.join(asked)} was reached with {100 * min(seen):.1f} to {100 * max(seen):.1f} % of the MACs: these "
        "lines compare different sizes; prune(align=1) reaches budgets more exactly"
        for asked, seen in groups.items()
        if max(seen) - min(seen) > APART * max(seen)
        or (len(asked) == 1 and any(abs(one - float(asked[0])) > APART * float(asked[0]) for one in seen))
    ]


def as_csv(lines: Sequence[Line]) -> str:
    """One row a spec: mean and spread of every value, `n/a` where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["spec", "seeds", *(word for name in COLUMNS for word in (name, f"{name}_spread")), "failed"]
    )
    for line in lines:
        cells = [cell for name in COLUMNS for cell in _cells(line.values, name)]
        writer.writerow([line.spec, line.seeds, *cells, "; ".join(line.failed)])
    return text.getvalue()


def _cells(values: Mapping[str, tuple[float, float]], name: str) -> tuple[str, str]:
    mean, spread = values.get(name, (math.nan, math.nan))
    return tuple("n/a" if math.isnan(one) else f"{one:.6g}" for one in (mean, spread))  # type: ignore[return-value]
