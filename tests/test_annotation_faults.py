"""Annotation by a real server over real HTTP: structured output, faults, kill -9 and resume, and a key that stays in.

One vLLM serves the module. One run is annotated by it through a proxy that lets three requests in ten fail in every
way; the run is killed in the middle of its third step and resumed, and most tests look at what that left behind.
"""

import asyncio
import base64
import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from chat_server import ChatServer, FaultPlan, Record
from pydantic import SecretStr
from vllm_server import MODEL, VllmServer, write_random_model
from watched_run import WatchedRun, files_with, forms_of

from trace_rl.annotation_prompts import PROMPT_VERSION, Message
from trace_rl.annotators import Api
from trace_rl.workers.annotation_cache import key_of
from trace_rl.workers.api_annotator import ApiChat
from trace_rl.workers.chat import ChatAnswer, ChatFault, ChatRequest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CONFIGS = Path(str(resources.files("trace_rl.configs")))
VARIABLE = "ANNOTATOR_TEST_KEY"
KEY = "9vXqTz4LmW8cRb2NfKj7Hs5DgYp3QaEu6Zt1Vx0B"
WRONG_KEY = "Ck8sWd3MzRq6TfJn1Lv5YbHg9PxKa2Ue7Do4Gi0S"
STEPS = 4
KILLED_STEP = 2
ANSWERS = 12
"""So many of that step were given before the kill."""
COMPLETIONS = 64
CONCURRENCY = 16
STEP_WAIT_S = 5.0
PLAN = FaultPlan(seed=5, share=0.3, stall_s=10.0)
RUN = [
    CONFIGS / "demo.yaml",
    CONFIGS / "methods/trace_both.yaml",
    "sampling.prompts_per_step=16",
    "sampling.samples_per_prompt=4",
    "learner.world_size=1",
    "evaluation.every=0",
    "logging.rollouts_every=1",
    f"logging.rollouts_per_step={COMPLETIONS}",
    "run.folder=run",
]
SCHEMA = {
    "type": "object",
    "properties": {
        "spans": {"type": "array", "items": {"enum": ["slip", "missing_case"]}, "minItems": 1, "maxItems": 3},
        "reflection": {"type": "string", "maxLength": 60},
    },
    "required": ["spans", "reflection"],
    "additionalProperties": False,
}


def backend(base_url: str) -> str:
    # a stall is longer than the deadline of a request, and that longer than a step waits
    return (
        f"annotator.backend={{type: api, base_url: '{base_url}', name: {MODEL}, api_key_env: {VARIABLE}, max_spans: 3, "
        f"max_reply_tokens: 512, limits: {{concurrency: {CONCURRENCY}, request_timeout_s: 8}}}}"
    )


