"""The shell of a page, and how rollouts are packed for it: nothing that a run wrote becomes markup, nothing is lost."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages_data import HOSTILE, record, source
from recorded import SUM, graded, unrouted, write_rollouts
from typer.testing import CliRunner

from trace_rl.errors import DataError
from trace_rl.launch.cli import app
from trace_rl.launch.pages import shell, view
from trace_rl.launch.pages.packing import PieceTable, pack_rollout
from trace_rl.launch.pages.records import read_records


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] = (self._inside, self.texts[-1][1] + data)


def hostile_page() -> str:
    return view.view_page([source([record(0, len(HOSTILE), len(HOSTILE), question=HOSTILE[1])], HOSTILE, HOSTILE[0])])


def test_data_cannot_close_its_block() -> None:
    text = shell.escaped_json({"a": "</script><!--&\u2028"})
    assert text == '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026\\u2028"}'
    assert json.loads(text) == {"a": "</script><!--&\u2028"}


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        shell.escaped_json({"a": float("nan")})


def test_the_policy_names_each_script_and_style_and_forbids_the_rest() -> None:
    text = hostile_page()
    (content,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    directives = dict(each.split(" ", 1) for each in content.split("; "))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    assert "unsafe" not in content and "http" not in content
    for tag, body in Elements(text).texts:
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        is_data = tag == "script" and body.startswith("{")
        assert (f"'sha256-{digest}'" in directives[f"{tag}-src"]) != is_data


def test_no_element_and_no_attribute_comes_from_a_run() -> None:
    clean = view.view_page([source([record(0, 2, 2)], ("a", "b"))])
    expected, found = (
        sorted((tag, sorted(attrs)) for tag, attrs in Elements(each).found) for each in (clean, hostile_page())
    )
    assert found == expected
    names = {name for _, attrs in Elements(clean).found for name in attrs}
    assert not any(name.startswith("on") or name in ("src", "href", "style") for name in names)


def test_a_style_or_script_that_would_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="would cut it"):
        shell.page("t", "", [], ["a = '</SCRIPT>'"], {})


def test_the_title_is_escaped() -> None:
    assert "<title>a&lt;b</title>" in shell.page("a<b", "", [], [], {})


def test_a_library_is_carried_compressed_and_allowed_by_the_hash_of_its_text() -> None:
    library = "x = '</script>';" * 1000
    text = shell.page("t", "", [], ["runLibrary()"], {}, library=library)
    digest = base64.b64encode(hashlib.sha256(library.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and len(text) < len(library) / 10
    (packed,) = re.findall(r'<script type="text/plain" id="library">([A-Za-z0-9+/=]*)</script>', text)
    assert gzip.decompress(base64.b64decode(packed)).decode() == library


def unpack(text: str, dtype: str) -> list[Any]:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).tolist()


def test_packed_figures_are_those_of_the_record() -> None:
    table = PieceTable()
    given = record(
        1,
        3,
        9,
        token_ids=[5, 6, 5],
        token_versions=[[3, 1], [4, 2]],
        rollout_logprobs=[-1.5, None, -0.25],
        policy_entropy=[],
        routes=[
            {
                "route": 1,
                "weight": 0.5,
                "positions": [0, 2],
                "divergence": [0.5, 0.125],
                "teacher_candidates": [[[6, -0.5], [7, -1.0]], [[5, -0.75]]],
            }
        ],
    )
    packed = pack_rollout(given, lambda ids: [f"w{each}" for each in ids], table)
    assert table.pieces == ["w5", "w6", "w7", ""]
    assert unpack(packed["tokens"], "<u4") == [0, 1, 0]
    sampler = unpack(packed["columns"]["rolloutLogprob"], "<f4")
    assert sampler[0] == -1.5 and np.isnan(sampler[1]) and sampler[2] == -0.25
    assert unpack(packed["columns"]["version"], "<f4") == [3, 4, 4]
    assert "entropy" not in packed["columns"]
    (route,) = packed["routes"]
    assert unpack(route["positions"], "<u4") == [0, 2]
    assert unpack(route["columns"]["kl"], "<f4") == [0.5, 0.125]
    assert set(route["candidates"]) == {"teacher"}
    assert unpack(route["candidates"]["teacher"]["tokens"], "<u4") == [1, 2, 0, 3]
    logprobs = unpack(route["candidates"]["teacher"]["logprobs"], "<f4")
    assert logprobs[:3] == [-0.5, -1.0, -0.75] and np.isnan(logprobs[3])


def test_lone_surrogates_do_not_stop_the_page() -> None:
    table = PieceTable()
    table.index("a\ud800")
    assert table.pieces == ["a?"]


def test_tokens_are_read_with_the_tokenizer_of_the_run(tmp_path: Path) -> None:
    answer = graded(SUM.solution, 0, 1.0)
    write_rollouts(tmp_path, 10, [unrouted(answer)])
    (tmp_path / "config.yaml").write_text("model: {path: task:arithmetic}\nalgorithm: {routes: {key_spans: {}}}\n")
    (found,) = view.read_sources(tmp_path, [10])
    pieces = found.pieces_of(answer.rollout.token_ids)
    assert "".join(pieces[:-1]) == SUM.solution
    assert pieces[-1].startswith("<")  # the end of sequence by its name
    assert (found.step, found.route_names) == (10, ("key_spans",))


def test_without_a_tokenizer_tokens_are_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rollouts(tmp_path, 0, [unrouted(graded("1", 0, 0.0))])
    (found,) = view.read_sources(tmp_path, [0])
    assert [piece.strip("\u27e8\u27e9") for piece in found.pieces_of([7, 8])] == ["7", "8"]
    assert "shown by number" in caplog.text


def test_a_step_that_is_not_stored_is_named(tmp_path: Path) -> None:
    for step in (0, 10):
        write_rollouts(tmp_path, step, [unrouted(graded("1", 0, 0.0))])
    with pytest.raises(DataError, match=r"no rollouts of step 5, only of 0, 10; give one of these with --step"):
        view.read_sources(tmp_path, [5])


def test_figures_that_do_not_belong_to_the_tokens_are_named(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 0, [unrouted(graded("1", 0, 0.0))])
    (file,) = (tmp_path / "rollouts").iterdir()
    line = json.loads(file.read_text())
    for change, what in [
        ({"policy_entropy": [0.5]}, "policy_entropy has 1 numbers, but token_ids has 2"),
        ({"routes": [{"route": 0, "weight": 1.0, "positions": [2]}]}, "route 0 has position 2, but there are 2 tokens"),
        (
            {"routes": [{"route": 0, "weight": 1.0, "positions": [1], "divergence": [0.1, 0.2]}]},
            "divergence of route 0 has 2 rows, not 1",
        ),
    ]:
        file.write_text(json.dumps(line | change))
        with pytest.raises(DataError, match=rf"step-000000\.jsonl:1 is not a rollout .*{what}"):
            read_records(file)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "demo", 0, [unrouted(graded(SUM.solution, 0, 1.0))])
    (tmp_path / "demo" / "config.yaml").write_text("model: {path: task:arithmetic}\n")
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["view", str(tmp_path / "demo"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "<title>Tokens of demo</title>" in out.read_text(encoding="utf-8")
