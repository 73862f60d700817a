"""Merges every method of peft into small models, and holds each against the un-merged model in float64.

    python benchmarks/merge.py [METHOD ...] [--no-speed]      markdown on standard output

Zero wrong: the merged float32 graph may be off by 2e-6, or by twice what the un-merged float32 model is off itself.
Exit code 1 where a row breaks that. Random adapters: every trained parameter is moved from where its method starts.
"""

from __future__ import annotations

import copy
import logging
import re
import runpy
import sys
import tempfile
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHIM = runpy.run_path(
    str(ROOT / "tests" / "shim" / "sitecustomize.py")
)  # kept: it holds the operators' definitions

import peft_zoo as zoo  # noqa: E402
from zoo import with_power  # noqa: E402

from compressor import delivery, measure, runtime, verify  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.data import synthetic  # noqa: E402
from compressor.errors import CompressorError  # noqa: E402
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
    methods: Mapping[str, zoo.Adapt]

    def plain(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def adapted(self, method: str) -> nn.Module:
        model = self.plain()
        torch.manual_seed(1)
        return zoo.moved(self.methods[method](model, self.inputs(2 * SAMPLES))).eval()


def convolutions(dims: int, groups: int) -> Host:
    return Host(
        f"{dims}d" + (f", {groups} groups" if groups > 1 else ""),
        lambda: zoo.Convolutions(dims, groups),
        lambda samples: torch.randn(samples, 4, *[8] * dims),
        zoo.CONVOLUTION,
    )


HOSTS = {
    "Llama": [Host("", zoo.llama, zoo.tokens, {**zoo.LINEAR, **zoo.LANGUAGE})],
    "Llama whose head is its embedding table": [
        Host("", lambda: zoo.llama(tie_word_embeddings=True), zoo.tokens, zoo.TIED)
    ],
    "ViT": [Host("", zoo.vit, zoo.images, zoo.LINEAR)],
    "GPT-2, whose weights are transposed": [Host("", zoo.gpt2, zoo.tokens, zoo.TRANSPOSED)],
    "Convolutions": [convolutions(dims, groups) for groups in (1, 4) for dims in (1, 2, 3)],
}


# -------------------------------------------------------------------- one method


@dataclass
class Row:
    """What one method came to. Errors are relative to the largest value of the un-merged model in float64.

    moved: how far the adapter moves the output. own: error of the un-merged float32 model. theirs: of peft's merge,
    in words. counts: operators and contractions before, after, and of the model without adapter. traced: difference
    between the model's code and its captured graph, both in float64. said: why peft refuses, or something stays.
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
        return "merged" if self.counts[1][1] <= self.counts[2][1] else "stays"

    def cells(self) -> list[str]:
        if self.error is None:
            return [self.method, *[""] * 4, self.theirs, "", self.said]
        before, after, base = (f"{a} ({b})" for a, b in self.counts)
        error, own = f"{self.error:.1e}", f"{self.own:.1e}"
        error = f"**wrong: {error}**" if self.state == "wrong" else error
        said = (
            f"moves the output by {self.moved:.0e} only: proves nothing" if self.moved < POWER else self.said
        )
        return [
            self.method,
            f"{before} -> {after}",
            base,
            error,
            own,
            self.theirs,
            f"{self.seconds:.1f}",
            said,
        ]


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
    """Merges in place; what was left, each with its reason. CompressorError where the pipeline's check fails."""
    sizes = {graph.inputs[0].name: zoo.WORDS}
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
        model, x, example = zoo.Called(adapted), host.inputs(SAMPLES), host.inputs(SAMPLES)
        with torch.no_grad():
            own, without = model(x), zoo.Called(host.plain())(x)
    except Exception as error:  # whatever peft raises where a method does not apply
        found.said = line(error)
        return found
    configs = getattr(adapted, "peft_config", {})
    found.types = {config.peft_type.value for config in configs.values()} or {"plain module"}
    truth = in_double(model, x)
    found.own, found.moved = error_of(truth, own), error_of(truth[:, -without.shape[1] :], without)
    found.theirs = theirs(adapted, x, truth, found.own)
    start = time.perf_counter()
    try:
        before = capture(model, (example,))
        after = before.copy()
        reasons = merge(after)
    except CompressorError as error:
        found.said = line(error)
        return found
    found.seconds = time.perf_counter() - start
    found.error = error_of(truth, after.run(x)[0])
    found.traced = error_of(truth, verify.widened(before, torch.float64).run(wide(x))[0])
    found.counts = (count(before), count(after), base)
    found.said = "; ".join(shortened(reasons)) if found.state == "stays" else ""
    return found


def theirs(adapted: nn.Module, x: Tensor, truth: Tensor, own: float) -> str:
    """The error of peft's own merge, or why there is none."""
    if not hasattr(adapted, "merge_and_unload"):
        return "has none"
    try:
        with torch.no_grad():
            error = error_of(truth, zoo.Called(copy.deepcopy(adapted).merge_and_unload())(x))
    except Exception as reason:  # the point of the column
        return f"refuses: {line(reason)}"
    return f"{error:.1e}" if error <= limit(own) else f"**wrong: {error:.1e}**"


def line(error: BaseException, width: int = 110) -> str:
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
        base = capture(zoo.Called(host.plain()), (host.inputs(SAMPLES),))
        merge(base)
        for method in host.methods:
            if not names or method in names:
                yield row(host, method, count(base))


def main_table(names: list[str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for title, hosts in HOSTS.items():
        rows = found[title] = list(rows_of(hosts, names))
        if rows:
            print(f"\n## {title}")
            table(COLUMNS, (one.cells() for one in rows if one.types))
        refused = [f"{one.method} ({one.said})" for one in rows if not one.types]
        if refused:
            print(f"\npeft does not apply {'; '.join(refused)}.")
    return found


def several(found: dict[str, list[Row]]) -> None:
    """Adapters on one module: their effects multiply or share a norm, and a merge one by one may go wrong."""
    print("\n## Several adapters at once on one module")
    rows = [
        (title, one) for title, rows in found.items() for one in rows if " + " in one.method and one.error
    ]
    table(
        ("adapters", "model", "error", "un-merged float32", "peft's merge"),
        ([one.method, title, f"{one.error:.1e}", f"{one.own:.1e}", one.theirs] for title, one in rows),
    )


def summary(rows: list[Row]) -> None:
    import peft

    states = Counter(one.state for one in rows)
    seen = set().union(*(one.types for one in rows)) - {"plain module"}
    missing = {t.value for t in peft.PeftType} - seen
    judged = [one for one in rows if one.error is not None]
    traced = {one.method for one in judged if one.traced > 1e-12}
    print("\n## In sum\n")
    print(f"- {', '.join(f'{count} {state}' for state, count in states.most_common())} of {len(rows)} rows.")
    print(f"- {len(seen)} of peft {peft.__version__}'s {len(peft.PeftType)} types", end="")
    print(f"; not here: {', '.join(sorted(missing))}." if missing else ".")
    print(f"- worst error over what is allowed: {max(one.error / limit(one.own) for one in judged):.2f}.")
    print(f"- peft's merge is wrong in {sum('wrong' in one.theirs for one in rows)} rows", end="")
    print(f", refuses in {sum('refuses' in one.theirs for one in rows)}.")
    print(
        f"- captured graph and model's code in float64 differ by {max(one.traced for one in judged):.0e}",
        end="",
    )
    print(
        f" at most ({', '.join(sorted(traced))}: constants computed at capture)." if traced else " at most."
    )


# -------------------------------------------------------------------- speed


def rep_vgg() -> nn.Module:
    import timm

    with torch.no_grad():
        return with_power(timm.create_model("repvgg_a0"), torch.randn(4, 3, 224, 224)).requires_grad_(False)


def resnet() -> nn.Module:
    import timm

    return timm.create_model("resnet18")


def one_branch() -> nn.Module:
    from timm.utils import reparameterize_model

    return reparameterize_model(rep_vgg().eval())


def vit_small() -> nn.Module:
    wide = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    return zoo.vit(**wide, image_size=224, patch_size=16, initializer_range=0.02)


def photos(samples: int) -> Tensor:
    return torch.randn(samples, 3, 224, 224)


TIMED = [
    Host(
        "ViT, 6 layers of 384, 197 tokens",
        vit_small,
        photos,
        {
            "LoRA": zoo.lora(r=16),
            "DoRA": zoo.lora(r=16, use_dora=True),
            "OFT": zoo.use("OFTConfig", oft_block_size=32),
            "VeRA": zoo.use("VeraConfig", r=64),
            "LoHa": zoo.use("LoHaConfig", r=8),
            "IA3": zoo.use("IA3Config", feedforward_modules=["fc2"]),
        },
    ),
    Host("ResNet-18", resnet, photos, {"LoRA": zoo.lora(r=8)}),
    Host("RepVGG-A0", one_branch, photos, {"three branches": lambda model, example: rep_vgg()}),
]


def speed() -> None:
    print(
        "\n## Speed of the ONNX files\n\nOne thread, batch 1, in turns: how many times as fast as the",
        end=" ",
    )
    print("file of the model without adapters, median and quartiles. Error: of the merged file, in float32.")
    columns = ("model", "adapter", "without adapter, ms", "un-merged", "merged", "error")
    table(columns, (cells for host in TIMED for cells in timed(host)))


def timed(host: Host) -> Iterator[list[str]]:
    x = host.inputs(1)
    with tempfile.TemporaryDirectory() as scratch:
        base = emitted(capture(zoo.Called(host.plain()), (host.inputs(2),)), Path(scratch, "base"))
        for method in host.methods:
            model = zoo.Called(host.adapted(method))
            graph = capture(model, (host.inputs(2),))
            before = emitted(graph, Path(scratch, "before"))
            merge(graph)
            after = emitted(graph, Path(scratch, "after"))
            plain, *others = measure.bench([base, before, after], feeds=[x.numpy()], seconds=9.0)
            ratios = [str(measure.ratio(plain, other)) for other in others]
            with torch.no_grad():
                truth = model(x).double()
            (seen,) = runtime.run(runtime.session(after), [x.numpy()])
            error = f"{error_of(truth, torch.from_numpy(seen)):.1e}"
            yield [host.name, method, f"{plain.median_ms:.1f}", *ratios, error]


def emitted(graph: Graph, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    delivery.deliver(graph, CPU, folder, {}, {})
    return folder / "model.onnx"


def main(words: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the models are small
    names = [word for word in words if word != "--no-speed"]
    found = main_table(names)
    rows = [one for section in found.values() for one in section]
    several(found)
    summary(rows)
    if "--no-speed" not in words and not names:
        speed()
    return int(any(one.state in ("wrong", "not proved") for one in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
