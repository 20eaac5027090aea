"""The strict bases of the configuration: sections, and settings that come in kinds told apart by their `type`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Set
from string import Formatter
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator
from pydantic_core import PydanticCustomError

from trace_rl.errors import short_repr

_MAX_NAME_BYTES = 200
"""File systems take 255, and what is written beside a folder adds endings to its name."""


class Section(BaseModel):
    """A part of the configuration that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Kind(Section):
    """A setting that comes in kinds; each kind is a subclass with a `type` and holds its settings *and* its formula.

    A direct subclass names the idea (`class Schedule(Kind)`), and a field annotated with it accepts every kind that has
    been defined anywhere, by mapping (`{type: constant, value: 1}`) or, where the defaults do, by name (`constant`). So
    a new kind is one class in one file, and nothing that loads, routes or trains has to know it.
    """

    type: str
    kinds: ClassVar[dict[str, Any]]
    """The kinds of this idea by their `type`."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Kind in cls.__bases__:
            cls.kinds = {}
        if not cls.is_open():
            cls.kinds[cls.model_fields["type"].default] = cls

    @classmethod
    def is_open(cls) -> bool:
        """Whether this class stands for any of its kinds rather than being one."""
        return cls.model_fields["type"].is_required()

    @model_validator(mode="wrap")
    @classmethod
    def _choose_kind(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not cls.is_open():
            return handler(value)
        if not isinstance(value, Mapping) or "type" not in value:
            names = ", ".join(sorted(cls.kinds))
            raise PydanticCustomError(
                "no_kind", "no type; give a name, or a mapping with type: one of {names}", {"names": names}
            )
        found = value["type"]
        if not isinstance(found, str) or found not in cls.kinds or not issubclass(cls.kinds[found], cls):
            known = sorted(name for name, kind in cls.kinds.items() if issubclass(kind, cls))
            near = difflib.get_close_matches(str(found), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise PydanticCustomError(
                "unknown_kind", "the type {found}; {hint}", {"found": short_repr(found), "hint": hint}
            )
        chosen: Self = cls.kinds[found].model_validate(value)
        return chosen


def check_folder_name(what: str, name: str) -> None:
    """Refuse a name that, as a part of a path, would be none or lead elsewhere.

    Raises:
        ValueError: with one sentence.
    """
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise ValueError(
            f"{what} {name!r} becomes the name of a folder; give one without slashes and control characters that is "
            "not empty, '.' or '..'"
        )
    if (size := len(name.encode("utf-8", "replace"))) > _MAX_NAME_BYTES:
        raise ValueError(
            f"{what} {name[:40]!r}... becomes the name of a folder, but has {size} bytes; give one of at most "
            f"{_MAX_NAME_BYTES}"
        )


def check_fields(setting: str, template: str, known: Set[str]) -> Set[str]:
    """Return the fields of a `str.format` template.

    Raises:
        ValueError: the template is malformed or has a field that is not among `known`.
    """
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(
            f"{setting} {template!r} is not a valid template ({error}); write a brace that is meant as text twice"
        ) from None
    names = ", ".join("{" + name + "}" for name in sorted(known))
    for field in sorted(fields - known):
        raise ValueError(f"{setting} {template!r} has the unknown field {field!r}; known: {names}")
    return fields
