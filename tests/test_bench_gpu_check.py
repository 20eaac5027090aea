"""The GPU check without a GPU: every section's code runs, wrong numbers fail, and nothing that fails is lost."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(FOLDER))  # a benchmark is a script that imports its neighbours

import gpu_attention  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_check  # noqa: E402
import gpu_correctness  # noqa: E402
import gpu_learner  # noqa: E402
import gpu_report  # noqa: E402
import gpu_roofs  # noqa: E402
import typer  # noqa: E402
from gpu_cases import Context  # noqa: E402

from trace_rl.workers import shared_attention  # noqa: E402

HOST_COPIES = {f"{way}, {kind}" for way in ("host to GPU", "GPU to host") for kind in ("pinned", "pageable")}
NO_GPU = {
    "roofs": {"matmul tf32", *HOST_COPIES},
    "attention": {"torch varlen", "flash-attn, varlen"},
}
"""By section: the cases that need a GPU by nature."""


def context(seconds: float = 600) -> Context:
    return Context(torch.device("cpu"), "dry", 0, time.monotonic() + seconds)


def run(section: str, within: Context | None = None) -> list[dict[str, Any]]:
    """How the cases of a section ended."""
    told: list[dict[str, Any]] = []
    gpu_cases.run_section(section, within or context(), told.append)
    assert [each["case"] for each in told if each["status"] == "running"] == [
        each["case"] for each in told if "seconds" in each
    ]
    return [each for each in told if each["status"] != "running"]


@pytest.fixture(autouse=True)
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_learner, "has_deepspeed", lambda: False)


@pytest.mark.parametrize("section", ["roofs", "attention", "weight_copy", "teacher", "head_loss"])
def test_every_case_of_a_section_runs_or_says_that_it_needs_a_gpu(section: str) -> None:
    found = run(section)
    skipped = {each["case"]: each["why"] for each in found if each["status"] == "skipped"}
    assert skipped == dict.fromkeys(NO_GPU.get(section, ()), "no GPU")
    done = [each for each in found if each["status"] == "done"]
    assert done and len(done) + len(skipped) == len(found)
    assert all(row for each in done for row in each["rows"])


def test_the_loss_and_the_gradients_agree_with_float64() -> None:
    found = run("correctness")
    done = {each["case"]: each["rows"] for each in found if each["status"] == "done"}
    assert done.keys() == {
        "head loss, float32", "head loss, bfloat16", "head loss, float64", "learner gradients, float32"
    }  # fmt: skip
    # 24 tokens, of which none, one span of 8, or all are routed
    assert [row["routed_tokens"] for row in done["head loss, float32"]] == [0, 8, 24]
    assert [row["layout"] for row in done["learner gradients, float32"]] == ["padded", "packed", "shared"]
    (skipped,) = (each for each in found if each["status"] == "skipped")
    assert skipped["case"] == "learner gradients, bfloat16" and "no attention here tells" in skipped["why"]


def test_a_wrong_gradient_of_the_head_loss_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_correctness.head_loss

    def wrong(policy: Any, *arguments: Any) -> Any:
        loss, sums = right(policy, *arguments)
        value = loss.total.detach()
        is_exact = policy.hidden.dtype == torch.float64  # the reference stays right
        return (loss if is_exact else replace(loss, total=value + 1.0001 * (loss.total - value))), sums

    monkeypatch.setattr(gpu_correctness, "head_loss", wrong)
    found = gpu_cases.outcome(gpu_correctness.cases(context())[0], context())
    assert found["status"] == "failed"
    # the loss is right, and its gradient is off by 1.0001 - 1
    assert found["why"].startswith("hidden_gradient of fkl (")
    assert found["why"].endswith("in float32 with none routed is off by 1.00e-04, allowed is 1e-05")


def test_sequences_that_see_each_other_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packed_gradients(monkeypatch, is_apart=True)
    assert found["status"] == "done"
    assert [(row["layout"], row["attention"]) for row in found["rows"]] == [
        ("padded", gpu_attention.TORCH_VARLEN),
        ("packed", gpu_attention.TORCH_VARLEN),
        ("shared", shared_attention.NAME),
    ]
    found = packed_gradients(monkeypatch, is_apart=False)
    assert found["status"] == "failed" and found["why"].startswith("the gradient over packed rows in float32 is off by")


def packed_gradients(monkeypatch: pytest.MonkeyPatch, is_apart: bool) -> dict[str, Any]:
    """The learner's gradients where layers call torch's kernel, whose place is taken by plain attention."""

    def kernel(query: Any, key: Any, value: Any, borders: Any, longest: int, scale: float | None = None) -> Any:
        lengths = tuple(borders.diff().tolist())
        assert longest == max(lengths) and sum(lengths) == len(query)
        assert scale == query.shape[-1] ** -0.5
        return gpu_attention._one_by_one(
            gpu_attention.Packed(query, key, value, lengths if is_apart else (len(query),))
        )

    monkeypatch.setattr(gpu_attention, "torch_varlen", kernel)
    monkeypatch.setattr(gpu_correctness, "let_pack", gpu_attention.use_torch_varlen)
    (case,) = (each for each in gpu_correctness.cases(context()) if each.name == "learner gradients, float32")
    return gpu_cases.outcome(case, context())


def test_a_learner_is_measured_over_packed_rows_where_its_attention_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(query: Any, key: Any, value: Any, borders: Any, longest: int, scale: float | None = None) -> Any:
        return gpu_attention._one_by_one(gpu_attention.Packed(query, key, value, tuple(borders.diff().tolist())))

    monkeypatch.setattr(gpu_attention, "torch_varlen", kernel)
    monkeypatch.setattr(gpu_learner, "let_pack", gpu_attention.use_torch_varlen)
    found = gpu_cases.outcome(gpu_learner.cases(context())[0], context())
    assert found["status"] == "done", found
    kinds = [(row["layout"], row["routed_frac"]) for row in found["rows"]]
    assert kinds == [(layout, share) for layout in ("padded", "packed", "shared") for share in (0.0, 0.25)]
    for row in found["rows"]:
        assert row["gradient_error"] <= 1e-4 and row["tokens_per_s"] > 0 and row["mfu_frac"] > 0
        assert row["steps_by"] == "plain torch"


def test_without_such_an_attention_the_learner_says_so() -> None:
    found = gpu_cases.outcome(gpu_learner.cases(context())[0], context())
    assert [row["layout"] for row in found["rows"]] == ["padded", "padded", "shared", "shared", "packed"]
    assert found["rows"][-1]["attention"].startswith("none here tells sequences in one row apart")
    told = record(found | {"case": "Qwen3 1.7B"})
    assert "| packed |  |" in gpu_report.to_markdown(told) and "goal" not in gpu_report.to_markdown(told)


def test_a_learner_with_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gpu_learner.learner_step.exact_norm
    monkeypatch.setattr(gpu_learner.learner_step, "exact_norm", lambda *arguments: 1.001 * exact(*arguments))
    found = gpu_cases.outcome(gpu_learner.cases(context())[0], context())
    assert found["status"] == "failed"
    assert found["why"].startswith("the gradient norm of padded sequences is off by 1.00e-03")


def section_of(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> str:
    """A section that this test has written, which processes find too."""
    (folder / "gpu_made.py").write_text(f"import os, time\nfrom gpu_cases import *\n{code}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "gpu_made", raising=False)
    return "made"


def test_one_failure_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = """
def fail():
    raise RuntimeError("no kernel\\nfor this device")
