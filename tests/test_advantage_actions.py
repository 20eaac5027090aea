"""Advantage actions: hand-worked numbers, the sign promise of `adv_mult`, weight 0, and edge cases without tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import trace_rl.advantage_actions  # noqa: F401  (defines the kinds)
from trace_rl.actions import AdvantageAction
from trace_rl.batch import AnnotatedRollout, FinishReason, GradedRollout, GroupMember, Prompt, Rollout, ScoredTokens
from trace_rl.ktae import token_values

KINDS: list[dict[str, object]] = [
    {"type": "pg_logratio"},
    {"type": "pg_logratio", "horizon": "future_mean", "sign": -1},
    {"type": "adv_mult"},
    {"type": "adv_mult", "sign": -1, "clip": 1.0},
    {"type": "ktae"},
]
LN2 = math.log(2)


def annotated(
    sample: int, token_ids: list[int], logprobs: list[float], is_correct: bool = False, finish: FinishReason = "stop"
) -> AnnotatedRollout:
    versions = np.zeros(len(token_ids), dtype=np.int64)
    rollout = Rollout(Prompt("a", "q", "a"), sample, (1,), tuple(token_ids), np.array(logprobs), finish, versions, "")
    return AnnotatedRollout(GradedRollout(rollout, float(is_correct), "graded"), (), "not_requested")


def scored(
    own: AnnotatedRollout,
    group: tuple[AnnotatedRollout, ...],
    advantage: float,
    positions: list[int],
    teacher_logprobs: list[float],
) -> ScoredTokens:
    return ScoredTokens(
        member=GroupMember(own, group),
        advantage=advantage,
        positions=np.array(positions, dtype=np.int64),
        teacher_logprobs=np.array(teacher_logprobs),
        teacher_entropy=np.zeros(0),
        policy_entropy=np.zeros(0),
        divergence=np.zeros(0),
    )


def single(
    log_ratios: list[float], advantage: float, positions: list[int] | None = None, length: int | None = None
) -> ScoredTokens:
    """One completion whose routed tokens have the given log q - log p; the policy's log-prob is -2 everywhere."""
    positions = list(range(len(log_ratios))) if positions is None else positions
    length = len(log_ratios) if length is None else length
    own = annotated(0, list(range(length)), [-2.0] * length)
    return scored(own, (own,), advantage, positions, [ratio - 2.0 for ratio in log_ratios])


def random_group(seed: int) -> list[ScoredTokens]:
    rng = np.random.default_rng(seed)
    group = tuple(
        annotated(sample, rng.integers(0, 6, size=5).tolist(), (-rng.exponential(size=5)).tolist(), sample < 2)
        for sample in range(4)
    )
    advantages = [0.9, 0.0, -0.4, -1.3]
    positions = [[0, 2, 4], [1], [], [0, 1, 2, 3, 4]]
    return [
        scored(own, group, advantage, rows, (-rng.exponential(size=len(rows))).tolist())
        for own, advantage, rows in zip(group, advantages, positions, strict=True)
    ]


def advantages_of(
    kind: dict[str, object], group: list[ScoredTokens], policy_weight: float, weight: float
) -> list[np.ndarray]:
    weights = [np.full(len(item.positions), weight) for item in group]
    return AdvantageAction.model_validate(kind).advantages(group, policy_weight, weights)


def test_pg_logratio_adds_the_weighted_log_ratio_of_each_token() -> None:
    # 0.5 * 2 + w * Delta with Delta = 1, -3 and w = 0.1, 0.2: 1 + 0.1, 1 - 0.6.
    item = single([1.0, -3.0], advantage=2.0, positions=[1, 3], length=5)
    action = AdvantageAction.model_validate("pg_logratio")
    (row,) = action.advantages([item], 0.5, [np.array([0.1, 0.2])])
    np.testing.assert_allclose(row, [1.1, 0.4])
    # Without the policy gradient and with weight 1 it is the log-ratio itself; reversed, its negative.
    np.testing.assert_allclose(advantages_of({"type": "pg_logratio"}, [item], 0.0, 1.0)[0], [1.0, -3.0])
    np.testing.assert_allclose(advantages_of({"type": "pg_logratio", "sign": -1}, [item], 0.0, 1.0)[0], [-1.0, 3.0])


