"""Serves a trace on a TokenLake: `torchrun --standalone --nproc-per-node=4 run_cluster.py`.

    trace ─▶ requests ─▶ Scheduler ─▶ gen_plans ─▶ Llama.forward with attend = put, query ─▶ tokens
                 ▲                                                                            │
                 └──────────── finished: next turn of the session, requests.jsonl ◀───────────┘

Every rank runs this loop over the same trace; rank 0 owns clock, progress bar and output. Each
computes the rows the plan gives it, and the sampled tokens cross at the end of an iteration.
"""

import argparse
import contextlib
import heapq
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from balancer import TRACE_BLOCK, Request, TraceLine, read_trace, variation
from kernels import ranges, select, starts, to_device
from model import (
    Llama,
    LlamaConfig,
    Sampler,
    cut,
    load_config,
    load_weights,
    one_line,
    random_weights,
    require,
    shown,
)
from pool import Cluster, LakeConfig, LakeError, SetupError, Stopped, plan_digest
from tokenlake import Policy, Scheduler, TokenLake

CV_WINDOW = 32  # iterations
STATISTICS = ("mean", "median", "p90", "p99")  # of times
# A served token passes --verify if its score is this close to the best: by so much rounding may
# change a score of the built-in model.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.4,
}
DTYPES = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
OUTPUTS = ("requests.jsonl", "summary.json", "profile.json.gz")


# ── options ──────────────────────────────────────────────────────────────────────────────────────


class OptionType(NamedTuple):
    """How the value of an option is made of its text, what it must be, and the same in words."""
    convert: Callable
    allows: Callable
    expected: str

    def __call__(self, text):
        with contextlib.suppress(ValueError):
            value = self.convert(text)
            if self.allows(value):
                return value
        said = f"{shown(text)}: {self.expected} is expected"
        raise argparse.ArgumentTypeError(said)


def _is_path(path) -> bool:
    """Whether a file can have the name. ValueError where its characters have no bytes."""
    name = os.fsencode(path)
    return path != Path() and len(name) < 4096 and b"\0" not in name


def one_of(*names) -> OptionType:
    return OptionType(str, names.__contains__, "one of " + ", ".join(names))


PATH = OptionType(Path, _is_path, "a path")
COUNT = OptionType(int, lambda x: 0 < x < 2**48, "a positive integer below 2**48")
NATURAL = OptionType(int, lambda x: 0 <= x < 2**63, "an integer from 0 to 2**63 - 1")
DIVISOR = OptionType(
    int, lambda x: x > 0 and TRACE_BLOCK % x == 0, f"a divisor of {TRACE_BLOCK}"
)
UP_TO_A_MILLION = OptionType(float, lambda x: 0 <= x <= 1e6, "a number from 0 to 1e6")
POSITIVE = OptionType(float, lambda x: x >= 1e-6, "a positive number")  # or inf
SECONDS = OptionType(float, lambda x: 1 <= x < 1e9, "a number from 1")
POLICY = OptionType(
    str,
    re.compile(r"auto|even|dp|pd:[1-9]\d{0,3}x[1-9]\d{0,3}").fullmatch,
    "auto, even, dp or pd:PxD",
)
FLAG = None  # given or not
CHOICES = None  # --help names them

