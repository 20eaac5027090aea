"""Evaluation without engines: set definitions, answer forms, votes and metrics, worked out by hand."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from trace_rl.batch import FinishReason, GradeCause, GradedRollout, Prompt, Rollout, RolloutRequest
from trace_rl.config.evaluation import BUILT_IN, EvalConfig, EvalSet, definition
from trace_rl.errors import ConfigError
from trace_rl.evaluation import Sample, digest, score, to_sample, vote
from trace_rl.launch.evaluate.arguments import read_arguments
from trace_rl.launch.evaluate.tables import result_tables, to_json
from trace_rl.plain_answers import RuleGrader, chooses, chosen_letter, ends_on, lettered
from trace_rl.rewards import grade_text


def set_named(name: str) -> EvalSet:
    return EvalSet(**definition(name))


def sample(problem: str, number: int, reward: float, answer: str = "", **others: object) -> Sample:
    given: dict = {"num_tokens": 10, "finish_reason": "stop", "cause": "graded", **others}
    return Sample(problem, number, "asked", 1, reward, answer=answer, expected="7", text="", **given)


def test_built_in_sets_are_decoded_as_papers_do() -> None:
    for name in ("MATH-500", "AIME24", "AIME25", "AMC23", "GPQA-Diamond"):
        found = set_named(name)
        assert (found.temperature, found.top_p, found.top_k) == (0.6, 0.95, 20), name
    assert [set_named(name).samples_per_problem for name in ("AIME24", "AIME25", "AMC23", "GPQA-Diamond")] == [
        16
    ] * 3 + [8]
    assert set_named("GPQA-Diamond").answer_form == "letter" and len(set_named("GPQA-Diamond").wrong_columns) == 3


def test_every_built_in_definition_is_valid() -> None:
    assert [set_named(name).name for name in BUILT_IN] == list(BUILT_IN)


def test_thinking_reaches_the_template() -> None:
    kwargs = [EvalSet(name="x", path="x.csv", thinking=each).template_kwargs for each in ("template", "on", "off")]
    assert kwargs == [{}, {"enable_thinking": True}, {"enable_thinking": False}]


def test_sets_are_named_in_several_ways() -> None:
    config = EvalConfig(sets="AIME25=mine.jsonl, reasoning_gym:gcd,folder/own.csv,arithmetic")
    assert [(each.name, each.path) for each in config.sets] == [
        ("AIME25", "mine.jsonl"),
        ("gcd", "reasoning_gym:gcd"),
        ("own", "folder/own.csv"),
        ("arithmetic", "task:arithmetic"),
    ]
    assert config.sets[0].samples_per_problem == 16


def test_settings_are_laid_over_every_set_and_a_mapping_over_the_built_in_one() -> None:
    given = ["AIME24", {"name": "AIME25", "samples_per_problem": 2}]
    config = EvalConfig(sets=given, all_sets={"thinking": "off"})
    assert [(each.thinking, each.samples_per_problem) for each in config.sets] == [("off", 16), ("off", 2)]
    assert EvalConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sets": "AIME26"}, "did you mean AIME2"),
        ({"sets": "arithmetic,arithmetic"}, "2 times"),
        ({"sets": [{"name": "x", "path": "x.csv", "answer_form": "letter"}]}, "no wrong_columns"),
        ({"sets": [{"name": "x", "path": "x.csv", "temperature": 0, "samples_per_problem": 2}]}, "the same"),
        ({"sets": [{"name": "../x", "path": "x.csv"}]}, "letters, digits"),
        ({"sets": "arithmetic", "folder": "{modle}"}, "unknown field 'modle'"),
        ({"sets": "arithmetic", "all_sets": {"samples": 3}}, "sets.0.samples"),
        ({"sets": "arithmetic", "sead": 1}, "sead"),
    ],
)
def test_mistakes_in_the_configuration_are_told(given: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EvalConfig(**given)


def test_a_typo_in_a_file_is_told_with_its_line(tmp_path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text("sets: [arithmetic]\ngenerator:\n  num_engine: 2\n")
    with pytest.raises(ConfigError, match=r"eval.yaml:3: unknown key generator.num_engine; did you mean 'num_engines'"):
        read_arguments(["model", str(file)], "")


def test_arguments_are_told_apart(tmp_path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text("seed: 3\n")
    config, checkpoints = read_arguments(["runs/a", str(file), "generator.num_engines=2", "b"], "AMC23,arithmetic")
    assert (config.seed, config.generator.num_engines, checkpoints) == (3, 2, ["runs/a", "b"])
    assert [each.name for each in config.sets] == ["AMC23", "arithmetic"]


@pytest.mark.parametrize(("arguments", "told"), [(["seed=1"], "no checkpoint"), (["model"], "no set was given")])
def test_missing_arguments_are_told(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_arguments(arguments, "")


def test_options_come_in_an_order_that_the_seed_draws() -> None:
    wrong = ["two", "three", "four"]
    text, letter = lettered("Which?", "one", wrong, 0, "p1")
    assert text.splitlines()[0] == "Which?" and f"{letter}. one" in text.splitlines()
    assert lettered("Which?", "one", wrong, 0, "p1") == (text, letter)
    letters = [lettered("Which?", "one", wrong, 0, f"p{index}")[1] for index in range(400)]
    assert {each: letters.count(each) > 60 for each in "ABCD"} == dict.fromkeys("ABCD", True)  # 100 expected of each
    assert lettered("Which?", "one", wrong, 1, "p1")[0] != text or lettered("Which?", "one", wrong, 2, "p1")[0] != text


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("so \\boxed{B}", "B"),
        ("\\boxed{A} no, \\boxed{ C }", "C"),
        ("\\boxed{\\text{D}}", "D"),
        ("\\boxed{(B)}", "B"),
        ("\\boxed{\\textbf{C.}}", "C"),
        ("\\boxed{B. The second}", "B"),
        ("\\boxed{Both}", ""),
        ("\\boxed{7}", ""),
        ("The answer is A. No: the answer is (B).", "B"),
        ("Answer: C", "C"),
        ("**Answer:** D", "D"),
        ("A bad start", ""),
        ("the answer Always", ""),
        ("", ""),
    ],
)
def test_the_chosen_letter_is_read(text: str, letter: str) -> None:
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "expected", "is_right"),
    [
        ("\\boxed{olleh}", "olleh", True),
        ("\\boxed{hello}", "olleh", False),  # as products of symbols they are equal
        ("\\boxed{\\text{ Two  Words }}", "two words", True),
        ("\\boxed{1,024.0}", "1024", True),
        ("\\boxed{1e3}", "1000", False),
        ("it is 12", "12", True),
        ("nothing", "12", False),
    ],
)
def test_text_answers_are_compared_as_text_and_numbers_by_value(text: str, expected: str, is_right: bool) -> None:
    assert ends_on(text, expected) is is_right


@pytest.mark.parametrize(
    ("text", "expected"), [("\\boxed{33}", "033"), ("\\boxed{27}", "27.0"), ("\\boxed{025}", "25")]
)
def test_competition_answers_are_equal_however_they_are_padded(text: str, expected: str) -> None:
    assert grade_text(text, expected) == 1.0


def rollout(text: str, finish_reason: FinishReason = "stop", answer: str = "B") -> Rollout:
    return Rollout(Prompt("p", "q", answer), 0, (1,), (2, 3), np.zeros(2), finish_reason, np.array([0, 0]), text)


def test_a_truncated_response_earns_nothing_even_where_it_has_an_answer() -> None:
    def texts() -> Iterator[Rollout]:
        yield rollout("\\boxed{B}")
        yield rollout("\\boxed{A}")
        yield rollout("\\boxed{B}", "length")

    graded = [(item.reward, item.cause) for item in RuleGrader(chooses).grade(texts())]
    assert graded == [(1.0, "graded"), (0.0, "graded"), (0.0, "truncated")]


def test_a_sample_tells_what_was_asked() -> None:
    request = RolloutRequest(Prompt("p", "q", "7"), 0, (1,), 5)
    graded = GradedRollout(rollout("\\boxed{8}", answer="7"), 0.0, "graded")
    found = to_sample(graded, request, set_named("AIME24"))
    assert (found.answer, found.expected, found.num_tokens, found.seed) == ("8", "7", 2, 5)
    others = [RolloutRequest(Prompt("p", "q", "8"), 0, (1,), 5), RolloutRequest(Prompt("p", "q", "7"), 0, (2,), 5)]
    assert found.asked == digest(request) and found.asked not in [digest(other) for other in others]


def test_votes_do_not_depend_on_how_an_answer_is_written() -> None:
    assert vote(sample("p", 0, 1.0, "7")) == vote(sample("p", 1, 1.0, "\\frac{14}{2}"))
    assert vote(sample("p", 0, 0.0, "\\dfrac{1}{2}")) == vote(sample("p", 1, 0.0, "\\frac{1} {2}"))
    assert vote(sample("p", 0, 0.0, "8")) != vote(sample("p", 1, 0.0, "9"))
    assert vote(sample("p", 0, 0.0, "7", cause="truncated")) == vote(sample("p", 1, 0.0, "")) == ""


def four_samples() -> list[Sample]:
    """Problem a: right, wrong 8, wrong 8, truncated. Problem b: right, right, wrong, grading failed."""
    cause: GradeCause = "timeout"
    return [
        sample("b", 0, 1.0, "7", num_tokens=10),
        sample("a", 0, 1.0, "7", num_tokens=10),
        sample("a", 1, 0.0, "8", num_tokens=20),
        sample("a", 2, 0.0, "8", num_tokens=30),
        sample("a", 3, 0.0, "7", num_tokens=40, cause="truncated", finish_reason="length"),
        sample("b", 1, 1.0, "7.0", num_tokens=10),
        sample("b", 2, 0.0, "9", num_tokens=10),
        sample("b", 3, 0.0, "x", num_tokens=10, cause=cause),
    ]


def test_metrics_by_hand() -> None:
    found = score(set_named("AIME24"), four_samples())
    assert (found.name, found.num_problems, found.k, found.num_failures) == ("AIME24", 2, 4, 1)
    assert found.rewards.tolist() == [0.25, 0.5]
    means = {name: interval.mean for name, interval in found.metrics.items()}
    # pass@2: a 1 - C(3,2)/C(4,2) = 1/2, b 1 - C(2,2)/C(4,2) = 5/6; the majority of a is 8, of b 7
    assert means == pytest.approx(
        {
            "avg@4": 0.375,
            "pass@1": 0.375,
            "pass@2": (1 / 2 + 5 / 6) / 2,
            "pass@4": 1.0,
            "maj@4": 0.5,
            "length_mean_tokens": (25 + 10) / 2,
            "truncated_frac": 0.125,
        }
    )


def test_an_unfinished_evaluation_has_no_score() -> None:
    with pytest.raises(ValueError, match="finish"):
        score(set_named("AIME24"), four_samples()[:-1])


def test_the_order_of_samples_does_not_matter() -> None:
    first, second = (score(set_named("AIME24"), each) for each in (four_samples(), four_samples()[::-1]))
    assert first.metrics == second.metrics or math.isnan(first.metrics["pass@4"].low)
    assert first.rewards.tolist() == second.rewards.tolist()


def scored(name: str, rewards: list[float]):
    return score(
        EvalSet(name=name, path="x.csv"), [sample(f"p{i}", 0, reward, str(i)) for i, reward in enumerate(rewards)]
    )


def test_tables_say_n_k_and_interval() -> None:
    (table,) = result_tables({"base": [scored("x", [0.0, 1.0, 1.0, 0.0, 1.0])]}, seed=0)
    (row,) = table.rows
    assert row[:4] == ("base", "x", "5", "1")
    assert row[4].startswith("60.0 [") and row[4].endswith("]")
    assert "| base | x | 5 | 1 | 60.0 [" in table.markdown()


def test_several_sets_have_a_mean_and_several_checkpoints_a_comparison() -> None:
    base = [scored("x", [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]), scored("y", [1.0, 0.0])]
    better = [scored("x", [1.0] * 7), scored("y", [1.0, 0.0])]
    metrics, differences = result_tables({"base": base, "better": better}, seed=0)
    assert [row[1] for row in metrics.rows] == ["x", "y", "mean of sets"] * 2
    assert metrics.rows[2][4].startswith(f"{(100 / 7 + 50) / 2:.1f} [")
    # x: six of seven problems differ, all upwards: p = 2 / 2^7 for flips of seven, of which one changes nothing: 2 / 64
    assert [row[:5] for row in differences.rows][1] == ("better", "y", "2", "1", "+0.0")
    assert differences.rows[0][4].startswith("+85.7 [+") and differences.rows[0][5:] == ("0.0312", "0.0625")


def test_unknown_ends_are_null_in_json() -> None:
    found = to_json([scored("x", [1.0, 1.0])])["x"]
    assert found["metrics"]["avg@1"] == {"mean": 1.0, "low": None, "high": None, "num_units": 2}
