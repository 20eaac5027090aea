"""The templates that start clusters.

Slurm's script is run against a Slurm of shell scripts. KubeRay's files are checked against the fields of its custom
resources: the part of its definitions that they use, written down here.
"""

import json
import os
import shutil
import stat
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from typer.testing import CliRunner

from trace_rl.launch.cli import app
from trace_rl.launch.cluster_templates import TEMPLATES, read_template
from trace_rl.overlays import load_config

ROOT = Path(__file__).resolve().parents[1]
SLURM = Path(str(resources.files("trace_rl.launch").joinpath("templates/slurm.sbatch")))

# Each stands for a program of a cluster's node and writes down what it was called with, and the token that it saw.
RECORD = 'printf "%s\\t%s %s\\n" "${RAY_AUTH_MODE:-}:${RAY_AUTH_TOKEN:-}" "$(basename "$0")" "$*" >>"$RECORDED"\n'
SRUN = 'while [[ "$1" == --* && "$1" != --ip-address ]]; do shift; done\nexec "$@"\n'
PROGRAMS = {
    "scontrol": "printf 'n1\\nn2\\nn3\\n'\n",
    "hostname": "echo 10.0.0.7 172.17.0.1\n",
    "srun": RECORD + SRUN,
    "ray": RECORD
    + 'if [[ "$1" == start ]]; then eval "${ON_START:-exec sleep 60}"; else grep -q -e --head "$RECORDED"; fi\n',
    "trace-rl": RECORD
    + 'for _ in {1..100}; do (($(grep -c "ray start --[hb]" "$RECORDED") < 6)) && sleep 0.05; done\n'
    + 'exit "${EXIT_CODE:-0}"\n',
}
"""The run waits until all nodes are there: three calls of ray, each after one of srun."""


class FakeSlurm:
    """Runs the script as Slurm's first node does, with the programs above on the path."""

    def __init__(self, folder: Path) -> None:
        self._bin, self._record, self.home = folder / "bin", folder / "recorded", folder / "home"
        for each in (self._bin, self.home):
            each.mkdir()
        for name, body in PROGRAMS.items():
            program = self._bin / name
            program.write_text(f"#!/bin/bash\n{body}", encoding="utf-8")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def sbatch(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "RECORDED": str(self._record),
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_ON_NODE": "96",
            **variables,
        }
        command = ["bash", str(SLURM), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)

    def calls(self, program: str) -> list[str]:
        """Arguments of each call."""
        lines = (line.partition("\t")[2] for line in self._record.read_text(encoding="utf-8").splitlines())
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{program} ")]

    def tokens(self) -> set[str]:
        return {line.partition("\t")[0] for line in self._record.read_text(encoding="utf-8").splitlines()}


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, str(SLURM)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_head_and_a_worker_a_node_are_started_and_the_run_joins_them(slurm: FakeSlurm) -> None:
    done = slurm.sbatch("run.yaml", "run.folder=/shared/a b/{name}")
    assert done.returncode == 0, done.stderr
    ports = "--min-worker-port=20000 --max-worker-port=29999 --num-cpus=96 --num-gpus=8"
    started = [call for call in slurm.calls("ray") if call.startswith("start")]
    # 12345 % 1000 = 345
    assert started[0] == (
        f"start --head --block --node-ip-address=10.0.0.7 --port=30345 --dashboard-host=127.0.0.1 "
        f"--dashboard-port=31345 {ports}"
    )
    assert started[1:] == [f"start --block --address=10.0.0.7:30345 {ports}"] * 2
    nodes = [call.partition("--nodelist=")[2].split()[0] for call in slurm.calls("srun") if " ray start " in call]
    assert sorted(nodes) == ["n1", "n2", "n3"]
    assert slurm.calls("trace-rl") == [
        "train placement.ray_address=10.0.0.7:30345 placement.resources_timeout_s=300 run.yaml "
        "run.folder=/shared/a b/{name}"
    ]


def test_every_program_gets_one_token_by_its_environment_and_none_by_an_argument(slurm: FakeSlurm) -> None:
    done = slurm.sbatch("run.yaml")
    (seen,) = slurm.tokens()
    mode, _, token = seen.partition(":")
    assert (mode, len(token)) == ("token", 64)
    called = "\n".join(call for program in PROGRAMS for call in slurm.calls(program))
    assert token not in called + done.stdout + done.stderr
    slurm.sbatch("run.yaml")
    assert len(slurm.tokens()) == 2  # another cluster, another token


def test_the_exit_code_of_the_run_is_that_of_the_script(slurm: FakeSlurm) -> None:
    assert slurm.sbatch("run.yaml", EXIT_CODE="3").returncode == 3


def test_a_head_that_does_not_come_up_ends_the_script_with_a_sentence(slurm: FakeSlurm, tmp_path: Path) -> None:
    health = tmp_path / "bin" / "ray"
    health.write_text('#!/bin/bash\n[[ "$1" == start ]] && exit 1\nsleep 0.2; exit 1\n', encoding="utf-8")
    done = slurm.sbatch("run.yaml")
    assert done.returncode == 1
    assert "error: the Ray head on n1 did not answer within 300 s, or has ended" in done.stderr


def test_without_arguments_the_cluster_waits_for_jobs_and_tells_how_to_submit_them(slurm: FakeSlurm) -> None:
    keep = 'cd "$HOME"; cat .trace-rl-token-* >seen; stat -c %a .trace-rl-token-* >>seen'
    done = slurm.sbatch(ON_START=f'sleep 1; if [[ "$*" == *--head* ]]; then {keep}; fi')
    assert done.returncode == 0, done.stderr
    assert "ssh -N -L 8265:127.0.0.1:31345 n1" in done.stdout
    token_file = slurm.home / ".trace-rl-token-12345"
    assert f"RAY_AUTH_TOKEN_PATH={token_file}" in done.stdout
    (seen,) = slurm.tokens()
    assert (slurm.home / "seen").read_text(encoding="utf-8") == f"{seen.partition(':')[2]}600\n"  # for this user only
    assert not token_file.exists()  # it is of no use after the cluster


