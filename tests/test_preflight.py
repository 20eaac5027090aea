"""What is refused before Ray starts: each bad input is one sentence that names it and says what to do."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, DataError, ModelError, TraceError
from trace_rl.launch.model_files import EMBEDDED, load_tokenizer, resolve_model
from trace_rl.launch.preflight import check
from trace_rl.launch.prompt_sources import error_rule, open_source, peek
from trace_rl.overlays import load_config
from trace_rl.tasks.arithmetic import ArithmeticRule
from trace_rl.tasks.equations import EquationRule

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROUTE = {"selector": {"rollouts": "correct", "tokens": "key_spans"}, "action": "fkl"}


def write_model(folder: Path, template: str | None = TEMPLATE, eos: str | None = "<eos>", positions: int = 512) -> Path:
    """A tokenizer with one token a character, and the part of a model's config that the checks read."""
    special = ["<eos>", "<user>", "<system>", "<assistant>", "<other>"]
    characters = [chr(code) for code in (10, *range(32, 127))]
    vocab = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<other>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, extra_special_tokens=special[1:4])
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": positions}))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(model_folder: Path, tmp_path: Path) -> Configure:
    """A valid configuration on 12 rows of own data, with sections replaced by keyword."""
    rows = [{"id": f"row{index}", "question": f"{index} + 1?", "answer": index + 1} for index in range(12)]

    def build(rows: list[dict[str, Any]] = rows, **sections: dict[str, Any]) -> RunConfig:
        file = tmp_path / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        base: dict[str, dict[str, Any]] = {
            "model": {"path": str(model_folder)},
            "data": {"path": str(file), "heldout_rows": 4},
            "sampling": {"prompts_per_step": 4, "max_prompt_tokens": 60, "max_response_tokens": 100},
        }
        merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}
        return RunConfig.model_validate(merged)

    return build


def refusal(config: RunConfig, kind: type[TraceError]) -> str:
    with pytest.raises(kind) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_valid_run_is_ready(configure: Configure) -> None:
    ready = check(configure(algorithm={"routes": {"r": ROUTE}}))
    assert ready.max_model_len == 160
    # <user> 6 characters <eos> <assistant> for a one-digit number
    assert {len(canary) for canary in ready.canaries} <= {9, 10}
    assert ready.canaries == tuple(ready.encoder.student_ids(prompt) for prompt in ready.prompts.heldout(4))
    assert ready.prompts.position() == {"epoch": 0, "offset": 0}
    assert ready.tokenizer.decode(ready.canaries[0]).replace(" ", "").endswith("<eos><assistant>")


def test_the_checks_do_not_even_import_ray_or_an_engine() -> None:
    code = "import sys, trace_rl.launch.preflight; print([m for m in ('ray', 'vllm', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_the_demo_passes_every_check() -> None:
    ready = check(load_config([CONFIGS / "demo.yaml"]))
    assert isinstance(ready.rule, ArithmeticRule)
    assert Path(ready.config.model.path).is_dir()
    assert len(ready.canaries) == 4


def test_a_prompt_beyond_the_budget_is_named(configure: Configure) -> None:
    rows = [
        {"id": f"row{index}", "question": f"{index:?>{58 if index == 7 else 57}}", "answer": 1} for index in range(12)
    ]
    # 57 + 3 template tokens fit 60, the 58 of row7 do not
    message = refusal(configure(rows), DataError)
    assert message.startswith("prompt row7 has 61 tokens with the chat template, but sampling.max_prompt_tokens is 60")


def test_the_system_prompt_and_the_suffix_count(configure: Configure) -> None:
    check(configure(data={"system_prompt": "s" * 40}))
    assert "has 6" in refusal(configure(data={"system_prompt": "s" * 49}), DataError)
    assert "max_prompt_tokens is 60" in refusal(configure(data={"question_suffix": "s" * 60}), DataError)


def test_a_long_row_is_found_even_if_a_held_out_row_has_its_id(configure: Configure, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"id": "row3", "question": "short", "answer": 1}\n')
    rows = [{"id": f"row{index}", "question": f"{index}" * 100 if index == 3 else f"{index}", "answer": 1}
            for index in range(12)]  # fmt: skip
    assert "prompt row3 has 103 tokens" in refusal(configure(rows, data={"heldout_path": str(heldout)}), DataError)


