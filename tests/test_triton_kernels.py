"""The Triton kernels against the torch ones, in Triton's interpreter: the same code that a GPU compiles, on a CPU.

The interpreter has to be chosen before Triton is imported, so the comparison runs in a process of its own.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from trace_rl.actions import RowAction
from trace_rl.divergences import KlClip, TopK
from trace_rl.row_actions import Fkl, Jsd, Nll, Rkl
from trace_rl.row_kernels import RouteEntries, RowKernels, TorchKernels

VOCAB = 5003
"""More than one block, and no multiple of it."""
ROWS = 5
ORDER = torch.tensor([4, 1, 2, 3, 0, 2])
"""Rows of the tile that a route takes."""
TOLERANCE = 1e-5
"""Relative; float32 rounds at 6e-8, and the sums run over thousands of terms."""

CLIPS = [
    KlClip(mode="none"),
    KlClip(mode="vocab_clamp", threshold=0.01),
    KlClip(mode="token_clamp", threshold=1.0),
    KlClip(mode="token_rescale", threshold=1.0),
]
ACTIONS: list[RowAction] = [
    *(Fkl(clip=clip) for clip in CLIPS),
    *(Rkl(clip=clip, importance_cap=1.1) for clip in CLIPS),
    *(Jsd(clip=clip, beta=beta) for clip in CLIPS for beta in (0.0, 0.3, 1.0)),
    Fkl(support=TopK(k=7)),
    Nll(),
]


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy, teacher, targets, weights, ratio; a teacher row that equals the policy's, and one far from it."""
    generator = torch.Generator().manual_seed(0)
    policy = 3 * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    teacher = policy + torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    teacher[1] = policy[1]
    teacher[2] = 12 * torch.randn(VOCAB, generator=generator, dtype=torch.float64)
    policy[3] -= 50  # the normaliser is far from 0
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    weights, ratio = torch.rand(ROWS, generator=generator), 0.5 + torch.rand(ROWS, generator=generator)
    policy, teacher = policy.float(), teacher.float()  # both precisions get the same numbers
    return policy.to(dtype), teacher.to(dtype), targets, weights.to(dtype), ratio.to(dtype)


def everything(kernels: RowKernels, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """All that the kernels say of the inputs, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    policy, teacher, targets, weights, ratio = inputs(dtype)
    for temperature in (1.0, 0.7):
        rows = kernels.token_rows(policy, targets, temperature)
        found[f"token_rows {temperature}"] = [rows.logprobs, rows.entropy, rows.normaliser]
        args = (targets, temperature, rows.normaliser, weights)
        found[f"policy_gradient {temperature}"] = [kernels.policy_gradient(policy.clone(), *args, dtype)]
        for number, action in enumerate(ACTIONS):
            into = teacher[ORDER]
            entries = RouteEntries(ORDER, into, targets[ORDER], temperature, ratio[ORDER], weights[ORDER])
            told = kernels.route_gradient(action, policy, entries, into)
            found[f"{temperature} {number} {action}"] = [
                into,
                *(value for _, value in sorted(vars(told).items())),
            ]
    return found


def run_in_interpreter() -> None:
    from trace_rl.triton_kernels import TritonKernels

    half = TritonKernels().policy_gradient(*_policy_gradient_arguments(), torch.bfloat16)
    torch.save({"found": everything(TritonKernels(), torch.float32), "half": half}, sys.argv[1])


def _policy_gradient_arguments() -> tuple[Any, ...]:
    policy, _, targets, weights, _ = inputs(torch.float32)
    return policy, targets, 1.0, policy.logsumexp(-1), weights


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("triton") / "found.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    code = "import test_triton_kernels as t; t.run_in_interpreter()"
    subprocess.run([sys.executable, "-c", code, str(file)], env=environment, check=True, timeout=300)
    return dict(torch.load(file))


def test_kernels_agree_with_float64(interpreted: dict[str, Any]) -> None:
    expected = everything(TorchKernels(), torch.float64)
    assert interpreted["found"].keys() == expected.keys()
    for name, values in expected.items():
        for number, (value, found) in enumerate(zip(values, interpreted["found"][name], strict=True)):
            assert found.shape == value.shape, name
            assert found.isfinite().all(), name
            error = (found.double() - value).norm() / value.norm().clamp(min=1e-2)
            assert error <= TOLERANCE, f"{name}, output {number}: {error:.3g}"


def test_a_gradient_can_be_written_in_half_precision(interpreted: dict[str, Any]) -> None:
    exact = TorchKernels().policy_gradient(*_policy_gradient_arguments(), torch.float32)
    assert interpreted["half"].dtype == torch.bfloat16
    torch.testing.assert_close(interpreted["half"].float(), exact, rtol=2**-7, atol=0)  # it truncates
