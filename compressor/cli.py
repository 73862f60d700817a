"""The command line: words in, one call of the api, tables out.

Thin on purpose. Whatever is heavy (torch, onnxruntime, rich) is imported inside the commands, so that
`--help` and a mistyped file name answer at once. `main` is the one place that turns errors into exit codes.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import CompressorError, ContractError, FileError, UsageError, printable
from .options import comparing, compiling, debugging, existing, given, loading, printing, timing

BUG, INTERRUPTED, PIPE_CLOSED = 70, 130, 141

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_EXIT_CODES = (
    "Exit codes: 0 done, 2 wrong usage, 3 model file, 4 data, 5 cannot write, 6 model not supported, "
    "7 a pass broke its contract, 8 the runtime refused the model, 70 a bug, 130 interrupted. "
    "With --traceback an error also shows where it was raised."
)


class Commands(click.Group):
    """A group whose help leads with its default command: `compress MODEL` needs no command name."""

    def choose(self, args: Sequence[str]) -> click.Command:
        """The group itself for a command name or an option of its own, else the default command.

        FileError for a word that is neither a file nor a command but almost a command.
        """
        first = args[0] if args else "--help"
        if first in self.commands or first in ("-h", "--help", "--version"):
            return self
        close = difflib.get_close_matches(first, self.commands, 1)
        if close and not first.startswith("-") and not os.path.lexists(first):
            raise FileError(f"{first}: no such file; did you mean the command '{close[0]}'?")
        return compress_model

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "MODEL [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND ...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        compress_model.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Every error is one line on standard error."""
    args = list(sys.argv[1:] if argv is None else argv)
    trace = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    typed = shlex.join(["compress", *args])
    if argv is None and not (trace or sys.warnoptions):
        warnings.simplefilter("ignore")  # the libraries' own; ours reach the user as notices
    try:
        with commands.choose(args).make_context(_program(), args or ["--help"], obj=typed) as ctx:
            ctx.command.invoke(ctx)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else _program()
        return _fail(f"{error.format_message()} (see `{where} --help`)", 2, error if trace else None)
    except CompressorError as error:
        return _fail(str(error), error.exit_code, error if trace else None)
    except KeyboardInterrupt as error:
        return _fail("interrupted", INTERRUPTED, error if trace else None)
    except BrokenPipeError:
        # Python flushes once more when it exits, which must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except MemoryError as error:
        return _fail("out of memory; fewer samples (--calib-limit) need less", 1, error if trace else None)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".split("\n")[0]
        hint = "" if trace else "; run it again with --traceback and report what it prints"
        return _fail(f"{what} (this is a bug in compressor{hint})", BUG, error if trace else None)


def _fail(message: str, code: int, error: BaseException | None = None) -> int:
    """Print `error: first line`, further lines (lists of names) indented below it, and return the code."""
    if error is not None:
        traceback.print_exception(type(error), error, error.__traceback__)
    first, *rest = printable(message).strip().split("\n")
    click.echo("\n  ".join([f"error: {first}", *(line.strip() for line in rest if line.strip())]), err=True)
    return code


def _program() -> str:
    """The words that started this process, for messages that show a command to type."""
    name = Path(sys.argv[0]).stem
    if name == "__main__":
        return "python -m compressor"
    return name if name in ("compress", "compressor") else "compress"


def _next(*words: str | os.PathLike[str]) -> None:
    """The last line: the command to type next."""
    click.echo(printable(f"\n{_program()} {shlex.join(os.fspath(word) for word in words)}"))


# ------------------------------------------------------------------------------ commands


@click.group(cls=Commands, context_settings=_SETTINGS, epilog=_EXIT_CODES)
@click.version_option(__version__, prog_name="compressor")
def commands() -> None:
    """Compile a PyTorch model to a smaller, faster ONNX model, and prove what each step did to the numbers.

    MODEL is a .pt2, .safetensors, .pt, .pth or .ckpt file, or a folder: a Hugging Face model, a
    sentence-transformers pipeline, or a PEFT adapter, whose base model is found on this disk.
    """


