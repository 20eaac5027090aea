"""The run doctor: what it says of folders that drivers have left in every state, and of torn and hostile ones."""

import json
import logging
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_run import STEP, MadeRun
from typer.testing import CliRunner

from trace_rl.errors import DataError, PreemptedError, TrainingError, WorkerError
from trace_rl.launch.cli import app, split_arguments
from trace_rl.launch.doctor.command import examine
from trace_rl.launch.doctor.diagnosis import Diagnosis, diagnose
from trace_rl.launch.doctor.evidence import gather
from trace_rl.launch.doctor.text import as_json, as_text, duration
from trace_rl.launch.restarts import Attempt, persist
from trace_rl.launch.run_folder import open_run_folder
from trace_rl.ledger import Record, encode
from trace_rl.overlays import load_config


def of(path: Path, full: bool = False, ago_s: float = 5.0) -> Diagnosis:
    evidence = gather(path, full)
    return diagnose(evidence, evidence.last_sign_s + ago_s, Path.cwd())


def goes_on_in(diagnosis: Diagnosis) -> Path:
    """The folder that the command writes to."""
    words = shlex.split(diagnosis.command)
    assert words[:2] == ["trace-rl", "train"]
    config = load_config(*split_arguments(words[2:]))
    assert config.run.resume == "auto"
    return open_run_folder(config).path


def acts(diagnosis: Diagnosis) -> list[str]:
    return [finding.sentence for finding in diagnosis.findings if finding.urgency == "act"]


def test_a_finished_run_needs_nothing(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 6)
    found = of(run.path)
    assert (found.state, found.is_well, found.command, found.first_cause) == ("finished", True, "", None)
    assert found.progress.steps_done == found.progress.resumes_at == 6
    assert (found.progress.steps_to_repeat, found.progress.remaining_s) == (0, 0.0)
    assert [(each.name, each.soundness) for each in found.checkpoints] == [
        ("step-000006", "verified"),
        ("step-000004", "complete"),
    ]
    prompts = found.prompts
    assert (prompts.issued, prompts.trained, prompts.lost, prompts.trained_twice) == (12, 12, 0, 0)
    assert "to go on        nothing to do" in as_text(found)


def test_a_finished_run_that_is_started_again_stays_finished(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 6)
    with run.driver():
        run.train(6, 6)
    assert of(run.path).state == "finished"


def test_a_run_of_no_steps_is_finished_by_its_summary(tmp_path: Path) -> None:
    run = MadeRun(tmp_path, steps=0)
    with run.driver():
        run.train(0, 0)
    assert of(run.path).state == "died"
    run.folder.summary.write_text("# demo: 0 steps")
    assert of(run.path).state == "finished"


def test_a_run_that_holds_its_lock_is_running(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        assert of(run.path).what_happened.startswith("it is starting (process")
        run.train(0, 3)
        found = of(run.path)
        assert (found.state, found.is_well, found.command) == ("running", True, "")
        assert found.what_happened.startswith(f"it is being written (process {os.getpid()} on host ")
        assert found.progress.step_s == 10.0  # steps began at 100, 110 and 120
        assert found.progress.remaining_s == 30.0  # 3 steps are left
        assert [each.soundness for each in found.checkpoints] == ["complete"]  # its disk is left alone


def test_the_time_between_two_drivers_is_no_step(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 2)
    told = json.loads(run.folder.lock.read_text())
    with run.driver():
        run.folder.lock.write_text(json.dumps({**told, "since_s": 115.0}))  # steps began at 100, 110, 120, 130
        lines = run.folder.metrics.read_text().replace('"clock/step_started_s": 1', '"clock/step_started_s": -9')
        run.folder.metrics.write_text(lines)
        run.train(2, 4)
        assert of(run.path).progress.step_s == 10.0


def test_a_run_that_has_been_silent_for_longer_than_a_stage_may_take_needs_someone(tmp_path: Path) -> None:
    run = MadeRun(tmp_path, placement={"step_timeout_s": 60})
    with run.driver():
        run.train(0, 3)
        assert of(run.path, ago_s=50).is_well
        found = of(run.path, ago_s=70)
    assert found.state == "running" and not found.is_well
    assert "nothing for 70 s, and a stage may take 60 s" in acts(found)[0]


def test_a_killed_run_died_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 5)
    found = of(run.path)
    assert (found.state, found.is_well) == ("died", False)
    assert "without a word" in found.what_happened and "out" not in found.mend_first
    assert (found.progress.steps_done, found.progress.resumes_at, found.progress.steps_to_repeat) == (5, 4, 1)
    assert found.progress.remaining_s == 20.0  # steps 4 and 5, of 10 s
    assert goes_on_in(found) == run.path


