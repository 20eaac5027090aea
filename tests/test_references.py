"""Every preset's loss on one fixed batch, and its gradient, against its source's formula written out in float64.

The references know nothing of routes: plain sums over rollouts and tokens. What they share with the product is the
batch. Its ratios lie on both sides of every bound, so that a bound that is missing or wrong shows; a test loosens each
to prove that. Weights travel in float32, hence the tolerance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from logits_loss import logits_loss
from torch import Tensor

from trace_rl.batch import (
    AnnotatedRollout,
    GradedRollout,
    Prompt,
    Rollout,
    RoutedRollout,
    Span,
    TeacherRows,
    TokenStatistics,
)
from trace_rl.config.algorithm import Algorithm, Route
from trace_rl.config.run import RunConfig
from trace_rl.divergences import KlClip, TopK
from trace_rl.launch.methods_page import presets
from trace_rl.objective import objective_of
from trace_rl.packing import pack
from trace_rl.routing import keep_top_tokens, route_rollouts, teacher_views
from trace_rl.token_layout import Padded
from trace_rl.training_batch import Evidence, scored_tokens, training_batch

VOCAB = 128
LENGTHS = {"A": 3, "B": 4, "C": 2, "D": 3, "E": 2}
REWARDS = {"A": 1.0, "B": 0.0, "C": 1.0, "D": 0.0, "E": 0.0}
GROUPS = ("ABC", "DE")  # a mixed group, and one without a success
TOTAL = sum(LENGTHS.values())
SPANS = {"A": ("key", 1, 2), "C": ("key", 0, 1), "B": ("error", 2, 3), "D": ("error", 1, 3)}
Marked = Mapping[str, tuple[str, list[int]]]
"""Class and positions of the tokens that a rollout has in spans, or that are drawn in their place."""
IN_SPANS: Marked = {name: (kind, list(range(start, end))) for name, (kind, start, end) in SPANS.items()}
TOLERANCE = 5e-6
"""Relative; float32 weights have 6e-8, and the terms of srpo nearly cancel."""
STEP = 25
"""lambda of TRACE is 1/4 and half of the policy gradient is back; lambda of RLSD is 1/4."""


@dataclass(frozen=True)
class Batch:
    """Logits [time, vocab] and tokens [time] of each rollout; logits of the policy, the teacher and the old policy."""

    policy: dict[str, Tensor]
    teacher: dict[str, Tensor]
    old: dict[str, Tensor]
    tokens: dict[str, Tensor]
    rollout_logprobs: dict[str, Tensor]

    def p(self, name: str, temperature: float = 1.0) -> Tensor:
        return torch.log_softmax(self.policy[name] / temperature, -1)

    def q(self, name: str, temperature: float = 1.0) -> Tensor:
        return torch.log_softmax(self.teacher[name] / temperature, -1)

    def of_tokens(self, logprobs: Tensor, name: str) -> Tensor:
        return logprobs.gather(-1, self.tokens[name].unsqueeze(-1)).squeeze(-1)

    def logp(self, name: str, temperature: float = 1.0) -> Tensor:
        return self.of_tokens(self.p(name, temperature), name)

    def logq(self, name: str) -> Tensor:
        return self.of_tokens(self.q(name), name)

    def old_logp(self, name: str, temperature: float = 1.0) -> Tensor:
        return self.of_tokens(torch.log_softmax(self.old[name] / temperature, -1), name)

    def ratio(self, name: str, temperature: float = 1.0) -> Tensor:
        return (self.logp(name, temperature) - self.old_logp(name, temperature)).exp()

    def delta(self, name: str) -> Tensor:
        """log q - log p of the sampler, which the advantage actions compare with."""
        return self.logq(name) - self.rollout_logprobs[name]


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(6)

    def draw(scale: float) -> dict[str, Tensor]:
        return {
            name: scale * torch.randn(length, VOCAB, generator=generator, dtype=torch.float64)
            for name, length in LENGTHS.items()
        }

    policy, noise = draw(1.5), draw(0.6)
    old = {name: policy[name] + noise[name] for name in policy}
    tokens = {name: torch.multinomial(each.softmax(-1), 1, generator=generator)[:, 0] for name, each in old.items()}
    old["B"][0, tokens["B"][0]] -= 1.5  # no ratio of its own is above 2
    teacher = draw(1.5)
    for name, position in (("A", 1), ("B", 2)):  # tokens in spans at which the divergences are below their bounds
        teacher[name][position] = policy[name][position] + 0.2 * noise[name][position]
    batch = Batch(policy, teacher, old, tokens, {})
    shift = {name: torch.randn(n, generator=generator, dtype=torch.float64) for name, n in LENGTHS.items()}
    for name in LENGTHS:  # a sampler that is not quite the old policy; float32, as engines report it
        batch.rollout_logprobs[name] = (batch.old_logp(name) + shift[name]).float().double()
        batch.policy[name].requires_grad_()
    return batch


BATCH = make_batch()


# --- the product ------------------------------------------------------------------------------------------------------


def annotated(name: str, config: RunConfig) -> AnnotatedRollout:
    group = next(number for number, names in enumerate(GROUPS) if name in names)
    is_policy = config.sampling.source == "policy"
    rollout = Rollout(
        prompt=Prompt(f"prompt{group}", "question", "answer", "solution"),
        sample=GROUPS[group].index(name),
        prompt_token_ids=(1,),
        token_ids=tuple(BATCH.tokens[name].tolist()),
        rollout_logprobs=BATCH.rollout_logprobs[name].numpy() if is_policy else np.full(LENGTHS[name], np.nan),
        finish_reason="stop",
        token_versions=np.full(LENGTHS[name], STEP if is_policy else -1),
        text=f"text of {name}",
    )
    feedback = "the answer is wrong" if name == "D" else ""
    spans = [Span(start, end, kind, "arith") for kind, start, end in [SPANS[name]]] if name in SPANS else []
    reflection = "a sum went wrong" if name in "BD" else ""
    return AnnotatedRollout(
        GradedRollout(rollout, REWARDS[name], "graded", feedback), tuple(spans), "annotated", reflection=reflection
    )


def routed_rollouts(config: RunConfig) -> list[RoutedRollout]:
    return route_rollouts([annotated(name, config) for name in LENGTHS], config, STEP)


def product_loss(config: RunConfig) -> Tensor:
    """What the learner would compute: routes, weights, packing and loss; hidden states are the teacher's logits."""
    routed = routed_rollouts(config)
    names = {item.key: "ABCDE"[index] for index, item in enumerate(routed)}
    views = teacher_views(config, STEP)
    rows = {}
    for item in routed:
        name = names[item.key]
        for number, view in enumerate(views):
            q = BATCH.q(name, view.temperature)
            rows[item.key, number] = TeacherRows(
                key=item.key,
                view=number,
                positions=np.arange(LENGTHS[name]),
                hidden=BATCH.teacher[name].numpy(),
                logprobs=BATCH.of_tokens(q, name).numpy(),
                entropy=-(q.exp() * q).sum(-1).numpy(),
            )
    evidence = Evidence(views, rows)
    scored = scored_tokens(routed, evidence, config)
    for index, route in enumerate(config.algorithm.routes.values()):
        if route.score is not None:
            found = {(item.key, index): statistics(names[item.key], item.key, index) for item in routed}
            candidates = scored_tokens(routed, Evidence(views, rows, found), config)
            routed = keep_top_tokens(routed, {index: candidates[index]}, config)
            scored = scored_tokens(routed, evidence, config)
    batch = training_batch(routed, scored, evidence, config, STEP)
    micro_batch = pack(batch.sequences, Padded())
    order = [names[sequence.key] for sequence in batch.sequences]
    parts, _ = logits_loss(
        torch.cat([BATCH.policy[name] for name in order]),
        micro_batch.rows.to(torch.float64),
        objective_of(config.algorithm, config.sampling.temperature),
        micro_batch.teacher_hidden.double() if micro_batch.teacher_hidden.numel() else torch.zeros(0, VOCAB),
        torch.cat([BATCH.old_logp(name, config.sampling.temperature) for name in order]),
    )
    return parts.total


