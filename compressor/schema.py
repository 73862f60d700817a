"""What stands in report.json (schema 1), key by key: the reference shows this table, and a test holds reports to it.

A path names nested keys: `rows[].checks[].error` is in every check of every row. Under a path that ends in `.*` keys
are names of the run's own, such as metrics or operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_CHECK = {
    "output": "name of the output",
    "slice": "which part of it (`[:, 0:4]`), empty for the whole",
    "error": "max absolute difference over max absolute reference; of whole numbers, the share that differs",
    "tolerance": "what the error may be",
    "power": "how far a wrong answer would have moved the same number: under 100 tolerances proves nothing",
    "sqnr_db": "signal over noise in decibels; `inf` where nothing differs",
    "cosine": "cosine of the two outputs, all samples at once",
    "agreement": "share of samples with the same top-1 index; null where that means nothing",
    "finite": "NaN and infinities stand in the same places",
    "discrete": "the output is whole numbers or truth values",
}
_LATENCY = {
    "median_ms": "median of one run, in milliseconds",
    "p95_ms": "95th percentile",
    "iqr_ms": "distance of the quartiles",
    "runs": "how many runs",
}


def _under(path: str, keys: Mapping[str, str]) -> dict[str, str]:
    return {f"{path}.{key}": words for key, words in keys.items()}


REPORT: dict[str, str] = {
    "schema": "version of this layout: 1",
    "compressor": "version of the compiler",
    "versions.*": "of Python and of the libraries",
    "machine.*": "processor, cores and the instructions for integers, where it was compiled",
    "command": "what was typed",
    "seed": "of all that is random",
    "spec": "the passes that ran, with the options that are not default",
    "inserted": "passes that were added because a later one needs them",
    "model.path": "file, folder or class",
    "model.stem": "its name without folder and suffix",
    "model.sha256": "of what `model.hashed` says",
    "model.hashed": "`file`, or `graph` for a model in memory",
    "target.name": "name of the target",
    "target.providers": "its execution providers, best first",
    "target.opset": "opset of the file",
    "inputs": "`name`, `dtype`, `shape` of every input; a name in a shape is a free axis",
    "outputs": "the same of the outputs",
    "data.calibration": "`description` and `samples` of what statistics were taken of; null without data",
    "data.held_out": "the same of what the contracts were checked on, and the hash of its numbers",
    "data.facts": "what was done to the data: preprocessing, batch size, cut texts",
    **_under(
        "layers[]",
        {
            "site": "module path",
            "operator": "`conv2d`",
            "macs": "multiply-accumulates of one sample",
            "params": "numbers in the tensors that it reads; a shared one counts at each reader",
            "bytes": "what they take as stored",
            "precision": "dtype of what it reads and of its weight, `u8 x i8`, or one where both are the same",
            "width": "channels of its output in the original (null: it is not there) and now; null without weights",
            "rank": "of the pair or triple that a pass made of it",
            "sqnr_db": "of its output against the original's, on a few held-out samples; null where it cannot be told",
        },
    ),
    "rows[].pass": "name; the first row is `input`, the model as it came",
    "rows[].config": "the pass as it is written in a spec",
    "rows[].contract": "`exact`, `masked`, `bounded`; several where the steps of a pass differ",
    "rows[].status": "`proved`, `not proved`, `warned` or `unchanged`; a broken contract leaves no report",
    "rows[].params": "numbers in all parameters after the pass",
    "rows[].macs": "multiply-accumulates of one sample, or of a run of a model whose batch came fixed",
    "rows[].bytes": "of all tensors",
    "rows[].metric.*": "what `--eval` measured after the pass",
    "rows[].total_db": "worst output SQNR against the model as it came; `inf` where nothing differs",
    "rows[].total_cosine": "least cosine of any output with that model's",
    "rows[].total_agreement": "least share of samples with the same top-1 index",
    "rows[].seconds": "how long the pass took, its check included",
    "rows[].peak_mb": "peak memory of the process so far, in MB of 2^20 bytes",
    **_under("rows[].checks[]", _CHECK),
    "rows[].rewrites[].site": "module path of a change",
    "rows[].rewrites[].what": "the change in words",
    "rows[].declines[].site": "module path and operator of what was left alone",
    "rows[].declines[].reason": "why",
    "rows[].facts.*": "what else the pass has to say; keys of its own",
    "emitted.file": "name of the model's file",
    "emitted.bytes": "of the model with its external data",
    "emitted.float_bytes": "of the model as it came, as fp32 ONNX",
    "emitted.sha256": "of the file",
    "emitted.data_sha256": "of the file of external data, for models of 1 GB and more",
    "emitted.opset": "opset of the file",
    "emitted.ir_version": "ONNX's IR version of the file",
    "emitted.oldest_runtime": "first release of ONNX Runtime that loads it",
    "emitted.provider": "execution provider that it was verified on",
    "emitted.verified": "where, and on how many samples, in words",
    **_under("emitted.checks[]", _CHECK),
    "emitted.operators.*": "how many operators of each kind the runtime executes after its own optimisations",
    "emitted.metric.*": "what `--eval` measured of the file itself",
    **_under("emitted.latency.model", _LATENCY),
    **_under("emitted.latency.float", _LATENCY),
    "emitted.latency.ratio": "how many times as fast as the fp32 file: median over rounds taken in turns",
    "emitted.latency.spread": "quartiles of that ratio",
    "emitted.latency.threads": "threads inside an operator",
    "emitted.latency.batch": "size of the batch",
    "emitted.latency.note": "where it was timed, if not on the target",
    "emitted.partitions": "what phones' accelerators take of it, see `compress inspect --partitions`",
    "emitted.postprocess": "suppression that ends the file",
    "emitted.program.*": "`model.pt2` of `--emit pt2`: file, bytes, how it was verified",
    "emitted.files.*": "bytes of every file in the folder",
    "emitted.hashes.*": "sha256 of those that are not the model",
    "continued_from.*": "where a model that came with a receipt was made, and whether its weights changed since",
    "history": "rows, command and target of the earlier runs of such a model",
    "notices": "what to look at before the model ships",
    "latency_table.*": "what passes timed, in milliseconds: `--latency-table` replays it",
    "memory.*": "peaks of the run in MB of 2^20 bytes: anonymous memory is what is not mapped from files",
    "peak_mb": "peak resident memory of the process",
    "steps.*": "seconds and peak memory of every step",
    "seconds": "of the whole run",
}


def unknown(report: Mapping[str, Any]) -> list[str]:
    """Paths in a report that no line of `REPORT` names."""
    return sorted(set(_unknown(report, "")))


def _unknown(value: Any, path: str) -> Iterator[str]:
    if path in REPORT or any(path.startswith(name[:-1]) for name in REPORT if name.endswith(".*")):
        return
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _unknown(one, f"{path}.{key}" if path else key)
    elif isinstance(value, (list, tuple)) and all(isinstance(one, Mapping) for one in value):
        for one in value:
            yield from _unknown(one, f"{path}[]")
    elif value or not any(name.startswith(f"{path}.") or name.startswith(f"{path}[]") for name in REPORT):
        yield path
