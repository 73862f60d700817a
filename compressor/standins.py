"""Layers that do not export but are affine: probed as they run, and captured as the one linear that they are.

A layer that builds a sparse matrix on the way, or asks a tensor for a number, stops the exporter. What it computes may
be a linear all the same, and then its own forward tells: f(0) is the bias, f(identity) - f(0) the weight, both in
float64, and random inputs of many sizes must agree. Such a layer is replaced while the model is exported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

_ROWS = 1 << 23  # float64 elements of one block of the identity: 64 MB
_CHECK = 1e-8  # relative difference in float64 that is still rounding
_SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12)  # of the random inputs: what has a kink shows at one


class StandIns:
    """Replaces affine layers of a model by linears inside a `with` block; afterwards the model is as it was."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.notices: list[str] = []
        self._names = {module: name for name, module in model.named_modules() if name}
        self._replaced: dict[str, nn.Module] = {}

    def __enter__(self) -> StandIns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, module in self._replaced.items():
            self._set(name, module)

    def cure(self, error: BaseException) -> bool:
        """True when the layer that the exporter stopped in is affine: it, and all of its kind, are now linears."""
        for culprit in self._culprits(error):
            alike = [m for m in self._names if type(m) is type(culprit)]
            seen = self._inputs(alike)
            made = {m: linear for m in seen if (linear := as_linear(m, seen[m])) is not None}
            if culprit in made:
                self._replace(made, str(error).splitlines()[0])
                return True
        return False

    def _replace(self, made: dict[nn.Module, nn.Linear], reason: str) -> None:
        names = [self._names.pop(module) for module in made]
        for name, (module, linear) in zip(names, made.items(), strict=True):
            self._replaced[name] = module
            self._set(name, linear)
        many = (
            f" and {len(names) - 1} more like it do not export but are"
            if names[1:]
            else " does not export but is"
        )
        self.notices.append(
            f"{names[0]} ({type(next(iter(made))).__name__}){many} affine, by the values at 0, at the identity and at "
            f"random inputs: captured as one linear each ({reason[:160]})"
        )

    def _culprits(self, error: BaseException | None) -> Iterator[nn.Module]:
        """Modules whose forward was running when the error was raised, innermost first."""
        paths = {name: module for module, name in self._names.items()}
        found: list[nn.Module] = []
        while error is not None:
            trace = error.__traceback__
            inner: list[nn.Module] = []
            while trace is not None:
                inner += self._of_frame(trace.tb_frame.f_locals, paths)
                trace = trace.tb_next
            found += reversed(inner)
            error = error.__cause__ or error.__context__
        yield from dict.fromkeys(found)

    def _of_frame(self, local: dict[str, Any], paths: dict[str, nn.Module]) -> Iterator[nn.Module]:
        module = local.get("self")
        if isinstance(module, nn.Module) and module in self._names:
            yield module
        for name in ("n", "node"):  # an interpreter's: the node knows its module by path
            node = local.get(name)
            stack = node.meta.get("nn_module_stack", {}) if isinstance(node, Node) else {}
            for path, _ in stack.values():
                known = next((p for p in paths if path == p or path.endswith(f".{p}")), None)
                if known is not None:
                    yield paths[known]

    def _inputs(self, modules: list[nn.Module]) -> dict[nn.Module, Tensor]:
        """What each module is given when the model runs: those with one float tensor in and one out, alike in shape."""
        seen: dict[nn.Module, Tensor] = {}
        unfit: set[nn.Module] = set()

        def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            tensors = [a for a in (*args, *kwargs.values()) if a is not None]
            one = len(tensors) == 1 and isinstance(tensors[0], Tensor) and isinstance(out, Tensor)
            if one and tensors[0].is_floating_point() and tensors[0].shape[:-1] == out.shape[:-1]:
                seen[module] = tensors[0].detach()
            else:
                unfit.add(module)

        hooks = [m.register_forward_hook(look, with_kwargs=True) for m in modules]
        try:
            with torch.no_grad():
                self.model(*self.args, **self.kwargs)
        except Exception:  # it does not run either, so the exporter's error is the one to show
            return {}
        finally:
            for hook in hooks:
                hook.remove()
        return {m: value for m, value in seen.items() if m not in unfit and value.dim()}

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


def as_linear(module: nn.Module, example: Tensor) -> nn.Linear | None:
    """The linear that a module is, in the example's dtype; None where it is none, or does not run in float64.

    example: [..., in]. What depends on other tokens, on the number of tokens, or on chance, shows on random inputs.
    """
    width = example.shape[-1]
    axes = [1] * (example.dim() - 1)

    def run(value: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = twin(value.view(*axes[1:], len(value), width) if axes else value[0])
        return found.double().reshape(len(value), -1)

    try:
        twin = copy.deepcopy(module).double().eval()
        bias = run(torch.zeros(1, width, dtype=torch.float64))[0]
        rows = max(2, _ROWS // max(width, len(bias))) if axes else 1
        blocks = [run(part) - bias for part in torch.eye(width, dtype=torch.float64).split(rows)]
        weight = torch.cat(blocks).T
        if not all(_agrees(twin, weight, bias, value) for value in _probes(example)):
            return None
    except Exception:  # a layer that is not made for copies, other sizes or float64 raises anything
        return None
    linear = nn.Linear(width, len(bias), bias=bool(bias.any()), dtype=example.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(bias)
    return linear.requires_grad_(False).eval()


def _probes(example: Tensor) -> Iterator[Tensor]:
    """The example, and noise of many sizes with one token more along every axis than the example has."""
    generator = torch.Generator().manual_seed(0)
    shape = [*(size + 1 for size in example.shape[:-1]), example.shape[-1]]
    yield example.double()
    for scale in _SCALES:
        yield scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def _agrees(module: nn.Module, weight: Tensor, bias: Tensor, value: Tensor) -> bool:
    with torch.no_grad():
        theirs = module(value).double()
    ours = value @ weight.T + bias
    wrong = float((ours - theirs).abs().max()) if ours.numel() else math.inf
    return wrong <= _CHECK * float(theirs.abs().max())
