"""What does the host do in an iteration? Decodes of one rank, where the device does nothing.

    python bench/host_time.py --requests 64 --prompt 4096

Kernels are launched into the void, norms are one operator as on a GPU, and tensors are tiny: so
what is left is Python, PyTorch's dispatch, and planning. With `run_cluster.py --plan-ahead` a
device waits only for `digest` and `fill`; without, for all but the layers.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import kernels  # noqa: E402
import model as model_module  # noqa: E402
import pool  # noqa: E402
from balancer import Request  # noqa: E402
from cluster import Cluster  # noqa: E402
from model import Llama, LlamaConfig, random_weights  # noqa: E402
from options import Parser, number, run_main  # noqa: E402
from pool import LakeConfig, digest_with_tokens, hash_plan  # noqa: E402
from provenance import describe_machine  # noqa: E402
from scheduler import Scheduler  # noqa: E402
from tokenlake import TokenLake  # noqa: E402
from work import AtOnce  # noqa: E402

LAYERS = 32
SHAPE = LlamaConfig(64, 64, 64, LAYERS, 8, 2, 8, max_positions=1 << 20)
C = 512  # tokens of a segment
AT_ONCE = AtOnce(3 * 132, 132)  # programs, as on an H200
WARM_UP = 5  # iterations


class Void:
    """A kernel that does nothing."""
    def __getitem__(self, grid):
        return lambda *arguments, **config: None


def stub_the_device():
    for name in ("_partial_attention_kernel", "_merge_kernel", "_rotate_kernel"):
        setattr(kernels, name, Void())
    for module in (kernels, pool, model_module):
        module.suits_triton = lambda *_: True
    pool.programs_at_once = lambda *_: AT_ONCE
    model_module.F.rms_norm = lambda x, shape, weight, eps: x * weight


class Timer:
    def __init__(self):
        self.seconds = defaultdict(list)

    def __call__(self, name, function, *arguments):
        started = time.perf_counter()
        result = function(*arguments)
        self.seconds[name].append(time.perf_counter() - started)
        return result

    def ms(self) -> dict:
        return {name: 1e3 * statistics.median(x[WARM_UP:]) for name, x in self.seconds.items()}


def start(requests, prompt, answer):
    """A scheduler whose requests all decode."""
    slots = requests * (-(-(prompt + answer) // C) + 1)
    config = LakeConfig(C, slots, chunk_tokens=4096, max_batch=requests)
    device = torch.device("cpu")
    lake = TokenLake([0], SHAPE, config, Cluster(), torch.float32, device)
    lake.pool.max_lanes = pool.MAX_LANES
    scheduler = Scheduler(lake)
    rng = np.random.default_rng(0)
    for id in range(requests):
        tokens = rng.integers(SHAPE.vocab_size, size=prompt).tolist()
        scheduler.add(Request(id, tokens, prompt + answer))
    while scheduler.waiting or any(r.remaining > 1 for r in scheduler.running):
        batches, dops = scheduler.schedule()
        plan, _, _ = lake.gen_plans(batches, dops, lake.get_prefix_tree())
        scheduler.update(plan, {run.request.id: 1 for run in plan.runs if run.samples})
    return lake, scheduler


def iterate(lake, scheduler, model, timer):
    """One, each step timed."""
    batches, dops = timer("schedule", scheduler.schedule)
    tree = lake.get_prefix_tree()
    plan, transfer_plan, groups = timer("gen_plans", lake.gen_plans, batches, dops, tree)
    hashed = timer("hash", hash_plan, 0, plan, transfer_plan)
    q_buf = timer("init_query", lake.init_query, batches[0], groups[0], plan)
    kv_buf = timer("init_transfer", lake.init_transfer, batches[0], transfer_plan)
    timer("digest", digest_with_tokens, hashed, plan)

    def attend(layer, q, kv):
        kv_buf.write(layer, kv)
        lake.put(kv_buf)
        q_buf.write(layer, q)
        return lake.query(q_buf)

    ids = torch.zeros(q_buf.num_rows, dtype=torch.int64)
    timer("layers", model.forward, ids, ids, attend, ids[:1])
    sampled = {run.request.id: 1 for run in plan.runs}
    timer("advance", scheduler.advance, plan, sampled)
    timer("fill", scheduler.fill, sampled)


def main(arguments: list[str]) -> int:
    parser = Parser(description="Time what the host does in an iteration of decodes.")
    add = parser.add_argument
    add("--requests", type=number(int, 1, 4096), default=64, help="that decode (64)")
    add("--prompt", type=number(int, 2, 1 << 17), default=4096, help="tokens of each (4096)")
    add("--iterations", type=number(int, 1, 100_000), default=100, help="that are timed (100)")
    add("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse_args(arguments)
    stub_the_device()
    torch.set_num_threads(1)
    rounds = options.iterations + WARM_UP
    lake, scheduler = start(options.requests, options.prompt, rounds + 2)
    model = Llama(SHAPE, random_weights(SHAPE, 0, torch.float32, "cpu"))
    timer = Timer()
    for _ in range(rounds):
        iterate(lake, scheduler, model, timer)
    ms = timer.ms()
    layer = 1e3 * ms.pop("layers") / LAYERS
    found = dict(requests=options.requests, us_a_layer=layer, ms=ms, ms_planning=sum(ms.values()))
    if options.json:
        print(json.dumps(found))
        return 0
    show(options, ms, layer)
    return 0


def show(options, ms: dict, layer: float):
    """The table, from ms of each step and µs of a layer."""
    print(
        f"What the host does in an iteration: {options.requests} decodes, one rank, prompts of "
        f"{options.prompt:,} tokens, median of {options.iterations}.\nKernels do nothing, tensors "
        f"are tiny; segments of {C} tokens.\nRun on one thread of {describe_machine()}.\n\n"
        f"{'step':<14} {'times':>5} {'ms each':>8}"
    )
    for name, value in ms.items():
        print(f"{name:<14} {1:>5} {value:>8.3f}")
    print(f"{'a layer':<14} {LAYERS:>5} {layer / 1e3:>8.3f}")


if __name__ == "__main__":
    run_main(main)
