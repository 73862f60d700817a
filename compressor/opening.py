"""What the user named, opened: the options, the model, its graph, and the data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import ExportedProgram

from . import camera, data, detectors, postprocess
from .blend import combination
from .capture import capture
from .data import Data
from .errors import DataError, FileError, UsageError, nearest
from .ir import Graph, Input
from .load import Loaded, load
from .receipt import continued, rename
from .texts import Reading
from .trainable import Trainable

SAMPLES = 8  # generated held-out samples where the user gave no data
FORMATS = ("onnx", "pt2")  # what --emit takes; onnx is always written
CHECKED = 64  # held-out samples that every contract is checked on, at most
MOST_HELD_OUT = 256  # or little more: what would be idle is better learned from
SEEN = 512  # samples that statistics are taken of, at most; a pass that learns sees all


@dataclass(frozen=True)
class Options:
    """Everything that `compress` takes besides its main arguments; the command line has the same names.

    kwargs: keyword example inputs. inputs: descriptions (`x:f32[?,3,224,224]`) where there is no example.
    model_spec: the architecture of a checkpoint, `--model` of the command line. adapter: folders of PEFT adapters,
    `DIR` or `DIR:0.5`. combine: makes one LoRA of several, `cat` or `ties:0.5`. task: of a Hugging Face folder.
    trust_pickle: unpickle for real, which runs code in the file. allow_missing: patterns of parameters that the file
    may lack.
    evaluate: data with labels, a function, or `module:function`; adds a metric to every row of the report.
    `nms(...)`: detections matched with the original's, of a model that is emitted without suppression.
    preprocess: how images become inputs. image_input: `uint8,nhwc,bgr`, the pixels that the compiled model takes;
    layout, channel order and the normalisation of `preprocess` become part of it, and integers in data are such pixels.
    Example inputs stay those of the model itself. text_field, label_field: what to read of files of texts, the latter
    for `evaluate`. calib_limit: how many samples are read at most. dynamic: True keeps the batch free, False fixes it,
    None asks the target. opset: of the emitted file. min_ort: the oldest release of ONNX Runtime that must load it
    (`1.17`). seed: of all that is random. tolerance: relative error of `exact` and `masked`, in place of their own.
    postprocess: `nms(iou=0.5,conf=0.25,max=100)` lets the emitted model of a detector end in non-maximum suppression,
    see `postprocess`; rows of the report say how many of the original's detections are found again, on the data of
    `evaluate`, labels or not, or on the held-out samples.
    measure: False makes no decision by the stopwatch and reports no latency. latency_table: a report.json whose
    measurements are replayed instead of taken. latency_cmd: measures on the target where that is not this machine, see
    `device`. max_mb: what each of the model's files may weigh, in MB of 10^6 bytes. emit: formats to write beside ONNX:
    `pt2`. print_after, stop_after: names of passes. limit: name of a pass to how many rewrites it may make. time: say
    where the time went. command: what to write in the report. console: of rich, for bars; log: is told what begins and
    ends, see `progress.Watch`.
    """

    kwargs: Mapping[str, Any] | None = None
    inputs: Sequence[str | Input] = ()
    model_spec: str | None = None
    adapter: str | Path | Sequence[str | Path] = ()
    combine: str | None = None
    task: str | None = None
    trust_pickle: bool = False
    allow_missing: Sequence[str] = ()
    evaluate: Any = None
    postprocess: str | None = None
    preprocess: Any = None
    image_input: str | None = None
    text_field: str | None = None
    label_field: str = "label"
    calib_limit: int = 1024
    dynamic: bool | None = None
    opset: int | None = None
    min_ort: str | None = None
    seed: int = 0
    tolerance: float | None = None
    measure: bool = True
    latency_table: str | Path | None = None
    latency_cmd: str | None = None
    max_mb: float | None = None
    emit: str | Sequence[str] = ()
    print_after: Sequence[str] = ()
    stop_after: str | None = None
    limit: Mapping[str, int] = field(default_factory=dict)
    time: bool = False
    command: str | None = None
    console: Any = None
    log: Callable[[dict[str, Any]], None] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        known = {f.name for f in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise UsageError(f"unknown option '{name}'{nearest(name, known)}")
        made = cls(**options)
        for name in made.formats:
            if name not in FORMATS:
                raise UsageError(f"--emit {name}: no such format; there are {', '.join(FORMATS)}")
        if made.image_input is not None:
            camera.parse(made.image_input)
        if made.postprocess is not None:
            postprocess.parse(made.postprocess)
        return made

    @property
    def formats(self) -> tuple[str, ...]:
        """What `emit` names: one word, words between commas, or several of these."""
        words = [self.emit] if isinstance(self.emit, str) else self.emit
        return tuple(
            dict.fromkeys(part.strip() for word in words for part in word.split(",") if part.strip())
        )


def load_model(model: Any, opt: Options) -> Loaded:
    if isinstance(model, (str, Path)):
        return load(
            model,
            model=opt.model_spec,
            adapter=opt.adapter,
            combine=combination(opt.combine, opt.seed),
            task=opt.task,
            trust_pickle=opt.trust_pickle,
            allow_missing=opt.allow_missing,
        )
    if opt.adapter or opt.combine or opt.task:
        raise UsageError(
            "adapter, combine and task are for models in files; attach the adapter to the module itself"
        )
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise UsageError(
            f"a model is a torch module, an exported program or a file, not {type(model).__name__}"
        )
    path = Path(f"{type(model).__name__}")
    loaded = Loaded(model=model, path=path, sha256="", inputs=detectors.inputs(model))
    if isinstance(model, Trainable) and model.receipt is not None:
        return dataclasses.replace(loaded, continued=continued(model.receipt, model.state_dict()))
    return loaded


def capture_model(loaded: Loaded, example: Any, opt: Options) -> Graph:
    specs = [data.parse_input(i) if isinstance(i, str) else i for i in opt.inputs]
    args, kwargs = example, opt.kwargs
    if args is None and kwargs is None and not specs:
        args, kwargs = loaded.example or (None, None)
        specs = list(loaded.inputs)
    graph = capture(loaded.model, args, kwargs, inputs=specs)
    if loaded.continued is not None and isinstance(loaded.model, ExportedProgram) and not specs:
        rename(graph, loaded.continued.receipt)
    return graph


def take_pixels(graph: Graph, opt: Options) -> Options:
    """Makes the graph take pixels where the options ask for it; returns the options that data are then opened with."""
    if opt.image_input is None:
        return opt
    return dataclasses.replace(opt, preprocess=camera.attach(graph, opt.image_input, opt.preprocess))


def require_finite(graph: Graph) -> None:
    for name in sorted(graph.parameters):
        tensor = graph.tensors.get(name)
        if tensor is None or not tensor.is_floating_point() or not tensor.numel():
            continue
        if not all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
            raise FileError(f"parameter {name} holds NaN or inf; the model is broken before any pass")


def given(loaded: Loaded, example: Any) -> bool:
    """True where the example inputs are the user's own and not made up from their shapes."""
    return example is not None or loaded.example is not None


