"""How long does planning take? `gen_plans` alone, on tables that are patched, not rebuilt.

    python bench/plan.py --instances 64 --requests 64 --segments 200 --json
    python bench/plan.py --table

Every instance decodes `--requests` requests, each over `--segments` segments; homes are striped.
With `--shared`, and in the table, the first segment is shared by all and has replicas everywhere.
No tensors, no process group; `gen_plans` is timed alone, then with the digest that ranks compare.
`--table` shows how it grows with instances, requests and segments.
"""

import json
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from balancer import Request, Run  # noqa: E402
from model import LlamaConfig  # noqa: E402
from options import Parser, check_segments, number, run_main  # noqa: E402
from pool import LakeConfig, plan_digest  # noqa: E402
from provenance import describe_machine  # noqa: E402
from tokenlake import TokenLake  # noqa: E402

C = 16
# Instances, requests per instance, segments per request.
TABLE = [
    (8, 64, 200),
    (64, 8, 200),
    (64, 64, 20),
    (64, 64, 200),
    (64, 64, 800),
    (64, 256, 200),
    (256, 16, 200),
    (512, 8, 200),
    (512, 64, 20),
]


def full_lake(instances: int, requests: int, segments: int, shared: bool):
    """A lake whose instances are full of running requests, and the requests by instance."""
    slots = requests * (segments + 2) + 8
    config = LakeConfig(C, slots, max_batch=instances * requests)
    lake = TokenLake(list(range(instances)), LlamaConfig(), config)
    running = [[] for _ in range(instances)]
    for number in range(instances * requests):
        home = number % instances
        request = decoding_request(lake.balancer, number, home, segments)
        running[home].append(request)
    if shared:
        share_first_segment(lake.balancer, running)
    held = np.zeros((instances * requests, instances), np.int64)
    for request in chain(*running):
        held[request.held_row] = np.bincount(
            request.table[:segments] // slots, minlength=instances
        )
    lake.balancer.held = held
    lake.balancer._index_replicas()
    return lake, running


def decoding_request(balancer, number: int, home: int, segments: int) -> Request:
    """A request with full segments that are striped, the last one at home."""
    request = Request(number, [0], (segments + 1) * C)
    request.tokens = range(segments * C)  # only its length is asked for
    request.done = segments * C - 1
    request.held_row = number
    request.num_slots = segments
    request.table = np.zeros(segments + 2, np.int32)
    for index in range(segments):
        instance = (home + 1 + index) % balancer.num_instances
        request.table[index] = balancer.free[instance].pop()
    return request


def share_first_segment(balancer, running: list[list[Request]]):
    """Makes the first segments of all requests one, with replicas everywhere."""
    first, *others = chain(*running)
    slot = int(first.table[0])
    segment = balancer.tree.insert(b"shared", None, slot // balancer.slots, slot)
    first.num_shared = 1
    for request in others:
        own_slot = int(request.table[0])
        balancer.free[own_slot // balancer.slots].append(own_slot)
        request.table[0] = slot
        request.num_shared = 1
    for instance in range(balancer.num_instances):
        if instance not in segment.replicas:
            replica = balancer.free[instance].pop()
            segment.replicas[instance] = replica
            balancer.tree.extras[replica] = segment


def decode_runs(running: list[list[Request]]) -> list[list[Run]]:
    """A batch for every instance: a row of each of its requests."""
    batches = []
    for home, group in enumerate(running):
        batch = []
        for request in group:
            slot = int(request.table[request.done // C])
            batch.append(
                Run(request, request.done, 1, home, slot, puts=True, decode=True)
            )
        batches.append(batch)
    return batches


def plan_ms(lake: TokenLake, running: list[list[Request]], digest: bool) -> float:
    """Of one plan, with its digest or without."""
    batches = decode_runs(running)
    dops = [1] * len(running)
    started = time.perf_counter()
    plan, transfer_plan, _ = lake.gen_plans(batches, dops, lake.get_prefix_tree())
    if digest:
        plan_digest(0, plan, transfer_plan)
    return 1e3 * (time.perf_counter() - started)


def milliseconds(instances, requests, segments, shared, repeat) -> np.ndarray:
    """[2, repeat] of plans, one after another, and of plans with their digests, for which all
    segments are listed; after two that are not counted."""
    lake, running = full_lake(instances, requests, segments, shared)
    alone = [plan_ms(lake, running, digest=False) for _ in range(repeat + 2)]
    whole = [plan_ms(lake, running, digest=True) for _ in range(repeat + 2)]
    return np.array([alone, whole])[:, 2:]


def parse_options(arguments: list[str]):
    parser = Parser(description="Time gen_plans.")
    add = parser.add_argument
    # Default and highest value.
    numbers = {
        "--instances": (64, 1024),
        "--requests": (64, 4096),
        "--segments": (200, 100_000),
        "--repeat": (20, 1_000_000),
    }
    for name, (default, highest) in numbers.items():
        kind = number(int, 1, highest)
        add(name, type=kind, default=default, help=f"default {default}")
    add(
        "--shared",
        action="store_true",
        help="one segment on every request, and replicas of it everywhere",
    )
    add("--json", action="store_true", help="print a JSON object for each size")
    add("--table", action="store_true", help="how it grows, up to 512 instances")
    options = parser.parse_args(arguments)
    try:
        check_segments(options.instances * options.requests * options.segments)
    except ValueError as error:
        parser.refuse(error)
    return options


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    sizes = [(options.instances, options.requests, options.segments)]
    shared = options.shared
    if options.table:
        sizes = TABLE
        shared = True
    if not options.json:
        print(f"{describe(shared, options.repeat)}\n\n{HEAD}", flush=True)
    for instances, requests, segments in sizes:
        alone, whole = milliseconds(instances, requests, segments, shared, options.repeat)
        result = dict(
            instances=instances,
            requests=requests,
            segments=segments,
            plan_ms_median=float(np.median(alone)),
            plan_ms_p99=float(np.percentile(alone, 99)),
            with_digest_ms_median=float(np.median(whole)),
        )
        print(json.dumps(result) if options.json else format_row(result), flush=True)
    return 0


def describe(shared: bool, repeat: int) -> str:
    """What is measured, on what, with which settings: the lines above the table."""
    first = "the first is all requests' own, as the others are"
    if shared:
        first = "the first is shared by all, with replicas everywhere"
    return (
        f"How long gen_plans takes for an iteration in which every request decodes: {repeat} "
        "plans alone (median, p99),\nand as many with the digest that ranks compare (median). "
        f"Segments of {C} tokens, striped;\n{first}. No tensors. Run on {describe_machine()}."
    )


HEAD = (
    f"{'instances':>9} {'requests':>12} {'segments':>11} {'reads':>10} {'median':>10} {'p99':>8} "
    f"{'with digest':>11}\n"
    f"{'':>9} {'per instance':>12} {'per request':>11} {'segments':>10} {'ms':>10} {'ms':>8} "
    f"{'ms':>11}"
)


def format_row(result: dict) -> str:
    instances, requests, segments, median, p99, with_digest = result.values()
    reads = instances * requests * segments
    return (
        f"{instances:>9} {requests:>12} {segments:>11} {reads:>10,} "
        f"{median:>10.2f} {p99:>8.2f} {with_digest:>11.2f}"
    )


if __name__ == "__main__":
    run_main(main)
