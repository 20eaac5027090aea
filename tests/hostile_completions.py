"""Responses and reference answers that attack whoever grades them; none of the pairs is a right answer.

Payloads that would run as code try to make or to remove the file that `canary` names, or to end the process. They are
written so that a grader that evaluates text somewhere is seen to do so; a grader that does not gives 0.
"""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

Attack = Literal["code", "commands", "computing", "memory", "depth", "size", "regex", "characters"]


@dataclass(frozen=True)
class Hostile:
    """One pair for the grader, named for reports."""

    name: str
    attack: Attack
    text: str
    answer: str = "70"


class _Touch:
    """Unpickling this would make a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._file}",)


def corpus(canary: Path) -> list[Hostile]:
    """All of them; `canary` is a file that exists."""
    families = (_code, _names_as_code, _commands, _computing, _memory, _depth, _size, _regex, _characters)
    return list(chain.from_iterable(family(canary) for family in families))


def boxed(content: str) -> str:
    return f"\\boxed{{{content}}}"


def _code(canary: Path) -> Iterator[Hostile]:
    made = canary.with_name("made")
    touch = f"__import__('os').system('touch {made}; rm {canary}')"
    payloads = {
        "import_system": touch,
        "power_of_import": f"2**{touch}",
        "subclasses": "().__class__.__bases__[0].__subclasses__()",
        "lambda": f"(lambda f: f('{made}', 'w'))(open)",
        "attribute_chain": f"sympy.core.sympify.__globals__['__builtins__']['open']('{made}', 'w')",
        "os_system": f'os.system("touch {made}")',
        "exec": f"exec('import pathlib; pathlib.Path({str(canary)!r}).unlink()')",
        "f_string": f"{{open('{made}', 'w')}}",
        "format_fields": "{0.__class__.__init__.__globals__} %s %n %(x)s ${HOME}",
        "pickle": base64.b64encode(pickle.dumps(_Touch(made))).decode(),
        "yaml_object": f"!!python/object/apply:os.system ['touch {made}']",
        "shell": f"$(touch {made}) `touch {made}` ; touch {made} | rm {canary}",
    }
    for name, code in payloads.items():
        yield Hostile(f"{name}_plain", "code", code)
        yield Hostile(f"{name}_boxed", "code", boxed(code))
    yield Hostile("import_as_math", "code", f"so ${touch}$ and \\({touch}\\)")
    yield Hostile("import_as_text", "code", boxed(f"\\text{{{touch}}} + 1"))
    yield Hostile("import_as_function", "code", boxed("\\operatorname{exit}(2) + \\operatorname{eval}(x)"))
    yield Hostile("import_as_reference", "code", boxed("5"), touch)


def _names_as_code(canary: Path) -> Iterator[Hostile]:
    """sympy compiles the terms of a series, with the names of its symbols."""
    names = {
        "call_without_parentheses": "[0for[quit.__class__.__getitem__]in[[exit]]]+quit[0]",
        "new_line": "a\rimport\x0cthis\r@exit\rclass\x0cb:pass\r",
        "builtin": "exit",
    }
    for name, code in names.items():
        series = f"(\\sum_{{n=0}}^{{\\infty}} \\frac{{\\text{{{code}}}^n}}{{n!}})"
        yield Hostile(f"series_of_{name}", "code", boxed(series), "\\sqrt{2}")
        yield Hostile(f"reference_series_of_{name}", "code", boxed("\\sqrt{2}"), series)
    called = "(\\sum_{n=0}^{\\infty} \\frac{\\text{exit}(2)^n}{n!})"
    yield Hostile("series_of_a_called_builtin", "code", boxed(called), "x + 1")


def _commands(canary: Path) -> Iterator[Hostile]:
    made = canary.with_name("made")
    yield Hostile("input", "commands", boxed("\\input{/etc/passwd}"))
    yield Hostile("write18", "commands", boxed(f"\\immediate\\write18{{touch {made}}}"))
    yield Hostile("openout", "commands", boxed(f"\\newwrite\\f \\openout\\f={made} \\write\\f{{x}}"))
    yield Hostile("macro_bomb", "commands", boxed("\\def\\a{\\a\\a}\\a"))
    yield Hostile(
        "billion_laughs", "commands", boxed("".join(f"\\def\\{b}{{\\{a}\\{a}}}" for a, b in pairwise("abcde")))
    )
    yield Hostile("catcode", "commands", boxed("\\catcode`\\{=12 \\csname end\\endcsname"))
    yield Hostile("percent_noise", "commands", boxed("7\\%\\%%%\\text{percent}\\%" * 100))
    yield Hostile("unit_noise", "commands", boxed("71 " + "cm kg \\text{ m}^2 ^\\circ \\text{ apples}" * 30))


def _computing(canary: Path) -> Iterator[Hostile]:
    endless = {
        "power_tower": "9^{9^{9^9}}",
        "mersenne": "2^{2^{40}}-1",
        "factorial_tower": "9!!!!",
        "factorial": "(10^{10})!",
        "binomial": "\\binom{10^9}{5 \\cdot 10^8}",
        "harmonic_sum": "\\sum_{k=1}^{10^9} \\frac{1}{k}",
        "product": "\\prod_{k=1}^{10^7} (k+x)",
        "integral": "\\int_0^1 \\sin(x^{x^x}) e^{-\\cos(x^3)} dx",
        "nested_integral": "\\int_0^1 \\int_0^x \\int_0^y e^{x y z} \\sqrt{x+y+z} dz dy dx",
        "limit": "\\lim_{x \\to 0} \\frac{\\sin(\\tan(x)) - \\tan(\\sin(x))}{\\arcsin(\\arctan(x)) - x^7}",
        "modulus": "7^{7^{7^7}} \\mod 13",
        "sine": "\\sin(10^{10^{10}})",
        "gcd": "\\gcd(10^{10^8}+1, 10^{10^8}-1)",
        "radicals": "+".join(f"\\sqrt{{{prime}+\\sqrt{{{prime + 2}}}}}" for prime in range(3, 60, 2)),
        "expansion": "(a+b+c+d+f)^{200} - (a-b-c-d-f)^{199}",
        "determinant": "\\det\\begin{pmatrix}"
        + "\\\\".join("&".join("abcdfgh"[i:] + "abcdfgh"[:i]) for i in range(7))
        + "\\end{pmatrix}",
    }
    for name, content in endless.items():
        yield Hostile(name, "computing", boxed(content))
    yield Hostile("python_power_tower", "computing", "9**9**9**9")
    yield Hostile("tower_in_the_reference", "computing", boxed("5"), "9^{9^{9^9}}")
    yield Hostile("towers_on_both_sides", "computing", boxed("9^{9^{9^9}}"), "8^{8^{8^8}}")
    yield Hostile("equations", "computing", boxed("x^{50} + 3x^{49} + y^7 = 1"), "x^{51} + 3y^{49} + x^7 = 2")
    yield Hostile("inequality", "computing", boxed("(1, 2) \\cup (3, 4)"), "\\sin(x^5) + x^9 < \\cos(x^3)")


def _memory(canary: Path) -> Iterator[Hostile]:
    greedy = {
        "digits": "10^{20000000000}",
        "large_power": "10^{10^9}",
        "decimal_exponent": "1e1000000000",
        "tiny_decimal": "1.5 \\times 10^{-1000000000}",
        "zeros": "\\operatorname{zeros}(20000, 20000)",
        "eye": "\\operatorname{eye}(30000)",
        "matrix_power": "\\begin{pmatrix}1&1\\\\1&0\\end{pmatrix}^{10^9}",
    }
    for name, content in greedy.items():
        yield Hostile(name, "memory", boxed(content))
    yield Hostile("zeros_in_the_reference", "memory", boxed("5"), "\\operatorname{zeros}(20000, 20000)")


def _depth(canary: Path) -> Iterator[Hostile]:
    shallow = {"\\frac{1}{1+": "}", "\\sqrt{": "}", "(": ")", "\\left(": "\\right)", "|": "|", "\\{": "\\}", "2^{": "}"}
    for number, (opening, closing) in enumerate(shallow.items()):
        levels = 1900 // len(opening + closing)
        yield Hostile(f"nested_{number}", "depth", boxed(opening * levels + "1" + closing * levels))
    yield Hostile("signs", "depth", boxed("-" * 1900 + "1"))
    yield Hostile("braces", "depth", "{" * 100_000 + "1" + "}" * 100_000)
    yield Hostile("fractions", "depth", boxed("\\frac{1}{" * 100_000 + "1" + "}" * 100_000))
    yield Hostile("boxes", "depth", "\\boxed{" * 50_000 + "1" + "}" * 50_000)
    yield Hostile("nested_reference", "depth", boxed("5"), "\\frac{1}{1+" * 5_000 + "1" + "}" * 5_000)


def _size(canary: Path) -> Iterator[Hostile]:
    yield Hostile("megabyte_of_letters", "size", "a" * 10**6)
    yield Hostile("megabyte_of_digits", "size", "7" * 10**6)
    yield Hostile("megabyte_in_a_box", "size", boxed("7" * 10**6))
    yield Hostile("integer", "size", boxed("7" * 1900))
    yield Hostile("decimal", "size", boxed("0." + "7" * 1900))
    yield Hostile("megabyte_in_the_reference", "size", boxed("5"), "7" * 10**6)
    yield Hostile("unbalanced_boxes", "size", "\\boxed{" * 100_000)
    yield Hostile("many_boxes", "size", "\\boxed{1}" * 100_000)
    yield Hostile("set", "size", boxed("\\{" + ",".join(map(str, range(400))) + "\\}"), "\\{1, 2\\}")
    yield Hostile("set_of_100000", "size", boxed("\\{" + ",".join(map(str, range(100_000))) + "\\}"))
    yield Hostile("set_in_the_reference", "size", boxed("5"), "\\{" + ",".join(map(str, range(100_000))) + "\\}")
    unions = " \\cup ".join(f"({2 * start}, {2 * start + 1})" for start in range(100))
    yield Hostile("intervals", "size", boxed(unions), "(1, 2)")
    rows = "\\\\".join("&".join(["x"] * 20) for _ in range(40))
    yield Hostile("matrix", "size", boxed(f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}"))
    rows = "\\\\".join("&".join(["1"] * 100) for _ in range(100))
    yield Hostile("matrix_in_the_reference", "size", boxed("5"), f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}")


def _regex(canary: Path) -> Iterator[Hostile]:
    pieces = {
        "blanks": (" ", "x"),
        "tabs_before_and": ("\t", "an"),
        "powers_of_parentheses": ("^(", ""),
        "open_fractions": ("\\frac{", "1"),
        "open_texts": ("\\text{", "1"),
        "dollars": ("$a", "$"),
        "brackets": ("\\[", ""),
        "thousands": ("1,", ""),
        "equals": ("a=", "1"),
    }
    for name, (piece, end) in pieces.items():
        yield Hostile(f"{name}_in_a_box", "regex", boxed(piece * (1900 // len(piece)) + end))
        yield Hostile(f"{name}_everywhere", "regex", piece * 50_000 + end)


def _characters(canary: Path) -> Iterator[Hostile]:
    contents = {
        "null_bytes": "7\x000\x00",
        "controls": "".join(map(chr, range(32))) + "71",
        "surrogates": "\ud800\udfff 71 \udc00",
        "right_to_left": "\u202e17\u202c \u2066 07 \u2069",
        "arabic_digits": "\u0667\u0661",
        "full_width_digits": "\uff17\uff11",
        "superscripts": "7\u00b2\u2070\u00b9",
        "accents": "7" + "\u0301" * 1500,
        "line_separators": "7\u2028\u2029\x850",
        "astral": "\U0001d7d5\U0001d7cf \U0001f4a5",
        "zero_width": "\ufeff7\u200b1\u200d",
        "not_characters": "\ufffe\uffff\U0010ffff",
    }
    for name, content in contents.items():
        yield Hostile(f"{name}_plain", "characters", content)
        yield Hostile(f"{name}_boxed", "characters", boxed(content))
    yield Hostile("surrogate_in_the_reference", "characters", boxed("5"), "\ud800")
    yield Hostile("null_in_the_reference", "characters", boxed("5"), "7\x000")
