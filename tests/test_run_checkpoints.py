"""The checkpoints of a run: published as one, verified before they are read, kept by a rule, safe on a full disk."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_role import make_checkpoints, names_in, steps_in

from trace_rl.errors import CheckpointError, WorkerError
from trace_rl.launch import run_checkpoints
from trace_rl.launch.run_checkpoints import Progress, RunCheckpoints, kept
from trace_rl.protocols import Drawn, StoredFile
from trace_rl.workers.checkpoint_files import read_manifest, seal, verify

MIB = 2**20


def save_all(checkpoints: RunCheckpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.learner.value = step
        checkpoints.save(step, {"index": step}, [])


def flip_bit(file: Path) -> None:
    """In the middle of a file, where it changes no length."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    checkpoints, learner, teacher = make_checkpoints(tmp_path)
    learner.value, teacher.value = 7, 5
    checkpoints.save(20, {"epoch": 1, "offset": 8}, [Drawn({"epoch": 1, "offset": 4}, 4, 1)])
    learner.value = teacher.value = 0
    assert checkpoints.load_newest() == Progress(
        20, {"epoch": 1, "offset": 8}, (Drawn({"epoch": 1, "offset": 4}, 4, 1),)
    )
    assert (learner.value, teacher.value) == (7, 5)
    manifest = verify(tmp_path / "checkpoints" / "step-000020")
    assert sorted(manifest.files) == [
        "part/filling",
        "teacher/part/filling",
        "teacher/value",
        "trainer.json",
        "value",
    ]
    assert manifest.num_bytes == 202 + (tmp_path / "checkpoints/step-000020/trainer.json").stat().st_size


