"""What docs/cost.md says around its numbers. Must not hold a number that the cost model works out."""

INTRODUCTION = """
<!-- Written by `make docs` from launch/cost_page; do not edit. -->
# What a step costs

`trace-rl plan` works out how long a step takes, stage by stage, and which stage is the bottleneck. It needs to know
what the hardware gives:

```sh
trace-rl plan run.yaml --roofs bench_node.json     # measured on the spot: `make bench` writes it
trace-rl plan run.yaml --gpu H100                  # a GPU by its data sheet; --gpu-memory-gib if it is another size
trace-rl plan run.yaml --gpu H100 --expect response_tokens=900 --expect routed_rollouts_frac=0.5
trace-rl plan run.yaml learner.world_size=16 --gpu H100      # what if: any setting can be given another value
```

Without `--roofs` and `--gpu` it shows no times. A configuration says only how long responses may be; `--expect` says
what is expected of them, and the metrics of a run what they were:
"""
FILE = """
The file of roofs is JSON; the first three numbers are needed, and keys beside these three are left alone:

```json
{
  "roofs": {"matmul_flops": 7e14, "copy_bytes_per_s": 3e12, "link_bytes_per_s": 4.5e10},
  "shares": {"generation": 0.5, "learner": 0.4},
  "fixed": {"token_s": 0.004, "grading_s": 0.01}
}
```
"""
FORMULAS = """
## How it is worked out

Every stage is worked out in the same way, `seconds = seconds at the roofs / share of them that is reached + rounds x
seconds of a round`. The formulas of operations and bytes stand at each stage in `launch/plan/stages.py`, and
`tests/test_plan_cost.py` has each of them by hand.
"""
WHO_WAITS = """
Operations are those of the stage's own work, recomputation included: with gradient checkpointing a learner's share of
40 % is an MFU of about 30 %. A synchronous step is max(generation, grading, annotation, teacher) + learner + sync +
driver. The teacher scores as many neighbouring prompts at a time as fill a batch of it, once the longest of their
responses is written, and so is done with the last ones after generation (`scored_s` in `launch/plan/cost.py`). With
oversampling, in colocated placement, on an engine's GPU, and as a running average it scores all of them after it. With
`scheduling.max_staleness` above 0 a step is the largest of generation without its tail, of all the rest, and of the
longest response divided by `max_staleness`.
"""
BOTTLENECKS = """
The stage that a step waits for longest, along each dimension with the others as above. In a synchronous step that is
the longest stage; where sampling runs ahead, what limits the rate. Many short responses are 256 prompts, and responses
of at most 1,024 tokens.
"""
MEASURED = """
Simulated stragglers (`benchmarks/results/straggler_trace.md`): the real loop and scheduling over engines and a learner
that sleep. The stages are those of the synchronous run; what is put to the test is who waits for whom. From two
versions on the model is too fast by a third: it leaves out that bursts of long responses hold up single steps, and that
a run of 10 steps fills its engines first and runs dry at its end.

`python benchmarks/cost_model.py` measures the demo over a grid of prompts, samples, response lengths and routed shares,
fits shares and fixed times, and tells how far each point is off that was left out.
"""
LEFT_OUT = """
## What is left out

Evaluations and checkpoints; the optimizer's own arithmetic (about 30 bytes a weight and rank, milliseconds);
all-reduces of tensor parallelism and all-to-alls of shared sequences; moving states to CPU memory (`learner.offload`,
colocated placement) and waking engines; dynamic sampling, surplus prompts, self-annotation on the policy's engines;
sequences without a gradient, which the learner at most reads; padding. Mixtures of experts are not worked out.
"""
