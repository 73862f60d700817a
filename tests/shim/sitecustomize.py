"""Lets torchvision's Python models import where its compiled operators do not load; on PYTHONPATH in tests.

A torchvision built for another torch fails at `import torchvision`, and with it timm, peft and transformers.
The models that the tests use need none of the compiled operators, only their names. Nothing is imported until
torchvision is, so that a subprocess that needs no torch stays quick.
"""

import sys

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)


class _Torchvision:
    """A finder that finds nothing: it defines the missing operators just before torchvision is looked up."""

    library = None  # keeps the definitions alive

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            sys.meta_path.remove(cls)
            cls.define()
        return None

    @classmethod
    def define(cls):
        from importlib.util import find_spec
        from pathlib import Path

        spec = find_spec("torchvision")
        if spec is None:
            return
        import torch

        if hasattr(torch.ops.torchvision, "nms"):  # another copy of this file was first
            return
        for compiled in Path(spec.origin).parent.glob("_C.*"):
            try:
                torch.ops.load_library(compiled)
                return
            except OSError:
                continue
        cls.library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            cls.library.define(schema)


if not any(getattr(finder, "__name__", "") == "_Torchvision" for finder in sys.meta_path):
    sys.meta_path.insert(0, _Torchvision)
