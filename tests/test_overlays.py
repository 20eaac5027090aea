"""YAML overlays and dotted overrides: what wins, and one clear sentence with its place for every mistake."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from trace_rl.advantages import GroupAdvantage
from trace_rl.config.run import RunConfig
from trace_rl.config.teacher import Periodic
from trace_rl.errors import ConfigError
from trace_rl.overlays import dump_config, load_config
from trace_rl.policy_gradients import Cispo, Gspo
from trace_rl.row_actions import Fkl

BASE = """\
model: {path: m}
data:
  path: d
"""
ROUTE = """\
algorithm:
  routes:
    first:
      selector: {rollouts: correct, tokens: key_spans}
      action: fkl
      schedule: {type: constant, value: 0.25}
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, text: str) -> Path:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return file

    return write_file


def load(write: Write, *texts: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    return load_config([write(f"{index}.yaml", text) for index, text in enumerate((BASE, *texts))], overrides)


def refusal(write: Write, *texts: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write, *texts, overrides=overrides)
    return str(caught.value)


def test_later_files_win_key_by_key_and_overrides_last(write: Write) -> None:
    config = load(
        write,
        "run: {steps: 5, seed: 1, name: a}",
        "run: {steps: 6, seed: 2}",
        overrides=("run.seed=3", "learner.optimizer.learning_rate=1e-5", "evaluation.every=0"),
    )
    assert (config.run.name, config.run.steps, config.run.seed) == ("a", 6, 3)
    assert config.learner.optimizer.learning_rate == 1e-5
    assert config.evaluation.every == 0


def test_lists_are_replaced_as_a_whole(write: Write) -> None:
    config = load(write, "learner: {optimizer: {betas: [0.5, 0.6]}}", overrides=("learner.optimizer.betas=[0.7, 0.8]",))
    assert config.learner.optimizer.betas == (0.7, 0.8)


def test_null_goes_back_to_the_default(write: Write) -> None:
    assert load(write, "run: {steps: 5}", "run: {steps: null}").run.steps == RunConfig.model_fields["run"].default.steps
    assert load(write, "run: {steps: 5}", overrides=("run.steps=",)).run.steps == 300
    assert load(write, "run: {steps: 5}", "run: null").run.steps == 300


def test_an_empty_mapping_or_the_replace_tag_drops_what_was_there(write: Write) -> None:
    second = ROUTE.replace("first", "second")
    assert list(load(write, ROUTE, second).algorithm.routes) == ["first", "second"]
    assert list(load(write, ROUTE, "algorithm: {routes: {}}").algorithm.routes) == []
    assert list(load(write, ROUTE, second.replace("routes:", "routes: !replace")).algorithm.routes) == ["second"]
    assert list(load(write, ROUTE, overrides=("algorithm.routes={}",)).algorithm.routes) == []
    assert list(load(write, second.replace("routes:", "routes: !replace"), ROUTE).algorithm.routes) == [
        "second", "first",
    ]  # fmt: skip


def test_overrides_reach_into_a_route(write: Write) -> None:
    config = load(
        write,
        ROUTE,
        overrides=(
            "algorithm.routes.first.action.clip.mode=vocab_clamp",
            "algorithm.routes.first.schedule.value=0.125",
        ),
    )
    route = config.algorithm.routes["first"]
    assert isinstance(route.action, Fkl)
    assert (route.action.clip.mode, route.schedule.model_dump()["value"]) == ("vocab_clamp", 0.125)


def test_a_kind_given_by_name_keeps_it_when_a_setting_of_it_is_given(write: Write) -> None:
    by_name = "algorithm: {policy_gradient: gspo}"
    overrides = ("algorithm.policy_gradient.clip_high=0.5",)
    assert load(write, by_name, overrides=overrides).algorithm.policy_gradient == Gspo(clip_high=0.5)
    other = "algorithm: {policy_gradient: {type: cispo}}"
    assert load(write, by_name, other).algorithm.policy_gradient == Cispo()


def test_settings_of_a_kind_that_nobody_named_are_those_of_the_default(write: Write) -> None:
    assert load(write, overrides=("algorithm.advantage.std=none",)).algorithm.advantage == GroupAdvantage(std="none")
    assert load(write, ROUTE, overrides=("teacher.weights.every=3",)).teacher.weights == Periodic(every=3)


def test_a_kind_without_a_type_is_one_sentence(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write, "algorithm: {advantage: !replace {std: none}}")
    expected = "algorithm.advantage has no type; give a name, or a mapping with type: one of group, leave_one_out, none"
    assert expected in str(caught.value)


def test_plugins_are_imported_before_the_rest_is_read(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "from typing import Literal\n"
        "from trace_rl.schedules import Schedule\n"
        "class Never(Schedule):\n"
        "    type: Literal['never_plugin'] = 'never_plugin'\n"
        "    peak = property(lambda self: 0.0)\n"
        "    def at(self, step): return 0.0\n"
    )
    (tmp_path / "plugged_schedule.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    plugged = ROUTE.replace("constant, value: 0.25", "never_plugin")
    assert (
        load(write, plugged, overrides=("plugins=[plugged_schedule]",)).algorithm.routes["first"].schedule.type
        == "never_plugin"
    )
    with pytest.raises(ConfigError, match=r"plugins names 'no_such_module', which cannot be imported"):
        load(write, ROUTE, overrides=("plugins=no_such_module",))


def test_extends_is_merged_below_the_file_that_names_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write("base.yaml", BASE + "run: {steps: 1, seed: 1, name: base}")
    write("sub/one.yaml", "extends: ../base.yaml\nrun: {steps: 2, seed: 2}")
    top = write("top.yaml", "extends: [base.yaml, sub/one.yaml]\nrun: {steps: 3}")
    run = load_config([top]).run
    assert (run.name, run.steps, run.seed) == ("base", 3, 2)


def test_a_dumped_configuration_reads_back_as_itself(write: Write) -> None:
    config = load(
        write, ROUTE, "data: {question_suffix: ' größer: {x}'}", overrides=("algorithm.policy_gradient.dual_clip=3",)
    )
    assert load_config([write("dump.yaml", dump_config(config))]) == config


def test_values_with_an_equals_sign_stay_whole(write: Write) -> None:
    assert load(write, overrides=("data.question_suffix=a=b",)).data.question_suffix == "a=b"


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("run:\n  stepz: 3\n", (), "1.yaml:2: unknown key run.stepz; did you mean 'steps'?"),
        ("runn: {steps: 3}\n", (), "1.yaml:1: unknown key runn; did you mean 'run'?"),
        ("", ("run.stepz=3",), "override run.stepz: unknown key run.stepz; did you mean 'steps'?"),
        ("\nrun:\n\n  steps: many\n", (), "1.yaml:4: run.steps is 'many'; input should be a valid integer"),
        ("run: {steps: -1}\n", (), "1.yaml:1: run.steps is -1; input should be greater than or equal to 0"),
        ("run: 3\n", (), "1.yaml:1: run is 3; input should be"),
        ("run:\n  steps: 1\n  seed: 1\n  steps: 2\n", (), "1.yaml:4: key 'steps' was given at line 2 already"),
        ("a: [\n", (), "1.yaml:2: not valid YAML"),
        ("- a\n", (), "1.yaml holds a list; expected a mapping"),
        ("? [a]\n: b\n", (), "1.yaml:1: "),
        ("model: {path: null}\n", (), "model.path is not set; give it in a YAML file or as an override model.path"),
        ("model: null\n", (), "model.path is not set; give it in a YAML file or as an override model.path"),
        ("", ("run.steps",), "override 'run.steps' is not of the form section.key=value"),
        ("", ("run..steps=1",), "override 'run..steps=1' is not of the form section.key=value"),
        ("extends: gone.yaml\n", (), "gone.yaml, which "),
        ("extends: '" + "long " * 900 + "'\n", (), "1.yaml extends, does not exist or cannot be read"),
        ("extends: '" + "a/" * 900 + "b'\n", (), "1.yaml extends, does not exist or cannot be read"),
        ("extends: 3\n", (), "1.yaml:1: extends is 3; expected"),
        ("extends: 1.yaml\n", (), "1.yaml extends itself"),
        (ROUTE.replace("value", "valeu"), (), "1.yaml:6: unknown key algorithm.routes.first.schedule.valeu; did you"),
        (ROUTE.replace("constant", "cosine"), (), "algorithm.routes.first.schedule"),
        (ROUTE.replace("fkl", "kl"), (), "1.yaml:5: algorithm.routes.first.action has the type 'kl'; did you mean"),
        (ROUTE.replace("correct", "wrong"), (), "1.yaml:4: selector asks for key_spans of wrong rollouts"),
        ("name: a\x00b", (), "1.yaml: not valid YAML"),
        ("data: {task: {min_steps: 9}}\n", (), "1.yaml:1: min_steps=9 exceeds max_steps=6"),
        ("run:\n  name: 2001-99-99\n", (), "1.yaml:2: not valid YAML ('2001-99-99' is no valid timestamp)"),
        ("run: {steps: !!int x}\n", (), "1.yaml:1: not valid YAML ('x' is no valid int)"),
        ("run: {steps: !!bool x}\n", (), "1.yaml:1: not valid YAML ('x' is no valid bool)"),
        ("run: {steps: 0x" + "f" * 5000 + "}\n", (), "1.yaml:1: not valid YAML (a number of 20000 bits is no setting)"),
        ("run: !replace 5\n", (), "1.yaml:1: not valid YAML (a scalar stands where a mapping should be)"),
        ("run: !!map [1]\n", (), "1.yaml:1: not valid YAML (a sequence stands where a mapping should be)"),
        ("a: " + "[" * 2000, (), "1.yaml is nested too deeply"),
        ('extends: "a\\0b"\n', (), "1.yaml extends, is no path (embedded null byte)"),
        ("plugins: 5\n", (), "1.yaml:1: plugins is 5; input should be a valid tuple"),
        ('plugins: ["", a]\n', (), "1.yaml:1: plugins names '', which cannot be imported"),
        ("algorithm: {advantage: {type: [a]}}\n", (), "algorithm.advantage has the type ['a']; expected one of"),
        ("run: {steps: [" + "[1], " * 999 + "]}\n", (), "run.steps is [[1], [1], [1], [1], [1], [1], ...]; input"),
        ("", ("run.steps=2001-99-99",), "override run.steps: run.steps is '2001-99-99'; input should be"),
        ("", ("run.steps=" + "[" * 2000,), "override run.steps has a value that is nested too deeply"),
        ("", ("a." * 2000 + "a=" + "[" * 2000,), "a.a has a value that is nested too deeply"),
        ("", ("a\x1e\r\x85\u2028z=:",), "unknown key a\\x1e\\r\\x85\\u2028z; known keys here"),
        ("run: &a {steps: *a}\n", (), "1.yaml:1: not valid YAML (found unconstructable recursive node)"),
        ("", ("run=&a {steps: *a}",), "override run: run is '&a {steps: *a}'; input should be"),
        ("", ("teacher.weights.type=0x" + "f" * 5000,), "fff'; expected one of"),
        ('plugins: ["' + "a" * 5000 + '"]\n', (), "aaa', which cannot be imported"),
        (f"? {'a' * 900}\n: 1\n" * 2, (), "aaa' was given at line 1 already"),
        ("", ("=" + "long " * 900,), " is not of the form section.key=value"),
        ("", (".".join("a" * 65) + "=1",), "names 65 levels; settings are a handful of levels deep"),
        ("annotator: {segmentation: {boundary: 'a{99999999999999999999}'}}\n", (), "is not a regular expression"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_its_place(
    write: Write, text: str, overrides: tuple[str, ...], expected: str
) -> None:
    message = refusal(write, text, overrides=overrides)
    assert expected in message
    assert "\n" not in message and len(message) < 1000


def test_every_mistake_is_named_on_a_line_of_its_own(write: Write) -> None:
    message = refusal(write, "run: {stepz: 1}\nsampling: {temperature: -1}\n")
    assert len(message.splitlines()) == 2
    assert "run.stepz" in message
    assert "sampling.temperature" in message


def test_a_missing_file_is_named_with_a_suggestion(write: Write, tmp_path: Path) -> None:
    write("demo.yaml", BASE)
    with pytest.raises(ConfigError, match=r"demos\.yaml does not exist .*did you mean demo\.yaml\?"):
        load_config([tmp_path / "demos.yaml"])


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        load_config([tmp_path / "latin.yaml"])


def test_anchors_and_merge_keys_work(write: Write) -> None:
    config = load(write, "placement:\n  generator: &gpu {num_gpus: 1}\n  learner: {<<: *gpu, num_cpus: 3}\n")
    assert (config.placement.learner.num_gpus, config.placement.learner.num_cpus) == (1.0, 3.0)


def test_a_refusal_is_told_alike_in_another_process() -> None:
    refused = ConfigError("one\ntwo", "three " * 500)
    first, second = str(refused).split("\n")
    assert first == "one\\ntwo"
    assert len(second) < 1000
    assert str(pickle.loads(pickle.dumps(refused))) == str(refused)