# fmt: off
# Name, type, what a value is called in --help, help, default.
OPTIONS = [
    ("--trace", PATH, "FILE", "JSON lines; default: a multi-turn demo", None),
    ("--num-requests", COUNT, "K", "serve the first K lines (demo: 48)", None),
    ("--seed", NATURAL, "N", "of the weights, the demo, a trace's tokens, and sampling", 0),
    ("--trace-scale", DIVISOR, "F", "divide a trace's lengths and its 512-token block by F", None),
    ("--model", PATH, "DIR", "Hugging Face folder of a Llama", None),
    ("--random-weights", FLAG, None, "with --model: read config.json alone", False),
    ("--dtype", one_of(*DTYPES), CHOICES, "default: float32; on a GPU what --model says", None),
    ("--device", one_of("auto", "cpu", "cuda"), CHOICES, "default: a GPU if any", "auto"),
    ("--temperature", UP_TO_A_MILLION, "T", "0 (the default) is greedy", 0.0),
    ("--stop-at-eos", FLAG, None, "the model's end token ends a request early", False),
    ("--segment-tokens", COUNT, "C", "default: 16; --model on a GPU: 512", None),
    ("--slots", COUNT, "S", "segments per instance; default: half the memory (CPU: 32k)", None),
    ("--placement", one_of("stripe", "hash"), CHOICES, "homes of segments", "stripe"),
    ("--replicate-factor", UP_TO_A_MILLION, "c", "of c·N·ln N hot segments (3; 0: none)", 3.0),
    ("--pull-tokens", NATURAL, "T", "of old KV that an instance pulls an iteration (16384)", 16384),
    ("--chunk-tokens", COUNT, "T", "prompt rows per instance and iteration (4 segments)", None),
    ("--max-batch", COUNT, "R", "running requests in the whole lake (default 32)", 32),
    ("--scheduler", POLICY, "NAME", "auto (even split), even, dp (§6.2) or pd:PxD", "auto"),
    ("--tbt-slo-ms", POSITIVE, "MS", "time between tokens to keep, by fewer prompt rows", None),
    ("--speed", POSITIVE, "X", "arrivals and think times X times faster; inf: all at once", 1.0),
    ("--timeout", SECONDS, "SECONDS", "after which a silent rank counts as lost (300)", 300.0),
    ("--output", PATH, "DIR", "write requests.jsonl and summary.json", None),
]
# fmt: on


