"""ONNX Runtime: sessions, runs, what its optimiser made of a model. Only this file imports onnxruntime."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .errors import OutputError, TargetError

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

    Weights = Literal["folded", "packed", "mapped"]

_SILENT = (
    4  # only fatal messages: failures come back as exceptions, warnings would break the progress display
)
_LARGE = 1 << 16  # bytes of a tensor that is a weight, and no scales or sizes
# Makes 8-bit weights unsigned on x86 without VNNI, whose products with unsigned bytes would be added in 16 bits.
EXACT = "session.x64quantprecision"
_PROVIDER = "ExecutionProvider"
_OPENVINO = f"OpenVINO{_PROVIDER}"
FLOATS = {f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")}


def providers() -> tuple[str, ...]:
    """Execution providers of the installed ONNX Runtime, best first."""
    return tuple(_runtime().get_available_providers())


@functools.cache
def starts(provider: str) -> bool:
    """Whether a provider that is installed finds the libraries and the device that it needs."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "one", ends[:1], ends[1:])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    try:
        session(model.SerializeToString(), providers=[provider], threads=1)
    except TargetError:
        return False
    return True


def session(
    model: str | os.PathLike[str] | bytes,
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int = 0,
    spinning: bool | None = None,
    arena: bool = True,
    optimize: bool = True,
    exact: bool = False,
    weights: Weights = "folded",
    profile: bool = False,
    weights_in: str | os.PathLike[str] | None = None,
    optimized_path: str | os.PathLike[str] | None = None,
) -> ort.InferenceSession:
    """A session on a file or on serialised bytes: sequential, deterministic, silent.

    threads: inside one operator, 0 for all cores. spinning: whether they wait busily for work; until the run ends if
    None, so that they do not slow the next session when two are timed in turn. arena: memory of a run is kept for the
    next. exact: 8-bit sums do not saturate, which takes slower kernels where `measure.saturation` says so;
    weights that nodes share are then held for each of them.
    weights: `folded` as ONNX Runtime likes it; `packed` folds no
    constant, so that a weight which is read transposed too is not copied; `mapped` leaves them where they lie in a
    file of their own, so that a large model is verified in little memory. optimize=False leaves the operators as they
    are, and the weights mapped. profile: `end_profiling()` names the trace, which lies in the temporary folder.
    weights_in: where weights in files of their own lie, of a model given as bytes.
    optimized_path: the optimised graph is written there, large weights beside it.
    TargetError names the file and ONNX Runtime's first line, also when a provider is not installed.
    OpenVINO runs on the processor, and computes floats as f32 also where it has bf16.
    """
    runtime = _runtime()
    name = _name(model)
    missing = [p for p in providers if p not in runtime.get_available_providers()]
    if missing:
        have = ", ".join(runtime.get_available_providers())
        raise TargetError(f"{name}: {missing[0]} is not in the installed ONNX Runtime, which has {have}")
    options = _options(runtime, threads, optimize, pack=optimize and weights != "mapped")
    _let_spin(options, spinning)
    options.enable_cpu_mem_arena = arena
    if exact:
        options.add_session_config_entry(EXACT, "1")
    if profile:
        options.enable_profiling = True
        # a name of its own: what the runtime adds to it tells seconds apart, and two sessions may begin in one
        options.profile_file_prefix = str(Path(tempfile.gettempdir()) / f"compressor-{uuid.uuid4().hex}")
    if weights_in is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights_in)
        )
    if optimized_path is not None:
        _write_optimized_to(options, Path(optimized_path))
    left_out = [] if weights == "folded" else ["ConstantFolding"]
    given = [_with_options(p, threads) for p in providers]
    try:
        made = _create(runtime, model, options, providers=given, disabled_optimizers=left_out)
    except TargetError:
        if not exact:
            raise
        apart = _unshared(model)  # it fails where nodes share a weight (1.31)
        if apart is None:
            options.add_session_config_entry(EXACT, "0")
        made = _create(runtime, apart or model, options, providers=given, disabled_optimizers=left_out)
    lost = [p for p in providers if p not in made.get_providers()]
    if lost:  # ONNX Runtime goes on without a provider whose libraries do not load
        raise TargetError(
            f"{name}: {lost[0]} is installed, but did not start; see that its libraries are found, and that this "
            f"process has loaded no other {lost[0].removesuffix(_PROVIDER)}"
        )
    return made


def takes_exact(path: str | os.PathLike[str]) -> bool:
    """Whether an application can load the file with `EXACT`: not where nodes share a weight of 8 bits (1.31)."""
    options = _options(_runtime(), threads=1, optimize=True, pack=True)
    options.add_session_config_entry(EXACT, "1")
    try:
        _create(_runtime(), path, options)
    except TargetError:
        return False
    return True


def _unshared(model: str | os.PathLike[str] | bytes) -> bytes | None:
    """The model with a weight for every reader; None for ONNX Runtime's own format, and for weights beside the file."""
    import onnx
    import onnx_ir

    from . import tidy

    try:
        proto = onnx.load_from_string(model if isinstance(model, bytes) else Path(model).read_bytes())
    except Exception:  # protobuf's own
        return None
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        return None
    made = onnx_ir.from_proto(proto)
    tidy.own_weights(made)
    return bytes(onnx_ir.to_proto(made).SerializeToString())


