"""Checks that need files, a tokenizer or the data, made before Ray or any worker is started.

Each failure is one sentence with the place and a suggestion. `RunConfig`'s own validators have run already.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trace_rl.batch import Prompt, SpanClass
from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.config.teacher import External, Teacher
from trace_rl.contexts import Context, extra_response_pieces
from trace_rl.errors import ConfigError, DataError, ModelError
from trace_rl.launch.annotator_checks import check_annotator, self_annotation_tokens
from trace_rl.launch.model_files import load_tokenizer, max_positions, resolve_model
from trace_rl.launch.prompt_sources import annotation_types, error_rule, open_evaluation_sets, open_source, peek
from trace_rl.launch.trackers import check_installed
from trace_rl.prompts import PromptEncoder, check_pair
from trace_rl.protocols import ErrorRule, PromptSource
from trace_rl.workers.policy_model import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_NUM_CANARIES = 4


@dataclass(frozen=True)
class Ready:
    """What the checks had to open anyway, for the run to use."""

    config: RunConfig
    """With model.path resolved to a folder or a hub name."""
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSource
    evaluation_sets: Mapping[str, Sequence[Prompt]]
    """Those of evaluation.sets."""
    encoder: PromptEncoder
    rule: ErrorRule
    annotation_types: Mapping[SpanClass, Mapping[str, str]]
    """Closed lists of span types by class."""
    vocab_size: int
    """Rows of the policy's output head; 0 where no teacher is started."""
    max_model_len: int
    """Longest sequence of the student's side, in tokens: what an engine has to hold."""
    canaries: tuple[tuple[int, ...], ...]
    """Token sequences whose log-probs prove the weights of an engine."""


def check(config: RunConfig) -> Ready:
    """Open and check everything that a run depends on.

    Raises:
        ConfigError, DataError, ModelError: with one sentence for the user.
    """
    check_installed(config.logging)
    config = config.model_copy(
        update={"model": resolve_model(config.model), "teacher": _resolved_teacher(config.teacher)}
    )
    if config.needs_annotator:
        check_annotator(config)
    prompts = open_source(config)
    tokenizer = load_tokenizer(config.model)
    _check_same_tokens(config, tokenizer)
    rule, types = error_rule(config), annotation_types(config)
    encoder = PromptEncoder(
        tokenizer,
        config.data.system_prompt,
        config.model.chat_template_kwargs,
        config.teacher.chat_template_kwargs,
        tuple({**types["key"], **types["error"]}),
    )
    first = peek(prompts, config.sampling.prompts_per_step)
    if config.sampling.source == "solutions":
        _check_solutions([*_known_prompts(prompts), *first])
    evaluated = encoder.with_template_kwargs(config.evaluation.chat_template_kwargs)
    _check_template(encoder, first[0], "model.chat_template_kwargs")
    _check_template(evaluated, first[0], "model.chat_template_kwargs with evaluation.chat_template_kwargs")
    _warn_of_idle_arguments(config, encoder, evaluated, first[0])
    heldout = list(prompts.heldout(config.evaluation.num_prompts))
    if config.evaluation.every and not heldout:
        raise DataError(
            "evaluation.every asks for evaluations, but there are no held-out rows; set data.heldout_rows or "
            "data.heldout_path, or evaluation.every=0"
        )
    training = _known_prompts(prompts) or first
    _check_prompts(config, encoder, training)
    sets = open_evaluation_sets(config, _known_prompts(prompts))
    for evaluation_set in (heldout, *sets.values()):
        _check_prompts(config, evaluated, evaluation_set)
    longest_teacher = _longest_teacher_prompt(config, encoder, training)
    _check_positions(
        config.model, max(config.max_sequence_tokens, longest_teacher + config.sampling.max_response_tokens)
    )
    for context in _contexts(config):
        check_pair(encoder, first[0], context)
    vocab_size = vocabulary_size(config.model) if config.needs_teacher else 0
    canaries = tuple(encoder.student_ids(prompt) for prompt in (heldout or first)[:_NUM_CANARIES])
    max_model_len = max(config.max_sequence_tokens, self_annotation_tokens(config))
    return Ready(config, tokenizer, prompts, sets, encoder, rule, types, vocab_size, max_model_len, canaries)


def _resolved_teacher(teacher: Teacher) -> Teacher:
    """The teacher with the path of an external model resolved as that of the policy is."""
    weights = teacher.weights
    if not isinstance(weights, External):
        return teacher
    path = resolve_model(Model(path=weights.path), "teacher.weights.path").path
    return teacher.model_copy(update={"weights": weights.model_copy(update={"path": path})})