@dataclass(frozen=True)
class Story:
    """What a run that was killed and resumed has left behind."""

    folder: Path
    before: list[Record]
    """Requests up to the kill."""
    after: list[Record]
    stored: set[str]
    """Keys of the answers that were on disk after the kill."""
    printed: str
    commands: set[str]
    """Command lines of all processes."""
    jobs: str
    """Ray's job table."""
    ray_files: list[Path]
    """Of the killed run's session of Ray."""
    leaks: list[Path]
    """Those that hold the key."""

    @property
    def steps(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("server")
    write_random_model(folder / "model")
    with VllmServer(folder / "model", folder / "log", KEY) as started:
        yield started


@pytest.fixture(scope="module")
def story(server: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Story:
    cwd = tmp_path_factory.mktemp("story")
    folder = cwd / "run"
    with ChatServer(plan=PLAN, upstream=server.base_url) as proxy:
        arguments = ["train", *RUN, f"run.steps={STEPS}", "run.checkpoint_every=1", backend(proxy.base_url)]
        arguments += [f"annotator.step_wait_s={STEP_WAIT_S}", "run.resume=auto"]
        with WatchedRun(arguments, cwd, {VARIABLE: KEY}) as killed:
            checkpoint = folder / "checkpoints" / f"step-{KILLED_STEP:06d}" / "trainer.json"
            killed.wait_until(checkpoint.exists, "at its third step", 300)
            jobs = killed.ray_jobs()
            earlier = {item["question"] for step in range(KILLED_STEP) for item in rollouts(folder, step)}
            killed.wait_until(lambda: num_new(proxy.records, earlier) >= ANSWERS, "answered so often", 60)
            killed.kill()
            before = list(proxy.records)
            stored = set(answers(folder, cwd / "after-kill"))
            ray_files, leaks = files_with(killed.temporary, forms_of(KEY))
        with WatchedRun(arguments, cwd, {VARIABLE: KEY}) as resumed:
            status = resumed.wait(300)
        assert status == 0, resumed.printed
        return Story(
            folder,
            before,
            proxy.records[len(before) :],
            stored,
            killed.printed + resumed.printed,
            killed.seen | resumed.seen,
            jobs,
            ray_files,
            leaks,
        )


def rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    dump = folder / "rollouts" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in dump.read_text(encoding="utf-8").splitlines()]


def num_new(records: list[Record], earlier: set[str]) -> int:
    """Answers to other questions than those of earlier steps."""
    return sum(is_answered(record) and not is_about(record, earlier) for record in records)


def is_about(record: Record, questions: set[str]) -> bool:
    return json.loads(record.body["messages"][1]["content"])["problem"] in questions


def is_answered(record: Record) -> bool:
    """Whether the server's own completion was handed over whole."""
    return record.fault is None and record.status == 200 and record.is_complete


def answers(folder: Path, copy: Path) -> dict[str, str]:
    """The stored answers, read in a copy, so that the run finds its file as the kill has left it: key -> text."""
    copy.mkdir()
    for file in folder.glob("annotations.sqlite*"):
        shutil.copy(file, copy)
    with sqlite3.connect(copy / "annotations.sqlite") as database:
        rows = database.execute("SELECT key, answer FROM answers").fetchall()
    return {key: json.loads(answer)["text"] for key, answer in rows}


def key_of_record(record: Record) -> str:
    """Where the answer to a request is stored."""
    body = record.body
    messages = tuple(Message(message["role"], message["content"]) for message in body["messages"])
    asked = ChatRequest(messages, schema_of(record), body["max_tokens"], body["temperature"])
    return key_of(f"api:{MODEL}", PROMPT_VERSION, asked)


def schema_of(record: Record) -> dict[str, Any]:
    form = record.body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"]
    schema: dict[str, Any] = form["json_schema"]["schema"]
    return schema


def ask(base_url: str, key: str, structured_output: str = "json_schema") -> ChatAnswer:
    """What the server says, without a proxy, to a question that a random model cannot understand."""
    settings = Api(base_url=base_url, name=MODEL, api_key_env=VARIABLE, structured_output=structured_output)
    request = ChatRequest((Message("system", "Mark errors."), Message("user", "1 + 1 = 3")), SCHEMA, 200, 0.0)

    async def asked() -> ChatAnswer:
        chat = ApiChat(settings, SecretStr(key))
        try:
            return await chat.ask(request, 60)
        finally:
            await chat.close()

    return asyncio.run(asked())


def read(text: str) -> Any:
    """The JSON of an answer; strings may hold bare control characters, which the server's grammar lets pass."""
    return json.loads(text, strict=False)


def test_a_random_model_answers_by_the_schema_only_because_the_server_enforces_it(server: VllmServer) -> None:
    said = ask(server.base_url, KEY)
    jsonschema.validate(read(said.text), SCHEMA)
    assert said.prompt_tokens > 10 and said.completion_tokens > 10
    with pytest.raises(ValueError):
        read(ask(server.base_url, KEY, "none").text)


def test_the_server_refuses_another_key_and_the_fault_does_not_tell_it(server: VllmServer) -> None:
    with pytest.raises(ChatFault) as caught:
        ask(server.base_url, WRONG_KEY)
    assert (caught.value.cause, caught.value.is_final) == ("refused", True)
    assert "answers HTTP 401" in str(caught.value) and VARIABLE in str(caught.value)
    assert not any(form.decode() in repr(caught.value) for form in forms_of(WRONG_KEY))


def test_a_run_ends_well_although_three_requests_in_ten_fail_in_every_way(story: Story) -> None:
    records = story.before + story.after
    faults = Counter(record.fault for record in records if record.fault)
    print(f"{len(records)} requests, faults {dict(faults)}")
    assert set(faults) == set(PLAN.kinds)
    # 0.3 +- 4 standard deviations of at most 0.035
    assert len(records) > 150 and 0.16 < faults.total() / len(records) < 0.44
    assert [record["step"] for record in story.steps] == [0, 1, 2, 3]
    assert all(record["learner/skipped_steps"] == 0 for record in story.steps if "learner/skipped_steps" in record)
    assert all(record["route/key_spans/selected_frac"] > 0 for record in story.steps)
    assert all(record["route/error_spans/selected_frac"] > 0 for record in story.steps)


def test_no_step_waits_past_its_deadline(story: Story) -> None:
    waits = [record["annotation/wait_s"] for record in story.steps]
    print("waits", [round(wait, 2) for wait in waits])
    assert max(waits) <= STEP_WAIT_S + 0.5
    assert max(waits) >= STEP_WAIT_S  # a stall lasts longer, so that the deadline has been met


def test_every_rollout_is_annotated_or_failed_with_a_cause(story: Story) -> None:
    total: Counter[str] = Counter()
    for record in story.steps:
        causes = Counter(item["annotation_cause"] for item in rollouts(story.folder, int(record["step"])))
        assert causes.total() == record["sampling/completions"] == COMPLETIONS
        failed = {cause: count for cause, count in causes.items() if cause not in ("annotated", "not_requested")}
        assert failed == by_cause(record, "annotation/failed/")
        assert record["annotation/annotated"] == causes["annotated"]
        assert record["annotation/failed"] == sum(failed.values()) == COMPLETIONS - causes["annotated"]
        total += causes
    print("rollouts", dict(total))
    assert total["annotated"] > COMPLETIONS and total["timeout"] > 0
    seen = Counter[str]()
    for record in story.steps:
        seen.update(by_cause(record, "annotation/faults/"))
    print("faults", dict(seen))
    assert set(seen) == {"rate_limited", "server_error", "unreachable", "timeout"}


def by_cause(record: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): count for name, count in record.items() if name.startswith(prefix)}


