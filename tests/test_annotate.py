"""`trace-rl annotate` as a user runs it, on three recorded answers to one sum: the numbers are worked out by hand."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, refused, said
from recorded import OFF_FORM, SLIPPED, SUM, graded, unrouted, write_rollouts
from typer.testing import CliRunner

from trace_rl.launch.cli import app
from trace_rl.launch.run_folder import RunFolder, write_config
from trace_rl.overlays import load_config
from trace_rl.workers.checkpoint_files import Manifest, write_manifest

CONFIGS = Path(str(resources.files("trace_rl.configs")))
RIGHT, WRONG = "sk-right-0123456789", "sk-wrong-9876543210"
MARKED = json.dumps({"spans": [{"start": 2, "end": 2, "type": "arith", "importance": 1}]})
"""The first computed number, in the demo's segments `Step 1: 20 - 7 = `, `13`, ..."""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo: a correct answer and two wrong ones at two steps, and one that was not graded in time."""
    folder = tmp_path_factory.mktemp("recorded") / "runs" / "demo"
    rollouts = [graded(SUM.solution, 0, 1.0), graded(SLIPPED, 1, 0.0), graded(SLIPPED, 2, 0.0, "timeout")]
    write_rollouts(folder, 0, [unrouted(item) for item in rollouts])
    write_rollouts(folder, 2, [unrouted(graded(OFF_FORM, 3, 0.0))])
    small = ["run.steps=10", "sampling.prompts_per_step=4", "sampling.samples_per_prompt=6"]
    schedule = "algorithm.routes.key_spans.schedule={type: hold_then_linear, hold_steps: 2, decay_steps: 3}"
    write_config(RunFolder(folder), load_config([CONFIGS / "demo.yaml"], [*small, schedule]))
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    """Marks the first number of whatever it is shown, for those who have the key."""

    def answer(body: dict[str, Any]) -> Reply:
        given = server.records[-1].headers.get("Authorization", "")
        if given != f"Bearer {RIGHT}":
            return refused(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}")
        return said(MARKED)

    with ChatServer(answer) as server:
        yield server


def annotate(rollouts: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "trace_rl.launch.cli", "annotate", str(rollouts), *arguments]
    variables = {**os.environ, "COLUMNS": "200", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def recording(run_folder: Path) -> Path:
    """Where the oracle's replies are recorded by whoever comes first."""
    return run_folder.parents[1] / "replies.jsonl"


@pytest.fixture(scope="module")
def compared(run_folder: Path, recording: Path) -> str:
    """What is printed of the oracle beside two controls, one of which marks everything."""
    options = ["--against", "all_token", "--against", "random", "--out", str(recording)]
    return annotate(run_folder, "annotator.coverage_cap=1", *options).stdout


def table(printed: str, title: str) -> dict[str, list[str]]:
    """Label -> cells of the table under a title."""
    lines = printed[printed.index(title) :].partition("└")[0].splitlines()
    rows = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in lines]
    return {cells[0]: cells[1:] for cells in rows if len(cells) > 1}


def api(server_url: str, **settings: Any) -> str:
    fields = {"type": "api", "base_url": server_url, "name": "m", "api_key_env": "KEY", **settings}
    return json.dumps(fields)


@pytest.mark.engine
def test_annotators_are_compared_and_recorded(compared: str, recording: Path) -> None:
    audit = table(compared, "What annotators make of 3 recorded rollouts")
    assert audit["annotated"] == ["3", "3", "3"]
    assert audit["not annotated"] == ["0", "0", "0"]
    # oracle: two numbers of 2 tokens in 27, one in 27, nothing in 8; all_token: all but the end: 26/27, 26/27 and 7/8
    assert audit["annotated without a span"][:2] == ["33.3%", "0.0%"]
    assert audit["spans"][:2] == ["3", "3"]
    assert audit["share of tokens marked"][:2] == [f"{(4 / 27 + 2 / 27) / 3:.1%}", f"{(52 / 27 + 7 / 8) / 3:.1%}"]
    # the rule has spans on two responses; all_token marks 52 tokens there, among them the rule's 6
    assert audit["against the rule: precision"][:2] == ["-", f"{6 / 52:.1%}"]
    assert audit["against the rule: recall"][:2] == ["-", "100.0%"]
    assert audit["spans of type arith"][0] == "3"
    agreement = table(compared, "oracle, measured against all_token")
    assert agreement["responses compared"] == ["1", "2"]
    assert agreement["precision"] == ["100.0%", "100.0%"]
    assert agreement["recall"] == [f"{4 / 26:.1%}", f"{2 / 33:.1%}"]
    assert agreement["F1"] == [f"{8 / 30:.1%}", f"{4 / 35:.1%}"]
    assert agreement["reference's first span, hit first"] == ["100.0%", "50.0%"]
    drawn = table(compared, "oracle, measured against random of oracle")
    assert drawn["responses compared"] == ["1", "1"]
    assert drawn["left out: both without a span"] == ["0", "1"]
    assert f"The replies of oracle are in {recording}; to use them: annotator.backend=replay" in compared
    assert "requests" not in compared
    assert len(recording.read_bytes().splitlines()) == 3


