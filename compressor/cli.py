"""The command line's door: what was typed becomes a command, and its errors one line and an exit code."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from . import completion
from .commands import commands, compress_model, program
from .errors import CompressorError, FileError, printable

BUG, INTERRUPTED, PIPE_CLOSED = 70, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Every error is one line on standard error."""
    if argv is None and (code := _completed()) is not None:
        return code
    args = list(sys.argv[1:] if argv is None else argv)
    trace = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    typed = shlex.join(["compress", *args])
    if argv is None and not (trace or sys.warnoptions):
        warnings.simplefilter("ignore")  # the libraries' own; ours reach the user as notices
    try:
        with commands.choose(args).make_context(program(), args or ["--help"], obj=typed) as ctx:
            ctx.command.invoke(ctx)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else program()
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


def _completed() -> int | None:
    """The exit code where a shell asks what may follow (`_COMPRESS_COMPLETE`), which only it sets."""
    name = program().replace("-", "_").replace(" ", "_")
    variable = f"_{name.upper()}_COMPLETE"
    instruction = os.environ.get(variable)
    if not instruction:
        return None
    before = completion.words_before(variable, instruction, name)
    try:
        command = commands.choose(before) if before else commands
    except FileError:
        command = compress_model
    return completion.complete(command, variable, instruction, name)


def _fail(message: str, code: int, error: BaseException | None = None) -> int:
    """Print `error: first line`, further lines (lists of names) indented below it, and return the code."""
    if error is not None:
        traceback.print_exception(type(error), error, error.__traceback__)
    first, *rest = printable(message).strip().split("\n")
    click.echo("\n  ".join([f"error: {first}", *(line.strip() for line in rest if line.strip())]), err=True)
    return code
