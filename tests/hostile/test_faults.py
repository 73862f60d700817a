"""Runs that are killed, interrupted, or left without room: the old output stays whole, and nothing lies about.

Moments are fixed here; `benchmarks/hostile.py --faults` draws them. Killed while it publishes: at every step of it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import honest
import pytest

from compressor import publishing
from compressor.errors import OutputError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, locks and mounts of POSIX")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Scene]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "net.pt2").write_bytes(honest.program())
    with faults.Host() as host:
        yield faults.Scene(host, folder / "net.pt2", folder / "scene")


def test_a_killed_run_leaves_the_old_output_whole(scene: faults.Scene) -> None:
    assert scene.killed(0.7) == []


def test_ctrl_c_leaves_nothing_behind(scene: faults.Scene) -> None:
    assert scene.interrupted(0.6) == []


def test_two_runs_at_once_leave_one_whole_output(scene: faults.Scene) -> None:
    assert scene.two_at_once(0.1) == []


def test_disks_without_room(scene: faults.Scene) -> None:
    if not faults.can_mount(scene.folder / "try"):
        pytest.skip("needs the right to mount a small disk: run as root")
    assert scene.full(16) == []
    assert scene.no_temp(4) == []
    assert scene.read_only() == []


def test_names_that_shells_and_locales_trip_over(scene: faults.Scene) -> None:
    assert scene.named("-with space, ünïcödé ☃\n$(touch pwned);'\"") == []


def test_a_broken_output_would_be_noticed(scene: faults.Scene, tmp_path: Path) -> None:
    """The checks of this file, each with what it must find."""
    before = faults.contents(scene.output)
    assert not faults.whole(scene.output) and not faults.untouched(scene.output, before)
    model = scene.output / "model.onnx"
    kept = model.read_bytes()
    model.write_bytes(b"x" + kept[1:])
    assert faults.untouched(scene.output, before) == ["model.onnx is not the one of report.json"]
    model.unlink()
    assert faults.whole(scene.output) == ["model.onnx is missing"]
    model.write_bytes(kept)
    assert faults.untouched(scene.output / "none", before) == ["the output is gone"]
    (tmp_path / ".out.compressing-x").mkdir()
    assert faults.litter(tmp_path, {"out"}) == [".out.compressing-x lies beside the output"]
    assert (
        not faults.windows_safe("a:b")
        and not faults.windows_safe("CON.txt")
        and not faults.windows_safe("a.")
    )


# -------------------------------------------------------------------- killed while it publishes


def output_of(folder: Path, text: str) -> Path:
    """An output whose files all hold the same text, and a file of the user's."""
    output = folder / "out"
    fill(output, text)
    (output / "model.ort").write_text(text)  # which the next run does not write
    (output / "notes.txt").write_text("mine")
    return output


def fill(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("model.onnx", "signature.json", "report.json"):
        (folder / name).write_text(text)
    (folder / "test_data_set_0").mkdir(exist_ok=True)
    (folder / "test_data_set_0" / "input_0.pb").write_text(text)


def texts(output: Path) -> set[str]:
    return {path.read_text() for path in output.rglob("*") if path.is_file() and path.name != "notes.txt"}


def killed_at(step: int, output: Path) -> bool:
    """A process that publishes `new` and is killed at its n-th step on files; False if it came to its end."""
    pid = os.fork()
    if not pid:
        try:
            with publishing.staging(output) as stage:
                fill(stage, "new")
                at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def at_step(step: int, action: Callable[[], None]) -> None:
    left = step

    def hear(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.", "ctypes.", "fcntl.")):
            left -= 1
            if left == 0:
                action()

    sys.addaudithook(hear)


@pytest.mark.parametrize("earlier", [True, False])
def test_killed_at_every_step_of_publishing(tmp_path: Path, earlier: bool) -> None:
    steps = 0
    for step in range(1, 500):
        folder = tmp_path / str(step)
        folder.mkdir()
        output = output_of(folder, "old") if earlier else folder / "out"
        killed = killed_at(step, output)
        if earlier:
            assert texts(output) in ({"old"}, {"new"}), f"killed at step {step}: a mixture"
            assert (output / "notes.txt").read_text() == "mine"
            assert (output / "model.ort").exists() == (texts(output) == {"old"})
        else:
            assert not output.exists() or texts(output) == {"new"}
        assert faults.swept(output, {"out"}) == []
        if not killed:
            assert texts(output) == {"new"}
            break
        steps += 1
    assert steps > 4


def test_where_folders_cannot_change_places_files_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = output_of(tmp_path, "old")
    monkeypatch.setattr(publishing, "_exchange", lambda one, two: False)
    with publishing.staging(output) as stage:
        fill(stage, "new")
    assert texts(output) == {"new"} and (output / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_folder_that_somebody_stands_in_keeps_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = output_of(tmp_path, "old")
    number = output.stat().st_ino
    monkeypatch.chdir(output)
    with publishing.staging(Path(".")) as stage:
        fill(stage, "new")
    assert texts(Path(".")) == {"new"} and output.stat().st_ino == number
    monkeypatch.chdir(tmp_path)
    with publishing.staging(output) as stage:
        fill(stage, "newer")
    assert texts(output) == {"newer"} and output.stat().st_ino != number


def test_an_output_behind_a_link(tmp_path: Path) -> None:
    output = output_of(tmp_path, "old")
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(output)
    with publishing.staging(link) as stage:
        fill(stage, "new")
    assert link.is_symlink() and texts(output) == {"new"} and list(link.parent.iterdir()) == [link]


def test_folders_of_runs_that_are_at_work_stay(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with publishing.staging(output) as first, publishing.staging(output) as second:
        assert first.is_dir() and second.is_dir() and first != second
        (tmp_path / ".out.compressing-abandoned").mkdir()
        (tmp_path / ".other.compressing-abandoned").mkdir()
        with publishing.staging(output):
            assert first.is_dir() and second.is_dir()
            assert not (tmp_path / ".out.compressing-abandoned").exists()
        assert (tmp_path / ".other.compressing-abandoned").is_dir()


def test_a_folder_to_stand_in_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = output_of(tmp_path, "old")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(OutputError, match="cannot write to out"), publishing.staging(Path("out")):
        pass
    with publishing.staging(output) as stage:
        fill(stage, "new")
    assert texts(output) == {"new"}


def test_a_name_as_long_as_there_are(tmp_path: Path) -> None:
    with publishing.staging(tmp_path / ("x" * 255)) as stage:
        fill(stage, "new")
    assert texts(tmp_path / ("x" * 255)) == {"new"}


def test_a_quota_is_no_bug(tmp_path: Path) -> None:
    for number in (errno.EFBIG, errno.EDQUOT, errno.EIO):
        with pytest.raises(OutputError, match="free space"), publishing.staging(tmp_path / "out"):
            raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []
