"""The pictures of report.html beside this file, taken in headless Chromium.

python docs/pictures/report.py              ResNet-56 with its trained weights (read from ../shared), some minutes
python docs/pictures/report.py REPORT.json  of a run that is there already
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "models"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import chromium  # noqa: E402

from compressor import page, report  # noqa: E402

# name -> screen, and how much of the page from its top
PICTURES: dict[str, tuple[dict, int]] = {
    "report-light": ({"width": 1240}, 1360),
    "report-dark": ({"width": 1240, "dark": True}, 1360),
    "report-phone": ({"width": 360, "scale": 1.25}, 2100),
}


def resnet(folder: Path) -> Path:
    """Three quarters of its work, in integers, judged on test images; the report."""
    import numpy as np
    import torch

    sys.path.append(str(SHARED))
    import cifar_resnet

    model, x, y = cifar_resnet.load("resnet56")
    torch.save(model.state_dict(), folder / "resnet56.pth")
    np.savez(folder / "test.npz", x=x.numpy(), y=y.numpy())
    x, y = cifar_resnet.calibration(512)
    np.savez(folder / "photos.npz", x=x.numpy(), y=y.numpy())
    (folder / "cifar_resnet.py").write_bytes((SHARED / "cifar_resnet.py").read_bytes())
    words = [
        "resnet56.pth",
        "--model",
        "cifar_resnet.py:CifarResNet(56)",
        "--input",
        "x:f32[?,3,32,32]",
        "--passes",
    ]
    words += ["prune(macs=0.75),int8", "--calib", "photos.npz", "--eval", "test.npz", "--output", "out"]
    subprocess.run([sys.executable, "-m", "compressor", *words], cwd=folder, check=True)
    return folder / "out" / "report.json"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(sys.argv[1]) if sys.argv[1:] else resnet(folder)
        page.write(folder / page.NAME, report.read_report(source))
        program = chromium.path()
        if program is None:
            raise SystemExit("it needs chromium")
        with chromium.browser(program) as tab:
            for title, (screen, height) in PICTURES.items():
                tab.open((folder / page.NAME).as_uri(), **screen)
                Path(__file__).with_name(f"{title}.png").write_bytes(tab.photograph(height))


if __name__ == "__main__":
    main()