def test_the_newest_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    checkpoints, *_ = make_checkpoints(tmp_path, keep_checkpoints=10)
    save_all(checkpoints, 900, 1000, 1000000, 20)
    shutil.copytree(tmp_path / "checkpoints/step-000020", tmp_path / "checkpoints/step-000020.mine")
    assert steps_in(checkpoints) == [20, 900, 1000, 1000000]
    assert checkpoints.load_newest().step == 1000000


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    checkpoints, *_ = make_checkpoints(tmp_path)
    save_all(checkpoints, 10)
    with pytest.raises(CheckpointError, match=r"step-000010 exists already, so another run"):
        save_all(checkpoints, 10)
    verify(tmp_path / "checkpoints/step-000010")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda folder: truncate(folder / "part/filling"), "part/filling has 99 bytes, but 100 were written"),
    "flipped": (lambda folder: flip_bit(folder / "part/filling"), "part/filling has digest"),
    "flipped teacher": (lambda folder: flip_bit(folder / "teacher/value"), "teacher/value has digest"),
    "flipped progress": (lambda folder: flip_bit(folder / "trainer.json"), "trainer.json has digest"),
    "flipped manifest": (lambda folder: flip_bit(folder / "manifest.json"), "manifest.json is damaged"),
    "truncated manifest": (lambda folder: os.truncate(folder / "manifest.json", 60), "manifest.json is damaged"),
    "empty manifest": (lambda folder: os.truncate(folder / "manifest.json", 0), "manifest.json is damaged"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "missing": (lambda folder: (folder / "value").unlink(), "value is missing (1 of 5 files are)"),
    "missing folder": (lambda folder: shutil.rmtree(folder / "teacher"), "(2 of 5 files are)"),
    "extra": (lambda folder: (folder / "part/more").touch(), "part/more is there, which manifest.json does not list"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    damage, sentence = DAMAGES[name]
    checkpoints, learner, _ = make_checkpoints(tmp_path)
    save_all(checkpoints, 10, 20)
    damage(tmp_path / "checkpoints" / "step-000020")
    with caplog.at_level(logging.WARNING, "trace_rl"):
        assert checkpoints.load_newest() == Progress(10, {"index": 10}, ())
    (warning,) = caplog.messages
    assert sentence in warning and "step-000020 is damaged" in warning
    assert learner.value == 10
    assert names_in(checkpoints) == ["damaged-step-000020", "step-000010"]
    save_all(checkpoints, 20)  # the run comes by there again
    assert checkpoints.load_newest().step == 20
    assert names_in(checkpoints) == ["damaged-step-000020", "step-000010", "step-000020"]


def test_damaged_ones_are_kept_and_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints, *_ = make_checkpoints(tmp_path, keep_checkpoints=3)
    save_all(checkpoints, 10, 20, 30)
    for step in (20, 30):
        flip_bit(checkpoints.folder.checkpoint(step) / "part/filling")
    with caplog.at_level(logging.WARNING, "trace_rl"):
        assert checkpoints.load_newest().step == 10
    assert len(caplog.messages) == 2
    save_all(checkpoints, 20, 30)
    flip_bit(checkpoints.folder.checkpoint(30) / "value")
    assert checkpoints.load_newest().step == 20
    assert names_in(checkpoints) == [
        "damaged-step-000020",
        "damaged-step-000030",
        "damaged-step-000030-2",
        "step-000010",
        "step-000020",
    ]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    checkpoints, learner, _ = make_checkpoints(tmp_path)
    assert not checkpoints.exist()
    save_all(checkpoints, 10, 20)
    learner.value = 0
    for step in (10, 20):
        truncate(checkpoints.folder.checkpoint(step) / "part/filling")
    for _ in range(2):  # the second start finds no step-N any more
        assert checkpoints.exist()
        with pytest.raises(
            CheckpointError,
            match=r"every checkpoint of this run is damaged \(damaged-step-000010, damaged-step-000020 in .*run\.res",
        ):
            checkpoints.load_newest()
    assert learner.value == 0
    (tmp_path / "checkpoints/damaged-step-000020").rename(tmp_path / "checkpoints/step-000020")
    (tmp_path / "checkpoints/step-000020/part/filling").write_bytes(bytes(100))  # a copy from elsewhere
    assert checkpoints.load_newest().step == 20


def test_another_format_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, *_ = make_checkpoints(tmp_path)
    save_all(checkpoints, 10)
    monkeypatch.setattr("trace_rl.workers.checkpoint_files._FORMAT", 2)
    save_all(checkpoints, 20)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"is of format 2, and this version of trace-rl reads format 1"):
        checkpoints.load_newest()
    assert names_in(checkpoints) == ["step-000010", "step-000020"]


@pytest.mark.parametrize("content", ["[]", '{"step": 10}', '{"step": 10, "position": {"index": "x"}, "pending": []}'])
def test_progress_of_another_kind_is_told(tmp_path: Path, content: str) -> None:
    checkpoints, *_ = make_checkpoints(tmp_path)
    save_all(checkpoints, 10)
    folder = checkpoints.folder.checkpoint(10)
    files = dict(read_manifest(folder).files)
    (folder / "trainer.json").write_text(content)
    manifest = run_checkpoints.Manifest(10, None, files | seal(folder, [folder / "trainer.json"]))
    run_checkpoints.write_manifest(folder, manifest)
    with pytest.raises(CheckpointError, match=r"trainer\.json is as it was written, but cannot be read"):
        checkpoints.load_newest()


def test_a_half_written_checkpoint_does_not_exist(tmp_path: Path) -> None:
    checkpoints, learner, _ = make_checkpoints(tmp_path)
    save_all(checkpoints, 10)
    leftover = tmp_path / "checkpoints" / ".step-000015.partial"
    (leftover / "hf").mkdir(parents=True)  # of a run that was killed
    learner.is_broken = True
    with pytest.raises(
        CheckpointError, match=r"after step 20 could not be written \(the disk is on fire\).*step-000010"
    ):
        save_all(checkpoints, 20)
    assert names_in(checkpoints) == ["step-000010"]
    learner.is_broken = False
    assert checkpoints.load_newest().step == 10
    save_all(checkpoints, 20)
    assert checkpoints.load_newest().step == 20


def test_what_ended_a_role_is_told_as_it_is(tmp_path: Path) -> None:
    checkpoints, learner, _ = make_checkpoints(tmp_path)

    def dies(path: Path) -> dict[str, StoredFile]:
        raise WorkerError("learner rank 1 died")

    learner.save = dies
    with pytest.raises(WorkerError, match="learner rank 1 died"):
        save_all(checkpoints, 10)
    assert names_in(checkpoints) == []


def test_files_that_the_driver_does_not_see_are_told(tmp_path: Path) -> None:
    checkpoints, learner, _ = make_checkpoints(tmp_path)
    learner.save = lambda path: {"learner/state-1-0.safetensors": StoredFile(5, "00")}  # on another node's own disk
    with pytest.raises(CheckpointError, match=r"has 0 bytes as seen from the driver's node, but 5 were written"):
        save_all(checkpoints, 10)


@pytest.mark.parametrize(
    ("last", "best", "expected"),
    [
        (1, 0, {50}),
        (2, 0, {40, 50}),
        (1, 1, {50, 30}),  # 0.8 at 20 and 30: the newer
        (1, 2, {50, 30, 20}),
        (2, 1, {50, 40, 30}),
        (9, 9, {10, 20, 30, 40, 50}),
    ],
)
def test_which_checkpoints_stay(last: int, best: int, expected: set[int]) -> None:
    assert kept({10: 0.5, 20: 0.8, 30: 0.8, 40: None, 50: 0.1}, last, best) == expected


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    scores = {10: 0.5, 30: 0.9, 40: 0.7, 60: 0.8}  # nothing was measured after 20 and 50 steps
    checkpoints, *_ = make_checkpoints(tmp_path, keep_checkpoints=2, keep_best=1, scores=scores)
    seen = []
    for step in (10, 20, 30, 40, 50, 60):
        save_all(checkpoints, step)
        seen.append(steps_in(checkpoints))
    assert seen == [[10], [10, 20], [20, 30], [30, 40], [30, 40, 50], [30, 50, 60]]


def test_the_last_other_one_goes_only_after_the_new_one_was_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, *_ = make_checkpoints(tmp_path, keep_checkpoints=1)
    save_all(checkpoints, 10)
    write = run_checkpoints.write_manifest

    def spoil(folder: Path, manifest: run_checkpoints.Manifest) -> None:
        write(folder, manifest)
        flip_bit(folder / "part/filling")  # by the disk

    monkeypatch.setattr(run_checkpoints, "write_manifest", spoil)
    save_all(checkpoints, 20)
    assert steps_in(checkpoints) == [10, 20]
    assert "No checkpoint is removed, because" in caplog.text
    assert checkpoints.load_newest().step == 10


KILLS = """
import os, signal, sys, time
from pathlib import Path
sys.path.append(sys.argv[2])
from file_role import make_checkpoints

def save_forever(folder):
    checkpoints, learner, _ = make_checkpoints(folder, num_bytes=2**20)
    for step in range(1, 10_000):
        learner.value = step
        checkpoints.save(step, {"index": step}, [])

for number in range(3):
    folder = Path(sys.argv[1]) / str(number) / "checkpoints"
    child = os.fork()
    if child == 0:
        save_forever(folder.parent)
    while not list(folder.glob("step-*")) or not list(folder.glob(".step-*")):
        time.sleep(0.0001)
    time.sleep(0.0005 * number)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_kill_in_the_midst_of_a_save_loses_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLS, tmp_path, Path(__file__).parent], check=True, timeout=200)
    num_partial = 0
    for number in range(3):
        checkpoints, learner, _ = make_checkpoints(tmp_path / str(number))
        num_partial += any(name.startswith(".") for name in names_in(checkpoints))
        for _, complete in checkpoints.folder.complete_checkpoints():
            verify(complete)
        newest = steps_in(checkpoints)[-1]
        assert checkpoints.load_newest() == Progress(newest, {"index": newest}, ())
        assert learner.value == newest
        save_all(checkpoints, newest + 1)
        assert not any(name.startswith(".") for name in names_in(checkpoints))
    assert num_partial > 0  # else no save was hit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={8 * MIB}", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_without_room_nothing_is_begun(small_disk: Path) -> None:
    checkpoints, *_ = make_checkpoints(small_disk, num_bytes=MIB, expected_bytes=9 * MIB)
    with pytest.raises(
        CheckpointError,
        match=r"no room for the checkpoint after step 10: 0\.00781 GiB are free in .*checkpoints, and about 0\.00923 "
        r"GiB are needed, and there is none before it; make room",
    ):
        save_all(checkpoints, 10)
    assert names_in(checkpoints) == []


def test_what_is_not_kept_goes_first_where_room_is_short(small_disk: Path) -> None:
    # 3 MiB each: two lie there, and 2 MiB are free; the third would put out the first in any case
    checkpoints, *_ = make_checkpoints(small_disk, num_bytes=3 * MIB // 2)
    save_all(checkpoints, 10, 20, 30)
    assert steps_in(checkpoints) == [20, 30]
    flip_bit(checkpoints.folder.checkpoint(30) / "part/filling")
    with pytest.raises(CheckpointError, match="no room for the checkpoint after step 40"):
        save_all(checkpoints, 40)  # 20 is the last good one
    assert checkpoints.load_newest().step == 20


def test_a_disk_that_fills_up_during_a_save_leaves_the_last_one_and_the_metrics(small_disk: Path) -> None:
    checkpoints, learner, _ = make_checkpoints(small_disk, num_bytes=MIB)
    metrics = checkpoints.folder.metrics
    metrics.write_text('{"step": 0}\n')
    save_all(checkpoints, 10)
    learner.num_bytes = 7 * MIB  # more than the one before, by which the room was judged
    with pytest.raises(
        CheckpointError,
        match=r"after step 20 .*No space left on device.*GiB are free in .*step-000010 is the newest one",
    ):
        save_all(checkpoints, 20)
    verify(checkpoints.folder.checkpoint(10))
    assert names_in(checkpoints) == ["step-000010"]
    assert shutil.disk_usage(small_disk).free > 5 * MIB
    with metrics.open("a") as file:
        file.write('{"step": 1}\n')
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0, 1]
    learner.num_bytes = MIB
    save_all(checkpoints, 20)
    assert checkpoints.load_newest().step == 20
