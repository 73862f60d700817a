"""Pictures to tensors: by a checkpoint's own preprocessing config, or by a function of the user's."""

from __future__ import annotations

import importlib
import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import CompressorError, DataError, FunctionError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of PIL's numbers
_KNOWN_STEPS = {
    "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_flip_channel_order"
}  # fmt: skip
# Image processors of transformers whose steps are those of `Preprocess`, in their order.
_PLAIN = {
    "", "aimv2", "beit", "bit", "blip", "chineseclip", "clip", "convnext", "deit", "dpt", "efficientnet", "levit",
    "mobilenetv1", "mobilenetv2", "mobilevit", "poolformer", "pvt", "segformer", "siglip", "vit",
}  # fmt: skip
_LARGEST = 1 << 14  # pixels of a side that pictures are brought to
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """What happens to a picture: resize, centre crop, scale, normalise; channels first, float32.

    resize: the shorter side in pixels, or (height, width); covers: these are reached by one side and exceeded by the
    other, whose ratio stays. crop: (height, width); nearest: its corner goes to the nearest pixel, as with torchvision,
    and not to the one before, as with transformers.
    y = (x * scale + offset - mean) / std with x in 0..255. reverse: blue first. source: where this was read.
    """

    source: str
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    scale: float = 1 / 255
    offset: float = 0.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    reverse: bool = False
    covers: bool = False
    nearest: bool = False

    def __post_init__(self) -> None:
        """ValueError for what no picture can be brought to."""
        sizes = [
            n for size in (self.resize, self.crop) for n in (size if isinstance(size, tuple) else [size])
        ]
        if not all(n is None or (isinstance(n, int) and 0 < n <= _LARGEST) for n in sizes):
            raise ValueError(
                f"pictures of {self.resize}, cut to {self.crop}; sides are 1 to {_LARGEST} pixels"
            )
        numbers = (self.scale, self.offset, *self.mean, *self.std)
        if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers) or 0 in self.std:
            raise ValueError(f"normalises by {self.mean} and {self.std}, scales by {self.scale}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"normalises by {len(self.mean)} means and {len(self.std)} deviations; channels are 1 or 3"
            )

    def image(self, image: Image) -> Tensor:
        """One picture of PIL, of any mode and size, to [channels, height, width]."""
        return self.pixels(self.sized(image)[None])[0]

    def sized(self, image: Image) -> Tensor:
        """One picture of PIL, resized and cropped: uint8 [channels, height, width], red first."""
        image = _of_bytes(image).convert("L" if len(self.mean) == 1 else "RGB")
        if self.resize is not None:
            image = image.resize(self._size(*image.size), resample=_FILTERS.index(self.interpolation))
        if self.crop is not None:
            over = [have - want for have, want in zip(image.size, self.crop[::-1], strict=True)]
            left, top = (round(n / 2) if self.nearest else n // 2 for n in over)
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a picture that had these."""
        if isinstance(self.resize, int):
            short = min(width, height)
            return int(self.resize * width / short), int(self.resize * height / short)
        assert self.resize is not None
        if not self.covers:
            return self.resize[1], self.resize[0]
        factor = max(self.resize[1] / width, self.resize[0] / height)
        return round(width * factor), round(height * factor)

    def pixels(self, batch: Tensor) -> Tensor:
        """Pixels 0..255 [n, channels, height, width] that already have their size: scaled and normalised."""
        channels = len(self.mean)
        if batch.dim() != 4 or batch.shape[1] not in (channels, *((1, 3) if channels == 1 else ())):
            raise DataError(
                f"{self.source} normalises {channels} channels, so pixels must come as "
                f"[n, {channels}, height, width]; these are {list(batch.shape)}"
            )
        mean, std = (torch.tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        x = (batch.float() * self.scale + self.offset - mean) / std
        return x.flip(1) if self.reverse else x

    def facts(self) -> dict[str, Any]:
        """What was used, for the report."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}


def _of_bytes(image: Image) -> Image:
    """A picture of 16 bits a pixel as one of 8. DataError for floats and 32 bits, whose white nobody knows."""
    from PIL import Image as pillow

    if image.mode.startswith("I;16"):
        return pillow.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        name, kind = (
            getattr(image, "filename", "") or "a picture",
            "floats" if image.mode == "F" else "of 32 bits",
        )
        raise DataError(
            f"{name}: its pixels are {kind}, and what is white is unknown; use --preprocess module:function"
        )
    return image


@dataclass(frozen=True)
class Custom:
    """A function of the user's: a PIL image to one sample, or a batch of an array file to a batch."""

    function: Callable[[Any], Any]
    source: str

    def image(self, image: Image) -> Tensor:
        return self._call(image)

    def pixels(self, batch: Tensor) -> Tensor:
        return self._call(batch)

    def facts(self) -> dict[str, Any]:
        return {"source": self.source}

    def _call(self, value: Any) -> Tensor:
        result = own(self.function, self.source, value)
        if isinstance(result, np.ndarray):
            result = torch.from_numpy(result)
        if not isinstance(result, Tensor):
            raise FunctionError(
                f"{self.source} returned a {type(result).__name__}; return a tensor or an array"
            )
        return result


def preprocessing(spec: str | Callable[[Any], Any], size: tuple[int, int] | None) -> Preprocess | Custom:
    """`imagenet`, a path to a timm or Hugging Face JSON, `module:function`, or a function.

    size: (height, width) that the model's input fixes, None if dynamic: `imagenet` then means 224.
    """
    if not isinstance(spec, str):
        return Custom(spec, getattr(spec, "__qualname__", type(spec).__name__))
    if spec == "imagenet":
        height, width = size or (224, 224)
        shorter = int(min(height, width) / 0.875)
        crop = (height, width)
        mean, std = _IMAGENET_MEAN, _IMAGENET_STD
        return Preprocess("imagenet", resize=shorter, crop=crop, mean=mean, std=std, nearest=True)
    if Path(spec).suffix == ".json" or Path(spec).is_dir():
        return _from_json(Path(spec))
    if ":" in spec:
        return Custom(imported(spec, "--preprocess"), spec)
    raise UsageError(
        f"--preprocess {spec}: expected imagenet, a preprocessor_config.json or timm config.json, or "
        "module:function"
    )


def search_here() -> None:
    """Modules are found in the working directory, too, last of all places."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def imported(spec: str, option: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; the working directory is searched last."""
    module, _, name = spec.partition(":")
    search_here()
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{option} {spec}: {error}") from error
    except Exception as error:
        raise FunctionError(f"{option} {spec}: {_raised(error)}") from error
    if not callable(found):
        raise UsageError(f"{option} {spec}: {name} is a {type(found).__name__}, not a function")
    return found


def own(function: Callable[..., Any], source: str, *args: Any) -> Any:
    """What a function of the user's gives. FunctionError where it raises; our own errors pass through it."""
    try:
        return function(*args)
    except CompressorError:
        raise
    except Exception as error:
        raise FunctionError(f"{source} {_raised(error)}") from error


def _raised(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    first = next(iter(str(error).strip().splitlines()), "")
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}{where}: {first}"


def opened(path: Path) -> Image:
    """A picture, decoded; DataError names the file when it is damaged or Pillow is missing."""
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise DataError("a folder of images needs Pillow: pip install pillow") from error
    try:
        with pillow.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error})") from error


