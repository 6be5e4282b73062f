"""How long would it take? Scheduler and balancer as they are, a roofline in place of the tensors.

    python bench/simulate.py --workload loogle --policy tokenlake --instances 4 --rate 2
    python bench/simulate.py --table        # even split, DP and fixed PD, side by side
    python bench/simulate.py --validate     # measured against simulated iterations, on this machine

Every lake has its own clock, and one heap holds what happens next: a request arrives, an iteration
ends, a transfer lands. So TokenLake is simulated in lock-step, as it is built, and lakes of one
(baselines.py) are not. An iteration lasts as long as its slowest instance:

    max(2·P·rows / F, weights / B) + 4·L·H·D·rows·tokens / F     F: 0.6 of peak, B: 0.8 of peak
    or what it sends over its link, if that takes longer; + α per exchange and layer

where a token is read once for all rows that meet there: few rows wait for memory, and weigh as many
as that takes; α = 10 µs. A TP
group adds two all-reduces per layer. Planning is not in it: see bench/plan.py. `demo` is what
run_cluster.py serves without options; any other name that is no load is a trace's file.
"""

import argparse
import heapq
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import count, groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import run_cluster  # noqa: E402
from balancer import variation  # noqa: E402
from baselines import VARIANTS, make_fleet  # noqa: E402
from drawing import cell  # noqa: E402
from model import LlamaConfig, shown  # noqa: E402
from options import (  # noqa: E402
    Parser,
    add_trace_form,
    check_segments,
    check_tokens,
    file_name,
    number,
    run_main,
    warn,
)
from replay import WINDOW_MS  # noqa: E402
from pool import LakeConfig  # noqa: E402
from results import (  # noqa: E402
    Totals,
    command_line,
    plain,
    summarise_environment,
    summarise_totals,
)
from traces import (  # noqa: E402
    NumberedTokens,
    TraceForm,
    demo_trace,
    open_trace,
    read_trace,
)
from workloads import WORKLOADS, generate  # noqa: E402

MODELS = {
    "tiny": LlamaConfig(),
    "lwm-7b": LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
    ),
}


class GPU(NamedTuple):
    flops: float  # 1/s in bf16
    bandwidth: float  # B/s of memory
    link: float  # B/s of NVLink, each way
    memory: float  # B


HARDWARE = {
    "a100": GPU(312e12, 2.04e12, 300e9, 80e9),
    "h100": GPU(989e12, 3.35e12, 450e9, 80e9),
    "h200": GPU(989e12, 4.8e12, 450e9, 141e9),
}
FLOPS_SHARE = 0.6  # of the peak that is reached
BANDWIDTH_SHARE = 0.8
ALPHA = 10e-6  # seconds of an exchange of nothing
REUSE = 16  # iterations at most that a plan is used again
DEFAULT_LOAD = "loogle"
# Rates per second, and tokens of cache, that a simulation may have.
RATE = number(float, 1e-6, 1e6)
TOKENS = number(int, 1, 2**40)
SLO = 10  # TTFT per input token and TPOT, times those of a request served alone


