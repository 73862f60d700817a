"""nn.Module -> ExportedProgram, as dynamic as the model allows, and back. The only file that calls torch.export."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .errors import CompressorError, OutputError, UnsupportedError, UsageError
from .ir import Graph, Input
from .pytrees import leaves, path_name


def load_program(data: bytes) -> ExportedProgram:
    """An exported program from the bytes of a `.pt2` file that has passed gate.py; raises whatever torch raises."""
    with quiet():
        try:
            return torch.export.load(io.BytesIO(data))
        except RuntimeError:
            # it only logs the reason and raises a general error; the function below it raises the reason
            from torch.export.pt2_archive._package import load_pt2

            load_pt2(io.BytesIO(data))
            raise


def reexport(graph: Graph, module: nn.Module | None = None) -> ExportedProgram:
    """The graph as an exported program again, with the dynamic axes that it came in with.

    module: what to export in its place, which takes the same inputs.
    """
    dynamic = tuple(
        {i: torch.export.Dim.DYNAMIC for i, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in graph.inputs
    )
    one = (module or graph.module).eval()
    with torch.no_grad(), quiet(), _related(one, graph):
        return torch.export.export(
            one, tuple(t.clone() for t in graph.example), dynamic_shapes=dynamic, strict=False
        )


@contextmanager
def _related(module: nn.Module, graph: Graph) -> Iterator[None]:
    """Tells the exporter which axes are one and which are sums of others, as the graph knows since it was captured.

    It interprets a GraphModule node by node, without its hooks: the checks are nodes while the block runs.
    """
    if not isinstance(module, fx.GraphModule):
        yield
        return
    entries = [node for node in module.graph.nodes if node.op == "placeholder"]
    sizes = [
        (entry, axis, size.node.expr)
        for entry, known, spec in zip(entries, graph.placeholders, graph.inputs, strict=True)
        for axis, size in enumerate(known.meta["val"].shape)
        if isinstance(size, torch.SymInt) and isinstance(spec.shape[axis], str)
    ]
    first = {expr: (entry, axis) for entry, axis, expr in reversed(sizes) if expr.is_Symbol}
    made: list[fx.Node] = []

    def call(target: Any, *args: Any) -> fx.Node:
        made.append(module.graph.call_function(target, args))
        return made[-1]

    body = next(n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr"))
    with module.graph.inserting_before(body):
        for entry, axis, expr in sizes:
            terms = expr.args if expr.is_Add else (expr,)
            if (entry, axis) == first.get(expr) or not all(term in first for term in terms):
                continue
            known = [call(torch.ops.aten.sym_size.int, *first[term]) for term in terms]
            total = reduce(lambda a, b: call(operator.add, a, b), known)
            size = call(torch.ops.aten.sym_size.int, entry, axis)
            call(torch._check, call(operator.eq, size, total))
    module.recompile()
    try:
        yield
    finally:
        for node in reversed(made):
            module.graph.erase_node(node)
        module.recompile()


def save_program(program: ExportedProgram, path: Path, extra: Mapping[str, str]) -> None:
    """A `.pt2` file with extra text files in it. What operators came from is said without folders of this machine.

    OutputError where it cannot be written.
    """
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            kept = {
                key: node.meta[key] for key in ("val", "tensor_meta", "nn_module_stack") if key in node.meta
            }
            if node.meta.get("stack_trace"):
                kept["stack_trace"] = re.sub(r'File "[^"]*[/\\\\]', 'File "', node.meta["stack_trace"])
            node.meta = kept
    try:
        with path.open("wb") as file, _Sink(file) as sink, quiet():
            torch.export.save(program, cast(IO[bytes], sink), extra_files=dict(extra))
            failed = sink.failed
    except OSError as error:
        failed = error
    if failed is not None:
        reason = failed.strerror or failed
        raise OutputError(f"cannot write {path}: {reason}; free space, or name another folder") from failed


class _Sink(io.RawIOBase):
    """Hands bytes on, and keeps the first error for later: torch's writer ends the process where a write fails."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failed: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """torch rewinds what it has written; there is nothing to read here."""
        return 0

    def write(self, data: Any) -> int:
        if self.failed is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.failed = error
        return len(data)


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters log their progress and warn about their own deprecations; neither is the user's business."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -------------------------------------------------------------------- export


