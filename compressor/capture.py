"""nn.Module or ExportedProgram -> Graph.

Capturing flattens inputs and outputs to ordered tensors with path names, makes the batch dynamic, renames in-place
operators where that is exact and functionalises the graph where it is not, and proves the result against the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from . import detectors
from .composites import spell_out
from .constants import constant_value
from .edges import beyond, longest
from .errors import ContractError, UnsupportedError, UsageError, nearest
from .export import bind, blank, explain, export, quiet
from .flatten import flatten, refuse_complex
from .inplace import in_place, rename_in_place, restore_batch_norm
from .ir import Graph, Input, terms
from .names import DTYPE_NAMES, operator_name, unsupported
from .ops import kind
from .proof import answer, not_dynamic, prove
from .pytrees import leaves, path_name
from .standins import StandIns
from .trainable import Trainable, argument_names, graph_of


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
    override the example's, or stand in for it. Of a torchvision SSD or RetinaNet the network is captured, see
    `detectors`. dynamic: axis 0 of every input whose size equals the first tensor's
    becomes the batch; an axis that the model cannot keep dynamic falls back to static with a notice.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError(
            "a TorchScript model cannot be captured: export the original module with torch.export"
        )
    if isinstance(model, ExportedProgram):
        specs = _program_specs(model, _names_of_program(model), inputs)
        graph = _graph_of(model, specs, _static_notice(model, dynamic))
        if found := not_dynamic(graph, partial(_call_flat, model.module(check_guards=False), model)):
            axis, why = found
            raise UnsupportedError(
                f"the {axis} axis of the exported program cannot be dynamic: {why}; export it with the size that it "
                "will have"
            )
        graph.notices += _ranges(graph, tried=False)
        return graph
    if isinstance(model, Trainable):
        return _graph_of_trainable(model, args, kwargs, inputs)
    positional, keywords = bind(args, kwargs, inputs, model)
    with _evaluating(model):
        network = detectors.bare(model, positional, keywords)
        graph = _graph_of_module(network, positional, keywords, inputs, dynamic)
    if words := detectors.notice(network):
        graph.notices.append(words)
    return graph


def _graph_of_module(
    model: nn.Module,
    positional: tuple[Any, ...],
    keywords: dict[str, Any],
    inputs: Sequence[Input],
    dynamic: bool,
) -> Graph:
    """The graph of a module in evaluation mode; layers that do not export but are affine, as linears."""
    with StandIns(model, positional, keywords) as stand_ins:
        while True:
            notices: list[str] = []
            try:
                program, specs = export(model, positional, keywords, inputs, dynamic, notices)
                graph = _graph_of(program, specs, notices)
                break
            except UnsupportedError as error:
                if not stand_ins.cure(error):
                    raise
    graph.notices += stand_ins.notices
    called = positional, keywords
    run = partial(answer, model, called)
    prove(graph, run(graph.example))
    found = not_dynamic(graph, run)
    prove(graph, run(graph.example))  # whatever ran before
    if found is None:
        graph.notices += _ranges(graph, tried=True)
        return graph
    axis, why = found
    given = [leaf for _, leaf in leaves(called) if isinstance(leaf, Tensor)]
    sizes: dict[int | str, int] = {
        label: size
        for spec, tensor in zip(graph.inputs, given, strict=True)
        for label, size in zip(spec.shape, tensor.shape, strict=True)
    }
    fixed = {label for label in sizes if isinstance(label, str) and axis in terms(label)}
    static = [
        replace(spec, shape=tuple(sizes[label] if label in fixed else label for label in spec.shape))
        for spec in graph.inputs
    ]
    graph = _graph_of_module(model, positional, keywords, static, dynamic=False)
    graph.notices.append(f"the {axis} axis is fixed to {sizes[axis]}, as in the example: {why}")
    return graph


def _graph_of_trainable(
    model: Trainable,
    args: Sequence[Any] | Tensor | Mapping[str, Any] | None,
    kwargs: Mapping[str, Any] | None,
    inputs: Sequence[Input],
) -> Graph:
    """The graph that the module was made from, with its present weights, proved against it."""
    if inputs:
        raise UsageError("a module of trainable() knows its inputs: leave their description out")
    graph = graph_of(model)
    if args is not None or kwargs:
        positional, keywords = bind(args, kwargs, (), model)
        _check_example(graph, positional, keywords)
    if all(t.device.type == "cpu" for t in model.state_dict().values()):
        with _evaluating(model):
            prove(graph, answer(model, (graph.example, {}), graph.example))
    return graph


def _check_example(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    names = argument_names([spec.name for spec in graph.inputs])
    given = [
        (name, value)
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]
        if value is not None
    ]
    specs = dict(zip(names, graph.inputs, strict=True))
    for name, value in given:
        spec = specs.get(name)
        fits = (
            spec is not None
            and isinstance(value, Tensor)
            and value.dtype == spec.dtype
            and len(value.shape) == len(spec.shape)
            and all(isinstance(n, str) or n == s for n, s in zip(spec.shape, value.shape, strict=True))
        )
        if not fits:
            shown = f"{name} {list(value.shape)}" if isinstance(value, Tensor) else name
            raise UsageError(
                f"the example {shown} does not fit: the module takes {', '.join(map(str, graph.inputs))}"
            )
    if len(args) > len(names) or {name for name, _ in given} != set(names):
        raise UsageError(f"the example does not fit: the module takes {', '.join(map(str, graph.inputs))}")


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
    try:
        flat = _call_flat(program.module(check_guards=False), program, example)
    except (IndexError, RuntimeError) as error:
        shown = ", ".join(f"{i.name} {list(t.shape)}" for i, t in zip(graph.inputs, example, strict=True))
        first = str(error).strip().split("\n")[0]
        raise UsageError(f"the model does not run on its example inputs ({shown}): {first}") from error
    prove(graph, flat)
    return graph


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that the caller's module and each part of it was in."""
    training = [part for part in model.modules() if part.training]
    with suppress(NotImplementedError):  # of an exported program, which knows one mode
        model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


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
    if unknown := [name for name in named if name not in names]:
        raise UsageError(
            f"--input {unknown[0]}: the exported program has no such input{nearest(unknown[0], names)}; it takes "
            f"{', '.join(names)}"
        )
    specs: list[Input] = []
    seen: dict[str, str] = {}
    for name, node in zip(names, [n for n in module.graph.nodes if n.op == "placeholder"], strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        if name in named:
            _require_alike(named[name], value)
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


def _require_alike(asked: Input, value: Tensor) -> None:
    """UsageError where the user describes an input that the program does not take: its sizes are as it was exported."""
    pairs = zip(asked.shape, value.shape, strict=False)
    fixed = any(isinstance(a, int) and not (isinstance(b, int) and a == b) for a, b in pairs)
    if asked.dtype != value.dtype or len(asked.shape) != value.dim() or fixed:
        sizes = ",".join(str(s) if isinstance(s, int) else "?" for s in value.shape)
        raise UsageError(
            f"--input {asked.name}: the exported program takes {DTYPE_NAMES.get(value.dtype, value.dtype)} of "
            f"[{sizes}]; it is complete as it is, so leave --input out"
        )


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


def _ranges(graph: Graph, tried: bool) -> list[str]:
    """Notices of axes that were exported for a part of the sizes of. tried: ends were, but for those out of reach."""
    axes = {label for spec in graph.inputs for label in spec.shape if isinstance(label, str)}
    return [
        f"the {axis} axis was not exported for {' or '.join(map(str, ends))} and beyond: the file takes such sizes, "
        "and may give other numbers than the model"
        for axis in sorted(axes)
        if (ends := [e for e in beyond(graph, axis) if not tried or e > longest(graph, axis)])
    ]


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
            made.append(blank(Input(node.name, value.dtype, size)))
    return made


# -------------------------------------------------------------------- in-place operators


def _normalise(graph: Graph, program: ExportedProgram) -> None:
    """Renames in-place operators to their pure forms, or functionalises the whole graph where that could be wrong."""
    if rename_in_place(graph.graph):
        graph.clean()
        _reinfer(graph)
        return
    try:
        with quiet():
            pure = program.run_decompositions({})
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        raise explain(error) from error
    flat = flatten(pure, graph.inputs, graph.example)
    restore_batch_norm(flat.graph)
    _drop_settled_writes(flat)
    if not rename_in_place(flat.graph):
        culprit = next(n for n in flat.nodes if in_place(n))
        renormed = next((n for n in graph.nodes if "embedding_renorm_" in operator_name(n)), None)
        if renormed is not None:
            raise unsupported(
                renormed, "max_norm scales its table as it runs: do so once, and set max_norm=None"
            )
        if any("moving_avg_obs_fq" in operator_name(n) for n in flat.nodes):
            raise unsupported(
                culprit, "its fake quantisers still observe: convert the model first (convert_pt2e)"
            )
        raise unsupported(culprit, "writes into the model's own state; a compiled model keeps none")
    lost = _dropouts(graph) - _dropouts(flat)
    graph.graph, graph.tensors, graph.parameters = flat.graph, flat.tensors, flat.parameters
    graph.origin = replace(flat.origin, lost_dropouts=lost)
    graph.clean()
    _reinfer(graph)


def _reinfer(graph: Graph) -> None:
    try:
        graph.reinfer()
    except ContractError as error:  # no pass has run: it is what the exporter made of the model (torch.vmap)
        raise UnsupportedError(f"the model was exported to operators that do not run: {error}") from error


def _dropouts(graph: Graph) -> int:
    return sum("dropout" in operator_name(node) for node in graph.nodes if node.op == "call_function")


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


def _call_flat(module: fx.GraphModule, program: ExportedProgram, tensors: Sequence[Tensor]) -> list[Tensor]:
    called = program.example_inputs
    if called is None:
        called = pytree.tree_unflatten(list(tensors), program.call_spec.in_spec)
    return answer(module, called, tensors)


def _scale(tensor: Tensor) -> float:
    return max(1.0, float(tensor.detach().double().abs().max())) if tensor.numel() else 1.0
