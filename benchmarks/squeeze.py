"""Low rank: what it costs in accuracy, which form is best, and where it runs faster.

    python benchmarks/squeeze.py [SECTION ...]      Markdown; sections: cifar line ranks classifier speed forms

ResNet-56 trained on CIFAR-10 (shared folder), 1,024 unlabelled training images by seed, top-1 on the 400 test images.
The other 1,000 training images were for choices, and `forms` is judged by them. ResNet-50 and VGG-16 have random
weights (there is no model hub here): their figures say what weighting by data does, not what a trained one loses.
Exit code 1 where ResNet-56 loses over 3 points at 1.5x.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT.parent / "shared" / "models"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(MODELS)]

from zoo import torchvision_model, with_power  # noqa: E402

from compressor import data, measure  # noqa: E402
from compressor.api import compress  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.elimination import ridged  # noqa: E402
from compressor.factors import Fit, Layer, Option  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.measure import parameters  # noqa: E402
from compressor.names import site  # noqa: E402
from compressor.ops import macs  # noqa: E402
from compressor.pipeline import Context, Pipeline, parse  # noqa: E402
from compressor.rebuild import refit  # noqa: E402
from compressor.splits import layers_of, observe, options_of  # noqa: E402
from compressor.stopwatch import Stopwatch  # noqa: E402
from compressor.watch import alone  # noqa: E402
from passes import PASSES  # noqa: E402
from targets.cpu import CPU  # noqa: E402

HELD_BACK, ALL, CALIBRATION, CHECKED, SEEDS = 1000, 4660, 1024, 64, (0, 1, 2)
LOSES = 3.0
RUNS = (
    (1.5, "squeeze(macs=0.6667,align=1)"),
    (1.5, "squeeze(macs=0.6667,align=1,repair=false)"),
    (2.0, "squeeze(macs=0.5,align=1)"),
    (1.5, "prune(macs=0.8,align=1,minimum=2),squeeze(macs=0.8333,align=1)"),
    (2.0, "prune(macs=0.6667,align=1,minimum=2),squeeze(macs=0.75,align=1)"),
)


def table(columns: str) -> None:
    names = columns.split(" | ")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)


def line(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def decibels(expected: Tensor, seen: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (seen - expected).square().sum()))


def resnet56() -> tuple[Graph, Tensor, Tensor, Tensor, Tensor]:
    """The graph; test images and labels; held-back images; images to calibrate with."""
    import cifar_resnet

    model, images, labels = cifar_resnet.load("resnet56")
    samples, _ = cifar_resnet.calibration(ALL)
    return capture(model, images[:2]), images, labels, samples[:HELD_BACK], samples[HELD_BACK:]


def drawn(graph: Graph, samples: Tensor, seed: int) -> tuple[data.Data, data.Data]:
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    return data.split(data.open_data(samples[chosen], graph.inputs), seed=seed)


# -------------------------------------------------------------------- accuracy


def cifar() -> bool:
    graph, images, labels, _, samples = resnet56()
    (whole,) = graph.run(images)
    top1 = 100 * float((whole.argmax(1) == labels).float().mean())
    print(
        f"## ResNet-56 without training\n\nFloat top-1 {top1:.2f}; no stopwatch; seeds {SEEDS}, and their mean.\n"
    )
    table(
        "times fewer MACs | passes | MACs left | top-1 | points lost | agreement | SQNR dB | layers split | seconds"
    )
    met = True
    for number, (times, spec) in enumerate(RUNS):
        found = []
        for seed in SEEDS:
            stream, held_out = drawn(graph, samples, seed)
            after, start = graph.copy(), time.perf_counter()
            context = Context(CPU, held_out.limited(CHECKED), stream, seed=seed)
            rows = Pipeline(parse(spec, PASSES), PASSES).run(after, context)
            (seen,) = after.run(images)
            score = 100 * float((seen.argmax(1) == labels).float().mean())
            agree = 100 * float((seen.argmax(1) == whole.argmax(1)).float().mean())
            found.append((macs(after) / macs(graph), score, top1 - score, agree, decibels(whole, seen),
                          len(rows[-1].rewrites), time.perf_counter() - start))  # fmt: skip
        left, score, lost, agree, noise, split, seconds = map(statistics.mean, zip(*found, strict=True))
        each = ", ".join(f"{one[1]:.2f}" for one in found)
        line(times, f"`{spec}`", f"{left:.3f}", f"{score:.2f} ({each})", f"{lost:.2f}", f"{agree:.2f}",
             f"{noise:.1f}", f"{split:.0f}", f"{seconds:.0f}")  # fmt: skip
        met &= number > 0 or lost <= LOSES
    return met


def whole_line() -> bool:
    """prune, squeeze and int8 together, as a user runs them, with everything that the stopwatch says."""
    import cifar_resnet

    model, images, labels = cifar_resnet.load("resnet56")
    samples, _ = cifar_resnet.calibration(ALL)
    print("\n## ResNet-56 as a user runs it: measured splits only, batch 1, one thread\n")
    table("passes | MACs left | MB | times faster than float | top-1 | splits tried / taken")
    for spec in ("fold", "squeeze(macs=0.6667)", "squeeze(macs=0.6667),int8", "prune(macs=0.6),int8",
                 "prune(macs=0.6),squeeze(macs=0.85,reach=best),int8"):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            result = compress(model, images[:2], passes=spec, output=folder, evaluate=(images, labels),
                              calibration=samples[HELD_BACK : HELD_BACK + CALIBRATION])  # fmt: skip
        report = result.report
        row = next((r for r in report["rows"] if r["pass"] == "squeeze"), None)
        tried = len(row["facts"].get("timed", [])) if row else ""
        taken = len(row["rewrites"]) if row else ""
        emitted = report["emitted"]
        line(f"`{spec}`", f"{report['rows'][-1]['macs'] / report['rows'][0]['macs']:.3f}",
             f"{emitted['bytes'] / 1e6:.2f}", f"{emitted['latency']['ratio']:.2f}x",
             f"{100 * next(iter(emitted['metric'].values())):.2f}", f"{tried} / {taken}" if row else "")  # fmt: skip
    return True


# -------------------------------------------------------------------- error against rank


def ranks() -> bool:
    print(
        "\n## Error against rank\n\nRelative error of a layer's outputs on data that was not calibrated on, by the"
    )
    print(
        "singular vectors of the weight alone / weighted by what the layer reads (ranks as shares of the full one).\n"
    )
    table("model | layer | form | 1/16 | 1/8 | 1/4 | 1/2")
    for name, graph, samples, fresh, wanted in _models():
        _error_table(name, graph, samples, fresh, wanted)
    return True


def _models() -> Iterator[tuple[str, Graph, Tensor, Tensor, Sequence[str]]]:
    graph, _, _, held, samples = resnet56()
    layers = ("layer1.4.conv2", "layer2.4.conv1", "layer3.4.conv1", "layer3.8.conv2")
    yield "ResNet-56, trained", graph, samples[:512], held[:256], layers
    big = nn.functional.interpolate(samples[:48], 96, mode="bilinear")
    for name, layers in (("resnet50", ("layer2.1.conv2", "layer3.2.conv2", "layer4.1.conv1")),
                         ("vgg16", ("features.14", "features.24"))):  # fmt: skip
        model = with_power(torchvision_model(name), big[:16])
        yield f"{name}, random", capture(model, big[:2]), big[:32], big[32:], layers


def _error_table(name: str, graph: Graph, samples: Tensor, fresh: Tensor, wanted: Sequence[str]) -> None:
    stream = data.open_data(samples, graph.inputs)
    context = Context(dataclasses.replace(CPU, channel_multiple=1), stream, stream)
    layers = [layer for layer in layers_of(graph, ())[0] if site(layer.node) in wanted]
    energies: dict = {}
    seen = observe(graph, layers, energies, context)
    reads = {node: value for node, value in graph.values(fresh) if any(node is n.source for n in layers)}
    for layer in layers:
        for form in layer.forms:
            weight, cells = graph.tensor(layer.weight), []
            choices = [options_of(graph, layer, known, energies, 1) for known in ({}, seen)]
            for share in (16, 8, 4, 2):
                rank = max(1, layer.full(form)[0] // share)
                errors = []
                for options in choices:
                    same = [o for o in options if o.form == form and o.error > 0]
                    if not same:
                        break
                    best = min(same, key=lambda o: abs(o.ranks[0] - rank))
                    made = Fit(best, weight).whole.float()
                    errors.append(_error(layer, reads[layer.source], weight, made, best.shift))
                cells.append(" / ".join(f"{e:.3f}" for e in errors) or "-")
            line(name, site(layer.node), form, *cells)


def _error(layer: Layer, value: Tensor, weight: Tensor, made: Tensor, shift: Tensor | None) -> float:
    expected = _applied(layer, value, weight)
    seen = _applied(layer, value, made)
    if shift is not None:
        seen = seen + shift.float().reshape([-1 if i == 1 else 1 for i in range(seen.dim())])
    centred = expected - expected.mean([i for i in range(expected.dim()) if i != 1], keepdim=True)
    return float((seen - expected).norm() / centred.norm())


def _applied(layer: Layer, value: Tensor, weight: Tensor) -> Tensor:
    target, _, place = layer.step
    return target(value, weight, None, *place)


def classifier() -> bool:
    """VGG-16's three linears at a quarter of their parameters: what is left of the outputs, and the time."""
    print(
        "\n## VGG-16's classifier at 4x fewer parameters (random weights, on its own features of CIFAR images)\n"
    )
    images = resnet56()[4][:192]
    model = with_power(
        torchvision_model("vgg16"), nn.functional.interpolate(images[:8], 224, mode="bilinear")
    )
    features = nn.Sequential(model.features, model.avgpool, nn.Flatten()).eval()
    with torch.no_grad():
        big = (nn.functional.interpolate(part, 224, mode="bilinear") for part in images.split(16))
        inputs = torch.cat([features(part) for part in big])
    model = model.classifier.eval()
    graph = capture(model, inputs[:2])
    stream = data.open_data(inputs[:128], graph.inputs)
    table("passes | parameters left | SQNR dB on 64 others | seconds | MB resident")
    for spec in ("squeeze(params=0.25)", "squeeze(params=0.25,repair=false)"):
        after, start = graph.copy(), time.perf_counter()
        context = Context(dataclasses.replace(CPU, channel_multiple=16), stream.limited(64), stream)
        Pipeline(parse(spec, PASSES), PASSES).run(after, context)
        line(f"`{spec}`", f"{parameters(after) / parameters(graph):.3f}",
             f"{decibels(graph.run(inputs[128:])[0], after.run(inputs[128:])[0]):.1f}",
             f"{time.perf_counter() - start:.0f}", f"{measure.peak_memory_mb():.0f}")  # fmt: skip
    return True


