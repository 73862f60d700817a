"""The commands: words in, one call of the api, tables out.

Thin on purpose. Whatever is heavy (torch, onnxruntime, rich) is imported inside the commands, so that
`--help` and a mistyped file name answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__, completion, config
from .errors import ContractError, FileError, UsageError, printable
from .options import (
    comparing,
    compiling,
    debugging,
    existing,
    given,
    listing,
    loading,
    planning,
    printing,
    recorded,
    sweeping,
    timing,
    tuning,
    typed,
)

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

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Commands, and what may begin the default command."""
        model = completion.files(ctx, self.params[0], incomplete) if not incomplete.startswith("-") else []
        return [
            *super().shell_complete(ctx, incomplete),
            *compress_model.shell_complete(ctx, incomplete),
            *model,
        ]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "MODEL [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND ...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        compress_model.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def program() -> str:
    """The words that started this process, for messages that show a command to type."""
    name = Path(sys.argv[0]).stem
    if name == "__main__":
        return "python -m compressor"
    return name if name in ("compress", "compressor") else "compress"


def _next(*words: str | os.PathLike[str]) -> None:
    """The last line: the command to type next."""
    click.echo(printable(f"\n{program()} {shlex.join(os.fspath(word) for word in words)}"))


@click.group(cls=Commands, context_settings=_SETTINGS, epilog=_EXIT_CODES)
@click.version_option(__version__, prog_name="compressor")
def commands() -> None:
    """Compile a PyTorch model to a smaller, faster ONNX model, and prove what each step did to the numbers.

    MODEL is a .pt2, .safetensors, .pt, .pth or .ckpt file, or a folder: a Hugging Face model, a
    sentence-transformers pipeline, or a PEFT adapter, whose base model is found on this disk.
    """


@click.command("compress", context_settings=_SETTINGS, epilog=_EXIT_CODES)
@click.argument("model", shell_complete=completion.files)
@compiling
@loading
@planning
@debugging
@printing
def compress_model(
    model: str, quiet: bool, verbose: bool, log_format: str, as_json: bool, **options: Any
) -> None:
    """Compile MODEL to a smaller, faster ONNX model.

    Every pass is checked against its contract on data that it has not seen, and the emitted file is run and
    compared with the original. If a check fails, nothing is written.
    """
    ctx = click.get_current_context()
    typed = ctx.obj
    if options["config"]:
        typed = shlex.join(["compress", *config.words(config.given(ctx))])
        if not quiet:
            click.echo(f"options of {options['config']} hold where none is typed", err=True)
    existing(model)
    if options["save_config"]:
        config.save(Path(options["save_config"]), config.given(ctx))
    from . import console
    from .report import dumps, render

    shown = console.logging(quiet, verbose, log_format)
    with console.working(shown["console"], "loading PyTorch"):
        from . import api
    if options["dry_run"]:
        plan = api.plan(model, **shown, **given())
        if as_json:
            _json(plan)
        elif not quiet:
            console.show_plan(plan, console.output())
        return
    with _heard(as_json):
        result = api.compress(model, command=typed, **shown, **given())
    if as_json:
        click.echo(dumps(result.report), nl=False)
    elif not quiet:
        render(result.report, console.output())
        _next(*(("bench", result.onnx) if result.onnx else ("inspect", model)))


@commands.command()
@click.argument("model")
@tuning
@loading
@printing
def tune(model: str, quiet: bool, verbose: bool, log_format: str, as_json: bool, **options: Any) -> None:
    """Search for the passes that make MODEL fastest, or smallest, within constraints.

    Every trial is a whole, verified compilation. The best model is in best/ of the output folder, those that no other
    beats are in pareto/, and a search that was stopped goes on with --resume.
    """
    existing(model)
    from . import console, console_search

    shown = console.searching(quiet, verbose, log_format)
    with console.working(shown["console"], "loading PyTorch"):
        from . import api
    study = api.tune(model, **shown, **given())
    summary = study.summary()
    if as_json:
        _json(summary)
    elif not quiet:
        console_search.show_search(summary, console.output())
        if study.best is not None:
            _next("bench", study.folder / "best" / "model.onnx")
    if not study.feasible:
        raise UsageError(study.failure())


