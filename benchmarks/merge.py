"""Merges every method of peft into small models, and holds each against the un-merged model in float64.

    python benchmarks/merge.py [METHOD ...]      markdown tables on standard output

Zero wrong: the merged float32 graph may be off by 2e-6, or by twice what the un-merged float32 model is off itself.
Exit code 1 where a row breaks that. Random adapters: every trained parameter is moved from where its method starts.
"""

from __future__ import annotations

import copy
import logging
import re
import runpy
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHIM = runpy.run_path(
    str(ROOT / "tests" / "shim" / "sitecustomize.py")
)  # kept: it holds the operators' definitions

import peft  # noqa: E402
from peft_zoo import methods, models  # noqa: E402

from compressor import verify  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.data import synthetic  # noqa: E402
from compressor.errors import UnsupportedError  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.ops import CONTRACTIONS, kind  # noqa: E402
from compressor.pipeline import Context, Pipeline  # noqa: E402
from passes.merge import Merge  # noqa: E402
from targets.cpu import CPU  # noqa: E402

SMALL, SAMPLES = 2e-6, 8
POWER = 1e-3  # an adapter that moves the output by less proves nothing


@dataclass(frozen=True)
class Host:
    """A model to adapt, its inputs (by number of samples), and the methods that may apply to it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    methods: Mapping[str, methods.Adapt]

    def plain(self) -> nn.Module:
        """Moved as well: many models start with biases of zero, and a merge that drops one must show."""
        torch.manual_seed(0)
        return models.moved(self.build()).eval()

    def adapted(self, method: str) -> nn.Module:
        model = self.plain()
        torch.manual_seed(1)
        return models.moved(self.methods[method](model, self.inputs(2 * SAMPLES))).eval()


def convolutions(dims: int, groups: int) -> Host:
    return Host(
        f"{dims}d" + (f", {groups} groups" if groups > 1 else ""),
        lambda: models.Convolutions(dims, groups),
        lambda samples: torch.randn(samples, 4, *[8] * dims),
        methods.CONVOLUTION,
    )


HOSTS = {
    "Llama": [Host("", models.llama, models.tokens, {**methods.LINEAR, **methods.LANGUAGE})],
    "Llama whose head is its embedding table": [
        Host("", lambda: models.llama(tie_word_embeddings=True), models.tokens, methods.TIED)
    ],
    "ViT": [Host("", models.vit, models.images, methods.LINEAR)],
    "GPT-2, whose weights are transposed": [Host("", models.gpt2, models.tokens, methods.TRANSPOSED)],
    "Convolutions": [convolutions(dims, groups) for groups in (1, 4) for dims in (1, 2, 3)],
}


# -------------------------------------------------------------------- one method


@dataclass
class Row:
    """What one method came to. Errors are relative to the largest value of the un-merged model in float64.

    moved: how far the adapter moves the output. own: error of the un-merged float32 model. theirs: of peft's merge,
    in words. counts: operators and contractions before, after, and of the model without adapter. traced: difference
    between the model's code and its captured graph, both in float64. said: why peft refuses, or something stays.
    types: of peft's configurations.
    """

    method: str
    moved: float = 0.0
    error: float | None = None
    own: float = 0.0
    theirs: str = ""
    counts: tuple[tuple[int, int], ...] = ()
    traced: float = 0.0
    seconds: float = 0.0
    said: str = ""
    types: set[str] = field(default_factory=set)

    @property
    def state(self) -> str:
        if not self.types:
            return "does not apply"
        if self.error is None:
            return "not captured"
        if not self.error <= limit(self.own):
            return "wrong"
        if self.moved < POWER:
            return "not proved"
        return "merged" if self.counts[1][1] <= self.counts[2][1] and not self.said else "stays"

    def cells(self) -> list[str]:
        if self.error is None:
            return [self.method, *[""] * 4, self.theirs, "", self.said]
        before, after, base = (f"{a} ({b})" for a, b in self.counts)
        error, own, seconds = f"{self.error:.1e}", f"{self.own:.1e}", f"{self.seconds:.1f}"
        error = f"**wrong: {error}**" if self.state == "wrong" else error
        return [self.method, f"{before} -> {after}", base, error, own, self.theirs, seconds, self.said]


def limit(own: float) -> float:
    return max(SMALL, 2 * own)


def error_of(truth: Tensor, seen: Tensor) -> float:
    return float((truth - seen.double()).abs().max() / truth.abs().max())


class InDouble(TorchFunctionMode):
    """Every float32 that the code of a model asks for is a float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = pytree.tree_map(
            lambda v: torch.float64 if v is torch.float32 else v, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def in_double(model: nn.Module, x: Tensor) -> Tensor:
    """What the model's own code gives in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), InDouble():
            return copy.deepcopy(model).double()(wide(x))
    finally:
        torch.set_default_dtype(torch.float32)


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def merge(graph: Graph) -> list[str]:
    """Merges in place; what was left, each with its reason. ContractError where the pipeline's check fails."""
    sizes = {graph.inputs[0].name: models.WORDS}
    held_out = synthetic(graph.inputs, graph.example, samples=4, table_sizes=sizes)
    return [d.reason for d in Pipeline([Merge()], {}).run(graph, Context(CPU, held_out))[-1].declines]


def count(graph: Graph) -> tuple[int, int]:
    """Operators, and how many of them are contractions."""
    operators = [n for n in graph.nodes if n.op == "call_function" and kind(n) not in ("size", "getitem")]
    return len(operators), sum(kind(n) in CONTRACTIONS for n in operators)


def row(host: Host, method: str, base: tuple[int, int]) -> Row:
    found = Row(f"{method}, {host.name}" if host.name else method)
    try:
        adapted = host.adapted(method)
        model, x, example = models.Called(adapted), host.inputs(SAMPLES), host.inputs(SAMPLES)
        with torch.no_grad():
            own, without = model(x), models.Called(host.plain())(x)
    except Exception as error:  # whatever peft raises where a method does not apply
        found.said = line(error, 60)
        return found
    configs = getattr(adapted, "peft_config", {}).values()
    found.types = {config.peft_type.value for config in configs} or {"plain module"}
    truth = in_double(model, x)
    found.own, found.moved = error_of(truth, own), error_of(truth[:, -without.shape[1] :], without)
    found.theirs = theirs(adapted, x, truth, found.own)
    start = time.perf_counter()
    try:
        before = capture(model, (example,))
    except UnsupportedError as error:
        found.said = line(error)
        return found
    after = before.copy()
    reasons = merge(after)
    found.seconds = time.perf_counter() - start
    found.error = error_of(truth, after.run(x)[0])
    found.traced = error_of(truth, verify.widened(before, torch.float64).run(wide(x))[0])
    found.counts = (count(before), count(after), base)
    if found.state == "stays" or any(config.is_prompt_learning for config in configs):
        found.said = "; ".join(shortened(reasons)) or "no reason given"
    return found


def theirs(adapted: nn.Module, x: Tensor, truth: Tensor, own: float) -> str:
    """The error of peft's own merge, or why there is none."""
    if not hasattr(adapted, "merge_and_unload"):
        return "has none"
    try:
        with torch.no_grad():
            error = error_of(truth, models.Called(copy.deepcopy(adapted).merge_and_unload())(x))
    except Exception as reason:  # the point of the column
        return f"refuses: {line(reason)}"
    return f"{error:.1e}" if error <= limit(own) else f"**wrong: {error:.1e}**"


def line(error: BaseException, width: int = 150) -> str:
    text = " ".join(f"{error}".split()).replace("|", "/") or type(error).__name__
    return text if len(text) <= width else f"{text[: width - 3]}..."


def shortened(reasons: Iterable[str]) -> Iterator[str]:
    """One of each kind, with how many there are: reasons differ in places and numbers."""
    kinds: dict[str, list[str]] = {}
    for reason in reasons:
        kinds.setdefault(re.sub(r" at \S+|[\d,]+", "", reason), []).append(reason)
    for alike in kinds.values():
        text = alike[0].replace("model.base_model.model.", "")
        yield f"{text} ({len(alike)}x)" if len(alike) > 1 else text


# -------------------------------------------------------------------- tables

COLUMNS = (
    "method", "operators (contractions)", "without adapter", "error", "un-merged float32", "peft's merge", "s",
    "left because",
)  # fmt: skip


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    columns = list(columns)
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for cells in rows:
        print(f"| {' | '.join(cells)} |", flush=True)


def rows_of(hosts: Iterable[Host], names: list[str]) -> Iterator[Row]:
    for host in hosts:
        base = capture(models.Called(host.plain()), (host.inputs(SAMPLES),))
        merge(base)
        for method in host.methods:
            if not names or method in names:
                yield row(host, method, count(base))


def sections(found: Mapping[str, list[Row]]) -> None:
    for title, rows in found.items():
        print(f"\n## {title}")
        table(COLUMNS, (one.cells() for one in rows if one.types))
        refused: dict[str, list[str]] = {}
        for one in rows:
            if not one.types:
                refused.setdefault(one.said, []).append(one.method)
        if refused:
            print("\npeft does not apply:\n")
        for reason, names in refused.items():
            print(f"- {'; '.join(names)}: {reason}")


def several(found: Mapping[str, list[Row]]) -> None:
    """Adapters on one module: their effects multiply or share a norm, and a merge one by one may go wrong."""
    rows = [
        (title, one) for title, rows in found.items() for one in rows if " + " in one.method and one.error
    ]
    if not rows:
        return
    print("\n## Several adapters at once on one module")
    table(
        ("adapters", "model", "error", "un-merged float32", "peft's merge"),
        ([one.method, title, *one.cells()[3:6]] for title, one in rows),
    )


def summary(rows: list[Row]) -> None:
    states = Counter(one.state for one in rows)
    types = set().union(*(one.types for one in rows)) & {t.value for t in peft.PeftType}
    missing = ", ".join(sorted({t.value for t in peft.PeftType} - types))
    judged = [one for one in rows if one.error is not None]
    traced = sorted({one.method for one in judged if one.traced > 1e-12})
    words = [
        f"{', '.join(f'{count} {state}' for state, count in states.most_common())} of {len(rows)} rows",
        f"{len(types)} of the {len(peft.PeftType)} types of peft {peft.__version__}; {missing or 'none'} missing",
        f"worst error: {max((one.error or 0) / limit(one.own) for one in judged):.2f} of what is allowed",
        f"peft's own merge is wrong in {sum('wrong' in one.theirs for one in rows)} rows, "
        f"refuses in {sum('refuses' in one.theirs for one in rows)}",
        "in float64, captured graph and the model's own code differ by "
        f"{max(one.traced for one in judged):.0e} at most"
        + (f" (constants that capture computes: {', '.join(traced)})" if traced else ""),
    ]
    print("\n".join(f"- {word}." for word in words))


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the models are small
    found: dict[str, list[Row]] = {}
    for title, hosts in HOSTS.items():
        print(title, "...", file=sys.stderr, flush=True)
        rows = list(rows_of(hosts, names))
        found |= {title: rows} if rows else {}
    everything = [one for rows in found.values() for one in rows]
    if not everything:
        print(f"no method {', '.join(names)}", file=sys.stderr)
        return 2
    summary(everything)
    several(found)
    sections(found)
    return int(any(one.state in ("wrong", "not proved") for one in everything))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
