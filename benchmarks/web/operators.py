"""Which operators ONNX Runtime has kernels for on this machine, and not in its build for browsers.

    python benchmarks/web/operators.py        Markdown; what `lacks` of the target `web` is checked by

For every kernel of the installed ONNX Runtime, a model of one operator; each is loaded by both, in node by the WASM
build (`npm install` in this folder first). A kernel is lacking where WASM finds no implementation, or knows no such
operator.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as state

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from targets.web import WEB  # noqa: E402

IR_VERSION = 11
CONTROL = {"If", "Loop", "Scan", "SequenceMap"}  # their bodies are models; they are loaded by hand
NO_KERNEL = ("Could not find an implementation", "is not a registered function/op", "No Op registered")
# types of ONNX -> those of its files
NAMES = {name.lower().replace("_", ""): number for name, number in TensorProto.DataType.items()}


def type_of(text: str) -> onnx.TypeProto:
    """`seq(tensor(float))` as a type of ONNX, its shape unknown."""
    kind, _, inner = text.removesuffix(")").partition("(")
    if kind == "tensor":
        return helper.make_tensor_type_proto(NAMES[inner.replace("_", "")], None)
    if kind == "seq":
        return helper.make_sequence_type_proto(type_of(inner))
    return helper.make_optional_type_proto(type_of(inner))


def attributes(schema: Any) -> dict[str, Any]:
    """A value for each attribute that must be there."""
    values = {"INT": 1, "FLOAT": 1.0, "STRING": "x", "INTS": [1], "FLOATS": [1.0], "STRINGS": ["x"]}
    needed = {name: str(one.type).split(".")[-1] for name, one in schema.attributes.items() if one.required}
    return {name: values[kind] for name, kind in needed.items() if kind in values}


def probe(schema: Any, types: Mapping[str, str], opset: int) -> onnx.ModelProto:
    """A model of one operator, of its inputs and outputs that are not optional."""
    single = [one for one in schema.inputs if not str(one.option).endswith("Optional")]
    made = [one for one in schema.outputs if not str(one.option).endswith("Optional")] or schema.outputs[:1]
    concrete = {**types}

    def known(one: Any) -> str:
        if one.typeStr not in concrete:
            concrete[one.typeStr] = one.typeStr if "(" in one.typeStr else sorted(one.types)[0]
        return concrete[one.typeStr]

    inputs = [onnx.ValueInfoProto(name=f"i{n}", type=type_of(known(one))) for n, one in enumerate(single)]
    outputs = [onnx.ValueInfoProto(name=f"o{n}") for n, _ in enumerate(made)]
    node = helper.make_node(
        schema.name,
        [i.name for i in inputs],
        [o.name for o in outputs],
        domain=schema.domain,
        **attributes(schema),
    )
    opsets = [helper.make_opsetid("", opset if not schema.domain else WEB.opset)]
    if schema.domain:
        opsets.append(helper.make_opsetid(schema.domain, opset))
    return helper.make_model(
        helper.make_graph([node], "main", inputs, outputs), opset_imports=opsets, ir_version=IR_VERSION
    )


def probes() -> Iterator[tuple[str, str, onnx.ModelProto]]:
    """Operator, types, model: for each kernel that files of the target's opset may ask for, type by type."""
    schemas: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for schema in state.get_all_operator_schema():
        schemas[schema.domain, schema.name].append(schema)
    seen = set()
    for kernel in state.get_all_opkernel_def():
        first, last = kernel.version_range
        opset = WEB.opset if not kernel.domain else first
        versions = [s for s in schemas[kernel.domain, kernel.op_name] if s.since_version <= opset]
        if not first <= opset <= last or not versions or kernel.op_name in CONTROL:
            continue
        schema = max(versions, key=lambda s: s.since_version)
        name = f"{kernel.domain}::{kernel.op_name}".removeprefix("::")
        usual = {key: found[0] for key, found in kernel.type_constraints.items()}
        for key, found in kernel.type_constraints.items() or [("", [""])]:
            for one in found:
                types = {**usual, key: one} if key else {}
                said = ", ".join(f"{k} {v}" for k, v in sorted(types.items()))
                if (name, said) in seen or "map(" in said or "sparse" in said:  # no network has these
                    continue
                seen.add((name, said))
                yield name, said, probe(schema, types, opset)


def native(path: Path) -> str:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error)
    return ""


def in_wasm(folder: Path, count: int) -> list[str]:
    """What the WASM build says of each model, "" where it loads it; a crash ends its process, and the next goes on."""
    said: list[str] = []
    while len(said) < count:
        done = subprocess.run(
            ["node", str(HERE / "probe.mjs"), str(folder), str(len(said)), str(count)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        said += [json.loads(line) for line in done.stdout.splitlines()]
        if len(said) < count:
            said.append(f"crashed: {done.stderr.strip()[-200:]}")
    return said


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), list(probes())
        for i, (_, _, model) in enumerate(found):
            onnx.save(model, folder / f"{i}.onnx")
        here = [native(folder / f"{i}.onnx") for i in range(len(found))]
        there = in_wasm(folder, len(found))
    lacking: dict[str, list[str]] = defaultdict(list)
    have: dict[str, int] = defaultdict(int)
    odd: list[tuple[str, str, str, str]] = []
    for (op, types, _), ours, theirs in zip(found, here, there, strict=True):
        if any(words in theirs for words in NO_KERNEL) and not any(words in ours for words in NO_KERNEL):
            lacking[op].append(types)
        else:
            have[op] += 1
            if theirs and not ours:
                odd.append((op, types, ours, theirs))
    print(f"{len(found)} models of {len({op for op, _, _ in found})} operators, opset {WEB.opset}\n")
    print("| operator | kernels lacking | of |\n|---|---|---|")
    for op, kinds in sorted(lacking.items()):
        print(f"| {op} | {'all' if not have[op] else '; '.join(kinds)} | {len(kinds) + have[op]} |")
    ends = sorted(
        {types.split("tensor(")[1].split(")")[0] for _, types, _, said in odd if "data type" in said}
    )
    print(f"\nnot taken as inputs or outputs: {', '.join(ends)}; other differences: ", end="")
    print(", ".join(sorted({op for op, _, _, said in odd if "data type" not in said})) or "none")
    whole = {op for op in lacking if not have[op]}
    if strange := whole - WEB.lacks:
        raise SystemExit(f"the target does not know that these are lacking: {', '.join(sorted(strange))}")


if __name__ == "__main__":
    main()
