"""report.html: what the report says and nothing else, whatever names stand in it, in a browser that has no network."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import pytest
from sample_report import sample_report

from compressor import page, report
from compressor.errors import UsageError

HOSTILE = "<script>alert(1)</script>\"'><img src=https://evil.example/x onerror=alert(2)>&amp;{{ 7 * 7 }}"
HOSTILE += "\u202e\ud800\x00"
VOID = {"meta", "link", "input", "br", "img", "hr"}


def layer(i: int, **facts: Any) -> dict[str, Any]:
    made = {
        "site": f"layer{i // 4}.{i % 4}.conv", "operator": "conv2d", "macs": 1000 * (i + 7), "params": 90 + i,
        "bytes": 400 + 3 * i, "precision": "u8 x i8", "width": [64, 64 - i % 5], "rank": None, "sqnr_db": 20.0 + i / 4,
    }  # fmt: skip
    return made | facts


def full() -> dict[str, Any]:
    """The sample report with what a whole run adds."""
    made = sample_report()
    unlike = {"sqnr_db": None, "rank": [12, 8], "width": [None, 9]}
    made["layers"] = [layer(i) for i in range(24)] + [layer(24, **unlike), layer(25, sqnr_db="inf", rank=16)]
    made["rows"][2]["facts"] = {"float_ms": 0.44, "int8_ms": 0.23, "int8_as_it_was_ms": 0.25}
    made["rows"][1]["facts"] = {"latency": {"before_ms": 0.5, "after_ms": 0.47, "timed_on": "this host"}}
    return made


def written(made: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report as a later run reads it."""
    return report.read_report(report.write_report(folder / "report.json", made))


