"""Serves a trace on a TokenLake: `torchrun --standalone --nproc-per-node=4 run_cluster.py`.

    trace ─▶ requests ─▶ Scheduler ─▶ gen_plans ─▶ Llama.forward with attend = put, query ─▶ tokens
                 ▲                                                                            │
                 └──────────── finished: next turn of the session, requests.jsonl ◀───────────┘

Every rank runs this same loop over the same trace. Rank 0 owns the clock, the progress bar and the
output; each rank computes the rows the plan gives it, and the sampled tokens cross at the end of an
iteration. With `--verify` every answer is then recomputed without a cache and compared.
"""

import argparse
import contextlib
import heapq
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from balancer import Request
from model import Config, Llama, Sampler, load_config, load_weights, random_weights
from pool import Cluster, LakeError, Pool, SetupError, Stopped
from tokenlake import LakeConfig, Scheduler, TokenLake, plan_digest

BLOCK = 512  # tokens per hash id of a trace
CV_WINDOW = 32  # iterations
KINDS = ("mean", "median", "p90", "p99")  # of latencies
# A served token passes --verify if its score is this close to the best: rounding, not choice.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.4}
DTYPES = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]


# Fields of a trace: what they must be, in code and in words.
TIME = lambda x: type(x) in (int, float) and 0 <= x < 2**53, "a number of ms from 0 up"
LENGTH = lambda x: type(x) is int and 0 < x < 2**53, "a positive integer"
IDS = (lambda x: isinstance(x, list) and x and all(type(i) is int and 0 <= i < 2**63 for i in x),
       "a list of integers from 0 up")


class InputError(ValueError):
    """A user's mistake: one line, exit status 2."""


# ── the trace ─────────────────────────────────────────────────────────────────────────────────

@dataclass
class Line:
    """A request of a trace, lengths scaled, and what became of it. Times in ns of rank 0's clock
    since the start."""

    index: int  # request id: which request of the trace, from 0
    where: str  # file:line
    timestamp: float  # ms
    input_length: int  # with everything before it in the session; an upper bound until it is sent
    output_length: int
    input_ids: list[int] | None
    hash_ids: list[int] | None
    salt: str
    think: float  # ms
    previous: "Line | None" = field(repr=False)  # of the session
    request: Request | None = None
    arrival: int = 0
    token_times: list[int] = field(default_factory=list)

    def prompt(self, vocab: int, block: int, seed: int) -> list[int]:
        """A hash id's block of tokens comes from a generator seeded by (seed, id)."""
        if self.input_ids is not None:
            return (self.previous.request.tokens if self.previous else []) + self.input_ids
        blocks = [np.random.default_rng((seed, id)).integers(vocab, size=block)
                  for id in self.hash_ids]
        return np.concatenate(blocks)[:self.input_length].tolist()

    def record(self, cached_tokens: int) -> dict:
        """Its line of requests.jsonl."""
        times, request = self.token_times, self.request
        gaps = [round((b - a) / 1e6, 3) for a, b in zip(times, times[1:])]
        return dict(request_id=self.index, status="completed", arrival_s=self.arrival / 1e9,
                    input_length=request.num_prompt, cached_tokens=cached_tokens,
                    output_ids=request.tokens[request.num_prompt:],
                    ttft_ms=round((times[0] - self.arrival) / 1e6, 3),
                    tpot_ms=round(sum(gaps) / len(gaps), 3) if gaps else None,
                    itl_ms=gaps, finished_s=times[-1] / 1e9)