@commands.command()
@click.argument("model")
@sweeping
@loading
@printing
def sweep(
    model: str, quiet: bool, verbose: bool, log_format: str, as_json: bool, as_csv: bool, **options: Any
) -> None:
    """Compare passes on MODEL: every spec of a space, several seeds, same data, means and spreads."""
    existing(model)
    from . import console, console_search

    shown = console.searching(quiet, verbose, log_format)
    with console.working(shown["console"], "loading PyTorch"):
        from . import api
    lines, notices, text = api.sweep(model, **shown, **given())
    if as_json:
        _json({"lines": lines, "notices": notices})
    elif as_csv:
        click.echo(text, nl=False)
    elif not quiet:
        console_search.show_sweep(lines, notices, console.output())
    if not any(line["seeds"] for line in lines):
        raise UsageError(f"no spec gave a model: {lines[0]['failed'][0]}")


@commands.command("batch")
@click.argument("listed", metavar="LIST.toml")
@listing
@printing
def compress_list(
    listed: str, quiet: bool, verbose: bool, log_format: str, as_json: bool, **options: Any
) -> None:
    """Compile many models: LIST.toml names them, with a recipe or a budget each. What is done is not done again."""
    existing(listed)
    from . import console, console_search

    shown = console.searching(quiet, verbose, log_format)
    with console.working(shown["console"], "loading PyTorch"):
        from . import api
    rows = api.batch(listed, **shown, **given())
    if as_json:
        _json(rows)
    elif not quiet:
        console_search.show_models(rows, console.output())
    failed = [f"{row['model']}: {row['why']}" for row in rows if row["state"] != "done"]
    if failed:
        raise UsageError("\n".join([f"{len(failed)} of {len(rows)} models were not made", *failed]))


@commands.command()
@click.argument("files", nargs=-1, metavar="MODEL ONNX", shell_complete=completion.files)
@comparing
@loading
@printing
def verify(
    files: tuple[str, ...], quiet: bool, verbose: bool, log_format: str, as_json: bool, **options: Any
) -> None:
    """Compare MODEL with an ONNX file, output by output; exit code 7 if they differ.

    Where they do, the first layer inside that is wrong is named. With --against, every claim of a report is checked
    again instead; MODEL or ONNX, or both, may then be left out.
    """
    against = options["against"]
    if len(files) != 2 and (against is None or len(files) > 2):
        raise click.UsageError("verify takes MODEL and ONNX; with --against REPORT they may be left out")
    for one in (*files, *((against,) if against else ())):
        existing(one)
    onnx = next((one for one in files[-1:] if len(files) == 2 or one.endswith((".onnx", ".ort"))), None)
    model = files[0] if files and files[0] != onnx else None
    from . import console, console_checks

    typed = given()
    if against is not None:
        from .report import read_report

        found = Path(against)
        typed["against"] = found = found / "report.json" if found.is_dir() else found
        before = recorded(str(read_report(found).get("command", "")))
        calibration = before.pop("calibration", None)
        typed = before | ({"data": calibration} if calibration else {}) | typed
    shown = console.logging(quiet, verbose, log_format)
    with console.working(shown["console"], "loading PyTorch"):
        from . import api
    with _heard(as_json):
        result = api.verify(model, onnx, **shown, **typed)
    if as_json:
        _json(result)
    elif not quiet and against is not None:
        console_checks.show_claims(result, console.output())
        _next("inspect", typed["against"])
    elif not quiet:
        console_checks.show_verification(result, console.output(), options["layers"])
        _next("bench", files[1])
    if not result.get("ok", True) and against is not None:
        raise ContractError(f"{typed['against']}: not all that it says is so")
    if not result.get("ok", True):
        raise ContractError(f"{onnx}: its outputs differ from those of {model}")