def test_a_run_that_is_killed_while_it_starts_never_trained(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        pass
    found = of(run.path)
    assert (found.state, found.is_well, found.progress.resumes_at) == ("not_started", False, None)
    assert goes_on_in(found) == run.path


def test_an_error_is_told_with_its_suspect_node_and_log(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    name = "worker-ab-01000000-4711.err"
    run.folder.worker_logs.mkdir()
    (run.folder.worker_logs / name).write_text(
        ":actor_name:LearnerRank\nfine\ntorch.OutOfMemoryError: CUDA out of memory\n"
    )
    (run.folder.worker_logs / "worker-cd-01000000-1.err").write_text("ValueError: of somebody else\n")
    error = WorkerError(
        f"learner rank 0 died while train_step: its process crashed or was killed (node 10.0.0.3, log /gone/{name})"
    )
    error.__cause__ = ValueError("Ray says: a stack")
    with run.driver(error):
        run.train(0, 3)
    found = of(run.path)
    assert found.state == "failed" and found.first_cause is not None
    cause = found.first_cause
    assert (cause.error, cause.sentence) == ("WorkerError", str(error))
    assert (cause.suspect, cause.node) == ("learner rank 0", "10.0.0.3")
    assert cause.log == str(run.folder.worker_logs / name)
    assert cause.log_says == "torch.OutOfMemoryError: CUDA out of memory"
    assert "more memory" in found.mend_first[0]
    assert goes_on_in(found) == run.path
    text = as_text(found)
    assert "ended with an error" in text and "suspect         learner rank 0 on node 10.0.0.3" in text


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (WorkerError("learner rank 1 failed while train_step: OutOfMemoryError: CUDA out of memory"), "max_tokens_per"),
        (WorkerError("generator engine 0 failed while sampling: CUDA out of memory"), "gpu_memory_frac"),
        (WorkerError("the teacher did not finish scoring within 3 s (placement.step_timeout_s)"), "step_timeout_s"),
        (TrainingError("step 3: the loss is not finite on learner rank 0"), "learning_rate"),
        (KeyError("reward"), "KeyError is not an error that trace-rl raises on purpose"),
    ],
)
def test_what_is_to_be_mended_goes_by_the_error(tmp_path: Path, error: Exception, hint: str) -> None:
    run = MadeRun(tmp_path)
    with run.driver(error):
        pass
    found = of(run.path)
    assert found.state == "failed" and "before the first step" in found.what_happened
    assert len(found.mend_first) == 1 and hint in found.mend_first[0]


