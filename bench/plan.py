"""How long does planning take? `gen_plans` alone, on tables that are patched, not rebuilt.

    python bench/plan.py --instances 64 --requests 64 --segments 200 --json
    python bench/plan.py --table

Every instance decodes `--requests` requests, each over `--segments` segments; homes are striped.
With `--shared`, and in the table, the first segment is shared by all and has replicas everywhere.
No tensors, no process group; `gen_plans` is timed alone, then with the digest that ranks compare.
`--table` shows how it grows with instances, requests and segments.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balancer import Request, Run  # noqa: E402
from model import Config  # noqa: E402
from tokenlake import LakeConfig, TokenLake, plan_digest  # noqa: E402

C = 16


def scene(instances: int, requests: int, segments: int, shared: bool):
    """A lake whose instances are full of running requests, and the requests by instance."""
    N, slots = instances, requests * (segments + 2) + 8
    lake = TokenLake(list(range(N)), Config(), LakeConfig(C, slots, max_batch=N * requests))
    balancer, running, first = lake.balancer, [[] for _ in range(N)], None
    balancer.held = np.zeros((N * requests, N), np.int64)
    for number in range(N * requests):
        home, table = number % N, np.zeros(segments + 2, np.int32)
        where = (home + 1 + np.arange(segments)) % N  # striped, the last one at home
        for index, instance in enumerate(where.tolist()):
            table[index] = balancer.free[instance].pop()
        request = Request(number, [0], (segments + 1) * C)
        request.tokens = range(segments * C)  # only its length is asked for
        request.done, request.table, request.num_slots = segments * C - 1, table, segments
        if first is None:
            first = balancer.tree.insert(b"shared", None, int(where[0]), int(table[0]))
        elif shared:
            balancer.free[int(table[0]) // slots].append(int(table[0]))
            table[0] = first.slot
        request.line = number
        balancer.held[number] = np.bincount(table[:segments] // slots, minlength=N)
        running[home].append(request)
    for instance in range(N) if shared else ():
        if instance not in first.replicas:
            slot = first.replicas[instance] = balancer.free[instance].pop()
            balancer.tree.extras[slot] = first
    balancer._index()
    return lake, running


def milliseconds(instances, requests, segments, shared=False, repeat=20) -> np.ndarray:
    """[2, repeat] of plans, one after another, and of plans with their digests, for which all
    segments are listed; after two that are not counted."""
    lake, running = scene(instances, requests, segments, shared)
    times = np.zeros((2, repeat + 2))
    for whole, at in np.ndindex(times.shape):
        batches = [[Run(r, r.done, 1, home, int(r.table[r.done // C]), True, True) for r in group]
                   for home, group in enumerate(running)]
        started = time.perf_counter()
        plan, transfer, _ = lake.gen_plans(batches, [1] * instances, lake.get_prefix_tree())
        if whole:
            plan_digest(0, plan, transfer)
        times[whole, at] = 1e3 * (time.perf_counter() - started)
    return times[:, 2:]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Time gen_plans.")
    for name, default in (("instances", 64), ("requests", 64), ("segments", 200), ("repeat", 20)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--shared", action="store_true", help="one segment on every request, and "
                        "replicas of it everywhere")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--table", action="store_true", help="how it grows, up to 512 instances")
    options = parser.parse_args(arguments)
    sizes = options.instances, options.requests, options.segments
    if min(*sizes, options.repeat) < 1:
        parser.error("positive integers are expected")
    rows = [sizes]
    if options.table:
        rows = [(8, 64, 200), (64, 8, 200), (64, 64, 20), (64, 64, 200), (64, 64, 800),
                (64, 256, 200), (256, 16, 200), (512, 8, 200), (512, 64, 20)]
        print(f"{'instances':>9} {'requests':>9} {'segments':>9} {'references':>10} "
              f"{'median ms':>10} {'p99 ms':>8} {'+ digest':>8}")
    for row in rows:
        times, whole = milliseconds(*row, options.shared or options.table, options.repeat)
        result = dict(zip(("instances", "requests", "segments"), row),
                      plan_ms_median=float(np.median(times)),
                      plan_ms_p99=float(np.percentile(times, 99)),
                      with_digest_ms_median=float(np.median(whole)))
        if options.json:
            print(json.dumps(result))
        else:
            print(f"{row[0]:>9} {row[1]:>9} {row[2]:>9} {np.prod(row):>10,} "
                  f"{result['plan_ms_median']:>10.2f} {result['plan_ms_p99']:>8.2f} "
                  f"{result['with_digest_ms_median']:>8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
