"""Runs as jobs of a Ray cluster: what is refused before, how a job is followed, and all of it on a real head node."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from ray.runtime_env import RuntimeEnv
from ray_head import RayHead
from watched_run import files_with, forms_of

from trace_rl.errors import ConfigError, WorkerError
from trace_rl.launch.job import jobs, own_code
from trace_rl.launch.job.submit import INTERRUPTED, chosen_variables, pinned_packages, runtime_env

ROOT = Path(__file__).resolve().parents[1]
DEMO = [str(ROOT / "configs/demo.yaml"), str(ROOT / "configs/methods/grpo.yaml")]
ONE_STEP = [
    "run.steps=1",
    "evaluation.every=0",
    "sampling.prompts_per_step=2",
    "sampling.samples_per_prompt=2",
    "sampling.max_response_tokens=32",
    "learner.world_size=1",
]
ANSWERS_S = 90.0
"""Of a command that asks the cluster one thing; nearly all of it is for imports on a machine that is busy."""


def test_variables_that_look_like_secrets_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert chosen_variables(["NCCL_DEBUG"]) == {"NCCL_DEBUG": "INFO"}
    for name in ("OPENAI_API_KEY", "RAY_AUTH_TOKEN", "hf_token", "DB_PASSWORD", "AWS_SECRET_ACCESS"):
        monkeypatch.setenv(name, "sk-something-secret")
        with pytest.raises(
            ConfigError, match=f"--env {name} looks like a secret.*in the environment of the nodes"
        ) as told:
            chosen_variables([name])
        assert "sk-something" not in str(told.value)
    with pytest.raises(ConfigError, match="NOT_THERE names a variable that is not set here"):
        chosen_variables(["NOT_THERE"])


def test_pins_go_into_the_runtime_environment_as_they_are(tmp_path: Path) -> None:
    lock = tmp_path / "some.lock"
    lock.write_text("# compiled\nray==2.60.0\n\nnumpy==2.3.5\n", encoding="utf-8")
    env = RuntimeEnv(**runtime_env(tmp_path, {"A": "1"}, pinned_packages(lock)))  # Ray's own validation
    assert env["pip"]["packages"] == ["ray==2.60.0", "numpy==2.3.5"]
    assert "--no-deps" in env["pip"]["pip_install_options"]  # the lock is complete
    assert env["env_vars"] == {"A": "1"}
    assert "pip" not in runtime_env(tmp_path, {}, [])
    assert len(pinned_packages(ROOT / "requirements/cuda.lock")) > 100
    lock.write_text("ray>=2.60\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds 'ray>=2\.60'; expected lines like name==1\.2\.3"):
        pinned_packages(lock)
    with pytest.raises(ConfigError, match="cannot be read"):
        pinned_packages(tmp_path / "none.lock")


@pytest.fixture
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`jobs.connect` sets these for the process of a command."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("", "no cluster is named; give --address http://HEAD:8265"),
        ("10.0.0.1:6379", "--address is '10.0.0.1:6379'; expected the dashboard"),
        ("ray://10.0.0.1:10001", "--address is 'ray://10.0.0.1:10001'; expected the dashboard"),
    ],
)
def test_addresses_that_take_no_jobs_are_refused(address: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        jobs.connect(address)


def test_a_server_that_is_not_there_is_one_sentence(restored_environment: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(WorkerError, match=f"no Ray dashboard answers at {address}.*check the address") as told:
        jobs.connect(address)
    assert "\n" not in str(told.value)


def test_a_server_that_never_answers_is_given_up(restored_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs._CONNECT_S <= 30
    monkeypatch.setattr(jobs, "_ANSWER_S", 0.2)
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(WorkerError, match=r"no Ray dashboard answers at .*ReadTimeout"):
        jobs.connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


class Cluster:
    """The part of Ray's client that follows a job, with connections that break off.

    Args:
        log: all that the job prints, by chunks.
        breaks: after so many chunks each connection fails; the ones after these last to the end.
        unreachable: how many questions for the job's state are not answered.
    """

    def __init__(self, log: list[str], breaks: list[int], unreachable: int = 0) -> None:
        self._log, self._breaks, self._unreachable = log, breaks, unreachable
        self._is_over = False

    def get_address(self) -> str:
        return "http://head:8265"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        upto = self._breaks.pop(0) if self._breaks else None
        for chunk in self._log[:upto]:
            yield chunk
        if upto is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        self._is_over = True

    def get_job_info(self, job: str) -> Any:
        if self._unreachable:
            self._unreachable -= 1
            raise ConnectionError("Failed to connect")
        return SimpleNamespace(status=JobStatus.SUCCEEDED if self._is_over else JobStatus.RUNNING)


class SilentCluster(Cluster):
    """Its connection was cut without a word while the job ran to its end."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield self._log[0]
        self._is_over = True
        await asyncio.sleep(3600)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_RETRY_S", 0.01)
    monkeypatch.setattr(jobs, "_QUIET_S", 0.05)