def test_errors_of_several_lines_are_told_whole(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver(WorkerError("the rewarder failed: a\nb")):
        pass
    cause = of(run.path).first_cause
    assert cause is not None and (cause.error, cause.sentence) == ("WorkerError", "the rewarder failed: a\nb")


def test_a_log_that_is_cut_off_within_the_last_words_says_so(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver(KeyboardInterrupt()):
        run.train(0, 1)
    log = run.folder.log.read_text()
    run.folder.log.write_text(log[: log.index("Traceback") + 9])
    cause = of(run.path).first_cause
    assert cause is not None and cause.sentence == "run.log is cut off before it says which"


def test_sigterm_and_ctrl_c_are_no_errors(tmp_path: Path) -> None:
    told = PreemptedError("the run was told to end after 3 steps, of which it has a checkpoint")
    for name, raised, is_told, state in (
        ("a", told, True, "preempted"),
        ("b", KeyboardInterrupt(), False, "interrupted"),
        ("c", KeyboardInterrupt(), True, "preempted"),
        ("d", None, True, "preempted"),  # gone without a word after its grace
    ):
        run = MadeRun(tmp_path / name)
        with run.driver(raised):
            run.train(0, 3)
            if is_told:
                logging.getLogger("trace_rl.launch.preemption").warning(
                    "SIGTERM: the run keeps what it has done and ends"
                )
        found = of(run.path)
        assert (found.state, found.first_cause, found.is_well) == (state, None, False), name
        assert found.mend_first == ()
        assert goes_on_in(found) == run.path


def test_starts_that_a_run_has_made_by_itself_are_told_in_order(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    log = logging.getLogger("trace_rl.launch.train")

    def attempt(this: Attempt) -> None:
        run.train(2 * this.number, 2 * this.number + 2)
        this.has_begun = True
        if this.number < 2:
            raise WorkerError(f"learner rank {this.number} died while train_step: it. was killed")

    with run.driver():
        persist(attempt, 3, lambda: run.folder.complete_checkpoints()[-1][0], lambda said: log.warning("%s", said))
    found = of(run.path)
    assert found.state == "finished"
    assert [(each.after_step, each.cause) for each in found.restarts] == [
        (2, "learner rank 0 died while train_step: it. was killed"),
        (4, "learner rank 1 died while train_step: it. was killed"),
    ]
    assert found.prompts.resumptions == 2 and found.warnings == ()


def test_only_the_last_driver_is_asked_how_it_ended(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver(WorkerError("the teacher died")):
        run.train(0, 3)
    with run.driver():
        run.train(2, 6)
    found = of(run.path)
    assert (found.state, found.prompts.resumptions, found.prompts.trained_twice) == ("finished", 1, 0)


def test_damaged_checkpoints_are_named_with_what_is_used_instead(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 5)
    newest, before = run.folder.checkpoint(4), run.folder.checkpoint(2)
    (newest / "part" / "filling").write_bytes(bytes(99) + b"x")
    found = of(run.path)
    assert [each.soundness for each in found.checkpoints] == ["damaged", "verified"]
    assert (found.progress.resumes_at, found.progress.steps_to_repeat) == (2, 3)
    assert any(
        "part/filling has digest" in finding.sentence and "step-000002" in finding.sentence
        for finding in found.findings
    )
    newest.rename(newest.with_name("damaged-step-000004"))
    assert "damaged-step-000004 set aside" in as_text(of(run.path))
    (before / "manifest.json").unlink()
    found = of(run.path)
    assert found.progress.resumes_at is None
    assert "no checkpoint can be used" in found.mend_first[0]


def test_lost_and_repeated_prompts_need_someone(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 5)
        run.ledger.note("issued", 5, {"k": "task/lost"})
        run.ledger.note("trained", 5, {"drawn 0 0": "task/0"})
        run.train(5, 6)
    # `train` marks a resumption at 5, where there is no checkpoint: the account starts at nothing
    with run.driver():
        run.ledger.note("issued", 5, {"k": "task/lost"})
        run.ledger.note("trained", 5, {"drawn 5 0": "task/10"})
    found = of(run.path)
    assert found.state == "finished" and not found.is_well
    assert [sentence.split(";")[0] for sentence in acts(found)] == [
        "1 prompt was lost (the first: task/lost)",
        "1 prompt was trained twice (the first: task/10)",
    ]


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"reward/mean": 0.0}, "the reward is 0 in the last 6 steps; look at rollouts/"),
        (
            {"reward/mean": 0.0, "reward/timeouts": 8.0, "reward/errors": 1.0},
            "54 of the last 150 completions (48 timeo",
        ),
        ({"reward/mean": 0.0, "reward/graded": 0.0, "reward/truncated": 16.0}, "every completion was truncated"),
        ({"reward/zero_variance_groups_frac": 1.0}, "all completions of a prompt earned the same"),
        ({"annotation/failed_frac": 0.5}, "50% of the annotations failed"),
        ({"sync/canary_gap_max_nats": 8e-4}, "within 80% of its limit at step 0"),
        ({"staleness/max": 3.0}, "tokens were 3 versions old, and scheduling.max_staleness allows 0"),
        ({"queue/dropped_groups": 30.0}, "30.0 prompts a step are dropped"),
        ({"loss/total": math.nan}, "1 metric is not finite (loss/total since step 0)"),
    ],
)
def test_figures_that_are_worth_a_look(tmp_path: Path, metrics: dict[str, float], told: str) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 6, {**STEP, **metrics})
    (finding,) = of(run.path).findings
    assert told in finding.sentence


def test_a_jump_of_the_mismatch_is_told_with_its_step(tmp_path: Path) -> None:
    run = MadeRun(tmp_path, steps=40)
    with run.driver():
        run.train(0, 20, {**STEP, "mismatch/kl_nats": 2e-4})
        assert of(run.path).findings == ()
        run.train(20, 25, {**STEP, "mismatch/kl_nats": 0.02})
        (finding,) = of(run.path).findings
    assert "is 0.02 over the last 5 steps and was 0.0002; see what changed at step 20" in finding.sentence


