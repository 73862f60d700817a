"""Real trained weights: ResNet-20 for CIFAR-10, from every kind of checkpoint, and as an integer model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor import api, runtime

SHARED = Path(__file__).resolve().parents[2] / "shared"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(
        not (SHARED / "models").is_dir(), reason="the trained models are not beside the checkout"
    ),
]
CODE = SHARED / "models" / "cifar_resnet.py"


@pytest.fixture(scope="module")
def cifar():
    sys.path.append(str(CODE.parent))
    import cifar_resnet

    yield cifar_resnet
    sys.path.remove(str(CODE.parent))


@pytest.fixture
def data(cifar, tmp_path):
    """Calibration and test images as files of the working directory."""
    x, y = cifar.calibration(256)
    np.savez(tmp_path / "calib.npz", x=x.numpy(), y=y.numpy())
    _, x, y = cifar.load("resnet20")
    np.savez(tmp_path / "test.npz", x=x.numpy(), y=y.numpy())
    return tmp_path


class Bomb:
    """Creates a file when it is unpickled for real."""

    def __reduce__(self):
        return Path.touch, (Path("fired"),)


def checkpoints(model):
    state = model.state_dict()
    model.note = Bomb()
    ddp = {f"module.{k}": v for k, v in state.items()}
    return {
        "whole.pt": model,
        "lightning.ckpt": {
            "state_dict": {f"model.{k}": v for k, v in state.items()},
            "hyper_parameters": Bomb(),
            "pytorch-lightning_version": "2.5.0",
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        },
        "ddp.pth": {"model": ddp, "best": np.float64(92.3), "note": Bomb()},
    }


@pytest.mark.parametrize("name", ["whole.pt", "lightning.ckpt", "ddp.pth"])
def test_checkpoints_compile_without_unpickling(cifar, tmp_path, monkeypatch, run, name):
    monkeypatch.chdir(tmp_path)
    model, images, _ = cifar.load("resnet20")
    torch.save(checkpoints(model)[name], name)
    words = (name, "--model", f"{CODE}:CifarResNet(20)", "--input", "x:f32[?,3,32,32]", "--passes", "fold")

    code, _, err = run(*words, "--no-measure", "--output", "out")
    assert code == 0, err
    assert not Path("fired").exists()
    (seen,) = runtime.run(runtime.session("out/model.onnx"), [images[:8].numpy()])
    with torch.no_grad():
        np.testing.assert_allclose(seen, model(images[:8]).numpy(), rtol=1e-4, atol=1e-4)
    torch.load(name, weights_only=False)
    assert Path("fired").exists(), "the bomb would have fired"


def test_a_missing_key_is_named(cifar, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    state = cifar.load("resnet20")[0].state_dict()
    del state["layer2.1.conv2.weight"]
    torch.save({"state_dict": state}, "short.pth")
    words = (
        "short.pth",
        "--model",
        f"{CODE}:CifarResNet(20)",
        "--input",
        "x:f32[?,3,32,32]",
        "--passes",
        "fold",
    )
    code, _, err = run(*words)
    assert code == 3 and "layer2.1.conv2.weight" in err
    assert not (tmp_path / "short-compressed").exists()


def test_integers_end_to_end(cifar, data, monkeypatch, run):
    monkeypatch.chdir(data)
    model, _, _ = cifar.load("resnet20")
    torch.save(model.state_dict(), "resnet20.pth")
    words = ("resnet20.pth", "--model", f"{CODE}:CifarResNet(20)", "--input", "x:f32[?,3,32,32]")
    code, _, err = run(
        *words, "--passes", "int8", "--calib", "calib.npz", "--eval", "test.npz", "--output", "out"
    )
    assert code == 0, err
    report = json.loads(Path("out/report.json").read_text())
    before, after = report["rows"][0]["metric"]["top1"], report["emitted"]["metric"]["top1"]
    assert before == pytest.approx(0.9225) and before - after <= 0.005
    assert min(c["sqnr_db"] for c in report["rows"][-1]["checks"]) >= 27
    assert runtime.float_operators_inside("out/model.onnx") == []
    worse = api.verify(
        model, "out/model.onnx", data="calib.npz", example_inputs=torch.randn(2, 3, 32, 32), tolerance=1e-4
    )
    assert not worse["ok"]
