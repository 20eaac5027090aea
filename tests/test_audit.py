"""An upgrade asks for a new review, and a known flaw for a reason."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
REVIEW: dict[str, Any] = {
    "reviewed": None,
    "vllm": {"versions": ["0.32.0"], "advisories": [{"id": "CVE-1", "fixed": "0.30.0"}]},
    "certifi": {"versions": ["2.0", "1.0"], "advisories": [{"id": "CVE-2", "fixed": "2.0", "open": "because"}]},
}


@pytest.fixture(scope="module")
def audit() -> Any:
    """launch/setup is no package: its files run before there is one."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / "launch/setup/audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_locks_are_as_they_were_reviewed(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main() == 0, capsys.readouterr().err
    assert "packages reviewed on 20" in capsys.readouterr().out


def test_pins_are_read_by_package_whichever_build_it_is(audit: Any) -> None:
    lock = "# a comment\nray[default]==2.60.0\nvllm-cpu==0.32.0\nSome_Thing==1.0 ; python_version < '3'\n"
    assert audit.pins(lock) == {"ray": "2.60.0", "vllm": "0.32.0", "some-thing": "1.0"}


def test_what_was_reviewed_passes_and_what_is_open_is_told(audit: Any) -> None:
    locks = {"cpu.lock": {"vllm": "0.32.0", "certifi": "1.0"}, "cuda.lock": {"vllm": "0.32.0", "certifi": "2.0"}}
    assert audit.problems(REVIEW, locks) == []
    assert audit.still_open(REVIEW, locks) == ["certifi: CVE-2 (because)"]
    fixed = {"cpu.lock": {"vllm": "0.32.0", "certifi": "2.0"}}
    assert audit.still_open(REVIEW, fixed) == []


@pytest.mark.parametrize(
    ("vllm", "told"),
    [
        ("0.33.0", ["cpu.lock holds vllm==0.33.0, but 0.32.0 was reviewed"]),
        ("0.29.0", ["vllm==0.29.0, but 0.32.0 was reviewed", "vllm==0.29.0, which CVE-1 is about; take 0.30.0"]),
        (None, ["audit.toml reviews vllm, which no lock holds"]),
    ],
)
def test_anything_else_asks_for_a_review(audit: Any, vllm: str | None, told: list[str]) -> None:
    lock = {"certifi": "2.0", **({"vllm": vllm} if vllm else {})}
    found = audit.problems(REVIEW, {"cpu.lock": lock})
    assert len(found) == len(told) and all(part in line for part, line in zip(told, found, strict=True)), found