def _check_same_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an external teacher that reads the policy's token ids as other tokens."""
    weights = config.teacher.weights
    is_used = config.needs_teacher or config.sampling.source == "teacher"
    if not is_used or not isinstance(weights, External):
        return
    teacher = load_tokenizer(config.model.model_copy(update={"path": weights.path}), "teacher.weights.path")
    own, other = tokenizer.get_vocab(), teacher.get_vocab()
    different = sorted(token for token, token_id in own.items() if other.get(token) != token_id)
    if different:
        raise ModelError(
            f"teacher.weights.path {weights.path!r} has another tokenizer than model.path: {len(different)} of "
            f"{len(own)} tokens differ, for example {different[0]!r}; choose a teacher with the policy's tokenizer"
        )


def _check_solutions(prompts: Sequence[Prompt]) -> None:
    """Refuse to train on solutions where a prompt has none."""
    missing = [prompt.prompt_id for prompt in prompts if not prompt.solution]
    if missing:
        raise DataError(
            f"sampling.source is solutions, but {len(missing)} of {len(prompts)} training prompts have none (first: "
            f"{missing[0]}); add `solution` to the rows, or set sampling.source=policy"
        )


def _known_prompts(source: PromptSource) -> Sequence[Prompt]:
    """All training prompts of a finite source; an endless one is judged by its first step."""
    return getattr(source, "train_prompts", ())


def _check_template(encoder: PromptEncoder, prompt: Prompt, setting: str) -> None:
    """Refuse a chat template that cannot render the run's turns with the run's arguments.

    Args:
        setting: where the encoder's arguments of the template come from.
    """
    from jinja2.exceptions import TemplateError

    try:
        encoder.student_ids(prompt)
    except (TemplateError, TypeError) as error:
        raise ModelError(
            f"the chat template cannot render a prompt with data.system_prompt = {encoder.system_prompt!r} and "
            f"{setting} = {dict(encoder.chat_template_kwargs)} ({error}); change these two settings"
        ) from error


def _warn_of_idle_arguments(
    config: RunConfig, encoder: PromptEncoder, evaluated: PromptEncoder, prompt: Prompt
) -> None:
    """Say once which arguments that set the teacher or the evaluation apart change nothing."""
    rendered = {}
    if config.needs_teacher and config.teacher.chat_template_kwargs:
        rendered["teacher.chat_template_kwargs"] = encoder.render_turn(prompt.question, encoder.all_teacher_kwargs)
    if config.evaluation.every and config.evaluation.chat_template_kwargs:
        rendered["evaluation.chat_template_kwargs"] = evaluated.student_ids(prompt)
    idle = [setting for setting, ids in rendered.items() if ids == encoder.student_ids(prompt)]
    if idle:
        logger.warning(
            "No effect of %s: the chat template renders the same tokens with model.chat_template_kwargs = %s alone; "
            "choose a model whose template reads what is given there, or leave it out",
            " and ".join(idle),
            dict(encoder.chat_template_kwargs),
        )


def _contexts(config: RunConfig) -> list[Context]:
    """What the teacher may know, for every route that reads it."""
    routes = config.algorithm.routes.values()
    return [route.teacher_context(config.teacher.context) for route in routes if route.reads]


def _check_prompts(config: RunConfig, encoder: PromptEncoder, prompts: Sequence[Prompt]) -> None:
    """Refuse a student prompt beyond the budget."""
    budget = config.sampling.max_prompt_tokens
    for prompt in prompts:
        length = len(encoder.student_ids(prompt))
        if length > budget:
            raise DataError(
                f"prompt {prompt.prompt_id} has {length} tokens with the chat template, but "
                f"sampling.max_prompt_tokens is {budget}; raise the budget or drop the row"
            )


def _longest_teacher_prompt(config: RunConfig, encoder: PromptEncoder, prompts: Sequence[Prompt]) -> int:
    """Length of the longest teacher prompt, texts of rollouts included; 0 where no route reads a teacher."""
    return max(
        (
            encoder.teacher_length(prompt, context)
            + extra_response_pieces(context) * config.sampling.max_response_tokens
            for context in _contexts(config)
            for prompt in prompts
        ),
        default=0,
    )


def _check_positions(model: Model, needed: int) -> None:
    """Refuse sequences beyond the positions that the model was made for."""
    limit = max_positions(model)
    if limit is not None and needed > limit:
        raise ConfigError(
            f"the longest sequence (prompt with its privileged context, and response) may have {needed} tokens, but "
            f"{model.path} has max_position_embeddings = {limit}; lower sampling.max_prompt_tokens or "
            "sampling.max_response_tokens"
        )
