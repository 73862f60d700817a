"""What a camera or a decoder gives, as a model's input: layout, channel order and normalisation become operators.

Preprocess.pixels computes (x * scale + offset - mean) / std. In the graph that is (x - m) / s with
m = (mean - offset) / scale and s = std / scale, one number a channel: two operators, which a convolution can take in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .errors import DataError, UsageError
from .images import Preprocess, preprocessing
from .ir import Graph, Input

aten = torch.ops.aten
WHOLE = 0.05  # normalised floats whose levels are farther than this from a whole number were never pixels
_WORDS = (("uint8", "float32"), ("nhwc", "nchw"), ("rgb", "bgr"))


@dataclass(frozen=True)
class Camera:
    """The input of a compiled model that takes pixels 0..255, and how data become such pixels.

    name: the input. dtype: uint8 or float32. layout: `nhwc` or `nchw`. order: `rgb` or `bgr`. preprocess: the size that
    pictures get, and the normalisation that is part of the model.
    """

    name: str
    dtype: torch.dtype
    layout: str
    order: str
    preprocess: Preprocess

    @property
    def channels(self) -> int:
        return len(self.preprocess.mean)

    @property
    def flips(self) -> bool:
        """True where the model was trained on the other order of channels."""
        return self.channels > 1 and (self.order == "bgr") != self.preprocess.reverse

    def constants(self) -> tuple[Tensor, Tensor]:
        """m and s of (x - m) / s, both [1, channels, 1, 1] in float64, in the order that the model was trained on."""
        how = self.preprocess
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(1, -1, 1, 1) for v in (how.mean, how.std))
        m, s = (mean - how.offset) / how.scale, std / how.scale
        return (m.flip(1), s.flip(1)) if how.reverse else (m, s)

    def image(self, image: Any) -> Tensor:
        """One picture of PIL, resized and cropped, as one sample of the input."""
        pixels = self.preprocess.sized(image)[None]
        return self.laid_out(pixels.flip(1) if self.order == "bgr" else pixels)[0]

    def pixels(self, batch: Tensor) -> Tensor:
        """A batch of the input from an array in either layout.

        Integers are pixels in the order that the input takes. Floats are what the model took before, normalised:
        they are turned back; DataError where they were no pixels.
        """
        shape, channels = list(batch.shape), self.channels
        if len(shape) != 4 or channels not in (shape[1], shape[3]):
            raise DataError(
                f"pixels must come as [n, {channels}, height, width] or [n, height, width, {channels}]; "
                f"these are {shape}"
            )
        last = shape[1] != channels or (self.layout == "nhwc" and shape[3] == channels)
        found = batch.permute(0, 3, 1, 2) if last else batch
        if found.dtype == torch.uint8:
            return self.laid_out(found)
        floats = found.is_floating_point()
        levels = self.levels(found) if floats else found.double()
        whole = levels.round()
        wrong = ~((levels - whole).abs() <= WHOLE) | (whole < 0) | (whole > 255)
        if wrong.any():
            undone = f" once the normalisation of {self.preprocess.source} is undone" if floats else ""
            raise DataError(
                f"pixels are whole numbers 0 to 255, and these are {float(levels[wrong][0]):.4g}{undone}; "
                "pass them as uint8, before any normalisation"
            )
        return self.laid_out(whole)

    def levels(self, normalised: Tensor) -> Tensor:
        """Levels [n, channels, height, width] in the order of the input, float64, of what the model took before."""
        m, s = self.constants()
        levels = normalised.double() * s + m
        return levels.flip(1) if self.flips else levels

    def laid_out(self, pixels: Tensor) -> Tensor:
        """Pixels [n, channels, height, width] in the input's dtype and layout."""
        made = pixels.to(self.dtype)
        return (made.permute(0, 2, 3, 1) if self.layout == "nhwc" else made).contiguous()

    def facts(self) -> dict[str, Any]:
        """What is left to do to a picture, for the report and the signature."""
        facts = self.preprocess.facts()
        return {name: facts[name] for name in ("source", "resize", "crop", "interpolation") if name in facts}

    def signature(self) -> dict[str, str]:
        """What dtype and shape do not say about the input."""
        return {
            "layout": self.layout.upper(),
            "channels": self.order.upper() if self.channels > 1 else "GREY",
        }


Preprocessing = str | Callable[..., Any] | Camera


