"""A pass of your own, in a package of your own: SiLU becomes hard swish, which is cheaper and nearly the same.

    pip install ./examples/plugin_pass
    compress model.pt2 --passes fold,hardswish,int8 --calib data.npz

Its contract is `bounded`: the pipeline runs the model before and after on data that the pass has not seen, puts the
loss into the report, and stops the run if the outputs fall under 6 dB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compressor.ir import Graph
from compressor.names import site
from compressor.pipeline import BOUNDED, Context, Contract, Decline, Outcome, Pass, Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class HardSwish(Pass):
    """SiLU becomes hard swish, x * clip(x / 6 + 1/2, 0, 1): no exponential. ignore: modules that keep theirs."""

    name: ClassVar[str] = "hardswish"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = ("merge",)

    ignore: tuple[str, ...] = ()

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        done = Outcome()
        for node in list(graph.nodes):
            if node.target is not aten.silu.default:
                continue
            if any(name in site(node) for name in self.ignore):
                done.declines.append(Decline.at(node, "it is in `ignore`"))
            elif ctx.limit is None or len(done.rewrites) < ctx.limit:
                graph.replace_uses(node, graph.insert(aten.hardswish.default, node.args, before=node))
                done.rewrites.append(Rewrite(site(node), "hard swish for SiLU"))
        return done
