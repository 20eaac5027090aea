"""What an annotator needs is there before anything starts: a key, a recording, a model, room in it; or one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from trace_rl.annotation import AnnotationReply
from trace_rl.annotators import Api
from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, DataError, ModelError
from trace_rl.launch.annotator_checks import api_key, check_annotator, self_annotation_tokens
from trace_rl.launch.annotators import AnnotatorSetting, surroundings_of
from trace_rl.launch.model_files import EMBEDDED, max_positions, resolve_model
from trace_rl.tasks.arithmetic import ArithmeticRule

KEY = "sk-secret-0123456789"
API = {"type": "api", "base_url": "https://host/v1", "name": "m"}
ROUTES = {"r": {"selector": {"rollouts": "correct", "tokens": "key_spans"}, "action": "fkl"}}
SMALL = {"max_prompt_tokens": 256, "max_reply_tokens": 128}
"""256 + 128 + 640 for a repair = 1024, which is what the embedded model holds."""


def configured(backend: Any, routes: Any = ROUTES, num_engines: int = 1, path: str = "") -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": path or resolve_model(Model(path=EMBEDDED)).path},
            "data": {"path": EMBEDDED},
            "annotator": {"backend": backend},
            "algorithm": {"routes": routes},
            "generator": {"num_engines": num_engines},
        }
    )


def api(**settings: Any) -> Api:
    return Api.model_validate({**API, **settings})


def test_the_key_comes_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNOTATOR_KEY", f" {KEY}\n")
    found = api_key(api(api_key_env="ANNOTATOR_KEY"))
    assert found.get_secret_value() == KEY
    assert KEY not in f"{found} {found!r}"
    check_annotator(configured({**API, "api_key_env": "ANNOTATOR_KEY"}))


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("ANNOTATOR_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("ANNOTATOR_KEY", value)
    monkeypatch.setenv("OTHER_KEY", KEY)
    with pytest.raises(ConfigError, match=r"api_key_env names ANNOTATOR_KEY, which is not set .* or empty; export"):
        check_annotator(configured({"type": "random", "of": {**API, "api_key_env": "ANNOTATOR_KEY"}}))


def test_servers_without_keys_and_other_annotators_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for settings in (None, api(), configured({"type": "static", **SMALL}).annotator.backend.model):
        assert api_key(settings).get_secret_value() == ""


def test_what_is_only_estimated_needs_no_key(tmp_path: Path) -> None:
    config = configured({**API, "api_key_env": "NO_SUCH_VARIABLE"})
    setting = AnnotatorSetting(config, None, ArithmeticRule(), {}, tmp_path)
    assert surroundings_of(setting).key.get_secret_value() == ""


def test_answers_are_stored_in_the_run_folder_or_where_one_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = configured(API)
    setting = AnnotatorSetting(config, None, ArithmeticRule(), {}, tmp_path / "run")
    assert surroundings_of(setting).cache_path == str(tmp_path / "run" / "annotations.sqlite")
    annotator = config.annotator.model_copy(update={"cache_path": "~/shared.sqlite"})
    config = config.model_copy(update={"annotator": annotator})
    setting = AnnotatorSetting(config, None, ArithmeticRule(), {}, tmp_path / "run")
    assert surroundings_of(setting).cache_path == str((tmp_path / "home" / "shared.sqlite").resolve())


def test_a_recording_must_be_one(tmp_path: Path) -> None:
    replay = {"type": "replay", "path": str(tmp_path / "replies.jsonl")}
    for backend in (replay, {"type": "inverted", "of": replay}):
        with pytest.raises(DataError, match=r"annotator\.backend\.path '.*replies\.jsonl' is no file; give one that"):
            check_annotator(configured(backend))
    (tmp_path / "replies.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')
    with pytest.raises(DataError, match=r"replies\.jsonl, line 1: key is wrong \(Field required\)"):
        check_annotator(configured(replay))
    reply = AnnotationReply(spans=()).model_dump(mode="json")
    (tmp_path / "replies.jsonl").write_text(json.dumps({"key": "k", "reply": reply}) + "\n")
    check_annotator(configured(replay))


def test_rules_need_nothing() -> None:
    for backend in ("oracle", "random", "inverted"):
        check_annotator(configured(backend, path="/no/such/model"))


@pytest.mark.parametrize("kind", ["self", "static", "frozen"])
def test_a_request_with_its_answer_and_a_repair_must_fit_the_model(kind: str) -> None:
    path = {"path": EMBEDDED} if kind == "frozen" else {}
    check_annotator(configured({"type": kind, **path, **SMALL}))
    # a repair may take 640 tokens more, a first try the chat template's, which are taken for 32
    check_annotator(configured({"type": kind, **path, **SMALL, "repair": False, "max_prompt_tokens": 864}))
    for changes in ({"max_reply_tokens": 129}, {"repair": False, "max_prompt_tokens": 865}):
        with pytest.raises(
            ConfigError,
            match=r"annotator\.backend\.max_prompt_tokens = \d+ and max_reply_tokens = \d+ take 1025 tokens .* "
            r"max_position_embeddings = 1024; lower the two together by 1$",
        ):
            check_annotator(configured({"type": kind, **path, **SMALL, **changes}))


def test_the_frozen_model_is_measured_by_its_own_positions(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text('{"max_position_embeddings": 64}')
    frozen = {"type": "frozen", "path": EMBEDDED, **SMALL}
    check_annotator(configured(frozen, path=str(tmp_path / "policy")))
    with pytest.raises(ConfigError, match=r"take 1024 tokens .* max_position_embeddings = 64; lower"):
        check_annotator(configured({"type": "static", **SMALL}, path=str(tmp_path / "policy")))


def test_a_frozen_model_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"annotator\.backend\.path '\./gone' is not a folder"):
        check_annotator(configured({"type": "frozen", "path": "./gone"}))
    with pytest.raises(ModelError, match=r"annotator\.backend\.path '.*' has no config\.json"):
        check_annotator(configured({"type": "frozen", "path": str(tmp_path)}))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded from annotator\.backend\.path"):
        check_annotator(configured({"type": "random", "of": {"type": "frozen", "path": str(tmp_path)}}))


def test_positions_are_known_where_a_folder_tells_them(tmp_path: Path) -> None:
    assert max_positions(resolve_model(Model(path=EMBEDDED))) == 1024
    assert max_positions(Model(path="Qwen/Qwen3-1.7B")) is None
    (tmp_path / "config.json").write_text("{}")
    assert max_positions(Model(path=str(tmp_path))) is None


def test_an_engine_is_asked_no_more_at_once_than_it_answers() -> None:
    # 64 an engine; the engines of a policy share the work, the other kinds have one
    def check(kind: str, concurrency: int) -> None:
        backend = {"type": kind, **SMALL, "limits": {"concurrency": concurrency}}
        check_annotator(configured(backend, num_engines=2))

    check("self", 128)
    check("static", 64)
    for kind, most in (("self", 128), ("static", 64)):
        with pytest.raises(ConfigError, match=rf"concurrency is {most + 1}, but .* lower it to {most}$"):
            check(kind, most + 1)
    check_annotator(configured({**API, "limits": {"concurrency": 1000}}))


def test_engines_of_a_policy_that_annotates_itself_hold_its_requests() -> None:
    assert self_annotation_tokens(configured({"type": "self", **SMALL})) == 256 + 128 + 640
    assert self_annotation_tokens(configured({"type": "random", "of": {"type": "self", **SMALL}})) == 1024
    assert self_annotation_tokens(configured({"type": "self", **SMALL}, routes={})) == 0
    assert self_annotation_tokens(configured({"type": "static", **SMALL})) == 0
