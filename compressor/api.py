"""compress(), verify(), inspect(), bench(): the verbs of the package, which everything else serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from . import delivery, measure, registry, report, runtime
from . import verify as contracts
from .delivery import CPU
from .load import peek, sniff
from .ops import kind, macs
from .registry import passes, targets
from .run import Options, Result, Run, capture_model, dtype_name, given, load_model, shape_of, streams
from .target import Target

__all__ = ["Options", "Result", "bench", "compress", "inspect", "passes", "targets", "verify"]


def compress(
    model: nn.Module | ExportedProgram | str | Path,
    example_inputs: Any = None,
    *,
    passes: str | None = None,
    target: str | Target = "cpu",
    calibration: Any = None,
    output: str | Path | None = None,
    **options: Any,
) -> Result:
    """Compiles a model, checks every pass, and writes model.onnx, report.json and signature.json to `output`.

    model: a module in memory, an exported program, or a file (see README for kinds). example_inputs: a tensor, a
    tuple, or a mapping of keyword inputs; not needed where the file carries one or `inputs` describes them.
    passes: a spec such as `merge,prune(macs=0.5),int8`; the target's recipe if None. calibration: anything that
    `data.open_data` reads. output: a folder, `./<name>-compressed` if None. options: the fields of `Options`.

    Errors: UsageError, FileError, DataError, OutputError, UnsupportedError, ContractError, TargetError; after any
    of them the output folder is as it was.
    """
    opt = Options.of(options)
    where = target if isinstance(target, Target) else registry.target(target)
    run = Run(opt, where, passes or where.recipe)
    with run.step("reading the model"):
        loaded = load_model(model, opt)
    folder = Path(output) if output is not None else Path(f"{_stem(model)}-compressed")
    if opt.stop_after:
        return run.compile(loaded, example_inputs, calibration, None)
    with delivery.staging(folder) as stage:
        result = run.compile(loaded, example_inputs, calibration, stage)
        report.write_report(stage / "report.json", result.report)
    return dataclasses.replace(result, output=folder, onnx=folder / "model.onnx")


def verify(
    model: nn.Module | ExportedProgram | str | Path,
    onnx: str | Path,
    *,
    data: Any = None,
    tolerance: float | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Compares an ONNX file with the model that it was made from, on `data` or on generated samples.

    tolerance: largest relative error; where None, SQNR under 20 dB on any output or slice means that they differ.
    Returns {"ok", "checks", "provider", "samples"}.
    """
    opt = Options.of(options)
    loaded = load_model(model, opt)
    graph = capture_model(loaded, example_inputs, opt)
    source, _, held_out = streams(graph, data, opt, given(loaded, example_inputs))
    batches = list((source or held_out).limited(opt.calib_limit))
    session = runtime.session(onnx)
    inputs = delivery.session_inputs(session, graph.inputs)
    comparison = delivery.compare_session(graph, session, inputs, [batch.inputs for batch in batches])
    checks = comparison.checks(tolerance)
    bad = [
        c
        for c in checks
        if not c.finite or (c.error > tolerance if tolerance else c.sqnr_db < contracts.WARN_DB)
    ]
    return {
        "ok": not bad,
        "checks": [c.to_dict() for c in checks],
        "provider": CPU,
        "samples": sum((source or held_out).limited(opt.calib_limit).sizes),
    }


def inspect(path: str | Path, **options: Any) -> dict[str, Any]:
    """Facts about an ONNX file or a model: inputs, outputs, operators, parameters, MACs, bytes.

    Of a checkpoint without its architecture: what tensors it holds.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".ort"):
        return _inspect_onnx(path)
    opt = Options.of(options)
    if opt.model_spec is None and path.is_file() and sniff(path) in ("pickle", "safetensors"):
        return _inspect_weights(path)
    graph = capture_model(load_model(path, opt), None, opt)
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            name = str(node.target)
            counts[name] = counts.get(name, 0) + 1
    return {
        "path": str(path),
        "inputs": [shape_of(spec) for spec in graph.inputs],
        "outputs": list(graph.outputs),
        "params": measure.parameters(graph),
        "macs": macs(graph),
        "bytes": measure.bytes_of(graph),
        "operators": dict(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))),
        "unknown": sorted({str(n.target) for n in graph.nodes if kind(n) == "opaque"}),
        "notices": graph.notices,
    }


def bench(
    paths: Sequence[str | Path], *, threads: int = 1, batch: int = 1, seconds: float = 5.0
) -> list[dict[str, Any]]:
    """Latency of ONNX files, measured in turns on generated inputs; the first is what the others are compared with."""
    arrays = measure.random_feeds(runtime.session(paths[0]), batch=batch)
    found = measure.bench(paths, feeds=arrays, threads=threads, seconds=seconds)
    rows = []
    for path, latency in zip(paths, found, strict=True):
        row = {"path": str(path), **dataclasses.asdict(latency)}
        row.pop("rounds")
        rows.append(row)
    return rows


# -------------------------------------------------------------------- helpers


def _stem(model: Any) -> str:
    if isinstance(model, (str, Path)):
        name = Path(model).resolve().name
        for suffix in (".pth.tar", ".pt2", ".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar"):
            if name.endswith(suffix):
                return name.removesuffix(suffix)
        return name
    return type(model).__name__.lower()


def _inspect_weights(path: Path) -> dict[str, Any]:
    found = peek(path)
    tensors = found.places[0].tensors if found.places else {}
    return {
        "path": str(path),
        "kind": found.summary() if found.places else found.kind,
        "architecture": found.architecture,
        "labels": list(found.labels),
        "tensors": {name: f"{dtype_name(t.dtype)}{list(t.shape)}" for name, t in sorted(tensors.items())},
    }


def _inspect_onnx(path: Path) -> dict[str, Any]:
    session = runtime.session(path)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "inputs": [{"name": i.name, "dtype": i.type, "shape": i.shape} for i in session.get_inputs()],
        "outputs": [{"name": o.name, "dtype": o.type, "shape": o.shape} for o in session.get_outputs()],
        "metadata": dict(session.get_modelmeta().custom_metadata_map),
        "operators": runtime.optimized_operators(path) if path.suffix == ".onnx" else {},
    }
