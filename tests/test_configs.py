"""Every YAML under configs/ loads, alone or on top of what an overlay needs."""

from pathlib import Path

import pytest

from trace_rl.config.run import RunConfig
from trace_rl.overlays import dump_config, load_config
from trace_rl.schedules import schedule_value

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
OWN_MODEL_AND_DATA = ("model.path=some/model", "data.path=some.jsonl")


def method(name: str) -> RunConfig:
    return load_config([CONFIGS / "base.yaml", CONFIGS / "methods" / f"{name}.yaml"], OWN_MODEL_AND_DATA)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(CONFIGS).as_posix())
def test_loads_alone_and_on_the_base(file: Path, tmp_path: Path) -> None:
    for files in ([file], [CONFIGS / "base.yaml", file]):
        config = load_config(files, OWN_MODEL_AND_DATA)
        dumped = tmp_path / "dumped.yaml"
        dumped.write_text(dump_config(config), encoding="utf-8")
        assert load_config([dumped]) == config


def test_the_demo_needs_nothing_else() -> None:
    demo = load_config([CONFIGS / "demo.yaml"])
    assert demo.model.path == demo.data.path == "task:arithmetic"
    assert demo.needs_teacher
    assert demo.evaluation.every > 0


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONFIGS / "methods").glob("*.yaml")))
def test_a_method_takes_the_place_of_the_demos(name: str) -> None:
    demo = load_config([CONFIGS / "demo.yaml", CONFIGS / "methods" / f"{name}.yaml"])
    assert demo.algorithm == method(name).algorithm
    assert demo.model.path == "task:arithmetic"


def test_the_methods_are_what_they_are_called() -> None:
    corners = {
        name: {(route.selector.rollouts, route.selector.tokens, route.action) for route in routes.values()}
        for name in ("grpo", "trace_fkl", "trace_rkl", "trace_both")
        for routes in [method(name).algorithm.routes]
    }
    forward, reverse = ("correct", "key_spans", "fkl"), ("wrong", "error_spans", "rkl")
    assert corners == {
        "grpo": set(),
        "trace_fkl": {forward},
        "trace_rkl": {reverse},
        "trace_both": {forward, reverse},
    }


@pytest.mark.parametrize("name", ["trace_fkl", "trace_rkl", "trace_both"])
def test_trace_presets_hold_the_published_numbers_and_grpos_policy_gradient(name: str) -> None:
    config = method(name)
    assert config.algorithm.policy_gradient == method("grpo").algorithm.policy_gradient
    assert config.algorithm.aggregation == method("grpo").algorithm.aggregation == "seq-mean-token-mean"
    assert (config.annotator.coverage_cap, config.teacher.context) == (0.25, "type_label")
    assert (config.teacher.weights.type, config.teacher.weights.every) == ("periodic", 10)
    for route in config.algorithm.routes.values():
        assert sum(schedule_value(route.schedule, step) for step in range(60)) == pytest.approx(12.75, abs=1e-12)
        assert (route.clip.threshold, route.multiplier, route.temperature, route.on_routed) == (0.05, 1.0, 1.0, "ramp")
