"""What are placement, replication and choice worth? A trace through the control plane alone.

    python balancer.py --trace FILE.jsonl --instances 8 --placement hash --replicate-factor 0
    python balancer.py --trace FILE.jsonl --instances 8

Requests of one time are an iteration. Each reads each of its hit segments once, when it is
admitted, and puts the others, and its answer, if a later turn repeats that; a request takes no
time. A turn comes at its own time, but `think_ms` after its predecessor at the earliest, and in a
later iteration. No tensors, no processes.
"""

import heapq
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from balancer import Balancer, variation  # noqa: E402
from options import (  # noqa: E402
    Parser,
    add_trace_form,
    check_segments,
    check_tokens,
    file_name,
    number,
    run_main,
    warn,
    wording,
)
from traces import (  # noqa: E402
    NumberedTokens,
    TraceForm,
    TraceLine,
    open_trace,
    warn_of_long_segments,
)

WINDOW_MS = 10_000  # of the trace, that a CV is taken over
KV_BYTES = 131_072  # of a token, all layers: Llama-3.1-8B in 16 bits


class Replay:
    """Requests through a balancer, and what is counted on the way."""
    def __init__(self, balancer: Balancer):
        self.balancer = balancer
        self.prompt_tokens = 0
        self.hit_tokens = 0
        self.put_tokens = 0
        self.milliseconds: list[float] = []  # of planning, by iteration
        self.windows = defaultdict(lambda: np.zeros(balancer.num_instances, np.int64))

    def iterate(self, timestamp: float, lines: list[TraceLine]):
        """Plans for lines that have arrived at once. ValueError if there is no room for them."""
        balancer = self.balancer
        N, S, C = balancer.sizes
        requests = [line.request for line in lines]
        for request in requests:
            balancer.extend_ids(request)  # hashing is not planning
        started = time.perf_counter()
        balancer.replicate()
        load = balancer.load.copy()
        planned = [0] * N
        even = -(-sum(len(request.tokens) for request in requests) // N)
        for line, request in zip(lines, requests):
            matched = balancer.match(request)
            balancer.admit(request, matched)
            self.prompt_tokens += request.num_prompt
            self.hit_tokens += request.done
            self._read(request.table[:matched], load)
            answer(line)
            balancer.extend_ids(request)
            runs = balancer.reserve(
                request, rows_to_put(request), planned, [0] * N, even + C
            )
            if runs is None:
                said = f"the requests of {timestamp} ms need more than {N * S} segments"
                raise ValueError(f"{said}; more --capacity-tokens are expected")
            away = [run for run in runs if run.puts and run.preferred != run.slot // S]
            self.put_tokens += sum(run.rows for run in away)
        for request in requests:
            balancer.commit(request, rows_to_put(request))
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


def answer(line: TraceLine):
    """What the model would have answered, if a later turn repeats it: tokens that no other has."""
    if line.is_continued:
        token = NumberedTokens.of_answer(line.index)
        line.request.tokens = [*line.request.tokens, *[token] * line.output_length]


def rows_to_put(request) -> int:
    """All that is not there yet, but for the last token of an answer: it is never computed."""
    return request.remaining - (len(request.tokens) > request.num_prompt)


def replay(
    lines: list[TraceLine],
    balancer: Balancer,
    tokens: NumberedTokens,
    kv_bytes: int = KV_BYTES,
) -> dict:
    """Load: tokens of cache read at an instance; its CV is the mean over windows; bytes are those
    that cross instances."""
    run = Replay(balancer)
    due = [(line.timestamp, line.index) for line in lines if not line.previous]
    while due:
        now = due[0][0]
        arrived = []
        while due and due[0][0] == now:
            _, index = heapq.heappop(due)
            line = lines[index]
            line.arrive(tokens)
            if previous := line.leave():
                previous.request = None
            arrived.append(line)
        run.iterate(now, arrived)
        for line in arrived:
            for turn in line.next_turns:
                heapq.heappush(due, (max(turn.timestamp, now + turn.think_ms), turn.index))
            if not line.is_continued:
                line.request = None
    return dict(
        hit_rate=run.hit_tokens / run.prompt_tokens,
        cache_load_cv=variation(run.windows.values()),
        replicas_max=balancer.replicas_max,
        replica_segments=len(balancer.tree.extras),
        put_bytes=run.put_tokens * kv_bytes,
        replica_bytes=balancer.copies * balancer.segment_tokens * kv_bytes,
        plan_ms_median=float(np.median(run.milliseconds)),
        iterations=len(run.milliseconds),
    )


def make_parser() -> Parser:
    description = "Replay a trace, planning only. Without options: a small scene, step by step."
    parser = Parser("balancer.py", description=description)
    add = parser.add_argument
    trace = "a request per line, as JSON (README: Traces)"
    add("--trace", type=file_name, required=True, metavar="FILE", help=trace)
    add_trace_form(parser)
    instances = number(int, 1, 1024)
    add("--instances", type=instances, default=8, metavar="N", help="default 8")
    add(
        "--placement", choices=("stripe", "hash"), default="stripe", help="default stripe"
    )
    add(
        "--replicate-factor",
        type=number(float, 0, 1e6),
        default=3.0,
        metavar="c",
        help="c·N·ln N of N instances' most read segments may be copied; 0: none; default 3",
    )
    segment = number(int, 1, 2**40)
    add("--segment-tokens", type=segment, default=512, metavar="C", help="default 512")
    capacity = "of the whole pool; default: all fits"
    add("--capacity-tokens", type=number(int, 1, 2**40), metavar="T", help=capacity)
    add("--json", action="store_true", help="print one JSON object")
    return parser


def count_slots(options, lines: list[TraceLine]) -> int:
    """Of an instance: as many as --capacity-tokens fill, or as all prompts and the answers that
    are put would twice. Raises ValueError if there are none, or too many."""
    N = options.instances
    C = options.segment_tokens
    check_tokens(lines)
    if options.capacity_tokens is None:
        longest = [x.total if x.is_continued else x.input_length for x in lines]
        slots = -(-2 * sum(-(-tokens // C) for tokens in longest) // N)
    else:
        slots = options.capacity_tokens // (N * C)
    if slots == 0:
        said = f"{N * C} at least, a segment per instance, are expected"
        raise ValueError(f"--capacity-tokens {options.capacity_tokens}: {said}")
    check_segments(N * slots)
    return slots


# What is counted, in words.
MEANINGS = {
    "hit_rate": "of prompt tokens, whose KV was in the pool",
    "cache_load_cv": "of tokens of cache read per instance, mean over windows of 10 s; 0: even",
    "replicas_max": "of one segment, at most",
    "replica_segments": "slots that hold copies, at the end",
    "put_bytes": "of new KV that is computed where it does not live",
    "replica_bytes": "of copies",
    "plan_ms_median": "to plan an iteration, milliseconds",
    "iterations": "planned: the requests of one time each",
}


def show(result: dict, options, num_requests: int) -> str:
    """A table with a header."""
    capacity = options.capacity_tokens
    room = "room for all" if capacity is None else f"room for {capacity:,} tokens"
    name = wording().one_line(options.trace)
    header = (
        f"{name}: {num_requests:,} requests, planned on {options.instances} instances "
        f"with {room} in segments of {options.segment_tokens};\nhomes by {options.placement}, "
        f"replicate factor {options.replicate_factor:g}; a token is taken for {KV_BYTES:,} bytes "
        "(Llama-3.1-8B in 16 bits)"
    )
    rows = [header]
    for key, value in result.items():
        number = "–" if value is None else format(value, ",.4g")
        rows.append(f"{key:>16}  {number:>11}  {MEANINGS[key]}")
    return "\n".join(rows)


def main(arguments: list[str]):
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        form = TraceForm.of(options)
        lines = open_trace("--trace", options.trace, form, warn=warn)
        slots = count_slots(options, lines)
        warn_of_long_segments(lines, form, options.segment_tokens, warn)
        balancer = Balancer(
            options.instances,
            slots,
            options.segment_tokens,
            options.placement,
            options.replicate_factor,
        )
        result = replay(lines, balancer, NumberedTokens(form.block))
    except ValueError as error:
        parser.refuse(error)
    print(json.dumps(result) if options.json else show(result, options, len(lines)))


if __name__ == "__main__":
    run_main(main)