def refuse_options(message):
    """Raises ValueError with argparse's message, which quotes arguments of any length."""
    words = message.removeprefix("argument ").split(" ")
    require(False, cut(" ".join(map(cut, words)), 200))


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError naming the option."""
    parser = argparse.ArgumentParser(
        "run_cluster.py", description="Serve a trace on a pool."
    )
    parser.error = refuse_options
    add = parser.add_argument
    for name, type, metavar, help, default in OPTIONS:
        if type is FLAG:
            add(name, action="store_true", help=help)
        else:
            metavar = metavar or "{" + type.expected.removeprefix("one of ") + "}"
            add(name, type=type, metavar=metavar, help=help, default=default)
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="recompute every answer without a cache; default: for the built-in demo",
    )
    add(
        "--profile",
        type=NATURAL,
        metavar="K",
        nargs="?",
        const=0,
        help="with --output: rank 0 writes profile.json.gz, of 8 iterations after K (0)",
    )
    for text in arguments:
        # argparse takes that for no value at all.
        require(not re.fullmatch("--[^=]+=--", text), f"{cut(text)}: a value is expected")
    options = parser.parse_args(arguments)
    require(
        options.model or not options.random_weights,
        "--random-weights needs --model DIR (the built-in model is random)",
    )
    require(options.trace or not options.trace_scale, "--trace-scale needs --trace FILE")
    require(options.output or options.profile is None, "--profile needs --output DIR")
    if options.verify is None:
        options.verify = not (options.trace or options.model)
    return options


# ── set-up: what the user gave is checked, and made ──────────────────────────────────────────────


def demo_trace(num_requests, vocab_size, seed):
    """Sessions of three turns behind three system prompts, some more popular than others."""
    rng = np.random.default_rng((seed, 1))
    start = 0.0
    systems = [rng.integers(vocab_size, size=n).tolist() for n in (208, 144, 96)]
    for index in range(num_requests):
        ids = rng.integers(vocab_size, size=rng.integers(24, 72)).tolist()
        if index % 3 == 0:
            start += rng.exponential(100)
            ids = systems[rng.choice(3, p=(0.6, 0.3, 0.1))] + ids
        line = dict(
            timestamp=round(start, 1),
            session_id=index // 3,
            input_ids=ids,
            output_length=int(rng.integers(8, 25)),
            think_ms=100,
        )
        yield json.dumps(line)


def prepare(options, cluster, device, memory):
    """Checks what the user gave → (lines, LakeConfig, Llama). memory: bytes of the smallest device.
    (`said`, here and elsewhere: the message if what follows is not so.)"""
    for name in OUTPUTS:
        exists = options.output and os.path.exists(options.output / name)
        said = f"already holds {name}; a new folder is expected"
        require(not exists, f"--output {options.output}: {said}")
    config = load_config(options.model) if options.model else LlamaConfig()
    said = "--stop-at-eos: the model's config.json has no eos_token_id"
    require(config.eos_token_ids or not options.stop_at_eos, said)
    lines = open_trace(options, config, warn if cluster.rank == 0 else None)
    check_policy(options.scheduler, cluster.size)
    dtype = choose_dtype(options, config, device)
    check_weights(options, config, dtype, device, cluster, memory)
    lake_config = size_lake(options, config, dtype, device, cluster, memory)
    check_lines(lines, config, lake_config, cluster.size)
    if options.model and not options.random_weights:
        weights = load_weights(options.model, config, dtype, device)
    else:
        weights = random_weights(config, options.seed, dtype, device)
    return lines, lake_config, Llama(config, weights)


def warn(said):
    """Of what is ignored."""
    print(f"run_cluster.py: {one_line(said)}", file=sys.stderr, flush=True)


def open_trace(options, config, warn) -> list[TraceLine]:
    scale = options.trace_scale or 1
    if not options.trace:
        demo = demo_trace(options.num_requests or 48, config.vocab_size, options.seed)
        return read_trace(demo, "demo")
    try:
        with open(options.trace, "rb") as file:
            name = str(options.trace)
            return read_trace(file, name, scale, options.num_requests, warn)
    except OSError as error:
        raise ValueError(f"--trace {options.trace}: {error.strerror}") from None


def check_policy(name, num_ranks):
    policy = Policy.parse(name)
    wanted = policy.prefills + policy.decodes or num_ranks
    said = f"{wanted} instances, there are {num_ranks}; as many are expected"
    require(wanted == num_ranks, f"--scheduler {name}: {said}")


def choose_dtype(options, config, device) -> torch.dtype:
    usual = config.dtype if options.model and device.type == "cuda" else "float32"
    name = options.dtype or usual
    said = f"config.json says {shown(name)}; one of {DTYPES} is expected"
    require(name in DTYPES, f"--dtype: {said}")
    return getattr(torch, name)


def check_weights(options, config, dtype, device, cluster, memory):
    """Raises ValueError if a device is too small for the weights of all its ranks."""
    sharing = cluster.ranks_per_device(device)
    needed = sharing * config.num_parameters * dtype.itemsize
    said = f"the weights of {sharing} ranks need {needed:,} bytes on {device}"
    require(needed <= memory, f"--model {options.model}: {said}, {memory:,} are there")


def size_lake(options, config, dtype, device, cluster, memory):
    """The LakeConfig, with as many slots as are wanted or as there is room for."""
    on_gpu = device.type == "cuda"
    C = options.segment_tokens or (512 if options.model and on_gpu else 16)
    said = f"no more than the model's {config.max_positions} positions is expected"
    require(C <= config.max_positions, f"--segment-tokens {C}: {said}")
    lake_config = LakeConfig(
        segment_tokens=C,
        placement=options.placement,
        replicate_factor=options.replicate_factor,
        pull_tokens=options.pull_tokens,
        chunk_tokens=options.chunk_tokens or 4 * C,
        max_batch=options.max_batch,
    )
    head_bytes = config.head_dim * dtype.itemsize
    row_bytes = 2 * config.num_layers * config.num_kv_heads * head_bytes
    staging_bytes = lake_config.staging(cluster.size) * row_bytes
    sharing = cluster.ranks_per_device(device)
    half = memory // sharing // 2
    room = memory // sharing - config.num_parameters * dtype.itemsize
    # By default half is left for weights and activations, and a CPU holds 32k tokens at most.
    slots = max(1, (min(half, room) - staging_bytes) // (C * row_bytes))
    if not on_gpu:
        slots = min(slots, -(-32_768 // C))
    slots = options.slots or slots
    slab_bytes = slots * C * row_bytes + staging_bytes
    require(
        slab_bytes <= room,
        f"--slots {slots} of {C} tokens, with staging for --chunk-tokens and --max-batch: "
        f"{sharing} ranks need {sharing * slab_bytes:,} bytes on {device}, "
        f"{sharing * room:,} are there beside the weights",
    )
    return replace(lake_config, slots=slots)


def check_lines(lines, config, lake_config, num_ranks):
    """Raises ValueError for a token that is not in the vocabulary, and for a request that is longer
    than the model's positions or than the pool."""
    V = config.vocab_size
    for line in lines:
        highest = max(line.input_ids or [0])
        said = f"input_ids has the token {highest}; ids below the vocabulary's {V} are expected"
        require(highest < V, f"{line.where}: {said}")
    longest = max(lines, key=lambda line: line.total)
    said = f"prompt and answer are {longest.total} tokens, the model has {config.max_positions}"
    said += " positions (--trace-scale makes a trace smaller)"
    require(longest.total <= config.max_positions, f"{longest.where}: {said}")
    # The last token takes no room: it is never fed to the model.
    needed = -(-(longest.total - 1) // lake_config.segment_tokens)
    there = lake_config.slots * num_ranks
    said = f"the request needs {needed} segments, the pool has {there}; more --slots are expected"
    require(needed <= there, f"{longest.where}: {said}")


def open_output(folder: Path | None, cluster):
    """requests.jsonl, new, on rank 0; elsewhere or without a folder what is written is dropped."""
    if folder is None or cluster.rank:
        return open(os.devnull, "w")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / "requests.jsonl", "x")
    except OSError as error:
        raise ValueError(f"--output {folder}: {error.strerror}") from None


