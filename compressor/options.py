"""The options of the commands, each said once, and the checks that need no heavy import."""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from . import completion, config
from .errors import FileError

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _all(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def apply(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


def _limits(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, int]:
    """`PASS=N` -> {PASS: N}."""
    limits = {}
    for value in values:
        name, _, number = value.partition("=")
        if not name or not number.isdigit():
            raise click.BadParameter(f"'{value}' is not PASS=N, for example fold=3", ctx, option)
        limits[name] = int(number)
    return limits


class _Finite(click.FloatRange):
    """Not `inf` and not `nan`, which Python takes for numbers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a number.", param, ctx)
        return found


_POSITIVE = _Finite(0, min_open=True)
_POSTPROCESS = click.option(
    "--postprocess",
    metavar="NMS",
    help="Let the emitted model of a detector end in non-maximum suppression: nms(iou=0.5,conf=0.25,max=100). What "
    "the model does not tell: boxes=NAME, scores=NAME, format=xyxy or cxcywh, activation=none, sigmoid or softmax, "
    "background=CLASS or none.",
)

_TARGET = click.option(
    "--target",
    metavar="NAME",
    shell_complete=completion.targets,
    help="Where the model will run; default: this machine, cpu or, without VNNI, cpu-avx2.",
)
_CALIB = click.option(
    "--calib",
    "calibration",
    metavar="DATA",
    shell_complete=completion.files,
    help="Calibration data: .npz (keys are input names), .npy, .pt, .safetensors, a folder of images, or texts "
    "as .txt, .jsonl, .csv, .tsv or .parquet.",
)
_CALIB_LIMIT = click.option(
    "--calib-limit",
    type=click.IntRange(1),
    metavar="N",
    help="Read at most N samples; default: 1024. Statistics are of some 512, `distill` learns from all.",
)
_EVAL = click.option(
    "--eval",
    "evaluate",
    metavar="DATA",
    shell_complete=completion.files,
    help="Data with labels (key y) or module:function; adds a metric to every row of the report. For a detector: "
    "nms(...), or data without labels beside --postprocess.",
)
_LABEL_FIELD = click.option(
    "--label-field", metavar="NAME", help="Which field of texts for --eval is the label; default: label."
)
_DYNAMIC = click.option(
    "--dynamic/--static",
    default=None,
    help="Leave free axes free, or fix them all: the batch to the target's size or 1, others to the example's; "
    "default: the target's.",
)
_OPSET = click.option("--opset", type=int, metavar="N", help="Opset of model.onnx; default: the target's.")
_MIN_ORT = click.option(
    "--min-ort",
    metavar="VERSION",
    help="Write a file that this release of ONNX Runtime still loads, for example 1.15; default: 1.17.",
)
_SEED = click.option(
    "--seed", type=click.IntRange(0), metavar="N", help="Seed of all that is random; default: 0."
)
_LATENCY_CMD = click.option(
    "--latency-cmd",
    metavar="CMD",
    help="Measure on the device: a shell command with {onnx} for the path of the model, whose last printed number "
    "is milliseconds: 'sh examples/latency_over_adb.sh {onnx}', or 'scp -q {onnx} pi:m.onnx && ssh pi python3 "
    "bench.py m.onnx'.",
)


def _output(words: str) -> Callable[[_Command], _Command]:
    return click.option("--output", "-o", metavar="DIR", shell_complete=completion.files, help=words)


compiling = _all(
    click.option(
        "--passes",
        metavar="SPEC",
        shell_complete=completion.passes,
        help="Passes in order, e.g. merge,prune(macs=0.5),int8. Default: the target's own recipe.",
    ),
    _TARGET,
    _CALIB,
    _CALIB_LIMIT,
    _EVAL,
    _LABEL_FIELD,
    _POSTPROCESS,
    _output("Folder for the result; default: ./<name>-compressed."),
    click.option(
        "--emit",
        multiple=True,
        metavar="FORMAT",
        help="What to write beside model.onnx: pt2, a PyTorch program to train or to compress further. Repeatable.",
    ),
    _DYNAMIC,
    _OPSET,
    _MIN_ORT,
    click.option(
        "--max-mb",
        type=_POSITIVE,
        metavar="N",
        help="Fail where a file of the model is larger than N MB (of 10^6 bytes); nothing is written then.",
    ),
    _SEED,
    click.option(
        "--tolerance",
        type=_POSITIVE,
        metavar="X",
        help="Allowed relative error of exact passes, instead of the contract's own.",
    ),
    click.option(
        "--measure/--no-measure",
        default=True,
        help="Without measuring, no decision depends on a stopwatch; default: measure.",
    ),
    click.option(
        "--latency-table",
        metavar="REPORT",
        help="Replay what an earlier run measured (its report.json), so that the same decisions are made again.",
    ),
    _LATENCY_CMD,
)


def _configured(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Reads --config, or a compress.toml that is there, before any other option is looked at."""
    beside = Path(config.NAME)
    path = Path(existing(value)) if value is not None else beside
    if value is None and (ctx.resilient_parsing or not beside.is_file()):
        return None
    ctx.default_map = config.read(path, ctx.command, named=value is not None)
    return str(path)


planning = _all(
    click.option(
        "--dry-run",
        is_flag=True,
        help="Show the plan and write nothing: passes in order, the target's settings, sizes as estimates, what wants "
        "data.",
    ),
    click.option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=_configured,
        shell_complete=completion.files,
        help=f"Options from a TOML file, under the names of their flags; default: ./{config.NAME} if it is there. What "
        "is typed beats what is in it.",
    ),
    click.option(
        "--save-config",
        metavar="FILE",
        shell_complete=completion.files,
        help="Write what was given into such a file.",
    ),
)

debugging = _all(
    click.option(
        "--print-after",
        multiple=True,
        metavar="PASS",
        shell_complete=completion.passes,
        help="Print the graph after a pass. Repeatable.",
    ),
    click.option(
        "--stop-after",
        metavar="PASS",
        shell_complete=completion.passes,
        help="Stop after a pass; nothing is emitted.",
    ),
    click.option(
        "--limit",
        multiple=True,
        metavar="PASS=N",
        callback=_limits,
        help="Let a pass make its first N rewrites only, to find the one that matters. Repeatable.",
    ),
    click.option("--time", is_flag=True, help="Show where the time went."),
)

loading = _all(
    click.option(
        "--model",
        "model_spec",
        metavar="WHAT",
        help="Architecture of a checkpoint: package.module:factory, file.py:factory(num_classes=37), "
        "torchvision:NAME, timm:NAME or hf:DIR.",
    ),
    click.option(
        "--adapter",
        metavar="DIR[:WEIGHT]",
        multiple=True,
        help="PEFT adapter (LoRA and others) on top of the model, its change times WEIGHT. Repeatable.",
    ),
    click.option(
        "--combine",
        metavar="HOW",
        help="Make one LoRA of several: linear, cat, svd, ties:DENSITY, dare:DENSITY ...; default: side by side.",
    ),
    click.option(
        "--task",
        metavar="NAME",
        help="What a Hugging Face folder is for: text-classification, causal-lm, feature-extraction ...; "
        "default: the adapter's task, then the architecture in its config.json.",
    ),
    click.option(
        "--input",
        "inputs",
        metavar="SPEC",
        multiple=True,
        help="An input that the file does not describe: x:f32[?,3,224,224], with ? for dynamic. Repeatable.",
    ),
    click.option(
        "--preprocess",
        metavar="HOW",
        help="For images: imagenet, a timm or Hugging Face preprocessing file, or module:function.",
    ),
    click.option(
        "--image-input",
        metavar="WORDS",
        help="Let the compiled model take pixels 0..255 as a camera gives them: uint8 or float32, nhwc or nchw, rgb "
        "(default) or bgr, as in uint8,nhwc,bgr. The normalisation of --preprocess becomes part of the model.",
    ),
    click.option(
        "--text-field",
        metavar="NAME",
        help="Which field of a file of texts holds them; NAME,NAME for pairs.",
    ),
    click.option(
        "--trust-pickle",
        is_flag=True,
        help="Unpickle the file for real, which runs code that is in it. Only for files you trust.",
    ),
    click.option(
        "--allow-missing",
        metavar="PATTERN",
        multiple=True,
        help="Accept parameters that the file lacks and whose names match. Repeatable.",
    ),
)

comparing = _all(
    click.option(
        "--data",
        metavar="DATA",
        shell_complete=completion.files,
        help="Inputs to compare on; default: generated ones. With --against: what the run was calibrated on.",
    ),
    click.option(
        "--against",
        metavar="REPORT",
        shell_complete=completion.files,
        help="Check every claim of a report.json again: hashes, sizes, operators, losses, metrics, and latency as a "
        "ratio. MODEL and ONNX are then those that it names, if they are not given.",
    ),
    click.option(
        "--eval", "evaluate", metavar="DATA", help="With --against: what the metrics were measured on."
    ),
    click.option(
        "--measure/--no-measure",
        default=True,
        help="With --against: time the file, or not; default: measure.",
    ),
    click.option("--tolerance", type=_POSITIVE, metavar="X", help="Allowed relative error."),
    click.option(
        "--layers",
        is_flag=True,
        help="Compare the values inside, too, layer by layer; where an output differs, the first that is wrong is "
        "named anyway.",
    ),
    _POSTPROCESS,
)

_ENGINES = (
    click.option(
        "--engine",
        metavar="NAME",
        help="Where trials run: local, processes of this machine, or ray, a Ray cluster; default: local.",
    ),
    click.option(
        "--workers", type=click.IntRange(1), metavar="N", help="Local processes; default: one for each core."
    ),
    click.option(
        "--ray-address", metavar="ADDRESS", help="Of the cluster; default: auto, the one of this machine."
    ),
    click.option("--trial-cpus", type=_POSITIVE, metavar="N", help="Cores of one trial; default: 1."),
)

tuning = _all(
    click.option(
        "--passes",
        metavar="SPACE",
        help="What to search: a spec with {several,values}, ranges 0.4..0.9, passes with or without (prune?), and "
        "passes that take turns ({int8,fp16,none}). Default: what suits the model and the target.",
    ),
    _TARGET,
    _CALIB,
    _CALIB_LIMIT,
    _EVAL,
    _LABEL_FIELD,
    _POSTPROCESS,
    click.option(
        "--objective",
        "objectives",
        multiple=True,
        metavar="NAME",
        help="What to make small: latency, size, macs or params; default: latency. Repeatable: then the result is a "
        "front, and the first decides what is best.",
    ),
    click.option(
        "--constraint",
        "constraints",
        multiple=True,
        metavar="LIMIT",
        help="drop<=1.0 (points of the metric), metric, sqnr (dB), cosine, agreement (of top-1), latency_ms, speedup, "
        "size_mb, macs, params (shares). Repeatable. Default: drop<=1.0 with --eval, else sqnr>=20.",
    ),
    click.option("--trials", type=click.IntRange(1), metavar="N", help="Try at most N specs; default: 40."),
    click.option(
        "--timeout", type=_POSITIVE, metavar="SECONDS", help="Begin no round that would not end in time."
    ),
    click.option("--sampler", metavar="NAME", help="tpe, nsga2 or random; default: tpe."),
    _output("Folder for the search; default: ./<name>-tuned."),
    click.option("--resume", is_flag=True, help="Go on with the search in that folder."),
    *_ENGINES,
    click.option(
        "--latency-table",
        metavar="TUNE.JSON",
        help="Replay what an earlier search measured, so that the same models win again.",
    ),
    _LATENCY_CMD,
    _SEED,
    _OPSET,
    _MIN_ORT,
    _DYNAMIC,
)

sweeping = _all(
    click.option(
        "--passes",
        metavar="SPACE",
        required=True,
        help="What to compare: a spec with {several,values}, ranges 0.4..0.9/0.1, and passes that take turns.",
    ),
    click.option("--seeds", type=click.IntRange(1), metavar="N", help="Seeds of every spec; default: 1."),
    click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of a table."),
    _TARGET,
    _CALIB,
    _CALIB_LIMIT,
    _EVAL,
    _LABEL_FIELD,
    _output("Folder for models and sweep.csv; default: ./<name>-swept."),
    *_ENGINES,
)

listing = _all(
    _output("Folder for the models; default: that of the list."),
    *_ENGINES,
)


class Numbers(click.ParamType):  # type: ignore[type-arg]  # which click 8.1 does not take
    """A whole number, or several between commas."""

    name = "numbers"

    def __init__(self, least: int, most: int | None = None) -> None:
        self.least, self.most = least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | tuple[int, ...]:
        words = str(value).split(",")
        most = math.inf if self.most is None else self.most
        if not all(word.isdigit() and self.least <= int(word) <= most for word in words):
            span = f"from {self.least} {'on' if self.most is None else f'to {self.most}'}"
            self.fail(f"'{value}' is not a number {span}, or several between commas", param, ctx)
        found = tuple(dict.fromkeys(map(int, words)))
        return found if len(found) > 1 else found[0]


timing = _all(
    click.option(
        "--threads",
        type=Numbers(0, 1024),
        metavar="N,...",
        show_default="1; with --advise the most that are tried, all cores",
        help="Inside an operator; 0: all cores. Several make a grid with --batch.",
    ),
    click.option(
        "--batch",
        type=Numbers(1),
        metavar="N,...",
        default=1,
        show_default=True,
        help="Size of a dynamic batch.",
    ),
    click.option("--seconds", type=_POSITIVE, default=5.0, show_default=True, help="How long to measure."),
)

printing = _all(
    click.option("--quiet", "-q", is_flag=True, help="Print errors only."),
    click.option(
        "--verbose",
        "-v",
        is_flag=True,
        help="Say on standard error what begins and ends, and how long it took.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Of what --verbose says; json: an object a line, without --verbose too.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables."),
)


# Of the command line itself, and not of the api.
PRINTING = ("quiet", "verbose", "log_format", "as_json", "as_csv", "dry_run", "config", "save_config")


def given() -> dict[str, Any]:
    """The options that the user typed, or has in a file, by the api's names; for others the api's defaults hold."""
    return _from(ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)


def typed() -> list[str]:
    """The options that the user typed, and has not in a file."""
    return list(_from(ParameterSource.COMMANDLINE))


def _from(*sources: ParameterSource) -> dict[str, Any]:
    ctx = click.get_current_context()
    skip = {*PRINTING, *(p.name for p in ctx.command.params if isinstance(p, click.Argument))}
    return {
        name: value
        for name, value in ctx.params.items()
        if name not in skip and ctx.get_parameter_source(name) in sources
    }


# Options of a recorded command that only say how to read what is there. Those that run code, of the user's or of a
# checkpoint's, are not taken from a file: whoever checks it gives them again.
_READING = {
    *(
        "adapter",
        "allow_missing",
        "calib_limit",
        "calibration",
        "combine",
        "dynamic",
        "evaluate",
        "image_input",
    ),
    *("inputs", "label_field", "postprocess", "preprocess", "task", "text_field"),
}


def recorded(command: str) -> dict[str, Any]:
    """How a recorded `compress MODEL ...` reads model and data, by the api's names; nothing that would run code.

    Files that are not there any more are left out, and so is everything of a command that is none.
    """

    @click.command()
    @click.argument("model")
    @compiling
    @loading
    @debugging
    @printing
    def typed(**_: Any) -> None:
        """Never called."""

    try:
        words = shlex.split(command)[1:]
        ctx = typed.make_context("compress", list(words))
    except (ValueError, click.ClickException, click.exceptions.Exit):
        return {}
    with ctx:
        found = {name: value for name, value in given().items() if name in _READING}
    for name in ("calibration", "evaluate", "preprocess"):
        value = found.get(name)
        words_of_ours = value == "imagenet" or str(value).startswith("nms")
        if value is not None and not words_of_ours and not Path(value).exists():
            del found[name]
    return found


def existing(name: str) -> str:
    """The name, if it is there; FileError with the nearest name beside it otherwise."""
    path = Path(name)
    if path.exists():
        return name
    beside = path.parent
    names = [one.name for one in beside.iterdir()] if beside.is_dir() else []
    close = difflib.get_close_matches(path.name, names, 1)
    hint = f"; did you mean '{beside / close[0]}'?" if close else ""
    raise FileError(f"{name}: no such file{hint}")