def skip():
    raise Skip("not installed: flash_attn")
def cases(context):
    return [Case("a", fail), Case("b", skip), Case("c", lambda: [{"x_s": 1.0}])]
"""
    found = run(section_of(monkeypatch, tmp_path, code))
    assert [(each["case"], each["status"], each.get("why")) for each in found] == [
        ("a", "failed", "RuntimeError: no kernel"),
        ("b", "skipped", "not installed: flash_attn"),
        ("c", "done", None),
    ]


def test_nothing_is_started_when_the_time_is_over() -> None:
    found = run("head_loss", context(seconds=-1))
    assert {(each["status"], each["why"]) for each in found} == {("skipped", "not started: --budget-s was over")}
    assert len(found) == 3


def test_a_section_that_is_broken_is_one_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run(section_of(monkeypatch, tmp_path, "import nothing_of_this_name"))
    assert found == [
        {"case": "all of it", "status": "failed", "why": "ModuleNotFoundError: No module named 'nothing_of_this_name'"}
    ]


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_fails_in_its_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = """
def cases(context):
    return [Case("first", lambda: [{"x_s": 1.0}]), Case("second", lambda: END)]
"""
    for end, why in (
        ("os.abort()", "its process ended with SIGABRT"),
        ("time.sleep(600)", "nothing happened for 3 s; its process was killed"),
    ):
        told: list[dict[str, Any]] = []
        section = section_of(monkeypatch, tmp_path, code.replace("END", end))
        gpu_check.in_own_process(section, context(), 3.0, told.append)
        assert [(each["case"], each["status"]) for each in told] == [("first", "done"), ("second", "failed")]
        assert told[1]["why"] == why


def record(*cases: dict[str, Any], scale: str = "full") -> dict[str, Any]:
    return {
        "command": "python benchmarks/gpu_check.py",
        "date": "2026-01-01",
        "git": "abc",
        "scale": scale,
        "seed": 0,
        "machine": {"gpu": "NVIDIA H200", "driver": "580.1"},
        "sections": {"learner": {"seconds": 12.0, "cases": list(cases)}},
    }


def steps(mfu: float) -> dict[str, Any]:
    row = {"routed_frac": 0.25, "mfu_frac": mfu, "flops_per_s": 2.5e14}
    rows = [{"layout": layout, **row} for layout in ("padded", "packed")]
    return {"case": "Qwen3 1.7B, x", "status": "done", "seconds": 3.0, "peak_memory_mib": 32100, "rows": rows}


def test_the_report_tells_where_figures_come_from_and_what_failed() -> None:
    failed = {"case": "Qwen3 0.6B", "status": "failed", "why": "RuntimeError: no kernel"}
    found = record(steps(0.5), failed, {"case": "other", "status": "skipped", "why": "no GPU"})
    lines = gpu_report.to_markdown(found).splitlines()
    assert "`python benchmarks/gpu_check.py`, 2026-01-01, seed 0, code abc" in lines
    assert "On gpu NVIDIA H200, driver 580.1." in lines
    assert "Cases: 1 done, 1 skipped, 1 failed." in lines
    assert "- learner: Qwen3 0.6B: failed, RuntimeError: no kernel" in lines
    assert "- other: skipped, no GPU" in lines
    assert "| case | peak memory MiB | layout | routed | mfu | TFLOP/s |" in lines
    assert "| Qwen3 1.7B, x | 32,100 | padded | 25.0% | 50.0% | 250 |" in lines
    assert "|  |  | packed | 25.0% | 50.0% | 250 |" in lines
    assert gpu_report.num_failed(found) == 1


@pytest.mark.parametrize(("mfu", "verb"), [(0.45, "reached"), (0.449, "missed")])
def test_the_goal_is_judged(mfu: float, verb: str) -> None:
    told = f"the goal of 45% MFU (Qwen3 1.7B, packed, 4k tokens) is {verb}: {mfu:.1%}, Qwen3 1.7B, x, 25% routed"
    assert told in gpu_report.to_markdown(record(steps(mfu)))
    assert "goal" not in gpu_report.to_markdown(record(steps(mfu), scale="quick"))


def test_dry_figures_are_marked() -> None:
    assert "its figures mean nothing" in gpu_report.to_markdown(record(scale="dry"))
    assert "dry" not in gpu_report.to_markdown(record())


@pytest.mark.parametrize(
    ("name", "told"), [("NVIDIA H200", 989.4e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 0), ("T4", 0)]
)
def test_the_data_sheet_is_that_of_the_card(monkeypatch: pytest.MonkeyPatch, name: str, told: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu_roofs.datasheet_flops(replace(context(), device=torch.device("cuda:0"))) == told


def test_sections_are_chosen_by_name() -> None:
    assert gpu_check.choose("") == list(gpu_check.SECTIONS)
    assert gpu_check.choose("learner, roofs") == ["roofs", "learner"]
    with pytest.raises(typer.BadParameter, match="--sections names rooves; there are roofs"):
        gpu_check.choose("rooves,learner")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_needs_nothing_but_torch_and_transformers(tmp_path: Path) -> None:
    """All sections in processes for which other packages are not there."""
    others = [
        "ray",
        "vllm",
        "deepspeed",
        "math_verify",
        "psutil",
        "scipy",
        "datasets",
        "plotly",
        "aiohttp",
        "accelerate",
    ]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({others}))\n")
    done = command(tmp_path, "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu_check_dry.json").read_text())
    assert list(written["sections"]) == list(gpu_check.SECTIONS)
    assert all(section["cases"] for section in written["sections"].values())
    assert ", 0 failed." in (tmp_path / "gpu_check_dry.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    done = command(tmp_path, "--out", str(tmp_path))
    assert done.returncode == 2 and "torch sees no GPU here" in done.stderr


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "gpu_check.py"), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
