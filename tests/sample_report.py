"""A small report of schema 1, as the tests of the report and of the command line print it."""

from __future__ import annotations

from typing import Any


def sample_report() -> dict[str, Any]:
    check = {
        "output": "out",
        "slice": "",
        "error": 2e-7,
        "tolerance": 1e-5,
        "power": 1.2,
        "sqnr_db": 130.0,
        "cosine": 1.0,
        "agreement": 1.0,
        "finite": True,
    }
    base = {
        "params": 917_266,
        "macs": 16_500_000,
        "bytes": 3_669_064,
        "metric": {"top1": 0.99},
        "seconds": 0.5,
    }
    rows = [
        {"pass": "input", "config": "", "contract": "", "status": "", "checks": [], **base},
        {
            **{
                "pass": "merge",
                "config": "merge",
                "contract": "exact",
                "status": "proved",
                "checks": [check],
            },
            **base,
            "rewrites": [{"site": "hidden", "what": "linear + linear into linear"}] * 2,
            "declines": [
                {"site": f"layer{i} (conv2d)", "reason": "its output is read twice"} for i in range(5)
            ],
        },
        {
            **{"pass": "int8", "config": "int8", "contract": "bounded", "status": "warned"},
            **{"checks": [{**check, "sqnr_db": 41.5}, {**check, "slice": "[:, 0:4]", "sqnr_db": 19.25}]},
            **base,
            "bytes": 920_000,
            "metric": {"top1": 0.985},
        },
    ]
    return {
        "schema": 1,
        "compressor": "0.1.0",
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "a processor", "cores": 2},
        "command": "compress digits.pt2 --passes merge,int8",
        "seed": 0,
        "model": {"path": "digits.pt2", "sha256": "0123456789abcdef", "stem": "digits"},
        "target": {"name": "cpu"},
        "spec": "merge,fold,int8",
        "inserted": ["fold"],
        "data": {"calibration": {"description": "digits.npz", "samples": 205}, "held_out": None, "facts": {}},
        "rows": rows,
        "emitted": {
            "file": "model.onnx",
            "bytes": 700_000,
            "float_bytes": 3_700_000,
            "verified": "on CPUExecutionProvider, 51 samples",
            "checks": [{**check, "sqnr_db": 38.0}],
            "metric": {"top1": 0.985},
            "latency": {
                "model": {"median_ms": 0.2},
                "float": {"median_ms": 0.42},
                "ratio": 2.1,
                "threads": 1,
            },
        },
        "notices": ["int8: output SQNR 19.2 dB [check the metric]"],
        "peak_mb": 512.0,
        "memory": {"start_anonymous_mb": 200.0, "peak_anonymous_mb": 300.0, "peak_resident_mb": 512.0},
        "seconds": 12.5,
    }