def test_pg_logratio_future_mean_averages_the_later_tokens() -> None:
    # Delta = 5, 1, -3, 4: means after each token (1 - 3 + 4)/3 = 2/3, (-3 + 4)/2 = 1/2, 4, and 0 at the last.
    kind = {"type": "pg_logratio", "horizon": "future_mean"}
    (row,) = advantages_of(kind, [single([5.0, 1.0, -3.0, 4.0], advantage=7.0)], 0.0, 1.0)
    np.testing.assert_allclose(row, [2 / 3, 1 / 2, 4.0, 0.0])
    (row,) = advantages_of(kind, [single([5.0], advantage=7.0)], 1.0, 1.0)
    np.testing.assert_allclose(row, [7.0])


def test_future_mean_does_not_see_the_token_itself_or_earlier_ones() -> None:
    kind = {"type": "pg_logratio", "horizon": "future_mean"}
    plain = advantages_of(kind, [single([1.0, 2.0, 3.0, 4.0], 0.0)], 0.0, 1.0)[0]
    changed = advantages_of(kind, [single([9.0, -8.0, 3.0, 4.0], 0.0)], 0.0, 1.0)[0]
    np.testing.assert_array_equal(changed[1:], plain[1:])
    assert changed[0] != plain[0]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    # Delta = ln 1.1, ln 2, -ln 2, 0, clip 0.2, lam 0.5. A > 0: ratios 1.1, 2 -> 1.2, 1/2 -> 0.8, 1;
    # factors 1.05, 1.1, 0.9, 1. A < 0: 1/1.1 = 0.909091, 1/2 -> 0.8, 2 -> 1.2, 1; factors 0.954545, 0.9, 1.1, 1.
    [(2.0, [2.1, 2.2, 1.8, 2.0]), (-2.0, [-2 * (1 + 1 / 1.1) / 2, -1.8, -2.2, -2.0]), (0.0, [0.0] * 4)],
)
def test_adv_mult_shares_out_credit_and_blame(advantage: float, expected: list[float]) -> None:
    item = single([math.log(1.1), LN2, -LN2, 0.0], advantage)
    np.testing.assert_allclose(advantages_of({"type": "adv_mult"}, [item], 1.0, 0.5)[0], expected)
    # What the route leaves of the policy gradient multiplies the advantage.
    np.testing.assert_allclose(advantages_of({"type": "adv_mult"}, [item], 0.25, 0.5)[0], np.array(expected) / 4)


def test_adv_mult_reversed_swaps_the_roles() -> None:
    # Delta -> -Delta: with A > 0 and lam 1 the ratios 2 and 1/2 become 1/2 -> 0.8 and 2 -> 1.2.
    item = single([LN2, -LN2], 3.0)
    np.testing.assert_allclose(advantages_of({"type": "adv_mult", "sign": -1}, [item], 1.0, 1.0)[0], [2.4, 3.6])
    mirrored = single([-LN2, LN2], 3.0)
    np.testing.assert_allclose(
        advantages_of({"type": "adv_mult", "sign": -1}, [item], 1.0, 0.3)[0],
        advantages_of({"type": "adv_mult"}, [mirrored], 1.0, 0.3)[0],
    )


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("clip", [0.0, 0.2, 1.0])
def test_adv_mult_never_changes_the_sign(weight: float, sign: int, clip: float) -> None:
    log_ratios = [-2000.0, -1.0, -0.1, 0.0, 0.1, 1.0, 2000.0]
    kind: dict[str, object] = {"type": "adv_mult", "sign": sign, "clip": clip}
    for advantage in (-1.5, 0.0, 0.7):
        with np.errstate(all="raise", under="ignore"):
            (row,) = advantages_of(kind, [single(log_ratios, advantage)], 1.0, weight)
        assert (row * np.sign(advantage) >= 0).all() and np.isfinite(row).all()
        bound = abs(advantage) * (1 + weight * clip)
        assert (np.abs(row) <= bound + 1e-12).all()


def test_adv_mult_is_monotonic_in_what_the_teacher_says() -> None:
    log_ratios = np.linspace(-0.5, 0.5, 11).tolist()
    for advantage in (-1.0, 1.0):
        (row,) = advantages_of({"type": "adv_mult"}, [single(log_ratios, advantage)], 1.0, 0.5)
        assert (np.diff(row) >= 0).all() and row[0] < row[-1]


