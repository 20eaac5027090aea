"""docs/methods.md says what the presets are, and the example at its end works."""

import re
from pathlib import Path

import pytest

from trace_rl.launch import methods_page
from trace_rl.overlays import load_config

TEXT = methods_page.page()


def test_the_page_is_current() -> None:
    assert methods_page.PAGE.read_text(encoding="utf-8") == TEXT, "run `make docs` and commit docs/methods.md"


@pytest.mark.parametrize("name", sorted(methods_page.presets()))
def test_every_preset_has_a_card_and_a_row(name: str) -> None:
    method = methods_page.presets()[name].method
    assert method.name and method.source and method.from_source and method.ours
    assert f"| `{name}` |" in TEXT
    assert f"### {method.name} (`configs/methods/{name}.yaml`)" in TEXT


def test_a_kind_is_described_with_its_nested_settings() -> None:
    route = methods_page.presets()["sdpo"].algorithm.routes["informed"]
    told = methods_page.describe(route.action)
    assert told == "jsd (importance cap 2, clip none, support topk (k 100, by student, tail bucket), beta 0.5)"


def test_named_tests_exist() -> None:
    root = Path(__file__).parent.parent
    for file, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", TEXT):
        assert f"def {test}(" in (root / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_method_in_twenty_lines_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, yaml = re.findall(r"```(?:python|yaml)\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "hellinger.py").write_text(python)
    (tmp_path / "hellinger.yaml").write_text(yaml)
    monkeypatch.syspath_prepend(tmp_path)
    demo = Path(__file__).parent.parent / "configs" / "demo.yaml"
    config = load_config([demo, tmp_path / "hellinger.yaml"])
    assert config.algorithm.routes["key_spans"].action.type == "hellinger"
    assert config.algorithm.routes["key_spans"].selector.tokens.type == "key_spans"
    assert len([line for line in python.splitlines() if line.strip()]) <= 25