def _with_options(provider: str, threads: int) -> tuple[str, dict[str, str]]:
    """A provider as a session takes it: OpenVINO has threads of its own, and would choose device and precision."""
    if provider != _OPENVINO:
        return provider, {}
    config = {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}
    count = {"num_of_threads": str(threads)} if threads else {}
    return provider, {"device_type": "CPU", "load_config": json.dumps(config), **count}


def run(
    session: ort.InferenceSession, inputs: Mapping[str, np.ndarray] | Sequence[np.ndarray]
) -> list[np.ndarray]:
    """All outputs in order. inputs: by name, or in the model's order; TargetError if they do not fit."""
    expected = [i.name for i in session.get_inputs()]
    given = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(expected, inputs, strict=False))
    if len(inputs) != len(expected) or set(given) != set(expected):
        shown = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else f"{len(inputs)} arrays"
        raise TargetError(f"the model takes {', '.join(expected)}; it was given {shown}")
    try:
        # not np.ascontiguousarray, which gives a scalar an axis
        feeds = {name: np.require(given[name], requirements="C") for name in expected}
        return list(session.run(None, feeds))
    except Exception as error:  # onnxruntime's classes share no base below Exception
        raise TargetError(f"ONNX Runtime could not run the model: {_reason(error)}") from error


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Inputs, outputs and metadata of a model, whose weights are not touched."""
    one = session(path, weights="mapped")
    return {
        "inputs": [{"name": i.name, "dtype": i.type, "shape": i.shape} for i in one.get_inputs()],
        "outputs": [{"name": o.name, "dtype": o.type, "shape": o.shape} for o in one.get_outputs()],
        "metadata": dict(one.get_modelmeta().custom_metadata_map),
    }


def optimized_nodes(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(operator, node name) of ONNX Runtime's own optimised graph, in execution order, without domains."""
    with _optimized(path) as (model, _):
        return [(node.op_type, node.name) for node in model.graph.node]


def optimized_operators(path: str | os.PathLike[str]) -> dict[str, int]:
    """Operator -> how often it stands in ONNX Runtime's own optimised graph, commonest first."""
    return dict(Counter(op for op, _ in optimized_nodes(path)).most_common())


def operators_that_ran(path: str | os.PathLike[str], feeds: Sequence[np.ndarray]) -> dict[str, int]:
    """Like `optimized_operators`, read off one run with mapped weights: no optimised copy of the file is written.

    Constants are not folded there, so the small operators on sizes are counted too.
    """
    one = session(path, weights="mapped", profile=True)
    try:
        run(one, feeds)
    finally:
        events = trace(one)
    ran = {e["name"]: e["args"]["op_name"] for e in events if e["cat"] == "Node" and "op_name" in e["args"]}
    return dict(Counter(ran.values()).most_common())


