"""Emitted files in old releases of ONNX Runtime: they load, and compute the same.

`make test` installs the releases into virtual environments of their own (.venv/onnxruntime-VERSION); without them these
tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import Net, conv
from test_handover import arrays
from torch import nn
from torch.nn import functional as F

import compressor
from compressor import handover
from compressor.errors import TargetError

VENV = Path(__file__).resolve().parents[1] / ".venv"
RUN = """
import sys
import numpy as np
import onnxruntime as ort

model, data = sys.argv[1:]
session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
found = np.load(data)
feeds = {i.name: found["in " + i.name] for i in session.get_inputs()}
for value, one in zip(session.run(None, feeds), session.get_outputs()):
    expected = found["out " + one.name].astype(np.float64)
    noise = np.square(value - expected).sum() / np.square(expected).sum()
    assert noise < 1e-3, (one.name, noise)
print(ort.__version__)
"""


def python_of(release: str) -> Path:
    found = sorted(VENV.glob(f"onnxruntime-{release}*/bin/python"))
    if not found:
        pytest.skip(f"ONNX Runtime {release} is not installed beside; `make test` does that")
    return found[0]


def picture() -> tuple[nn.Module, torch.Tensor]:
    def forward(net, x):
        x = F.hardswish(net.stem(x))
        x = x + F.silu(net.side(x)) * torch.sigmoid(net.gate(x.mean((2, 3), keepdim=True)))
        return net.head(F.gelu(net.wide(F.relu(net.group(x)))).mean((2, 3)))

    layers = {"stem": conv(3, 16), "side": conv(16, 16), "gate": conv(16, 16, 1), "wide": conv(16, 32)}
    group = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    return Net(forward, **layers, group=group, head=nn.Linear(32, 5)), torch.randn(160, 3, 16, 16)


def sentence() -> tuple[nn.Module, torch.Tensor]:
    def forward(net, ids):
        x = net.words(ids)
        query, key, value = (
            layer(x).unflatten(2, (2, 32)).transpose(1, 2) for layer in (net.q, net.k, net.v)
        )
        x = net.first(x + net.o(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)))
        return net.second(x + net.down(F.gelu(net.up(x))))

    sizes = {"q": (64, 64), "k": (64, 64), "v": (64, 64), "o": (64, 64), "up": (64, 128), "down": (128, 64)}
    layers = {name: nn.Linear(*size) for name, size in sizes.items()}
    norms = {"first": nn.LayerNorm(64), "second": nn.LayerNorm(64)}
    return Net(forward, words=nn.Embedding(2048, 64), **layers, **norms), torch.randint(0, 2048, (160, 12))


@pytest.mark.parametrize("release", ["1.15", "1.17"])
@pytest.mark.parametrize(
    ("make", "passes", "since"),
    [
        (picture, "fold", "1.15"),
        (picture, "int8(rounding=nearest)", "1.15"),
        (picture, "fp16", "1.15"),
        (sentence, "fold", "1.15"),
        (sentence, "int8(rounding=nearest)", "1.15"),
        (sentence, "int8(scheme=dynamic)", "1.15"),
        (sentence, "int4", "1.17"),
    ],
)
def test_an_old_release_computes_the_same(tmp_path, release, make, passes, since):
    if since > release:
        pytest.skip(f"its operators came with {since}")
    python = python_of(release)
    torch.manual_seed(0)
    model, x = make()
    options = {"calibration": [x]} if "nearest" in passes else {}
    result = compressor.compress(
        model.eval(), x[:4], passes=passes, output=tmp_path / "out", measure=False, min_ort=release, **options
    )
    assert result.report["emitted"]["oldest_runtime"] == max(since, release)
    sample = tmp_path / "out" / handover.SAMPLE
    held = {f"in {name}": a for name, a in arrays(sample, "input").items()}
    held |= {f"out {name}": a for name, a in arrays(sample, "output").items()}
    np.savez(tmp_path / "sample.npz", **held)
    made = subprocess.run(
        [python, "-c", RUN, tmp_path / "out" / "model.onnx", tmp_path / "sample.npz"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.startswith(release), json.dumps(made.stdout)


@pytest.mark.parametrize(
    ("passes", "since"),
    [("int4", "1.17"), ("int4(bits=8)", "1.22"), ("int8(scheme=weight)", "1.22"), ("int4,fp16", "1.23")],
)
def test_weights_of_few_bits_need_the_release_that_has_them(tmp_path, passes, since):
    torch.manual_seed(0)
    model, x = sentence()
    options = {"passes": passes, "output": tmp_path / "out", "measure": False}
    result = compressor.compress(model.eval(), x[:4], **options)
    assert result.report["emitted"]["oldest_runtime"] == since
    with pytest.raises(TargetError, match=f"need ONNX Runtime {since}; leave out"):
        compressor.compress(model.eval(), x[:4], min_ort="1.16", **options)
