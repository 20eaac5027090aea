"""Settings of each role: the model, the data, and who samples, grades, evaluates and syncs, where and how long.

This module must not know how roles are started or where they run.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trace_rl.config.base import Section, check_fields, check_folder_name
from trace_rl.tasks.arithmetic import ArithmeticDifficulty


class Model(Section):
    path: str
    """Folder or hub name of a Hugging Face causal LM, or `task:arithmetic` for the embedded base model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the forward passes (learner, teacher and generator); optimizer states are always float32."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention of learner and teacher, by transformers' names; `auto`: flash_attention_2 where a GPU, the package
    flash-attn and bfloat16 are at hand, else sdpa. A learner that shares prompts (learner.layout) has sdpa, too."""
    trust_remote_code: bool = False
    """Whether code that ships with the model may run."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template on both sides, for example {enable_thinking: true}."""


class Data(Section):
    path: str
    """`task:arithmetic`, a JSONL file, a folder written by datasets.save_to_disk, or `hf:NAME` on the hub."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    heldout_path: str | None = None
    """A file, folder or `hf:NAME` as for `path`, same split; without it `heldout_rows` rows of the source are set
    aside. The embedded task makes its own and reads neither."""
    heldout_rows: int = Field(64, ge=0)
    """Rows set aside for evaluation when there is no `heldout_path`; never trained on."""
    system_prompt: str = ""
    """System turn put before every question, on both sides."""
    question_suffix: str = ""
    """Appended to every question, for example an instruction to box the answer."""
    task: ArithmeticDifficulty = ArithmeticDifficulty()
    """Knobs of the embedded task; read only when `path` is `task:arithmetic`."""


class Sampling(Section):
    prompts_per_step: int = Field(32, ge=1)
    samples_per_prompt: int = Field(8, ge=1)
    """Group size G; at least 2 where advantages compare the completions of one prompt."""
    temperature: float = Field(1.0, ge=0.01, le=2)
    """Below 0.01 vLLM clamps or turns greedy, and its log-probs would belong to another distribution."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Samples come from the likeliest tokens that hold this mass; below 1 only without a policy gradient."""
    top_k: int = Field(0, ge=0)
    """Samples come from so many of the likeliest tokens; 0: from all. Above 0 only without a policy gradient."""
    source: Literal["policy", "solutions", "teacher"] = "policy"
    """Who writes the completions that are trained on: the policy; the reference solutions of the data; or the teacher's
    start weights, sampled by an engine of their own."""
    off_policy_frac: float = Field(1.0, gt=0, le=1)
    """Share of the prompts whose completions come from `source` where that is not the policy; the others are sampled
    from the policy (1 - lambda of GKD, arXiv:2306.13649)."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer student prompts are refused before the run starts."""
    max_response_tokens: int = Field(4096, ge=1)
    """A completion that reaches it is truncated and graded 0."""

    @model_validator(mode="after")
    def _shares_have_two_sides(self) -> Sampling:
        if self.source == "policy" and self.off_policy_frac < 1:
            raise ValueError(
                f"sampling.off_policy_frac is {self.off_policy_frac:g}, but sampling.source is policy, so every "
                "completion is; set sampling.source to solutions or teacher, or leave off_policy_frac out"
            )
        return self


class Rewarder(Section):
    num_processes: int = Field(2, ge=1)
    """Child processes that grade; each is killed and replaced when it misses its deadline."""
    timeout_s: float = Field(5.0, gt=0)
    """Deadline of one response."""


class Sync(Section):
    backend: Literal["auto", "gloo", "nccl", "ipc", "file"] = "auto"
    """Transport of the weights. `gloo`: through the host's memory; `nccl`: from GPU to GPU; `ipc`: engines read the
    learner's GPU memory, where they share its GPUs; `file`: safetensors under `folder`, for engines that nothing else
    reaches. `auto`: ipc where placement.mode is colocated, else nccl where generator and learner both have GPUs, else
    gloo."""
    folder: str | None = None
    """Of the transport `file`: a folder that the learner and all engines see under this path."""
    bucket_mib: int = Field(256, ge=1)
    """Weights are moved in buckets of at most this size."""
    canary_tolerance: float = Field(1e-3, gt=0)
    """Largest difference in nats between the learner's and an engine's log-probs of the canary after a sync. 1e-3
    suits float32; bfloat16 needs about 0.4 (0.2 was measured on a random model of 135 M parameters)."""
    timeout_s: float = Field(600.0, gt=0)
    """Deadline of one sync."""


