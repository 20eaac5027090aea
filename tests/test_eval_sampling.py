"""Samples are drawn once, graded and stored; an evaluation that ended anywhere goes on where it stopped."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from trace_rl.batch import GradedRollout, Prompt, Rollout, RolloutRequest
from trace_rl.config.evaluation import EvalConfig, EvalSet
from trace_rl.config.roles import Model
from trace_rl.errors import DataError, ModelError
from trace_rl.evaluation import Sample
from trace_rl.launch.evaluate.sampling import Asked, check_lengths, collect, requests_of, warn_of_idle_thinking
from trace_rl.launch.evaluate.store import SampleStore, settings_of
from trace_rl.launch.evaluate.subjects import NEWEST, Subject, find_subjects
from trace_rl.overlays import dump_config, load_config
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import Decoding
from trace_rl.tasks.arithmetic import base_model_path
from trace_rl.workers.checkpoint_files import Manifest, write_manifest

SET = EvalSet(name="sums", path="sums.jsonl", samples_per_problem=3)
PROBLEMS = [Prompt(f"p{index}", f"question {index}", str(index)) for index in range(4)]


class Letters:
    """A tokenizer that renders a chat as the codes of its letters, with the template's arguments in front."""

    def apply_chat_template(self, conversation, **kwargs) -> list[int]:
        return [int(bool(kwargs.get("enable_thinking"))), *map(ord, conversation[-1]["content"])]


class Engine:
    """Writes a number that follows from the request's seed; ends early where it is told to."""

    def __init__(self, dies_after: int = 10**9) -> None:
        self.asked: list[tuple[str, int]] = []
        self.decodings: list[Decoding] = []
        self._left = dies_after

    def generate(self, settings: EvalSet, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        self.asked += [(request.prompt.prompt_id, request.sample) for request in requests]
        self.decodings.append(decoding)
        return self._write(requests)

    def _write(self, requests: Sequence[RolloutRequest]) -> Iterator[Rollout]:
        for request in reversed(requests):
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            tokens = np.array([0])
            text = f"\\boxed{{{request.seed % 4}}}"
            yield Rollout(
                request.prompt, request.sample, request.prompt_token_ids, (1,), tokens * 0.0, "stop", tokens, text
            )


class Equality:
    def grade(self, rollouts: Iterable[Rollout]) -> Iterator[GradedRollout]:
        for rollout in rollouts:
            yield GradedRollout(rollout, float(rollout.text == f"\\boxed{{{rollout.prompt.answer}}}"), "graded")


def requests(settings: EvalSet = SET, seed: int = 0, problems: Sequence[Prompt] = PROBLEMS) -> list[RolloutRequest]:
    return requests_of(PromptEncoder(Letters(), "", {}), settings, problems, seed)


def evaluate(folder: Path, engine: Engine, settings: EvalSet = SET, **others) -> list[Sample]:
    with SampleStore(folder / settings.name, settings_of(settings, model="m")) as store:
        asked = Asked(settings, requests(settings, **others), store)
        collect([asked], engine.generate, lambda settings: Equality())
        return asked.samples()


def test_every_sample_is_stored_with_its_reward_and_text(tmp_path: Path) -> None:
    samples = evaluate(tmp_path, Engine())
    lines = [json.loads(line) for line in (tmp_path / "sums/samples.jsonl").read_text().splitlines()]
    assert len(samples) == len(lines) == 12
    assert [(each.prompt_id, each.sample) for each in samples[:4]] == [("p0", 0), ("p0", 1), ("p0", 2), ("p1", 0)]
    for sample in samples:
        assert sample.reward == float(sample.seed % 4 == int(sample.expected))
        assert sample.text == f"\\boxed{{{sample.seed % 4}}}" and sample.answer == str(sample.seed % 4)
    assert 0 < sum(sample.reward for sample in samples) < 12


def test_an_evaluation_that_was_ended_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    whole = evaluate(tmp_path / "whole", Engine())
    first, second, third = Engine(dies_after=5), Engine(), Engine()
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "ended", first)
    resumed = evaluate(tmp_path / "ended", second)
    assert resumed == whole
    finished = {key for key in first.asked} - set(second.asked)
    assert len(finished) == 5 and len(second.asked) == 7
    evaluate(tmp_path / "ended", third)
    assert third.asked == []
    assert len((tmp_path / "ended/sums/samples.jsonl").read_text().splitlines()) == 12


