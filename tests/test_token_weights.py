"""Token weights: hand-worked numbers, mean 1 where it is promised, order, and edge cases without tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trace_rl.batch import AnnotatedRollout, GradedRollout, GroupMember, Prompt, Rollout, ScoredTokens
from trace_rl.token_weights import TokenWeight

KINDS = ["uniform", "teacher_entropy", "student_perplexity", "teacher_perplexity", "frontier", "position"]


def annotated(prompt_id: str, sample: int, logprobs: list[float], reward: float = 0.0) -> AnnotatedRollout:
    rollout = Rollout(
        prompt=Prompt(prompt_id, "q", "a"),
        sample=sample,
        prompt_token_ids=(1,),
        token_ids=tuple(range(10, 10 + len(logprobs))),
        rollout_logprobs=np.array(logprobs, dtype=np.float32),
        finish_reason="stop",
        token_versions=np.zeros(len(logprobs), dtype=np.int64),
        text="",
    )
    return AnnotatedRollout(GradedRollout(rollout, reward, "graded"), (), "not_requested")


def scored(
    prompt_id: str,
    sample: int,
    logprobs: list[float],
    positions: list[int] | None = None,
    teacher_logprobs: list[float] | None = None,
    teacher_entropy: list[float] | None = None,
    group: tuple[AnnotatedRollout, ...] = (),
) -> ScoredTokens:
    own = annotated(prompt_id, sample, logprobs)
    positions = list(range(len(logprobs))) if positions is None else positions
    none = [0.0] * len(positions)
    return ScoredTokens(
        member=GroupMember(own, group or (own,)),
        advantage=0.0,
        positions=np.array(positions, dtype=np.int64),
        teacher_logprobs=np.array(none if teacher_logprobs is None else teacher_logprobs),
        teacher_entropy=np.array(none if teacher_entropy is None else teacher_entropy),
        policy_entropy=np.zeros(len(positions)),
        divergence=np.zeros(len(positions)),
    )


def random_batch(seed: int) -> list[ScoredTokens]:
    rng = np.random.default_rng(seed)
    batch = []
    for prompt_id in ("a", "b"):
        for sample in range(3):
            length = int(rng.integers(2, 7))
            positions = np.flatnonzero(rng.random(length) < 0.7).tolist()
            batch.append(
                scored(
                    prompt_id,
                    sample,
                    (-rng.random(length)).tolist(),
                    positions,
                    (-rng.random(len(positions))).tolist(),
                    rng.random(len(positions)).tolist(),
                )
            )
    return batch


def weigh(kind: str | dict[str, object], batch: list[ScoredTokens]) -> list[np.ndarray]:
    return TokenWeight.model_validate(kind).weights(batch)


def test_teacher_entropy_divides_by_the_mean_over_the_batch() -> None:
    # exp(-beta H) with H = 0, ln 2 | ln 4, beta 1: 1, 1/2 | 1/4. Mean (7/4)/3 = 7/12. Weights 12/7, 6/7 | 3/7.
    batch = [
        scored("a", 0, [-1.0, -1.0], teacher_entropy=[0.0, math.log(2)]),
        scored("b", 0, [-1.0], teacher_entropy=[math.log(4)]),
    ]
    first, second = weigh("teacher_entropy", batch)
    np.testing.assert_allclose(first, [12 / 7, 6 / 7])
    np.testing.assert_allclose(second, [3 / 7])
    # beta 2: 1, 1/4 | 1/16. Mean (21/16)/3 = 7/16. Weights 16/7, 4/7 | 1/7.
    first, second = weigh({"type": "teacher_entropy", "beta": 2.0}, batch)
    np.testing.assert_allclose(np.concatenate([first, second]), [16 / 7, 4 / 7, 1 / 7])


def test_teacher_entropy_stays_finite_where_every_exponential_underflows() -> None:
    # exp(-1000) is 0 in double precision, but only the difference counts: 1 and 1/2 over their mean 3/4.
    batch = [scored("a", 0, [-1.0, -1.0], teacher_entropy=[1000.0, 1000.0 + math.log(2)])]
    np.testing.assert_allclose(weigh("teacher_entropy", batch)[0], [4 / 3, 2 / 3])


def test_student_perplexity_favours_surprising_responses_within_a_prompt() -> None:
    # Mean log p over the whole response: -ln 2 (PPL 2), -ln 6 (PPL 6); times 2 / (2 + 6): weights 1/2, 3/2.
    # The second routes only its first token, which alone would give PPL 12.
    batch = [
        scored("a", 0, [-math.log(2)] * 3),
        scored("a", 1, [-math.log(12), -math.log(3)], positions=[0]),
        scored("b", 0, [-math.log(50)]),
    ]
    first, second, alone = weigh("student_perplexity", batch)
    np.testing.assert_allclose(first, [0.5, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(second, [1.5], rtol=1e-6)
    np.testing.assert_array_equal(alone, [1.0])
    # tau 1/2 squares the perplexities: 4 and 36, times 2 / 40: 1/5 and 9/5.
    first, second, _ = weigh({"type": "student_perplexity", "tau": 0.5}, batch)
    np.testing.assert_allclose([first[0], second[0]], [0.2, 1.8], rtol=1e-6)


def test_teacher_perplexity_distrusts_rollouts_that_surprise_the_teacher() -> None:
    # Over the route's tokens PPL_T = 2 and 8 (mean of ln 4 and ln 16 is ln 8). 1/2 and 1/8, times 2 / (5/8): 8/5, 2/5.
    batch = [
        scored("a", 0, [-9.0, -9.0], positions=[1], teacher_logprobs=[-math.log(2)]),
        scored("a", 1, [-1.0, -1.0], teacher_logprobs=[-math.log(4), -math.log(16)]),
    ]
    first, second = weigh("teacher_perplexity", batch)
    np.testing.assert_allclose(first, [1.6])
    np.testing.assert_allclose(second, [0.4, 0.4])


def test_rollouts_without_routed_tokens_do_not_take_part_in_the_normalisation() -> None:
    batch = [scored("a", 0, [-1.0]), scored("a", 1, [-5.0], positions=[]), scored("a", 2, [])]
    for kind in ("student_perplexity", "teacher_perplexity"):
        first, second, third = weigh(kind, batch)
        np.testing.assert_array_equal(first, [1.0])
        assert len(second) == len(third) == 0


@pytest.mark.parametrize(("num_correct", "expected"), [(0, 0.0), (1, 0.75), (2, 1.0), (3, 0.75), (4, 0.0)])
def test_frontier_is_largest_at_half_the_group(num_correct: int, expected: float) -> None:
    # 4 p (1 - p) with p = n/4: 0, 4 * 3/16, 1, 4 * 3/16, 0.
    group = tuple(annotated("a", sample, [-1.0], float(sample < num_correct)) for sample in range(4))
    (weights,) = weigh("frontier", [scored("a", 3, [-1.0, -1.0], group=group)])
    np.testing.assert_allclose(weights, [expected, expected])
    (weights,) = weigh({"type": "frontier", "scale": 1.0}, [scored("a", 3, [-1.0], group=group)])
    np.testing.assert_allclose(weights, [expected / 4])


def test_position_decays_with_the_relative_position() -> None:
    # |y| = 4, decay 4 ln 2: exp(-t ln 2) = 2^-t. Positions 0, 1, 3: 1, 1/2, 1/8, mean 13/24: 24/13, 12/13, 3/13.
    (weights,) = weigh({"type": "position", "decay": 4 * math.log(2)}, [scored("a", 0, [-1.0] * 4, [0, 1, 3])])
    np.testing.assert_allclose(weights, [24 / 13, 12 / 13, 3 / 13])
    (weights,) = weigh({"type": "position", "decay": 1e5}, [scored("a", 0, [-1.0] * 4, [2, 3])])
    np.testing.assert_allclose(weights, [2.0, 0.0])


@pytest.mark.parametrize("seed", range(5))
def test_normalised_weights_have_mean_one(seed: int) -> None:
    batch = random_batch(seed)
    assert np.concatenate(weigh("teacher_entropy", batch)).mean() == pytest.approx(1)
    for row in weigh("position", batch):
        assert not len(row) or row.mean() == pytest.approx(1)
    for kind in ("student_perplexity", "teacher_perplexity"):
        weights = weigh(kind, batch)
        for prompt_id in ("a", "b"):
            own = [
                row[0]
                for row, item in zip(weights, batch, strict=True)
                if len(row) and item.member.rollout.prompt.prompt_id == prompt_id
            ]
            assert np.mean(own) == pytest.approx(1)
            assert len(set(own)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_the_batch_does_not_matter(kind: str) -> None:
    batch = random_batch(0)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = weigh(kind, [batch[index] for index in order])
    straight = weigh(kind, batch)
    for place, index in enumerate(order):
        np.testing.assert_allclose(shuffled[place], straight[index])


@pytest.mark.parametrize("kind", KINDS)
def test_empty_cases_give_empty_arrays(kind: str) -> None:
    assert weigh(kind, []) == []
    (without_length,) = weigh(kind, [scored("a", 0, [])])
    (without_tokens,) = weigh(kind, [scored("a", 0, [-1.0], positions=[])])
    assert without_length.shape == without_tokens.shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_finite_float64_and_one_per_position(kind: str) -> None:
    batch = random_batch(1)
    for row, item in zip(weigh(kind, batch), batch, strict=True):
        assert row.dtype == np.float64 and row.shape == item.positions.shape
        assert np.isfinite(row).all() and (row >= 0).all()


def test_what_each_weight_reads_of_the_teacher() -> None:
    reads = {kind: TokenWeight.model_validate(kind).reads for kind in KINDS}
    assert reads.pop("teacher_entropy") == {"entropy"}
    assert reads.pop("teacher_perplexity") == {"logprobs"}
    assert set(reads.values()) == {frozenset()}


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "teacher_entropy", "beta": -1.0},
        {"type": "student_perplexity", "tau": 0.0},
        {"type": "frontier", "scale": 0.0},
        {"type": "position", "decay": -1.0},
        {"type": "perplexity"},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        TokenWeight.model_validate(settings)
