"""What is a secret, and text without any.

A secret is the value of an environment variable whose name says so, whatever has the form that a service gives its
keys, and the password in an address. This module must not read the environment itself, or know what text is for.

Invariant: no message made here holds a secret or a part of one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from trace_rl.errors import ConfigError

_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH(?!OR)|COOKIE")
_ABOUT = re.compile(r"_(MODE|TYPE|ENABLED|PATH|FILE|SOCK)$")
"""Ends of names of settings that say how or where, as RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH do."""
_MIN_CHARACTERS = 8
"""Shorter values would be found everywhere."""
_FORMS = re.compile(
    r"\b(?:sk-[\w-]{20,}|hf_\w{20,}|gh[oprsu]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|AKIA[0-9A-Z]{16}"
    r"|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|wandb_v1_\w{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
    r"|(?<=[Bb]earer )[\w.~+/=-]{16,}|(?<=uthorization: Basic )[\w+/=-]+"
)
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of this name holds a secret."""
    return bool(_NAME.search(name.upper())) and not _ABOUT.search(name.upper())


class Redactor:
    """Takes secrets out of text.

    Args:
        environment: variables with their values.
        names: of further variables that hold secrets, whatever they are called.
    """

    def __init__(self, environment: Mapping[str, str], names: Collection[str] = ()) -> None:
        held = [(name, value.strip()) for name, value in environment.items() if name in names or is_secret_name(name)]
        # paths and sentences are no secrets
        found = {value: name for name, value in held if len(value) >= _MIN_CHARACTERS and _is_one_word(value)}
        self._variables = dict(sorted(found.items(), key=lambda item: -len(item[0])))  # longer ones may hold shorter
        self._values = re.compile("|".join(map(re.escape, self._variables)) or r"(?!)")

    def redact(self, text: str) -> str:
        """The text with a note in place of each secret."""
        text = self._values.sub(lambda found: f"[{self._variables[found.group()]}]", text)
        return _IN_ADDRESS.sub("[hidden]", _FORMS.sub("[key]", text))

    def secret_in(self, text: str) -> str:
        """Which secret a text holds, in words; empty where it holds none."""
        if found := self._values.search(text):
            return f"the value of the environment variable {self._variables[found.group()]}"
        return literal_secret_in(text)


def literal_secret_in(text: str) -> str:
    """Which secret a text holds by its looks, in words; empty where it holds none."""
    if found := _FORMS.search(text):
        return f"what looks like a key ({found.group()[:3]}...)"
    return "a password in an address" if _IN_ADDRESS.search(text) else ""


def refuse_secrets(text: str, environment: Mapping[str, str]) -> None:
    """Refuse a configuration that holds a secret, because it is written to files that others read.

    Raises:
        ConfigError: says which secret, and not its value.
    """
    if held := Redactor(environment).secret_in(text):
        raise ConfigError(
            f"the configuration holds {held}, and it is written to the run folder and shown by a cluster's dashboard; "
            "put the secret into an environment variable and give its name (as api_key_env does)"
        )


def _is_one_word(value: str) -> bool:
    return not value.startswith(("/", "~")) and not any(char.isspace() for char in value)
