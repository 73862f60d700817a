"""compress(), trainable(), verify(), inspect(), bench(): the verbs of the package, which everything else serves."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram

from . import (
    advice,
    apart,
    claims,
    delivery,
    detections,
    divergence,
    edges,
    heads,
    measure,
    notices,
    page,
    profiling,
    publishing,
    registry,
    report,
    sessions,
)
from . import verify as contracts
from .errors import FileError, UsageError
from .inspection import inspect
from .ir import Input
from .opening import Options, capture_model, load_model, streams, take_pixels
from .ops import macs
from .pipeline import Size
from .progress import Log, Watch, counted
from .registry import passes, targets
from .run import Result, Run
from .spec import split
from .target import Target
from .trainable import Trainable
from .trainable import trainable as as_module

if TYPE_CHECKING:
    from .search.study import Study

__all__ = [
    "Options",
    "Result",
    "batch",
    "bench",
    "compress",
    "inspect",
    "passes",
    "plan",
    "sweep",
    "targets",
    "trainable",
    "tune",
    "verify",
]


def compress(
    model: nn.Module | ExportedProgram | str | Path,
    example_inputs: Any = None,
    *,
    passes: str | None = None,
    target: str | Target | None = None,
    calibration: Any = None,
    output: str | Path | None = None,
    **options: Any,
) -> Result:
    """Compiles a model, checks every pass, and writes model.onnx, its reports and signature.json to `output`.

    model: a module in memory, an exported program, or a file (see README for kinds). example_inputs: a tensor, a
    tuple, or a mapping of keyword inputs; not needed where the file carries one or `inputs` describes them.
    passes: a spec such as `merge,prune(macs=0.5),int8`; the target's recipe if None. target: its name; if None this
    machine, `cpu` or `cpu-avx2`, so name one where bytes must not depend on it. calibration: a file or folder of
    samples, or any iterable of batches (tensors, tuples, mappings by input name). output: a folder,
    `./<name>-compressed` if None. options: the fields of `Options`.

    Errors: UsageError, FileError, DataError, OutputError, UnsupportedError, ContractError, TargetError; after any
    of them the output folder is as it was.
    """
    opt = Options.of(options)
    where = target if isinstance(target, Target) else registry.target(target)
    where = where.speaking(opt.opset, opt.min_ort)
    run = Run(opt, where, passes or where.recipe)
    if target is None:
        run.notices += notices.of_default(where)
    with run.memory:
        with run.step("reading the model"):
            loaded = load_model(model, opt)
        folder = Path(output) if output is not None else Path(f"{_stem(model)}-compressed")
        if opt.stop_after:
            return run.compile(loaded, example_inputs, calibration, None)
        publishing.require_ours(folder, "pt2" in opt.formats)
        with publishing.staging(folder) as stage:
            result = run.compile(loaded, example_inputs, calibration, stage)
            written = report.write_report(stage / "report.json", result.report)
            page.write(stage / page.NAME, report.read_report(written))
    return dataclasses.replace(result, output=folder, onnx=folder / "model.onnx")


def tune(model: str | Path, *, console: Any = None, log: Log | None = None, **options: Any) -> Study:
    """Searches for the best spec under a budget: see `compressor.search.tune.tune`, which needs the extra `tune`.

    console, log: see `progress.Watch`; the log is given {"event": "trial", ...} with what became of each.
    """
    with _optuna():
        from .search.tune import tune as search
    return search(model, watch=Watch(console, log), **options)


def sweep(
    model: str | Path, passes: str, *, console: Any = None, log: Log | None = None, **options: Any
) -> tuple[list[dict[str, Any]], list[str], str]:
    """Compares every spec of a space: see `compressor.search.sweep.sweep`. Lines as plain data, notices, and CSV.

    console, log: as for `tune`.
    """
    with _optuna():
        from .search import sweep as search
    lines, notices = search.sweep(model, passes, watch=Watch(console, log), **options)
    return [dataclasses.asdict(line) for line in lines], notices, search.as_csv(lines)


def batch(
    listed: str | Path, *, console: Any = None, log: Log | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Compiles every model of a list: see `compressor.search.fleet.batch`. One row a model.

    console, log: as for `tune`.
    """
    with _optuna():
        from .search import fleet
    made = fleet.batch(listed, watch=Watch(console, log), **options)
    return [
        {"model": str(entry.path), "output": str(entry.output), **dataclasses.asdict(outcome)}
        for entry, outcome in made
    ]


