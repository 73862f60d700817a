"""What the documentation shows must work: commands parse, links lead somewhere, code runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from compressor.commands import commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^(?:> )?```{language}\n(.*?)^(?:> )?```", text, re.M | re.S)


def shown_commands() -> list[str]:
    """Every `compress ...` line of README's and the Makefile's shell, comments cut."""
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    lines += [line.replace("$(VENV)/bin/", "") for line in (ROOT / "Makefile").read_text().splitlines()]
    return [line.strip() for line in lines if line.strip().startswith("compress ")]


def parse(line: str) -> click.Context:
    words = shlex.split(line, comments=True)[1:]
    command = commands.choose(words)
    if isinstance(command, click.Group):
        name, found, rest = command.resolve_command(click.Context(command), words)
        assert found is not None
        return found.make_context(name, rest)
    return command.make_context("compress", words)


@pytest.mark.parametrize("line", sorted(set(shown_commands())))
def test_shown_commands_parse(line: str) -> None:
    parse(line)
    with pytest.raises(click.UsageError):
        parse(line.split("#")[0] + " --no-such-option")


def test_there_are_shown_commands() -> None:
    assert len(set(shown_commands())) >= 7


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_exit_codes_of_the_readme_are_the_codes() -> None:
    from compressor import cli, errors

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    kinds = [
        k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.CompressorError)
    ]
    assert listed == {0, cli.BUG, cli.INTERRUPTED, *(kind.exit_code for kind in kinds)}


def test_the_tables_of_the_readme_are_the_registry() -> None:
    from compressor import registry

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for heading, names in (("Passes", registry.passes()), ("Targets", registry.targets())):
        section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        listed = re.findall(r"^\| `([\w-]+)` \|", section, re.M)
        assert sorted(listed) == sorted(names), heading


def test_every_file_has_its_place_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9_]+)`", text))
    files = {p.stem for p in (ROOT / "compressor").glob("[a-z]*.py")}
    assert files - named - {"errors"} == set()
    assert "nothing_of_the_kind" not in named


def test_make_prints_its_targets() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("setup", "check", "test", "bench", "docs", "demo", "clean"):
        assert f"  make {target} " in done.stdout
    assert "make deploy" not in done.stdout


@pytest.mark.parametrize("number", range(len(blocks("README.md", "python"))))
def test_python_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", blocks("README.md", "python")[number]],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small" / "model.onnx").exists()


@pytest.mark.parametrize("words", ["from_python.py", "own_data.py", "prune_finetune_int8.py 1"])
def test_examples_run(words: str, tmp_path: Path) -> None:
    name, *options = words.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *options],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