def trace(session: ort.InferenceSession) -> list[dict[str, Any]]:
    """What a session with `profile=True` has done so far, as Chrome's trace events; its file goes."""
    path = Path(session.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    return list(events)


def float_operators_inside(path: str | os.PathLike[str]) -> list[str]:
    """`operator name` of each optimised node with a float result between quantising and dequantising.

    Between: it depends on some QuantizeLinear, and some DequantizeLinear depends on it. Empty for a model
    that is all-integer from its first QuantizeLinear to its last DequantizeLinear. A dequantise-quantise pair
    in the middle counts, since the values are floats between the two.
    """
    with _optimized(path) as (model, folder):
        nodes = list(model.graph.node)
        floats = _float_values(model, folder)
    behind: set[str] = set()  # values that depend on a QuantizeLinear
    for node in nodes:
        if node.op_type == "QuantizeLinear" or any(i in behind for i in node.input):
            behind.update(node.output)
    before: set[str] = set()  # values that a DequantizeLinear depends on
    inside = []
    for node in reversed(nodes):
        reached = any(o in before for o in node.output)
        if reached and any(o in behind and o in floats for o in node.output):
            inside.append(f"{node.op_type} {node.name}".strip())
        if reached or node.op_type == "DequantizeLinear":
            before.update(i for i in node.input if i)
    return inside[::-1]


def to_ort_format(onnx_path: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> None:
    """Writes the `.ort` file of a model, fully optimised for CPUs of any make.

    The blocked NCHWc layout is left out (x86 only); signed 8-bit operators stay signed, as ARM wants them.
    Its operators are fused for good: an accelerator (NNAPI, CoreML) takes the `.onnx` file instead.
    TargetError if ONNX Runtime refuses the model, OutputError if the file cannot be written.
    """
    runtime = _runtime()
    options = _options(runtime, threads=1, optimize=True, pack=True)
    part = Path(f"{os.fspath(out_path)}.part")
    options.optimized_model_filepath = str(part)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    try:
        part.touch()  # says what is wrong with the folder better than ONNX Runtime does
        _create(runtime, onnx_path, options, disabled_optimizers=["NchwcTransformer"])
        part.replace(out_path)
    except OSError as error:
        raise OutputError(f"{out_path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def offered(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The model as ONNX Runtime offers it to execution providers: basic optimisations made, nothing fused for CPUs.

    The numbers of large weights are left out: these are external tensors, and name a file where they came in one.
    """
    import onnx

    runtime = _runtime()
    options = _options(runtime, threads=1, optimize=True, pack=False)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with _scratch(path) as folder:
        out = folder / "offered.onnx"
        _write_optimized_to(options, out)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(_LARGE)
        )
        _create(runtime, path, options)
        model = onnx.load(out, load_external_data=False)
    came = onnx.load(path, load_external_data=False).graph.initializer
    if not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in came):
        for tensor in model.graph.initializer:
            del tensor.external_data[:]
    return model


def required_operators(ort_path: str | os.PathLike[str]) -> str:
    """What a reduced build of ONNX Runtime must hold for an `.ort` file: `--include_ops_by_config` of its build.sh.

    One line a domain and opset, with the types of those operators that can be built for some types alone. To be called
    in a process of its own (`apart`): ONNX Runtime's tool extends sys.path and sets up logging when it is imported.
    """
    from onnxruntime.tools.ort_format_model import create_config_from_models

    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        out = Path(folder) / "required_operators.config"
        try:
            create_config_from_models([Path(ort_path)], out, True)
        except Exception as error:
            raise TargetError(f"{ort_path}: its operators cannot be listed: {_reason(error)}") from error
        lines = out.read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if not line.startswith("#"))  # comments hold the path


def _runtime() -> Any:
    # Since 1.29 its Linux builds send names and hashes of models to their maker unless this is set when they load.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetError(f"onnxruntime cannot be imported ({error}): pip install onnxruntime") from error
    onnxruntime.set_default_logger_severity(_SILENT)
    return onnxruntime


def _options(runtime: Any, threads: int, optimize: bool, pack: bool) -> ort.SessionOptions:
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if not pack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _let_spin(options: ort.SessionOptions, spinning: bool | None) -> None:
    if spinning is None:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))


def _write_optimized_to(options: ort.SessionOptions, path: Path) -> None:
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{path.name}.data"
    )


def _create(
    runtime: Any,
    model: str | os.PathLike[str] | bytes,
    options: ort.SessionOptions,
    *,
    providers: Sequence[tuple[str, dict[str, str]]] = (("CPUExecutionProvider", {}),),
    disabled_optimizers: Sequence[str] = (),
) -> ort.InferenceSession:
    source = model if isinstance(model, bytes) else os.fspath(model)
    if isinstance(source, str) and not Path(source).is_file():
        folder = os.path.isdir(source)
        raise TargetError(f"{source}: {'a folder; name the .onnx file in it' if folder else 'no such file'}")
    extra: dict[str, Any] = {"disabled_optimizers": list(disabled_optimizers)} if disabled_optimizers else {}
    extra["enable_fallback"] = 0  # to the CPU's provider, in silence: a number would be of another runtime
    try:
        return runtime.InferenceSession(source, options, providers=list(providers), **extra)
    except Exception as error:  # onnxruntime's classes share no base below Exception
        raise TargetError(f"{_name(model)}: ONNX Runtime refused it: {_reason(error)}") from error


@contextmanager
def _optimized(path: str | os.PathLike[str]) -> Iterator[tuple[onnx.ModelProto, Path]]:
    """The optimised model in a folder that goes when the block ends; large weights stay in a file there."""
    import onnx

    with _scratch(path) as folder:
        out = folder / "optimized.onnx"
        session(path, threads=1, optimized_path=out)
        model = onnx.load(out, load_external_data=False)
        yield model, folder


@contextmanager
def _scratch(model: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder for a copy of a model. OutputError where ONNX Runtime fails because it has no room."""
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        try:
            yield Path(folder)
        except TargetError as error:
            if shutil.disk_usage(folder).free > os.path.getsize(model):
                raise
            raise OutputError(
                f"{tempfile.gettempdir()}: no space left for temporary files; free some, or name another in TMPDIR"
            ) from error


def _float_values(model: onnx.ModelProto, folder: Path) -> set[str]:
    """Names of the values that hold floats: ONNX Runtime infers the types, fused operators included."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {output.name for output in model.graph.output}
    names = {o for node in model.graph.node for o in node.output if o} - known
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    path = folder / "probe.onnx"
    onnx.save(probe, path)
    return {o.name for o in session(path, threads=1, optimize=False).get_outputs() if o.type in FLOATS}


def _name(model: str | os.PathLike[str] | bytes) -> str:
    return f"model of {len(model):,} bytes" if isinstance(model, bytes) else os.fspath(model)


def _reason(error: BaseException) -> str:
    """ONNX Runtime's message on one line, without its code number; its second line often holds the sizes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]).removeprefix("[ONNXRuntimeError] : ").lstrip("0123456789 :")
    return text or type(error).__name__
