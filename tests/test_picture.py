"""report.html of a search: what tune.json says, as a picture that can be pointed at."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import chromium
import pytest

from compressor.search import picture

HOSTILE = "<script>alert(1)</script>\"'>{{ 7 * 7 }}"


def trial(number: int, latency: float, top1: float, **facts: Any) -> dict[str, Any]:
    values = {"latency_ms": latency, "speedup": 2.4 / latency, "metric": top1, "drop": 100 * (0.93 - top1)}
    made = {
        "number": number,
        "spec": f"prune(macs=0.{number}),int8",
        "state": "done",
        "why": "",
        "seconds": 1.5,
    }
    return {**made, "values": values, **facts}


def summary() -> dict[str, Any]:
    trials = [
        trial(0, 1.6, 0.931), trial(1, 1.2, 0.925), trial(2, 1.3, 0.915), trial(3, 0.9, 0.902),
        trial(4, 1.0, 0.31), trial(5, 1, 0, state="refused", why=HOSTILE, values={}),
    ]  # fmt: skip
    return {
        "model": "net.pt2", "target": "cpu", "space": "fold,{int8,none}", "objectives": ["latency_ms"],
        "constraints": ["drop<=1.0"], "original": {"latency_ms": 2.4, "metric": 0.93}, "feasible": 3, "best": 1,
        "missed": {}, "front": [0, 1, 3], "trials": trials, "stopped": "",
    }  # fmt: skip


def test_better_is_further_left_and_further_up():
    plot = picture.facts(summary())["plot"]
    at = {one["number"]: one["at"] for one in plot["points"]}
    assert sorted(at) == [0, 1, 2, 3], "what is far off would leave the others no room"
    assert plot["outside"] == 1
    assert at[3][0] < at[1][0] < at[2][0] < at[0][0] < plot["original"]["at"][0]
    assert at[0][1] < plot["original"]["at"][1] < at[1][1] < at[2][1] < at[3][1]
    (limit,) = plot["limits"]
    assert (
        limit["text"] == "drop<=1.0"
        and at[1][1] < float(limit["path"].rpartition(" ")[2].partition("H")[0]) < at[2][1]
    )
    assert {one["number"]: one["kind"] for one in plot["points"]} == {
        0: "front-point", 1: "best", 2: "other", 3: "front-point",
    }  # fmt: skip
    for one in plot["points"]:
        assert picture.LEFT <= one["at"][0] <= picture.RIGHT and picture.TOP <= one["at"][1] <= picture.BOTTOM


def test_a_point_says_its_passes_and_leads_to_its_row(tmp_path):
    picture.write(tmp_path, summary())
    text = (tmp_path / "report.html").read_text()
    picture.write(tmp_path, summary())
    assert (tmp_path / "report.html").read_text() == text
    assert (
        '<a href="#t1"><title>prune(macs=0.1),int8\nlatency, ms 1.2\nspeed 2.00x\nmetric 0.9250\ndrop 0.50</title>'
        in text
    )
    assert 'id="t1" class="last"' in text and 'id="t5"' in text
    assert "<script>alert" not in text and "{{ 7 * 7 }}" in text


def test_ticks_are_round_and_inside():
    for ends in ((0.9, 2.4), (0.8812, 0.9388), (12.0, 14000.0), (-3.0, 7.0)):
        ticks = list(picture._ticks(ends))
        assert 2 <= len(ticks) <= picture.TICKS + 1
        assert all(ends[0] <= tick <= ends[1] and len(f"{tick:g}") <= 6 for tick in ticks)


def test_searches_without_a_metric_or_without_a_model_have_a_page(tmp_path):
    made = summary()
    for one in made["trials"]:
        one["values"] = (
            {"size_mb": 1.0 + one["number"], "sqnr": 20.0 + one["number"]} if one["values"] else {}
        )
    made["trials"][0]["values"]["sqnr"] = "inf"  # as JSON has it, of a model that is the same
    made |= {
        "objectives": ["size_mb"],
        "constraints": ["sqnr>=20", "size_mb<=4"],
        "original": {"size_mb": 9.0},
    }
    plot = picture.facts(made)["plot"]
    assert plot["original"] is None and [one["text"] for one in plot["limits"]] == ["sqnr>=20", "size_mb<=4"]
    assert 0 not in {one["number"] for one in plot["points"]}
    empty = copy.deepcopy(made) | {"trials": [made["trials"][5]], "front": [], "best": None, "feasible": 0}
    assert picture.facts(empty)["plot"] == {"points": []}
    picture.write(tmp_path, empty)


def test_one_trial_has_room():
    made = summary()
    made |= {
        "trials": made["trials"][:1],
        "front": [0],
        "best": 0,
        "original": {},
        "constraints": ["sqnr>=20"],
    }
    (point,) = picture.facts(made)["plot"]["points"]
    assert all(map(math.isfinite, point["at"]))


@pytest.mark.skipif(chromium.path() is None or os.name == "nt", reason="needs chromium")
def test_it_opens_without_errors_and_sorts(tmp_path):
    picture.write(tmp_path, summary())
    address = Path(tmp_path, "report.html").as_uri()
    with chromium.browser(chromium.path()) as tab:
        tab.open(address)
        assert tab.console == [] and tab.requests == [address]
        assert tab.ask("getComputedStyle(document.querySelector('.best')).fill") != "rgb(0, 0, 0)"
        tab.ask("[...document.querySelectorAll('th button')].find((b) => b.textContent === 'speed').click()")
        first = "document.querySelector('#layers tbody tr').cells[0].textContent"
        assert tab.ask(first) == "0"
        tab.ask("location.hash = 't3'")
        assert tab.ask("document.querySelector('tr:target').cells[0].textContent") == "3"
