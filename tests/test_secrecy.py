"""A secret of the environment, or a key written into a configuration, reaches no file, log or message."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trace_rl.errors import ConfigError
from trace_rl.launch.cli import app
from trace_rl.launch.cluster import _keep_worker_logs
from trace_rl.overlays import load_config
from trace_rl.secrecy import Redactor, is_secret_name, refuse_secrets
from trace_rl.workers import log_redaction

ROOT = Path(__file__).resolve().parents[1]
SECRET = "c0rrect-h0rse-battery"
KEY = "sk-" + "a1B2c3D4" * 4
BASE = """
model: {path: "task:arithmetic"}
data: {path: "task:arithmetic"}
"""


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("OPENAI_API_KEY", True),
        ("RAY_AUTH_TOKEN", True),
        ("hf_token", True),
        ("AWS_SECRET_ACCESS", True),
        ("DB_PASSWORD", True),
        ("RAY_AUTH_MODE", False),  # "disabled" is a word of many texts
        ("RAY_AUTH_TOKEN_PATH", False),
        ("GIT_AUTHOR_NAME", False),
        ("NCCL_DEBUG", False),
    ],
)
def test_names_tell_which_variables_hold_secrets(name: str, is_secret: bool) -> None:
    assert is_secret_name(name) == is_secret


def test_values_are_replaced_by_the_name_of_their_variable() -> None:
    hidden = Redactor({"A_KEY": "12345678", "B_TOKEN": "12345678-and-more", "C_KEY": "short", "PLAIN": "visible!"})
    assert hidden.redact("12345678-and-more 12345678 short visible!") == "[B_TOKEN] [A_KEY] short visible!"
    assert Redactor({"MINE": SECRET}, names=["MINE"]).redact(f"<{SECRET}>") == "<[MINE]>"
    plain = "/etc/ssl/key.pem and two words here"
    assert Redactor({"A_KEY": "/etc/ssl/key.pem", "B_KEY": "two words here"}).redact(plain) == plain
    assert Redactor({}).redact("nothing to hide") == "nothing to hide"


@pytest.mark.parametrize(
    "secret",
    [
        KEY,
        "hf_" + "aB3" * 10,
        "ghp_" + "0aZ" * 12,
        "AKIA" + "ABCD1234" * 2,
        "AIza" + "x" * 35,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    ],
)
def test_keys_are_known_by_their_form(secret: str) -> None:
    assert Redactor({}).redact(f"x={secret};") == "x=[key];"
    assert Redactor({}).redact(f"Authorization: Bearer {secret}") == "Authorization: Bearer [key]"


def test_text_that_only_resembles_keys_stays() -> None:
    text = "risk-free-portfolio-theory-of-1952 sk-learn hf_hub https://host:8000/v1 user@host task:arithmetic 3:4@5"
    assert Redactor({}).redact(text) == text
    assert Redactor({}).redact("http://user:pass@proxy:3128/") == "http://[hidden]@proxy:3128/"


@pytest.mark.parametrize(
    "setting",
    [
        "annotator.backend.extra_body={auth: KEY}",
        "data.system_prompt=KEY",
        "model.chat_template_kwargs={deep: [1, {token: KEY}]}",
        "logging.wandb_project=KEY",
        "run.steps=KEY",  # refused for its type, with the value
    ],
)
def test_a_key_in_a_configuration_is_refused_without_being_told(setting: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    api = "annotator: {backend: {type: api, base_url: 'http://h/v1', name: m}}\n"
    file.write_text(BASE + api, encoding="utf-8")
    with pytest.raises(ConfigError) as told:
        load_config([file], [setting.replace("KEY", KEY)])
    assert setting.partition("=")[0].split(".")[0] in str(told.value)
    assert KEY not in str(told.value) and "a1B2c3D4" not in str(told.value)


def test_a_key_in_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{BASE}logging:\n  wandb_project: {KEY}\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"run.yaml:5: logging.wandb_project holds what looks like a key \(sk-\.\.\.\)"
    ):
        load_config([file])


def test_the_value_of_a_secret_variable_is_refused_by_its_name() -> None:
    refuse_secrets("run: {name: demo}", {"WANDB_API_KEY": "demo"})  # too short to be one: it would be found everywhere
    with pytest.raises(ConfigError, match="holds the value of the environment variable WANDB_API_KEY") as told:
        refuse_secrets("run: {name: demo-0123456789abcdef}", {"WANDB_API_KEY": "0123456789abcdef"})
    assert "0123456789abcdef" not in str(told.value)


@pytest.mark.parametrize("command", [["train"], ["plan"], ["config"], ["submit", "--address", "http://127.0.0.1:9"]])
def test_no_command_takes_a_configuration_with_a_secret_of_the_environment(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    Path("run.yaml").write_text(BASE, encoding="utf-8")
    done = CliRunner().invoke(app, [*command, "run.yaml", f"data.system_prompt=use {SECRET}"])
    assert done.exit_code == 1
    assert "SOME_TOKEN" in done.output and SECRET not in done.output
    assert sorted(os.listdir()) == ["run.yaml"]


def test_no_record_of_a_log_holds_a_secret_not_even_in_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setenv("ANNOTATOR", "plain-name-secret")
    log_redaction.conceal("ANNOTATOR")
    written = io.StringIO()
    handler, logger = logging.StreamHandler(written), logging.getLogger("some.library")
    logger.addHandler(handler)
    try:
        logger.warning("sent %s to %s", SECRET, "http://user:pass@host/")
        logger.warning("key %(key)s", {"key": "plain-name-secret"})
        logger.warning("wrong %d arguments", SECRET)
        try:
            raise RuntimeError(f"401 for {SECRET}")
        except RuntimeError:
            logger.exception("failed")
        logger.warning("plain %s", "words")
    finally:
        logger.removeHandler(handler)
    text = written.getvalue()
    assert SECRET not in text and "plain-name-secret" not in text and "user:pass" not in text
    assert "sent [SOME_TOKEN] to http://[hidden]@host/" in text
    assert "RuntimeError: 401 for [SOME_TOKEN]" in text and "plain words" in text


def test_what_workers_have_printed_is_kept_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    logs = tmp_path / "ray" / "session_1" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-1-2.err").write_bytes(f"headers: {SECRET}\r\nbytes ".encode() + b"\xff\n")
    _keep_worker_logs(tmp_path / "ray", tmp_path / "kept")
    assert (tmp_path / "kept" / "worker-1-2.err").read_bytes() == b"headers: [SOME_TOKEN]\r\nbytes \xff\n"


def test_a_process_that_imports_a_role_is_clean_and_a_stack_of_a_command_too() -> None:
    code = (
        "import logging, os, trace_rl.workers.idle\n"
        "logging.warning('it is %s', os.environ['MY_TOKEN'])\n"
        "from trace_rl.launch.command_line import explained\n"
        "with explained():\n"
        "    raise KeyError(os.environ['MY_TOKEN'])\n"
    )
    variables = {**os.environ, "MY_TOKEN": SECRET}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "it is [MY_TOKEN]" in done.stderr and "KeyError: '[MY_TOKEN]'" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_an_address_with_a_password_is_refused_before_it_is_printed() -> None:
    done = CliRunner().invoke(app, ["jobs", "status", "--address", f"http://user:{SECRET}@127.0.0.1:9"])
    assert done.exit_code == 1 and "--address holds a user or a password" in done.output
    assert SECRET not in done.output