@click.command("compress", context_settings=_SETTINGS, epilog=_EXIT_CODES)
@click.argument("model")
@compiling
@loading
@debugging
@printing
def compress_model(model: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Compile MODEL to a smaller, faster ONNX model.

    Every pass is checked against its contract on data that it has not seen, and the emitted file is run and
    compared with the original. If a check fails, nothing is written.
    """
    existing(model)
    from . import console
    from .report import dumps, render

    errors = console.progress(quiet)
    with console.working(errors, "loading PyTorch"):
        from . import api
    typed = click.get_current_context().obj
    result = api.compress(model, command=typed, console=errors, **given())
    if as_json:
        click.echo(dumps(result.report), nl=False)
    elif not quiet:
        render(result.report, console.output())
        _next(*(("bench", result.onnx) if result.onnx else ("inspect", model)))


@commands.command()
@click.argument("model")
@click.argument("onnx")
@comparing
@loading
@printing
def verify(model: str, onnx: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Compare MODEL with an ONNX file, output by output; exit code 7 if they differ."""
    existing(model)
    existing(onnx)
    from . import console

    with console.working(console.progress(quiet), "comparing"):
        from . import api

        result = api.verify(model, onnx, **given())
    if as_json:
        _json(result)
    elif not quiet:
        console.show_verification(result, console.output())
        _next("bench", onnx)
    if not result.get("ok", True):
        raise ContractError(f"{onnx}: its outputs differ from those of {model}")


@commands.command()
@click.argument("path", metavar="REPORT|ONNX|MODEL")
@click.option(
    "--groups",
    is_flag=True,
    help="Show which channels pruning can take or took, and why the others must stay.",
)
@click.option(
    "--layers",
    is_flag=True,
    help="Show what each operator of a model costs: parameters, multiplications, bytes moved.",
)
@click.option(
    "--partitions",
    metavar="NAMES",
    help="Show what a phone's accelerators take of an ONNX file, in how many pieces, and why not the rest: nnapi, "
    "coreml, xnnpack, qnn, several between commas, or all.",
)
@loading
@printing
def inspect(
    path: str,
    groups: bool,
    layers: bool,
    partitions: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show a report, an ONNX file, or what a model holds, its adapters first."""
    found = Path(existing(path))
    if (found / "report.json").is_file():
        found = found / "report.json"
    from . import console
    from .report import read_report, render, showing

    if found.suffix == ".json" and found.is_file():
        report = read_report(found)
        emitted = found.parent / ((report.get("emitted") or {}).get("file") or "model.onnx")
        if partitions:
            found = Path(existing(str(emitted)))
    if found.suffix == ".json" and found.is_file():
        if layers:
            raise UsageError(
                f"{found}: --layers is for a PyTorch model; inspect the model of this run instead"
            )
        if as_json:
            _json(report)
        elif groups and not quiet:
            with showing(found):
                console.show_ledger(console.ledger_of(report, found), console.output())
        elif not quiet:
            with showing(found):
                render(report, console.output(), details=True)
            if emitted.is_file():
                _next("bench", emitted)
        return
    with console.working(console.progress(quiet), "reading"):
        from . import api

        facts = api.inspect(found if partitions else path, **given())
    if as_json:
        _json(facts)
    elif partitions and not quiet:
        console.show_partitions(facts["partitions"], console.output())
        _next("bench", found)
    elif (groups or layers) and not quiet:
        if layers:
            console.show_layers(facts, console.output())
        if groups:
            console.show_ledger(facts, console.output())
        _next(*((path, "--passes", "merge,prune") if groups else ("inspect", path, "--groups")))
    elif not quiet:
        console.show_facts(facts, console.output())
        if found.suffix == ".onnx":
            _next("bench", path)
        elif "tensors" in facts:
            model = facts.get("architecture") or "path/to/your/model.py:FACTORY"
            _next(path, "--model", model, "--input", "x:f32[?,3,224,224]")
        elif "problem" not in facts:
            _next(path, *(word for one in options["adapter"] for word in ("--adapter", one)))


@commands.command()
@click.argument("onnx", nargs=-1, required=True, metavar="ONNX [ONNX]")
@timing
@click.option("--advise", is_flag=True, help="Of one file: which threads, spinning and arena suit it here.")
@printing
def bench(onnx: tuple[str, ...], quiet: bool, as_json: bool, advise: bool, **_: Any) -> None:
    """Measure the latency of ONNX files in turns, A B A B, and compare their medians."""
    for one in onnx:
        existing(one)
    from . import console

    with console.working(console.progress(quiet), "measuring"):
        from . import api

        rows = api.bench(list(onnx), **given())
    if as_json:
        _json(rows)
    elif not quiet:
        show = console.show_settings if advise else console.show_latencies
        show(rows, console.output())
        _next("inspect", onnx[0])


@commands.command()
def passes() -> None:
    """List the passes with their options."""
    from . import console, registry

    console.show_passes(registry.passes(), console.output())
    _next("MODEL", "--passes", "merge,fold")


@commands.command()
def targets() -> None:
    """List the targets with their settings."""
    from . import console, registry

    console.show_targets(registry.targets(), console.output())
    _next("MODEL", "--target", "cpu")


def _json(value: Any) -> None:
    from .report import dumps

    click.echo(dumps(value), nl=False)
