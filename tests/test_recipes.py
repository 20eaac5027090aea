"""The recipes of the reproduction: partners differ in their method alone, they fit their GPUs, and the page says so."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from trace_rl.config.run import RunConfig
from trace_rl.data import RowSource, to_prompts
from trace_rl.launch.placement import Node
from trace_rl.launch.plan.run_plan import RunPlan, plan_run, problems
from trace_rl.launch.plan.text import full_text
from trace_rl.launch.prompt_sources import open_source
from trace_rl.overlays import load_config
from trace_rl.sweeps import Cell, load_sweep

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
RECIPES, SWEEPS = CONFIGS / "recipes", CONFIGS / "sweeps"
PAGE = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
METHOD_FILES = {
    "trace_fkl": "methods/trace_reproduction.yaml",
    "trace_rkl": "recipes/trace_rkl_literal.yaml",
    **{name: f"methods/{name}.yaml" for name in ("grpo", "sdpo", "srpo", "rlsd")},
}
SIZES = ("8b", "1p7b")
PAIRS = [(size, name) for size in SIZES for name in METHOD_FILES]
OF_A_METHOD = ("method.", "algorithm.", "teacher.context.", "teacher.weights.")
MARK = re.compile(r"#.*\b(paper|secondary|code|ours)\b")
GIB = 2**30
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8,
    "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "1p7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "32b": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with a config.json and nothing else, by size."""
    found = {}
    for size, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp(f"qwen3-{size}")
        shape = {**QWEN3, **shape, "tie_word_embeddings": size == "1p7b"}
        (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        found[size] = str(folder)
    return found


def recipe(size: str, name: str, *overrides: str) -> RunConfig:
    return load_config([RECIPES / f"qwen3_{size}_{name}.yaml"], overrides)


def differences(ours: Any, theirs: Any, path: str = "") -> set[str]:
    """Dotted paths at which two dumped configurations differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = ours.keys() | theirs.keys()
        return {found for key in keys for found in differences(ours.get(key), theirs.get(key), f"{path}.{key}")}
    return set() if ours == theirs else {path[1:]}


def differing(ours: RunConfig, theirs: RunConfig) -> set[str]:
    return differences(*(each.model_dump(mode="json", serialize_as_any=True) for each in (ours, theirs)))


@pytest.mark.parametrize(("size", "name"), PAIRS)
def test_partners_differ_in_their_method_and_their_name_alone(size: str, name: str) -> None:
    found = differing(recipe(size, name), recipe(size, "grpo"))
    assert {path for path in found if not path.startswith(OF_A_METHOD)} == (set() if name == "grpo" else {"run.name"})


@pytest.mark.parametrize("name", METHOD_FILES)
def test_sizes_differ_in_the_model_and_the_stage_alone(name: str) -> None:
    found = differing(recipe("8b", name), recipe("1p7b", name))
    assert found == {"model.path", "learner.zero_stage", "run.name"}


@pytest.mark.parametrize(("size", "name"), PAIRS)
def test_a_recipe_has_the_method_of_its_preset(size: str, name: str) -> None:
    found = recipe(size, name)
    preset = load_config([CONFIGS / "base.yaml", CONFIGS / METHOD_FILES[name]], ["model.path=m", "data.path=d"])
    assert (found.algorithm, found.method) == (preset.algorithm, preset.method)
    if found.needs_teacher:
        assert (found.teacher.context, found.teacher.weights) == (preset.teacher.context, preset.teacher.weights)
    assert found.run.name == f"qwen3-{size}-{name.replace('_', '-')}"
    assert found.model.path == {"8b": "Qwen/Qwen3-8B", "1p7b": "Qwen/Qwen3-1.7B"}[size]


def test_the_reverse_corner_differs_from_the_librarys_in_its_clip_alone() -> None:
    literal, own = (
        load_config([CONFIGS / "base.yaml", CONFIGS / file], ["model.path=m", "data.path=d"])
        for file in (METHOD_FILES["trace_rkl"], "methods/trace_rkl.yaml")
    )
    found = {path for path in differing(literal, own) if not path.startswith("method.")}
    assert found == {"algorithm.routes.error_spans.action.clip.mode"}
    assert literal.algorithm.routes["error_spans"].action.model_dump()["clip"]["mode"] == "vocab_clamp"


def planned(config: RunConfig) -> RunPlan:
    """The plan for GPUs of 80 GiB, with prompts instead of the data file."""
    rows = [(str(row), {"question": f"{row}?", "answer": "1"}) for row in range(320)]
    return plan_run(config, RowSource(to_prompts(rows), [], seed=0), 80 * GIB)


@pytest.mark.parametrize(("size", "name"), PAIRS)
def test_a_recipe_fits_one_node_of_eight_gpus(size: str, name: str, folders: dict[str, str]) -> None:
    plan = planned(recipe(size, name, f"model.path={folders[size]}"))
    assert problems(plan, [Node("node", {"CPU": 64.0, "GPU": 8.0})]) == []
    assert plan.placement.total()["GPU"] == (7 if name == "grpo" else 8)
    # 32 prompts x 8 samples; 2,048 + 8,192 tokens each, of which 20,480 hold two; 128 micro-batches for 4 ranks
    batch = plan.batch
    assert (batch.num_sequences, batch.optimizer_steps, batch.sequences_per_micro_batch) == (256, 1, 2)
    assert (batch.micro_batches, batch.idle_micro_batches) == (32, 0)
    assert batch.epochs == 400 * 32 / 320
    assert "32 prompts x 8 samples = 256 sequences a step" in full_text(plan)


def test_two_nodes_have_the_same_batches(folders: dict[str, str]) -> None:
    files = [RECIPES / "qwen3_8b_trace_fkl.yaml", RECIPES / "two_nodes.yaml"]
    plan = planned(load_config(files, [f"model.path={folders['8b']}"]))
    nodes = [Node(name, {"CPU": 64.0, "GPU": 8.0}) for name in "ab"]
    assert problems(plan, nodes) == []
    assert len(problems(plan, nodes[:1])) > 0
    assert plan.placement.total()["GPU"] == 16
    assert plan.batch.num_sequences == 256
    found = differing(plan.config, recipe("8b", "trace_fkl", f"model.path={folders['8b']}"))
    assert found == {"placement.ray_address", "learner.world_size", "generator.num_engines"}


@pytest.mark.parametrize("name", ["self", "static", "frozen_32b"])
def test_every_annotator_fits_the_node_of_its_recipe(name: str, folders: dict[str, str]) -> None:
    paths = [f"model.path={folders['8b']}"]
    paths += [f"annotator.backend.path={folders['32b']}"] if name == "frozen_32b" else []
    config = load_config([RECIPES / "qwen3_8b_trace_fkl.yaml", RECIPES / "annotators" / f"{name}.yaml"], paths)
    plan = planned(config)
    assert problems(plan, [Node("node", {"CPU": 64.0, "GPU": 8.0})]) == []
    assert plan.placement.total()["GPU"] == 8
    # 40 steps of 256 rollouts
    assert plan.annotation is not None
    assert plan.annotation.requests == 10_240
    changed = {path.partition(".")[0] for path in differing(config, recipe("8b", "trace_fkl"))}
    assert changed <= {"annotator", "generator", "placement", "model"}


def cells(name: str) -> dict[str, Cell]:
    """The first cell of each group."""
    found: dict[str, Cell] = {}
    for cell in load_sweep(SWEEPS / f"{name}.yaml").cells:
        found.setdefault(cell.group, cell)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_the_sweep_of_methods_runs_the_recipes(size: str) -> None:
    found = cells(f"qwen3_{size}_methods")
    assert found.keys() == METHOD_FILES.keys()
    for name, cell in found.items():
        paths = differing(cell.config, recipe(size, name))
        assert {path for path in paths if not path.startswith("run.")} == set(), name


@pytest.mark.parametrize(
    ("sweep", "group", "expected"),
    [
        ("qwen3_1p7b_mask", "all_token", {"type": "all"}),
        ("qwen3_1p7b_mask", "random_25", {"type": "random", "frac": 0.25, "shape": "tokens"}),
        ("qwen3_1p7b_mask", "inverted_25", {"type": "inverted", "frac": 0.25, "shape": "tokens"}),
        ("qwen3_1p7b_mask", "random_matched", {"type": "random", "frac": 0.0, "shape": "spans"}),
        ("qwen3_1p7b_mask", "inverted_matched", {"type": "inverted", "frac": 0.0, "shape": "spans"}),
    ],
)
def test_masks_change_the_selected_tokens_alone(sweep: str, group: str, expected: dict[str, object]) -> None:
    found = cells(sweep)
    paths = {path for path in differing(found[group].config, found["spans"].config) if not path.startswith("run.")}
    where = "algorithm.routes.error_spans.selector.tokens"
    assert {path.startswith(f"{where}.") for path in paths} == {True}
    tokens = found[group].config.algorithm.routes["error_spans"].selector.tokens.model_dump()
    assert tokens.items() >= expected.items()
    assert tokens.get("like", "error_spans") == "error_spans"


def test_who_thinks_is_all_that_the_sweep_of_thinking_changes() -> None:
    found = cells("qwen3_8b_thinking")
    sides = {
        name: tuple(
            {**cell.config.model.chat_template_kwargs, **own.chat_template_kwargs}["enable_thinking"]
            for own in (cell.config.model, cell.config.teacher, cell.config.evaluation)
        )
        for name, cell in found.items()
    }  # of student, teacher and held-out prompts
    assert sides == {
        "both_think": (True, True, True),
        "teacher_thinks": (False, True, True),
        "neither_thinks": (False, False, True),
    }
    for cell in found.values():
        paths = differing(cell.config, found["both_think"].config)
        assert {path.partition(".")[2] for path in paths if not path.startswith("run.")} <= {
            "chat_template_kwargs.enable_thinking"
        }


def test_the_sweep_of_annotators_asks_each_of_the_papers() -> None:
    found = cells("qwen3_8b_annotator")
    backends = {name: cell.config.annotator.backend.type for name, cell in found.items() if cell.config.needs_annotator}
    assert backends == {"api": "api", "self": "self", "frozen_32b": "frozen", "static": "static"}
    assert found.keys() - backends.keys() == {"grpo"}


def test_the_sweep_of_clips_has_every_mode() -> None:
    modes = [
        cell.config.algorithm.routes["key_spans"].action.model_dump()["clip"]["mode"]
        for cell in cells("qwen3_8b_clip").values()
    ]
    assert modes == ["vocab_clamp", "token_rescale", "token_clamp", "none"]


@pytest.mark.parametrize(
    "file", ["qwen3", "qwen3_8b", "qwen3_1p7b", "annotators/self", "annotators/static", "annotators/frozen_32b"]
)
def test_every_value_that_recipes_share_says_where_it_comes_from(file: str) -> None:
    marked, unmarked, comment = 0, [], ""
    for line in (RECIPES / f"{file}.yaml").read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("#"):
            comment += line
            continue
        if re.match(r" +\w+: +[^!#]", line):  # a value, not a section and not what a file extends
            if MARK.search(line) or MARK.search(comment):
                marked += 1
            else:
                unmarked.append(line)
        comment = ""
    assert unmarked == []
    assert marked > 0


def rows_of(heading: str) -> list[list[str]]:
    """Cells of the table rows below a heading of the page."""
    section = PAGE.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_has_the_values_that_the_recipes_resolve_to() -> None:
    found = recipe("8b", "trace_fkl").model_dump(mode="json", serialize_as_any=True)
    rows = rows_of("## What is whose")
    assert len(rows) > 30
    for setting, value, mark, _ in rows:
        resolved: Any = found
        for key in setting.strip("`").split("."):
            resolved = resolved[key]
        assert resolved == yaml.safe_load(value), setting
        assert mark in ("paper", "secondary", "code", "ours"), setting


def test_the_page_names_every_recipe_and_every_sweep() -> None:
    for size, name in PAIRS:
        assert f"`qwen3_{size}_{name}`" in PAGE
    for file in SWEEPS.glob("qwen3_*.yaml"):
        assert f"`{file.stem}`" in PAGE
    for file in re.findall(r"configs/[\w/.]+\.yaml", PAGE):
        assert (ROOT / file).is_file(), file
    num_cells = {name: len(load_sweep(SWEEPS / f"{name}.yaml").cells) for name in ("qwen3_1p7b_mask", "qwen3_8b_clip")}
    assert num_cells == {"qwen3_1p7b_mask": 7 * 3, "qwen3_8b_clip": 4 * 3}


def test_the_script_of_the_page_writes_a_file_that_a_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"problem": f"What is {number} + 1?", "solution": f"\\boxed{{{number + 1}}}", "Answer": str(number + 1)}
        for number in range(300)
    ]
    refused = [
        {"problem": "What is 0 + 1?", "solution": "again", "Answer": "1"},
        {"problem": "Prove it.", "solution": "As usual.", "Answer": None},
        {"problem": "x" * 1901, "solution": "", "Answer": "1"},
        {"problem": "Sum?", "solution": "", "Answer": "1 + 1 = 2 #### 2"},
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list([*rows, *refused]))
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(script, "script", "exec"), {})
    assert "300 of 304 rows kept" in capsys.readouterr().out
    source = open_source(recipe("8b", "trace_fkl"))
    assert len(source.heldout(1000)) == 256
    (prompt,) = source.take(1)
    number = int(prompt.prompt_id.removeprefix("ot-"))
    assert (prompt.answer, prompt.solution) == (str(number + 1), f"\\boxed{{{number + 1}}}")
    assert prompt.question.endswith("put your final answer within \\boxed{}.")
