"""Settings of annotators: every kind is written down and read back, and what may be a secret is never repeated."""

import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trace_rl.annotators import Api, Backend, SelfAnnotation
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError
from trace_rl.overlays import dump_config, load_config


def build(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, **sections})


API = {"type": "api", "base_url": "https://host/v1", "name": "m"}
BACKENDS: list[Any] = [
    "oracle",
    "self",
    "static",
    {"type": "frozen", "path": "a/model", "dtype": "float32", "temperature": 0.5},
    {**API, "api_key_env": "ANNOTATOR_KEY", "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    {**API, "limits": {"concurrency": 7}, "budget": {"money": 3, "price_per_million_prompt_tokens": 0.5}},
    "random",
    "inverted",
    {"type": "random", "of": {"type": "inverted", "of": {**API, "api_key_env": "ANNOTATOR_KEY"}}},
    {"type": "inverted", "of": "self"},
    "all_token",
    {"type": "replay", "path": "replies.jsonl"},
]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_every_annotator_is_written_down_and_read_back(backend: Any, tmp_path: Path) -> None:
    config = build(annotator={"backend": backend, "coverage_cap": 1.0})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config([file]) == config
    named = backend if isinstance(backend, str) else backend["type"]
    assert config.annotator.backend.type == named


def test_every_kind_of_annotator_is_among_them() -> None:
    assert {each if isinstance(each, str) else each["type"] for each in BACKENDS} == Backend.kinds.keys()


def test_a_control_asks_the_model_of_the_one_it_stands_in_for() -> None:
    config = build(annotator={"backend": {"type": "random", "of": {"type": "inverted", "of": API}}})
    model = config.annotator.backend.model
    assert isinstance(model, Api)
    assert model.name == "m"
    replay = build(annotator={"backend": {"type": "random", "of": {"type": "replay", "path": "r.jsonl"}}})
    assert (replay.annotator.backend.model, replay.annotator.backend.recording) == (None, "r.jsonl")


def test_settings_of_an_annotator_can_follow_its_name(tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    file.write_text("model: {path: m}\ndata: {path: d}\nannotator: {backend: {type: random, of: oracle}}\n")
    config = load_config([file], ["annotator.backend=self", "annotator.backend.limits.concurrency=3"])
    backend = config.annotator.backend
    assert isinstance(backend, SelfAnnotation)
    assert (backend.limits.concurrency, backend.limits.max_attempts) == (3, 5)


def test_an_unknown_annotator_is_named_with_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    file.write_text("model: {path: m}\ndata: {path: d}\n")
    with pytest.raises(ConfigError, match=r"annotator\.backend has the type 'oracel'; did you mean 'oracle'\?"):
        load_config([file], ["annotator.backend=oracel"])
    known = "all_token, api, frozen, inverted, oracle, random, replay, self, static"
    with pytest.raises(ConfigError, match=rf"annotator\.backend\.of has the type 'gpt'; expected one of {known}"):
        load_config([file], ["annotator.backend={type: random, of: gpt}"])


SECRET = "sk-Secret-0123456789"
"""No name of a variable."""
SECRETIVE = [
    ("api_key_env", SECRET, "api_key_env is not the name of an environment variable"),
    ("api_key_env", "7301957730195773", "api_key_env is not the name of an environment variable"),
    ("api_key_env", "{key: " + SECRET + "}", "api_key_env is not the name of an environment variable"),
    ("api_key_env", "[" + SECRET + "]", "api_key_env is not the name of an environment variable"),
    ("api_key", SECRET, "unknown key annotator.backend.api_key; did you mean 'api_key_env'?"),
    ("base_url", f"'https://user:{SECRET}@host/v1'", "base_url holds a user, a query or a fragment"),
    ("base_url", f"'https://{SECRET}@host/v1'", "base_url holds a user, a query or a fragment"),
    ("base_url", f"'https://host/v1?key={SECRET}'", "base_url holds a user, a query or a fragment"),
    ("base_url", f"'https://host/v1#{SECRET}'", "base_url holds a user, a query or a fragment"),
    ("base_url", f"'https://user:{SECRET}/v1'", "base_url is not of the form http://HOST/v1"),
    ("base_url", f"'https://[{SECRET}]/v1'", "base_url is not of the form http://HOST/v1"),
    ("base_url", SECRET, "base_url is not of the form http://HOST/v1"),
    ("base_url", f"'ftp://{SECRET}/v1'", "base_url is not of the form http://HOST/v1"),
]


@pytest.mark.parametrize(("key", "value", "sentence"), SECRETIVE)
@pytest.mark.parametrize("nesting", ["backend", "backend.of"])
def test_what_may_be_a_secret_is_not_repeated(
    key: str, value: str, sentence: str, nesting: str, tmp_path: Path
) -> None:
    api = f"{{type: api, base_url: https://host/v1, name: m, {key}: {value}}}"
    if key == "base_url":
        api = f"{{type: api, name: m, {key}: {value}}}"
    backend = api if nesting == "backend" else f"{{type: random, of: {api}}}"
    base, given = tmp_path / "base.yaml", tmp_path / "given.yaml"
    base.write_text("model: {path: m}\ndata: {path: d}\n")
    given.write_text(f"annotator:\n  backend: {backend}\n")
    bare = base.with_name("bare.yaml")
    bare.write_text(f"annotator: {{backend: {backend.replace(f', {key}: {value}', '')}}}\n")
    attempts = [
        ([base, given], []),
        ([base], [f"annotator.backend={backend}"]),
        ([base, bare], [f"annotator.{nesting}.{key}={value}"]),
    ]
    for files, overrides in attempts:
        with pytest.raises(ConfigError) as caught:
            load_config(files, overrides)
        said = "".join(traceback.format_exception(caught.value))
        assert sentence.replace("annotator.backend.", f"annotator.{nesting}.") in str(caught.value)
        assert "\n" not in str(caught.value)
        for secret in (SECRET, SECRET.lower(), "7301957730195773"):
            assert secret not in said


def test_addresses_and_names_that_are_fine() -> None:
    urls = ["http://127.0.0.1:8000/v1", "https://host.example/a/b/v1/", "http://[::1]:8000/v1", "https://host"]
    backends = [build(annotator={"backend": {**API, "base_url": url}}).annotator.backend for url in urls]
    assert [backend.model_dump()["base_url"] for backend in backends] == [url.rstrip("/") for url in urls]
    for name in ("", "KEY", "_KEY_2"):
        build(annotator={"backend": {**API, "api_key_env": name}})


@pytest.mark.parametrize("name", ["KEY ", "KEY\n", "2KEY", "key", "K-Y", "K" * 65])
def test_other_names_of_variables_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="api_key_env is not the name of an environment variable"):
        build(annotator={"backend": {**API, "api_key_env": name}})


MANY = {f"type_{number}": "means something" for number in range(13)}


@pytest.mark.parametrize(
    ("annotator", "sentence"),
    [
        (
            {"backend": {**API, "extra_body": {"top_p": 0.9, "model": "other", "messages": []}}},
            "annotator.backend.extra_body sets messages, model, which the annotator sets itself",
        ),
        (
            {"backend": {**API, "budget": {"money": 5}}},
            "annotator.backend.budget.money is 5, but no price is given; set price_per_million_prompt_tokens",
        ),
        ({"backend": "all_token"}, "annotator.coverage_cap is 0.25; set annotator.coverage_cap=1"),
        ({"types": {"key": MANY}}, "annotator.types.key has 13 entries; give 1 to 12"),
        ({"types": {"error": {}}}, "annotator.types.error has 0 entries; give 1 to 12"),
        ({"backend": {"type": "frozen"}}, "backend.path"),
        ({"backend": {**API, "limits": {"concurrency": 0}}}, "backend.limits.concurrency"),
        ({"backend": {**API, "max_spans": 0}}, "backend.max_spans"),
        ({"privileges": ["verdict"]}, "privileges"),
    ],
)
def test_annotators_that_cannot_be_meant_are_refused(annotator: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        build(annotator=annotator)
    assert sentence in str(caught.value)


def test_annotators_that_can_be_meant() -> None:
    build(annotator={"backend": "all_token", "coverage_cap": 1.0})
    build(annotator={"backend": {"type": "random", "of": "all_token"}})  # drawn up to the cap
    build(annotator={"types": {"key": dict(list(MANY.items())[:12])}})
    build(annotator={"backend": {**API, "budget": {"money": 5, "price_per_million_completion_tokens": 1}}})
    build(annotator={"backend": {**API, "extra_body": {"top_p": 0.9}}})