def test_ktae_adds_the_value_of_the_token_type_from_the_whole_group() -> None:
    # Sample 1 has no routed tokens but counts: without it the group would be homogeneous.
    # (1, 2, 9) correct against (1, 3, 9) wrong: 1 is shared (0), 2 and 3 saturate at +1 and -1, 9 ends both (0).
    group = (annotated(0, [1, 2, 9], [-1.0] * 3, True), annotated(1, [1, 3, 9], [-1.0] * 3))
    item = scored(group[0], group, advantage=0.5, positions=[1, 2], teacher_logprobs=[])
    np.testing.assert_allclose(advantages_of({"type": "ktae"}, [item], 1.0, 0.3)[0], [0.8, 0.5])
    wrong = scored(group[1], group, advantage=-0.5, positions=[0, 1, 2], teacher_logprobs=[])
    np.testing.assert_allclose(advantages_of({"type": "ktae"}, [wrong], 0.0, 1.0)[0], [0.0, -1.0, 0.0], atol=1e-12)
    both = advantages_of({"type": "ktae"}, [wrong, item], 1.0, 0.3)
    np.testing.assert_allclose(both[1], [0.8, 0.5])


@pytest.mark.parametrize(("finish", "expected"), [("stop", 0.0), ("length", 1.0)])
def test_ktae_gives_nothing_to_the_token_that_ends_a_completion(finish: FinishReason, expected: float) -> None:
    # Only the correct completion has the type 9, at its end; a cut-off completion has no end token.
    group = (annotated(0, [1, 9], [-1.0] * 2, True, finish), annotated(1, [1, 3], [-1.0] * 2, False, "length"))
    item = scored(group[0], group, advantage=0.0, positions=[1], teacher_logprobs=[])
    np.testing.assert_allclose(advantages_of({"type": "ktae"}, [item], 1.0, 1.0)[0], [expected])


def test_ktae_matches_the_pure_function_position_by_position() -> None:
    group = random_group(3)
    completions = [item.graded for item in group[0].member.group]
    ends = {graded.rollout.token_ids[-1] for graded in completions}
    values = token_values(
        [graded.rollout.token_ids for graded in completions], [graded.is_correct for graded in completions], ends
    )
    assert any(row.any() for row in values)
    rows = advantages_of({"type": "ktae"}, group, 0.0, 1.0)
    for item, row, value in zip(group, rows, values, strict=True):
        np.testing.assert_allclose(row, value[item.positions])


def test_ktae_leaves_homogeneous_groups_alone() -> None:
    group = tuple(annotated(sample, [1, sample], [-1.0] * 2) for sample in range(3))
    item = scored(group[1], group, advantage=0.0, positions=[0, 1], teacher_logprobs=[])
    np.testing.assert_array_equal(advantages_of({"type": "ktae"}, [item], 1.0, 1.0)[0], [0.0, 0.0])


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_leaves_exactly_the_policy_gradient(kind: dict[str, object]) -> None:
    group = random_group(1)
    for item, row in zip(group, advantages_of(kind, group, 0.3, 0.0), strict=True):
        np.testing.assert_array_equal(row, np.full(len(item.positions), 0.3 * item.advantage))


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_the_group_does_not_matter(kind: dict[str, object]) -> None:
    group = random_group(2)
    straight = advantages_of(kind, group, 0.7, 0.4)
    backward = advantages_of(kind, group[::-1], 0.7, 0.4)
    for row, other in zip(straight, backward[::-1], strict=True):
        np.testing.assert_array_equal(row, other)


@pytest.mark.parametrize("kind", KINDS)
def test_one_float64_per_position_and_empty_cases(kind: dict[str, object]) -> None:
    group = random_group(3)
    for item, row in zip(group, advantages_of(kind, group, 1.0, 0.5), strict=True):
        assert row.shape == item.positions.shape and row.dtype == np.float64 and np.isfinite(row).all()
    assert advantages_of(kind, [], 1.0, 0.5) == []
    own = annotated(0, [], [])
    assert advantages_of(kind, [scored(own, (own,), 1.0, [], [])], 1.0, 0.5)[0].shape == (0,)


@pytest.mark.parametrize("kind", ["pg_logratio", "adv_mult"])
def test_a_teacher_that_agrees_changes_nothing(kind: str) -> None:
    group = [replace(item, teacher_logprobs=item.rollout_logprobs) for item in random_group(4)]
    for item, row in zip(group, advantages_of({"type": kind}, group, 1.0, 0.5), strict=True):
        np.testing.assert_allclose(row, np.full(len(item.positions), item.advantage))


def test_what_each_action_reads_of_the_teacher() -> None:
    reads = {kind: AdvantageAction.model_validate(kind).reads for kind in ("pg_logratio", "adv_mult", "ktae")}
    assert reads == {"pg_logratio": {"logprobs"}, "adv_mult": {"logprobs"}, "ktae": frozenset()}


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "adv_mult", "clip": 1.5},
        {"type": "adv_mult", "sign": 0},
        {"type": "pg_logratio", "horizon": "all"},
        {"type": "none"},
    ],
)
def test_settings_out_of_range_and_other_actions_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        AdvantageAction.model_validate(settings)
