"""The reference, generated from the code: what a docstring or an option says is written nowhere else.

`sections` is the table of what a page can ask for with `<!-- generated: NAME -->`. Markdown comes out.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

import compressor
from compressor import api, errors, ir, pipeline, registry, schema, target
from compressor.commands import commands as group
from compressor.commands import compress_model

Explained = list[tuple[tuple[str, ...], str]]


# ------------------------------------------------------------------- docstrings


def split(doc: str, names: Sequence[str]) -> tuple[str, Explained]:
    """A docstring without what explains its names, and what explains them: `name, other: words until the next`.

    An explanation begins a sentence and ends with its paragraph or where the next one begins.
    """
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"
    start = re.compile(rf"(?:^|(?<=[.;:)] ))((?:{one})(?:(?:, | and )(?:{one}))*)(?: \([^)]*\))?: ")
    prose, found = [], []
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        text = paragraph if paragraph.startswith("    ") else " ".join(paragraph.split("\n"))
        begins = list(start.finditer(text))
        ends = [match.start() for match in begins[1:]] + [len(text)] * bool(begins)
        for match, end in zip(begins, ends, strict=True):
            found.append((tuple(re.split(", | and ", match[1])), text[match.end() : end].strip(" ;")))
        rest = text[: begins[0].start()] if begins else text
        prose += [rest.strip()] if rest.strip() and not rest.startswith("    ") else [rest] if rest else []
    return "\n\n".join(prose), found


def safe(text: str) -> str:
    """Markdown of plain text: what stands outside of backquotes means itself."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<\[\]|])", r"\\\1", p) for p in parts)


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) if "`" in text else safe(" ".join(text.split()))