class Roofline:
    """Seconds that things take on instances of `tp` GPUs."""
    def __init__(self, model: LlamaConfig, hardware: str, tp: int = 1, itemsize: int = 2):
        gpu = HARDWARE[hardware]
        self.model = model
        self.flops = gpu.flops * tp * FLOPS_SHARE
        self.attention_flops = self.flops
        self.bandwidth = gpu.bandwidth * tp * BANDWIDTH_SHARE
        self.link = gpu.link * tp
        self.parameters = model.num_linear_parameters
        self.weights = self.parameters * itemsize / self.bandwidth  # seconds to read them
        # Rows that meet KV weigh as many as can attend while it is read, at least.
        flops_per_byte = self.flops / self.bandwidth
        ridge = flops_per_byte * model.num_kv_heads / model.num_heads * itemsize / 2
        self.ridge = max(1, round(ridge))
        # The two all-reduces of a layer: of a row, and of any number of rows.
        self.reduce_row = 4 * model.hidden_size * itemsize * (tp - 1) / tp / gpu.link
        self.reduce_latency = 2 * ALPHA if tp > 1 else 0.0
        self.token_bytes = (
            2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize
        )
        free_memory = 0.9 * gpu.memory * tp - itemsize * self.parameters
        self.capacity = int(free_memory / self.token_bytes)  # tokens

    def compute(self, rows, load):
        """Of rows with attention `load` (rows × tokens): an instance alone."""
        model = self.model
        linear = np.maximum(2 * self.parameters * rows / self.flops, self.weights)
        load_flops = 4 * model.num_layers * model.num_heads * model.head_dim * load
        attention = load_flops / self.attention_flops
        reduce = model.num_layers * (self.reduce_latency + self.reduce_row * rows)
        return linear + attention + reduce

    def iteration(self, features, query_plan, transfer_plan) -> np.ndarray:
        """[N] of an iteration at each instance, from TokenLake.features."""
        rows, load, sent_kib = features.T
        moves = len(transfer_plan.moves.kind) > 0
        pulls = len(query_plan.old.pulls.kind) > 0
        # Queries, and results back.
        exchanges = 2 * query_plan.ships.any() + moves + pulls
        sending = 1024 * sent_kib / self.link
        latency = exchanges * self.model.num_layers * ALPHA
        return np.maximum(self.compute(rows, load), sending) + latency

    def transfer(self, tokens: int) -> float:
        """Of KV between two instances."""
        return ALPHA + self.token_bytes * tokens / self.link

    def alone(self, prompt: int, answer: int, chunk: int = 1024) -> tuple[float, float]:
        """TTFT and TPOT of a request with so many tokens on an idle instance, without cache."""
        start = np.arange(0, prompt, chunk)
        rows = np.minimum(prompt - start, chunk)
        load = np.maximum(rows, self.ridge) * (start + rows / 2)
        ttft = self.compute(rows, load).sum()
        tpot = self.compute(1, self.ridge * (prompt + answer / 2))
        return float(ttft), float(tpot)


@dataclass
class Alone:
    """What gen_plans says of a lake of one, where nothing travels, in a fraction of its time."""
    runs: list
    features: np.ndarray  # [1, 3], see TokenLake.features
    reads: int  # tokens of old KV, once a request
    tokens_read: np.ndarray  # [1], see QueryPlan.tokens_read

    @property
    def local(self):
        return np.ones(len(self.runs), bool)

    @classmethod
    def of(cls, lake, batch):
        C = lake.config.segment_tokens
        requests = []
        by_request = []  # rows, tokens of old KV
        load = 0
        tokens = 0  # new KV
        for request, group in groupby(batch, attrgetter("request")):
            runs = list(group)
            requests.append(request)
            old = request.done + 1 - runs[0].puts
            by_request.append((sum(run.rows for run in runs), old))
            written = 0
            for run in runs:
                written += run.rows * run.puts
                load += run.rows * written  # new KV, up to itself
            tokens += written
        rows, old = np.array(by_request, np.int64).T
        num_shared, shared = lake.list_shared(requests)
        alone = old - C * num_shared
        together = np.bincount(shared.slot, rows[shared.share]).astype(np.int64)
        load += lake.weigh(rows) @ alone + C * lake.weigh(together).sum()
        tokens += alone.sum() + C * np.count_nonzero(together)
        features = np.array([[rows.sum(), load, 0]])
        return cls(batch, features, old.sum(), np.array([tokens]))


class Traffic(NamedTuple):
    """Of an iteration of a lake of several."""
    sent_mib: float  # or received, by a mean instance
    fan_out: int  # instances that a row's query goes to, at most


class Iteration(NamedTuple):
    """An iteration of a lake, planned."""
    plan: object  # QueryPlan or Alone
    seconds: np.ndarray  # [N] at each of its instances
    traffic: Traffic | None = None