@contextlib.contextmanager
def _optuna() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if error.name != "optuna":
            raise
        raise UsageError("searches need optuna: pip install 'compressor[tune]'") from error


def plan(
    model: nn.Module | ExportedProgram | str | Path,
    example_inputs: Any = None,
    *,
    passes: str | None = None,
    target: str | Target | None = None,
    calibration: Any = None,
    output: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What `compress` would do with the same arguments, without doing it: the model is captured, no data are read.

    Returns {"target": its settings, "output", "passes": one row each, the model as it comes first}: pass, config,
    inserted (another pass needs it), contract, params, macs and bytes, which are estimates, rule (behind them), and
    refuses (why it would not run).
    """
    opt = Options.of(options)
    watch = Watch(opt.console, opt.log)
    where = target if isinstance(target, Target) else registry.target(target)
    where = where.speaking(opt.opset, opt.min_ort)
    run = Run(opt, where, passes or where.recipe)
    with watch("reading the model"):
        loaded = load_model(model, opt)
        graph = capture_model(loaded, example_inputs, opt)
        take_pixels(graph, opt)
    size = Size(measure.parameters(graph), macs(graph), measure.bytes_of(graph))
    rows: list[dict[str, Any]] = [{"pass": "input", **dataclasses.asdict(size), "rule": "as it comes"}]
    for one in run.pipeline.passes:
        row = {"pass": one.name, "config": str(one), "contract": one.contract.name}
        row |= {"inserted": one.name in run.pipeline.inserted, "rule": "", "refuses": ""}
        try:
            size, row["rule"] = one.plan(size, graph, calibration is not None)
        except UsageError as error:
            row["refuses"] = str(error)
        rows.append(row | dataclasses.asdict(size))
    settings = {f.name: getattr(where, f.name) for f in dataclasses.fields(where) if f.name not in _UNSHOWN}
    folder = output if output is not None else f"{_stem(model)}-compressed"
    return {"target": settings, "fixed": run.fixed(graph), "output": str(folder), "passes": rows}


_UNSHOWN = ("summary", "quant", "lacks", "slow", "dialect")


def trainable(
    model: nn.Module | ExportedProgram | str | Path, example_inputs: Any = None, **options: Any
) -> Trainable:
    """A module to train in your own loop, from the model.pt2 that `emit="pt2"` wrote or from any other model.

    It is what `Result.trainable()` gives for a run in this process: see `compressor.trainable.trainable`. The receipt
    in the file stays with it. model, example_inputs and options as for `compress`.
    """
    opt = Options.of(options)
    loaded = load_model(model, opt)
    graph = capture_model(loaded, example_inputs, opt)
    take_pixels(graph, opt)
    return as_module(graph, receipt=loaded.continued.receipt if loaded.continued is not None else None)


def verify(
    model: nn.Module | ExportedProgram | str | Path | None,
    onnx: str | Path | None,
    *,
    data: Any = None,
    tolerance: float | None = None,
    layers: bool = False,
    against: str | Path | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Compares an ONNX file with the model that it was made from, on `data` or on generated samples.

    It runs on the provider of the target that it was made for, where that is installed, else on the CPU's.
    postprocess (an option): the one that the file was made with, where it ends in suppression; its boxes and scores are
    then compared before that, and of the detections is stated how many agree.
    tolerance: largest relative error; where None, a file whose passes all promise the same numbers is held to what
    `compress` holds it to (1e-4, 30 dB of models in half precision or integers, or what last bits make of the model,
    see `jitter`), and any other to an SQNR of 20 dB on every output and slice. Of whole numbers made from floats 2 %
    may differ, or 10 % in these other files.
    layers: compare the values inside, too, which is done anyway where an output differs; see `divergence`.
    Returns {"ok", "proved", "checks", "judged_by", "provider", "samples"}, and with it {"inside"}; proved: False where
    another sample's outputs would have passed, too; judged_by: `error` or `sqnr`. {"warning"} says where outputs have
    other names, and where sessions without options have other numbers on this machine.

    against: a report.json, whose every claim is checked again instead, see `claims`; `data` is then what the run was
    calibrated on. model and onnx may be None: the model that it names, if it is there, and the file beside it. Returns
    {"ok", "claims", "model", "onnx"}.
    """
    if against is not None:
        if tolerance is not None or layers:
            option = "--tolerance" if tolerance is not None else "--layers"
            raise UsageError(
                f"{option} is for comparing a model and an ONNX file; --against has rules of its own"
            )
        return _recheck(Path(against), model, onnx, data, Options.of(options))
    if model is None or onnx is None:
        raise UsageError("verify compares a model and an ONNX file; give both, or a report with --against")
    opt = Options.of(options)
    if opt.evaluate is not None:
        raise UsageError(
            "--eval goes with --against, which measures metrics again; without, outputs are compared"
        )
    path = Path(onnx)
    sealed = path.suffix == sessions.ORT_SUFFIX
    if layers:
        _require_open(path, "--layers")
    watch = Watch(opt.console, opt.log)
    with watch("reading the model"):
        loaded = load_model(model, opt)
        graph = capture_model(loaded, example_inputs, opt)
        opt = take_pixels(graph, opt)
    ends = heads.asked(graph, opt.postprocess, loaded.model)
    provider = _provider(path)
    with sessions.opened(path, provider) as session:
        inputs = sessions.inputs_of(session, graph.inputs)
        names = [output.name for output in session.get_outputs()]
        sizes = _fixed(graph.inputs, inputs)
        given = streams(graph, data, opt, loaded, example_inputs, sizes)
        shown = (given.source or given.held_out).limited(opt.calib_limit)
        count = sum(shown.sizes)

        def samples() -> Iterator[tuple[Tensor, ...]]:
            return edges.varied(graph, shown)

        stated = []
        with watch("comparing", count) as advance:
            each = counted(samples(), advance, lambda one: one[0].shape[0] if one[0].dim() else 1)
            if ends is None:
                comparison = sessions.compare(graph, session, inputs, each)
            else:
                comparison, found = detections.compare(
                    ends.applied(graph), path, inputs, each, provider=provider
                )
                stated = [found]
    exact = ends is None and _is_exact(path)
    if exact and tolerance is None:
        checks, levels = delivery.standards(graph, comparison, samples())
        bad = [check for check, _ in delivery.misses(graph, checks, levels)]
    else:
        checks = comparison.checks(tolerance)
        bad = [check for check in checks if not (check.finite and _agrees(check, exact, tolerance))]
    by_error = tolerance is not None or (exact and not delivery.rounds(graph))
    result: dict[str, Any] = {
        "ok": not bad,
        "proved": any(check.proves for check in checks),
        "judged_by": "error" if by_error else "sqnr",
        "checks": [c.to_dict() for c in (*checks, *stated)],
        "provider": provider,
        "samples": count,
    }
    other_names = names if ends is None and sessions.renamed(names, graph.outputs) else []
    saturated = sessions.saturated(path, provider, graph.inputs, inputs, samples())
    if words := _warning(other_names, saturated, unsure=sealed and bool(bad)):
        result["warning"] = words
    if layers or (bad and not sealed):
        whole = graph if ends is None else ends.applied(graph)
        with watch("looking inside"):
            inside = divergence.look_inside(whole, path, inputs, samples(), tolerance)
        result["inside"] = inside.to_dict()
    return result


def bench(
    paths: Sequence[str | Path],
    *,
    threads: int | Sequence[int] | None = None,
    batch: int | Sequence[int] = 1,
    seconds: float = 5.0,
    advise: bool = False,
    profile: bool = False,
    console: Any = None,
    log: Log | None = None,
) -> list[dict[str, Any]]:
    """Latency of ONNX files, measured in turns on generated inputs; the first is what the others are compared with.

    Each runs on the provider of the target that it was made for, where that is installed, else on the CPU's.
    threads: inside an operator, 1 if None, 0 for all cores; batch: of a dynamic batch; several of them are a grid, each
    cell of which takes `seconds`. Rows are {"path", "provider", "threads", "batch", "median_ms", "p95_ms", "iqr_ms",
    "runs", "ratio", "spread"}: how many times faster than the first, with quartiles. advise: of one file, which session
    settings suit it best here, with up to so many threads (`advice.advise`). profile: where the time goes instead, by
    operator and by module (`profiling.profile`). console, log: see `progress.Watch`.
    """
    watch = Watch(console, log)
    files = [Path(path) for path in paths]
    cores = tuple(threads) if isinstance(threads, Sequence) else (threads,)
    sizes = tuple(batch) if isinstance(batch, Sequence) else (batch,)
    if advise and profile:
        raise UsageError("--advise and --profile are two questions; ask one of them")
    if (advise or profile) and max(len(cores), len(sizes)) > 1:
        raise UsageError("--advise and --profile take one number of threads and one batch")
    for path in files if profile else ():
        _require_open(path, "--profile")
    if advise and len(paths) > 1:
        raise UsageError("--advise is about one model; name one")
    providers = [_provider(path) for path in files]
    if advise:
        arrays = _feeds(files[0], sizes[0])
        settings = advice.advise(files[0], arrays, most=cores[0] or 0, seconds=seconds, provider=providers[0])
        return [{"path": str(paths[0]), **row} for row in settings]
    grid = [(1 if count is None else count, size) for count in cores for size in sizes]
    if profile:
        options: dict[str, Any] = {"threads": grid[0][0], "seconds": seconds, "providers": providers}
        measured = apart.call if any(map(sessions.is_large, files)) else _here
        with watch("profiling"):
            return list(measured(profiling.profile, files, _feeds(files[0], grid[0][1]), **options))
    rows: list[dict[str, Any]] = []
    for count, size in grid:
        with watch(f"measuring, {count} threads, batch {size}") as advance:
            rows += _timed(paths, providers, threads=count, batch=size, seconds=seconds, advance=advance)
    return rows


# -------------------------------------------------------------------- helpers


def _recheck(where: Path, model: Any, onnx: str | Path | None, data: Any, opt: Options) -> dict[str, Any]:
    told = report.read_report(where)
    if not told.get("emitted"):
        raise UsageError(f"{where}: nothing was emitted in this run, so there is nothing to check")
    try:
        path = Path(onnx) if onnx is not None else where.parent / told["emitted"]["file"]
        if not path.is_file():
            raise FileError(f"{path}: no such file; name the ONNX file that {where} is about")
        named = model is not None
        if not named and Path(told["model"]["path"]).exists():
            model = told["model"]["path"]
        made_for = registry.target(told["target"]["name"]).speaking(told["target"]["opset"])
        opt = dataclasses.replace(opt, seed=told["seed"])
        found = list(claims.recheck(told, where.parent, path, model, opt, made_for, data, named=named))
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}: a damaged report: {type(error).__name__} {error}") from error
    return {
        "ok": not any(one.state == claims.NOT_HELD for one in found),
        "claims": [one.to_dict() for one in found],
        "model": None
        if model is None
        else str(model)
        if isinstance(model, (str, Path))
        else type(model).__name__,
        "onnx": str(path),
    }