# ── the engine ───────────────────────────────────────────────────────────────────────────────────


class EndOfIteration(NamedTuple):
    """What a rank says when an iteration is over. All take rank 0's clock and fit for theirs."""
    clock: int  # ns since the start
    fit: list[int]  # TimePredictor.fitted
    tokens: list[int]  # of each request that samples: 0 where another rank computes it

    @classmethod
    def gather(cls, cluster, mine) -> list:
        """Every rank's, by rank."""
        every = cluster.gather_integers([mine.clock, *mine.fit, *mine.tokens])
        end = 1 + len(mine.fit)
        return [cls(values[0], values[1:end], values[end:]) for values in every]


@dataclass
class Engine:
    """One rank of the compute engine (Fig. 5): the loop body of every rank of the cluster, also of
    one that is not in the lake. model, sampler: those of model.py, or what has their methods."""
    cluster: Cluster
    lake: TokenLake
    scheduler: Scheduler
    model: Llama
    sampler: Sampler
    clock: int = 0  # ns since the start, rank 0's on every rank
    iterations: int = 0
    stop: bool = False  # set by a signal
    profile: object = None  # see `profiler`
    reads: list = field(default_factory=list)  # per iteration: [N] cache tokens read

    def __post_init__(self):
        # Sums over iterations of the predicted time: the mean over instances, and the longest.
        self.busy = np.zeros(2)
        # A barrier: the clock starts when every rank is here.
        self.cluster.gather_objects(None)
        self.started = time.monotonic_ns()

    def step(self, pause=0.0):
        """One iteration: plan, agree, compute, exchange tokens, publish. With nothing to run it
        sleeps, `pause` seconds at most. Returns the sampled tokens by request id and the requests
        that ended. Raises LakeError, Stopped."""
        batches, groups, plan, transfer_plan = self._plan()
        digest = plan_digest(self.iterations, plan, transfer_plan)
        self.cluster.announce(digest, self.stop)
        tokens = {}
        if not plan.runs:  # signals are looked at in between
            time.sleep(max(0.0, min(0.05, pause)))
        elif self.lake.pool:
            tokens = self._compute(batches, groups, plan, transfer_plan)
        self.cluster.confirm()  # for ranks that have not computed: the others have done so there
        now = time.monotonic_ns() - self.started
        if plan.runs:
            self._measure(plan, transfer_plan, now)
        sampled = self._exchange_tokens(plan, tokens, now)
        return sampled, self.scheduler.update(plan, sampled)

    def _plan(self):
        try:
            batches, dops = self.scheduler.schedule()
            plan, transfer_plan, groups = self.lake.gen_plans(
                batches, dops, self.lake.get_prefix_tree()
            )
        except Exception:
            with contextlib.suppress(LakeError):  # the others stop too, and say so
                self.cluster.announce(bytes(16), self.stop, fault=True)
                self.cluster.confirm()
            raise
        return batches, groups, plan, transfer_plan

    def _compute(self, batches, groups, plan, transfer_plan):
        """This rank's rows through the model → the tokens that they give, by request id."""
        lake = self.lake
        # An instance computes rows of one batch at most.
        mine = (pair for pair in zip(batches, groups) if lake.index in pair[1])
        batch, group = next(mine, ([], []))
        q_buf = lake.init_query(batch, group, plan)
        kv_buf = lake.init_transfer(batch, transfer_plan)

        def attend(layer, q, k, v):
            # Before the first exchange of data; embedding and the first QKV hide the wait.
            self.cluster.confirm()
            kv_buf.write(layer, k, v)
            lake.put(kv_buf)
            q_buf.write(layer, q)
            return lake.query(q_buf)

        table = plan.run_table
        own = np.flatnonzero(table.instance == lake.index)
        sampling = own[plan.samples[own]].tolist()
        ids, positions, last_rows = to_device(
            [
                plan.token_ids[ranges(starts(table.rows)[own], table.rows[own])],
                ranges(table.position[own], table.rows[own]),
                (table.first_row + table.rows - 1)[sampling],
            ],
            lake.pool.device,
        )
        logits = self.model.forward(ids, positions, attend, last_rows)
        requests = [plan.runs[i].request for i in sampling]
        keys = [(request.id, len(request.tokens)) for request in requests]
        tokens = self.sampler.sample(logits, keys)
        return {request.id: token for request, token in zip(requests, tokens)}

    def _measure(self, plan, transfer_plan, now):
        """Counts the iteration. Rank 0 fits the time predictor to it, and the others receive its
        fit."""
        predictor = self.scheduler.predictor
        self.iterations += 1
        if self.profile:
            self.profile.step()
        self.reads.append(plan.reads)
        features = self.lake.features(plan, transfer_plan)
        times = predictor.time(*features.T)
        self.busy += times.mean(), times.max()
        if self.cluster.rank == 0:
            predictor.measured(features, (now - self.clock) / 1e9)

    def _exchange_tokens(self, plan, tokens, now):
        """The tokens of all requests that sample, from the ranks that computed them; with them
        come rank 0's clock and fit."""
        predictor = self.scheduler.predictor
        sampling = select(plan.run_table, plan.samples)
        ids = sampling.request_id.tolist()
        mine = [tokens.get(id, 0) for id in ids]
        end = EndOfIteration(now, predictor.fitted, mine)
        every = EndOfIteration.gather(self.cluster, end)
        self.clock = every[0].clock
        predictor.coefficients = every[0].fit
        ranks = [self.lake.instances[instance] for instance in sampling.instance]
        sampled = [every[rank].tokens[i] for i, rank in enumerate(ranks)]
        return dict(zip(ids, sampled))

    def verify(self, requests: list[Request], progress) -> dict[int, float]:
        """The gap in logits of each request (Llama.score_gap), each recomputed by one rank; after a
        signal, of those done by then."""
        gaps = {}
        size = self.cluster.size
        for start in range(0, len(requests), size):
            dealt = requests[start : start + size]
            for request in dealt[self.cluster.rank :][:1]:
                gaps[request.id] = self.model.score_gap(
                    self.sampler, request.tokens, request.num_prompt, request.id
                )
            progress(len(dealt))
            if any(stop for (stop,) in self.cluster.gather_integers([self.stop])):
                break
        parts = self.cluster.gather_objects(gaps)
        return {id: gap for part in parts for id, gap in part.items()}


