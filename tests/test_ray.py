"""A search on a Ray cluster: the same front as here, and a worker that dies costs nothing."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from zoo import with_power

from compressor.errors import UsageError
from compressor.search.engines import SLOT
from compressor.search.tune import tune

ray = pytest.importorskip("ray")
SPACE = "fold,{int8(equalise=false,rounding=nearest,calibration={minmax,mse}),none}"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Path:
    """Where the nodes of the cluster have their temporary files."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def cluster(nodes) -> Iterator[str]:
    """A head and two workers of one core, on the loopback alone."""
    from ray.cluster_utils import Cluster

    place = {"node_ip_address": "127.0.0.2", "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # sockets have short paths
        patch.setenv("TMPDIR", str(nodes))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {SLOT: 1}, **place})
        for _ in range(2):
            made.add_node(num_cpus=1, **place)
    made.wait_for_nodes()
    try:
        yield made.address
    finally:
        made.shutdown()


def test_the_front_is_that_of_this_machine_though_a_worker_dies(cluster, nodes, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    x = torch.randn(64, 3, 16, 16)
    with_power(net, x[:8])
    torch.export.save(torch.export.export(net.eval(), (x[:4],)), tmp_path / "net.pt2")
    np.savez(tmp_path / "x.npz", input=x.numpy())

    def search(output: str, **options):
        return tune(
            tmp_path / "net.pt2", calibration=tmp_path / "x.npz", passes=SPACE, trials=3, output=tmp_path / output,
            **options,
        )  # fmt: skip

    killed: list[int] = []

    def kill() -> None:
        """The first process that works on a trial."""
        while not killed:
            for pid in [int(one.name) for one in Path("/proc").glob("[0-9]*")]:
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if words.startswith(b"ray::_run_there"):
                    time.sleep(0.5)
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break
            time.sleep(0.05)

    threading.Thread(target=kill, daemon=True).start()
    there = search("there", engine="ray", ray_address=cluster)
    assert killed and [one.state for one in there.outcomes.values()] == ["done"] * 3
    here = search("here", workers=1, latency_table=tmp_path / "there" / "tune.json")
    assert [(one.spec, one.sha256) for one in there.done] == [(one.spec, one.sha256) for one in here.done]
    assert [one.number for one in there.front] == [one.number for one in here.front]
    assert (tmp_path / "there" / "best" / "model.onnx").read_bytes() == (
        tmp_path / "here" / "best" / "model.onnx"
    ).read_bytes()
    assert list(nodes.iterdir()) == []


def test_a_cluster_that_is_not_there(tmp_path):
    from compressor.search.engines import Ray

    with pytest.raises(UsageError, match="no Ray cluster answers there"):
        Ray("127.0.0.1:1", 1.0)
