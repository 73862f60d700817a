"""compress(), trainable(), verify(), inspect(), bench(): the verbs of the package, which everything else serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from . import (
    advice,
    delivery,
    detections,
    detectors,
    handover,
    heads,
    measure,
    postprocess,
    publishing,
    registry,
    report,
    runtime,
)
from . import verify as contracts
from .adapters import found_in
from .budgets import costs_of
from .channels import analyse, carrier_of
from .costs import layers as layers_of
from .delivery import CPU
from .emit import companion_of
from .errors import CompressorError, UsageError
from .ir import Graph
from .ledger import Ledger
from .load import adapters_of, peek, sniff
from .opening import Options, capture_model, load_model, streams, take_pixels
from .ops import kind, macs
from .receipt import Continued
from .registry import passes, targets
from .run import Result, Run
from .target import Target
from .trainable import Trainable
from .trainable import trainable as as_module
from .widths import MINIMUM, families, least_shares

__all__ = ["Options", "Result", "bench", "compress", "inspect", "passes", "targets", "trainable", "verify"]


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
    where = where.speaking(opt.opset, opt.min_ort)
    run = Run(opt, where, passes or where.recipe)
    with run.memory:
        with run.step("reading the model"):
            loaded = load_model(model, opt)
        folder = Path(output) if output is not None else Path(f"{_stem(model)}-compressed")
        if opt.stop_after:
            return run.compile(loaded, example_inputs, calibration, None)
        with publishing.staging(folder) as stage:
            result = run.compile(loaded, example_inputs, calibration, stage)
            report.write_report(stage / "report.json", result.report)
    return dataclasses.replace(result, output=folder, onnx=folder / "model.onnx")


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
    model: nn.Module | ExportedProgram | str | Path,
    onnx: str | Path,
    *,
    data: Any = None,
    tolerance: float | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Compares an ONNX file with the model that it was made from, on `data` or on generated samples.

    It runs on the provider of the target that it was made for, where that is installed, else on the CPU's.
    postprocess (an option): the one that the file was made with, where it ends in suppression; its boxes and scores are
    then compared before that, and of the detections is stated how many agree.
    tolerance: largest relative error; where None, SQNR under 20 dB on any output or slice means that they differ.
    Returns {"ok", "checks", "provider", "samples"}.
    """
    opt = Options.of(options)
    loaded = load_model(model, opt)
    graph = capture_model(loaded, example_inputs, opt)
    opt = take_pixels(graph, opt)
    ends = None
    if opt.postprocess is not None:
        ends = heads.plan(graph, postprocess.parse(opt.postprocess), detectors.known(loaded.model))
    provider = _provider(Path(onnx))
    with delivery.opened(Path(onnx), provider) as session:
        inputs = delivery.session_inputs(session, graph.inputs)
        pairs = [
            pair
            for a, b in zip(graph.inputs, inputs, strict=True)
            for pair in zip(a.shape, b.shape, strict=True)
        ]
        sizes = {name: size for name, size in pairs if isinstance(name, str) and isinstance(size, int)}
        source, _, held_out = streams(graph, data, opt, loaded, example_inputs, sizes)
        samples = [batch.inputs for batch in (source or held_out).limited(opt.calib_limit)]
        stated = []
        if ends is None:
            comparison = delivery.compare_session(graph, session, inputs, samples)
        else:
            comparison, found = detections.compare(
                ends.applied(graph), Path(onnx), inputs, samples, provider=provider
            )
            stated = [found]
    checks = comparison.checks(tolerance)
    bad = [
        c
        for c in checks
        if not c.finite or (c.error > tolerance if tolerance else c.sqnr_db < contracts.WARN_DB)
    ]
    return {
        "ok": not bad,
        "checks": [c.to_dict() for c in (*checks, *stated)],
        "provider": provider,
        "samples": sum((source or held_out).limited(opt.calib_limit).sizes),
    }


def inspect(
    path: str | Path,
    *,
    groups: bool = False,
    layers: bool = False,
    partitions: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Facts about an ONNX file or a model: adapters, inputs, outputs, operators, parameters, MACs, bytes.

    groups: also which channels `prune` could take and which not, and why (`ledger`), for the widths of target cpu.
    layers: also what each operator costs (`costs.layers`). partitions: also what phones' accelerators take of an ONNX
    file, and why not the rest (`delivery.on_accelerators`): `nnapi`, `coreml`, `xnnpack`, `qnn`, several, or `all`.

    Of a checkpoint without its architecture: what tensors it holds. Of adapters that cannot be loaded: what they are,
    and the problem.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".ort"):
        if groups:
            raise UsageError(
                f"{path}: --groups is for a PyTorch model, or the report.json of a run that pruned it"
            )
        if layers:
            raise UsageError(f"{path}: --layers is for a PyTorch model")
        if partitions is not None and path.suffix == ".ort":
            raise UsageError(
                f"{path}: its operators are fused for processors; --partitions is for the model.onnx beside it"
            )
        taken = {"partitions": delivery.on_accelerators(path, partitions)} if partitions is not None else {}
        return _inspect_onnx(path) | taken
    if partitions is not None:
        raise UsageError(f"{path}: --partitions is for an ONNX file; compress the model first")
    opt = Options.of(options)
    if opt.model_spec is None and path.is_file() and sniff(path) in ("pickle", "safetensors"):
        if groups or layers:
            flag = "--groups" if groups else "--layers"
            raise UsageError(f"{path}: {flag} needs the architecture too: --model file.py:FACTORY")
        return _inspect_weights(path, adapters_of(path, opt.adapter))
    facts: dict[str, Any] = {"path": str(path), "adapters": adapters_of(path, opt.adapter)}
    try:
        loaded = load_model(path, opt)
        graph = capture_model(loaded, None, opt)
        take_pixels(graph, opt)
    except CompressorError as error:
        if groups or layers or not facts["adapters"]:
            raise
        return facts | {"problem": str(error)}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            name = str(node.target)
            counts[name] = counts.get(name, 0) + 1
    earlier: dict[str, Any] = {}
    if loaded.continued is not None:
        earlier = {"continued_from": loaded.continued.facts(), "passes": _passes_so_far(loaded.continued)}
    return facts | {
        "adapters": facts["adapters"] or found_in(graph.tensors),
        "inputs": [handover.shape_of(spec) for spec in graph.inputs],
        "outputs": list(graph.outputs),
        "params": measure.parameters(graph),
        "macs": macs(graph),
        "bytes": measure.bytes_of(graph),
        "operators": dict(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))),
        "unknown": sorted({str(n.target) for n in graph.nodes if kind(n) == "opaque"}),
        "notices": [*loaded.notes, *graph.notices],
        **earlier,
        **(_groups(graph, registry.target("cpu")) if groups else {}),
        **({"layers": layers_of(graph)} if layers else {}),
    }


