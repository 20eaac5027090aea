"""Every preset on real parts: three steps of the embedded task through vLLM, DeepSpeed, the teacher and weight sync.

Presets share one engine, one rewarder and one annotator, since processes are dear; learner and teacher are their own.
After the steps each preset trains on its last batch a few times more, and what its loss is meant to lower must fall.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from trace_rl.absent import AbsentLedger
from trace_rl.actions import RowAction
from trace_rl.batch import RoutedRollout, TrainingBatch
from trace_rl.config.placement import Placement
from trace_rl.config.run import RunConfig
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.placement import PlacementPlan
from trace_rl.launch.seats import Place, Seats
from trace_rl.overlays import load_config
from trace_rl.protocols import Learner
from trace_rl.tasks.arithmetic import base_model_path

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = sorted(file.stem for file in (CONFIGS / "methods").glob("*.yaml"))
QUICK = {"dapo", "minillm", "sdpo", "trace_both"}
"""Most kinds of parts between them; the others are slow tests. All train on synthetic rollouts (test_invariance.py)."""
STEPS = 3
REPEATS = 4
SMALL = [
    "sampling.prompts_per_step=4",
    "sampling.max_response_tokens=96",
    "evaluation.every=0",
    f"run.steps={STEPS}",
    "logging.diagnostics_every=2",
    "logging.rollouts_every=1",
    "placement.generator.num_cpus=0.5",
    "placement.learner.num_cpus=0.5",
    "learner.world_size=1",  # two ranks are tested elsewhere, and would start 33 times here
]


class Recording(RunJournal):
    """A run journal that keeps the batches too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: list[TrainingBatch] = []

    def log_rollouts(self, step: int, routed: Sequence[RoutedRollout], batch: TrainingBatch, *figures: Any) -> None:
        super().log_rollouts(step, routed, batch, *figures)
        self.batches.append(batch)


class Anywhere(Place):
    """A place where Ray has room: what is kept for all presets must not go with one's placement group."""

    def options(self) -> dict[str, Any]:
        return {"num_cpus": self.seat.num_cpus}


class Shared:
    """Stands in for `launch.seats`: engines, rewarder and annotator are started once and kept, where Ray has room."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kept: dict[Any, Any] = {}
        self.own: list[Any] = []

    @staticmethod
    def take_seats(plan: PlacementPlan, placement: Placement) -> Seats:
        return Seats(plan, None, is_one_machine=True, patience_s=placement.start_timeout_s)

    def actor(self, role: type, place: Any, **options: Any) -> Any:
        made = self._make(role, place, **options)

        class Factory:
            @staticmethod
            def remote(*args: Any, **kwargs: Any) -> Any:
                if role.__name__ == "TeacherModel":
                    self.own.append(made.remote(*args, **kwargs))
                    return self.own[-1]
                key = (role.__name__, kwargs["model"].path if "model" in kwargs else "")
                if key not in self._kept:
                    self._kept[key] = made.remote(*args, **kwargs)
                return self._kept[key]

        return Factory

    def end_own(self) -> None:
        import ray

        for actor in self.own:
            ray.kill(actor)
        self.own.clear()

    def end_all(self) -> None:
        import ray

        for actor in self._kept.values():
            ray.kill(actor)


@pytest.fixture(scope="module")
def shared(local_ray: None) -> Iterator[Shared]:
    from trace_rl.launch import actors, annotators, seats

    made = Shared(seats.actor_of)
    with pytest.MonkeyPatch.context() as patch:
        for module in (actors, annotators):
            patch.setattr(module, "actor_of", made.actor)
        patch.setattr(actors, "take_seats", made.take_seats)
        patch.setattr(seats, "Place", Anywhere)
        yield made
    made.end_all()


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is not the policy: the base model with noise on its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("teacher")
    model = AutoModelForCausalLM.from_pretrained(base_model_path())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model_path()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PRESETS]
)
def test_a_preset_takes_three_real_steps_and_lowers_its_loss(
    preset: str, shared: Shared, other_model: Path, tmp_path: Path
) -> None:
    from trace_rl.launch import preflight
    from trace_rl.launch.display import Display
    from trace_rl.launch.roles import start_roles
    from trace_rl.launch.run_folder import open_run_folder
    from trace_rl.loop import train

    config = preset_config(preset, other_model, tmp_path)
    ready = preflight.check(config)
    folder = open_run_folder(config)
    journal = Recording(folder, config.logging, Display(Console(quiet=True), STEPS), [])
    roles = start_roles(ready, folder, journal, AbsentLedger()).roles
    try:
        train(ready.config, roles)
        records = [record for record in journal.history if "reward/mean" in record]
        assert [record["step"] for record in records] == list(range(STEPS))
        check_metrics(config, records)
        before, after = repeat(roles.learner, journal.batches[-1], config)
        assert after < before, (before, after)
    finally:
        shared.end_own()
        roles.learner.close()  # type: ignore[attr-defined]


def preset_config(preset: str, other_model: Path, tmp_path: Path) -> RunConfig:
    overrides = [*SMALL, f"run.folder={tmp_path}/run"]
    text = (CONFIGS / "methods" / f"{preset}.yaml").read_text()
    if "type: external" in text:
        overrides.append(f"teacher.weights.path={other_model}")
    if "samples_per_prompt" not in text:
        overrides.append("sampling.samples_per_prompt=4")
    return load_config([CONFIGS / "demo.yaml", CONFIGS / "methods" / f"{preset}.yaml"], overrides)


def check_metrics(config: RunConfig, records: list[dict[str, float]]) -> None:
    """What the parts said of themselves: proven weights, finite numbers, and routes that took tokens."""
    for record in records:
        assert all(np.isfinite(value) for value in record.values()), record
        assert record["sync/canary_gap_max_nats"] <= 1e-3
        if config.sampling.source == "policy" and config.sampling.top_p == 1:  # the learner does not truncate
            assert record["mismatch/logprob_gap_max_nats"] <= 1e-3
    for name in config.algorithm.routes:
        assert any(record[f"route/{name}/selected_frac"] > 0 for record in records), name


def repeat(learner: Learner, batch: TrainingBatch, config: RunConfig) -> tuple[float, float]:
    """The quantity that is meant to fall, before and after training on one batch a few times."""
    first = meant_to_fall(learner, batch, config, learner.train_step(batch))
    for _ in range(REPEATS):
        metrics = learner.train_step(batch)
    return first, meant_to_fall(learner, batch, config, metrics)


def meant_to_fall(learner: Any, batch: TrainingBatch, config: RunConfig, metrics: Any) -> float:
    """-sum w A log p of the policy gradient, plus the weighted divergences.

    A rescaled divergence is a constant where it is rescaled, so it is judged unclipped; a clamped one as it is trained.
    """
    logprobs = learner.canary_logprobs([item.prompt_token_ids + item.token_ids for item in batch.sequences])
    total = 0.0
    if config.algorithm.has_policy_gradient:
        for item, found in zip(batch.sequences, logprobs, strict=True):
            total -= float(np.sum(item.pg_weight * item.advantages * found[len(item.prompt_token_ids) - 1 :]))
    scores = {(item.key, item.route): item for item in learner.score(batch)}
    for index, route in enumerate(config.algorithm.routes.values()):
        if not isinstance(route.action, RowAction):
            continue
        clip = getattr(route.action, "clip", None)
        if clip is not None and clip.mode == "vocab_clamp":
            total += metrics["loss/routed"]
            continue
        for item in batch.sequences:
            mine = item.route_index == index
            if mine.any():
                total += float(np.sum(item.route_weight[mine] * scores[item.key, index].divergence))
    return total