def profiler(folder: Path, after):
    """Writes a profile of this rank for Perfetto: functions by name, operators, kernels. It covers
    eight iterations (a `step` ends one) after so many others: each takes megabytes, and a second to
    write."""
    return torch.profiler.profile(
        with_stack=True,
        schedule=torch.profiler.schedule(wait=after, warmup=0, active=8, repeat=1),
        on_trace_ready=lambda seen: seen.export_chrome_trace(f"{folder}/profile.json.gz"),
    )


class Server:
    """Serves a trace: sends requests when they are due, keeps their times and records."""
    def __init__(self, options, cluster, lines, lake_config, model):
        self.options = options
        self.cluster = cluster
        self.lines = lines
        self.model = model
        ranks = list(range(cluster.size))
        self.lake = TokenLake(
            ranks, model.config, lake_config, cluster, model.dtype, model.device
        )
        eos = model.config.eos_token_ids if options.stop_at_eos else ()
        self.scheduler = Scheduler(self.lake, eos, options.scheduler, options.tbt_slo_ms)
        sampler = Sampler(options.temperature, options.seed)
        self.engine = Engine(cluster, self.lake, self.scheduler, model, sampler)
        self.records = {}  # of finished requests, by request id
        # By request id: rank 0's ns since the start, of its arrival and its tokens.
        self.times = {}
        self.next_turn = {line.previous.index: line for line in lines if line.previous}
        # A heap of (time, request id): sorted, as the lines are.
        first_turns = [line for line in lines if not line.previous]
        self.arrivals = [
            (self.scaled_ns(line.timestamp), line.index) for line in first_turns
        ]

    def scaled_ns(self, trace_ms) -> int:
        return int(trace_ms * 1e6 / self.options.speed)

    def serve(self, file, bar, on_iteration):
        """Iterations until all is finished, and its records written. Raises LakeError, Stopped."""
        engine = self.engine
        arrivals = self.arrivals
        while arrivals or self.scheduler.waiting or self.scheduler.running:
            self._send_due()
            pause = (arrivals[0][0] - engine.clock) / 1e9 if arrivals else 0
            tokens, ended = engine.step(pause)
            for id in tokens:
                self.times[id].append(engine.clock)
            finished = [self._finish(request) for request in ended]
            for record in finished:
                print(json.dumps(record), file=file, flush=True)
            bar.update(len(finished))
            on_iteration(self, finished)

    def _send_due(self):
        block = TRACE_BLOCK // (self.options.trace_scale or 1)
        vocab_size = self.model.config.vocab_size
        while self.arrivals and self.arrivals[0][0] <= self.engine.clock:
            due, index = heapq.heappop(self.arrivals)
            self.times[index] = [due]
            request = self.lines[index].arrive(vocab_size, block, self.options.seed)
            self.scheduler.add(request)

    def _finish(self, request):
        """Its line of requests.jsonl; the session's next turn is due a while later."""
        turn = self.next_turn.get(request.id)
        if turn:
            thought = self.engine.clock + self.scaled_ns(turn.think_ms)
            due = max(self.scaled_ns(turn.timestamp), thought)
            heapq.heappush(self.arrivals, (due, turn.index))
        times = self.times[request.id]
        first, *intervals = (round((b - a) / 1e6, 3) for a, b in zip(times, times[1:]))
        record = dict(
            request_id=request.id,
            status="completed",
            arrival_s=times[0] / 1e9,
            input_length=request.num_prompt,
            cached_tokens=self.scheduler.cached_tokens[request.id],
            output_ids=request.tokens[request.num_prompt :],
            ttft_ms=first,
            tpot_ms=round(sum(intervals) / len(intervals), 3) if intervals else None,
            itl_ms=intervals,
            finished_s=times[-1] / 1e9,
        )
        self.records[request.id] = record
        return record