def test_a_dry_run_prints_the_commands_and_needs_no_slurm(tmp_path: Path) -> None:
    command = ["bash", str(SLURM), "run.yaml", "run.steps=3"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "DRY_RUN": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition("--nodelist=")[2][:16].strip() for line in lines[1:]] == [
        "node1 ray start",
        "node1 ray health",
        "node2 ray start",
        "node1 trace-rl t",
    ]
    assert lines[-1].strip().endswith("run.yaml run.steps=3")


def test_overrides_of_the_templates_are_settings_that_exist() -> None:
    # what the script and the job add to a user's configuration is read by the same strict reader
    job = yaml.safe_load(read_template("kuberay-job"))["spec"]["entrypoint"].split()
    assert job[:4] == ["python", "-m", "trace_rl.launch.train", "/etc/trace-rl/run.yaml"]
    added = [*job[4:], "placement.ray_address=10.0.0.7:30345", "placement.resources_timeout_s=300"]
    config = load_config([ROOT / "configs/demo.yaml"], added)
    assert config.run.folder == "/shared/runs/{name}"


def anything_in(*required: str, **properties: Any) -> dict[str, Any]:
    """A mapping with these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT, NUMBER, FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}  # Kubernetes refuses bare numbers here


def list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


SECRET = anything_in("secretKeyRef", secretKeyRef=anything_in("name", "key", name=TEXT, key=TEXT, optional=FLAG))
CONTAINER = anything_in(
    "name",
    "image",
    "resources",
    name=TEXT,
    image=TEXT,
    env=list_of(anything_in("name", name=TEXT, value={"type": "string"}, valueFrom=SECRET)),
    ports=list_of(anything_in("containerPort", name={"type": "string", "maxLength": 15}, containerPort=NUMBER)),
    resources=anything_in("requests", "limits", requests=TEXTS, limits=TEXTS),
    volumeMounts=list_of(anything_in("name", "mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = anything_in(
    "name",
    name=TEXT,
    configMap=anything_in("name", name=TEXT),
    persistentVolumeClaim=anything_in("claimName", claimName=TEXT),
    emptyDir=anything_in(medium={"enum": ["", "Memory"]}, sizeLimit=TEXT),
)
POD = anything_in("spec", spec=anything_in("containers", containers=list_of(CONTAINER), volumes=list_of(VOLUME)))
GROUP = {"rayStartParams": TEXTS, "template": POD}
CLUSTER = anything_in(
    "headGroupSpec",
    "rayVersion",
    "authOptions",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=anything_in("mode", mode={"enum": ["disabled", "token"]}),
    headGroupSpec=anything_in("template", serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, **GROUP),
    workerGroupSpecs=list_of(
        anything_in(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            **GROUP,
        )
    ),
)
JOB = anything_in(
    "entrypoint",
    "rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
    backoffLimit=NUMBER,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=NUMBER,
    rayClusterSpec=CLUSTER,
)


def problems(kind: str, spec: dict[str, Any], document: Any) -> list[str]:
    resource = anything_in(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=anything_in("name", name={"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$"}),
        spec=spec,
    )
    return [f"{error.json_path}: {error.message}" for error in Draft7Validator(resource).iter_errors(document)]


KUBERAY = [("kuberay-job", "RayJob", JOB), ("kuberay-cluster", "RayCluster", CLUSTER)]


@pytest.mark.parametrize(("name", "kind", "spec"), KUBERAY)
def test_a_kuberay_file_has_the_fields_of_its_kind(name: str, kind: str, spec: dict[str, Any]) -> None:
    document = yaml.safe_load(read_template(name))
    assert problems(kind, spec, document) == []
    broken = json.loads(json.dumps(document))
    cluster = broken["spec"].get("rayClusterSpec", broken["spec"])
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] = 32
    cluster["authOptions"]["modes"] = cluster["authOptions"].pop("mode")
    assert len(problems(kind, spec, broken)) == 3  # a number, an unknown key, a missing one


@pytest.mark.parametrize(("name", "kind", "spec"), KUBERAY)
def test_a_kuberay_cluster_asks_for_a_token_and_fits_the_lock(name: str, kind: str, spec: dict[str, Any]) -> None:
    document = yaml.safe_load(read_template(name))["spec"]
    cluster = document.get("rayClusterSpec", document)
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "requirements/cuda.lock").read_text(encoding="utf-8")
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"  # not to be reached from outside
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        names = {variable["name"] for variable in container["env"]}
        assert "ANNOTATOR_API_KEY" in names  # the driver, which reads it, is on the head unless a job says otherwise
        for variable in container["env"]:  # a value in clear is no secret
            assert "valueFrom" in variable or variable["name"] == "RAY_USAGE_STATS_ENABLED"


def test_templates_are_printed_by_name() -> None:
    for name, file in TEMPLATES.items():
        printed = CliRunner().invoke(app, ["template", name])
        assert printed.exit_code == 0
        assert printed.output == (ROOT / "launch" / "templates" / file).read_text(encoding="utf-8")
    refused = CliRunner().invoke(app, ["template", "kubernetes"])
    assert refused.exit_code == 1
    assert "no template 'kubernetes'; expected one of slurm, kuberay-job, kuberay-cluster" in refused.output