def bench(
    paths: Sequence[str | Path],
    *,
    threads: int | None = None,
    batch: int = 1,
    seconds: float = 5.0,
    advise: bool = False,
) -> list[dict[str, Any]]:
    """Latency of ONNX files, measured in turns on generated inputs; the first is what the others are compared with.

    Each runs on the provider of the target that it was made for, where that is installed, else on the CPU's.
    threads: inside an operator, 1 if None, 0 for all cores. advise: of one file, which session settings suit it best
    here, with up to so many threads (`advice.advise`).
    """
    if advise and len(paths) > 1:
        raise UsageError("--advise is about one model; name one")
    files = [Path(path) for path in paths]
    with delivery.opened(files[0]) as session:
        arrays = measure.random_feeds(session, batch=batch)
    if advise:
        settings = advice.advise(
            files[0], arrays, most=threads or 0, seconds=seconds, provider=_provider(files[0])
        )
        return [{"path": str(paths[0]), **row} for row in settings]
    timed = measure.bench_alone if any(map(delivery.is_large, files)) else measure.bench
    providers = [_provider(path) for path in files]
    threads = 1 if threads is None else threads
    found = timed(files, feeds=arrays, threads=threads, seconds=seconds, providers=providers)
    rows = []
    for path, provider, latency in zip(paths, providers, found, strict=True):
        row = {"path": str(path), "provider": provider, **dataclasses.asdict(latency)}
        row.pop("rounds")
        rows.append(row)
    return rows


# -------------------------------------------------------------------- helpers


def _provider(onnx: Path) -> str:
    """Where a file runs here: as its target says, if it has one."""
    made_for = targets().get(delivery.metadata(onnx).get("target", ""))
    return delivery.usable_provider(made_for) if made_for is not None else CPU


def _stem(model: Any) -> str:
    if isinstance(model, (str, Path)):
        name = Path(model).resolve().name
        for suffix in (".pth.tar", ".pt2", ".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar"):
            if name.endswith(suffix):
                return name.removesuffix(suffix)
        return name
    return type(model).__name__.lower()


def _passes_so_far(continued: Continued) -> list[dict[str, Any]]:
    """One row for every pass in the receipt that a model came with."""
    shown = ("pass", "config", "contract", "status", "params", "macs", "bytes")
    return [
        {"run": number, **{key: row.get(key, "") for key in shown}}
        for number, run in enumerate(continued.runs, 1)
        for row in run["rows"]
    ]


def _groups(graph: Graph, target: Target) -> dict[str, Any]:
    """The ledger of a graph that nothing was taken from, and the shares of it that pruning must leave."""
    algebra = analyse(graph, carrier_of(graph))
    costs = costs_of(graph, algebra)
    unknown = np.zeros(1 + max((int(classes.max()) for classes in algebra.axes.values()), default=-1))
    found = families(algebra, costs, unknown, target.channel_multiple, MINIMUM)
    entries = Ledger(graph, algebra, costs, found).entries()
    return {"least": least_shares(found, costs), "groups": [entry.to_dict(names=True) for entry in entries]}


def _inspect_weights(path: Path, adapters: list[dict[str, Any]]) -> dict[str, Any]:
    found = peek(path)
    tensors = found.places[0].tensors if found.places else {}
    return {
        "path": str(path),
        "adapters": adapters,
        "kind": found.summary() if found.places else found.kind,
        "architecture": found.architecture,
        "labels": list(found.labels),
        "tensors": {
            name: f"{handover.dtype_name(t.dtype)}{list(t.shape)}" for name, t in sorted(tensors.items())
        },
    }


def _inspect_onnx(path: Path) -> dict[str, Any]:
    known = path.suffix == ".onnx" and not delivery.is_large(path)
    facts = {
        "path": str(path),
        "bytes": sum(f.stat().st_size for f in (path, companion_of(path)) if f.exists()),
        **runtime.facts(path),
        "operators": runtime.optimized_operators(path) if known else {},
    }
    integer = any(name.startswith(("QLinear", "QGemm", "MatMulInteger")) for name in facts["operators"])
    warning = measure.saturation() if integer else ""
    return facts | ({"warning": warning} if warning else {})
