"""Prompt sources: rows to prompts, the held-out split, and an order that can be sought."""

import json
from pathlib import Path

import pytest

from trace_rl.batch import Prompt
from trace_rl.data import ArithmeticSource, RowSource, read_jsonl, split_heldout, to_prompts
from trace_rl.errors import DataError
from trace_rl.tasks.arithmetic import ArithmeticDifficulty


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(f"id{index}", f"question {index}", str(index)) for index in range(count)]


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def test_rows_become_prompts(tmp_path: Path) -> None:
    file = write(
        tmp_path / "data.jsonl",
        '{"id": "a", "question": "1+1", "answer": 2, "solution": "one and one"}',
        "",
        '{"prompt": "größer 0?", "answer": "0"}',
    )
    prompts = to_prompts(read_jsonl(file), question_suffix=" Box it.")
    assert prompts == [
        Prompt("a", "1+1 Box it.", "2", "one and one"),
        Prompt("data.jsonl:3", "größer 0? Box it.", "0", ""),
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ['{"question": "x", "answer": "1"}', '{"question": "y"}'],
            r"data\.jsonl:2 has no answer \(columns: question\)",
        ),
        (['{"question": "y", "answer": null}'], r"data\.jsonl:1 has no answer"),
        (['{"question": "y", "answer": "  "}'], r"data\.jsonl:1 has no answer"),
        (['{"question": "y", "answer": "2 + 2 = 4\\n#### 4"}'], r"data\.jsonl:1 has a worked solution under 'answer'"),
        (['{"text": "y", "answer": "1"}'], r"data\.jsonl:1 has no question text \(columns: text, answer\)"),
        (['{"prompt": [{"role": "user"}], "answer": "1"}'], r"data\.jsonl:1 has no question text"),
        (['{"question": "x", "answer": "1"', '{"question": "y"}'], r"data\.jsonl:1 is not valid JSON"),
        (["[1, 2]"], r"data\.jsonl:1 holds a list"),
        (["", ""], "has no rows"),
        (
            ['{"id": 7, "question": "x", "answer": "1"}', '{"id": "7", "question": "y", "answer": "1"}'],
            r"data\.jsonl:2 has the id '7' of .*data\.jsonl:1",
        ),
        (['{"question": "x", "answer": ' + "1" * 5000 + "}"], r"data\.jsonl:1 is not valid JSON \(Exceeds the limit"),
        (["[" * 100_000], r"data\.jsonl:1 is not valid JSON \(maximum recursion depth"),
        (['{"question": "\\ud83d", "answer": "1"}'], r"data\.jsonl:1 holds half a character"),
        (['{"question": "x", "answer": "1", "id": "\\udc00"}'], r"data\.jsonl:1 holds half a character"),
    ],
    ids=[
        *("no answer", "null", "blank", "worked", "no question", "chat", "json", "list", "empty", "same id"),
        *("digits", "depth", "half a question", "half an id"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, lines: list[str], expected: str) -> None:
    file = write(tmp_path / "data.jsonl", *lines)
    with pytest.raises(DataError, match=expected) as caught:
        to_prompts(read_jsonl(file))
    assert "\n" not in str(caught.value)


def test_both_halves_of_a_character_are_one(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", '{"question": "\\ud83d\\ude00", "answer": "1"}')
    assert to_prompts(read_jsonl(file))[0].question == "\U0001f600"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl does not exist"):
        read_jsonl(tmp_path / "no.jsonl")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"question": "caf\xe9", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl is not UTF-8"):
        read_jsonl(file)


def test_the_id_of_a_row_without_one_is_its_place_and_zero_is_an_answer() -> None:
    rows = [
        ("here:1", {"id": None, "question": "x", "answer": 0}),
        ("here:2", {"id": None, "question": "y", "answer": 1}),
    ]
    assert [(prompt.prompt_id, prompt.answer) for prompt in to_prompts(rows)] == [("here:1", "0"), ("here:2", "1")]


def test_heldout_prompts_are_disjoint_from_the_others_and_do_not_depend_on_their_order() -> None:
    prompts = make_prompts(40)
    train, heldout = split_heldout(prompts, 10)
    assert len(heldout) == 10
    assert sorted(ids(train) + ids(heldout)) == sorted(ids(prompts))
    assert ids(split_heldout(prompts[::-1], 10)[1]) == ids(heldout)
    assert ids(split_heldout(prompts, 5)[1]) == ids(heldout)[:5]


def test_a_question_that_occurs_twice_is_never_on_both_sides() -> None:
    prompts = [Prompt(f"{copy}{index}", f"question {index}", "1") for index in range(12) for copy in "ab"]
    for count in range(1, 12):
        train, heldout = split_heldout(prompts, count)
        assert len(heldout) == count
        assert not {prompt.question for prompt in train} & {prompt.question for prompt in heldout}


def test_heldout_rows_must_leave_something_to_train_on() -> None:
    assert split_heldout(make_prompts(3), 0) == (make_prompts(3), [])
    with pytest.raises(DataError, match=r"3 rows and data\.heldout_rows sets 3 aside"):
        split_heldout(make_prompts(3), 3)


def test_a_step_holds_no_prompt_twice_and_an_epoch_holds_every_prompt_once() -> None:
    source = RowSource(make_prompts(12), [], seed=0)
    for _ in range(3):
        epoch = [prompt_id for _ in range(3) for prompt_id in ids(source.take(4))]
        assert sorted(epoch) == sorted(ids(make_prompts(12)))


def test_prompts_that_do_not_fill_a_step_are_skipped_until_the_next_epoch() -> None:
    source = RowSource(make_prompts(10), [], seed=0)
    taken = [ids(source.take(4)) for _ in range(20)]
    assert all(len(set(step)) == 4 for step in taken)
    assert source.position() == {"epoch": 9, "offset": 8}  # two steps an epoch
    assert {prompt_id for step in taken for prompt_id in step} == set(ids(make_prompts(10)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    source, same, other = (RowSource(make_prompts(20), [], seed=seed) for seed in (0, 0, 1))
    first, second = ids(source.take(20)), ids(source.take(20))
    assert first != second
    assert first == ids(same.take(20)) != ids(other.take(20))


@pytest.mark.parametrize("num_taken", range(7))
def test_a_source_goes_on_where_the_position_was_saved(num_taken: int) -> None:
    source, resumed = RowSource(make_prompts(11), [], seed=3), RowSource(make_prompts(11), [], seed=3)
    for _ in range(num_taken):
        source.take(3)
    resumed.seek(json.loads(json.dumps(source.position())))
    assert [ids(source.take(3)) for _ in range(5)] == [ids(resumed.take(3)) for _ in range(5)]


def test_more_prompts_than_rows_cannot_be_taken() -> None:
    source = RowSource(make_prompts(5), [], seed=0)
    assert len(source.take(5)) == 5
    with pytest.raises(DataError, match=r"prompts_per_step is 6, but the data has 5 training rows"):
        source.take(6)


def test_heldout_prompts_are_always_the_same() -> None:
    source = RowSource(make_prompts(5), make_prompts(4), seed=0)
    assert ids(source.heldout(3)) == ids(source.heldout(3)) == ["id0", "id1", "id2"]
    assert len(source.heldout(100)) == 4


def test_the_arithmetic_source_is_an_endless_row_that_can_be_sought() -> None:
    source, resumed = (ArithmeticSource(ArithmeticDifficulty(), seed=5) for _ in range(2))
    first = [*source.take(3), *source.take(2)]
    assert len({prompt.prompt_id for prompt in first}) == 5
    resumed.seek(json.loads(json.dumps(source.position())))
    assert source.take(4) == resumed.take(4)
    assert ArithmeticSource(ArithmeticDifficulty(), seed=5).take(5) == first
    assert ArithmeticSource(ArithmeticDifficulty(), seed=6).take(5) != first


def test_the_arithmetic_source_holds_out_the_same_questions_for_every_seed() -> None:
    one, other = (ArithmeticSource(ArithmeticDifficulty(), seed) for seed in (1, 2))
    assert one.heldout(50) == other.heldout(50)
    assert one.position() == {"index": 0}
    questions = {prompt.question for prompt in one.take(300)}
    assert not questions & {prompt.question for prompt in one.heldout(50)}
