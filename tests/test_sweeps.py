"""Sweep files: what each kind of axis expands to, and one sentence with its line for every mistake, before any run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trace_rl.config.sweep import Choice, Integers, LogUniform, RandomAxis, Uniform
from trace_rl.errors import ConfigError
from trace_rl.sweeps import Sweep, load_sweep

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
BASE = "name: s\nbase: {files: [base.yaml]}\n"

Load = Callable[..., Sweep]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_text(text: str, *overrides: str, **files: str) -> Sweep:
        (tmp_path / "base.yaml").write_text("model: {path: m}\ndata: {path: d}\nrun: {name: never, seed: 9}\n")
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(content)
        (tmp_path / "sweep.yaml").write_text(text)
        return load_sweep(tmp_path / "sweep.yaml", overrides)

    return load_text


def refusal(load: Load, text: str, *overrides: str, **files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides, **files)
    return str(caught.value)


def settings_of(sweep: Sweep) -> list[tuple[int, float, int]]:
    """(steps, learning rate, seed) of each cell."""
    return [
        (cell.config.run.steps, cell.config.learner.optimizer.learning_rate, cell.config.run.seed)
        for cell in sweep.cells
    ]


def test_a_grid_is_every_combination_and_every_seed(load: Load) -> None:
    axis = "values: {run.steps: [1, 2], learner.optimizer.learning_rate: [0.1, 0.2]}"
    sweep = load(BASE + f"seeds: [3, 4]\naxes:\n  sizes:\n    type: grid\n    {axis}\n")
    expected = [(steps, rate, seed) for steps in (1, 2) for rate in (0.1, 0.2) for seed in (3, 4)]
    assert settings_of(sweep) == expected
    assert [cell.name for cell in sweep.cells][:3] == [
        "steps-1_learning_rate-0.1_seed-3",
        "steps-1_learning_rate-0.1_seed-4",
        "steps-1_learning_rate-0.2_seed-3",
    ]


def test_a_zip_goes_through_its_lists_together(load: Load) -> None:
    axis = "values: {run.steps: [1, 2], learner.optimizer.learning_rate: [0.1, 0.2]}"
    assert settings_of(load(BASE + f"axes: {{pairs: {{type: zip, {axis}}}}}\n")) == [(1, 0.1, 0), (2, 0.2, 0)]


def test_variants_lay_files_and_then_settings_over_the_base(load: Load) -> None:
    text = BASE + (
        "axes:\n  kind:\n    type: list\n    variants:\n      plain: {}\n"
        "      short: {files: [short.yaml], overrides: {run: {checkpoint_every: 7}}}\n"
    )
    plain, short = load(text, short="run: {steps: 5, checkpoint_every: 1}\n").cells
    assert (plain.group, plain.config.run.steps, plain.config.run.checkpoint_every) == ("plain", 300, 50)
    assert (short.group, short.config.run.steps, short.config.run.checkpoint_every) == ("short", 5, 7)


def test_axes_multiply_and_later_ones_win(load: Load) -> None:
    text = BASE + (
        "axes:\n  first: {type: grid, values: {run.steps: [1, 2]}}\n"
        "  second: {type: list, variants: {a: {overrides: {run.steps: 9}}, b: {}}}\n"
    )
    sweep = load(text)
    assert [(cell.group, cell.config.run.steps) for cell in sweep.cells] == [
        ("steps-1_a", 9),
        ("steps-1_b", 1),
        ("steps-2_a", 9),
        ("steps-2_b", 2),
    ]


def test_without_axes_the_seeds_are_the_cells(load: Load) -> None:
    sweep = load(BASE + "seeds: [1, 2]\n")
    assert [(cell.name, cell.config.run.seed) for cell in sweep.cells] == [("s_seed-1", 1), ("s_seed-2", 2)]


def test_random_points_are_those_of_their_seed_and_lie_in_their_range(load: Load) -> None:
    text = BASE + (
        "axes:\n  search:\n    type: random\n    num: 20\n    values:\n"
        "      learner.optimizer.learning_rate: {type: log_uniform, low: 1.0e-6, high: 1.0e-4}\n"
        "      run.steps: {type: integers, low: 3, high: 5}\n"
        "      learner.zero_stage: {type: choice, of: [0, 2]}\n"
    )
    sweep = load(text)
    assert settings_of(sweep) == settings_of(load(text))
    assert settings_of(sweep) != settings_of(load(text.replace("num: 20", "num: 20\n    seed: 1")))
    assert {steps for steps, _, _ in settings_of(sweep)} == {3, 4, 5}
    assert {cell.config.learner.zero_stage for cell in sweep.cells} == {0, 2}
    rates = [rate for _, rate, _ in settings_of(sweep)]
    assert all(1e-6 <= rate <= 1e-4 for rate in rates)
    assert 5 <= sum(rate < 1e-5 for rate in rates) <= 15  # half of a log-uniform's mass lies below the geometric mean
    name, rate = sweep.cells[0].name, rates[0]
    assert f"learning_rate-{rate:g}_" in name  # what is drawn is exactly what the name says
    fewer = text.replace("num: 20", "num: 3").replace("      learner.zero_stage: {type: choice, of: [0, 2]}\n", "")
    assert settings_of(load(fewer)) == settings_of(sweep)[:3]  # a setting more or a point more changes no other


def test_draws_by_hand() -> None:
    assert Uniform(low=2, high=4).at(0.25) == 2.5
    assert LogUniform(low=1e-4, high=1e-2).at(0.5) == 1e-3
    assert [Integers(low=1, high=2).at(share) for share in (0.0, 0.49, 0.5, 0.99)] == [1, 1, 2, 2]
    assert [Choice(of=["a", "b", "c"]).at(share) for share in (0.0, 0.4, 0.9)] == ["a", "b", "c"]
    axis = RandomAxis(num=2, values={"run.steps": Choice(of=[7])})
    assert [point.label for point in axis.points()] == ["draw0_steps-7", "draw1_steps-7"]


def test_a_cell_is_a_run_of_its_own_that_goes_on(load: Load, tmp_path: Path) -> None:
    sweep = load(BASE + f"folder: '{tmp_path}/with{{{{braces}}}}/{{name}}'\nseeds: [5]\n")
    (cell,) = sweep.cells
    run = cell.config.run
    assert (run.name, run.seed, run.resume) == ("s_seed-5", 5, "auto")
    assert cell.folder == sweep.folder / "s_seed-5" == tmp_path / "with{braces}" / "s" / "s_seed-5"


def test_cells_of_a_cluster_join_it_and_need_an_absolute_folder(load: Load, tmp_path: Path) -> None:
    address = "address: http://head:8265\n"
    sweep = load(BASE + address + f"folder: {tmp_path}/{{name}}\n")
    assert sweep.cells[0].config.placement.ray_address == "auto"
    assert "give an absolute path that all nodes and this machine share" in refusal(load, BASE + address)


def test_overrides_of_the_command_line_are_laid_over_every_cell(load: Load) -> None:
    text = BASE + "axes: {size: {type: grid, values: {run.steps: [1, 2]}}}\n"
    assert [cell.config.run.steps for cell in load(text, "run.steps=4").cells] == [4, 4]


def test_the_example_of_the_docs_makes_the_cells_that_it_says(tmp_path: Path) -> None:
    page = (CONFIGS.parent / "docs" / "sweeps.md").read_text(encoding="utf-8")
    text = page.partition("```yaml\n")[2].partition("```")[0].replace("../", f"{CONFIGS}/")
    (tmp_path / "rates.yaml").write_text(text)
    sweep = load_sweep(tmp_path / "rates.yaml", (), str(tmp_path / "elsewhere"))
    assert (len(sweep.cells), sweep.cells[0].name) == (20, "grpo_learning_rate-0.0001_seed-0")
    assert sweep.cells[0].folder == tmp_path / "elsewhere" / sweep.cells[0].name
    (tmp_path / "rates.yaml").write_text(text.replace("coverage_cap", "coverage_capp"))
    with pytest.raises(ConfigError) as caught:
        load_sweep(tmp_path / "rates.yaml")
    assert f"error: {str(caught.value).replace(f'{tmp_path}/', '')}\n" in page


VARIANT = "axes:\n  kind:\n    type: list\n    variants:\n      a:\n        overrides:\n          "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sedes: [1]\n", "sweep.yaml:3: unknown key sedes; did you mean 'seeds'?"),
        ("seeds: [1]\nseeds: [2]\n", "sweep.yaml:4: key 'seeds' was given at line 3 already; keep one of the two"),
        ("seeds: [1, 1]\n", "seeds holds 1 twice; two runs of one seed are one run, keep one of them"),
        ("axes:\n  a: {type: gird}\n", "sweep.yaml:4: axes.a has the type 'gird'; did you mean 'grid'?"),
        ("axes:\n  a: {type: grid}\n", "axes.a.values is not set; give it in the file that describes the whole"),
        (
            "axes:\n  a:\n    type: zip\n    values: {run.steps: [1, 2], run.checkpoint_every: [1]}\n",
            "different lengths (run.steps: 2, run.checkpoint_every: 1); give as many values to each",
        ),
        ("axes:\n  a: {type: list, variants: {a/b: {}}}\n", "the variant 'a/b' becomes the name of a folder"),
        (VARIANT + "run.stesp: 3\n", "sweep.yaml:9: unknown key run.stesp; did you mean 'steps'?"),
        (VARIANT + "run:\n            stesp: 3\n", "sweep.yaml:10: unknown key run.stesp; did you mean 'steps'?"),
        (VARIANT + "run.steps: many\n", "sweep.yaml:9: run.steps is 'many'"),
        (VARIANT + "run.seed: 3\n", "sweep.yaml:9: run.seed is set by the sweep; give `seeds`"),
        (VARIANT + "run: {folder: x}\n", "sweep.yaml:9: run.folder is set by the sweep; give `folder`"),
        (
            "axes:\n  a:\n    type: grid\n    values:\n      run.steps: [1, -2]\n",
            "sweep.yaml:7: run.steps is -2; input should be greater than or equal to 0",
        ),
        ("axes:\n  a: {type: grid, values: {run.steps: [1, 1]}}\n", "two cells would be called steps-1_seed-0"),
        ("stop: [{metric: m, at_step: 3}]\n", "the stop rule on m has no thresholds; give one of `below` and `above`"),
        ("report:\n  reference: grpo\n", "sweep.yaml:4: report.reference is 'grpo'; expected a group, one of s"),
    ],
)
def test_a_mistake_is_refused_with_its_line(load: Load, text: str, expected: str) -> None:
    assert expected in refusal(load, BASE + text)


def test_a_typo_in_a_variants_file_is_told_with_the_line_of_that_file(load: Load) -> None:
    text = BASE + "axes: {kind: {type: list, variants: {a: {files: [a.yaml]}, b: {files: [a.yaml]}}}}\n"
    sentence = refusal(load, text, a="run:\n  stesp: 3\n")
    assert "a.yaml:2: unknown key run.stesp; did you mean 'steps'?" in sentence
    assert len(sentence.splitlines()) == 1  # once, though two variants and their cells share it


def test_a_file_that_is_not_there_is_told_with_the_line_that_names_it(load: Load) -> None:
    text = BASE + "axes:\n  kind:\n    type: list\n    variants:\n      a:\n        files: [nowhere.yaml]\n"
    assert "sweep.yaml:8: files names 'nowhere.yaml'" in refusal(load, text)


def test_mistakes_of_several_variants_are_told_together(load: Load) -> None:
    text = BASE + (
        "axes:\n  kind:\n    type: list\n    variants:\n      a: {overrides: {run.stesp: 1}}\n"
        "      b: {overrides: {data.pth: x}}\n"
    )
    first, second = refusal(load, text).splitlines()
    assert "sweep.yaml:7: unknown key run.stesp" in first
    assert "sweep.yaml:8: unknown key data.pth" in second


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_sweep_that_ships_expands(file: Path) -> None:
    paths = ("model.path=some/model", "data.path=some.jsonl") if file.stem != "trace_controls" else ()
    assert load_sweep(file, paths).cells


def test_the_controls_are_those_that_the_claims_need() -> None:
    sweep = load_sweep(CONFIGS / "sweeps" / "trace_controls.yaml")
    assert len(sweep.settings.seeds) >= 5
    configs = {cell.group: cell.config for cell in sweep.cells}
    assert configs["base"].run.steps == 0
    assert not configs["grpo"].algorithm.routes
    assert not configs["no_label"].teacher.context.pieces
    assert {name: config.annotator.backend.type for name, config in configs.items() if name.startswith("ann")} == {
        "annotator_random": "random",
        "annotator_self": "self",
    }
    actions = {
        name: [route.action.type for route in config.algorithm.routes.values()] for name, config in configs.items()
    }
    assert (actions["trace_fkl"], actions["trace_rkl"], actions["trace_both"]) == (["fkl"], ["rkl"], ["fkl", "rkl"])
    assert actions["ramp_only"] == ["none"]
    selected = {
        name: [route.selector.tokens.type for route in configs[name].algorithm.routes.values()]
        for name in ("all_token", "random_mask", "inverted_mask")
    }
    assert selected == {"all_token": ["all"], "random_mask": ["random"], "inverted_mask": ["inverted"]}
    for config in configs.values():
        (harder,) = (each.task for each in config.evaluation.sets.values())
        assert harder is not None
        assert harder.min_steps > config.data.task.max_steps
        assert harder.max_operand > config.data.task.max_operand
