"""What are placement, replication and choice worth? A trace through the control plane alone.

    python balancer.py --trace FILE.jsonl --instances 8 --placement hash --replicate-factor 0
    python balancer.py --trace FILE.jsonl --instances 8

Requests of one timestamp are an iteration. Each reads each of its hit segments once, when it is
admitted, and puts the others; sessions and salts are not looked at. No tensors, no processes.
"""

import json
import sys
import time
from collections import defaultdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from balancer import TRACE_BLOCK, Balancer, Request, read_trace, variation  # noqa: E402
from options import Parser, check_segments, file_name, warn, wording  # noqa: E402

WINDOW_MS = 10_000  # of the trace, that a CV is taken over
KV_BYTES = 131_072  # of a token, all layers: Llama-3.1-8B in 16 bits


class Replay:
    """Requests through a balancer, and what is counted on the way."""
    def __init__(self, balancer: Balancer):
        self.balancer = balancer
        self.hit_tokens = 0
        self.put_tokens = 0
        self.milliseconds: list[float] = []  # of planning, by iteration
        self.windows = defaultdict(lambda: np.zeros(balancer.num_instances, np.int64))

    def iterate(self, timestamp: float, requests: list[Request]):
        """Plans for requests that come at once. ValueError if there is no room for them."""
        balancer = self.balancer
        N, S, C = balancer.sizes
        for request in requests:
            balancer.extend_ids(request)  # hashing is not planning
        started = time.perf_counter()
        balancer.replicate()
        load = balancer.load.copy()
        planned = [0] * N
        even = -(-sum(len(request.tokens) for request in requests) // N)
        for request in requests:
            matched = balancer.match(request)
            balancer.admit(request, matched)
            self.hit_tokens += request.done
            self._read(request.table[:matched], load)
            runs = balancer.reserve(
                request, request.remaining, planned, [0] * N, even + C
            )
            if runs is None:
                said = f"the requests of {timestamp} ms need more than {N * S} segments"
                raise ValueError(said)
            away = [run for run in runs if run.puts and run.preferred != run.slot // S]
            self.put_tokens += sum(run.rows for run in away)
        for request in requests:
            balancer.commit(request, request.remaining)
            balancer.release(request)
        reads = load - balancer.load
        balancer.observe(reads)
        self.milliseconds.append((time.perf_counter() - started) * 1e3)
        self.windows[timestamp // WINDOW_MS] += reads

    def _read(self, slots: np.ndarray, load: np.ndarray):
        """Adds the tokens of the segments in these slots to the load [N], where they are read."""
        N, S, C = self.balancer.sizes
        replicated, candidates = self.balancer.replicas_of(slots)
        load += C * np.bincount(np.delete(slots, replicated) // S, minlength=N)
        self.balancer.choose_replicas(candidates, np.full(len(replicated), C), load)


def replay(lines: list[tuple], balancer: Balancer, kv_bytes: int = KV_BYTES) -> dict:
    """Lines are (timestamp in ms, input_length, hash_ids). Load: tokens of cache read at an
    instance; its CV is the mean over windows; bytes are those that cross instances."""
    run = Replay(balancer)
    for timestamp, group in groupby(lines, key=itemgetter(0)):
        requests = []
        for _, length, ids in group:
            # Equal ids are to be equal tokens: an id stands for each token of its block.
            tokens = np.repeat(np.array(ids, np.int64), TRACE_BLOCK)[:length]
            requests.append(Request(0, tokens, length))
        run.iterate(timestamp, requests)
    return dict(
        hit_rate=run.hit_tokens / sum(length for _, length, _ in lines),
        cache_load_cv=variation(run.windows.values()),
        replicas_max=balancer.replicas_max,
        replica_segments=len(balancer.tree.extras),
        put_bytes=run.put_tokens * kv_bytes,
        replica_bytes=balancer.copies * balancer.segment_tokens * kv_bytes,
        plan_ms_median=float(np.median(run.milliseconds)),
        iterations=len(run.milliseconds),
    )


def make_parser() -> Parser:
    parser = Parser("balancer.py", description="Replay a trace, planning only.")
    add = parser.add_argument
    trace = "timestamp, input_length, hash_ids per line"
    add("--trace", type=file_name, required=True, metavar="FILE", help=trace)
    add("--instances", type=int, default=8, metavar="N", help="default 8")
    add(
        "--placement", choices=("stripe", "hash"), default="stripe", help="default stripe"
    )
    factor = "0: none; default 3"
    add("--replicate-factor", type=float, default=3.0, metavar="c", help=factor)
    add("--segment-tokens", type=int, default=512, metavar="C", help="default 512")
    capacity = "of the whole pool; default: all fits"
    add("--capacity-tokens", type=int, metavar="T", help=capacity)
    add("--json", action="store_true", help="print one JSON object")
    return parser


def check_numbers(options):
    """Raises ValueError naming the option."""
    for name, value in vars(options).items():
        lowest = 0 if name == "replicate_factor" else 1
        highest = 1024 if name == "instances" else 2**40
        if type(value) in (int, float) and not lowest <= value <= highest:
            said = f"a number from {lowest} to {highest} is expected"
            shown = wording().cut(str(value))
            raise ValueError(f"--{name.replace('_', '-')} {shown}: {said}")


def read_lines(name: str) -> list[tuple]:
    """(timestamp, input_length, hash_ids) of each line of a trace."""
    with open(name, "rb") as file:
        lines = read_trace(file, name, warn=warn)
    for line in lines:
        if line.hash_ids is None:
            said = "input_ids are not replayed; input_length and hash_ids are expected"
            raise ValueError(f"{line.where}: {said}")
    return [(line.timestamp, line.input_length, line.hash_ids) for line in lines]


def main(arguments: list[str] | None = None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    N = options.instances
    C = options.segment_tokens
    try:
        check_numbers(options)
        lines = read_lines(options.trace)
        room = options.capacity_tokens
        if room is None:
            room = 2 * C * sum(-(-length // C) for _, length, _ in lines)
        slots = -(-room // (N * C))
        check_segments(N * slots)
        balancer = Balancer(N, slots, C, options.placement, options.replicate_factor)
        result = replay(lines, balancer)
    except (OSError, ValueError) as error:
        parser.refuse(error)
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:>16}  {'–' if value is None else format(value, ',.4g')}")


if __name__ == "__main__":
    main()