# -------------------------------------------------------------------- configs


def _from_json(path: Path) -> Preprocess:
    if path.is_dir():
        found = [
            path / name for name in ("preprocessor_config.json", "config.json") if (path / name).is_file()
        ]
        if not found:
            raise DataError(f"{path}: holds no preprocessor_config.json and no timm config.json")
        path = found[0]
    try:
        config = json.loads(path.read_text())
        config = config.get("pretrained_cfg", config)
        return _timm(config, str(path)) if "input_size" in config else _hugging_face(config, str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{path}: not a preprocessing config of timm or Hugging Face ({error!r})") from error


def _timm(config: dict[str, Any], source: str) -> Preprocess:
    """timm: resize to size / crop_pct (so that it is covered, or to it where crop_mode is squash), then centre crop."""
    channels, height, width = config["input_size"]
    percent = config.get("crop_pct", 0.875)
    mode = config.get("crop_mode", "center")
    if mode not in ("center", "squash") or channels not in (1, 3):
        raise DataError(
            f"{source}: crop_mode {mode} with {channels} channels is not known; use module:function"
        )
    if mode == "center" and height == width:
        resize: int | tuple[int, int] = int(height / percent)
    else:
        resize = (int(height / percent), int(width / percent))
    return Preprocess(
        source,
        resize=resize,
        crop=(height, width),
        interpolation=_filter(config.get("interpolation", "bilinear"), source),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        covers=mode == "center" and height != width,
        nearest=True,
    )


def _hugging_face(config: dict[str, Any], source: str) -> Preprocess:
    """transformers' image processors: resize, centre crop, rescale, normalise, each with its switch."""
    kind = _processor(config)
    if unlike := _unlike(config, kind):
        raise DataError(f"{source}: {unlike}, which is not known here; use --preprocess module:function")
    resize, crop = _hugging_face_sizes(config, source)
    normalise = config.get("do_normalize", True) and kind != "mobilevit"
    deviations = config["image_std"] if normalise else (1.0, 1.0, 1.0)
    if kind == "levit" and isinstance(resize, int):
        resize = int(256 / 224 * resize)
    if kind == "efficientnet" and config.get("include_top", True):  # it divides by them twice
        deviations = [deviation**2 for deviation in deviations]
    return Preprocess(
        source,
        resize=resize,
        crop=crop,
        interpolation=_filter(config.get("resample", 2), source),
        scale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
        offset=-1.0 if config.get("rescale_offset") else 0.0,
        mean=tuple(config["image_mean"]) if normalise else (0.0, 0.0, 0.0),
        std=tuple(deviations),
        reverse=bool(config.get("do_flip_channel_order")),
    )


def _processor(config: dict[str, Any]) -> str:
    """`vit` of a ViTImageProcessorFast or a ViTFeatureExtractor; nothing where the config does not say."""
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    for ending in ("Fast", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    return name.lower()


def _unlike(config: dict[str, Any], kind: str) -> str:
    """What a processor does that `Preprocess` does not, in words; nothing where there is nothing."""
    if kind not in _PLAIN:
        return f"is for another image processor ({kind})"
    for name, value in config.items():
        if name.startswith("do_") and value and name not in _KNOWN_STEPS:
            return f"does {name}"
    if config.get("keep_aspect_ratio") or config.get("ensure_multiple_of", 1) != 1:
        return "keeps the ratio of sides to multiples (keep_aspect_ratio, ensure_multiple_of)"
    return "" if "image_mean" in config or kind == "mobilevit" else "has no image_mean"


def _hugging_face_sizes(
    config: dict[str, Any], source: str
) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None]:
    size, cropped = config.get("size"), bool(config.get("do_center_crop"))
    crop = _pair(config.get("crop_size", size)) if cropped else None
    if not config.get("do_resize", True) or size is None:
        return None, crop
    if isinstance(size, dict) and "longest_edge" in size:
        raise DataError(
            f"{source}: resizes by its longest edge, which is not known here; use module:function"
        )
    shorter = size.get("shortest_edge") if isinstance(size, dict) else (size if cropped else None)
    if config.get("crop_pct") and shorter is not None:  # ConvNeXt: crops below 384, squashes from there
        if shorter >= 384:
            return (shorter, shorter), None
        return int(shorter / config["crop_pct"]), (shorter, shorter)
    return (shorter if shorter is not None else _pair(size)), crop


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        return (int(size["height"]), int(size["width"])) if edge is None else (int(edge), int(edge))
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) else (int(size), int(size))


def _filter(name: str | int, source: str) -> str:
    if isinstance(name, int) and 0 <= name < len(_FILTERS):
        return _FILTERS[name]
    if name in _FILTERS:
        return str(name)
    raise DataError(f"{source}: interpolation {name} is not one of {', '.join(_FILTERS)}")