def test_every_answer_that_was_stored_follows_the_schema_that_was_sent(story: Story, tmp_path: Path) -> None:
    found = answers(story.folder, tmp_path / "copy")
    schemas = {key_of_record(record): schema_of(record) for record in story.before + story.after}
    assert len(found) > 50 and found.keys() <= schemas.keys()
    for key, text in found.items():
        jsonschema.validate(read(text), schemas[key])
    assert any(read(text)["spans"] for text in found.values())


def test_nothing_that_was_answered_is_requested_again_after_a_kill_and_a_resume(story: Story) -> None:
    questions = {item["question"] for item in rollouts(story.folder, KILLED_STEP)}
    assert len(questions) == 16
    redone = {key_of_record(record) for record in story.before if is_about(record, questions)}
    asked_again = {key_of_record(record) for record in story.after}
    delivered = {key_of_record(record) for record in story.before if is_answered(record)}
    first = story.steps[KILLED_STEP]
    print(
        f"{len(redone)} asked in the killed step, {len(redone & story.stored)} of them stored, "
        f"{len(delivered - story.stored)} of {len(delivered)} answers lost, {first['annotation/cache_hits']:g} hits"
    )
    assert not asked_again & story.stored
    assert len(delivered - story.stored) <= CONCURRENCY
    assert story.stored <= {key_of_record(record) for record in story.before}
    # the step that is done again has the same rollouts: what was stored is found, what was under way is asked again
    assert len(redone & delivered) >= ANSWERS
    assert first["annotation/cache_hits"] >= len(redone & story.stored) > 0
    assert asked_again & (redone - story.stored)