def parse(text: str) -> tuple[str, str, str]:
    """`uint8,nhwc,bgr` -> the three words, in any order; rgb may be left out."""
    words = [word.strip().lower() for word in text.split(",")]
    dtype, layout, order = ([word for word in words if word in group] for group in _WORDS)
    known = len(dtype) + len(layout) + len(order) == len(words)
    if not known or len(dtype) != 1 or len(layout) != 1 or len(order) > 1:
        raise UsageError(
            f"--image-input {text}: expected uint8 or float32, then nhwc or nchw, then rgb (default) or bgr, "
            "as in uint8,nhwc,bgr"
        )
    return dtype[0], layout[0], (order or ["rgb"])[0]


def attach(graph: Graph, words: str, how: str | Callable[..., Any] | None) -> Camera:
    """Makes the graph take pixels: what `how` says of normalisation stands in front of its one image input.

    words: see `parse`; how: see `images.preprocessing`. UsageError where the graph has no or several image inputs, or
    where the normalisation is not known.
    """
    dtype, layout, order = parse(words)
    found = [i for i, spec in enumerate(graph.inputs) if _is_image(spec)]
    if len(found) != 1:
        raise UsageError(
            f"--image-input {words} needs a model with one image input, floats [batch, 1 or 3, height, width]; "
            f"this one takes {', '.join(map(str, graph.inputs))}"
        )
    spec = graph.inputs[found[0]]
    height, width = spec.shape[2:]
    size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    known = None if how is None else preprocessing(how, size)
    if not isinstance(known, Preprocess):
        raise UsageError(
            "--image-input makes the normalisation part of the model, which must be known in numbers: pass "
            "--preprocess imagenet, or a timm or Hugging Face preprocessing file"
        )
    camera = Camera(spec.name, getattr(torch, dtype), layout, order, known)
    if camera.channels != spec.shape[1]:
        raise UsageError(
            f"--preprocess {known.source} normalises {camera.channels} channels, and the model takes {spec}"
        )
    _put_in_front(graph, found[0], camera)
    return camera


def _is_image(spec: Input) -> bool:
    return spec.dtype.is_floating_point and len(spec.shape) == 4 and spec.shape[1] in (1, 3)


def _put_in_front(graph: Graph, position: int, camera: Camera) -> None:
    spec, entry = graph.inputs[position], graph.placeholders[position]
    axes = (0, 2, 3, 1) if camera.layout == "nhwc" else (0, 1, 2, 3)
    value = entry.meta["val"]
    readers = set(entry.users)
    first = next((node for node in graph.nodes if node in readers), graph.output)
    with graph.fake_mode:
        entry.meta["val"] = value.new_empty([value.shape[axis] for axis in axes], dtype=camera.dtype)

    def then(target: Any, *args: Any) -> Node:
        node = graph.insert(target, args, before=first)
        for key in ("nn_module_stack", "stack_trace"):  # it stands in no module of the user's
            node.meta.pop(key, None)
        return node

    x = entry
    if camera.layout == "nhwc":
        x = then(aten.permute.default, x, [0, 3, 1, 2])
    if x is not entry or camera.dtype != torch.float32:
        # the model was captured with channels first in memory as well, which its views rely on
        x = then(aten.to.dtype, x, torch.float32, False, False, torch.contiguous_format)
    if camera.flips:
        x = then(aten.flip.default, x, [1])
    m, s = (one.float() for one in camera.constants())
    if m.any():
        x = then(aten.sub.Tensor, x, graph.add_tensor("pixel_mean", m))
    if (s != 1).any():
        x = then(aten.div.Tensor, x, graph.add_tensor("pixel_std", s))
    if spec.dtype != torch.float32:
        x = then(aten.to.dtype, x, spec.dtype)
    entry.replace_all_uses_with(x, delete_user_cb=lambda user: user in readers)

    pixels = camera.laid_out(camera.levels(graph.example[position]).round().clamp(0, 255))
    made = dataclasses.replace(spec, dtype=camera.dtype, shape=tuple(spec.shape[axis] for axis in axes))
    graph.inputs = (*graph.inputs[:position], made, *graph.inputs[position + 1 :])
    graph.example = (*graph.example[:position], pixels, *graph.example[position + 1 :])
    graph.reinfer()
    graph.turn_page()
    graph.check()
