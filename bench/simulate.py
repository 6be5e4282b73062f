"""How long would it take? The scheduler and the balancer as they are, a roofline for the tensors.

    python bench/simulate.py --workload loogle --scheduler dp --instances 4 --rate 2
    python bench/simulate.py --table        # even split, DP and fixed PD, side by side

A lake is one clock: an iteration lasts as long as its slowest instance. That one computes its rows
(MFU 0.6) or reads the weights (at 0.8 of the bandwidth), attends, and exchanges: a latency α per
exchange and layer, and its bytes over the link, behind the computation as far as that goes. The
scheduler's time model is fitted to these times as it is to measured ones. `demo` is what
run_cluster.py serves without options; any other name that is no load is a trace's file.
"""

import argparse
import heapq
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from balancer import BLOCK  # noqa: E402
from model import Config  # noqa: E402
from run_cluster import demo_trace, read_trace  # noqa: E402
from tokenlake import LakeConfig, Scheduler, TokenLake  # noqa: E402
from workloads import WORKLOADS, generate  # noqa: E402

MODELS = {
    "tiny": Config(),
    "lwm-7b": Config(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_layers=32,
                     num_heads=32, num_kv_heads=32, head_dim=128),
    "llama-3.1-8b": Config(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336,
                           num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128),
}
# FLOP/s in bf16, memory B/s, NVLink B/s each way.
HARDWARE = {"a100": (312e12, 2.04e12, 300e9), "h100": (989e12, 3.35e12, 450e9),
            "h200": (989e12, 4.8e12, 450e9)}
MFU, OF_BANDWIDTH, ALPHA = 0.6, 0.8, 10e-6


def seconds(lake, query_plan, transfer_plan, hardware) -> np.ndarray:
    """[N] time of an iteration at each instance."""
    flops, bandwidth, link = HARDWARE[hardware]
    m, (rows, load, sent) = lake.model, lake.features(query_plan, transfer_plan).T
    linear = np.maximum(2 * m.num_linear_parameters * rows / (flops * MFU),
                        lake.weight_bytes / (bandwidth * OF_BANDWIDTH))
    # A row that attends alone waits for memory: it weighs as many rows as that takes (lake.ridge).
    attention = 4 * m.num_layers * m.num_heads * m.head_dim * load / (flops * MFU)
    exchanges = 2 * query_plan.ships.any() + bool(len(transfer_plan.moves.kind)) + bool(
        len(query_plan.pulls.kind))
    return np.maximum(linear + attention, 1024 * sent / link) + exchanges * m.num_layers * ALPHA


def simulate(lines, lake, policy="auto", slo=None, hardware="a100", block=BLOCK, speed=1.0) -> dict:
    """Serves checked lines of a trace on a lake without tensors."""
    scheduler, clock = Scheduler(lake, (), policy, slo), 0.0
    following = {line.previous.index: line for line in lines if line.previous}
    seconds_of = lambda line, key: line.keys[key] / 1e3 / speed
    arrivals = [(seconds_of(x, "timestamp"), x.index) for x in lines if not x.previous]
    arrived, times, busy, prompts = {}, {}, np.zeros(2), 0
    while arrivals or scheduler.waiting or scheduler.running:
        while arrivals and arrivals[0][0] <= clock:
            at, index = heapq.heappop(arrivals)
            arrived[index] = at
            scheduler.add(lines[index].arrive(0, lake.model.vocab_size, block, 0))
            prompts += lines[index].request.num_prompt
        plan, transfer, _ = lake.gen_plans(*scheduler.schedule(), lake.get_prefix_tree())
        if not plan.runs:
            clock = max(clock, arrivals[0][0])
            continue
        took = seconds(lake, plan, transfer, hardware)
        scheduler.model.measured(lake.features(plan, transfer), took.max())
        scheduler.model.coefficients = scheduler.model.fitted
        clock, busy = clock + took.max(), busy + (took.mean(), took.max())
        sampled = {run.request.id: run.request.id % lake.model.vocab_size
                   for run in plan.runs if run.samples}
        for index in sampled:
            times.setdefault(index, []).append(clock)
        for request in scheduler.update(plan, sampled):
            if line := following.get(request.id):
                at = max(seconds_of(line, "timestamp"), clock + seconds_of(line, "think_ms"))
                heapq.heappush(arrivals, (at, line.index))
    ttft = [1e3 * (times[i][0] - arrived[i]) for i in times]
    gaps = [g for i in times for g in np.diff(times[i])] or [0.0]
    return dict(requests=len(times), duration_s=clock, ttft_ms=float(np.mean(ttft)),
                p90_ttft_ms=float(np.percentile(ttft, 90)), tbt_ms=1e3 * float(np.mean(gaps)),
                p99_tbt_ms=1e3 * float(np.percentile(gaps, 99)),
                idle_fraction=float(1 - busy[0] / busy[1]),
                hit_rate=sum(scheduler.cached_tokens.values()) / prompts)