class GeneratorSettings(Section):
    num_engines: int = Field(1, ge=1)
    tensor_parallel: int = Field(1, ge=1)
    """Workers of one node that share the weights of an engine; placement.generator.num_gpus is that of each."""
    gpu_memory_frac: float = Field(0.85, gt=0, le=1)
    """Share of a GPU that an engine may take; without GPUs see kv_cache_gib."""
    kv_cache_gib: int = Field(1, ge=1)
    """Size of the KV cache on a CPU, in whole GiB."""
    max_concurrent_sequences: int = Field(256, ge=1)
    enforce_eager: bool = False
    """Skip graph capture and compilation; always on without GPUs, where compiling takes two minutes and gains
    nothing."""


class EvaluationSet(Section):
    """Questions that a run is evaluated on beside its held-out ones."""

    task: ArithmeticDifficulty | None = None
    """Held-out questions of the embedded task at another difficulty."""
    path: str | None = None
    """A file, folder or `hf:NAME` as for data.path, same split; none of its questions may be a training question."""

    @model_validator(mode="after")
    def _has_one_source(self) -> EvaluationSet:
        if (self.task is None) == (self.path is None):
            raise ValueError("a set of evaluation.sets needs one source; give either `task` or `path`")
        return self


class Evaluation(Section):
    every: int = Field(20, ge=0)
    """Steps between evaluations on held-out prompts, beside one before the first and one after the last step; 0 turns
    them all off."""
    num_prompts: int = Field(64, ge=1)
    samples_per_prompt: int = Field(1, ge=1)
    sets: dict[str, EvaluationSet] = {}
    """Name -> a further set, harder ones for example, evaluated at the same steps in the same way; its metrics are
    called eval/NAME/..."""
    temperature: float = Field(1.0, ge=0.01, le=2)
    chat_template_kwargs: dict[str, Any] = {}
    """On top of model.chat_template_kwargs for held-out prompts: a policy that trains without thinking can be judged
    with it."""


class Logging(Section):
    tensorboard: bool = False
    wandb_project: str | None = None
    """Weights & Biases project; the API key comes from the environment."""
    rollouts_every: int = Field(10, ge=0)
    """Steps between stored samples of rollouts; 0: never."""
    rollouts_per_step: int = Field(16, ge=1)
    token_figures: Literal["known", "measured"] = "known"
    """What stored rollouts tell of each token. `known`: what the step has computed anyway. `measured`: beside that, the
    learner's log-prob and entropy, and at routed tokens the divergence, the teacher's log-prob and the most likely
    tokens of both, which takes one more forward pass over the rollouts that are stored; `trace-rl view` shows them."""
    diagnostics_every: int = Field(0, ge=0)
    """Steps between measured steps (norms of the two parts of the gradient and their cosine, one-step lift), while
    routes are active; 0: never. A measured step takes two more forward passes, two more backward passes, and the
    memory of three float32 gradients. Under ZeRO-3 all that is left out but the lift, the exposure's sum of norms
    too."""

    profile_steps: tuple[int, ...] = ()
    """Steps of which engines, teacher and learner ranks write a trace of torch's profiler to profile/ in the run
    folder; such a step takes longer. `--profile` is [2]."""

    def num_rollouts_at(self, step: int) -> int:
        """How many rollouts of a step are stored at most."""
        return 0 if not self.rollouts_every or step % self.rollouts_every else self.rollouts_per_step


class Run(Section):
    name: str = "run"
    folder: str = "runs/{name}"
    """Where everything of the run is written; {name} is replaced."""
    seed: int = 0
    steps: int = Field(300, ge=0)
    """0: evaluate the model as it is, and train nothing."""
    checkpoint_every: int = Field(50, ge=0)
    """Steps between checkpoints, beside one at the end; 0: only at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that stay."""
    keep_best: int = Field(0, ge=0)
    """Checkpoints that stay beside them: those with the best held-out pass@1, where it was measured at their step."""
    max_restarts: int = Field(3, ge=0)
    """How often in a row, without a checkpoint between, a run starts again from its last checkpoint by itself after the
    loss of what nothing replaces while it goes on: a rank of the learner, a node, the connection between them."""
    preemption_grace_s: float = Field(120.0, gt=0)
    """How long a run that was told to end (SIGTERM) may take to finish its step and write a checkpoint; then it ends
    without."""
    resume: Literal["auto", "never"] = "never"
    """`auto`: go on from the newest undamaged checkpoint in the folder where there is one. `never`: take the next free
    folder beside one that holds a run already."""

    @model_validator(mode="after")
    def _folder_is_a_template(self) -> Run:
        if "name" in check_fields("run.folder", self.folder, {"name"}):
            check_folder_name("run.name", self.name)
        return self