def test_a_stream_that_breaks_off_is_taken_up_where_it_ended(impatient: None) -> None:
    printed: list[str] = []
    cluster: Any = Cluster(["one\n", "two\n", "three\n"], breaks=[2, 0, 1], unreachable=1)
    ended = jobs.follow(cluster, "job", printed.append, patience_s=20)
    assert "".join(printed) == "one\ntwo\nthree\n"
    assert ended.status == JobStatus.SUCCEEDED


def test_a_connection_that_fell_silent_ends_with_the_job(impatient: None) -> None:
    printed: list[str] = []
    cluster: Any = SilentCluster(["one\n"], breaks=[])
    assert jobs.follow(cluster, "job", printed.append, patience_s=20).status == JobStatus.SUCCEEDED
    assert printed == ["one\n"]


def test_a_cluster_that_stays_away_is_given_up_and_the_job_is_not(impatient: None) -> None:
    cluster: Any = Cluster(["one\n"], breaks=[1] * 10_000, unreachable=10_000)  # it only tells again what it has told
    with pytest.raises(WorkerError, match=r"out of reach for 0\.2 s .*job run-1 goes on without being followed"):
        jobs.follow(cluster, "run-1", lambda text: None, patience_s=0.2)


def test_exit_codes_and_last_words_of_jobs() -> None:
    def ended(status: JobStatus, code: int | None, message: str) -> Any:
        return SimpleNamespace(status=status, driver_exit_code=code, message=message)

    assert jobs.exit_code(ended(JobStatus.SUCCEEDED, 0, "")) == 0
    failed = ended(JobStatus.FAILED, 3, "Job entrypoint command failed with exit code 3, last available logs: ...")
    assert (jobs.exit_code(failed), jobs.why(failed)) == (3, "failed with exit code 3")
    never_ran = ended(JobStatus.FAILED, None, "runtime_env setup failed: no such package")
    assert jobs.exit_code(never_ran) == 1
    assert jobs.why(never_ran) == "failed before anything of it ran:\nruntime_env setup failed: no such package"
    assert jobs.exit_code(ended(JobStatus.STOPPED, None, "")) == 1


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A head node that asks for a token, with a secret in its environment."""
    with RayHead(tmp_path_factory.mktemp("head"), num_cpus=4, variables={"OUR_API_KEY": SECRET}) as started:
        yield started


SECRET = "sk-ours-7b1f5a80c2d94e36"


def trace_rl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trace_rl.launch.cli", *arguments]


@pytest.mark.engine
def test_a_run_is_submitted_with_its_plugins_and_without_secrets(head: RayHead, tmp_path: Path) -> None:
    (tmp_path / "our_plugin.py").write_text(
        "import os\nprint('the plugin is here, and the secret of the node:', 'OUR_API_KEY' in os.environ)\n"
        "print('threads', os.environ.get('OMP_NUM_THREADS'), os.environ.get('OUR_FLAG'))\n",
        encoding="utf-8",
    )
    # a variable that the roles are given too must not be taken for a conflict
    given = ["--address", head.address, "--env", "OMP_NUM_THREADS", "--env", "OUR_FLAG"]
    overrides = [*ONE_STEP, f"run.folder={tmp_path}/runs/{{name}}", "plugins=[our_plugin]"]
    variables = {"OMP_NUM_THREADS": "1", "OUR_FLAG": "up", "OUR_API_KEY": SECRET}
    done = head.run(trace_rl("submit", *DEMO, *overrides, *given), tmp_path, 250, variables)
    assert done.returncode == 0, done.stdout
    assert "the plugin is here, and the secret of the node: True" in done.stdout
    assert "threads 1 up" in done.stdout
    assert "step 1/1" in done.stdout
    assert (tmp_path / "runs/demo/summary.md").is_file()
    # the code that was submitted is the code that ran, though this checkout is installed on the node as well
    told = re.search(r"job demo-\w+ at \S+: code (\w+), with our_plugin of this folder", done.stdout)
    ran = re.search(r"^code (\w+) \(\d+ files\) from (\S+)$", done.stdout, re.MULTILINE)
    assert told and ran
    assert ran[1] == told[1] == own_code.digest_of(own_code.package_files())
    assert str(head.temporary) in ran[2]
    assert f"code {ran[1]}" in (tmp_path / "runs/demo/run.log").read_text(encoding="utf-8")
    for secret in (SECRET, head.token):
        files, holding = files_with(head.temporary, forms_of(secret))
        assert len(files) > 20 and holding == []
        assert secret not in done.stdout


@pytest.mark.engine
def test_changed_code_is_what_runs_and_a_failure_is_told(head: RayHead, tmp_path: Path) -> None:
    copy = tmp_path / "code" / "trace_rl"
    for name, source in own_code.package_files().items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(source.read_bytes())
    (copy / "__init__.py").touch()
    module = copy / "launch" / "job" / "inside_job.py"
    original = module.read_text(encoding="utf-8")
    overrides = [f"run.folder={tmp_path}/runs", "model.path=/no/such/model", "--address", head.address]
    digests = []
    for version in ("first", "second"):
        module.write_text(f"{original}\nprint('this is the {version} version')\n", encoding="utf-8")
        command = trace_rl("submit", *DEMO, *overrides)
        done = head.run(command, tmp_path, 200, {"PYTHONPATH": str(copy.parent)})
        assert re.findall(r"^this is the (\w+) version$", done.stdout, re.MULTILINE) == [version], done.stdout
        assert done.returncode == 1
        assert re.search(r"^error: .*/no/such/model", done.stdout, re.MULTILINE), done.stdout
        assert done.stdout.rstrip().endswith("failed with exit code 1")
        digests += re.findall(r"job \S+ at \S+: code (\w+)", done.stdout)
    assert len(set(digests)) == 2


@pytest.mark.engine
def test_the_token_is_asked_for_and_its_absence_explained(head: RayHead, tmp_path: Path) -> None:
    command = trace_rl("submit", *DEMO, f"run.folder={tmp_path}", "--address", head.address)
    wrong = head.run(command, tmp_path, ANSWERS_S, {"RAY_AUTH_TOKEN": "f" * 64})
    assert wrong.returncode == 1
    assert (
        f"error: {head.address} does not accept the token that was sent (HTTP 403); set RAY_AUTH_TOKEN" in wrong.stdout
    )
    nothing = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}
    none = head.run(command, tmp_path, ANSWERS_S, nothing)
    assert none.returncode == 1
    assert (
        f"error: {head.address} asks for a token and none was sent (HTTP 401); set RAY_AUTH_MODE=token" in none.stdout
    )
    for refused in (wrong, none):
        assert "Traceback" not in refused.stdout


@pytest.mark.engine
@pytest.mark.slow
def test_a_detached_job_is_followed_left_and_stopped(head: RayHead, tmp_path: Path) -> None:
    (tmp_path / "our_pause.py").write_text(
        "import os, time\nif 'RAY_JOB_CONFIG_JSON_ENV_VAR' in os.environ:\n"
        "    print('pausing', flush=True)\n    time.sleep(600)\n",
        encoding="utf-8",
    )
    overrides = [f"run.folder={tmp_path}/runs", "plugins=[our_pause]", "run.name=a long run"]
    at = ["--address", head.address]
    started = head.run(trace_rl("submit", *DEMO, *overrides, "--detach", *at), tmp_path, 200)
    assert started.returncode == 0, started.stdout
    (job,) = re.findall(r"^(a-long-run-\w+)$", started.stdout, re.MULTILINE)
    assert f"stop it:   trace-rl jobs stop {job} --address {head.address}" in started.stdout

    following = subprocess.Popen(
        trace_rl("jobs", "logs", job, "--follow", *at),
        cwd=tmp_path,
        env={**os.environ, **head.client_variables()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert following.stdout is not None
    while (line := following.stdout.readline()) != "pausing\n":
        assert line, "the job was not followed"
    following.send_signal(signal.SIGINT)
    rest, _ = following.communicate(timeout=20)
    assert following.returncode == INTERRUPTED
    assert f"no longer following; job {job} goes on" in rest

    known = head.run(trace_rl("jobs", "status", job, *at), tmp_path, ANSWERS_S)
    assert re.fullmatch(rf"{job}  RUNNING  run a long run  code \w+  run_folder {tmp_path}/runs\n", known.stdout)
    stopped = head.run(trace_rl("jobs", "stop", job, *at), tmp_path, ANSWERS_S)
    assert stopped.stdout == f"{job} is being stopped\n"
    ended = head.run(trace_rl("jobs", "logs", job, "--follow", *at), tmp_path, ANSWERS_S)
    assert ended.returncode != 0
    assert f"job {job} stopped" in ended.stdout
    unknown = head.run(trace_rl("jobs", "logs", "no-such-job", *at), tmp_path, ANSWERS_S)
    assert unknown.returncode == 1
    assert f"error: {head.address} knows no job 'no-such-job'" in unknown.stdout


@pytest.mark.engine
@pytest.mark.slow
def test_plain_ray_job_submit_trains_as_well(head: RayHead, tmp_path: Path) -> None:
    command = ["ray", "job", "submit", "--address", head.address, "--", "python", "-m", "trace_rl.launch.train", *DEMO]
    done = head.run([*command, *ONE_STEP, f"run.folder={tmp_path}/runs/{{name}}"], tmp_path, 250)
    assert done.returncode == 0, done.stdout
    assert "step 1/1" in done.stdout
    assert (tmp_path / "runs/demo/summary.md").is_file()
    failed = head.run([*command, "run.stepz=1"], tmp_path, 200)
    assert failed.returncode == 1
    assert "unknown key run.stepz; did you mean 'steps'?" in failed.stdout
