"""docs/cost.md says what the cost model says, and its arithmetic adds up."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import pytest

from trace_rl.launch.cost_page import on_paper, page
from trace_rl.launch.cost_page.curves import Panel, figure
from trace_rl.launch.cost_page.on_paper import Case
from trace_rl.launch.plan import stages


@pytest.fixture(scope="module")
def large() -> Iterator[Case]:
    with on_paper.models() as folders:
        yield on_paper.many_nodes(folders)


def test_the_page_and_its_curves_are_current() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run `make docs` and commit docs/cost.md"
    assert page.CURVES.read_text(encoding="utf-8") == page.curves(), "run `make docs` and commit its image"


def test_every_number_on_paper_follows_from_those_before_it(large: Case) -> None:
    rows = on_paper.derivation(large)
    for row in rows:
        assert re.fullmatch(r"[-+*/(). e\d]+", row.arithmetic), row.what
        found = eval(row.arithmetic)
        # micro-batches are whole
        assert (found < row.value < found + 1) if "rounded up" in row.what else found == pytest.approx(row.value, 1e-3)
    parts = {row.what.split("**")[1]: row.value for row in rows if row.what.startswith("**")}
    (done_s,) = [row.value for row in rows if row.what.startswith("the teacher is done")]
    expected = done_s + sum(parts[name] for name in ("learner", "sync", "driver"))
    assert parts["a step"] == rows[-1].value == pytest.approx(expected)


def test_the_large_model_has_the_published_size_and_fits(large: Case) -> None:
    assert large.shape.num_parameters == 70_553_706_496  # 70.6 G, as its model card says
    assert large.rank_bytes < large.gpu_bytes and large.teacher_bytes < large.gpu_bytes
    config = large.config
    gpus = config.generator.num_engines * config.generator.tensor_parallel + config.learner.world_size
    assert gpus == 63 * 8


def test_one_teacher_is_what_the_large_model_waits_for(large: Case) -> None:
    assert on_paper.step_of(large).bottleneck == stages.TEACHER
    assert on_paper.step_of(large, has_routes=False).bottleneck == stages.GENERATION


def test_simulated_stragglers_took_about_as_long() -> None:
    found = {name: worked_out / measured for name, measured, worked_out in page.stragglers()}
    for name in ("synchronous", "one step off, finish", "one step off"):
        assert found[name] == pytest.approx(1, abs=0.1), name
    # from two steps on it is a lower bound
    assert 0.6 < found["staleness 2"] < 0.7 and 0.6 < found["staleness 4"] < 0.7


def test_the_bottleneck_moves_where_two_stages_cross(large: Case) -> None:
    plain = large.expecting(routed_rollouts_frac=0.0)
    ranks = page.Dimension("ranks", "", (16, 512), lambda case, value: case.changed({"learner.world_size": int(value)}))
    found = re.fullmatch(r"learner \(products\); from (\d+) on generation \(memory\)", page.moves(ranks, plain))
    assert found
    at, before = (on_paper.step_of(ranks.varied(plain, int(found[1]) - less)) for less in (0, 1))
    # the learner halves with twice the ranks, generation does not change
    assert at.of("learner").seconds < at.of("generation").seconds <= before.of("learner").seconds


def test_curves_have_a_line_where_there_is_something_to_draw() -> None:
    text = figure([Panel("a < b", (1, 10, 100), {"one": (1, 10, 100), "none": (0, 0, 0)})], "s")
    tree = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    words = [node.text for node in tree.iter(f"{space}text")]
    assert "a < b" in words and {"1 s", "10 s", "100 s"} <= set(words)
    (line,) = [node for node in tree.iter(f"{space}path") if node.get("fill") == "none" and "L58" not in node.get("d")][
        2:
    ]
    # three points on the diagonal: the middle one is in the middle of both axes
    points = [tuple(map(float, point.split())) for point in line.get("d")[1:].split("L")]
    assert points[1] == pytest.approx(((points[0][0] + points[2][0]) / 2, (points[0][1] + points[2][1]) / 2), abs=0.1)
