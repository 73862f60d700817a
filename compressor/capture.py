"""nn.Module or ExportedProgram -> Graph, and back. The only file that calls torch.export.

Capturing flattens inputs and outputs to ordered tensors with path names, makes the batch dynamic, renames in-place
operators where that is exact and functionalises the graph where it is not, and proves the result against the model.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .composites import spell_out
from .constants import constant_value
from .errors import CompressorError, UnsupportedError, UsageError
from .flatten import flatten, refuse_complex
from .inplace import in_place, rename_in_place, restore_batch_norm
from .ir import Graph, Input, operator_name, unsupported
from .ops import kind
from .pytrees import leaves, path_name
from .standins import StandIns


def capture(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] | Tensor | Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    inputs: Sequence[Input] = (),
    dynamic: bool = True,
) -> Graph:
    """A Graph that computes what `model` computes.

    args: example inputs (a tensor, a tuple, or a mapping of keyword inputs). inputs: names, dtypes and shapes that
    override the example's, or stand in for it. dynamic: axis 0 of every input whose size equals the first tensor's
    becomes the batch; an axis that the model cannot keep dynamic falls back to static with a notice.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError(
            "a TorchScript model cannot be captured: export the original module with torch.export"
        )
    if isinstance(model, ExportedProgram):
        specs = _program_specs(model, _names_of_program(model), inputs)
        return _graph_of(model, specs, _static_notice(model, dynamic))
    positional, keywords = _bind(args, kwargs, inputs, model)
    with _evaluating(model), StandIns(model, positional, keywords) as stand_ins:
        while True:
            notices: list[str] = []
            try:
                program, specs = _export(model, positional, keywords, inputs, dynamic, notices)
                graph = _graph_of(program, specs, notices)
                break
            except UnsupportedError as error:
                if not stand_ins.cure(error):
                    raise
    if stand_ins.notices:
        graph.notices += stand_ins.notices
        with _evaluating(model), torch.no_grad():
            _prove(graph, _call(model, (positional, keywords), graph.example))
    return graph


def _graph_of(program: ExportedProgram, specs: tuple[Input, ...], notices: list[str]) -> Graph:
    """The flat, pure graph of a program, proved against it."""
    example = _example(program)
    graph = flatten(program, specs, example)
    graph.notices += notices
    refuse_complex(graph)
    _normalise(graph, program)
    spell_out(graph)
    graph.notices += [
        f"{operator_name(n)} at {n.name}: an operator that no pass knows; it is left as it is"
        for n in {operator_name(n): n for n in graph.nodes if kind(n) == "opaque"}.values()
    ]
    graph.check()
    with torch.no_grad():
        flat = _call_flat(program.module(check_guards=False), program, [t.clone() for t in example])
    _prove(graph, flat)
    return graph


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


