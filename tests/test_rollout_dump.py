"""A run's rollouts on disk: what the journal writes is read back as it was, and what is no rollout is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import write_rollouts

from trace_rl.batch import AnnotatedRollout, GradedRollout, GroupMember, Prompt, Rollout, RoutedRollout, Span
from trace_rl.errors import DataError
from trace_rl.launch.rollout_dump import config_of, dump_files, read_dump, run_folder_of

PROMPT = Prompt("p/7", "größer?\n", "7", "4 + 3 = 7", {"task": "sums", "num_steps": "2"})
SPANS = (Span(0, 1, "key", "arith", 2.5), Span(1, 3, "key", "copy"))
TEXT = 'a\u2028b\u0085c\x0b\x1c\r\n"}\n\U0001f600'
"""Ends of lines for str.splitlines, but not for JSON; an emoji; what looks like the end of a record."""


def routed(sample: int, text: str = TEXT, **changes: Any) -> RoutedRollout:
    rollout = Rollout(
        prompt=PROMPT,
        sample=sample,
        prompt_token_ids=(1, 2),
        token_ids=(5, 6, 7),
        rollout_logprobs=np.array([-1.0, -2.0, -0.5], dtype=np.float32),
        finish_reason="length",
        token_versions=np.array([3, 4, 4]),
        text=text,
    )
    graded = GradedRollout(rollout, **{"reward": 0.25, "cause": "truncated", "feedback": "Too long.", **changes})
    annotated = AnnotatedRollout(graded, SPANS, "annotated", {"merged": 1.0}, "Look again.")
    return RoutedRollout(GroupMember(annotated, (annotated,)), 0.5, ())


def test_what_the_journal_writes_is_read_back(tmp_path: Path) -> None:
    given = [routed(0), routed(1, text="", reward=1.0, cause="graded", feedback="")]
    write_rollouts(tmp_path, 0, given)
    read = read_dump(dump_files(tmp_path))
    assert len(read) == 2
    for one, item in zip(read, given, strict=True):
        before, after = item.member.graded, one.graded
        assert (after.reward, after.cause, after.feedback) == (before.reward, before.cause, before.feedback)
        for name in ("prompt", "sample", "token_ids", "finish_reason", "text"):
            assert getattr(after.rollout, name) == getattr(before.rollout, name), name
        assert after.rollout.token_versions.tolist() == [3, 4, 4]
        assert one.spans == SPANS


def test_what_is_not_recorded_cannot_be_trained_on(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 0, [routed(0)])
    (read,) = read_dump(dump_files(tmp_path))
    assert read.graded.rollout.prompt_token_ids == ()
    assert read.graded.rollout.rollout_logprobs.shape == (3,)
    assert np.isnan(read.graded.rollout.rollout_logprobs).all()


def test_a_dump_is_a_run_folder_or_its_rollouts_or_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "demo"
    for step in (10, 2):
        write_rollouts(run, step, [routed(step)])
    (run / "config.yaml").write_text("run: {name: demo}\n")
    steps = ["step-000002.jsonl", "step-000010.jsonl"]
    for path in (run, run / "rollouts"):
        assert [file.name for file in dump_files(path)] == steps
        assert [item.graded.rollout.sample for item in read_dump(dump_files(path))] == [2, 10]
    one = run / "rollouts" / steps[1]
    assert dump_files(one) == [one]
    monkeypatch.chdir(run / "rollouts")
    for path in (run, run / "rollouts", one, Path("."), Path(steps[0])):
        assert run_folder_of(path) == run.resolve()
        assert config_of(path) == run.resolve() / "config.yaml"


def test_a_run_may_be_called_rollouts(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts", 0, [routed(0)])
    assert run_folder_of(tmp_path / "rollouts") == (tmp_path / "rollouts").resolve()
    assert run_folder_of(tmp_path / "rollouts" / "rollouts") == (tmp_path / "rollouts").resolve()


def test_other_files_in_the_folder_are_no_rollouts(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 0, [routed(0)])
    (tmp_path / "rollouts" / "recording.jsonl").write_text('{"key": "k", "reply": {"spans": []}}\n')
    assert [file.name for file in dump_files(tmp_path)] == ["step-000000.jsonl"]


def test_without_rollouts_the_path_and_the_forms_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no rollouts; give a run folder \(logging\.rollouts_every decides"):
        dump_files(tmp_path)
    with pytest.raises(DataError, match=r"gone does not exist; give a run folder"):
        config_of(tmp_path / "gone")


def test_without_a_configuration_its_place_is_told(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 0, [routed(0)])
    with pytest.raises(DataError, match=r"config\.yaml does not exist, .*; name its YAML files behind "):
        config_of(tmp_path)


def test_a_step_without_rollouts_is_no_mistake(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 0, [])
    write_rollouts(tmp_path, 1, [routed(0)])
    assert len(read_dump(dump_files(tmp_path))) == 1


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda line: {key: value for key, value in line.items() if key != name}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (without("metadata"), r"metadata: Field required"),
        (lambda line: {**line, "token_ids": "567"}, r"token_ids: Input should be a valid array"),
        (lambda line: {**line, "token_ids": [5, 6, "7"]}, r"token_ids\.2: Input should be a valid integer"),
        (lambda line: {**line, "finish_reason": "eos"}, r"finish_reason: Input should be 'stop' or 'length'"),
        (lambda line: {**line, "spans": [{"start": 0}]}, r"spans\.0\.end: Field required"),
        (lambda line: {**line, "token_versions": [[4, 2]]}, r"the whole: .* token_versions has 2 tokens, but .* 3"),
        (lambda line: {**line, "token_versions": [[4, 4], [5, -1]]}, r"token_versions\.1\.1: .* greater than 0"),
        (without("token_versions"), r"the whole: .* token_versions has 0 tokens, but"),
        (lambda line: [line], r"the whole: Input should be an object"),
    ],
    ids=[
        "missing",
        "no list",
        "no number",
        "unknown word",
        "half a span",
        "short",
        "negative",
        "no versions",
        "no mapping",
    ],
)
def test_a_line_that_is_no_rollout_is_named(tmp_path: Path, change: Callable[[Any], Any], what: str) -> None:
    write_rollouts(tmp_path, 0, [routed(0), routed(1), routed(2)])
    (file,) = dump_files(tmp_path)
    lines = file.read_bytes().split(b"\n")
    lines[1] = json.dumps(change(json.loads(lines[1]))).encode()
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=rf"step-000000\.jsonl:2 is not a rollout .*\({what}.*\); remove the line"):
        read_dump([file])


@pytest.mark.parametrize("broken", [b"", b'{"prompt_id": "p', b"\xff\xfe"], ids=["blank", "cut", "no UTF-8"])
def test_a_line_that_is_no_text_is_named(tmp_path: Path, broken: bytes) -> None:
    write_rollouts(tmp_path, 0, [routed(0)])
    (file,) = dump_files(tmp_path)
    file.write_bytes(file.read_bytes() + broken + b"\n")
    with pytest.raises(DataError, match=r"step-000000\.jsonl:2 is not a rollout as trace-rl writes them \(the whole"):
        read_dump([file])


def test_a_dump_of_one_version_a_rollout_is_still_read(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 0, [routed(0)])
    (file,) = dump_files(tmp_path)
    line = json.loads(file.read_bytes())
    assert line.pop("token_versions") == [[3, 1], [4, 2]]
    file.write_text(json.dumps({**line, "policy_version": 7}) + "\n")
    (read,) = read_dump([file])
    assert read.graded.rollout.token_versions.tolist() == [7, 7, 7]
