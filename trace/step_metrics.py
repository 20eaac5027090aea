"""What a step's rollouts and routes tell about the run, as numbers by name.

Names are `area/quantity_unit`; shares end in `_frac`. Must not know what roles count themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from trace_rl.batch import GradedRollout, RoutedRollout, TeacherRequest, TeacherRows, TrainingBatch
from trace_rl.config.algorithm import Algorithm
from trace_rl.config.run import RunConfig
from trace_rl.flops import TeacherCost, TransformerShape
from trace_rl.objective import objective_of
from trace_rl.packing import Extent, extent_of, read_sequences, units_of
from trace_rl.token_layout import SharedPrompts, shared_length


def rollout_metrics(sampled: Sequence[GradedRollout], num_trained: int) -> dict[str, float]:
    """Rewards and how they came about, groups and lengths of all completions of a step; nothing without any.

    Masked completions and prompts that dynamic sampling has replaced are counted too: without them the reward would be
    that of a selection, and truncation would vanish where truncated completions are masked.

    Args:
        num_trained: how many of them are trained on.
    """
    if not sampled:
        return {}
    ordered = sorted(sampled, key=lambda item: item.rollout.key)  # sums must not depend on the order of arrival
    groups: dict[str, list[float]] = {}
    for item in ordered:
        groups.setdefault(item.rollout.prompt.prompt_id, []).append(item.reward)
    causes = Counter(item.cause for item in ordered)
    num_zero = sum(item.cause == "graded" and item.reward == 0 for item in ordered)
    return {
        "reward/graded": float(causes["graded"]),
        "reward/truncated": float(causes["truncated"]),
        "reward/timeouts": float(causes["timeout"]),
        "reward/errors": float(causes["error"]),
        **({"reward/zeros_frac": num_zero / causes["graded"]} if causes["graded"] else {}),
        "reward/mean": float(np.mean([item.reward for item in ordered])),
        "reward/zero_variance_groups_frac": float(np.mean([len(set(rewards)) == 1 for rewards in groups.values()])),
        "response/length_mean_tokens": float(np.mean([len(item.rollout.token_ids) for item in ordered])),
        "response/length_max_tokens": float(max(len(item.rollout.token_ids) for item in ordered)),
        "response/truncated_frac": float(np.mean([item.rollout.finish_reason == "length" for item in ordered])),
        "sampling/completions": float(len(ordered)),
        "sampling/trained_frac": num_trained / len(ordered),
    }


def staleness_metrics(batch: TrainingBatch, max_staleness: int) -> dict[str, float]:
    """How many versions older than the trained weights those are that wrote the tokens; nothing without any token.

    `staleness/{n}_frac`: share of the tokens that are n versions old, for n from 0 to `max_staleness`; mean and maximum
    in versions. Tokens that the policy has not sampled count as fresh.
    """
    staleness = np.concatenate([np.zeros(0, dtype=np.int64), *(sequence.staleness for sequence in batch.sequences)])
    if not len(staleness):
        return {}
    return {
        **{f"staleness/{age}_frac": float((staleness == age).mean()) for age in range(max_staleness + 1)},
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }


def route_metrics(routed: Sequence[RoutedRollout], algorithm: Algorithm, step: int) -> dict[str, float]:
    """What the routes took at this step, and the exposure to privileged information so far.

    `exposure/lambda_sq_sum` is sum_{j <= k} sum_routes (lambda_j mu)^2, the quantity that the bound of
    arXiv:2605.10194 asks to be finite; it counts routes that read a teacher.
    """
    total = sum(item.member.length for item in routed)
    taken = [_taken(item) for item in routed]
    metrics = {
        "route/token_frac": float(sum(mask.sum() for mask in taken) / total) if total else 0.0,
        "route/rollouts_frac": float(np.mean([mask.any() for mask in taken])) if taken else 0.0,
        "exposure/lambda_sq_sum": float(
            sum(
                (route.schedule.at(past) * route.multiplier) ** 2
                for route in algorithm.routes.values()
                if route.reads
                for past in range(step + 1)
            )
        ),
    }
    for index, (name, route) in enumerate(algorithm.routes.items()):
        tokens = sum(len(part.positions) for item in routed for part in item.routed if part.route == index)
        metrics[f"route/{name}/lambda"] = route.schedule.at(step)
        metrics[f"route/{name}/policy_weight"] = route.policy_weight(step)
        metrics[f"route/{name}/selected_frac"] = tokens / total if total else 0.0
    return metrics


def teacher_metrics(
    routed: Sequence[RoutedRollout],
    calls: Sequence[Sequence[TeacherRequest]],
    rows: Sequence[TeacherRows],
    num_views: int,
    cost: TeacherCost,
) -> dict[str, float]:
    """What asking the teacher took, and what was spared by asking for routed tokens only; nothing without a teacher.

    flops_saved_frac = 1 - F(requests) / F(every rollout through to its end, in every view, all its tokens projected);
    1 where the teacher was not asked. Projections count on both sides, once for each token that is read: those of
    states run on the learner, those of log-probs and entropies on the teacher. Where a rollout was not sent, its
    privileged prompt was never made and the student's is counted for it, so the share is rather too small. Padding,
    and what ranked routes project again on the learner to choose their tokens, is left out. Of a prompt that is
    computed once for several requests of a batch all but the last token counts once among these. What the last layer
    spares tokens that are not read (`TransformerShape.spared_flops`) is spared here, not in the pass over everything.

    Args:
        routed: the rollouts that are trained on, when the requests were made of them.
        calls: the requests that the teacher was given together.
        num_views: the views of the step; 0 where no active route reads the teacher.
        cost: of the teacher.
    """
    if not cost.shapes:
        return {}
    requests = [request for call in calls for request in call]
    prompts = {(request.key, request.view): len(request.teacher_prompt_token_ids) for request in requests}
    work = [teacher_work(call, cost) for call in calls]
    in_full = sum(
        shape.forward_flops(prompt + item.member.length, item.member.length)
        for view in range(num_views)
        for item in routed
        for prompt in [prompts.get((item.key, view), len(item.member.rollout.prompt_token_ids))]
        for shape in cost.shapes
    )
    return {
        "teacher/flops_saved_frac": 1 - sum(flops for _, flops in work) / in_full if requests else 1.0,
        "teacher/forward_tokens": float(sum(tokens for tokens, _ in work)),
        "teacher/state_bytes": float(sum(item.hidden.nbytes for item in rows)),
    }


def teacher_work(call: Sequence[TeacherRequest], cost: TeacherCost) -> tuple[int, float]:
    """(tokens, floating point operations) of requests that a teacher is given together."""
    extents = [Extent.of(each.teacher_prompt_token_ids, each.token_ids) for each in call]
    lengths = [extent.length for extent in extents]
    again = _shared_stems(extents, cost.shared_within)
    rows = [len(each.positions) for each in call]
    num_tokens = sum(lengths) - sum(again)
    flops = sum(
        sum(map(shape.forward_flops, lengths, rows))
        - sum(shape.forward_flops(length, 0) for length in again)
        - shape.spared_flops(num_tokens - sum(rows))
        for shape in cost.shapes
    )
    return num_tokens, flops


def _shared_stems(extents: Sequence[Extent], within: int) -> list[int]:
    """Lengths of what sequences begin with and need not compute, since another one among so many tokens has it, too."""
    units = units_of(extents, within, SharedPrompts()) if within else []
    return [shared_length(extents[index].num_prompt_tokens) for unit in units for index in unit.indices[1:]]


def learner_work(batch: TrainingBatch, shape: TransformerShape, config: RunConfig) -> dict[str, float]:
    """Tokens that the learner reads, and what one forward pass over them takes: a shared prompt once, without padding.

    A step is about three of them, two for the backward pass: model FLOPs utilisation (MFU) is 3 forward_tflop / seconds
    over what the hardware can do (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """
    settings, objective = config.learner, objective_of(config.algorithm, config.sampling.temperature)
    by_advantage = objective.policy_gradient.vanishes_without_advantage
    trained, others = read_sequences(batch.sequences, by_advantage, settings.measured_sequences)
    extents = [extent_of(sequence) for sequence in (*trained, *others)]
    rows = sum(extent.num_response_tokens for extent in extents)
    again = _shared_stems(extents, settings.max_tokens_per_micro_batch if settings.shares_prompts else 0)
    layers = sum(shape.forward_flops(extent.length, 0) for extent in extents)
    flops = layers - sum(shape.forward_flops(length, 0) for length in again) + shape.forward_flops(0, rows)
    return {"learner/tokens": float(sum(extent.length for extent in extents)), "learner/forward_tflop": flops / 1e12}


def _taken(item: RoutedRollout) -> np.ndarray:
    mask = np.zeros(item.member.length, dtype=bool)
    for tokens in item.routed:
        mask[tokens.positions] = True
    return mask
