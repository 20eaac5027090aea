"""Every YAML under configs/ loads, alone or on top of what an overlay needs."""

from pathlib import Path
from typing import Any

import pytest

from trace_rl.config.run import RunConfig
from trace_rl.config.teacher import Periodic
from trace_rl.divergences import KlClip
from trace_rl.errors import ConfigError
from trace_rl.overlays import dump_config, load_config
from trace_rl.row_actions import Fkl, Rkl

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "sweeps")
"""Those of runs; a sweep has a schema of its own."""
OWN_MODEL_AND_DATA = ("model.path=some/model", "data.path=some.jsonl")


METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))


def paths_for(file: Path) -> tuple[str, ...]:
    """What a user has to give beside the file."""
    is_external = "type: external" in file.read_text(encoding="utf-8")
    return (*OWN_MODEL_AND_DATA, "teacher.weights.path=some/teacher") if is_external else OWN_MODEL_AND_DATA


def method(name: str) -> RunConfig:
    file = CONFIGS / "methods" / f"{name}.yaml"
    return load_config([CONFIGS / "base.yaml", file], paths_for(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(CONFIGS).as_posix())
def test_loads_alone_and_on_the_base(file: Path, tmp_path: Path) -> None:
    for files in ([file], [CONFIGS / "base.yaml", file]):
        config = load_config(files, paths_for(file))
        dumped = tmp_path / "dumped.yaml"
        dumped.write_text(dump_config(config), encoding="utf-8")
        assert load_config([dumped]) == config


def test_the_demo_needs_nothing_else() -> None:
    demo = load_config([CONFIGS / "demo.yaml"])
    assert demo.model.path == demo.data.path == "task:arithmetic"
    assert demo.needs_teacher
    assert demo.evaluation.every > 0


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_a_method_takes_the_place_of_the_demos(file: Path) -> None:
    demo = load_config([CONFIGS / "demo.yaml", file], paths_for(file)[2:])
    plain = method(file.stem)
    assert demo.algorithm == plain.algorithm
    assert demo.method == plain.method
    assert demo.model.path == "task:arithmetic"
    if demo.algorithm.reads:
        assert demo.teacher == plain.teacher


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_a_missing_teacher_is_one_sentence(file: Path) -> None:
    if "type: external" not in file.read_text(encoding="utf-8"):
        return
    with pytest.raises(ConfigError) as caught:
        load_config([CONFIGS / "demo.yaml", file])
    expected = "teacher.weights.path is not set; give it in a YAML file or as an override teacher.weights.path=VALUE"
    assert str(caught.value) == expected


def differences(ours: Any, theirs: Any, path: str = "") -> set[str]:
    """Dotted paths at which two dumped configurations differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = ours.keys() | theirs.keys()
        return {found for key in keys for found in differences(ours.get(key), theirs.get(key), f"{path}.{key}")}
    return set() if ours == theirs else {path[1:]}


ROUTE = "algorithm.routes.key_spans"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trace_reproduction", {f"{ROUTE}.action.clip.mode"}),
        ("trace_all_token", {f"{ROUTE}.selector.tokens.type"}),
        (
            "trace_random",
            {f"{ROUTE}.selector.tokens.{key}" for key in ("type", "like", "frac", "shape", "span_tokens")},
        ),
        (
            "trace_inverted",
            {f"{ROUTE}.selector.tokens.{key}" for key in ("type", "like", "frac", "shape", "span_tokens")},
        ),
        ("trace_no_label", {"teacher.context.pieces"}),
        (
            "trace_asymmetric",
            {f"{section}.chat_template_kwargs.enable_thinking" for section in ("teacher", "model", "evaluation")},
        ),
    ],
)
def test_controls_change_one_thing(name: str, expected: set[str]) -> None:
    ours, theirs = (
        config.model_dump(mode="json", serialize_as_any=True) for config in (method(name), method("trace_fkl"))
    )
    found = {path for path in differences(ours, theirs) if not path.startswith("method.")}
    assert found == expected


def test_ramp_only_changes_the_action_alone() -> None:
    ours, theirs = method("trace_ramp_only"), method("trace_fkl")
    (own,), (full,) = ours.algorithm.routes.values(), theirs.algorithm.routes.values()
    assert own.action.type == "none"
    assert own.model_copy(update={"action": full.action}) == full
    assert not ours.needs_teacher
    assert ours.needs_annotator


def test_the_methods_are_what_they_are_called() -> None:
    corners = {
        name: {(route.selector.rollouts, route.selector.tokens.type, route.action.type) for route in routes.values()}
        for name in ("grpo", "trace_fkl", "trace_rkl", "trace_both")
        for routes in [method(name).algorithm.routes]
    }
    forward, reverse = (("correct",), "key_spans", "fkl"), (("wrong",), "error_spans", "rkl")
    assert corners == {
        "grpo": set(),
        "trace_fkl": {forward},
        "trace_rkl": {reverse},
        "trace_both": {forward, reverse},
    }


@pytest.mark.parametrize("name", ["trace_fkl", "trace_rkl", "trace_both", "trace_reproduction"])
def test_trace_presets_hold_the_published_numbers_and_grpos_policy_gradient(name: str) -> None:
    config = method(name)
    assert config.algorithm.policy_gradient == method("grpo").algorithm.policy_gradient
    assert config.algorithm.aggregation == method("grpo").algorithm.aggregation == "seq-mean-token-mean"
    assert (config.annotator.coverage_cap, config.teacher.context.pieces) == (0.25, ("type_label",))
    assert config.teacher.weights == Periodic(every=10)
    for route in config.algorithm.routes.values():
        assert sum(route.schedule.at(step) for step in range(60)) == pytest.approx(12.75, abs=1e-12)
        assert (route.multiplier, route.temperature, route.on_routed) == (1.0, 1.0, "ramp")
        assert isinstance(route.action, Fkl | Rkl)
        literal = name == "trace_reproduction"
        assert route.action.clip == KlClip(mode="vocab_clamp" if literal else "token_rescale", threshold=0.05)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("dapo", "algorithm.policy_gradient.clip_high", 0.28),
        ("dapo", "algorithm.overlong.penalty_frac", 4096 / 20480),
        ("dr_grpo", "algorithm.advantage.std", "none"),
        ("gspo", "algorithm.policy_gradient.clip_low", 3e-4),
        ("gspo", "algorithm.policy_gradient.clip_high", 4e-4),
        ("opsd", "sampling.temperature", 1.1),
        ("opsd", "algorithm.routes.all.temperature", 1.1),
        ("opsd", "sampling.top_p", 0.95),
        ("opsd", "sampling.top_k", 20),
        ("opsd", "algorithm.routes.all.action.clip.threshold", 0.05),
        ("sdpo", "teacher.weights.rate", 0.05),
        ("sdpo", "algorithm.routes.informed.action.support.k", 100),
        ("sdpo", "algorithm.routes.informed.action.beta", 0.5),
        ("sdpo", "algorithm.routes.informed.action.importance_cap", 2.0),
        ("srpo", "algorithm.routes.wrong.token_weight.beta", 1.0),
        ("rlsd", "teacher.weights.every", 20),
        ("rlsd", "algorithm.routes.all.action.clip", 0.2),
        ("rlsd", "algorithm.routes.all.schedule.steps", 50),
        ("tip", "algorithm.routes.top.selector.tokens.frac", 0.5),
        ("scope", "algorithm.routes.correct.token_weight.tau", 1.0),
        ("ssopd", "algorithm.routes.longest_wrong.action.clip.mode", "token_rescale"),  # ours: the paper's is unknown
        ("gkd", "sampling.samples_per_prompt", 1),
    ],
)
def test_published_numbers(name: str, setting: str, value: object) -> None:
    found: Any = method(name).model_dump(serialize_as_any=True)
    for key in setting.split("."):
        found = found[key]
    assert found == pytest.approx(value)
