"""The strict base of every section: frozen, no unknown keys, attribute docstrings become descriptions."""

from collections.abc import Set
from string import Formatter

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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
