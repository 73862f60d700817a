"""What mkdocs does besides: files of the repository become pages, and marks in pages become tables.

- `<!-- generated: NAME -->` becomes that section of `reference.py`;
- `<!-- table: FILE N -->` becomes the Nth table of a Markdown file of the repository, with its date and machine, so
  that no number is copied;
- relative links lead to the same files here and on a code host.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import reference  # noqa: E402

# Beside docs/: what pages link to, and whether it is a page.
BESIDE = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*.md", "examples/**/*")


def on_files(files: Files, config: Any) -> Files:
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                uri = path.relative_to(ROOT).as_posix()
                listed = InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=listed))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Files) -> str:
    text = re.sub(r"^<!-- generated: (\w+) -->$", lambda m: reference.sections[m[1]](), text, flags=re.M)
    text = re.sub(
        r"^<!-- table: (\S+) (\d+) -->$", lambda m: _measured(m[1], int(m[2]), page), text, flags=re.M
    )
    return re.sub(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)", lambda m: _linked(m, page, files), text)


def _measured(name: str, number: int, page: Any) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text + "\n", re.M)
    if not 0 < number <= len(tables):
        raise PluginError(f"{page.file.src_uri}: {name} has {len(tables)} tables, not {number}")
    facts = [found[1] for key in ("date", "machine") if (found := re.search(rf"^- {key}: (.*)$", text, re.M))]
    link = os.path.relpath(ROOT / name, _place(page).parent)
    return f"{tables[number - 1]}\n*[{Path(name).stem}]({link}), {', '.join(facts)}*\n"


def _place(page: Any) -> Path:
    """Where a page's text lies in the repository."""
    found = Path(page.file.abs_src_path)
    return found if found.is_relative_to(ROOT) else ROOT / page.file.src_uri


def _linked(match: re.Match[str], page: Any, files: Files) -> str:
    """The same link within the site; to files of the repository that it does not have, the words alone."""
    path = Path(os.path.normpath(_place(page).parent / match[2]))
    if not path.exists():
        return match[0]
    uri = path.relative_to(ROOT).as_posix().removeprefix("docs/")
    uri = "index.md" if uri == "README.md" else uri
    if files.get_file_from_path(uri) is None:
        return match[1]
    return f"[{match[1]}]({os.path.relpath(uri, os.path.dirname(page.file.src_uri) or '.')}{match[3] or ''})"