def test_a_line_that_was_cut_off_is_drawn_again(tmp_path: Path) -> None:
    whole = evaluate(tmp_path, Engine())
    file = tmp_path / "sums/samples.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    engine = Engine()
    assert evaluate(tmp_path, engine) == whole
    assert len(engine.asked) == 1 and len(file.read_text().splitlines()) == 12
    again = Engine()
    assert evaluate(tmp_path, again) == whole and again.asked == []


def test_a_damaged_line_in_the_middle_is_told(tmp_path: Path) -> None:
    evaluate(tmp_path, Engine())
    file = tmp_path / "sums/samples.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"samples.jsonl:2 is damaged"):
        evaluate(tmp_path, Engine())


def test_more_samples_and_problems_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    fewer = SET.model_copy(update={"samples_per_problem": 2})
    before = evaluate(tmp_path, Engine(), fewer, problems=PROBLEMS[:2])
    engine = Engine()
    after = evaluate(tmp_path, engine)
    assert len(engine.asked) == 12 - 4
    assert [sample for sample in after if sample in before] == before


def test_another_evaluation_is_never_mixed_in(tmp_path: Path) -> None:
    evaluate(tmp_path, Engine())
    hotter = SET.model_copy(update={"temperature": 1.0})
    with pytest.raises(DataError, match=r"temperature is 1\.0, was 0\.6"):
        evaluate(tmp_path, Engine(), hotter)
    with pytest.raises(DataError, match="problem p0 that was asked something else"):
        evaluate(tmp_path, Engine(), seed=1)
    changed = [Prompt("p0", "another question", "0"), *PROBLEMS[1:]]
    with pytest.raises(DataError, match="problem p0 that was asked something else"):
        evaluate(tmp_path, Engine(), problems=changed)
    corrected = [*PROBLEMS[:3], Prompt("p3", "question 3", "4")]
    with pytest.raises(DataError, match="problem p3"):
        evaluate(tmp_path, Engine(), problems=corrected)


def test_seeds_depend_on_set_problem_and_sample_and_on_no_order() -> None:
    seeds = {(each.prompt.prompt_id, each.sample): each.seed for each in requests()}
    backwards = requests(problems=PROBLEMS[::-1])
    assert {(each.prompt.prompt_id, each.sample): each.seed for each in backwards} == seeds
    assert len(set(seeds.values())) == 12
    renamed = requests(SET.model_copy(update={"name": "others"}))
    assert not set(seeds.values()) & {each.seed for each in renamed}


def test_thinking_changes_the_prompt() -> None:
    thinking = requests(SET.model_copy(update={"thinking": "on"}))
    assert {each.prompt_token_ids[0] for each in thinking} == {1}
    assert {each.prompt_token_ids[0] for each in requests()} == {0}


def test_a_template_that_does_not_know_thinking_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Plain(Letters):
        def apply_chat_template(self, conversation, **kwargs) -> list[int]:
            return [ord(letter) for letter in conversation[-1]["content"]]

    thinking = SET.model_copy(update={"thinking": "on"})
    for tokenizer, settings in ((Letters(), thinking), (Plain(), SET)):
        warn_of_idle_thinking(PromptEncoder(tokenizer, "", {}), settings, PROBLEMS[0])
    assert not caplog.messages
    warn_of_idle_thinking(PromptEncoder(Plain(), "", {}), thinking, PROBLEMS[0])
    assert caplog.messages == [
        "set sums has thinking on, but the checkpoint's chat template makes the same prompt either way"
    ]