@pytest.mark.engine
@pytest.mark.usefixtures("compared")
def test_a_model_is_asked_once_and_failures_are_counted(server: ChatServer, run_folder: Path, recording: Path) -> None:
    backend = f"annotator.backend={api(server.base_url)}"
    others = ["--against", f"{{type: replay, path: {recording}}}", "--against", "oracle"]
    done = annotate(run_folder / "rollouts", backend, *others, KEY=RIGHT)
    assert len(server.records) == 3
    audit = table(done.stdout, "What annotators make of 3 recorded rollouts")
    # a reply of the server's is counted as 40 and 10 tokens
    assert audit["requests sent"] == ["3", "-", "-"]
    assert audit["prompt tokens"] == ["120", "-", "-"]
    assert audit["completion tokens"] == ["30", "-", "-"]
    # it marks one of two key spans and the one error, and, where the rule is silent, 2 of 8 tokens, which is the cap
    assert audit["share of tokens marked"][0] == f"{(4 / 27 + 2 / 8) / 3:.1%}"
    assert audit["against the rule: precision"] == ["100.0%", "100.0%", "-"]
    assert audit["against the rule: recall"] == [f"{4 / 6:.1%}", "100.0%", "-"]
    of_oracle = table(done.stdout, "api m, measured against oracle")
    assert of_oracle["precision"] == ["100.0%", "50.0%"]
    assert of_oracle["recall"] == ["50.0%", "100.0%"]
    assert table(done.stdout, "api m, measured against replay replies.jsonl") == of_oracle
    # 1 of 3 rollouts is correct: 8 of 24 a step at 5 of 10 steps, answered with 10 tokens each
    assert "asks its annotator at 5 of them. With rollouts like the 3 recorded ones" in done.stdout
    assert "  40 requests, 8 a step" in done.stdout
    assert "  400 completion tokens, by the answers above" in done.stdout
    assert (run_folder / "annotations.sqlite").is_file()

    once = {"max_attempts": 1}
    again = annotate(
        run_folder,
        backend,
        *("--against", api("http://127.0.0.1:1/v1", name="gone", limits=once)),
        *("--against", api(server.base_url, name="other", api_key_env="WRONG_KEY", limits=once)),
        f"annotator.record_path={recording.with_name('of_the_run.jsonl')}",
        KEY=RIGHT,
        WRONG_KEY=WRONG,
    )
    audit = table(again.stdout, "What annotators make of 3 recorded rollouts")
    assert audit["answers from the cache"] == ["3", "0", "0"]
    assert audit["requests sent"] == ["0", "3", "3"]
    assert audit["annotated"] == ["3", "0", "0"]
    assert audit["unreachable"] == ["-", "3", "-"]
    assert audit["refused"] == ["-", "-", "3"]
    assert table(again.stdout, "api m, measured against api gone")["left out: not annotated by one"] == ["1", "2"]
    assert [record.body["model"] for record in server.records] == ["m"] * 3 + ["other"] * 3
    assert "A run of" not in again.stdout  # nothing was measured
    assert not recording.with_name("of_the_run.jsonl").exists()
    assert "without spans" not in done.stderr
    unreachable, wrong_key = [line for line in again.stderr.splitlines() if "without spans" in line]
    assert "(model gone) cannot be reached" in unreachable
    assert "answers HTTP 401" in wrong_key
    assert "check the key in the environment variable WRONG_KEY" in wrong_key
    for text in (done.stdout, done.stderr, again.stdout, again.stderr):
        assert RIGHT not in text
        assert WRONG not in text


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """What is refused before Ray starts, in this process: the sentence."""

    def run(*arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(app, ["annotate", *map(str, arguments)])
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr

    return run


def test_an_estimate_asks_nobody_and_needs_no_key(
    run_folder: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEY", raising=False)
    asked_before = len(server.records)
    backend = f"annotator.backend={api(server.base_url, max_reply_tokens=50)}"
    result = CliRunner().invoke(app, ["annotate", str(run_folder), backend, "--estimate"])
    assert result.exit_code == 0, result.output
    # as above, at most 50 tokens each
    assert "  40 requests, 8 a step" in result.stdout
    assert "  2,000 completion tokens, at most, by annotator.backend.max_reply_tokens" in result.stdout
    assert len(server.records) == asked_before


def test_a_dump_without_rollouts_or_verdicts_is_one_sentence(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "gone does not exist; give a run folder" in refuse(tmp_path / "gone")
    assert "holds no rollouts; give a run folder" in refuse(tmp_path)
    write_rollouts(tmp_path / "run", 0, [unrouted(graded(OFF_FORM, 0, 0.0, "timeout"))])
    assert "run/config.yaml does not exist" in refuse(tmp_path / "run")
    message = refuse(tmp_path / "run", CONFIGS / "demo.yaml")
    assert "none of the 1 recorded rollouts has tokens and a verdict" in message


def test_what_an_annotator_lacks_is_one_sentence(
    refuse: Callable[..., str], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEY", raising=False)
    one = run_folder / "rollouts" / "step-000002.jsonl"
    grpo = "algorithm.routes={}"  # a run that asks no annotator: here it is asked
    for options in ([f"annotator.backend={api('https://host/v1')}"], ["--against", api("https://host/v1")]):
        message = refuse(one, *options, grpo)
        assert "annotator.backend.api_key_env names KEY, which is not set" in message
    assert "annotator.backend.path 'gone.jsonl' is no file" in refuse(
        one, "annotator.backend=replay", "annotator.backend.path=gone.jsonl"
    )
    assert "set annotator.coverage_cap=1" in refuse(one, "--against", "all_token")
    assert "annotator.backend has the type 'oracel'; did you mean 'oracle'?" in refuse(one, "--against", "oracel")
    assert "which asks no model and costs nothing" in refuse(one, "--estimate")


def test_another_annotator_takes_nothing_over_from_the_first(refuse: Callable[..., str], run_folder: Path) -> None:
    backend = f"annotator.backend={api('https://host/v1', api_key_env='')}"
    # were base_url taken over, it would be an unknown key of replay
    message = refuse(run_folder, backend, "--against", "{type: replay, path: gone.jsonl}")
    assert "annotator.backend.path 'gone.jsonl' is no file" in message


def test_a_policy_annotates_itself_by_its_newest_checkpoint(refuse: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_rollouts(run, 0, [unrouted(graded(SUM.solution, 0, 1.0))])
    for step in (2, 5):
        folder = run / "checkpoints" / f"step-{step:06d}"
        (folder / "hf").mkdir(parents=True)
        (folder / "hf" / "config.json").write_text(f'{{"max_position_embeddings": {10 * step}}}')
        write_manifest(folder, Manifest(step, None, {}))
    message = refuse(run, CONFIGS / "demo.yaml", "annotator.backend=self")
    assert "checkpoints/step-000005/hf, which annotates, has max_position_embeddings = 50" in message
    assert "arithmetic_base, which annotates" in refuse(run, CONFIGS / "demo.yaml", "annotator.backend=static")


def test_a_cluster_that_is_joined_keeps_its_token(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["annotate", str(run_folder), f"annotator.backend={api('https://host/v1')}", "--estimate"]
    assert CliRunner().invoke(app, [*arguments, "placement.ray_address=auto"]).exit_code == 0
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert os.environ["RAY_AUTH_TOKEN"]


def test_nothing_is_overwritten_by_a_recording(refuse: Callable[..., str], run_folder: Path, tmp_path: Path) -> None:
    dump = run_folder / "rollouts" / "step-000000.jsonl"
    before = dump.read_bytes()
    assert "exists already, and a recording may have cost money" in refuse(run_folder, "--out", dump)
    assert dump.read_bytes() == before
    assert "does not exist; make it" in refuse(run_folder, "--out", tmp_path / "no" / "replies.jsonl")