# ── the report ───────────────────────────────────────────────────────────────────────────────────


def ratio(part, whole):
    return part / whole if whole else None


def summarise_records(records: list[dict], clock) -> dict:
    """Of finished requests, as vLLM's and SGLang's serving benchmarks name it. clock [ns]."""
    inputs = sum(record["input_length"] for record in records)
    cached = sum(record["cached_tokens"] for record in records)
    outputs = sum(len(record["output_ids"]) for record in records)
    seconds = clock / 1e9 - min((record["arrival_s"] for record in records), default=0.0)
    seconds_if_any = seconds if records else None
    summary = dict(
        completed=len(records),
        duration=seconds,
        total_input_tokens=inputs,
        total_output_tokens=outputs,
        request_throughput=ratio(len(records), seconds_if_any),
        output_throughput=ratio(outputs, seconds_if_any),
        total_token_throughput=ratio(inputs + outputs, seconds_if_any),
        hit_rate=ratio(cached, inputs),
    )
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        values = [
            x for record in records for x in np.atleast_1d(record[name]) if x is not None
        ]
        statistics = [None] * len(STATISTICS)
        if values:
            statistics = [np.mean(values), *np.percentile(values, (50, 90, 99))]
        summary |= {f"{kind}_{name}": x for kind, x in zip(STATISTICS, statistics)}
    return summary


def reads_by_window(reads: list) -> list:
    """Cache tokens read per window of CV_WINDOW iterations; reads: per iteration, [N] each."""
    first_iterations = range(0, len(reads), CV_WINDOW)
    return [sum(reads[first : first + CV_WINDOW]) for first in first_iterations]


