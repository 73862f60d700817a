"""What the browser found, as Markdown: python benchmarks/web/report.py >benchmarks/results/web.md

Ends with an error where a number is outside its tolerance, or a model did not run.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from compressor import measure  # noqa: E402

OUT = HERE / "out"
LEAST_DB, MOST = 30.0, 1e-4  # integers and halves, floats
WASM = {
    "onnxruntime-web/wasm": "ort-wasm-simd-threaded.wasm",
    "onnxruntime-web": "ort-wasm-simd-threaded.jsep.wasm",
}
MEANT_TO_FAIL = {"two files, the second not named"}
RESULTS: dict[str, Any] = json.loads((OUT / "results.json").read_text())
JOBS = {job["name"]: job for job in json.loads((OUT / "jobs.json").read_text())}


def table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def row(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def compared(name: str) -> tuple[float, float]:
    """SQNR in dB and the largest difference to the largest number, of the worst output; raises beyond the tolerance."""
    found = RESULTS[name]
    if "error" in found:
        raise SystemExit(f"{name}: {found['error']}")
    decibels = min(10 * math.log10(one["signal"] / max(one["noise"], 1e-30)) for one in found.values())
    largest = max(one["difference"] / one["largest"] for one in found.values())
    rounded = any(words in name for words in ("int", "fp16"))
    good = decibels >= LEAST_DB if rounded else largest <= MOST
    if not good or not all(one["finite"] for one in found.values()):
        raise SystemExit(f"{name}: {decibels:.1f} dB, largest difference {largest:.1e}")
    return decibels, largest


def said(decibels: float) -> str:
    return "the same" if decibels > 200 else f"{decibels:.1f} dB"


def ratio(one: dict[str, Any]) -> str:
    return f"{one['ratio']:.2f}x ({one['low']:.2f}-{one['high']:.2f})"


def megabytes(url: str) -> str:
    return f"{(HERE / url.lstrip('/')).stat().st_size / 1e6:.2f}"


def models() -> None:
    table(
        "model", "MB", "its sample", "64 held-out samples", "largest difference", "ms", "to float", "usage.md"
    )
    for name in ("resnet20", "minilm"):
        times = RESULTS[f"{name} time"]
        for kind, one in zip(("float", "integer"), times, strict=True):
            label = f"{name}-{kind}"
            sample, _ = compared(f"{label} sample")
            held_out, largest = compared(f"{label} held out")
            runs = "error" if "error" in RESULTS[f"{label} usage"] else "runs"
            size = megabytes(JOBS[f"{label} sample"]["model"])
            row(f"{name}, {kind}", size, said(sample), said(held_out), f"{largest:.1e}",
                f"{one['ms']:.2f}", ratio(one), runs)  # fmt: skip


def raced(job: str, labels: list[str]) -> None:
    table(job.split()[0], "MB", "ms", "to the first")
    for url, label, one in zip(JOBS[job]["models"], labels, RESULTS[job], strict=True):
        row(label, megabytes(url), f"{one['ms']:.2f}", ratio(one))


def layers() -> None:
    table("channels", "kernel", "groups", "image", "products", "float", "integer", "island")
    for name, found in RESULTS.items():
        sizes = re.fullmatch(r"layer (\d+) (\d+) (\d+) (\d+) (\d+) time", name)
        if sizes is None:
            continue
        ins, outs, groups, kernel, size = map(int, sizes.groups())
        cells = [f"{one['ms']:.3f} ms" for one in found]
        products = ins // groups * kernel * kernel
        row(f"{ins} to {outs}", f"{kernel} x {kernel}", groups, f"{size} x {size}", products, *cells)


def others() -> None:
    table("model", "numbers", "largest difference", "usage.md")
    real = re.compile(r"(resnet20|minilm)-.*|two files, the second not named")
    for name, job in JOBS.items():
        if job["do"] != "compare" or real.fullmatch(name):
            continue
        decibels, largest = compared(name)
        runs = "error" if "error" in RESULTS[f"{name} usage"] else "runs"
        row(f"`{name}`", said(decibels), f"{largest:.1e}", runs)
    ends = [n.split()[1] for n, r in RESULTS.items() if n.startswith("end ") and "error" not in r]
    print(f"\nusage.md of a model whose input and output are of this dtype runs: {', '.join(ends)}.")
    refused = RESULTS["two files, the second not named"].get("error", "loads")
    print(
        f"\nA model in two files, when JavaScript names one: `{refused.split(': ')[-1].split(' at ')[0].strip()}`"
    )


def main() -> None:
    machine = measure.machine()
    package = json.loads((HERE / "node_modules/onnxruntime-web/package.json").read_text())
    versions = {"onnxruntime-web": package["version"], "Chromium": RESULTS["chromium"], **measure.versions()}
    print("# web\n")
    print("- command: `bash benchmarks/web/run.sh`")
    print(f"- date: {datetime.date.today()}")
    print(
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['isa']}; headless Chromium, one thread"
    )
    print(f"- versions: {', '.join(f'{name} {number}' for name, number in versions.items())}\n")
    print((HERE / "meaning.md").read_text().rstrip())
    print(
        "\n## Models\n\nAgainst ONNX Runtime on x86, with the same file; the least is 30 dB for integers and a largest"
    )
    print(
        "difference of 1e-4 of the largest number for floats. Milliseconds: medians, in turns; quartiles of the ratio."
    )
    models()
    print("\n## Which integers")
    print("\nMobileNetV2 with random weights; MiniLM on a sentence of its own (words), rounded to nearest.")
    raced("mobilenet time", ["float", "int8, every convolution", "int8, from 128 products on"])
    raced("words time", JOBS["words time"]["labels"])
    print(
        "\nA convolution with its ReLU, between two that are integer; *island*: it alone is float. Products: summed for"
    )
    print("one output.")
    layers()
    print("\nBesides the model a page loads, uncompressed:\n")
    for name, file in WASM.items():
        print(f"- `{name}`: {megabytes(f'/node_modules/onnxruntime-web/dist/{file}')} MB of WASM")
    print(
        "\n## What else runs\n\nOne sample each, compared as above. `picture`, `sentence`: small, by several passes."
    )
    others()
    print(
        "\n## Operators\n\nKernels of ONNX Runtime here that the WASM build lacks, of files with the target's opset:\n"
    )
    print((OUT / "operators.md").read_text().strip())
    print(f"\nAgainst the native build of the same release, {package['version']}:\n")
    print((OUT / "operators-same.md").read_text().strip())
    failed = [n for n, found in RESULTS.items() if "error" in found and n not in MEANT_TO_FAIL]
    if failed:
        raise SystemExit(f"did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