def reexport(graph: Graph) -> ExportedProgram:
    """The graph as an exported program again, with the dynamic axes that it came in with."""
    dynamic = tuple(
        {i: torch.export.Dim.DYNAMIC for i, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in graph.inputs
    )
    with torch.no_grad(), quiet():
        return torch.export.export(
            graph.module.eval(), tuple(t.clone() for t in graph.example), dynamic_shapes=dynamic, strict=False
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that the caller's module and each part of it was in."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


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


def _bind(
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
    if isinstance(args, Mapping):
        return (), {**args, **(kwargs or {})}
    if isinstance(args, Tensor):
        args = (args,)
    return tuple(args or ()), dict(kwargs or {})


def _bind_specs(inputs: Sequence[Input], model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors for `--input`: by keyword where every name is a parameter of forward, by position otherwise."""
    formals = inspect.signature(model.forward).parameters
    made = {spec.name: _blank(spec) for spec in inputs}
    return ((), made) if all(name in formals for name in made) else (tuple(made.values()), {})


def _blank(spec: Input) -> Tensor:
    """A valid tensor of a described input: noise, zeros for integers (0 is in every table), ones for masks."""
    size = [s if isinstance(s, int) else (2 if i == 0 else 16) for i, s in enumerate(spec.shape)]
    if spec.dtype.is_floating_point:
        return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(spec.dtype)
    masks = spec.dtype == torch.bool or "mask" in spec.name
    return torch.ones(size, dtype=spec.dtype) if masks else torch.zeros(size, dtype=spec.dtype)


def _export(
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
    raise _explain(first) from first  # type: ignore[arg-type]


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
    with torch.no_grad(), quiet(), _data_as_detach():
        return torch.export.export(model, args, kwargs, dynamic_shapes=by_name, strict=False)


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


def _explain(error: Exception) -> UnsupportedError:
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


# -------------------------------------------------------------------- names and examples


def _names_of_program(program: ExportedProgram) -> list[str]:
    module = program.module(check_guards=False)
    spec = program.call_spec.in_spec
    if spec is None:
        return [n.name for n in module.graph.nodes if n.op == "placeholder"]
    numbered = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    flat = [path_name(k) for k, _ in leaves(numbered)]
    return [
        name if path.startswith("input_") and "." not in path else path
        for name, path in zip(names, flat, strict=True)
    ]


def _program_specs(
    program: ExportedProgram, names: list[str], overrides: Sequence[Input]
) -> tuple[Input, ...]:
    module = program.module(check_guards=False)
    named = {spec.name: spec for spec in overrides}
    specs: list[Input] = []
    seen: dict[str, str] = {}
    for name, node in zip(names, [n for n in module.graph.nodes if n.op == "placeholder"], strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        sizes: list[int | str] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                sizes.append(size)
                continue
            given = named[name].shape[axis] if name in named and axis < len(named[name].shape) else None
            label = given if isinstance(given, str) else _axis_label(axis, value)
            label = seen.setdefault(
                str(size), label if label not in seen.values() else f"{label}_{len(seen)}"
            )
            sizes.append(label)
        specs.append(Input(name, value.dtype, tuple(sizes)))
    return tuple(specs)


def _axis_label(axis: int, value: Tensor) -> str:
    if axis == 0:
        return "batch"
    if value.dim() in (2, 3) and axis == 1:
        return "sequence"
    return {2: "height", 3: "width"}.get(axis, f"axis_{axis}") if value.dim() == 4 else f"axis_{axis}"


def _static_notice(program: ExportedProgram, dynamic: bool) -> list[str]:
    if dynamic and not program.range_constraints:
        return ["the exported program is static: every axis keeps the size it was exported with"]
    return []


def _example(program: ExportedProgram) -> list[Tensor]:
    """Flat example inputs of a program: its own where it carries them, else made from its input shapes."""
    if program.example_inputs is not None:
        flat = pytree.tree_leaves(program.example_inputs)
        tensors = [t.detach() for t in flat if isinstance(t, Tensor)]
        if tensors:
            return tensors
    made = []
    for node in program.module(check_guards=False).graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            size = tuple(s if isinstance(s, int) else max(2, int(s.node.hint or 2)) for s in value.shape)
            made.append(_blank(Input(node.name, value.dtype, size)))
    return made


# -------------------------------------------------------------------- in-place operators


def _normalise(graph: Graph, program: ExportedProgram) -> None:
    """Renames in-place operators to their pure forms, or functionalises the whole graph where that could be wrong."""
    if rename_in_place(graph.graph):
        graph.clean()
        graph.reinfer()
        return
    try:
        with quiet():
            pure = program.run_decompositions({})
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise _explain(error) from error
    flat = flatten(pure, graph.inputs, graph.example)
    restore_batch_norm(flat.graph)
    _drop_settled_writes(flat)
    if not rename_in_place(flat.graph):
        culprit = next(n for n in flat.nodes if in_place(n))
        raise unsupported(culprit, "writes into the model's own state; a compiled model keeps none")
    graph.graph, graph.tensors, graph.parameters = flat.graph, flat.tensors, flat.parameters
    graph.clean()
    graph.reinfer()


def _drop_settled_writes(graph: Graph) -> None:
    """Removes writes into a parameter that change nothing the second time: a projection that every forward repeats."""
    for node in graph.nodes:
        if node.target is not torch.ops.aten.copy_.default or node.users:
            continue
        state, source = node.all_input_nodes[0], node.all_input_nodes[-1]
        if state.op != "get_attr":
            continue
        first = constant_value(graph, source)
        if first is None or first.shape != graph.tensor(state).shape:
            continue
        settled = graph.copy()
        settled.tensors[str(state.target)] = first
        second = constant_value(settled, settled.node(source.name))
        if second is not None and torch.allclose(first, second, rtol=1e-5, atol=1e-6 * _scale(first)):
            graph.erase(node)


# -------------------------------------------------------------------- proof


def _prove(graph: Graph, expected: Sequence[Tensor]) -> None:
    """The graph gives what the model gives on the example, bit by bit or nearly; operators were only renamed."""
    for name, ours, theirs in zip(graph.outputs, graph.run(*graph.example), expected, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise UnsupportedError(f"capture changed the shape of output {name}")
        eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
        atol = max(1e-5, 2 * eps) * _scale(theirs)  # a half-precision product may differ in its last bit
        if not torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=atol, equal_nan=True):
            raise UnsupportedError(
                f"capture changed the numbers of output {name}: the model is not deterministic?"
            )


def _call_flat(module: fx.GraphModule, program: ExportedProgram, tensors: list[Tensor]) -> list[Tensor]:
    if program.example_inputs is None:
        spec = program.call_spec.in_spec
        args, kwargs = pytree.tree_unflatten(tensors, spec)
        return [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)]
    return _call(module, program.example_inputs, tensors)


def _call(model: nn.Module, inputs: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that a model returns for (args, kwargs) with these tensors in the place of their own."""
    feed = iter(tensors)
    args, kwargs = pytree.tree_map(lambda leaf: next(feed) if isinstance(leaf, Tensor) else leaf, inputs)
    return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def _scale(tensor: Tensor) -> float:
    return max(1.0, float(tensor.detach().double().abs().max())) if tensor.numel() else 1.0
