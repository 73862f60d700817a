"""Static quantisation: activations and weights as 8-bit integers, computed as integers where the runtime can."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from compressor.errors import UsageError
from compressor.ir import Graph, operator_name, site
from compressor.ops import arguments, is_static, is_tensor, kind, shape
from compressor.pipeline import BOUNDED, EXACT, Context, Contract, Decline, Outcome, Pass, Rewrite
from compressor.place import Placement, place
from compressor.quantize import Range, calibrate, insert_pairs
from compressor.target import QuantSpec

aten = torch.ops.aten
MARGIN = 0.98  # a rewrite that is measured stays unless leaving it out takes under this share of the time


@dataclass(frozen=True)
class Int8(Pass):
    """Weights and activations become 8-bit integers where the target computes on them; the rest stays float.
    """

    name: ClassVar[str] = "int8"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = ("merge", "prune", "squeeze", "fold")
    requires: ClassVar[tuple[str, ...]] = ("fold",)

    calibration: Literal["minmax", "percentile"] = "percentile"
    percentile: float = 99.999
    ignore: tuple[str, ...] = ()

    def run(self, graph: Graph, ctx: Context) -> Iterator[Outcome]:
        if ctx.calibration is None:
            raise UsageError("int8 finds ranges with sample inputs: give some with --calib FILE (100 to 500 are plenty)")
        spec = ctx.target.quant
        rewrites = []
        for name in sorted(spec.rewrites):
            rewrites += REWRITES[name](graph)
        if rewrites:
            yield Outcome(rewrites=rewrites, contract=EXACT, step="prepare")
        first = place(graph, spec, None, self.ignore)
        ranges = calibrate(graph, first.owner, ctx.calibration, self.percentile if self.calibration == "percentile" else 100.0)
        plan = place(graph, spec, ranges, self.ignore, ctx.limit)
        insert_pairs(plan, ranges)
        yield Outcome(rewrites=[Rewrite(site(n), operator_name(n)) for n in plan.operators], declines=[Decline.at(n, r) for n, r in plan.declines])


def pool(graph: Graph) -> list[Rewrite]:
    found = []
    for node in graph.nodes:
        if operator_name(node) == "aten.mean.dim" and is_tensor(node.args[0]):
            x = node.args[0]; a = arguments(node)
            size = shape(x)
            if len(size) != 4 or sorted(d % 4 for d in a["dim"]) != [2, 3] or a.get("dtype") is not None or not all(is_static(s) for s in size[2:]):
                continue
            new = graph.insert(aten.avg_pool2d.default, (x, [size[2], size[3]]), before=node)
            if not a["keepdim"]:
                new = graph.insert(aten.flatten.using_ints, (new, 1), before=node)
        elif operator_name(node) == "aten.adaptive_avg_pool2d.default" and list(node.args[1]) == [1, 1]:
            x = node.args[0]; size = shape(x)
            if not all(is_static(s) for s in size[2:]):
                continue
            new = graph.insert(aten.avg_pool2d.default, (x, [size[2], size[3]]), before=node)
        else:
            continue
        found.append(Rewrite(site(node), "mean over space as average pooling"))
        graph.replace_uses(node, new)
    graph.clean()
    return found


def selection(graph: Graph) -> list[Rewrite]:
    found = []
    for node in graph.nodes:
        if kind(node) != "pad" or not is_tensor(node):
            continue
        a = arguments(node)
        pads = a["pad"]
        if len(shape(node)) != 4 or len(pads) != 6 or any(pads[:4]) or a.get("value") not in (None, 0, 0.0) or a.get("mode", "constant") != "constant":
            continue
        x = node.args[0]
        strides = [1, 1]
        while kind(x) == "slice":
            b = arguments(x)
            if b["start"] in (None, 0) and (b["end"] is None or b["end"] >= 2**31):
                if b["dim"] >= 2:
                    strides[b["dim"] - 2] *= b["step"]
                elif b["step"] != 1: break
            else:
                break
            x = x.args[0]
        cin = shape(x)[1]; cout = cin + pads[4] + pads[5]
        w = torch.zeros(cout, cin, 1, 1)
        for i in range(cin): w[i + pads[4], i] = 1
        wn = graph.add_tensor("selection_weight", w)
        new = graph.insert(aten.conv2d.default, (x, wn, None, strides), before=node)
        graph.replace_uses(node, new)
        found.append(Rewrite(site(node), "slice and pad as 1x1 convolution"))
    graph.clean()
    return found


REWRITES = {"pool": pool, "selection": selection}