class Simulation:
    """Serves the checked lines of a trace on a fleet without tensors."""
    def __init__(
        self,
        fleet,
        lines,
        roofline: Roofline,
        block: int = TraceForm().block,
        speed: float = 1.0,
    ):
        self.fleet = fleet
        self.lines = lines
        self.roofline = roofline
        self.tokens = NumberedTokens(block)
        self.speed = speed  # of the trace's clock; users think as long as ever
        self.num_instances = sum(len(lake.instances) for lake in fleet.lakes)
        self.now = 0.0  # seconds, as all times here
        self.events = []  # heap of (time, number, action, arguments)
        self.event_number = count()
        # By lake.
        self.computing = [False] * len(fleet.lakes)
        self.last_iteration = [None] * len(fleet.lakes)
        self.reuses_left = [0] * len(fleet.lakes)  # see `steady`
        # By request id.
        self.arrived = {}
        self.num_prompt = {}  # tokens; a turn's are fewer if the one before was refused
        self.allowed = {}  # [2] TTFT and TPOT that keep the SLO
        self.times = {}  # a list: of its tokens
        self.missed = set()  # who has missed the SLO
        self.deadlines = []  # heap of (time, request id): when a first token is due
        self.kept = 0  # requests that kept the SLO
        self.refused = 0  # requests that are too long
        self.iterations = 0  # of any lake
        # Of iterations: a mean instance's, the slowest one's.
        self.work_seconds = np.zeros(2)
        self.tokens_read = 0  # of KV, in every layer
        self.window_reads = {}  # by window of the CV: [instances] tokens of cache
        self.planning_ms = []  # of plans that lakes of several made
        self.traffic = []  # by iteration of such a lake
        fleet.bandwidth = roofline.link
        for lake in fleet.lakes:
            lake.ridge = roofline.ridge
        for line in lines:
            if not line.previous:
                self.call_at(self.due(line), self.arrive, line)

    def due(self, line) -> float:
        """The line's own time."""
        return line.timestamp / 1e3 / self.speed

    def call_at(self, time: float, action: Callable, *arguments):
        heapq.heappush(self.events, (time, next(self.event_number), action, arguments))

    def run(self, limit: int | None = None):
        """Until all is served, or more than `limit` requests have missed their SLO."""
        while self.events and (limit is None or len(self.missed) <= limit):
            self.now = self.events[0][0]
            self.check_deadlines()
            while self.events and self.events[0][0] == self.now:
                _, _, action, arguments = heapq.heappop(self.events)
                action(*arguments)
            for i, computing in enumerate(self.computing):
                if not computing:
                    self.start(i)
        return self

    def check_deadlines(self):
        """Who has no token in time has missed, so overload shows before it is served."""
        while self.deadlines and self.deadlines[0][0] < self.now:
            _, index = heapq.heappop(self.deadlines)
            if index not in self.times:
                self.missed.add(index)

    # Requests.

    def arrive(self, line):
        request = line.arrive(self.tokens)
        if previous := line.leave():
            previous.request = None
        self.arrived[line.index] = self.now
        self.num_prompt[line.index] = request.num_prompt
        alone = self.roofline.alone(request.num_prompt, line.output_length)
        self.allowed[line.index] = SLO * np.array(alone)
        allowed_ttft = self.allowed[line.index][0]
        heapq.heappush(self.deadlines, (self.now + allowed_ttft, line.index))
        if self.fleet.fits(request):
            self.send(self.fleet.arrive(request))
        else:
            self.refused += 1
            self.missed.add(line.index)
            self.leave(line)

    def served(self, line):
        if self.good(line):
            self.kept += 1
        else:
            self.missed.add(line.index)
        self.leave(line)

    def leave(self, line):
        """Lets the session's next turns come."""
        for turn in line.next_turns:
            due = max(self.due(turn), self.now + turn.think_ms / 1e3)
            self.call_at(due, self.arrive, turn)
        if not line.is_continued:
            line.request = None

    # Transfers.

    def send(self, transfers):
        for transfer in transfers:
            arrival = self.now + self.roofline.transfer(transfer.streamed)
            self.call_at(arrival, self.landed, transfer)

    def landed(self, transfer):
        self.fleet.landed(transfer)
        for i in range(len(self.fleet.lakes)):  # room there, room here
            self.send(self.fleet.advance(i))

    # Iterations.

    def start(self, i: int):
        """The next iteration of a lake that has requests."""
        lake = self.fleet.lakes[i]
        scheduler = self.fleet.schedulers[i]
        if not (scheduler.waiting or scheduler.running):
            return
        if not self.steady(i):
            self.last_iteration[i] = None
            batches, dops = scheduler.schedule()
            if not any(batches):
                return
            self.last_iteration[i] = self.plan_iteration(
                lake, scheduler.predictor, batches, dops
            )
            self.reuses_left[i] = REUSE
        plan, seconds, traffic = self.last_iteration[i]
        if traffic:
            self.traffic.append(traffic)
        slowest = seconds.max()
        self.work_seconds += seconds.mean(), slowest
        self.iterations += 1
        window = int(self.now * 1e3 // WINDOW_MS)
        if window not in self.window_reads:
            self.window_reads[window] = np.zeros(self.num_instances)
        self.window_reads[window][lake.instances] += plan.reads
        self.tokens_read += int(plan.tokens_read.sum())
        self.computing[i] = True
        self.call_at(self.now + slowest, self.finish, i)

    def plan_iteration(self, lake, predictor, batches, dops) -> Iteration:
        """A lake's next iteration; its scheduler's time model learns how long it takes."""
        traffic = None
        if len(lake.instances) == 1:
            plan = Alone.of(lake, batches[0])
            features = plan.features
            rows, load, _ = features.T
            seconds = self.roofline.compute(rows, load)
        else:
            started = time.perf_counter()
            plan, transfer_plan, _ = lake.gen_plans(batches, dops, lake.get_prefix_tree())
            self.planning_ms.append(1e3 * (time.perf_counter() - started))
            features = lake.features(plan, transfer_plan)
            seconds = self.roofline.iteration(features, plan, transfer_plan)
            sent_mib = features[:, 2].mean() / 1024
            traffic = Traffic(sent_mib, plan.ships.sum(1).max())
        predictor.measured(features, seconds.max())
        predictor.coefficients = predictor.fitted
        return Iteration(plan, seconds, traffic)

    def steady(self, i: int) -> bool:
        """Whether a lake's last plan still holds: the same decodes, in the same segments. It is
        used again a few times, as if no request had grown, which saves most of the planning."""
        scheduler = self.fleet.schedulers[i]
        self.reuses_left[i] -= 1
        if self.reuses_left[i] < 0 or scheduler.waiting or not self.last_iteration[i]:
            return False
        runs = self.last_iteration[i].plan.runs
        C = scheduler.balancer.segment_tokens
        return len(runs) == len(scheduler.running) and all(
            run.decode
            and run.request.num_slots
            and run.position // C == run.request.done // C
            for run in runs
        )

    def finish(self, i: int):
        """The end of a lake's iteration: tokens are there."""
        self.computing[i] = False
        plan = self.last_iteration[i].plan
        sampled = {}
        for run in plan.runs:
            if run.decode or run.samples:
                id = run.request.id
                sampled[id] = self.tokens.of_answer(id)
                self.times.setdefault(id, []).append(self.now)
        for request in self.fleet.schedulers[i].update(plan, sampled):
            self.served(self.lines[request.id])
        self.send(self.fleet.advance(i))

    # Results.

    def latency(self, index: int) -> tuple[float, float]:
        """TTFT and mean TPOT, in seconds."""
        times = self.times[index]
        first = times[0]
        gaps = max(1, len(times) - 1)
        return first - self.arrived[index], (times[-1] - first) / gaps

    def good(self, line) -> bool:
        """Whether it kept the SLO."""
        kept = self.latency(line.index) <= self.allowed[line.index]
        return bool(kept.all())

    def summary(self) -> dict:
        """Of what was served, by run_cluster.py's names; requests that were not have missed the
        SLO."""
        served = [line for line in self.lines if line.index in self.times]
        cached_tokens = self.fleet.cached_tokens
        totals = Totals()
        normalised = []  # ms to the first token, per token of the prompt
        for line in served:
            record = self.record(line, cached_tokens[line.index])
            totals.add(record, len(self.times[line.index]))
            normalised.append(record["ttft_ms"] / record["input_length"])
        return summarise_totals(totals, self.now) | dict(
            normalised_ttft=mean(normalised),
            slo_attainment=self.kept / len(self.lines),
            refused=self.refused / len(self.lines),
            cache_load_cv=variation(self.window_reads.values()),
            kv_bytes_read=self.tokens_read * self.roofline.token_bytes,
            iterations=self.iterations,
            idle_fraction=self.idle_fraction(),
            **self.planning(),
        )

    def record(self, line, cached_tokens: int) -> dict:
        """Of a request that was served, as requests.jsonl has them."""
        times = self.times[line.index]
        gaps = (1e3 * np.diff(times)).tolist()
        return dict(
            arrival_s=self.arrived[line.index],
            input_length=self.num_prompt[line.index],
            cached_tokens=cached_tokens,
            ttft_ms=1e3 * self.latency(line.index)[0],
            tpot_ms=mean(gaps),
            itl_ms=gaps,
        )

    def idle_fraction(self) -> float | None:
        """How long a mean instance waits for the slowest of its lake; None if all are alone."""
        computing, elapsed = self.work_seconds
        all_alone = 1 < len(self.fleet.lakes) == self.num_instances
        if all_alone or elapsed == 0:
            return None
        return float(1 - computing / elapsed)

    def planning(self) -> dict:
        """Of lakes of several: what planning took, and what a plan sends."""
        if not self.traffic:
            return dict(plan_ms_median=None, sent_mib=None, fan_out=None)
        sent_mib, fan_out = zip(*self.traffic)
        return dict(
            plan_ms_median=float(np.median(self.planning_ms)),
            sent_mib=mean(sent_mib),
            fan_out=int(max(fan_out)),
        )


def mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None


def load(
    name: str | Path,
    num_requests: int,
    rate: float,
    seed: int,
    form: TraceForm = TraceForm(),
    vocab: int = 512,
    warn=lambda said: None,
):
    """Checked lines of the demo, a generated load, or a trace's file, which has a form. warn is
    told of what is ignored."""
    if name == "demo":
        return read_trace(demo_trace(num_requests, vocab, seed), "demo")
    if name in WORKLOADS:
        generated = generate(name, num_requests, rate, seed)
        return read_trace(map(json.dumps, generated), name)
    option = "--trace" if isinstance(name, Path) else "--workload"
    if option == "--workload" and not os.path.exists(name):
        known = ", ".join(["demo", *WORKLOADS])
        said = f"no such load, and no such file; {known}, or a trace's file, is expected"
        raise ValueError(f"{option} {shown(name)}: {said}")
    if os.path.exists(name) and not os.path.isfile(name):
        said = "not a file that can be read twice; one is expected"
        raise ValueError(f"{option} {shown(str(name))}: {said}")
    return open_trace(option, name, form, num_requests, warn)


def segment_tokens(model_name: str) -> int:
    return 16 if model_name == "tiny" else 512


def most_slots(lines, C: int) -> int:
    """Of an instance: with more of them nothing changes, as it could hold all segments of the load
    twice, and any number of replicas. They are listed, which takes time."""
    return 2 * sum(-(-line.total // C) for line in lines) + 4096


def allowed_tpot(lines, roofline: Roofline) -> float:
    """ms between tokens with which 99 of 100 requests keep their SLO."""
    allowed = [
        SLO * 1e3 * roofline.alone(line.input_length, line.output_length)[1]
        for line in lines
    ]
    return np.percentile(allowed, 1)


def simulate(
    options,
    policy=None,
    rate=None,
    seed=None,
    limit=None,
    capacity=None,
) -> Simulation:
    """A run by the command line's options, but for what is given: rate in requests/s; capacity in
    tokens of cache, all instances together; limit: see Simulation.run."""
    rate = rate or options.rate
    seed = options.seed if seed is None else seed
    capacity = capacity or options.capacity_tokens
    N = options.instances
    C = segment_tokens(options.model)
    model = MODELS[options.model]
    form = TraceForm.of(options)
    lines = load(options.workload, options.num_requests, rate or 1.0, seed, form)
    config = LakeConfig(
        C,
        slots=min(capacity // (C * N), most_slots(lines, C)),
        chunk_tokens=options.chunk_tokens,
        max_batch=options.max_batch // N,
    )
    roofline = Roofline(model, options.hardware, options.tp)
    slo = options.tbt_slo_ms or allowed_tpot(lines, roofline)
    fleet = make_fleet(
        policy or options.policy, N, model, config, slo, dtype=torch.bfloat16
    )
    speed = 1.0
    if rate and options.workload not in ("demo", *WORKLOADS):
        speed = speed_of_rate(lines, rate)
    return Simulation(fleet, lines, roofline, form.block, speed).run(limit)


def speed_of_rate(lines, rate: float) -> float:
    """How much faster a file's times go if its requests come so often, per second: its sessions
    begin that often, divided by their turns. Raises ValueError if they all begin at once."""
    span_ms = max(line.timestamp for line in lines if not line.previous)
    if span_ms == 0:
        said = "the requests of the trace begin at once; times that differ are expected"
        raise ValueError(f"--rate {rate:g}: {said}")
    return rate * span_ms / (1e3 * len(lines))


def parser(description: str) -> Parser:
    """The options of a simulation."""
    command_line = Parser(description=description)
    add = command_line.add_argument
    add("--model", choices=MODELS, default="lwm-7b", help="default lwm-7b")
    add("--hardware", choices=HARDWARE, default="a100", help="default a100")
    # Default, lowest and highest value.
    numbers = {
        "--instances": (4, 1, 1024),
        "--tp": (2, 1, 1024),
        "--num-requests": (300, 1, 10_000_000),
        "--seed": (0, 0, 2**63 - 1),
        "--chunk-tokens": (512, 1, 2**20),
        "--max-batch": (512, 1, 2**20),
    }
    for name, (default, lowest, highest) in numbers.items():
        kind = number(int, lowest, highest)
        add(name, type=kind, default=default, help=f"default {default}")
    add(
        "--capacity-tokens",
        type=TOKENS,
        metavar="T",
        help="of cache in all instances; "
        "default: what 90 %% of the GPUs' memory has room for beside the weights",
    )
    slo = "default: what 99 of 100 requests allow"
    add("--tbt-slo-ms", type=number(float, 1e-3, 1e9), help=slo)
    trace = "the load; with simulate.py --table: one of them, at its own times"
    add("--trace", type=file_name, metavar="FILE", help=trace)
    add(
        "--workload",
        type=file_name,
        help=f"demo, {', '.join(WORKLOADS)} (see bench/workloads.py), or a trace's file; "
        f"default {DEFAULT_LOAD}",
    )
    add_trace_form(command_line)
    return command_line


def check_capacity(options, name: str, tokens: int):
    """Raises ValueError if so much cache is too few segments, or too many."""
    C = segment_tokens(options.model)
    least = options.instances * C
    if tokens < least:
        said = f"{least} at least, a segment per instance, are expected"
        raise ValueError(f"{name} {tokens}: {said}")
    check_segments(tokens // C)


def choose_trace(options):
    """--trace is the load, but of a table, where it is one of several. Raises ValueError."""
    is_table = getattr(options, "table", False)
    if options.trace and options.workload and not is_table:
        said = "--workload has a load, too; one or the other is expected"
        raise ValueError(f"--trace {shown(options.trace)}: {said}")
    if options.trace:
        # As a file may be called like a generated load.
        options.trace = Path(options.trace)
    load_of_run = None if is_table else options.trace
    options.workload = options.workload or load_of_run or DEFAULT_LOAD


def check(options):
    """Raises ValueError naming the option, or the line of a trace. Fills in the capacity that the
    GPUs' memory has."""
    if options.capacity_tokens is None:
        roofline = Roofline(MODELS[options.model], options.hardware, options.tp)
        options.capacity_tokens = options.instances * roofline.capacity
    check_capacity(options, "--capacity-tokens", options.capacity_tokens)
    if options.max_batch < options.instances:
        raise ValueError(
            f"--max-batch {options.max_batch}: at least --instances is expected"
        )
    for name in dict.fromkeys([options.workload, options.trace]):
        if name and name not in ("demo", *WORKLOADS):
            check_trace(name, options)


def check_policy(option: str, name: str, num_instances: int):
    """Raises ValueError for a policy that there is not, or not of so many instances."""
    try:
        make_fleet(name, num_instances, MODELS["tiny"], LakeConfig())
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None


def check_trace(name: str, options):
    """Raises ValueError for a file's lines. This warns of them: a comparison reads it often."""
    lines = load(name, options.num_requests, 1.0, 0, TraceForm.of(options), warn=warn)
    check_tokens(lines)
    if name == options.workload:
        options.num_requests = len(lines)


def header(options) -> str:
    """What is simulated, in a line or two."""
    N = options.instances
    C = segment_tokens(options.model)
    gpu = options.hardware.upper()
    return (
        f"simulated: {N} instances of {options.tp} {gpu}, {options.model} in 16 bits, "
        f"{options.capacity_tokens:,} tokens of cache in segments of {C};\n"
        f"  iterations of {options.chunk_tokens:,} prompt rows per instance and "
        f"{options.max_batch:,} requests at most; the first {options.num_requests:,} requests"
    )


def table(options):
    """Even split, DP and fixed PD on the pool, side by side."""
    N = options.instances
    rate = options.rate or 1.0
    loads = [
        dict(workload="demo", rate=None, model="tiny"),
        dict(workload="loogle", rate=rate),
        dict(workload="sharegpt", rate=6 * rate),
    ]
    if options.trace:
        loads.append(dict(workload=options.trace, rate=None))
    schedulers = ["even", "dp"]
    for prefills in sorted({1, N // 2, N - 1} & set(range(1, N))):
        schedulers.append(f"pd:{prefills}x{N - prefills}")
    if not options.json:
        print(f"{header(options)}; the demo: the tiny model, in segments of 16")
        print(
            f"{'load':>12} {'scheduler':>10} {'duration s':>10} {'TTFT ms':>10} {'p90 ms':>10} "
            f"{'TPOT ms':>8} {'p99 ITL':>8} {'idle':>6} {'hits':>6}"
        )
    for load_options in loads:
        run_options = argparse.Namespace(**(vars(options) | load_options))
        name = Path(run_options.workload).stem
        for scheduler in schedulers:
            summary = simulate(run_options, f"tokenlake:{scheduler}").summary()
            row = dict(load=name, rate=run_options.rate, scheduler=scheduler, **summary)
            print(json.dumps(row) if options.json else format_row(row), flush=True)


def format_row(row: dict) -> str:
    """A row of the table; a dash for what nobody has, as where all answers are one token."""
    cells = [
        f"{row['load'][:12]:>12} {row['scheduler']:>10}",
        f"{cell(row['duration'], '.3f'):>10}",
        f"{cell(row['mean_ttft_ms'], ',.2f'):>10} {cell(row['p90_ttft_ms'], ',.2f'):>10}",
        f"{cell(row['mean_tpot_ms'], '.3f'):>8} {cell(row['p99_itl_ms'], '.2f'):>8}",
        f"{cell(row['idle_fraction'], '.1%'):>6} {cell(row['hit_rate'], '.1%'):>6}",
    ]
    return " ".join(cells)


FEWEST_SAMPLES = 10  # that `validate` fits: half of them tell whether the others fit
# What `validate` fits: attributes of a Roofline, and where the search begins.
FITTED = {
    "flops": 1e10,
    "attention_flops": 1e9,
    "weights": 1e-3,
    "link": 1e9,
    "reduce_latency": 1e-3,
}


def predict(machine: Roofline, logs, work) -> np.ndarray:
    """Seconds [iterations] of work [3, iterations] (TokenLake.features) on a machine whose
    constants have the logarithms `logs`."""
    rows, load, sent_kib = work
    vars(machine).update(zip(FITTED, np.exp(logs)))
    return np.maximum(machine.compute(rows, load), 1024 * sent_kib / machine.link)


def fit(machine: Roofline, work, seconds) -> np.ndarray:
    """Logarithms of the constants with the least mean error, from three starts."""

    def error(logs):
        return np.abs(np.log(predict(machine, logs, work) / seconds)).mean()

    fits = []
    for shift in (0, 1, -1):
        start = np.log([*FITTED.values()]) + shift
        fits.append(
            minimize(error, start, method="Nelder-Mead", options=dict(maxiter=5000))
        )
    return min(fits, key=attrgetter("fun")).x


def validate(arguments: list[str]):
    """Serves a trace with run_cluster.py on these ranks, fits the roofline's constants to every
    second iteration, and says how well it gives the others: how many these were, the correlation,
    the median of relative errors, and the 5th, 50th and 95th percentile of their seconds."""
    samples = []

    def watch(server, finished):
        predictor = server.scheduler.predictor
        if predictor.samples and len(samples) < predictor.count:
            samples.append(predictor.samples[-1])

    with redirect_stdout(sys.stderr):  # what is printed here is JSON
        status = run_cluster.run(["--no-verify", *arguments], watch)
    rank = int(os.environ.get("RANK", 0))
    if status or rank > 0:
        return status
    if len(samples) < FEWEST_SAMPLES:
        said = f"{len(samples)} iterations were measured; {FEWEST_SAMPLES} are expected"
        print(f"simulate.py: --validate: {said} (more requests)", file=sys.stderr)
        return 2
    _, rows, load, sent_kib, seconds = np.array(samples).T
    work = np.stack((rows, load, sent_kib))
    machine = Roofline(LlamaConfig(), "a100", tp=1, itemsize=4)
    logs = fit(machine, work[:, ::2], seconds[::2])
    predicted = predict(machine, logs, work[:, 1::2])
    measured = seconds[1::2]
    result = dict(
        iterations=len(measured),
        correlation=float(np.corrcoef(predicted, measured)[0, 1]),
        median_error=float(np.median(np.abs(predicted / measured - 1))),
        seconds=[float(np.percentile(measured, p)) for p in (5, 50, 95)],
    )
    print(json.dumps(result, indent=1))
    return 0


def make_parser() -> Parser:
    command_line = parser("Simulate a fleet.")
    add = command_line.add_argument
    add(
        "--policy",
        default="tokenlake",
        help=f"{', '.join(VARIANTS)}, tokenlake:SCHEDULER, lakes:KxM, router, pd:PxD, "
        "each also with :fcfs",
    )
    add("--rate", type=RATE, help="requests per second; default: 1, a trace's own")
    add(
        "--table",
        action="store_true",
        help="every scheduler on the demo and generated loads",
    )
    add("--json", action="store_true", help="with --table: a JSON object per row")
    add(
        "--validate",
        action="store_true",
        help="fit it to this machine and compare; all other "
        "options are then those of run_cluster.py",
    )
    return command_line


def run_one(options):
    """A simulation: its summary, and above that, for people, what it is of."""
    check_policy("--policy", options.policy, options.instances)
    if options.workload == "demo" and options.rate:
        raise ValueError(f"--rate {options.rate:g}: the demo has times of its own")
    own = "at 1/s" if options.workload in WORKLOADS else "at its own times"
    rate = f"at {options.rate:g}/s" if options.rate else own
    said = f"{header(options)} of {options.workload} {rate}, {options.policy}"
    print(said, file=sys.stderr, flush=True)
    summary = simulate(options).summary()
    summary["config"] = {key: plain(value) for key, value in vars(options).items()}
    summary["environment"] = summarise_environment(command_line("bench/simulate.py"))
    print(json.dumps(summary, indent=1))


def main(arguments: list[str]) -> int:
    if "--validate" in arguments:
        return validate([x for x in arguments if x != "--validate"])
    command_line = make_parser()
    options = command_line.parse_args(arguments)
    try:
        choose_trace(options)
        check(options)
        if options.table:
            table(options)
        else:
            run_one(options)
    except BrokenPipeError:
        raise  # see run_main
    except (OSError, ValueError) as error:
        command_line.refuse(error)
    return 0


if __name__ == "__main__":
    run_main(main)
