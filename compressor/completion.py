"""What a shell may complete: files, names of passes and targets. Nothing heavy is imported for it."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from . import registry


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Whatever lies there: the shell knows."""
    return [CompletionItem(incomplete, type="file")]


def passes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of passes, the last of several between commas: `merge,pru` -> `merge,prune`."""
    before, comma, last = incomplete.rpartition(",")
    return [
        CompletionItem(f"{before}{comma}{name}") for name in registry.pass_names() if name.startswith(last)
    ]


def targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of targets, with what they are for where the shell shows it."""
    return [
        CompletionItem(name, help=target.summary)
        for name, target in registry.targets().items()
        if name.startswith(incomplete)
    ]


def words_before(variable: str, instruction: str, program: str) -> list[str]:
    """The whole words that were typed before the one to complete; none where only the shell's script is asked for."""
    shell, _, what = instruction.partition("_")
    kind = get_completion_class(shell)
    if kind is None or what != "complete":
        return []
    return kind(click.Command(program), {}, program, variable).get_completion_args()[0]


def complete(command: click.Command, variable: str, instruction: str, program: str) -> int:
    """Answers the shell on standard output, click's way; returns the exit code."""
    return shell_complete(command, {}, program, variable, instruction)
