"""Graph -> ONNX, as torch.onnx has it. The only file that calls it.

At every export torch parses the source of all that it can translate to, and traces the whole model a second time for
the sake of the few operators that it has no words for: most of the time that a file takes. Here the first is done
once, and one trace writes these operators out. Where this torch is another inside, it goes on doing as it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import onnx_ir
import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from . import nms
from .contrib import translations
from .errors import CompressorError, UnsupportedError
from .export import quiet, reexport
from .ir import Graph, unsupported
from .ops import kind


def translate(graph: Graph, opset: int, optimize: bool) -> onnx_ir.Model:
    """The model as torch.onnx has it; `optimize` by its own optimiser, where that does not fail.

    UnsupportedError where an operator has no translation, with its module and line.
    """
    try:
        module, words = graph.module, {**translations(), **nms.translations()}
        with quiet(), torch.no_grad(), _quick(module, words):
            program = torch.onnx.export(
                reexport(graph, module),
                dynamo=True,
                opset_version=opset,
                optimize=optimize,
                verbose=False,
                custom_translation_table=words,
            )
    except (CompressorError, KeyboardInterrupt):
        raise
    except Exception as error:
        if optimize:
            return translate(graph, opset, False)
        raise _explain(graph, error) from error
    if program is None:
        raise UnsupportedError("the ONNX exporter returned nothing")
    return program.model


def _explain(graph: Graph, error: Exception) -> UnsupportedError:
    """Which operator has no translation, and where it stands; the exporter's own first line where that is not it."""
    failing = _failing_node(error)
    if failing is None:
        return UnsupportedError(f"the model does not translate to ONNX: {_first_line(error)}")
    trace = failing.meta.get("stack_trace")
    own = [n for n in graph.nodes if n.op == "call_function" and trace and n.meta.get("stack_trace") == trace]
    culprit = next((n for n in own if kind(n) == "opaque"), own[0] if own else failing)
    return unsupported(
        culprit, "no translation to ONNX; replace it in the model, or register one with onnxscript"
    )


def _failing_node(error: BaseException | None) -> Node | None:
    """The node that the translator was at: only its stack frames know."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            node = trace.tb_frame.f_locals.get("node")
            if isinstance(node, Node) and trace.tb_frame.f_globals.get("__name__", "").startswith(
                "torch.onnx"
            ):
                return node
            trace = trace.tb_next
        error = error.__cause__
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


# -------------------------------------------------------------------- as quick as may be


@contextmanager
def _quick(module: fx.GraphModule, own: Collection[Any]) -> Iterator[None]:
    """While the block runs, `module` has its operators without words written out, and an export traces it once.

    own: operators with translations of their own.
    """
    try:
        from torch.onnx._internal.exporter import _fx_passes as rewrites
        from torch.onnx._internal.exporter._registration import onnxscript_apis as library

        read, decompose = library.get_torchlib_ops, rewrites.decompose_with_registry
        words, parts = _vocabulary()
    except (ImportError, AttributeError):
        yield
        return

    def has_word(operator: Any) -> bool:
        if not isinstance(operator, OpOverload):
            return inspect.isbuiltin(operator)
        return (operator in words or operator in own) and not operator._schema.is_mutable

    def decomposed(program: ExportedProgram, registry: Any) -> ExportedProgram:
        parts = program.graph_module.modules()
        called = {n.target for part in parts for n in part.graph.nodes if n.op == "call_function"}
        return program if all(map(has_word, called)) else decompose(program, registry)

    with ExitStack() as stack:
        stack.enter_context(_replaced(library, "get_torchlib_ops", lambda: _answer(read)))
        stack.enter_context(_replaced(rewrites, "decompose_with_registry", decomposed))
        for node in module.graph.nodes:
            if node.op == "call_function" and not has_word(node.target):
                stack.enter_context(_replaced(node, "target", _written_out(node.target, parts)))
        module.recompile()
        yield
    module.recompile()


@cache
def _answer(function: Callable[[], Any]) -> Any:
    return function()


@cache
def _vocabulary() -> tuple[Collection[Any], Mapping[Any, Callable[..., Any]]]:
    """The operators that the exporter's library translates, and what it makes of some of the others."""
    from torch.onnx._internal.exporter import _decomp, _registration

    library = _registration.onnxscript_apis
    with _replaced(library, "get_torchlib_ops", lambda read=library.get_torchlib_ops: _answer(read)):
        words = set(_decomp.get_onnx_implemented_overloads(_registration.ONNXRegistry.from_torchlib()))
    parts = _decomp.create_onnx_friendly_decomposition_table(words)
    return words, {**parts, torch.ops.aten.batch_norm.default: _batch_norm}


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Any:
    """What torch makes of it in two steps."""
    aten = torch.ops.aten
    if training:
        return aten.batch_norm.default(x, weight, bias, mean, var, training, *rest)
    return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, *rest[:2])[0]


def _written_out(operator: Any, parts: Mapping[Any, Callable[..., Any]]) -> Callable[..., Any]:
    """A function that does the same, of which a trace sees what is in it; the operator itself where nothing is."""
    made = parts.get(operator)
    if made is None:
        if not (isinstance(operator, OpOverload) and operator._can_decompose()):
            return operator
        made = operator.decompose

    def called(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return made(*args, **kwargs)

    called.__name__ = called.__qualname__ = str(operator).replace(".", "_")
    return called


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
