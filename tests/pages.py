"""The code blocks of a documentation page, and how a reader would run them: in order, in one folder.

- ```bash: every line must end with exit code 0, or with N where it ends in `# exit N`;
- ```python: one namespace a page, as in a notebook;
- a block with `title="FILE"` is that file; ```text is output.

`<!-- not run: WHY -->` above a block keeps it from running. Everything runs in this process, which has torch loaded.
`compress` gets `--no-measure` unless the line asks for a latency: what blocks show is not how fast this machine is.
"""

from __future__ import annotations

import contextlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from compressor.cli import main
from compressor.commands import commands

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(
    r'^(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$',
    re.M | re.S,
)
_EXIT = re.compile(r"\s*# exit (\d+)$")
MADE = "python examples/playground.py"


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    title: str | None
    code: str
    why: str | None  # it is not run


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    return [
        Block(name, found["language"], found["title"], found["code"], found["why"])
        for found in _FENCE.finditer(text)
    ]


def lines(code: str) -> Iterator[str]:
    """Commands of a shell block, continued lines joined."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


class Reader:
    """Runs blocks as a reader does, in the working directory. playground: makes that script's files for `WORDS`."""

    def __init__(self, playground: Callable[[str], Path]) -> None:
        self.playground = playground
        self.module = types.ModuleType("page")

    def run(self, block: Block) -> None:
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            sys.modules["page"] = self.module  # dataclasses look their own module up
            exec(compile(block.code, block.page, "exec"), self.module.__dict__)
        elif block.language == "bash":
            for line in lines(block.code):
                self.command(line)

    def command(self, line: str) -> None:
        wanted = int(found[1]) if (found := _EXIT.search(line)) else 0
        words = shlex.split(_EXIT.sub("", line))
        code: int | str | None
        if line.startswith(MADE):
            shutil.copytree(self.playground(line.removeprefix(MADE).strip()), ".", dirs_exist_ok=True)
            code = 0
        elif words[0] == "compress":
            compiling = commands.choose(words[1:]) is not commands
            timed = not compiling or "latency" in line or "measure" in line
            code = main(words[1:] if timed else [*words[1:], "--no-measure"])
        elif words[0] == "python":
            code = _script(words[1:])
        else:
            code = subprocess.run(words, check=False, timeout=60).returncode
        assert code == wanted, f"{line}: exit code {code}, not {wanted}"


def _script(words: list[str]) -> int:
    kept = sys.argv
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code) if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = kept
    return 0


@contextlib.contextmanager
def imports_from(folder: Path) -> Iterator[None]:
    """Modules in `folder` can be imported, and are forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if name == "page" or (file and Path(file).is_relative_to(folder)):
                del sys.modules[name]