def bind(
    args: Sequence[Any] | Tensor | Mapping[str, Any] | None,
    kwargs: Mapping[str, Any] | None,
    inputs: Sequence[Input],
    model: nn.Module,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args is None and not kwargs:
        if not inputs:
            raise UsageError(
                "no example input: pass one, or describe it, for example --input 'x:f32[?,3,224,224]'"
            )
        return _bind_specs(inputs, model)
    _know_dataclasses((args, kwargs))
    if isinstance(args, Mapping):
        return (), {**args, **(kwargs or {})}
    if isinstance(args, Tensor):
        args = (args,)
    return tuple(args or ()), dict(kwargs or {})


def _bind_specs(inputs: Sequence[Input], model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors for `--input`: by keyword where every name is a parameter of forward, by position otherwise."""
    formals = inspect.signature(model.forward).parameters
    made = {spec.name: blank(spec) for spec in inputs}
    return ((), made) if all(name in formals for name in made) else (tuple(made.values()), {})


def blank(spec: Input) -> Tensor:
    """A valid tensor of a described input: noise, zeros for integers (0 is in every table), ones for masks."""
    size = [s if isinstance(s, int) else (2 if i == 0 else 16) for i, s in enumerate(spec.shape)]
    if spec.dtype.is_floating_point:
        return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(spec.dtype)
    masks = spec.dtype == torch.bool or "mask" in spec.name
    return torch.ones(size, dtype=spec.dtype) if masks else torch.zeros(size, dtype=spec.dtype)


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    overrides: Sequence[Input],
    dynamic: bool,
    notices: list[str],
) -> tuple[ExportedProgram, tuple[Input, ...]]:
    formals = _formals(model, len(args))
    paths = [path_name(k, formals) for k, v in leaves((args, kwargs)) if isinstance(v, Tensor)]
    tensors = [v for _, v in leaves((args, kwargs)) if isinstance(v, Tensor)]
    if not tensors:
        raise UsageError("the example holds no tensor input")
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"the example inputs do not fit the model's forward: {error}") from error
    for path, tensor in zip(paths, tensors, strict=True):
        if tensor.layout is not torch.strided:
            raise UnsupportedError(f"input {path} is {tensor.layout}: an ONNX model takes dense tensors")
    named = _by_path(overrides, paths, tensors)
    first = next((t for t in tensors if t.dim()), tensors[0])  # a scalar has no batch
    if first.dim() and not first.shape[0]:
        raise UsageError("the example inputs hold no sample: axis 0 has size 0")
    shapes = [_axes(path, t, named, first, dynamic) for path, t in zip(paths, tensors, strict=True)]
    program, kept = _export_as_dynamic_as_possible(model, args, kwargs, tensors, shapes, notices)
    return program, tuple(Input(p, t.dtype, s) for p, t, s in zip(paths, tensors, kept, strict=True))


Shapes = list[tuple[int | str, ...]]


def _export_as_dynamic_as_possible(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: Sequence[Tensor],
    shapes: Shapes,
    notices: list[str],
) -> tuple[ExportedProgram, Shapes]:
    """All named axes dynamic; where the model cannot keep them, the leading ones only; else none of them."""
    leading: Shapes = [
        tuple(size if i == 0 else tensor.shape[i] for i, size in enumerate(shape))
        for shape, tensor in zip(shapes, tensors, strict=True)
    ]
    static: Shapes = [tuple(t.shape) for t in tensors]
    first: Exception | None = None
    for kept in [s for i, s in enumerate((shapes, leading, static)) if s not in (shapes, leading)[:i]]:
        positional, keywords = (args, kwargs) if kept == static else _widen(args, kwargs, kept)
        try:
            program = _run_export(model, positional, keywords, kept)
        except (CompressorError, KeyboardInterrupt):
            raise
        except Exception as error:
            first = first or error
            continue
        fixed = {
            name: size
            for old, new in zip(shapes, kept, strict=True)
            for name, size in zip(old, new, strict=True)
        }
        for name, size in fixed.items():
            if isinstance(name, str) and isinstance(size, int) and first is not None:
                why = _first_line(first)
                notices.append(
                    f"the {name} axis is fixed to {size}: the model cannot keep it dynamic ({why})"
                )
        return program, kept
    raise explain(first) from first  # type: ignore[arg-type]


def _by_path(overrides: Sequence[Input], paths: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Input]:
    """Descriptions by the input they are of: by name, in order where no name fits. UsageError on a contradiction."""
    if len(overrides) == len(paths) and not {spec.name for spec in overrides} & set(paths):
        overrides = [replace(spec, name=path) for spec, path in zip(overrides, paths, strict=True)]
    examples = dict(zip(paths, tensors, strict=True))
    for spec in overrides:
        if spec.name not in examples:
            raise UsageError(f"--input {spec}: no input has this name; the model takes {', '.join(paths)}")
        have = examples[spec.name]
        fits = len(spec.shape) == have.dim() and all(
            isinstance(want, str) or want == size for want, size in zip(spec.shape, have.shape, strict=True)
        )
        if not fits or spec.dtype != have.dtype:
            example = Input(spec.name, have.dtype, tuple(have.shape))
            raise UsageError(f"--input {spec}: the example input is {example}")
    return {spec.name: spec for spec in overrides}


def _axes(
    path: str, tensor: Tensor, named: Mapping[str, Input], first: Tensor, dynamic: bool
) -> tuple[int | str, ...]:
    """Sizes of one input with the names of its dynamic axes."""
    if path in named:
        return named[path].shape
    if dynamic and tensor.dim() and first.dim() and tensor.shape[0] == first.shape[0]:
        return ("batch", *tensor.shape[1:])
    return tuple(tensor.shape)


def _widen(
    args: tuple[Any, ...], kwargs: dict[str, Any], shapes: list[tuple[int | str, ...]]
) -> tuple[tuple, dict]:
    """Examples whose dynamic axes have size 1 are repeated to 2: sizes 0 and 1 are specialised by the exporter."""
    feed = iter(shapes)

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for axis, size in enumerate(next(feed)):
            if isinstance(size, str) and leaf.shape[axis] == 1:
                leaf = leaf.repeat_interleave(2, axis)
        return leaf

    return pytree.tree_map(widen, (args, kwargs))


def _run_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Sequence[tuple[int | str, ...]]
) -> ExportedProgram:
    feed = iter(shapes)

    def dims(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        return {i: torch.export.Dim.DYNAMIC for i, size in enumerate(next(feed)) if isinstance(size, str)}

    spec = pytree.tree_map(dims, (args, kwargs))
    # None where nothing is dynamic: the exporter cannot match shapes with what `**kwargs` takes up
    by_name = (
        _signature_shapes(model, spec) if any(isinstance(s, str) for one in shapes for s in one) else None
    )
    # a failed export leaves marks on the tensors that it was given, so they are not the caller's
    args, kwargs = pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (args, kwargs))
    with torch.no_grad(), quiet(), _data_as_detach(), _restored(model):
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=by_name, strict=False)
        except Exception as error:
            if "not a known type" not in str(error) or not _know_dataclasses(model(*args, **kwargs)):
                raise
        return torch.export.export(model, args, kwargs, dynamic_shapes=by_name, strict=False)


def _know_dataclasses(tree: Any) -> bool:
    """Makes the exporter look into dataclasses that nobody has registered; whether there are any in the tree."""
    found = {type(one) for one in pytree.tree_leaves(tree) if is_dataclass(one) and not isinstance(one, type)}
    for one in found:
        torch.export.register_dataclass(one)
    return bool(found) and (_know_dataclasses(tree) or True)  # there may be more in these


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards a module has its own tensors again: a forward that binds new ones leaves those of the tracer."""
    held = [
        (
            part,
            dict(part._parameters),
            dict(part._buffers),
            {k: v for k, v in vars(part).items() if isinstance(v, Tensor)},
        )
        for part in model.modules()
    ]
    try:
        yield
    finally:
        for part, parameters, buffers, plain in held:
            for now, before in ((part._parameters, parameters), (part._buffers, buffers)):
                now.clear()
                now.update(before)  # type: ignore[arg-type]
            vars(part).update(plain)


def _signature_shapes(model: nn.Module, spec: tuple[tuple, dict]) -> dict[str, Any]:
    """By formal, as the exporter wants them: what `*args` and `**kwargs` take up stands below their names."""
    args, kwargs = spec
    return inspect.signature(model.forward).bind(*args, **kwargs).arguments


def _formals(model: nn.Module, count: int) -> list[str]:
    """Names of `count` positional arguments: `x`, then `args.0`, `args.1` where forward takes `*args`."""
    names: list[str] = []
    for formal in inspect.signature(model.forward).parameters.values():
        if formal.kind is formal.VAR_POSITIONAL:
            names += [f"{formal.name}.{i}" for i in range(count - len(names))]
        elif formal.kind in (formal.POSITIONAL_ONLY, formal.POSITIONAL_OR_KEYWORD):
            names.append(formal.name)
    return names


@contextmanager
def _data_as_detach() -> Iterator[None]:
    """Layers that read `weight.data` would make the exporter store a fake tensor; `.detach()` is traced."""
    original = Tensor.__dict__.get("data", torch._C.TensorBase.__dict__["data"])
    inherited = "data" not in Tensor.__dict__

    def set_data(tensor: Tensor, value: Tensor) -> None:
        original.__set__(tensor, value)

    Tensor.data = property(lambda t: t.detach(), set_data)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        if inherited:
            del Tensor.data  # type: ignore[misc]
        else:
            Tensor.data = original  # type: ignore[misc]


def explain(error: Exception) -> UnsupportedError:
    """One line about a model that does not export: the user's own line in the traceback, and the first reason."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/compressor/" not in file and not file.startswith("<"):
            place = f"{file.rsplit('/', 1)[-1]}:{trace.tb_lineno} in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return UnsupportedError(
        f"the model does not export{f' ({place})' if place else ''}: {_first_line(error)}; "
        "torch.export needs a forward whose control flow does not depend on tensor values"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