@torch.no_grad()
def statistics(name: str, key: object, route: int) -> TokenStatistics:
    p, q = BATCH.p(name), BATCH.q(name)
    return TokenStatistics(
        key=key,
        route=route,
        policy_entropy=-(p.exp() * p).sum(-1).numpy(),
        divergence=rkl(p, q).numpy(),
        policy_logprobs=BATCH.logp(name).numpy(),
        teacher_logprobs=BATCH.logq(name).numpy(),
    )


# --- the formulas -----------------------------------------------------------------------------------------------------


def fkl(p: Tensor, q: Tensor) -> Tensor:
    return (q.exp() * (q - p)).sum(-1)


def rkl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    m = (0.5 * p.exp() + 0.5 * q.exp()).log()
    return 0.5 * (q.exp() * (q - m)).sum(-1) + 0.5 * (p.exp() * (p - m)).sum(-1)


def top_100_with_tail(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """SDPO: the student's top 100, and all others as one outcome on both sides."""
    ids = p.topk(100).indices
    sides = [each.exp().gather(-1, ids) for each in (p, q)]
    policy, teacher = (torch.cat([side, 1 - side.sum(-1, keepdim=True)], -1).log() for side in sides)
    return policy, teacher


def rescaled(value: Tensor) -> Tensor:
    """sg(min(1, 0.05 / l)) l"""
    return value * (0.05 / value.detach()).clamp(max=1)


def group_advantages(std: Callable[[np.ndarray], float]) -> dict[str, float]:
    found = {}
    for names in GROUPS:
        rewards = np.array([REWARDS[name] for name in names])
        scale = std(rewards)
        found |= {name: float((REWARDS[name] - rewards.mean()) / scale) if scale else 0.0 for name in names}
    return found


GRPO_A = group_advantages(lambda rewards: rewards.std(ddof=1) + 1e-6 if rewards.any() else 0.0)
DR_A = group_advantages(lambda rewards: 1.0)


def clipped(name: str, advantage: Tensor | float, low: float = 0.2, high: float = 0.28) -> Tensor:
    ratio = BATCH.ratio(name)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def token_mean(terms: Callable[[str], Tensor], names: Sequence[str] = tuple(LENGTHS)) -> Tensor:
    return torch.cat([terms(name) for name in names]).mean()


def sequence_mean(terms: Callable[[str], Tensor]) -> Tensor:
    return torch.stack([terms(name).mean() for name in LENGTHS]).mean()


def gspo(name: str) -> Tensor:
    ratio = BATCH.ratio(name).log().mean().exp()
    free, bounded = ratio * GRPO_A[name], ratio.clamp(1 - 3e-4, 1 + 4e-4) * GRPO_A[name]
    return -torch.minimum(free, bounded).expand(LENGTHS[name])


def whitened(baseline: bool) -> dict[str, float]:
    means = {name: np.mean([REWARDS[n] for n in names]) if baseline else 0.0 for names in GROUPS for name in names}
    values = {name: REWARDS[name] - means[name] for name in LENGTHS}
    flat = np.array(list(values.values()))
    return {name: (value - flat.mean()) / (flat.std() + 1e-8) for name, value in values.items()}


def trace_terms(
    name: str, routes: dict[str, Callable[[Tensor, Tensor], Tensor]], has_kl: bool = True, marked: Marked = IN_SPANS
) -> Tensor:
    """sum_N pg + g sum_S pg + lambda sum_S kl, before the mean over the response (arXiv:2605.10194)."""
    kind, positions = marked.get(name, ("", []))
    if kind not in routes:
        return clipped(name, GRPO_A[name])
    is_routed = torch.zeros(LENGTHS[name], dtype=torch.float64)
    is_routed[positions] = 1
    terms = (1 - 0.5 * is_routed) * clipped(name, GRPO_A[name])
    return terms + 0.25 * is_routed * routes[kind](BATCH.p(name), BATCH.q(name)) if has_kl else terms


@cache
def drawn_tokens(preset: str) -> Marked:
    """What a control draws in place of key spans."""
    return {
        "ABCDE"[index]: ("key", item.routed[0].positions.tolist())
        for index, item in enumerate(routed_rollouts(METHODS[preset]))
        if item.routed
    }


def literal(p: Tensor, q: Tensor) -> Tensor:
    return (q.exp() * (q - p)).clamp(max=0.05).sum(-1)


FKL = {"key": lambda p, q: rescaled(fkl(p, q))}
RKL = {"error": lambda p, q: rescaled(rkl(p, q))}


def importance(name: str) -> Tensor:
    """sg(min(pi / pi_old, 2)) of SDPO."""
    return BATCH.ratio(name).detach().clamp(max=2)


def srpo(name: str) -> Tensor:
    if name != "B":  # the only wrong rollout with a correct sibling
        weight = (BATCH.old_logp(name) - BATCH.rollout_logprobs[name]).exp().clamp(max=2)
        return weight * clipped(name, DR_A[name])
    q = BATCH.q(name)
    weight = (q.exp() * q).sum(-1).exp()  # exp(-H)
    value = jsd(*top_100_with_tail(BATCH.p(name), q)) * importance(name)
    return weight / weight.mean() * value


def rlsd(name: str) -> Tensor:
    advantage = GRPO_A[name]
    evidence = (np.sign(advantage) * BATCH.delta(name)).exp().clamp(0.8, 1.2)
    return clipped(name, advantage * (0.75 + 0.25 * evidence))


def minillm(name: str) -> Tensor:
    delta = BATCH.delta(name)
    later = torch.stack(
        [delta[t + 1 :].mean() if t + 1 < len(delta) else delta.new_zeros(()) for t in range(len(delta))]
    )
    return -later * BATCH.logp(name) + rkl(BATCH.p(name), BATCH.q(name))


def opd(name: str) -> Tensor:
    weight = (BATCH.old_logp(name) - BATCH.rollout_logprobs[name]).exp().clamp(max=2)
    return -weight * BATCH.delta(name) * BATCH.logp(name)


def tip() -> Tensor:
    entropy = torch.cat([-(BATCH.p(name).exp() * BATCH.p(name)).sum(-1) for name in LENGTHS]).detach().numpy()
    values = torch.cat([rkl(BATCH.p(name), BATCH.q(name)) for name in LENGTHS])
    divergence = values.detach().numpy()
    h = np.minimum(entropy, np.percentile(entropy, 98))
    h, d = ((each - each.min()) / (each.max() - each.min()) for each in (h, divergence))
    kept = np.argsort(-(h + d - h * d))[: TOTAL // 2]
    return values[kept.tolist()].mean()


def rosd() -> Tensor:
    """Correct: all tokens (a sibling exists); wrong: from the first error on, where a correct sibling exists."""
    parts = [
        jsd(*top_100_with_tail(BATCH.p(name), BATCH.q(name)))[start:] for name, start in [("A", 0), ("C", 0), ("B", 2)]
    ]
    return torch.cat(parts).mean()


def ssopd(name: str) -> Tensor:
    terms = clipped(name, GRPO_A[name])
    if name == "B":  # 4 p (1 - p) at p = 2/3, times 1/2
        terms = terms + 0.5 * (8 / 9) * rescaled(fkl(BATCH.p(name), BATCH.q(name)))
    return terms


def scope(name: str) -> Tensor:
    if REWARDS[name]:
        logs = {other: -BATCH.rollout_logprobs[other].mean() for other in "AC"}
        weight = 2 * logs[name].exp() / sum(value.exp() for value in logs.values())
        return -weight * BATCH.logp(name)
    names = next(names for names in GROUPS if name in names)
    logs = {other: BATCH.logq(other).mean() for other in names if not REWARDS[other]}
    weight = len(logs) * logs[name].exp() / sum(value.exp() for value in logs.values())
    return -weight * BATCH.delta(name) * BATCH.logp(name)


def ktae(name: str) -> Tensor:
    """arXiv:2505.16826 for tokens that one completion has alone; the general formula is tested in test_ktae.py."""
    from trace_rl.ktae import token_values

    names = "ABC"
    if name not in names:
        return clipped(name, GRPO_A[name])
    ids = [BATCH.tokens[other].tolist() for other in names]
    values = token_values(ids, [bool(REWARDS[other]) for other in names], {row[-1] for row in ids})
    return clipped(name, GRPO_A[name] + torch.from_numpy(values[names.index(name)]))


REFERENCES: dict[str, Callable[[], Tensor]] = {
    "grpo": lambda: sequence_mean(lambda name: clipped(name, GRPO_A[name])),
    "dapo": lambda: token_mean(lambda name: clipped(name, GRPO_A[name])),
    "dr_grpo": lambda: torch.cat([clipped(n, DR_A[n], 0.2, 0.2) for n in LENGTHS]).sum() / (4096 * len(LENGTHS)),
    "gspo": lambda: sequence_mean(gspo),
    "cispo": lambda: token_mean(lambda n: -BATCH.ratio(n).detach().clamp(max=1.28) * GRPO_A[n] * BATCH.logp(n)),
    "rloo": lambda: token_mean(lambda n: -DR_A[n] * (3 / 2 if n in "ABC" else 2) * BATCH.logp(n)),
    "reinforce_pp": lambda: token_mean(lambda n: clipped(n, whitened(False)[n], 0.2, 0.2)),
    "reinforce_pp_baseline": lambda: token_mean(lambda n: clipped(n, whitened(True)[n], 0.2, 0.2)),
    "trace_fkl": lambda: sequence_mean(lambda name: trace_terms(name, FKL)),
    "trace_asymmetric": lambda: sequence_mean(lambda name: trace_terms(name, FKL)),
    "trace_no_label": lambda: sequence_mean(lambda name: trace_terms(name, FKL)),
    "trace_rkl": lambda: sequence_mean(lambda name: trace_terms(name, RKL)),
    "trace_both": lambda: sequence_mean(lambda name: trace_terms(name, FKL | RKL)),
    "trace_reproduction": lambda: sequence_mean(lambda name: trace_terms(name, {"key": literal})),
    "trace_ramp_only": lambda: sequence_mean(lambda name: trace_terms(name, FKL, has_kl=False)),
    "trace_random": lambda: sequence_mean(lambda name: trace_terms(name, FKL, marked=drawn_tokens("trace_random"))),
    "trace_inverted": lambda: sequence_mean(lambda name: trace_terms(name, FKL, marked=drawn_tokens("trace_inverted"))),
    "trace_all_token": lambda: sequence_mean(
        lambda n: (
            0.5 * clipped(n, GRPO_A[n]) + 0.25 * rescaled(fkl(BATCH.p(n), BATCH.q(n)))
            if REWARDS[n]
            else clipped(n, GRPO_A[n])
        )
    ),
    "opsd": lambda: token_mean(lambda name: literal(BATCH.p(name, 1.1), BATCH.q(name, 1.1))),
    "sdpo": lambda: token_mean(lambda n: importance(n) * jsd(*top_100_with_tail(BATCH.p(n), BATCH.q(n))), "ABCD"),
    "srpo": lambda: token_mean(srpo),
    "rlsd": lambda: token_mean(rlsd),
    "sdft": lambda: token_mean(lambda name: rkl(BATCH.p(name), BATCH.q(name))),
    "gkd": lambda: token_mean(lambda name: jsd(BATCH.p(name), BATCH.q(name))),
    "minillm": lambda: token_mean(minillm),
    "opd": lambda: token_mean(opd),
    "tip": tip,
    "rosd": rosd,
    "ssopd": lambda: sequence_mean(ssopd),
    "scope": lambda: token_mean(scope),
    "ktae": lambda: sequence_mean(ktae),
    "sft": lambda: token_mean(lambda name: -BATCH.logp(name)),
    "seq_kd": lambda: token_mean(lambda name: -BATCH.logp(name)),
}


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})