def test_held_out_questions_must_not_be_trained_on(configure: Configure, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"question": "new", "answer": 1}\n{"id": "copy", "question": "3 + 1?", "answer": 4}\n')
    message = refusal(configure(data={"heldout_path": str(heldout)}), DataError)
    assert message.startswith("1 of 2 questions in data.heldout_path are training questions too (first: copy)")


def test_further_sets_are_read_and_checked_like_held_out_rows(configure: Configure, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    sets = {"harder": {"path": str(file)}, "sums": {"task": {"min_steps": 7, "max_steps": 7}}}
    evaluation = {"sets": sets, "num_prompts": 2}
    file.write_text("".join(f'{{"question": "new {index}", "answer": 1}}\n' for index in range(3)))
    roomy = {"max_prompt_tokens": 400}
    found = check(configure(evaluation=evaluation, sampling=roomy)).evaluation_sets
    assert [prompt.question for prompt in found["harder"]] == ["new 0", "new 1"]
    assert [prompt.metadata["num_steps"] for prompt in found["sums"]] == ["7", "7"]
    assert "has 1" in refusal(configure(evaluation=evaluation), DataError)  # the sums are longer than 60 tokens
    evaluation = {"sets": {"harder": sets["harder"]}}
    file.write_text('{"id": "copy", "question": "3 + 1?", "answer": 4}\n')
    message = refusal(configure(evaluation=evaluation), DataError)
    assert message.startswith(
        "1 of 1 questions in evaluation.sets.harder.path are training questions too (first: copy)"
    )


def test_evaluations_need_held_out_rows(configure: Configure) -> None:
    message = refusal(configure(data={"heldout_rows": 0}), DataError)
    assert "no held-out rows; set data.heldout_rows or data.heldout_path, or evaluation.every=0" in message
    ready = check(configure(data={"heldout_rows": 0}, evaluation={"every": 0}))
    assert len(ready.canaries) == 4


def test_a_step_must_find_enough_rows(configure: Configure) -> None:
    message = refusal(configure(sampling={"prompts_per_step": 9}), DataError)
    assert "prompts_per_step is 9, but the data has 8 training rows" in message


def test_a_row_without_an_answer_is_named(configure: Configure) -> None:
    message = refusal(configure([{"question": "1?", "answer": 1}, {"question": "2?"}]), DataError)
    assert "train.jsonl:2 has no answer (columns: question)" in message


def test_a_missing_data_file_is_named(configure: Configure, tmp_path: Path) -> None:
    message = refusal(configure(data={"path": str(tmp_path / "gone.jsonl")}), DataError)
    assert "gone.jsonl does not exist" in message


def test_positions_count_the_response_and_the_teachers_context(configure: Configure, tmp_path: Path) -> None:
    # student: 60 + 100; teacher: 3 template tokens + 6 or 7 of the question + newline, answer and 300, + 100
    check(configure(model={"path": str(write_model(tmp_path / "fits", positions=160))}))
    message = refusal(configure(model={"path": str(write_model(tmp_path / "short", positions=159))}), ConfigError)
    assert "may have 160 tokens" in message
    assert "max_position_embeddings = 159" in message
    context = {"pieces": ["answer"], "templates": {"answer": "{answer}" + "x" * 300}}
    routed = configure(
        model={"path": str(tmp_path / "fits")},
        algorithm={"routes": {"r": ROUTE}},
        teacher={"context": context},
    )
    assert "may have 413 tokens" in refusal(routed, ConfigError)


def annotated_by(kind: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """256 + 128 tokens, and 640 for a repair: 1024."""
    backend = {"type": kind, "max_prompt_tokens": 256, "max_reply_tokens": 128, **settings}
    return {"algorithm": {"routes": {"r": ROUTE}}, "annotator": {"backend": backend}}


def test_engines_that_annotate_hold_the_annotations_too(configure: Configure, tmp_path: Path) -> None:
    folder = {"path": str(write_model(tmp_path / "long", positions=1024))}
    # a policy that annotates itself: max(60 + 100, 1024); the other kinds have an engine of their own
    assert check(configure(model=folder, **annotated_by("self"))).max_model_len == 1024
    assert check(configure(model=folder, **annotated_by("static"))).max_model_len == 160
    assert check(configure(model=folder, **{**annotated_by("self"), "algorithm": {}})).max_model_len == 160


@pytest.mark.parametrize("kind", ["self", "static", "frozen"])
def test_annotations_must_fit_the_model_that_annotates(configure: Configure, tmp_path: Path, kind: str) -> None:
    short = str(write_model(tmp_path / "short", positions=1023))
    annotating = annotated_by(kind, **({"path": short} if kind == "frozen" else {}))
    model = {} if kind == "frozen" else {"path": short}
    message = refusal(configure(model=model, **annotating), ConfigError)
    assert message.startswith("annotator.backend.max_prompt_tokens = 256 and max_reply_tokens = 128 take 1024 tokens")
    assert f"{short}, which annotates, has max_position_embeddings = 1023; lower the two together by 1" in message
    check(configure(model=model, **{**annotating, "algorithm": {}}))  # nobody annotates


def test_an_annotator_is_refused_early_where_it_is_asked(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    api = {"type": "api", "base_url": "https://host/v1", "name": "m", "api_key_env": "NO_SUCH_VARIABLE"}
    bad: list[tuple[dict[str, Any], type[TraceError], str]] = [
        (api, ConfigError, "names NO_SUCH_VARIABLE, which is not set"),
        ({"type": "replay", "path": "gone.jsonl"}, DataError, "annotator.backend.path 'gone.jsonl' is no file"),
        ({"type": "frozen", "path": "./gone"}, ModelError, "annotator.backend.path './gone' is not a folder"),
    ]
    for backend, kind, sentence in bad:
        annotator = {"backend": backend}
        assert sentence in refusal(configure(annotator=annotator, algorithm={"routes": {"r": ROUTE}}), kind)
        check(configure(annotator=annotator))  # nobody annotates


def test_a_tokenizer_without_a_chat_template_is_refused(configure: Configure, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "plain", template=None)
    message = refusal(configure(model={"path": str(folder)}), ModelError)
    assert "has no chat template" in message
    assert "chat_template.jinja" in message


def test_a_chat_template_that_fails_is_refused(configure: Configure, tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
    folder = str(write_model(tmp_path / "strict", template=template))
    check(configure(model={"path": folder}))
    message = refusal(configure(model={"path": folder}, data={"system_prompt": "s"}), ModelError)
    assert "chat template" in message
    assert "no system turn" in message


def test_a_template_that_tells_the_sides_apart_is_refused(configure: Configure, tmp_path: Path) -> None:
    last = "{{ '<assistant>' if 'Take care' in messages[-1]['content'] else '<user>' }}"
    template = TEMPLATE.replace("<assistant>", last)
    folder = write_model(tmp_path / "odd", template=template)
    message = refusal(configure(model={"path": str(folder)}, algorithm={"routes": {"r": ROUTE}}), ModelError)
    assert "do not start and end with the same template tokens" in message


THINKING = TEMPLATE + "{% if enable_thinking %}<think>{% endif %}"
ASYMMETRIC: dict[str, dict[str, Any]] = {
    "algorithm": {"routes": {"r": ROUTE}},
    "model": {"chat_template_kwargs": {"enable_thinking": False}},
    "teacher": {"chat_template_kwargs": {"enable_thinking": True}},
    "evaluation": {"chat_template_kwargs": {"enable_thinking": True}},
}


def test_template_arguments_without_effect_are_told_once(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    check(configure(**ASYMMETRIC))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        "No effect of teacher.chat_template_kwargs and evaluation.chat_template_kwargs: the chat template renders the "
        "same tokens with model.chat_template_kwargs = {'enable_thinking': False} alone; choose a model whose template "
        "reads what is given there, or leave it out"
    )


def test_template_arguments_that_nobody_uses_or_that_work_are_not_told_of(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check(configure(**{**ASYMMETRIC, "algorithm": {}, "evaluation": {**ASYMMETRIC["evaluation"], "every": 0}}))
    folder = str(write_model(tmp_path / "thinking", template=THINKING))
    check(configure(**{**ASYMMETRIC, "model": {**ASYMMETRIC["model"], "path": folder}}))
    assert not caplog.records


def test_held_out_prompts_are_measured_as_they_are_rendered(configure: Configure, tmp_path: Path) -> None:
    # <think> is 7 characters: of a held-out question of 51 with 3 template tokens 54 become 61, and 60 are allowed
    folder = str(write_model(tmp_path / "thinking", template=THINKING))
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"id": "long", "question": "q" * 51, "answer": 1}) + "\n")
    data = {"heldout_path": str(heldout)}
    check(configure(model={"path": folder}, data=data))
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    message = refusal(configure(model={"path": folder}, data=data, evaluation=thinking), DataError)
    assert message.startswith("prompt long has 61 tokens")
    loud = write_model(
        tmp_path / "loud", template=TEMPLATE + "{% if enable_thinking %}{{ raise_exception('no') }}{% endif %}"
    )
    message = refusal(configure(model={"path": str(loud)}, evaluation=thinking), ModelError)
    assert "model.chat_template_kwargs with evaluation.chat_template_kwargs = {'enable_thinking': True} (no)" in message


def test_a_tokenizer_without_an_end_is_refused(configure: Configure, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "endless", eos=None)
    assert "has no end-of-sequence token" in refusal(configure(model={"path": str(folder)}), ModelError)


def test_a_folder_without_tokenizer_is_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert "no tokenizer could be loaded" in refusal(configure(model={"path": str(tmp_path)}), ModelError)


def test_model_paths(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder.parent)
    assert resolve_model(Model(path=f"./{model_folder.name}")).path == str(model_folder)
    assert resolve_model(Model(path=model_folder.name)).path == str(model_folder)
    assert resolve_model(Model(path="Qwen/Qwen3-1.7B")).path == "Qwen/Qwen3-1.7B"
    for path in (str(tmp_path / "gone"), "./gone", "~/no/such", "gone", "a/b/c"):
        with pytest.raises(ModelError, match="is not a folder; give a folder in Hugging Face format, a hub name"):
            resolve_model(Model(path=path))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(Model(path=str(tmp_path)))


def test_the_embedded_tokenizer_has_what_is_needed() -> None:
    model = resolve_model(Model(path=EMBEDDED))
    assert (Path(model.path) / "config.json").is_file()
    tokenizer = load_tokenizer(model)
    assert tokenizer.chat_template
    assert tokenizer.eos_token_id is not None


def test_looking_at_the_first_prompts_does_not_move_the_source(configure: Configure) -> None:
    source = open_source(configure())
    source.take(4)
    before = source.position()
    first = peek(source, 4)
    assert source.position() == before
    assert list(source.take(4)) == first


def test_held_out_rows_may_come_from_a_file_of_their_own(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "heldout.jsonl").write_text('{"question": "other", "answer": 1}\n')
    source = open_source(configure(data={"heldout_path": str(tmp_path / "heldout.jsonl"), "question_suffix": "!"}))
    assert [prompt.question for prompt in source.heldout(9)] == ["other!"]
    assert len({prompt.prompt_id for prompt in source.take(12)}) == 12


@pytest.mark.parametrize("path", ["~nobody-of-this-name/rows.jsonl", "x" * 300])
def test_a_path_that_cannot_be_looked_up_is_named(configure: Configure, path: str) -> None:
    with pytest.raises(DataError, match=r"data path '.*' cannot be looked up \(.*\); correct it"):
        open_source(configure(data={"path": path}))


def test_a_hugging_face_data_set_on_disk_is_read(configure: Configure, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="reads a data set that the package wrote")
    table = datasets.Dataset.from_dict({"question": ["1?", "2?", "3?"], "answer": ["1", "2", "3"]})
    table.save_to_disk(str(tmp_path / "flat"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    for name in ("flat", "splits"):
        source = open_source(configure(data={"path": str(tmp_path / name), "heldout_rows": 1}))
        assert len(source.take(2)) == 2
    with pytest.raises(DataError, match=r"has no split 'test', only train; set data\.split"):
        open_source(configure(data={"path": str(tmp_path / "splits"), "split": "test"}))
    with pytest.raises(DataError, match=r"is not a data set written by datasets\.save_to_disk"):
        open_source(configure(data={"path": str(tmp_path)}))


def test_own_data_is_judged_by_the_equation_rule(configure: Configure) -> None:
    assert isinstance(error_rule(configure()), EquationRule)
    assert isinstance(error_rule(configure(data={"path": EMBEDDED})), ArithmeticRule)