def test_what_is_said_of_a_collapse_and_of_dumps(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 6)
        logging.getLogger("trace_rl.loop").warning("After 6 steps the run shows all three symptoms of a collapse")
    (run.path / "dumps").mkdir()
    (run.path / "dumps" / "step_000004.pt").write_bytes(b"")
    found = of(run.path)
    assert [finding.urgency for finding in found.findings] == ["act", "look"]
    assert (
        "watch on collapses has spoken at" in found.findings[0].sentence
        and "weights_only=False" in found.findings[1].sentence
    )


def test_a_full_disk_is_told_beside_what_a_checkpoint_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**29))
    assert "only 0.5 GiB are free" in acts(of(run.path))[0]


def test_folders_of_older_versions_are_read_too(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 5)
    run.folder.lock.unlink()
    (run.path / "ledger.jsonl").unlink()
    found = of(run.path)
    assert (found.state, found.is_well, found.progress.steps_done) == ("unknown", False, 5)
    assert "whether it still runs cannot be told" in found.what_happened
    assert found.prompts.ledger == "missing"


def test_the_command_finds_a_folder_that_has_another_name_and_belongs_to_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_in, started_in, asked_in = tmp_path / "made", tmp_path / "started in", tmp_path / "asked"
    for folder in (made_in, started_in, asked_in):
        folder.mkdir()
    monkeypatch.chdir(made_in)
    run = MadeRun(tmp_path, run={"folder": "runs/{name}"})
    moved = started_in / "runs" / "demo-2: {x}"
    with run.driver():
        run.train(0, 3)
    moved.parent.mkdir()
    run.path.rename(moved)
    run.path.parent.rmdir()
    told = json.loads((moved / "driver.lock").read_text())
    (moved / "driver.lock").write_text(json.dumps({**told, "working_folder": str(started_in)}))
    evidence = gather(moved, False)
    words = shlex.split(diagnose(evidence, 0.0, asked_in).command)
    assert words[:4] == ["cd", str(started_in), "&&", "trace-rl"]
    config = load_config(*split_arguments(words[5:]))
    assert open_run_folder(config).path == moved