def prose(text: str) -> str:
    return "\n\n".join(part if part.startswith("    ") else safe(part) for part in text.split("\n\n"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def kind(annotation: Any) -> str:
    """`float | None` -> `float`; `Literal["a", "b"]` -> `a`, `b`; a tuple is written `a+b` in a spec."""
    if isinstance(annotation, str):
        return f"`{annotation.removesuffix(' | None')}`"
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{word}`" for word in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return "names, `a+b`"
    several = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    parts = [a for a in typing.get_args(annotation) if a is not type(None)] if several else [annotation]
    return " or ".join(f"`{getattr(part, '__name__', part)}`" for part in parts)


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else f"`{_short(field.default_factory())}`"
    return {None: "", (): "", "": ""}.get(field.default, f"`{_short(field.default)}`")


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if inspect.isfunction(value):
        return "nothing"
    if isinstance(value, (frozenset, set)):
        return ", ".join(sorted(map(str, value))) or "none"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    return str(value).lower() if isinstance(value, bool) else str(value)


def fields(cls: type, *, typed: bool = True) -> tuple[str, str]:
    """Prose of a dataclass, and a table of its fields with what the docstring says of each."""
    hints = typing.get_type_hints(cls)
    known = [f for f in dataclasses.fields(cls) if not f.name.startswith("_")]
    text, explained = split(cls.__doc__ or "", [f.name for f in known])
    rows = []
    for field in known:
        words = next((words for names, words in explained if field.name in names), "")
        rows.append(
            [
                f"`{field.name}`",
                *([kind(hints[field.name])] if typed else []),
                default(field),
                cell(words),
            ]
        )
    return prose(text), table(["field", *(["type"] if typed else []), "default", ""], rows) if rows else ""


def function(member: Any, name: str, level: int = 3) -> str:
    """Heading, signature and docstring of a function or a method."""
    signature = str(inspect.signature(member)).replace("'", "")
    parameters = [p for p in inspect.signature(member).parameters if p != "self"]
    text, explained = split(inspect.getdoc(member) or "", parameters)
    lines = [f"{'#' * level} `{name}`\n", f"```text\n{name}{_wrapped(signature)}\n```\n", prose(text), ""]
    if explained:
        lines.append(
            table(["", ""], [[", ".join(f"`{n}`" for n in names), cell(w)] for names, w in explained])
        )
    return "\n".join(lines)


def _wrapped(signature: str) -> str:
    if len(signature) < 80:
        return signature
    inside, _, after = signature[1:].rpartition(")")
    depth, parts, start = 0, [], 0
    for i, char in enumerate(inside):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append(inside[start:i].strip())
            start = i + 1
    return "(\n" + "".join(f"    {part},\n" for part in [*parts, inside[start:].strip()]) + ")" + after


# ------------------------------------------------------------------- the sections


def commands() -> str:
    made = []
    for name, command in {"compress": compress_model, **group.commands}.items():
        usage = "compress" if name == "compress" else f"compress {name}"
        ctx = click.Context(command, info_name=usage)
        lines = [f"## `{usage}`\n", f"```text\n{' '.join(command.collect_usage_pieces(ctx))}\n```\n".replace(
            "```text\n", f"```text\n{usage} ")]  # fmt: skip
        lines.append(prose(inspect.cleandoc(command.help or "")) + "\n")
        options = [p for p in command.params if isinstance(p, click.Option)]
        if options:
            lines.append(table(["option", ""], [_option(one, ctx) for one in options]))
        made.append("\n".join(lines))
    return "\n".join(made)


def _option(option: click.Option, ctx: click.Context) -> list[str]:
    record = option.get_help_record(ctx)
    names, words = record if record else (", ".join(option.opts), option.help or "")
    return [f"`{names}`", cell(words)]


def passes() -> str:
    made = []
    for name, cls in registry.passes().items():
        text, rows = fields(cls)
        summary, _, rest = text.partition("\n\n")
        order = [f"contract: {cls.contract.name}"]
        order += [f"after {', '.join(cls.after)}"] if cls.after else []
        order += (
            [f"needs {', '.join(cls.requires)}, which is added where it is missing"] if cls.requires else []
        )
        made.append(f"## `{name}`\n\n{summary}\n\n*{'; '.join(order)}*\n\n{rest}\n\n{rows}")
    return "\n\n".join(made)


def targets() -> str:
    made = []
    for name, one in registry.targets().items():
        plain = target.Target(name, "", ())
        rows = [
            [f"`{f.name}`", cell(_short(getattr(one, f.name)))]
            for f in dataclasses.fields(one)
            if f.name not in ("name", "summary", "quant")
            and (f.name in ("opset", "providers", "recipe", "channel_multiple") or
                 getattr(one, f.name) != getattr(plain, f.name))
        ]  # fmt: skip
        usual = target.QuantSpec()
        rows += [
            [f"`quant.{f.name}`", cell(_short(getattr(one.quant, f.name)))]
            for f in dataclasses.fields(one.quant)
            if f.name in ("activation", "bias") or getattr(one.quant, f.name) != getattr(usual, f.name)
        ]
        made.append(f"## `{name}`\n\n{safe(one.summary)}.\n\n{table(['setting', ''], rows)}")
    return "\n\n".join(made)


def python() -> str:
    made = [function(compressor.compress, "compress")]
    made.append("### `Options`\n\n" + "\n\n".join(fields(api.Options)))
    text, rows = fields(api.Result)
    made.append(f"### `Result`\n\n{text}\n\n{rows}\n" + function(api.Result.trainable, "Result.trainable", 4))
    verbs = [name for name in api.__all__ if name not in ("Options", "Result", "compress")]
    made.append("## `compressor.api`\n")
    made += [function(getattr(api, name), name) for name in verbs]
    return "\n\n".join(made)


def exceptions() -> str:
    found = [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, errors.CompressorError)
    ]
    rows = [[f"`{one.__name__}`", str(one.exit_code), cell(inspect.getdoc(one) or "")] for one in found]
    return table(["class", "exit code", ""], rows)


def plugins() -> str:
    made = []
    for cls in (pipeline.Pass, pipeline.Context, pipeline.Outcome, pipeline.Rewrite, pipeline.Decline):
        if dataclasses.is_dataclass(cls):
            text, rows = fields(cls)
        else:
            text, explained = split(cls.__doc__ or "", list(typing.get_type_hints(cls)))
            text = prose(text)
            rows = table(
                ["class variable", ""], [[f"`{', '.join(names)}`", cell(w)] for names, w in explained]
            )
        made.append(f"## `{cls.__name__}`\n\n{text}\n\n{rows}")
    made.append(f"## `Graph`\n\n{prose(inspect.getdoc(ir.Graph) or '')}")
    for name, member in vars(ir.Graph).items():
        if not name.startswith("_") and callable(member) and inspect.getdoc(member):
            made.append(function(member, f"Graph.{name}"))
    for cls in (target.Target, target.QuantSpec):
        made.append(f"## `{cls.__name__}`\n\n" + "\n\n".join(fields(cls)))
    return "\n\n".join(made)


def report() -> str:
    return table(["key", ""], [[f"`{key}`", cell(words)] for key, words in schema.REPORT.items()])


sections: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "passes": passes,
    "targets": targets,
    "python": python,
    "exceptions": exceptions,
    "plugins": plugins,
    "report": report,
}