def load(name: str, num_requests: int, rate: float, seed: int, vocab: int):
    """Checked lines of the demo, a generated load, or a file."""
    if name == "demo":
        return read_trace(demo_trace(num_requests, vocab, seed), "demo")
    if name in WORKLOADS:
        return read_trace(map(json.dumps, generate(name, num_requests, rate, seed)), name)
    with open(name, "rb") as file:
        return read_trace(file, name, 1, num_requests)


def run(options, name, policy, rate, model=None) -> dict:
    model = MODELS[model or options.model]
    C = 16 if model is MODELS["tiny"] else 512
    slots = -(-options.capacity_tokens // (C * options.instances))
    config = LakeConfig(C, slots, chunk_tokens=options.chunk_tokens, max_batch=options.max_batch)
    lake = TokenLake(list(range(options.instances)), model, config, dtype=torch.bfloat16)
    lines = load(name, options.num_requests, rate, options.seed, model.vocab_size)
    return simulate(lines, lake, policy, options.tbt_slo_ms, options.hardware)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Simulate a lake in lock-step.")
    add = parser.add_argument
    add("--workload", default="loogle", help=f"demo, {', '.join(WORKLOADS)}, or a trace's file")
    add("--scheduler", default="auto", help="auto, even, dp, pd:PxD")
    add("--model", choices=MODELS, default="llama-3.1-8b")
    add("--hardware", choices=HARDWARE, default="a100")
    for name, kind, default in (("instances", int, 4), ("num-requests", int, 200), ("seed", int, 0),
                                ("rate", float, 4.0), ("capacity-tokens", int, 1_000_000),
                                ("chunk-tokens", int, 1024), ("max-batch", int, 128)):
        add(f"--{name}", type=kind, default=default, help=f"default {default}")
    add("--tbt-slo-ms", type=float, help="default: none")
    add("--trace", help="with --table: a trace to be in it, at its own times")
    add("--table", action="store_true", help="every scheduler on the demo and generated loads")
    options = parser.parse_args(arguments)
    if not options.table:
        print(json.dumps(run(options, options.workload, options.scheduler, options.rate), indent=1))
        return 0
    N = options.instances
    loads = [("demo", 1.0, "tiny"), ("loogle", options.rate, None),
             ("sharegpt", 6 * options.rate, None)]
    loads += [(options.trace, 1.0, None)] if options.trace else []
    print(f"{'load':>12} {'scheduler':>10} {'makespan s':>10} {'TTFT ms':>10} {'p90':>10} "
          f"{'TBT ms':>8} {'p99':>8} {'idle':>6} {'hits':>6}")
    for name, rate, model in loads:
        for policy in ("even", "dp", *(f"pd:{p}x{N - p}" for p in {1, N // 2, N - 1})):
            r = run(options, name, policy, rate, model)
            print(f"{Path(name).stem[:12]:>12} {policy:>10} {r['duration_s']:>10.3f} "
                  f"{r['ttft_ms']:>10,.2f} {r['p90_ttft_ms']:>10,.2f} {r['tbt_ms']:>8.3f} "
                  f"{r['p99_tbt_ms']:>8.2f} {r['idle_fraction']:>6.1%} {r['hit_rate']:>6.1%}",
                  flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