def test_a_torn_and_hostile_folder_is_read_to_its_end(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver(WorkerError("the rewarder failed: \x1b]0;evil\x07\x1b[31m red \u202e\x9b2J")):
        run.train(0, 5)
    with run.folder.metrics.open("ab") as metrics:
        metrics.write(b'{"step": 1e999}\n[1]\n{"step": "x"}\n' + b"[" * 5000 + b'\n{"step": 5, "rew')
    with (run.path / "ledger.jsonl").open("ab") as ledger:
        ledger.write(b"\xff\xfe garbage\n{")
    for name in ("worker-a-1-2.err", "worker-a-1-2.out"):
        run.folder.worker_logs.mkdir(exist_ok=True)
        os.mkfifo(run.folder.worker_logs / name)
    found = of(run.path)
    assert (found.state, found.progress.steps_done, found.prompts.damaged_lines) == ("failed", 5, 1)
    text = as_text(found)
    assert all(char.isprintable() for line in text.split("\n") for char in line)
    assert r"\x1b]0;evil\x07\x1b[31m red \u202e\x9b2J" in text
    assert as_json(found).isascii()


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "run.log", "ledger.jsonl", "summary.md", "driver.lock"]
)
@pytest.mark.parametrize("damage", ["empty", "missing", "folder", "pipe", "noise", "cut"])
def test_no_damage_of_any_file_ends_the_doctor(tmp_path: Path, name: str, damage: str) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 5)
    file = run.path / name
    content = file.read_bytes() if file.exists() else b"# summary"
    file.unlink(missing_ok=True)
    if damage == "folder":
        file.mkdir()
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage != "missing":
        file.write_bytes({"empty": b"", "noise": os.urandom(5000), "cut": content[: len(content) // 2]}[damage])
    found = of(run.path)
    assert found.state in ("died", "unknown", "not_started")
    assert as_text(found).startswith(f"{run.path}: ")
    json.loads(as_json(found))


def test_long_files_are_read_from_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MadeRun(tmp_path, steps=50)
    with run.driver():
        run.train(0, 45)
    evidence = "trace_rl.launch.doctor.evidence."
    for limit in ("_METRICS_BYTES", "_LEDGER_BYTES", "_LOG_BYTES"):
        monkeypatch.setattr(evidence + limit, 1000)
    monkeypatch.setattr(evidence + "_CHECKPOINT_BYTES", 10)
    short, full = of(run.path), of(run.path, full=True)
    assert (short.prompts.ledger, full.prompts.ledger) == ("end", "whole")
    assert short.progress.steps_done == full.progress.steps_done == 45
    assert full.prompts.issued == 90
    assert short.findings == full.findings == ()
    assert (short.checkpoints[0].soundness, full.checkpoints[0].soundness) == ("complete", "verified")


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        examine(tmp_path / "nowhere", False, False)
    with pytest.raises(DataError, match="is no run folder"):
        examine(tmp_path, False, False)


KEYS = {
    "run", "state", "is_well", "what_happened", "first_cause", "restarts", "driver", "progress", "checkpoints",
    "set_aside", "prompts", "findings", "warnings", "mend_first", "command",
}  # fmt: skip


def test_the_command_prints_text_or_json_and_tells_by_its_exit_code(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver(WorkerError("the teacher died while scoring: it was killed")):
        run.train(0, 5)
    result = CliRunner().invoke(app, ["doctor", str(run.path), "--json"])
    told: dict[str, Any] = json.loads(result.output)
    assert result.exit_code == 1 and told.keys() == KEYS
    assert told["first_cause"]["suspect"] == "the teacher"
    assert told["progress"]["steps_to_repeat"] == 1
    with run.driver():
        run.train(4, 6)
    result = CliRunner().invoke(app, ["doctor", str(run.path)])
    assert result.exit_code == 0 and result.output.startswith(f"{run.path}: finished\n")
    assert CliRunner().invoke(app, ["doctor", str(tmp_path)]).exit_code == 1


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 6)
    script = (
        "import sys\nfrom trace_rl.launch.cli import app\n"
        f"app(['doctor', {str(run.path)!r}], standalone_mode=False)\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_durations_have_two_units_at_most() -> None:
    assert [duration(seconds) for seconds in (0.4, 89, 90, 3599, 12000, 172800 + 7200)] == [
        "0 s", "89 s", "2 min", "1 h 0 min", "3 h 20 min", "2 d 2 h",
    ]  # fmt: skip


def test_a_folder_that_is_made_to_hurt_is_answered_at_once(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with run.driver():
        run.train(0, 5)
    bomb = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)
    )
    run.folder.config.write_text(bomb + f"run: {{steps: {'9' * 300}, name: x, folder: '{{name:>999999999}}'}}\n")
    record = encode(Record(10**6, "trained", -(10**4000), {"a": 3, "b": None}))  # type: ignore[dict-item]
    with (run.path / "ledger.jsonl").open("ab") as ledger:
        ledger.write(record)
    run.folder.metrics.write_text(f'{{"step": 1e300, "time/step_s": 1}}\n{{"step": 3, "time/step_s": {"9" * 300}}}\n')
    with run.folder.log.open("a") as log:
        log.write("x\n" * 400_000)
    told = {"process": 1, "host": "h" * 300, "since_s": 1e300, "working_folder": "/" + "w" * 3000}
    run.folder.lock.write_text(json.dumps(told))
    (run.path / "dumps").write_text("")
    started = time.perf_counter()
    found = of(run.path)
    assert time.perf_counter() - started < 5  # bombs would take hours
    json.loads(as_json(found))
    assert as_text(found) and found.command == ""
    (run.path / "ledger.jsonl").write_bytes(b"\n" * 10**6)
    assert any("is no ledger" in finding.sentence for finding in of(run.path).findings)


@pytest.mark.parametrize("place", ["/" + "x" * 5000, "..", "a\0b", "/"])
def test_a_log_of_any_name_is_looked_for(tmp_path: Path, place: str) -> None:
    run = MadeRun(tmp_path)
    with run.driver(WorkerError(f"the teacher died (node 10.0.0.1, log {place})")):
        run.train(0, 1)
    cause = of(run.path).first_cause
    assert cause is not None and (cause.suspect, cause.log_says) == ("the teacher", "")


def test_a_run_on_a_cluster_is_told_to_go_on_there(tmp_path: Path) -> None:
    run = MadeRun(tmp_path, placement={"ray_address": "auto"})
    with run.driver():
        run.train(0, 3)
    (advice,) = of(run.path).mend_first
    assert "submit in place of train" in advice