class Streams(NamedTuple):
    """What was given, all of it: what is held out, and the rest, of which `statistics` are a share, evenly drawn."""

    source: Data | None
    rest: Data | None
    statistics: Data | None
    held_out: Data


def streams(
    graph: Graph, source: Any, opt: Options, loaded: Loaded, example: Any, sizes: Mapping[str, int]
) -> Streams:
    """The user's data, in their parts; without data, held-out samples are generated.

    sizes: of dynamic axes that the emitted model fixes.
    """
    if source is None:
        sizes = {} if given(loaded, example) else data.table_sizes(graph)
        made = data.synthetic(graph.inputs, graph.example, samples=SAMPLES, seed=opt.seed, table_sizes=sizes)
        return Streams(None, None, None, made)
    text = reading(graph, loaded, opt, sizes)
    opened = data.open_data(
        source,
        graph.inputs,
        preprocess=opt.preprocess,
        text=text,
        limit=opt.calib_limit,
        batch_size=data.batch_for(graph),
    )
    _check_indices(opened, graph)
    rest, held_out = data.split(opened, every=max(5, opened.samples // MOST_HELD_OUT), seed=opt.seed)
    return Streams(opened, rest, rest.spread(SEEN), held_out.limited(CHECKED))


def reading(
    graph: Graph, loaded: Loaded, opt: Options, sizes: Mapping[str, int], label: str | None = None
) -> Reading:
    """How texts become inputs of this model. Where its tokenizer does not say how many tokens it takes, its table of
    positions does, which some models (RoBERTa) enter behind the padding's number."""
    config = getattr(loaded.model, "config", None)
    positions, padding = (getattr(config, name, None) for name in ("max_position_embeddings", "pad_token_id"))
    longest = positions - (padding or 0) - 1 if isinstance(positions, int) else None
    return Reading(
        tokenizer=loaded.tokenizer,
        text=opt.text_field,
        label=label,
        classes=loaded.labels,
        longest=longest,
        tables=data.table_sizes(graph),
        sizes=sizes,
        seed=opt.seed,
    )


def _check_indices(opened: Data, graph: Graph) -> None:
    """DataError for indices outside the tables that they are looked up in, such as tokens of another vocabulary."""
    tables = data.table_sizes(graph)
    places = [(i, spec.name, tables[spec.name]) for i, spec in enumerate(graph.inputs) if spec.name in tables]
    for number, batch in enumerate(opened) if places else ():
        for i, name, size in places:
            value = batch.inputs[i]
            if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < size:
                raise DataError(
                    f"{opened.description}: batch {number} has {int(value.min())} to {int(value.max())} in {name}, "
                    f"which the model looks up in a table of {size}: was it made for another model?"
                )