# -------------------------------------------------------------------- speed


SHAPES = (
    ("3x3", nn.Conv2d(16, 16, 3, padding=1, bias=False), (16, 32, 32)),
    ("3x3", nn.Conv2d(32, 32, 3, padding=1, bias=False), (32, 16, 16)),
    ("3x3", nn.Conv2d(64, 64, 3, padding=1, bias=False), (64, 8, 8)),
    ("3x3", nn.Conv2d(64, 64, 3, padding=1, bias=False), (64, 56, 56)),
    ("3x3", nn.Conv2d(128, 128, 3, padding=1, bias=False), (128, 28, 28)),
    ("3x3", nn.Conv2d(256, 256, 3, padding=1, bias=False), (256, 14, 14)),
    ("3x3", nn.Conv2d(512, 512, 3, padding=1, bias=False), (512, 7, 7)),
    ("1x1", nn.Conv2d(256, 256, 1, bias=False), (256, 28, 28)),
    ("linear", nn.Linear(384, 1536, bias=False), (128, 384)),
    ("linear", nn.Linear(4096, 4096, bias=False), (4096,)),
)


def speed() -> bool:
    """Every form at about half of the MACs, by itself: the stopwatch that decides what is taken."""
    print("\n## Where parts run faster (ONNX Runtime, one thread, batch 1, in turns)\n")
    table("layer | input | form | ranks | share of MACs | whole ms | parts ms | times faster | taken")
    with tempfile.TemporaryDirectory() as folder:
        clock = Stopwatch(CPU, None, {})
        clock.folder = Path(folder)
        for name, layer, size in SHAPES:
            graph = capture(layer.eval(), torch.randn(2, *size))
            (found,) = layers_of(graph, ())[0]
            options = [o for o in options_of(graph, found, {}, {}, 16) if o.error > 0 and o.share <= 0.55]
            for form in dict.fromkeys(o.form for o in options):
                best = max((o for o in options if o.form == form), key=lambda o: (round(o.share, 2), o.error))
                pair = (alone(best, [found.step]), alone(best, best.shapes))
                whole, parts = clock.milliseconds(pair, {})
                line(f"{name} {found.ins} to {found.outs}", "x".join(map(str, size)), form,
                     ", ".join(map(str, best.ranks)), f"{best.share:.2f}", f"{whole:.3f}", f"{parts:.3f}",
                     f"{whole / parts:.2f}x", "yes" if parts <= 0.97 * whole else "no")  # fmt: skip
    return True