class Document(HTMLParser):
    """Tags, attributes and text; AssertionError where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> outside of SVG"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def attributes(self, name: str) -> list[str]:
        return [str(attrs[name]) for _, attrs in self.tags if name in attrs]


def test_a_page_is_sound_and_says_what_the_report_says(tmp_path: Path) -> None:
    read = written(full(), tmp_path)
    seen = Document(page.render(read))
    for words in (
        "digits", "700 kB was 3.7 MB", "5.29x smaller than fp32 ONNX", "0.2 ms was 0.42 ms", "2.10x faster", "1 thread",
        "98.50 % was 99.00 %", "-0.50 points", "Warned", "warned: int8 proved: merge file: verified on CPU",
        "int8: output SQNR 19.2 dB [check the metric]", "0.44 \u2192 0.23 ms", "0.5 \u2192 0.47 ms", "64 \u2192 60",
        "its output is read twice 5", "layer3 (conv2d)", "out[:, 0:4]", "compress digits.pt2 --passes merge,int8",
        "sha256 0123456789ab", "the worst is layer0.0.conv at 20.0 dB", "12, 8", "u8 \u00d7 i8", "537 MB at most",
    ):  # fmt: skip
        assert words in seen.words, words
    ids = seen.attributes("id")
    assert len(ids) == len(set(ids))
    assert {f"#l{i}" for i in range(1, 27)} == set(seen.attributes("href")) - {"data:,"}
    assert {name for name in seen.attributes("href")} <= {f"#{one}" for one in ids} | {"data:,"}
    wrong = copy.deepcopy(read)
    wrong["emitted"]["bytes"] = 800_000
    assert "700 kB" not in Document(page.render(wrong)).words


def test_every_number_in_a_table_is_one_of_the_report(tmp_path: Path) -> None:
    read = written(full(), tmp_path)
    known: set[float] = {float(i + 1) for i in range(len(read["layers"]))}  # of the rows

    def walk(value: Any) -> None:
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(one)
        if value == "inf" or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            known.add(float(value))

    walk(read)
    shown = [float(text) for text in Document(page.render(read)).attributes("data-v") if text]
    assert len(shown) > 150 and math.inf in shown
    assert set(shown) <= known
    read["layers"][3]["macs"] += 1
    again = {float(text) for text in Document(page.render(read)).attributes("data-v") if text}
    assert again - known == {float(read["layers"][3]["macs"])}


def test_numbers_of_a_column_have_one_unit() -> None:
    cells, unit = page._column([2_359_296, 196_608, 0, None, 9_437_184], page._COUNTS)
    assert unit == "M" and [cell.text for cell in cells] == ["2.36", "0.20", "", "", "9.44"]
    cells, unit = page._column([150_912, 1536, 11_720_448], page._BYTES)
    assert unit == "kB" and [cell.text for cell in cells] == ["150.9", "1.5", "11\u202f720.4"]
    assert page._column([3, 4], page._COUNTS) == ([page.Cell(3.0, "3"), page.Cell(4.0, "4")], "")
    assert page._column([], page._BYTES) == ([], "B")


def test_bars_add_up() -> None:
    assert page._bar(90, 45, 90) == {"left": 50, "gone": 50, "more": 0}
    assert page._bar(45, 90, 90) == {"left": 50, "gone": 0, "more": 50}
    assert page._bar(0, 0, 0) == {"left": 0, "gone": 0, "more": 0}


def test_louder_layers_are_hotter_and_every_layer_is_seen() -> None:
    heats = [page._heat(level) for level in (5, 10, 20, 30, 40, 50, 120, "inf")]
    assert heats[:2] == [1, 1] and heats == sorted(heats, reverse=True) and heats[-1] == page.FAINTEST
    assert page._heat(20) - page._heat(30) > 0.2
    assert page._heat(None) is None


def test_names_under_the_strip_tell_the_parts_apart() -> None:
    bert = [f"encoder.layer.{i}.{part}" for i in range(6) for part in ("query", "key", "value", "dense")]
    parts = page._strip([{"site": site} for site in ["embeddings.words", *bert, "pooler"]])["parts"]
    assert [part["name"] for part in parts] == ["words", *(f"layer.{i}" for i in range(6)), "pooler"]
    assert sum(part["share"] for part in parts) == pytest.approx(100, abs=0.1)
    assert [part["shown"] for part in parts[:2]] == ["wide", ""]
    few = page._strip([{"site": "stem"}, *({"site": f"body.{i}"} for i in range(99))])["parts"]
    assert [part["shown"] for part in few] == ["hidden", ""], "no room for a name even on a large screen"
    assert page._strip([])["parts"] == [{"name": "", "start": 0.0, "share": 100.0, "shown": ""}]


def test_names_of_a_model_are_text(tmp_path: Path) -> None:
    plain = json.loads(report.dumps(full()))
    words = {"", "inf", "proved", "warned"}  # which the page understands
    fixed = _keys(plain) - {"torch", "cpu", "top1"}

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if key in fixed else f"{key}{HOSTILE}": spoil(one) for key, one in value.items()}
        if isinstance(value, list):
            return [spoil(one) for one in value]
        return value + HOSTILE if isinstance(value, str) and value not in words else value

    text = page.render(spoil(plain))
    seen = Document(text)
    ours = Document(page.render(plain))
    assert [tag for tag, _ in seen.tags] == [tag for tag, _ in ours.tags], "a name became a tag"
    assert [set(attrs) for _, attrs in seen.tags] == [set(attrs) for _, attrs in ours.tags]
    assert seen.words.count("alert(1)") > 100 and "{{ 7 * 7 }}" in seen.words and "49" not in seen.words
    assert "\ud800" not in text and text.encode()
    policy = next(str(attrs["content"]) for _, attrs in seen.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on") or name == "style"]


def _keys(value: Any) -> set[str]:
    found = set(value) if isinstance(value, dict) else set()
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found |= _keys(one)
    return found


def test_the_same_report_gives_the_same_page(tmp_path: Path) -> None:
    made = full()
    read = written(made, tmp_path)
    page.write(tmp_path / "a.html", read)
    page.write(tmp_path / "b.html", written(dict(reversed(made.items())), tmp_path))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert page.render(read | {"seed": 1}) != page.render(read)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.html", "b.html", "report.json"]


def test_reports_from_before_there_were_layers_have_a_page() -> None:
    old = Document(page.render(sample_report()))
    assert "Passes" in old.words and "Layers" not in old.words and "5.29x smaller" in old.words
    least = Document(page.render({"schema": 1, "rows": [{"pass": "input"}]}))
    assert "nothing was emitted" in least.words and "Unchanged" in least.words
    earlier = sample_report() | {"history": [{"rows": sample_report()["rows"]}]}
    assert "run 1" in Document(page.render(earlier)).words


def test_a_verdict_is_the_worst_of_the_passes() -> None:
    made = sample_report()
    for status, word in (("proved", "Proved"), ("not proved", "Not proved"), ("warned", "Warned")):
        made["rows"][2]["status"] = status
        assert page.facts(made)["verdict"]["word"] == word
    made["rows"][1]["status"] = "not proved"
    assert page.facts(made)["verdict"]["state"] == "not-proved"


def test_many_checks_and_layers_stay_a_page(tmp_path: Path) -> None:
    made = full()
    made["layers"] = [layer(i, site=f"model.encoder.block.{i}.attention.output.dense") for i in range(300)]
    made["rows"][1]["checks"] *= 50
    made["rows"][1]["declines"] = [
        {"site": f"layer{i} (conv2d)", "reason": "it is one of many"} for i in range(600)
    ]
    text = page.render(written(made, tmp_path))
    assert "and 30 more in report.json" in Document(text).words
    assert 100_000 < len(text.encode()) < 600_000


@pytest.mark.parametrize(
    "damage",
    [
        {"layers": 3},
        {"layers": [{}]},
        {"rows": []},
        {"emitted": {"bytes": "many", "float_bytes": 1}},
        {"rows": [{"pass": "input", "checks": [3]}]},
        {"notices": 7},
    ],
)
def test_a_damaged_report_is_an_error_in_one_line(damage: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a damaged report"):
        page.render(sample_report() | damage)


def test_inspect_makes_the_page_anew(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    made, where = full(), tmp_path / "again.html"
    written(made, tmp_path)
    assert run("inspect", tmp_path, "--html", where) == (0, f"{where}\n", "")
    assert where.read_text() == page.render(written(made, tmp_path))
    assert run("inspect", tmp_path / "report.json", "--html", where, "--json")[1] == report.dumps(made)
    (tmp_path / "model.onnx").write_bytes(b"")
    code, _, said = run("inspect", tmp_path / "model.onnx", "--html", where)
    assert code == 2 and "--html is for the report.json of a run" in said
    assert run("inspect", tmp_path / "report.json", "--html", tmp_path / "nowhere" / "a.html")[0] == 5


# ------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    program = chromium.path()
    if program is None or os.name == "nt":
        pytest.skip("needs chromium (apt-get install chromium)")
    with chromium.browser(program) as found:
        yield found


@pytest.fixture
def address(tmp_path: Path) -> str:
    place = tmp_path / "a folder" / "report.html"
    place.parent.mkdir()
    page.write(place, written(full(), tmp_path))
    return place.as_uri()


SITES = (
    "[...document.querySelectorAll('#layers tbody tr:not([hidden])')].map((row) => row.cells[1].textContent)"
)
COLUMN = "[...document.querySelectorAll('#layers tbody tr')].map((row) => row.cells[{}].dataset.v)"


def click(tab: chromium.Page, name: str) -> None:
    tab.ask(
        f"[...document.querySelectorAll('#layers button')].find((b) => b.textContent.startsWith('{name}')).click()"
    )


def test_it_opens_without_errors_and_without_a_network(tab: chromium.Page, address: str) -> None:
    tab.open(address)
    assert tab.console == [] and tab.requests == [address]
    assert tab.ask("document.title") == "digits for cpu: report of compress"
    assert tab.ask("getComputedStyle(document.querySelector('.bar .left')).fill") != "rgb(0, 0, 0)", (
        "our style is on"
    )
    tab.open(address)
    tab.ask("console.error('one')")
    assert tab.ask("1 + 1") == 2 and tab.console == ["['one']"], "what a page says is heard"


def test_a_table_sorts_by_its_numbers(tab: chromium.Page, address: str) -> None:
    tab.open(address)
    before = tab.ask(SITES)
    click(tab, "MACs")
    macs = [float(value) for value in tab.ask(COLUMN.format(4))]
    assert macs == sorted(macs, reverse=True) and len(macs) == 26 and tab.ask(SITES) != before
    click(tab, "MACs")
    assert [float(value) for value in tab.ask(COLUMN.format(4))] == macs[::-1]
    click(tab, "SQNR")
    levels = tab.ask(COLUMN.format(3))
    assert levels[0] == "20.0" and levels[-2:] == ["Infinity", ""], "worst first, what is not told last"
    click(tab, "SQNR")
    assert tab.ask(COLUMN.format(3))[:2] == ["Infinity", "25.75"] and tab.ask(COLUMN.format(3))[-1] == ""
    assert tab.ask("document.querySelectorAll('#layers th[aria-sort]').length") == 1
    click(tab, "module")
    assert tab.ask(SITES) == sorted(before)
    click(tab, "#")
    assert tab.ask(SITES) == before and tab.console == []


def test_a_search_leaves_what_it_names(tab: chromium.Page, address: str) -> None:
    tab.open(address)
    assert tab.ask("document.querySelector('#found').textContent") == "26 of 26"
    tab.ask("search.value = 'LAYER2 conv2d'; search.dispatchEvent(new Event('input'))")
    assert tab.ask(SITES) == [f"layer2.{i}.conv" for i in range(4)]
    assert tab.ask("document.querySelector('#found').textContent") == "4 of 26"
    tab.ask("search.value = ''; search.dispatchEvent(new Event('input'))")
    assert len(tab.ask(SITES)) == 26 and tab.console == []


def test_a_layer_of_the_strip_leads_to_its_row(tab: chromium.Page, address: str) -> None:
    tab.open(address)
    tab.ask("location.hash = document.querySelectorAll('.strip a')[24].getAttribute('href')")
    place = """(() => {
        const box = (one) => document.querySelector(one).getBoundingClientRect();
        return [box('#l25').top - box('#layers thead th').bottom, box('.tall').bottom - box('#l25').bottom];
    })()"""
    assert min(tab.ask(place)) >= -1, "in sight, below the head of the table"
    assert tab.ask("document.querySelector(':target').cells[1].textContent") == "layer6.0.conv"


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_scrolls_sideways_but_tables_in_themselves(
    tab: chromium.Page, address: str, width: int
) -> None:
    tab.open(address, width=width)
    assert tab.ask("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    wide = """[...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll, svg')
        && one.getBoundingClientRect().right > innerWidth + .5).map((one) => one.outerHTML)"""
    assert tab.ask(wide) == []
    tab.ask(
        "document.body.append(Object.assign(document.createElement('pre'), {textContent: 'x'.repeat(999)}))"
    )
    assert tab.ask("document.documentElement.scrollWidth") > width, "what is too wide would show"


def test_it_is_dark_where_the_reader_wants_that(tab: chromium.Page, address: str) -> None:
    contrast = """(() => {
        const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map((c) => (c / 255) ** 2.2);
            return .2126 * r + .7152 * g + .0722 * b + .05; };
        const ground = light(getComputedStyle(document.body).backgroundColor);
        return ['body', '.quiet', '.proved', '.warned', 'thead th'].map((name) => {
            const text = light(getComputedStyle(document.querySelector(name)).color);
            return Math.max(text, ground) / Math.min(text, ground); });
    })()"""
    grounds = []
    for dark in (False, True):
        tab.open(address, dark=dark)
        assert min(tab.ask(contrast)) > 4.5, "text that can be read"
        grounds.append(tab.ask("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] == "rgb(255, 255, 255)" and grounds[1] != grounds[0]


def test_a_hostile_name_runs_nothing(tab: chromium.Page, tmp_path: Path) -> None:
    made = full()
    made["layers"][0]["site"] = made["notices"][0] = made["model"]["stem"] = HOSTILE.replace("\ud800", "")
    page.write(tmp_path / "hostile.html", written(made, tmp_path))
    tab.open((tmp_path / "hostile.html").as_uri())
    assert tab.console == [] and len(tab.requests) == 1
    assert tab.ask("[document.images.length, document.scripts.length]") == [0, 1]
    tab.ask(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert tab.ask("window.ran === undefined") and "Content Security Policy" in tab.console[0], (
        "nor would it, if it were one"
    )