def sum_bytes(cluster, pool) -> dict[str, int]:
    """Bytes that left any rank, by kind. Collective."""
    bytes_of_ranks = cluster.gather_objects(pool.bytes)
    return {kind: sum(left[kind] for left in bytes_of_ranks) for kind in pool.bytes}


def summarise_pool(server) -> dict:
    """What the pool did: counters, bytes, balance. Collective."""
    engine = server.engine
    lake = server.lake
    counters = server.scheduler.counters
    windows = reads_by_window(engine.reads)
    # The last, shorter one counts only if there is no other.
    whole = len(engine.reads) // CV_WINDOW
    sent = [line.request for line in server.lines if line.request]
    longest = engine.busy[1]
    summary = dict(
        iterations=engine.iterations,
        computed_tokens=counters["computed_tokens"],
        recomputed_tokens=counters["recomputed_tokens"],
        asked_tokens=sum(request.peak for request in sent),
        preemptions=counters["preemptions"],
        evictions=lake.balancer.evictions,
        replicas_max=lake.balancer.replicas_max,
        puts_local=ratio(counters["puts_local"], counters["puts"]),
        decode_puts_local=ratio(counters["decode_puts_local"], counters["decode_puts"]),
        cache_reads=sum(engine.reads, np.zeros(server.cluster.size, np.int64)).tolist(),
        cache_load_cv=variation(windows[:whole] or windows),
        idle_fraction=ratio(np.ptp(engine.busy), longest),
    )
    moved = sum_bytes(server.cluster, lake.pool)
    return summary | {f"{kind}_bytes": count for kind, count in moved.items()}


def summarise_config(server) -> dict:
    """Every option and version, as they were."""
    values = vars(server.options) | vars(server.lake.config)
    values |= dict(
        ranks=server.cluster.size,
        torch=torch.__version__,
        device=server.model.device,
        dtype=str(server.model.dtype).removeprefix("torch."),
    )
    return {
        key: x if x is None or isinstance(x, int) else str(x) for key, x in values.items()
    }


def summarise(server, gaps: dict | None, wrong: list, error: str | None) -> dict:
    """summary.json. gaps: those of `verify`, by request id, None if it was not asked for."""
    summary = summarise_records(list(server.records.values()), server.engine.clock)
    summary |= summarise_pool(server)
    # NaN also if one of them is.
    gap = float(np.max([*gaps.values()])) if gaps else np.nan
    return summary | dict(
        verified=None if gaps is None else len(gaps) - len(wrong),
        max_logit_gap=None if np.isnan(gap) else gap,
        error=error,
        config=summarise_config(server),
    )


REPORT = """\
    requests  {completed} in {duration:.1f} s, {output_throughput:,.0f} output tokens/s
    hit rate  {hit_rate:.1%} of {total_input_tokens:,} prompt tokens
    computed  {computed_tokens:,} of {asked_tokens:,} tokens asked for ({recomputed_tokens:,} again)
  cache load  {shares} of reads per instance; CV within {window} iterations {cache_load_cv:.2f}
     TTFT ms  {ttft}
     TPOT ms  {tpot}
       moved  {moved} ({puts_local:.1%} of all new KV stayed)
    pressure  {evictions:,} evictions, {preemptions:,} preemptions"""
VERIFIED = "\n    verified  {verified}/{completed} "
EQUAL = "equal recomputation without a cache, token for token"
WITHIN = "within {max_logit_gap:.1e} logits of recomputation without a cache"
MOVED = {
    "query": "queries and results",
    "pull": "pulled KV",
    "put": "new KV",
    "replica": "replicas",
}


def format_report(summary: dict) -> str:
    """The report that ends a run, from its summary. What was not measured is a dash."""
    form = REPORT
    if summary["verified"] is not None:
        form += VERIFIED + (EQUAL if summary["max_logit_gap"] == 0 else WITHIN)
    reads = summary["cache_reads"]
    values = {key: np.nan if value is None else value for key, value in summary.items()}

    def times(name):
        return "  ".join(f"{kind} {values[f'{kind}_{name}']:,.0f}" for kind in STATISTICS)

    text = form.format(
        **values,
        shares="  ".join(f"{n / max(1, sum(reads)):.1%}" for n in reads),
        window=CV_WINDOW,
        moved=", ".join(
            f"{MOVED[k]} {values[f'{k}_bytes'] / 1e6:,.1f} MB" for k in MOVED
        ),
        ttft=times("ttft_ms"),
        tpot=times("tpot_ms"),
    )
    return text.replace("nan%", "–").replace("nan", "–")