@commands.command()
@click.argument("path", metavar="REPORT|ONNX|MODEL", required=False, shell_complete=completion.files)
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
@click.option(
    "--html", metavar="FILE", help="Write a report as a web page, as a run leaves it beside report.json."
)
@click.option(
    "--diff",
    nargs=2,
    metavar="A B",
    help="Show what differs between two ONNX files (operators, weights, inputs, outputs, metadata), or two reports.",
)
@loading
@printing
def inspect(
    path: str | None,
    groups: bool,
    layers: bool,
    partitions: str | None,
    html: str | None,
    diff: tuple[str, str] | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show a report, an ONNX file, or what a model holds, its adapters first; or what differs between two."""
    if (path is None) == (diff is None):
        raise click.UsageError("inspect takes one REPORT, ONNX or MODEL, or two of a kind with --diff")
    if diff is not None:
        if set(typed()) - {"diff"}:
            raise click.UsageError(
                "--diff takes two reports or two ONNX files, and no other option but --json"
            )
        _show_difference(diff, quiet, as_json)
        return
    assert path is not None
    found = Path(existing(path))
    if found.suffix in (".onnx", ".ort", ".json") and found.is_file():
        opening = [one for one in typed() if one not in ("groups", "layers", "partitions", "html")]
        if opening:
            raise UsageError(f"{path}: --{opening[0].replace('_', '-')} is for opening a PyTorch model")
    if (found / "report.json").is_file():
        found = found / "report.json"
    from . import console, console_layers
    from .report import read_report, render, showing

    if found.suffix == ".json" and found.is_file():
        report = read_report(found)
        emitted = found.parent / ((report.get("emitted") or {}).get("file") or "model.onnx")
        if partitions:
            found = Path(existing(str(emitted)))
    if html and not (found.suffix == ".json" and found.is_file()):
        raise UsageError(f"{found}: --html is for the report.json of a run")
    if found.suffix == ".json" and found.is_file():
        if layers:
            raise UsageError(
                f"{found}: --layers is for a PyTorch model; inspect the model of this run instead"
            )
        if html:
            from . import page

            page.write(Path(html), report)
        if as_json:
            _json(report)
        elif groups and not quiet:
            with showing(found):
                console_layers.show_ledger(console_layers.ledger_of(report, found), console.output())
        elif html and not quiet:
            click.echo(html)
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
        console_layers.show_partitions(facts["partitions"], console.output())
        _next("bench", found)
    elif (groups or layers) and not quiet:
        if layers:
            console_layers.show_layers(facts, console.output())
        if groups:
            console_layers.show_ledger(facts, console.output())
        _next(*((path, "--passes", "merge,prune") if groups else ("inspect", path, "--groups")))
    elif not quiet:
        console.show_facts(facts, console.output())
        if found.suffix in (".onnx", ".ort"):
            _next("bench", path)
        elif "tensors" in facts:
            model = facts.get("architecture") or "path/to/your/model.py:FACTORY"
            _next(path, "--model", model, "--input", "x:f32[?,3,224,224]")
        elif "problem" not in facts:
            _next(path, *(word for one in options["adapter"] for word in ("--adapter", one)))


def _show_difference(diff: tuple[str, str], quiet: bool, as_json: bool) -> None:
    paths = []
    for one in map(Path, map(existing, diff)):
        inside = [one / name for name in ("report.json", "model.onnx") if (one / name).is_file()]
        paths.append(inside[0] if inside else one)
    from . import console, console_checks

    with console.working(console.progress(quiet), "comparing"):
        from . import api

        result = api.inspect(None, diff=(paths[0], paths[1]))
    if as_json:
        _json(result)
    elif not quiet:
        console_checks.show_difference(result, console.output())


@commands.command()
@click.argument("onnx", nargs=-1, required=True, metavar="ONNX [ONNX]", shell_complete=completion.files)
@timing
@click.option("--advise", is_flag=True, help="Of one file: which threads, spinning and arena suit it here.")
@click.option(
    "--profile",
    is_flag=True,
    help="Show where the time goes, by ONNX Runtime's profiler: operators, and modules of the model.",
)
@printing
def bench(
    onnx: tuple[str, ...],
    advise: bool,
    profile: bool,
    quiet: bool,
    verbose: bool,
    log_format: str,
    as_json: bool,
    **_: Any,
) -> None:
    """Measure the latency of ONNX files in turns, A B A B, and compare their medians."""
    for one in onnx:
        existing(one)
    from . import console
    from .console_times import show_latencies, show_profile, show_settings

    shown = console.logging(quiet, verbose, log_format)
    with console.working(shown["console"], "loading PyTorch"):
        from . import api
    rows = api.bench(list(onnx), **shown, **given())
    if as_json:
        _json(rows)
    elif not quiet:
        show = show_settings if advise else show_profile if profile else show_latencies
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

    console.show_targets(registry.targets(), registry.native(), console.output())
    _next("MODEL", "--target", "cpu")


@contextlib.contextmanager
def _heard(as_json: bool) -> Iterator[None]:
    """What is printed meanwhile (graphs after a pass, words of the user's own functions) does not mix with JSON."""
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        yield


def _json(value: Any) -> None:
    from .report import dumps

    click.echo(dumps(value), nl=False)
