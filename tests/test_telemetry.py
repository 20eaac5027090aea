"""Nothing is reported to the makers of libraries, as the libraries themselves tell, unless the user asks for it."""

import json
import subprocess
import sys
from collections.abc import Mapping

import pytest

from trace_rl.workers import environment

REPORTS = """
import json, os
{first}
import datasets.config, huggingface_hub.constants, wandb.env
from ray._common.usage import usage_lib as ray_usage
from vllm.usage import usage_lib as vllm_usage
print("REPORTS", json.dumps({{
    "datasets": datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
    "huggingface_hub": not huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY,
    "ray": ray_usage.usage_stats_enabled(),
    "vllm": vllm_usage.is_usage_stats_enabled(),
    "wandb": wandb.env.error_reporting_enabled(),
}}))
"""
APPLY = "from trace_rl.workers import environment; environment.apply()"
ASKED_FOR = {
    "HF_HUB_DISABLE_TELEMETRY": "0",
    "HF_UPDATE_DOWNLOAD_COUNTS": "1",
    "RAY_USAGE_STATS_ENABLED": "1",
    "VLLM_NO_USAGE_STATS": "0",
    "WANDB_ERROR_REPORTING": "true",
}
IMPORTED_BY_COMMANDS = """
import sys
import trace_rl.launch.cli, trace_rl.launch.sweep.child
heavy = {"datasets", "huggingface_hub", "ray", "vllm", "wandb"}
print("IMPORTED", sorted(heavy & sys.modules.keys()))
"""


def reports(home: str, variables: Mapping[str, str], first: str = "") -> dict[str, bool]:
    """Which libraries would report home in a fresh process with these variables and no others."""
    # a home folder without files that switch anything off
    done = subprocess.run(
        [sys.executable, "-c", REPORTS.format(first=first)],
        env={"HOME": home, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, bool] = json.loads(done.stdout.partition("REPORTS ")[2])
    return found


def test_nothing_is_reported_from_the_driver(tmp_path_factory: pytest.TempPathFactory) -> None:
    told = reports(str(tmp_path_factory.mktemp("home")), {}, first=APPLY)
    assert [name for name, is_on in told.items() if is_on] == []


def test_what_a_user_asks_for_stays_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    told = reports(str(tmp_path_factory.mktemp("home")), ASKED_FOR, first=APPLY)
    assert [name for name, is_on in told.items() if not is_on] == []


@pytest.mark.parametrize("gpus", [None, "", "0,1"])
def test_every_role_is_told_the_same_as_the_driver(gpus: str | None) -> None:
    of_role = environment.of_role(gpus, is_one_machine=False)
    of_driver = environment.variables()
    assert {name: of_role.get(name) for name in ASKED_FOR} == {name: of_driver[name] for name in ASKED_FOR}


def test_commands_can_still_set_what_libraries_read_when_they_are_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED_BY_COMMANDS], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "IMPORTED []", done.stdout + done.stderr