METHODS = {name: with_seed(config, 4) for name, config in presets().items()}
"""With a seed under which `random` draws one token of a span and one outside."""


def test_every_preset_has_a_reference() -> None:
    assert set(REFERENCES) == set(METHODS)


def with_gradient(loss: Tensor) -> tuple[float, Tensor]:
    """The loss and its gradient with respect to the policy's logits."""
    gradients = torch.autograd.grad(loss, [BATCH.policy[name] for name in LENGTHS], materialize_grads=True)
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def difference(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> float:
    """The larger one of the relative differences of loss and gradient."""
    of_loss = abs(found[0] - expected[0]) / abs(expected[0])
    return max(of_loss, float((found[1] - expected[1]).norm() / expected[1].norm()))


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_loss_and_gradient_agree_with_the_formula_of_the_source(name: str) -> None:
    found, expected = with_gradient(product_loss(METHODS[name])), with_gradient(REFERENCES[name]())
    assert expected[1].norm() > 1e-6
    assert difference(found, expected) < TOLERANCE


UNBOUNDED = {"gkd", "minillm", "rloo", "scope", "sdft", "seq_kd", "sft", "tip"}
NEVER_BINDS = {("srpo", "clip_low")}
"""Wrong rollouts with an advantage have correct siblings, so all of them are distilled."""


def without_bounds(config: RunConfig) -> dict[str, RunConfig]:
    """By setting: the configuration with one bound out of reach, or with a clip or a support of another kind."""

    def changed(**update: object) -> RunConfig:
        return config.model_copy(update={"algorithm": algorithm.model_copy(update=update)})

    algorithm: Algorithm = config.algorithm
    gradient, correction = algorithm.policy_gradient, algorithm.rollout_correction
    found = {}
    for setting, loose in (("clip_low", 0.999), ("clip_high", 1e6)):
        if getattr(gradient, setting, 1.0) < 1:
            found[setting] = changed(policy_gradient=gradient.model_copy(update={setting: loose}))
    if correction.level in ("token", "sequence"):
        found["correction"] = changed(rollout_correction=correction.model_copy(update={"cap": 1e6}))
    for name, route in algorithm.routes.items():
        for setting, other in _other_actions(route).items():
            found[f"{name} {setting}"] = changed(routes={**algorithm.routes, name: other})
    return found


def _other_actions(route: Route) -> dict[str, Route]:
    action, updates = route.action, {}
    clip, support = getattr(action, "clip", KlClip(mode="none")), getattr(action, "support", None)
    if isinstance(clip, float):
        updates["clip"] = {"clip": 1.0}
    elif clip.mode != "none":
        modes = {"none", "vocab_clamp", "token_clamp", "token_rescale"} - {clip.mode}
        updates |= {mode: {"clip": clip.model_copy(update={"mode": mode})} for mode in sorted(modes)}
        updates["threshold"] = {"clip": clip.model_copy(update={"threshold": 1e6})}
    if getattr(action, "importance_cap", 0):
        updates["importance_cap"] = {"importance_cap": 1e6}
    if isinstance(support, TopK):
        for setting, value in (("k", VOCAB), ("by", "teacher"), ("tail", "renormalise")):
            updates[setting] = {"support": support.model_copy(update={setting: value})}
    return {
        setting: route.model_copy(update={"action": action.model_copy(update=update)})
        for setting, update in updates.items()
    }


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_every_bound_binds_somewhere(name: str) -> None:
    # Otherwise the comparison above would not notice if a bound were missing.
    others = without_bounds(METHODS[name])
    assert bool(others) != (name in UNBOUNDED)
    expected = with_gradient(product_loss(METHODS[name]))
    for setting, config in others.items():
        change = difference(with_gradient(product_loss(config)), expected)
        assert (change > 100 * TOLERANCE) != ((name, setting) in NEVER_BINDS), (setting, change)


@pytest.mark.parametrize("name", ["trace_random", "trace_inverted"])
def test_drawn_controls_take_as_many_tokens_as_there_are_spans_and_others(name: str) -> None:
    drawn = {each: positions for each, (_, positions) in drawn_tokens(name).items()}
    key = {each: positions for each, (kind, positions) in IN_SPANS.items() if kind == "key"}
    assert {each: len(positions) for each, positions in drawn.items()} == {
        each: len(positions) for each, positions in key.items()
    }
    assert drawn != key
    if name == "trace_inverted":
        assert not any(set(drawn[each]) & set(key[each]) for each in key)
