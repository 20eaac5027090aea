"""The benchmark of the head loss at toy size: its report is complete, and it stops where the loss is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(FOLDER))  # a benchmark is a script that imports its neighbours

import head_loss  # noqa: E402
import peers  # noqa: E402

TOY = head_loss.PRESETS["toy"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON and the Markdown of one run."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(FOLDER / "head_loss.py"), "--preset", "toy", "--repeats", "1", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    return json.loads((out / "head_loss.json").read_text()), (out / "head_loss.md").read_text()


def test_every_implementation_is_measured_or_says_why_not(written: tuple[dict[str, Any], str]) -> None:
    report, text = written
    found = report["presets"]["toy"]
    everyone = {each.name for each in peers.contenders(2**20)}
    assert found["contenders"].keys() | found["absent"].keys() == everyone
    assert {"ours", "ours, GRPO only", "naive torch"} <= found["contenders"].keys()
    assert all(reason.startswith(("not installed: ", "cannot be imported: ")) for reason in found["absent"].values())
    measured = {(row["contender"], row["share"]) for row in found["results"]}
    assert measured == {(name, share) for name in found["contenders"] for share in head_loss.SHARES}
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in found["results"])
    for row in found["results"]:
        assert row["routed_tokens"] == pytest.approx(row["share"] * TOY.shape.tokens, abs=peers.SPAN_TOKENS / 2)
    assert all(f"| {name} |" in text for name in everyone)


def test_the_report_tells_where_its_figures_come_from(written: tuple[dict[str, Any], str]) -> None:
    report, text = written
    assert report["command"].startswith("python benchmarks/head_loss.py --preset toy ")
    assert report["machine"]["torch"] == torch.__version__
    assert report["seed"] == 0
    assert report["date"] in text
    if not torch.cuda.is_available():
        assert report["left_out"].keys() == {name for name in head_loss.PRESETS if name.startswith("gpu")}
        assert "not yet measured: gpu-8b (no GPU)" in text


def test_errors_are_within_the_bound(written: tuple[dict[str, Any], str]) -> None:
    report, _ = written
    errors = report["presets"]["toy"]["errors"]
    ours = {row["kind"]: row for row in errors if row["contender"] == "ours"}
    assert ours.keys() == {"fkl", "rkl", "jsd", "mixed"}
    for row in errors:
        assert 0 <= max(row["loss"], row["hidden"], row["head"]) <= 1e-5, row


def test_peak_memory_sees_full_logits_and_tiles() -> None:
    # 2,048 tokens of 4,096 entries are 32 MiB: naive torch holds several of those, ours two tiles of 4 MiB.
    problem = peers.make_problem(peers.Shape(2048, 16, 4096, 64), ("fkl", "rkl"), 1.0, torch.float32, "cpu", 0)
    full = head_loss.extra_memory(problem, peers.naive(problem))
    tiled = head_loss.extra_memory(problem, peers.ours(problem, 4 * head_loss.MIB))
    assert full > 3 * 32
    assert 2 * 4 <= tiled < 32


def test_a_wrong_loss_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.Contender("ours", lambda problem: peers.ours(problem, 2**20))
    wrong = peers.Contender("ours", lambda problem: lambda: 1.001 * peers.ours(problem, 2**20)())
    assert {row["kind"] for row in head_loss.check(TOY, [right], 0)} == set(head_loss.KINDS)
    with pytest.raises(SystemExit, match="head_loss is wrong for fkl rows"):
        head_loss.check(TOY, [wrong], 0)


def test_a_peer_that_fails_is_a_row_of_the_report() -> None:
    def fail(problem: peers.Problem) -> Any:
        def loss() -> torch.Tensor:
            raise RuntimeError("no kernel for this device")

        return loss

    everyone = peers.contenders(2**20)[:2]
    peer, own = (peers.Contender("other", fail, package) for package in ("peer", "torch"))
    rows = head_loss.measure(TOY, [*everyone, peer], 0.1, 1, 0)
    assert [row.get("why_not") for row in rows] == [None, None, "RuntimeError: no kernel for this device"]
    assert all("why_not" in row for row in head_loss.check(TOY, [peer], 0))
    with pytest.raises(RuntimeError, match="no kernel"):
        head_loss.measure(TOY, [*everyone, own], 0.1, 1, 0)


def test_the_reference_is_the_formula() -> None:
    # One token, vocabulary of 2, states that give logits (log 3, 0): p = (3/4, 1/4), and q = (1/2, 1/2) for the
    # teacher. The loss is -A + KL(q || p) = -2 + 1/2 log(2/3) + 1/2 log 2, and the gradient per logit
    # -A (onehot - p) + (p - q) = -2 (1/4, -1/4) + (1/4, -1/4).
    problem = peers.Problem(
        hidden=torch.tensor([[1.0]], requires_grad=True),
        head=torch.tensor([[3.0], [1.0]]).log().requires_grad_(),
        teacher_hidden=torch.tensor([[0.0]]),
        teacher_head=torch.tensor([[1.0], [1.0]]),
        targets=torch.tensor([0]),
        advantages=torch.tensor([2.0]),
        routed={"fkl": torch.tensor([0])},
        num_tokens=1,
    )
    exact = peers.reference(problem)
    assert exact["loss"].item() == pytest.approx(-2 + 0.5 * torch.tensor(4 / 3).log().item(), abs=1e-6)
    assert exact["head"].flatten().tolist() == pytest.approx([-0.25, 0.25], abs=1e-6)