def test_the_key_reaches_the_server_and_nothing_else(story: Story) -> None:
    assert {record.headers["Authorization"] for record in story.before + story.after} == {f"Bearer {KEY}"}
    # what was searched is there, and a name beside the key is found in it
    files, leaks = files_with(story.folder, forms_of(KEY))
    names = {path.name for path in files}
    assert {"config.yaml", "metrics.jsonl", "run.log", "summary.md", "annotations.sqlite"} <= names
    assert any(path.parent.name == "logs" for path in files) and any(path.parent.name == "rollouts" for path in files)
    assert story.folder / "config.yaml" in files_with(story.folder, [VARIABLE.encode()])[1]
    assert {"gcs_server.out", "raylet.out"} <= {path.name for path in story.ray_files}
    assert leaks == story.leaks == []
    assert any(line.startswith("ray::SpanAnnotator") for line in story.commands)
    assert any(VARIABLE in line for line in story.commands)
    assert "driver_pid" in story.jobs and VARIABLE in story.jobs
    shown = [story.jobs, story.printed, *story.commands]
    assert not any(form.decode() in text for text in shown for form in forms_of(KEY))


def test_the_search_for_the_key_sees_through_disguises(tmp_path: Path) -> None:
    for shift in range(4):
        (tmp_path / str(shift)).write_bytes(base64.b64encode(b"x" * shift + KEY.encode() + b"xyz"))
    (tmp_path / "first half").write_text(f"Bearer {KEY[:20]}...")
    (tmp_path / "second half").write_text(f"...{KEY[20:]}")
    (tmp_path / "another key").write_text(WRONG_KEY)
    files, found = files_with(tmp_path, forms_of(KEY))
    assert [path.name for path in files if path not in found] == ["another key"]


def test_a_traceback_out_of_the_annotator_does_not_hold_the_key(story: Story, tmp_path: Path) -> None:
    """It cannot open its file of answers; Ray writes its traceback to the logs of the session."""
    cache = tmp_path / "notes.txt"
    cache.write_text("this is the file of another program")
    with WatchedRun(["annotate", story.folder, f"annotator.cache_path={cache}"], tmp_path, {VARIABLE: KEY}) as run:
        assert run.wait_and_keep_logs(tmp_path / "logs", 120) == 1
    assert all(files_with(tmp_path / "logs", [part])[1] for part in (b"workers/span_annotator.py", b"cannot be kept"))
    _, leaks = files_with(tmp_path, forms_of(KEY))
    assert "the annotator died while starting" in run.printed and "cannot be kept in" in run.printed
    assert leaks == [] and not any(form.decode() in text for text in [run.printed, *run.seen] for form in forms_of(KEY))


@pytest.mark.slow
def test_a_run_that_fails_does_not_tell_its_key(server: VllmServer, tmp_path: Path) -> None:
    """The server refuses every request; the annotator dies, and the run goes on; a learner dies, and it does not."""
    arguments = [
        "train",
        *RUN,
        "run.steps=1000",
        "run.checkpoint_every=0",
        "run.max_restarts=0",
        backend(server.base_url),
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    annotator = "ray::SpanAnnotator"
    with WatchedRun([*arguments, "annotator.step_wait_s=2"], tmp_path, {VARIABLE: WRONG_KEY}) as run:
        run.wait_until(metrics.exists, "past its first step", 300)
        first = run.only(annotator)
        run.kill_one(annotator)
        run.wait_until(lambda: run.only(annotator) not in (first, None), "given another annotator", 120)
        run.kill_one("ray::LearnerRank")
        assert run.wait(120) == 1
        printed, commands = " ".join(run.printed.split()), run.seen
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(step["annotation/annotated"] == 0 and step["annotation/failed"] == COMPLETIONS for step in steps)
    assert steps[0]["annotation/failed/refused"] > 0
    assert "answers HTTP 401" in printed and VARIABLE in printed
    assert "Traceback" in (tmp_path / "run" / "run.log").read_text()
    files, leaks = files_with(tmp_path, forms_of(WRONG_KEY))
    assert leaks == [] and any(path.parent.name == "logs" for path in files)
    assert not any(form.decode() in text for text in [printed, *commands] for form in forms_of(WRONG_KEY))


def test_a_missing_key_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    arguments = ["train", *RUN, backend("http://127.0.0.1:9/v1")]
    with WatchedRun(arguments, tmp_path, {VARIABLE: ""}) as run:
        assert run.wait(120) == 1
    assert f"api_key_env names {VARIABLE}, which is not set" in run.printed
    assert "Traceback" not in run.printed and not (tmp_path / "run").exists()