def _warning(other_names: Sequence[str], saturated: float, unsure: bool) -> str:
    """See `verify`. unsure: the file differs, and nobody can say whether its sums would be exact elsewhere."""
    words = []
    if other_names:
        words.append(f"its outputs are called {', '.join(other_names)}, and were compared in order")
    if math.isfinite(saturated):
        words.append(notices.other_numbers(saturated))
    elif unsure:
        words.append(measure.saturation())
    return "; ".join(filter(None, words))


def _agrees(check: contracts.Check, exact: bool, tolerance: float | None) -> bool:
    """Where a tolerance was given, or the file rounds more than the model. exact: its passes do not round."""
    if check.discrete:
        return check.flips_within(not exact) or check.error <= (tolerance or 0.0)
    return check.error <= tolerance if tolerance is not None else check.sqnr_db >= contracts.WARN_DB


def _require_open(path: Path, option: str) -> None:
    if path.suffix == sessions.ORT_SUFFIX:
        raise UsageError(
            f"{path}: nothing but ONNX Runtime can look into this format; {option} wants the model.onnx beside it"
        )


def _here(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return function(*args, **options)


def _feeds(path: Path, batch: int) -> dict[str, np.ndarray]:
    """Inputs of so many samples; UsageError where the file fixes another number of them."""
    with sessions.opened(path) as session:
        arrays = measure.random_feeds(session, batch=batch)
        fixed = {spec.shape[0] for spec in session.get_inputs() if spec.shape}
    if batch > 1 and all(isinstance(size, int) for size in fixed) and batch not in fixed:
        raise UsageError(
            f"{path}: its batch is fixed to {', '.join(map(str, fixed))}; compress with --dynamic to measure others"
        )
    return arrays


def _timed(
    paths: Sequence[str | Path], providers: Sequence[str], *, batch: int, **options: Any
) -> Iterator[dict[str, Any]]:
    """The rows of one cell of the grid."""
    files = [Path(path) for path in paths]
    timed = measure.bench_alone if any(map(sessions.is_large, files)) else measure.bench
    arrays, *_ = [_feeds(file, batch) for file in files]
    found = timed(files, feeds=arrays, providers=providers, **options)
    for path, provider, latency in zip(paths, providers, found, strict=True):
        faster = measure.ratio(found[0], latency)
        row = {"path": str(path), "provider": provider, "threads": options["threads"], "batch": batch}
        row |= {**dataclasses.asdict(latency), "ratio": faster.median, "spread": [faster.low, faster.high]}
        row.pop("rounds")
        yield row


def _provider(onnx: Path) -> str:
    """Where a file runs here: as its target says, if it has one."""
    made_for = targets().get(delivery.metadata(onnx).get("target", ""))
    return delivery.usable_provider(made_for) if made_for is not None else sessions.CPU


def _fixed(free: Sequence[Input], taken: Sequence[Input]) -> dict[str, int]:
    """Sizes of the model's dynamic axes that a file fixes, by name."""
    pairs = [pair for a, b in zip(free, taken, strict=True) for pair in zip(a.shape, b.shape, strict=True)]
    return {name: size for name, size in pairs if isinstance(name, str) and isinstance(size, int)}


def _is_exact(onnx: Path) -> bool:
    """Whether a file promises the model's own numbers: it says which passes made it, and all of them do."""
    names = [part.partition("(")[0] for part in split(delivery.metadata(onnx).get("spec", ""))]
    known = passes()
    promised = [known[name].contract if name in known else contracts.BOUNDED for name in names]
    return bool(names) and all(one is contracts.EXACT for one in promised)


def _stem(model: Any) -> str:
    if isinstance(model, (str, Path)):
        name = Path(model).resolve().name
        for suffix in (".pth.tar", ".pt2", ".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar"):
            if name.endswith(suffix):
                return name.removesuffix(suffix)
        return name
    return type(model).__name__.lower()