def read_trace(source, name: str, scale: int = 1, limit: int | None = None) -> list[Line]:
    """The first `limit` requests of a trace, checked. `source` yields its lines, bytes or text."""
    lines, sessions = [], {}
    numbered = ((number, text) for number, text in enumerate(source, 1) if text.strip())
    for number, text in islice(numbered, limit):
        where = f"{name}:{number}"
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: not JSON; one object per line is expected") from None
        if not isinstance(raw, dict):
            raise InputError(f"{where}: a JSON object is expected")

        def check(key, ok, expected, default=None):
            value = raw.get(key, default)
            if not ok(value):
                found = f"is {json.dumps(value)[:40]}" if key in raw else "is missing"
                raise InputError(f"{where}: {key} {found}; {expected} is expected")
            return value

        session = check("session_id", lambda x: x is None or type(x) in (str, int),
                        "a string or an integer")
        previous = sessions.get(session)
        input_ids = hash_ids = None
        if "input_ids" in raw:
            if "hash_ids" in raw or "input_length" in raw:
                raise InputError(f"{where}: input_ids stands in place of input_length and hash_ids;"
                                 " one or the other is expected")
            if scale > 1:
                raise InputError(f"{where}: input_ids cannot be scaled; drop --trace-scale")
            input_ids = check("input_ids", *IDS)
            total = len(input_ids)
            if previous:
                total += previous.input_length + previous.output_length
        else:
            total, hash_ids = check("input_length", *LENGTH), check("hash_ids", *IDS)
            if len(hash_ids) != -(-total // BLOCK):
                raise InputError(f"{where}: hash_ids lists {len(hash_ids)} blocks; input_length "
                                 f"{total} makes {-(-total // BLOCK)} of {BLOCK} tokens")
            total = -(-total // scale)
        line = Line(len(lines), where, check("timestamp", *TIME), total,
                    -(-check("output_length", *LENGTH) // scale), input_ids, hash_ids,
                    check("salt", lambda x: isinstance(x, str), "a string", ""),
                    check("think_ms", *TIME, 0), previous)
        if lines and line.timestamp < lines[-1].timestamp:
            raise InputError(f"{where}: timestamp {line.timestamp} is before the previous line's "
                             f"{lines[-1].timestamp}; lines in order of time are expected")
        if session is not None:
            sessions[session] = line
        lines.append(line)
    if not lines:
        raise InputError(f"{name}: is empty; one JSON object per line is expected")
    return lines


def demo_trace(num_requests: int, vocab: int, seed: int):
    """Sessions of three turns behind three system prompts, some more popular than others."""
    rng, start = np.random.default_rng((seed, 1)), 0.0
    systems = [rng.integers(vocab, size=n).tolist() for n in (208, 144, 96)]
    for index in range(num_requests):
        ids = rng.integers(vocab, size=rng.integers(24, 72)).tolist()
        if index % 3 == 0:
            start += rng.exponential(100)
            ids = systems[rng.choice(3, p=(0.6, 0.3, 0.1))] + ids
        yield json.dumps(dict(timestamp=round(start, 1), session_id=index // 3, input_ids=ids,
                              output_length=int(rng.integers(8, 25)), think_ms=100))


# ── set-up ────────────────────────────────────────────────────────────────────────────────────

def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError naming the option."""

    def checked(kind, ok, expected):
        def parse(text):
            with contextlib.suppress(ValueError):
                if ok(value := kind(text)):
                    return value
            raise argparse.ArgumentTypeError(f"{text!r}: {expected} is expected")
        return parse

    def fail(message):
        raise InputError(message.removeprefix("argument "))

    count = checked(int, lambda x: 0 < x < 2**48, "a positive integer")
    path = checked(Path, lambda x: x != Path(), "a path")
    parser = argparse.ArgumentParser(
        prog="run_cluster.py", description="Serve a trace on a pooled prefix cache.")
    parser.error = fail
    add = parser.add_argument
    add("--trace", type=path, metavar="FILE", help="JSON lines; default: a multi-turn demo")
    add("--num-requests", type=count, metavar="K", help="serve the first K lines (demo: 48)")
    add("--seed", type=checked(int, lambda x: 0 <= x < 2**63, "a seed from 0"), default=0,
        metavar="N", help="of the weights, the demo, a trace's tokens, and sampling")
    add("--trace-scale", type=checked(int, lambda x: x > 0 and BLOCK % x == 0, "a divisor of 512"),
        metavar="F", help="divide the trace's lengths and its 512-token block by F")
    add("--model", type=path, metavar="DIR", help="Hugging Face folder of a Llama")
    add("--random-weights", action="store_true", help="with --model: read config.json alone")
    add("--dtype", choices=DTYPES, help="default: float32; on a GPU what --model says")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    add("--temperature", default=0.0, metavar="T", help="0 (the default) is greedy",
        type=checked(float, lambda x: 0 <= x <= 1e6, "a number from 0 to 1e6"))
    add("--stop-at-eos", action="store_true", help="the model's end token ends a request early")
    add("--segment-tokens", type=count, metavar="C", help="default: 16; --model on a GPU: 512")
    add("--slots", type=count, metavar="S",
        help="segments per instance; default: half the memory, on a CPU at most 32,768 tokens")
    add("--placement", choices=("stripe", "hash"), default="stripe",
        help="homes of segments: one after another along a prefix (default), or by hash")
    add("--replicate-factor", type=checked(float, lambda x: 0 <= x <= 1e6, "a number from 0"),
        default=3.0, metavar="c", help="replicate c·N·ln N hot segments (default 3; 0: none)")
    add("--pull-tokens", type=checked(int, lambda x: 0 <= x < 2**48, "a number from 0"),
        default=16_384, metavar="T", help="KV an instance may pull per iteration (default 16384)")
    add("--chunk-tokens", type=count, metavar="T",
        help="prompt rows per instance and iteration; default: 4 segments")
    add("--max-batch", type=count, default=32, metavar="R",
        help="running requests in the whole lake (default 32)")
    add("--scheduler", choices=("auto", "even"), default="auto", help="auto is even, the only one")
    add("--speed", type=checked(float, lambda x: x >= 1e-6, "a positive number"), metavar="X",
        default=1.0, help="arrivals and think times X times faster; inf: all at once")
    add("--timeout", type=checked(float, lambda x: 1 <= x < 1e9, "a number from 1"), default=300.0,
        metavar="SECONDS", help="after which a silent rank is given up (default 300)")
    add("--verify", action=argparse.BooleanOptionalAction,
        help="recompute every answer without a cache; default: for the demo on its own model")
    add("--output", type=path, metavar="DIR", help="write requests.jsonl and summary.json")
    options = parser.parse_args(arguments)
    if options.random_weights and not options.model:
        raise InputError("--random-weights needs --model DIR (the built-in model is random)")
    if options.trace_scale and not options.trace:
        raise InputError("--trace-scale needs --trace FILE")
    if options.verify is None:
        options.verify = not (options.trace or options.model)
    return options


def prepare(options, cluster: Cluster, device, memory: int):
    """Reads and checks all that the user gave → (lines, LakeConfig, Llama). memory: bytes available
    on a device, the least over the ranks. Raises InputError or ModelError."""
    for name in ("requests.jsonl", "summary.json") if options.output else ():
        if os.path.exists(options.output / name):
            raise InputError(f"--output {options.output}: already holds {name}; a new folder is "
                             "expected")
    config = load_config(options.model) if options.model else Config()
    if options.trace:
        try:
            with open(options.trace, "rb") as file:
                lines = read_trace(file, str(options.trace), options.trace_scale or 1,
                                   options.num_requests)
        except OSError as error:
            raise InputError(f"--trace {options.trace}: {error.strerror}") from None
    else:
        demo = demo_trace(options.num_requests or 48, config.vocab_size, options.seed)
        lines = read_trace(demo, "demo")
    if options.stop_at_eos and not config.eos_token_ids:
        raise InputError("--stop-at-eos: the model's config.json has no eos_token_id")
    real = options.model and device.type == "cuda"
    name = options.dtype or (config.dtype if real else "float32")
    if name not in DTYPES:
        raise InputError(f"--dtype: config.json says {name!r}; one of {DTYPES} is expected")
    dtype, C = getattr(torch, name), options.segment_tokens or (512 if real else 16)
    sharing = cluster.ranks_per_device(device)
    lake = LakeConfig(C, 0, options.placement, options.replicate_factor, options.pull_tokens,
                      options.chunk_tokens or 4 * C, options.max_batch)
    bytes_of = partial(Pool.bytes_needed, config, C, lake.staging(cluster.size), dtype)
    slots, room = options.slots, memory // sharing  # of the ranks that share a device
    if C > config.max_positions:
        raise InputError(f"--segment-tokens {C}: no more than the model's {config.max_positions} "
                         "positions is expected")
    if slots is None:  # half of what is there is left for weights and activations
        slots = max(1, (room // 2 - bytes_of(0)) // (bytes_of(1) - bytes_of(0)))
        slots = slots if device.type == "cuda" else min(slots, -(-32_768 // C))
    if bytes_of(slots) > room:
        raise InputError(
            f"--slots {slots} of {C} tokens, with staging for --chunk-tokens and --max-batch: "
            f"{sharing} ranks need {sharing * bytes_of(slots):,} bytes on {device}, "
            f"{memory:,} are there")
    for line in lines:
        if (highest := max(line.input_ids or [0])) >= config.vocab_size:
            raise InputError(f"{line.where}: input_ids has the token {highest}; ids below the "
                             f"vocabulary's {config.vocab_size} are expected")
    line = max(lines, key=lambda line: line.input_length + line.output_length)
    total = line.input_length + line.output_length
    if total > config.max_positions:
        raise InputError(f"{line.where}: prompt and answer are {total} tokens, the model has "
                         f"{config.max_positions} positions (--trace-scale makes a trace smaller)")
    if (needed := -(-(total - 1) // C)) > slots * cluster.size:
        raise InputError(f"{line.where}: the request needs {needed} segments, the pool has "
                         f"{slots * cluster.size}; more --slots are expected")
    made = options.random_weights or not options.model
    weights = (random_weights(config, options.seed, dtype, device) if made
               else load_weights(options.model, config, dtype, device))
    return lines, replace(lake, slots=slots), Llama(config, weights)


def open_output(folder: Path | None, cluster: Cluster):
    """requests.jsonl, new, on rank 0; None elsewhere or without a folder."""
    if folder is None or cluster.rank:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / "requests.jsonl", "x")
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}") from None


# ── serving ───────────────────────────────────────────────────────────────────────────────────

class Engine:
    """One rank of the compute engine (Fig. 5): the loop body that every rank of the cluster runs
    alike, also one that is not in the lake.

    model and sampler: a Llama and a Sampler of model.py, or what has their methods."""

    def __init__(self, cluster: Cluster, lake: TokenLake, scheduler: Scheduler, model, sampler):
        self.cluster, self.lake, self.scheduler = cluster, lake, scheduler
        self.model, self.sampler = model, sampler
        self.clock = 0  # ns since the start, rank 0's; the same everywhere
        self.iterations = 0
        self.stop = False  # set by a signal; travels with the next digest
        self.reads: list[np.ndarray] = []  # per iteration: [N] cache tokens read

    def start(self):
        """Starts the clock when every rank is here."""
        self.cluster.share(None)
        self.started = time.monotonic_ns()

    def step(self, pause: float = 0.0) -> tuple[dict[int, int], list[Request]]:
        """One iteration: plan, agree, compute, exchange tokens and clock, publish. Without
        anything to run it sleeps, `pause` seconds at most. Returns the sampled tokens by request
        id and the requests that ended. Raises LakeError, Stopped."""
        cluster, lake = self.cluster, self.lake
        try:
            batches, dops = self.scheduler.schedule()
            query_plan, transfer_plan, groups = lake.gen_plans(batches, dops,
                                                               lake.get_prefix_tree())
        except Exception:
            with contextlib.suppress(LakeError):  # the others stop too, and say so
                cluster.announce(bytes(16), self.stop, fault=True)
                cluster.confirm()
            raise
        cluster.announce(plan_digest(self.iterations, query_plan, transfer_plan), self.stop)
        samples, tokens = self.scheduler.samples(query_plan), []
        if not query_plan.runs:  # signals are looked at in between
            time.sleep(max(0.0, min(0.05, pause)))
        elif lake.pool:
            tokens = self._compute(batches, groups, query_plan, transfer_plan)
        cluster.confirm()
        padding = [0] * (max(map(len, samples)) - len(tokens))
        said = cluster.gather([time.monotonic_ns() - self.started, *tokens, *padding])
        self.clock = said[0][0]
        if query_plan.runs:
            self.iterations += 1
            self.reads.append(query_plan.reads)
        sampled = {run.request.id: token for rank, runs in zip(lake.instances, samples)
                   for run, token in zip(runs, said[rank][1:])}
        return sampled, self.scheduler.update(query_plan, sampled)

    def _compute(self, batches, groups, query_plan, transfer_plan) -> list[int]:
        """This rank's rows through the model → the tokens that its runs give, in their order."""
        lake = self.lake
        batch, group = next(((batch, group) for batch, group in zip(batches, groups)
                             if lake.index in group), ([], []))
        mine = np.flatnonzero(query_plan.instance == lake.index)
        runs = [query_plan.runs[b] for b in mine]
        tokens = [token for run in runs
                  for token in run.request.tokens[run.position:run.position + run.rows]]
        positions = [p for run in runs for p in range(run.position, run.position + run.rows)]
        ends = np.cumsum([run.rows for run in runs]).tolist()
        rows = [end - 1 for run, end in zip(runs, ends) if run.samples]
        q_buf = lake.init_query(batch, group, query_plan)
        kv_buf = lake.init_transfer(batch, transfer_plan)

        def attend(layer, q, k, v):
            self.cluster.confirm()  # before the first exchange of data, behind embedding and QKV
            kv_buf.write(layer, k, v)
            lake.put(kv_buf)
            q_buf.write(layer, q)
            return lake.query(q_buf)

        tokens, positions, rows = (torch.tensor(x, dtype=torch.int64, device=lake.pool.device)
                                   for x in (tokens, positions, rows))
        logits = self.model.forward(tokens, positions, attend, rows)
        return self.sampler.sample(logits, [(run.request.id, len(run.request.tokens))
                                            for run in runs if run.samples])

    def verify(self, requests: list[Request], progress) -> dict[int, float]:
        """Recomputes finished requests without a cache, one per rank and round: the gap of each in
        logits (Llama.score_gap). After a signal, of those done by then."""
        gaps, size = {}, self.cluster.size
        for start in range(0, len(requests), size):
            for r in requests[start:start + size][self.cluster.rank:][:1]:
                gaps[r.id] = self.model.score_gap(self.sampler, r.tokens, r.num_prompt, r.id)
            progress(min(size, len(requests) - start))
            if any(stop for (stop,) in self.cluster.gather([self.stop])):
                break
        return {id: gap for part in self.cluster.share(gaps) for id, gap in part.items()}


class Server:
    """A trace at work: sends requests when they are due, keeps their times and records."""

    def __init__(self, options, cluster: Cluster, lines: list[Line], lake_config, model: Llama):
        self.options, self.cluster, self.lines, self.model = options, cluster, lines, model
        self.lake = TokenLake(list(range(cluster.size)), model.config, lake_config, cluster,
                              model.dtype, model.device)
        self.scheduler = Scheduler(self.lake,
                                   model.config.eos_token_ids if options.stop_at_eos else ())
        self.engine = Engine(cluster, self.lake, self.scheduler, model,
                             Sampler(options.temperature, options.seed))
        self.records: dict[int, dict] = {}  # of finished requests, by request id
        self.arrivals: list[tuple[int, int]] = []  # heap of (time, index)
        self.next_turn = {line.previous.index: line for line in lines if line.previous}
        for line in lines:
            if not line.previous:
                self._expect(line, 0)

    def _expect(self, line: Line, earliest: int):
        scheduled = int(line.timestamp * 1e6 / self.options.speed)
        heapq.heappush(self.arrivals, (max(scheduled, earliest), line.index))

    def step(self) -> list[dict]:
        """Hands the scheduler what has arrived, runs one iteration, and returns the records of the
        requests that it finished."""
        options, vocab = self.options, self.model.config.vocab_size
        while self.arrivals and self.arrivals[0][0] <= self.engine.clock:
            arrival, index = heapq.heappop(self.arrivals)
            line = self.lines[index]
            prompt = line.prompt(vocab, BLOCK // (options.trace_scale or 1), options.seed)
            line.arrival = arrival
            line.request = Request(index, prompt, len(prompt) + line.output_length, line.salt)
            self.scheduler.add(line.request)
        pause = self.arrivals[0][0] - self.engine.clock if self.arrivals else 0
        tokens, finished = self.engine.step(pause / 1e9)
        for index in tokens:
            self.lines[index].token_times.append(self.engine.clock)
        return [self._finish(request) for request in finished]

    def _finish(self, request: Request) -> dict:
        line = self.lines[request.id]
        record = line.record(self.scheduler.counters.cached_tokens[request.id])
        self.records[request.id] = record
        if following := self.next_turn.get(request.id):
            think = int(following.think * 1e6 / self.options.speed)
            self._expect(following, self.engine.clock + think)
        return record


# ── the report ────────────────────────────────────────────────────────────────────────────────

def variation(reads: list[np.ndarray]) -> float | None:
    """Coefficient of variation over instances of cache tokens read: the mean over windows of
    iterations (a last, shorter one counts only if it is alone)."""
    windows = [sum(reads[i:i + CV_WINDOW]) for i in range(0, len(reads), CV_WINDOW)]
    windows = windows[:len(reads) // CV_WINDOW] or windows
    values = [w.std() / w.mean() for w in windows if w.any()]
    return float(np.mean(values)) if values else None


def summarise(server: Server, gaps: dict | None, wrong: list, error: str | None) -> dict:
    """summary.json: names as in vLLM's and SGLang's serving benchmarks, then ours. Collective."""
    moved = [sum(column) for column in zip(*server.cluster.share(
        list(server.lake.pool.bytes.values())))]
    records, balancer = list(server.records.values()), server.lake.balancer
    seconds = server.engine.clock / 1e9 - min((r["arrival_s"] for r in records), default=0.0)
    inputs = sum(r["input_length"] for r in records)
    outputs = sum(len(r["output_ids"]) for r in records)
    s = dict(completed=len(records), duration=seconds, total_input_tokens=inputs,
             total_output_tokens=outputs)
    s |= {name: amount / seconds if records else None for name, amount in (
        ("request_throughput", len(records)), ("output_throughput", outputs),
        ("total_token_throughput", inputs + outputs))}
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        values = [v for r in records for v in np.atleast_1d(r[name]) if v is not None]
        found = [np.mean(values), *np.percentile(values, (50, 90, 99))] if values else [None] * 4
        s |= {f"{kind}_{name}": value for kind, value in zip(KINDS, found)}
    counters = vars(server.scheduler.counters).copy()
    cached, puts, local, decodes, decodes_local = (counters.pop(key) for key in (
        "cached_tokens", "puts", "puts_local", "decode_puts", "decode_puts_local"))
    return s | counters | dict(
        hit_rate=sum(cached[id] for id in server.records) / inputs if inputs else None,
        cache_load_cv=variation(server.engine.reads), query_bytes=moved[0], put_bytes=moved[1],
        replica_bytes=moved[2], pull_bytes=moved[3], puts_local=local / puts if puts else None,
        decode_puts_local=decodes_local / decodes if decodes else None,
        cache_reads=sum(server.engine.reads, np.zeros(server.cluster.size, np.int64)).tolist(),
        asked_tokens=sum(line.request.peak for line in server.lines if line.request),
        evictions=balancer.evictions, replicas_max=int(bool(balancer.tree.segments)),
        iterations=server.engine.iterations, idle_fraction=None, error=error,
        verified=None if gaps is None else len(gaps) - len(wrong),
        max_logit_gap=None if not gaps or any(map(math.isnan, gaps.values())) else max(
            gaps.values()),
        config={k: v if v is None or isinstance(v, int) else str(v)
                for k, v in vars(server.options).items()} | vars(server.lake.config) | dict(
            ranks=server.cluster.size, torch=torch.__version__, device=str(server.model.device),
            dtype=str(server.model.dtype).removeprefix("torch.")))


def table(s: dict) -> str:
    """The report that ends a run, from its summary."""

    def show(value, form):
        return "–" if value is None else format(value, form)

    def times(name):
        return "  ".join(f"{kind} {show(s[f'{kind}_{name}_ms'], ',.0f')}" for kind in KINDS)

    reads = s["cache_reads"]
    lines = {
        "requests": f"{s['completed']} in {s['duration']:.1f} s, "
                    f"{show(s['output_throughput'], ',.0f')} output tokens/s",
        "hit rate": f"{show(s['hit_rate'], '.1%')} of {s['total_input_tokens']:,} prompt tokens",
        "computed": f"{s['computed_tokens']:,} of {s['asked_tokens']:,} tokens asked for "
                    f"({s['recomputed_tokens']:,} again, after preemption)",
        "cache load": "  ".join(f"{read / max(1, sum(reads)):.1%}" for read in reads)
                      + " of reads per instance; CV within "
                      f"{CV_WINDOW} iterations {show(s['cache_load_cv'], '.2f')}",
        "TTFT ms": times("ttft"),
        "TPOT ms": times("tpot"),
        "moved": f"queries and partial results {s['query_bytes'] / 1e6:,.1f} MB, "
                 f"new KV {s['put_bytes'] / 1e6:,.1f} MB "
                 f"({show(s['puts_local'], '.1%')} was computed where it lives)",
        "pressure": f"{s['evictions']:,} evictions, {s['preemptions']:,} preemptions",
    }
    if s["verified"] is not None:
        how = ("equal recomputation without a cache, token for token" if s["max_logit_gap"] == 0
               else "within rounding of recomputation without a cache; largest gap "
                    f"{show(s['max_logit_gap'], '.1e')} logits")
        lines["verified"] = f"{s['verified']}/{s['completed']} {how}"
    return "\n".join(f"{name:>12}  {text}" for name, text in lines.items())


# ── the program ───────────────────────────────────────────────────────────────────────────────

def run(arguments: list[str], on_iteration=lambda server, finished: None) -> int:
    """The whole program on one rank; returns its exit status. One rank says what went wrong."""
    timeout = 60.0
    quiet = open(os.devnull, "w") if os.environ.get("RANK", "0") != "0" else sys.stdout  # --help
    with contextlib.suppress(InputError), contextlib.redirect_stdout(quiet):  # errors: said below
        timeout = parse_options(arguments).timeout
    cluster = Cluster(timeout)
    if cluster.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // cluster.local_size))
    status, error = 1, None
    try:
        options = cluster.together(parse_options, arguments)
        device, memory = cluster.together(cluster.find_device, options.device)
        lines, lake, model = cluster.together(prepare, options, cluster, device,
                                              min(cluster.share(memory)))
        text = repr((vars(options), lines, lake, model.fingerprint()))
        cluster.together(cluster.same, text, "options, another trace or another model")
        server = Server(options, cluster, lines, lake, model)
        error = serve(server, cluster.together(open_output, options.output, cluster), on_iteration)
        status = int(error is not None)
    except (SetupError, LakeError) as problem:
        status, error = 2 if isinstance(problem, SetupError) else 1, problem
    finally:
        if error and cluster.speaks():
            print(f"run_cluster.py: {error}", file=sys.stderr, flush=True)
        cluster.close()
    return status


def serve(server: Server, file, on_iteration) -> str | None:
    """Serves, verifies and reports; returns what is wrong with the result. Finished records go to
    `file`, where there is one; `on_iteration(server, finished records)` follows each iteration."""
    first = server.cluster.rank == 0
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: setattr(server.engine, "stop", True))
    error, gaps, wrong = None, None, []
    with file or contextlib.nullcontext(), tqdm(
            total=len(server.lines), unit="request", leave=False, disable=not first) as bar:
        try:
            server.engine.start()
            while server.arrivals or server.scheduler.waiting or server.scheduler.running:
                finished = server.step()
                for record in finished:
                    bar.update()
                    if file:
                        print(json.dumps(record), file=file, flush=True)
                on_iteration(server, finished)
        except Stopped as stopped:
            error = f"{stopped}; {len(server.records)} of {len(server.lines)} are finished"
        if server.options.verify and not error:
            bar.set_description("verifying")
            bar.reset(len(server.records))
            gaps = server.engine.verify(
                [server.lines[index].request for index in sorted(server.records)], bar.update)
            limit = TOLERANCE[server.model.dtype]
            wrong = [index for index, gap in sorted(gaps.items()) if not gap <= limit]  # NaN is
            if wrong:
                error = f"request {wrong[0]} differs from recomputation without a cache"
            elif len(gaps) < len(server.records):
                error = f"stopped by a signal; {len(gaps)} of {len(server.records)} are verified"
    summary = summarise(server, gaps, wrong, error)
    if first:
        print(table(summary), flush=True)
        if file:
            text = json.dumps(summary, indent=1, default=str)
            (server.options.output / "summary.json").write_text(text + "\n")
    return error


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
