"""Times the ONNX file of a merged model beside that of the model without adapter, and that of the un-merged one.

    python benchmarks/merge_speed.py      a markdown table on standard output

Ratios say how many times as fast as without adapter: median and quartiles of rounds in turns, one thread, batch 1.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from merge import ROOT, Host, error_of, merge, table
from peft_zoo import methods, models
from torch import Tensor, nn

from compressor import delivery, measure, runtime
from compressor.capture import capture
from compressor.ir import Graph
from targets.cpu import CPU

sys.path.append(str(ROOT / "tests"))

from zoo import with_power

SECONDS = 9.0  # for the three files of a row together


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
    return models.vit(**wide, image_size=224, patch_size=16, initializer_range=0.02)


def photos(samples: int) -> Tensor:
    return torch.randn(samples, 3, 224, 224)


TIMED = [
    Host(
        "ViT, 6 layers of 384, 197 tokens",
        vit_small,
        photos,
        {
            "LoRA": methods.lora(r=16),
            "DoRA": methods.lora(r=16, use_dora=True),
            "OFT": methods.use("OFTConfig", oft_block_size=32),
            "VeRA": methods.use("VeraConfig", r=64),
            "LoHa": methods.use("LoHaConfig", r=8),
            "IA3": methods.use("IA3Config", feedforward_modules=["fc2"]),
        },
    ),
    Host("ResNet-18", resnet, photos, {"LoRA": methods.lora(r=8)}),
    Host("RepVGG-A0", one_branch, photos, {"three branches": lambda model, example: rep_vgg()}),
]


def timed(host: Host) -> Iterator[list[str]]:
    x = host.inputs(1)
    with tempfile.TemporaryDirectory() as scratch:
        base = emitted(capture(models.Called(host.plain()), (host.inputs(2),)), Path(scratch, "base"))
        for method in host.methods:
            model = models.Called(host.adapted(method))
            graph = capture(model, (host.inputs(2),))
            before = emitted(graph, Path(scratch, "before"))
            merge(graph)
            after = emitted(graph, Path(scratch, "after"))
            plain, *others = measure.bench([base, before, after], feeds=[x.numpy()], seconds=SECONDS)
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


def main() -> None:
    warnings.simplefilter("ignore")
    columns = ("model", "adapter", "without adapter, ms", "un-merged", "merged", "error of the merged file")
    table(columns, (cells for host in TIMED for cells in timed(host)))


if __name__ == "__main__":
    main()
