"""`trace-rl eval` as a user starts it: real engines on the embedded model, and an end by kill -9 in the middle."""

import json
import shutil
from pathlib import Path

import pytest
from watched_run import WatchedRun

from trace_rl.tasks.arithmetic import base_model_path

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SMALL = [
    "--sets",
    "arithmetic,arithmetic-longer,letters.jsonl",
    "all_sets.num_problems=24",
    "all_sets.samples_per_problem=2",
    "all_sets.max_response_tokens=160",
    "generator.max_concurrent_sequences=8",
]
NUM_SAMPLES = 24 * 2


def lines(folder: Path) -> list[str]:
    file = folder / "samples.jsonl"
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def samples(folder: Path) -> dict[tuple[str, int], dict]:
    found = [json.loads(line) for line in lines(folder)]
    return {(each["prompt_id"], each["sample"]): each for each in found}


def write_letters(cwd: Path) -> None:
    rows = [{"question": f"Start with {i + 1}. Step 1: add 2.", "answer": str(i + 3)} for i in range(24)]
    (cwd / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model and a copy of it elsewhere, evaluated without a break."""
    cwd = tmp_path_factory.mktemp("whole")
    write_letters(cwd)
    shutil.copytree(base_model_path(), cwd / "copy")
    with WatchedRun(["eval", "task:arithmetic", "copy", *SMALL], cwd, {}) as run:
        assert run.wait(400) == 0, run.printed
        (cwd / "printed.txt").write_text(run.printed)
    return cwd


def test_every_problem_has_all_of_its_samples(whole: Path) -> None:
    for name in ("arithmetic", "arithmetic-longer", "letters"):
        assert len(lines(whole / "evaluations/copy" / name)) == NUM_SAMPLES
    results = json.loads((whole / "evaluations/copy/results.json").read_text())
    accuracy = {name: results[name]["metrics"]["avg@2"]["mean"] for name in results}
    assert 0.3 < accuracy["arithmetic"] < 0.75  # the model card says 52 % at temperature 1
    assert accuracy["arithmetic-longer"] < accuracy["arithmetic"]
    assert all(each["num_problems"] == 24 and each["samples_per_problem"] == 2 for each in results.values())


def test_samples_are_a_function_of_weights_set_problem_and_number(whole: Path) -> None:
    for name in ("arithmetic", "arithmetic-longer", "letters"):
        base, copy = (samples(whole / "evaluations" / label / name) for label in ("task--arithmetic", "copy"))
        assert base == copy and len({each["text"] for each in base.values()}) > 24


def test_the_table_says_n_k_and_intervals_and_equal_weights_do_not_differ(whole: Path) -> None:
    printed = (whole / "printed.txt").read_text()
    assert "| task--arithmetic | arithmetic | 24 | 2 |" in printed
    assert "| copy | arithmetic-longer | 24 | 2 | +0.0 | 1.0000 | 1.0000 |" in printed


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_and_repeats_no_finished_sample(whole: Path, tmp_path: Path) -> None:
    write_letters(tmp_path)
    folder = tmp_path / "evaluations/task--arithmetic"
    with WatchedRun(["eval", "task:arithmetic", *SMALL], tmp_path, {}) as run:
        run.wait_until(lambda: len(lines(folder / "arithmetic")) >= 12, "in the middle of its first set", 200)
        run.kill()
    before = lines(folder / "arithmetic")
    assert 12 <= len(before) < NUM_SAMPLES
    with WatchedRun(["eval", "task:arithmetic", *SMALL], tmp_path, {}) as run:
        assert run.wait(300) == 0, run.printed
    after = lines(folder / "arithmetic")
    kept = before[:-1]  # the last line may have been cut off by the kill
    assert after[: len(kept)] == kept and len(after) == len(set(after)) == NUM_SAMPLES
    for name in ("arithmetic", "arithmetic-longer", "letters"):
        assert samples(folder / name) == samples(whole / "evaluations/task--arithmetic" / name)
    with WatchedRun(["eval", "task:arithmetic", *SMALL], tmp_path, {}) as run:
        assert run.wait(100) == 0 and "stored already" in run.printed
    assert lines(folder / "arithmetic") == after


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    with WatchedRun(["eval", str(tmp_path), "--sets", "arithmetic"], tmp_path, {}) as run:
        assert run.wait(60) == 1
        assert run.printed.startswith("error: ") and "config.json" in run.printed
        assert len(run.printed.splitlines()) == 1