# ── the program ──────────────────────────────────────────────────────────────────────────────────


def run(arguments: list[str], on_iteration=lambda server, finished: None) -> int:
    """The whole program on one rank; returns its exit status. One rank says what went wrong."""
    error = None
    cluster = Cluster(first_timeout(arguments))
    try:
        options = cluster.together(parse_options, arguments)
        set_threads(options, cluster)
        device, memory = cluster.together(cluster.find_device, options.device)
        memory = min(cluster.gather_objects(memory))
        prepared = cluster.together(prepare, options, cluster, device, memory)
        lines, lake_config, model = prepared
        # One number of each tensor tells most other weights.
        first_weights = [float(weight.flatten()[0]) for weight in model.weights.values()]
        made = vars(options), lines, lake_config, model.config, model.dtype, first_weights
        what = "options, another trace or another model"
        cluster.together(cluster.require_same, repr(made), what)
        server = Server(options, cluster, lines, lake_config, model)
        file = cluster.together(open_output, options.output, cluster)
        error = serve_and_report(server, file, on_iteration)
    except (SetupError, LakeError, KeyboardInterrupt) as problem:
        # An interrupt says nothing.
        error = problem if str(problem) else "stopped by a signal"
    finally:
        if error and cluster.speaks():
            print(f"run_cluster.py: {one_line(str(error))}", file=sys.stderr, flush=True)
        cluster.close()
    return 2 if isinstance(error, SetupError) else int(error is not None)


def first_timeout(arguments: list[str]) -> float:
    """--timeout, which is needed before ranks can talk. So options are read twice: what is wrong
    with them is said the second time, by one rank; --help is printed here, by one rank."""
    first = os.environ.get("RANK", "0") == "0"
    out = sys.stdout if first else open(os.devnull, "w")
    with contextlib.suppress(ValueError), contextlib.redirect_stdout(out):
        return parse_options(arguments).timeout
    return 60.0


def set_threads(options, cluster):
    """The ranks of a machine share its cores; the built-in model needs one only. A rank that is
    alone heeds OMP_NUM_THREADS (torchrun sets it, to 1, for several)."""
    if cluster.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:
        cores = (os.cpu_count() or 1) if options.model else 1
        torch.set_num_threads(max(1, cores // cluster.local_size))


def serve_and_report(server, file, on_iteration) -> str | None:
    """Serves, verifies and reports; returns what is wrong. `on_iteration(server, new records)`."""
    engine = server.engine
    options = server.options
    first = server.cluster.rank == 0
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: setattr(engine, "stop", True))
    error = gaps = None
    wrong = []
    if first and options.profile is not None:
        engine.profile = profiler(options.output, options.profile)
    num_lines = len(server.lines)
    with file, tqdm(
        total=num_lines, unit="request", leave=False, disable=not first
    ) as bar:
        try:
            with engine.profile or contextlib.nullcontext():
                server.serve(file, bar, on_iteration)
        except Stopped as stopped:
            error = f"{stopped}; {len(server.records)} of {num_lines} are finished"
        if options.verify and not error:
            gaps, wrong, error = verify_all(server, bar)
    summary = summarise(server, gaps, wrong, error)
    if first:
        print(format_report(summary), flush=True)
        if options.output:
            text = json.dumps(summary, indent=1, default=str)
            (options.output / "summary.json").write_text(text + "\n")
    return error


def verify_all(server, bar):
    """Gaps of the finished requests, those that differ, and what is wrong."""
    finished = sorted(server.records)
    bar.set_description("verifying")
    bar.reset(len(finished))
    requests = [server.lines[id].request for id in finished]
    gaps = server.engine.verify(requests, bar.update)
    limit = TOLERANCE[server.model.dtype]
    wrong = [id for id in sorted(gaps) if not gaps[id] <= limit]  # NaN is wrong, too
    error = None
    if wrong:
        error = f"request {wrong[0]} differs from recomputation without a cache"
    elif len(gaps) < len(finished):
        error = f"stopped by a signal; {len(gaps)} of {len(finished)} are verified"
    return gaps, wrong, error


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