def test_all_sets_are_submitted_before_the_first_is_waited_for(tmp_path: Path) -> None:
    engine = Engine()
    others = SET.model_copy(update={"name": "others", "temperature": 0.9, "top_k": 0})
    seen: list[tuple[str, int, int]] = []

    def tell(settings: EvalSet, done: int, total: int) -> None:
        assert len(engine.decodings) == 2
        seen.append((settings.name, done, total))

    with (
        SampleStore(tmp_path / "a", {}) as first,
        SampleStore(tmp_path / "b", {}) as second,
    ):
        asked = [Asked(SET, requests(), first), Asked(others, requests(others), second)]
        collect(asked, engine.generate, lambda settings: Equality(), tell)
        assert [len(item.samples()) for item in asked] == [12, 12]
    assert engine.decodings == [Decoding(0.6, 0.95, 20), Decoding(0.9, 0.95, 0)]
    assert seen[0] == ("sums", 0, 12) and seen[-1] == ("others", 12, 12)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the embedded model without its weights' bulk."""
    folder = tmp_path / "model"
    shutil.copytree(base_model_path(), folder)
    return folder


def subject(path: Path, step: int = NEWEST, **settings) -> Subject:
    (found,) = find_subjects([str(path)], step, EvalConfig(sets="arithmetic", **settings))
    return found


def make_run(folder: Path, model: Path, steps: Sequence[int]) -> Path:
    config = load_config(
        [], [f"model.path={model}", "data.path=task:arithmetic", "model.dtype=float32", "data.system_prompt=Be brief."]
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    for step in steps:
        place = folder / f"checkpoints/step-{step:06d}"
        shutil.copytree(model, place / "hf")
        write_manifest(place, Manifest(step, None, {}))
    return folder


def test_a_checkpoint_is_found_with_its_precision(checkpoint: Path) -> None:
    found = subject(checkpoint)
    assert (found.label, found.model.path, found.model.dtype) == ("model", str(checkpoint), "float32")
    assert subject(checkpoint, dtype="bfloat16").model.dtype == "bfloat16"


def test_of_a_run_the_newest_complete_checkpoint_is_taken_or_a_step(checkpoint: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", checkpoint, [10, 20, 30])
    (run / "checkpoints/step-000030/manifest.json").unlink()
    found = subject(run)
    assert (found.label, found.system_prompt) == ("run-step-000020", "Be brief.")
    assert found.model.path == str(run / "checkpoints/step-000020/hf")
    assert subject(run, step=10).label == "run-step-000010"
    assert subject(run, step=0).model.path == str(checkpoint)
    assert subject(run / "checkpoints/step-000010").label == "run-step-000010"
    with pytest.raises(ModelError, match=r"step 30 \(complete steps: 10, 20\)"):
        subject(run, step=30)
    with pytest.raises(ModelError, match="has no steps"):
        subject(checkpoint, step=10)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        subject(tmp_path)
    run = make_run(tmp_path / "run", base_model_path(), [])
    with pytest.raises(ModelError, match="any complete checkpoint"):
        subject(run)


def test_two_checkpoints_of_one_name_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "model"
    shutil.copytree(checkpoint, other)
    with pytest.raises(ValueError, match="would be called 'model'"):
        find_subjects([str(checkpoint), str(other)], NEWEST, EvalConfig(sets="arithmetic"))


def test_weights_are_known_by_their_content(checkpoint: Path, tmp_path: Path) -> None:
    before = subject(checkpoint).fingerprint
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert subject(tmp_path / "copy").fingerprint == before
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert subject(checkpoint).fingerprint != before


def test_a_budget_beyond_the_models_positions_is_refused(checkpoint: Path) -> None:
    found = subject(checkpoint)
    assert isinstance(found.model, Model)
    fits = SET.model_copy(update={"max_response_tokens": 1024 - 11})  # a prompt has 10 letters and a flag
    check_lengths(found, fits, requests(fits))
    longer = SET.model_copy(update={"max_response_tokens": 1024 - 10})
    with pytest.raises(DataError, match=r"all_sets\.max_response_tokens to at most 1013"):
        check_lengths(found, longer, requests(longer))