# -------------------------------------------------------------------- other forms, tried once


class Separable:
    """k x k for every channel, m of them, then 1 x 1: W [o, i, h, w] = sum over m of P [o, i, m] D [i, m, h, w]."""

    def __init__(self, layer: Layer, weight: Tensor, share: float) -> None:
        self.layer, self.whole = layer, weight.double()
        area = layer.area
        self.times = max(1, int(share * layer.outs * area / (area + layer.outs)))

    def matrix(self, gram: Tensor, wanted: Tensor, block: int = 0) -> Tensor:
        outs, ins, area = self.layer.outs, self.layer.ins, self.layer.area
        by_channel = wanted.reshape(outs, ins, area).permute(1, 0, 2)
        depth = torch.linalg.svd(by_channel, full_matrices=False)[2][:, : self.times]  # [I, m, k k]
        lift = torch.zeros(ins, self.times, ins, area, dtype=wanted.dtype)
        lift[range(ins), :, range(ins)] = depth
        return solved(gram, wanted, lift.reshape(ins * self.times, ins * area))


class Fire:
    """1 x 1 to r channels; then half of the outputs by 1 x 1, the other half by k x k (SqueezeNet)."""

    def __init__(self, layer: Layer, weight: Tensor, share: float) -> None:
        self.layer, self.whole = layer, weight.double()
        area, outs, ins = layer.area, layer.outs, layer.ins
        rank = share * outs * ins * area / (ins + outs * (area + 1) / 2)
        self.rank = max(1, min(int(rank), ins))

    def matrix(self, gram: Tensor, wanted: Tensor, block: int = 0) -> Tensor:
        layer, area = self.layer, self.layer.area
        unfolded = wanted.reshape(layer.outs, layer.ins, area).movedim(1, -1).reshape(-1, layer.ins)
        first = torch.linalg.svd(unfolded, full_matrices=False)[2][: self.rank].contiguous()  # [r, I]
        lift = torch.kron(first, torch.eye(area, dtype=wanted.dtype))
        whole = solved(gram, wanted, lift)
        centre = lift[area // 2 :: area]
        point = solved(gram, wanted, centre)
        lost = [((wanted - made) @ gram * (wanted - made)).sum(1) for made in (whole, point)]
        order = (lost[1] - lost[0]).argsort()[: layer.outs // 2]
        whole[order] = point[order]
        return whole


def solved(gram: Tensor, wanted: Tensor, lift: Tensor) -> Tensor:
    """The matrix L lift nearest to `wanted` on rows of this Gram matrix."""
    inner = lift @ gram @ lift.T
    return torch.linalg.solve(ridged(inner, 1e-9), lift @ gram @ wanted.T).T @ lift


def forms() -> bool:
    """Every 3 x 3 of ResNet-56's blocks in one form, each at half of its MACs; weights solved anew in turn."""
    graph, _, _, held, samples = resnet56()
    print(
        "\n## Forms, tried once: every 3x3 of ResNet-56's blocks at half of its MACs, solved anew in turn\n"
    )
    print("1,000 held-back images; all layers alike, which is harder on the model than a budget.\n")
    table("form | agreement | SQNR dB")
    (whole,) = graph.run(held)
    stream, _ = drawn(graph, samples, 0)
    context = Context(CPU, stream.limited(CHECKED), stream)
    made: dict[str, Callable[[Layer, Tensor], object]] = {
        "k x k, 1 x 1 (outputs)": lambda layer, weight: _ours(layer, weight, "outputs"),
        "1 x 1, k x k (inputs)": lambda layer, weight: _ours(layer, weight, "inputs"),
        "1 x 1, k x k, 1 x 1 (Tucker-2)": lambda layer, weight: _ours(layer, weight, "tucker"),
        "k x 1, 1 x k (spatial)": lambda layer, weight: _ours(layer, weight, "spatial"),
        "depthwise, 1 x 1 (separable)": lambda layer, weight: Separable(layer, weight, 0.5),
        "1 x 1, then 1 x 1 beside k x k (Fire)": lambda layer, weight: Fire(layer, weight, 0.5),
    }
    blocks = [n for n in layers_of(graph, ())[0] if site(n.node).startswith("layer") and n.area == 9]
    for name, make in made.items():
        fits = {layer.node: make(layer, graph.tensor(layer.weight)) for layer in blocks}
        rebuilt = refit(graph, fits, stream, context)  # type: ignore[arg-type]
        after = graph.copy()
        for node in after.nodes:
            if node.op == "get_attr" and str(node.target) in rebuilt.tensors:
                after.set_tensor(node, rebuilt.tensors[str(node.target)])
        (seen,) = after.run(held)
        agree = 100 * float((seen.argmax(1) == whole.argmax(1)).float().mean())
        line(name, f"{agree:.1f}", f"{decibels(whole, seen):.1f}")
    return True


def _ours(layer: Layer, weight: Tensor, form: str) -> Fit:
    options = [o for o in options_of_weight(layer, weight) if o.form == form and o.share <= 0.5]
    most = max(o.share for o in options)
    return Fit(min((o for o in options if o.share > most - 0.02), key=lambda o: o.error), weight)


def options_of_weight(layer: Layer, weight: Tensor) -> list[Option]:
    from compressor.factors import options

    return list(options(layer, weight, dict.fromkeys(layer.forms), None, 1))


SECTIONS = {
    "cifar": cifar,
    "line": whole_line,
    "ranks": ranks,
    "classifier": classifier,
    "speed": speed,
    "forms": forms,
}


def main(names: list[str]) -> int:
    if not MODELS.is_dir():
        print(f"skipped: the trained models are not in {MODELS}")
        return 0
    machine = measure.machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {torch.get_num_threads()} threads\n")
    return int(not all([SECTIONS[name]() for name in names or SECTIONS]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
