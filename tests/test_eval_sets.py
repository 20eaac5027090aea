"""Problems of evaluation sets out of every kind of source."""

import json
import sys
from pathlib import Path

import pytest

from trace_rl.config.evaluation import EvalSet, definition
from trace_rl.errors import DataError
from trace_rl.launch.evaluate.sets import open_set
from trace_rl.tasks.arithmetic import parse_question

ROWS = [{"problem": "1 + 1?", "answer": "2", "id": 7}, {"problem": "2 + 2?", "answer": 4, "id": 8}]
GPQA = [
    {"Question": f"Q{i}", "Correct Answer": "yes", **{f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)}}
    for i in range(3)
]


def own(path: Path, **settings: object) -> EvalSet:
    return EvalSet(**{"name": "own", "path": str(path), **settings})


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    path.write_text("problem,answer,id\n" + "".join(f"{r['problem']},{r['answer']},{r['id']}\n" for r in rows))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{**row, "answer": str(row["answer"])} for row in rows]), path)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [("x.jsonl", write_jsonl), ("x.json", write_json), ("x.csv", write_csv), ("x.parquet", write_parquet)],
)
def test_files_of_every_kind_give_the_same_problems(tmp_path: Path, name: str, write) -> None:
    problems = open_set(own(write(tmp_path / name, ROWS), question_suffix=" Box it."))
    assert [(each.prompt_id, each.question, each.answer) for each in problems] == [
        ("7", "1 + 1? Box it.", "2"),
        ("8", "2 + 2? Box it.", "4"),
    ]


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"test": Dataset.from_list(ROWS[:1])}).save_to_disk(str(tmp_path / "saved"))
    assert [each.answer for each in open_set(own(tmp_path / "saved"))] == ["2"]
    with pytest.raises(DataError, match="no split 'train', only test"):
        open_set(own(tmp_path / "saved", split="train"))


def test_the_first_problems_are_taken_and_numbered_where_they_have_no_id(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(5)])
    assert [each.prompt_id for each in open_set(own(file, num_problems=3))] == ["0", "1", "2"]


def test_a_letter_set_asks_for_the_letter_of_the_right_option(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "gpqa.jsonl", GPQA)
    problems = open_set(EvalSet(**definition(f"GPQA-Diamond={file}")))
    for problem in problems:
        options = dict(line.split(". ", 1) for line in problem.question.splitlines() if line[1:3] == ". ")
        assert sorted(options) == ["A", "B", "C", "D"] and options[problem.answer] == "yes"
        assert sorted(options.values()) == ["no 1", "no 2", "no 3", "yes"]
        assert "letter of your choice" in problem.question
    assert open_set(EvalSet(**definition(f"GPQA-Diamond={file}"))) == problems


def test_the_embedded_task_has_settings_outside_of_its_own_difficulty() -> None:
    sets = {
        name: EvalSet(**definition(name), **{}) for name in ("arithmetic", "arithmetic-longer", "arithmetic-larger")
    }
    steps = {name: [parse_question(each.question) for each in open_set(item)] for name, item in sets.items()}
    assert [len(questions) for questions in steps.values()] == [256, 256, 256]
    assert {len(question) for question in steps["arithmetic"]} == {4, 5, 6}
    assert {len(question) for question in steps["arithmetic-longer"]} == {7, 8, 9}
    assert min(step.operand for question in steps["arithmetic-larger"] for step in question) >= 30


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        ([{"text": "q", "answer": "1"}], {}, "row 0 of set own .* none of the columns question, problem.* only text"),
        ([{"question": "q", "answer": ""}], {}, "none of the columns answer"),
        ([*ROWS, ROWS[0]], {}, "the id '7' twice"),
        (GPQA[:1], {"answer_form": "letter", "wrong_columns": ("Wrong",)}, "name the right one in wrong_columns"),
    ],
)
def test_rows_that_lack_something_are_told(tmp_path: Path, rows: list[dict], settings: dict, told: str) -> None:
    with pytest.raises(DataError, match=told):
        open_set(own(write_jsonl(tmp_path / "x.jsonl", rows), **settings))


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_set(own(tmp_path / "none.csv"))
    with pytest.raises(DataError, match="none of the endings"):
        open_set(own(tmp_path / "x.txt"))
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="one list of objects"):
        open_set(own(tmp_path / "x.json"))
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"x.parquet cannot be read"):
        open_set(own(tmp_path / "x.parquet"))


def test_without_network_one_is_told_how_to_get_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*arguments: object, **named: object) -> None:
        raise ConnectionError("no route to the hub\nwith a long stack")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as told:
        open_set(EvalSet(**definition("GPQA-Diamond")))
    assert str(told.value) == (
        "set GPQA-Diamond: the data set Idavidrein/gpqa does not load from the hub (no route to the hub); on a machine "
        'with network access (and, where the set asks for it, after `hf auth login`) run python -c "import datasets; '
        "datasets.load_dataset('Idavidrein/gpqa', 'gpqa_diamond', split='train').to_json('gpqa-diamond.jsonl')\", put "
        "the file here, and evaluate with --sets GPQA-Diamond=gpqa-diamond.jsonl"
    )
    with pytest.raises(DataError, match="aime25', split='test'"):
        open_set(EvalSet(**definition("AIME25=missing.jsonl")))


def test_tasks_of_reasoning_gym_are_read_by_name() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra slow-tests)")
    problems = open_set(EvalSet(**definition("reasoning_gym:gcd"), num_problems=3))
    assert [each.prompt_id for each in problems] == ["gcd/0", "gcd/1", "gcd/2"]
    assert all(each.answer.isdigit() and "boxed" in each.question for each in problems)
    assert open_set(EvalSet(**definition("reasoning_gym:gcd"), num_problems=5))[:3] == problems
    assert open_set(EvalSet(**definition("reasoning_gym:gcd"), num_problems=3, data_seed=1)) != problems


def test_tasks_with_several_right_answers_are_refused() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra slow-tests)")
    with pytest.raises(DataError, match="'countdown' of reasoning-gym takes several answers"):
        open_set(EvalSet(**definition("reasoning_gym:countdown"), num_problems=3))
    with pytest.raises(DataError, match="no task 'gdc'"):
        open_set(EvalSet(**definition("reasoning_gym:gdc"), num_problems=3))


def test_reasoning_gym_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="pip install reasoning-gym"):
        open_set(EvalSet(**definition("reasoning_gym:gcd")))
