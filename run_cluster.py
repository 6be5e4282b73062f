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
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from balancer import BLOCK, Request, variation
from kernels import to_device
from model import Config, Llama, Sampler, load_config, load_weights, random_weights, require
from pool import Cluster, LakeError, SetupError, Stopped, profiler
from tokenlake import LakeConfig, Scheduler, TokenLake, plan_digest

CV_WINDOW = 32  # iterations
KINDS = ("mean", "median", "p90", "p99")  # of times
# A served token passes --verify if its score is this close to the best: rounding, not choice.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.4}
DTYPES = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]

# Fields of a trace: what they must be, in code and in words, and the default where there is one.
TIME = lambda x: type(x) in (int, float) and 0 <= x < 2**53, "a number of ms from 0 up"
LENGTH = lambda x: type(x) is int and 0 < x < 2**53, "a positive integer"
IDS = (lambda x: isinstance(x, list) and x and all(type(i) is int and 0 <= i < 2**63 for i in x),
       "a list of integers from 0 up")
SESSION = lambda x: x is None or type(x) in (str, int), "a string or an integer"
FIELDS = dict(session_id=SESSION, timestamp=TIME, output_length=LENGTH, think_ms=(*TIME, 0),
              salt=(lambda x: type(x) is str, "a string", ""))


@dataclass
class Line:
    """A request of a trace, lengths scaled, and what became of it."""
    index: int  # request id: which request of the trace, from 0
    where: str  # file:line
    previous: "Line | None" = field(repr=False)  # of the session
    total: int  # prompt (with all before it in the session: an upper bound until sent) and answer
    keys: dict  # of the trace, checked: FIELDS and those of its form; output_length is scaled
    request: Request | None = None  # from its arrival on
    times: list[int] = field(default_factory=list)  # of arrival and tokens: rank 0's ns since start

    def arrive(self, time: int, vocab: int, block: int, seed: int) -> Request:
        """Its request. A hash id's block of tokens comes from a generator seeded by (seed, id)."""
        keys, before = self.keys, self.previous.request.tokens if self.previous else []
        blocks = [np.random.default_rng((seed, id)).integers(vocab, size=block)
                  for id in keys.get("hash_ids", ())]
        prompt = before + keys["input_ids"] if "input_ids" in keys else (
            np.concatenate(blocks)[:self.total - keys["output_length"]].tolist())
        self.times = [time]
        self.request = Request(self.index, prompt, len(prompt) + keys["output_length"],
                               keys["salt"])
        return self.request

    def record(self, cached_tokens: int) -> dict:
        """Its line of requests.jsonl."""
        times, n = self.times, self.request.num_prompt
        first, *gaps = (round((b - a) / 1e6, 3) for a, b in zip(times, times[1:]))
        return dict(request_id=self.index, status="completed", arrival_s=times[0] / 1e9,
                    input_length=n, cached_tokens=cached_tokens, output_ids=self.request.tokens[n:],
                    ttft_ms=first, tpot_ms=round(sum(gaps) / len(gaps), 3) if gaps else None,
                    itl_ms=gaps, finished_s=times[-1] / 1e9)


def read_trace(source, name: str, scale: int = 1, limit: int | None = None) -> list[Line]:
    """The first `limit` requests of a trace, checked. `source` yields its lines, bytes or text."""
    lines, sessions = [], {}
    numbered = ((f"{name}:{number}", text) for number, text in enumerate(source, 1) if text.strip())
    for where, text in islice(numbered, limit):
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: not JSON; one object per line is expected") from None
        require(isinstance(raw, dict), f"{where}: a JSON object is expected")
        by_ids = "input_ids" in raw
        require(not (by_ids and raw.keys() & {"hash_ids", "input_length"}), f"{where}: input_ids "
                "stands in place of input_length and hash_ids; one or the other is expected")
        require(not by_ids or scale < 2, f"{where}: input_ids cannot be scaled; drop --trace-scale")
        form, keys = dict(input_ids=IDS) if by_ids else dict(input_length=LENGTH, hash_ids=IDS), {}
        for key, (ok, expected, *default) in (form | FIELDS).items():
            value = keys[key] = raw.get(key, *default)
            found = f"is {json.dumps(value)[:40]}" if key in raw else "is missing"
            require(ok(value), f"{where}: {key} {found}; {expected} is expected")
        previous = None if keys["session_id"] is None else sessions.get(keys["session_id"])
        length = keys["input_length"] if not by_ids else (
            len(keys["input_ids"]) + (previous.total if previous else 0))
        found, blocks = len(keys.get("hash_ids", ())), -(-length // BLOCK)
        require(by_ids or found == blocks, f"{where}: hash_ids lists {found} blocks; input_length "
                f"{length} makes {blocks} of {BLOCK} tokens")
        output = keys["output_length"] = -(-keys["output_length"] // scale)
        line = Line(len(lines), where, previous, -(-length // scale) + output, keys)
        sessions[keys["session_id"]] = line
        now, last = keys["timestamp"], lines[-1].keys["timestamp"] if lines else 0
        require(now >= last, f"{where}: timestamp {now} is before the previous line's {last}; "
                "lines in order of time are expected")
        lines.append(line)
    require(lines, f"{name}: is empty; one JSON object per line is expected")
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


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError naming the option."""
    path = Path, lambda x: x != Path(), "a path"
    count = int, lambda x: 0 < x < 2**48, "a positive integer"
    natural = int, lambda x: 0 <= x < 2**63, "an integer from 0"
    divisor = int, lambda x: x > 0 and BLOCK % x == 0, "a divisor of 512"
    heat = float, lambda x: 0 <= x <= 1e6, "a number from 0 to 1e6"
    speed = float, lambda x: x >= 1e-6, "a positive number"
    wait = float, lambda x: 1 <= x < 1e9, "a number from 1"
    policy = (str, re.compile(r"auto|even|dp|pd:[1-9]\d{0,3}x[1-9]\d{0,3}").fullmatch,
              "auto, even, dp or pd:PxD")

    def add(name, kind, metavar, help, default=None, **more):
        def read(text):
            of, ok, expected = kind
            with contextlib.suppress(ValueError):
                if ok(value := of(text)):
                    return value
            raise argparse.ArgumentTypeError(f"{text!r}: {expected} is expected")
        plain(name, type=read, metavar=metavar, help=help, default=default, **more)
    parser = argparse.ArgumentParser("run_cluster.py", description="Serve a trace on a pool.")
    parser.error = lambda message: require(False, message.removeprefix("argument "))
    plain = parser.add_argument
    add("--trace", path, "FILE", "JSON lines; default: a multi-turn demo")
    add("--num-requests", count, "K", "serve the first K lines (demo: 48)")
    add("--seed", natural, "N", "of the weights, the demo, a trace's tokens, and sampling", 0)
    add("--trace-scale", divisor, "F", "divide the trace's lengths and its 512-token block by F")
    add("--model", path, "DIR", "Hugging Face folder of a Llama")
    plain("--random-weights", action="store_true", help="with --model: read config.json alone")
    plain("--dtype", choices=DTYPES, help="default: float32; on a GPU what --model says")
    plain("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    add("--temperature", heat, "T", "0 (the default) is greedy", 0.0)
    plain("--stop-at-eos", action="store_true", help="the model's end token ends a request early")
    add("--segment-tokens", count, "C", "default: 16; --model on a GPU: 512")
    add("--slots", count, "S", "segments per instance; default: half the memory (CPU: 32k tokens)")
    plain("--placement", choices=("stripe", "hash"), default="stripe", help="homes of segments")
    add("--replicate-factor", heat, "c", "of c·N·ln N hot segments (default 3; 0: none)", 3.0)
    add("--pull-tokens", natural, "T", "KV an instance pulls an iteration (default 16384)", 16384)
    add("--chunk-tokens", count, "T", "prompt rows per instance and iteration; default: 4 segments")
    add("--max-batch", count, "R", "running requests in the whole lake (default 32)", 32)
    add("--scheduler", policy, "{auto,even,dp,pd:PxD}", "even split (auto), §6.2, or P + D", "auto")
    add("--tbt-slo-ms", speed, "MS", "fewer prompt rows where that keeps time between tokens below")
    add("--speed", speed, "X", "arrivals and think times X times faster; inf: all at once", 1.0)
    add("--timeout", wait, "SECONDS", "after which a silent rank is given up (default 300)", 300.0)
    plain("--verify", action=argparse.BooleanOptionalAction,
          help="recompute every answer without a cache; default: for the built-in demo")
    add("--output", path, "DIR", "write requests.jsonl and summary.json")
    add("--profile", natural, "K", "with --output: rank 0 writes profile.json.gz, of 8 iterations "
        "after K others (default 0)", nargs="?", const=0)
    options = parser.parse_args(arguments)
    require(options.model or not options.random_weights,
            "--random-weights needs --model DIR (the built-in model is random)")
    require(options.trace or not options.trace_scale, "--trace-scale needs --trace FILE")
    require(options.output or options.profile is None, "--profile needs --output DIR")
    if options.verify is None:
        options.verify = not (options.trace or options.model)
    return options


def prepare(options, cluster: Cluster, device, memory: int):
    """Checks what the user gave → (lines, LakeConfig, Llama). memory: least bytes of a device."""
    for name in ("requests.jsonl", "summary.json", "profile.json.gz"):
        require(not options.output or not os.path.exists(options.output / name),
                f"--output {options.output}: already holds {name}; a new folder is expected")
    config = load_config(options.model) if options.model else Config()
    V, P = config.vocab_size, config.max_positions
    demo = demo_trace(options.num_requests or 48, V, options.seed)
    try:
        with open(options.trace, "rb") if options.trace else contextlib.closing(demo) as source:
            lines = read_trace(source, str(options.trace or "demo"), options.trace_scale or 1,
                               options.num_requests)
    except OSError as error:
        raise ValueError(f"--trace {options.trace}: {error.strerror}") from None
    require(config.eos_token_ids or not options.stop_at_eos,
            "--stop-at-eos: the model's config.json has no eos_token_id")
    kinds = [int(n) for n in re.findall(r"\d+", options.scheduler)] or [cluster.size]
    require(sum(kinds) == cluster.size, f"--scheduler {options.scheduler}: {sum(kinds)} instances, "
            f"there are {cluster.size}; as many are expected")
    usual = (config.dtype, 512) if options.model and device.type == "cuda" else ("float32", 16)
    name, C = options.dtype or usual[0], options.segment_tokens or usual[1]
    require(name in DTYPES, f"--dtype: config.json says {name!r}; one of {DTYPES} is expected")
    require(C <= P, f"--segment-tokens {C}: no more than the model's {P} positions is expected")
    lake = LakeConfig(C, 0, options.placement, options.replicate_factor, options.pull_tokens,
                      options.chunk_tokens or 4 * C, options.max_batch)
    dtype, staging = getattr(torch, name), lake.staging(cluster.size)
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    bytes_of = lambda n: (n * C + staging) * row
    sharing = cluster.ranks_per_device(device)
    room = memory // sharing  # half of it is left for weights and activations
    fit = max(1, (room // 2 - bytes_of(0)) // (bytes_of(1) - bytes_of(0)))
    slots = options.slots or (fit if device.type == "cuda" else min(fit, -(-32_768 // C)))
    require(bytes_of(slots) <= room, f"--slots {slots} of {C} tokens, with staging for "
            f"--chunk-tokens and --max-batch: {sharing} ranks need {sharing * bytes_of(slots):,} "
            f"bytes on {device}, {memory:,} are there")
    for line in lines:
        highest = max(line.keys.get("input_ids", [0]))
        require(highest < V, f"{line.where}: input_ids has the token {highest}; ids below the "
                f"vocabulary's {V} are expected")
    line = max(lines, key=lambda line: line.total)
    require(line.total <= P, f"{line.where}: prompt and answer are {line.total} tokens, the "
            f"model has {P} positions (--trace-scale makes a trace smaller)")
    needed, there = -(-(line.total - 1) // C), slots * cluster.size
    require(needed <= there, f"{line.where}: the request needs {needed} segments, the pool has "
            f"{there}; more --slots are expected")
    weights = (load_weights(options.model, config, dtype, device)
               if options.model and not options.random_weights
               else random_weights(config, options.seed, dtype, device))
    return lines, replace(lake, slots=slots), Llama(config, weights)


def open_output(folder: Path | None, cluster: Cluster):
    """requests.jsonl, new, on rank 0; elsewhere or without a folder what is written is dropped."""
    if folder is None or cluster.rank:
        return open(os.devnull, "w")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / "requests.jsonl", "x")
    except OSError as error:
        raise ValueError(f"--output {folder}: {error.strerror}") from None


class Engine:
    """One rank of the compute engine (Fig. 5): the loop body of every rank of the cluster, also of
    one that is not in the lake. model, sampler: those of model.py, or what has their methods."""
    def __init__(self, cluster: Cluster, lake: TokenLake, scheduler: Scheduler, model, sampler):
        self.cluster, self.lake, self.scheduler = cluster, lake, scheduler
        self.model, self.sampler = model, sampler
        self.clock = self.iterations = 0  # the clock: ns since the start, rank 0's on every rank
        self.stop, self.profile = False, None  # set by a signal; see `profiler`
        self.reads: list[np.ndarray] = []  # per iteration: [N] cache tokens read
        self.cluster.share(None)  # the clock starts when every rank is here
        self.started = time.monotonic_ns()
        self.busy = np.zeros(2)  # time of the iterations by the model: mean over instances, longest

    def step(self, pause: float = 0.0) -> tuple[dict[int, int], list[Request]]:
        """One iteration: plan, agree, compute, exchange, publish; with nothing to run, a sleep of
        `pause` seconds at most. Returns the sampled tokens by request id and the requests that
        ended. Raises LakeError, Stopped."""
        cluster, lake, model, tokens = self.cluster, self.lake, self.scheduler.model, {}
        try:
            batches, dops = self.scheduler.schedule()
            plan, transfer_plan, groups = lake.gen_plans(batches, dops, lake.get_prefix_tree())
        except Exception:
            with contextlib.suppress(LakeError):  # the others stop too, and say so
                cluster.announce(bytes(16), self.stop, fault=True)
                cluster.confirm()
            raise
        cluster.announce(plan_digest(self.iterations, plan, transfer_plan), self.stop)
        if not plan.runs:  # signals are looked at in between
            time.sleep(max(0.0, min(0.05, pause)))
        elif lake.pool:
            tokens = self._compute(batches, groups, plan, transfer_plan)
        cluster.confirm()
        # A token of each request that samples, from the rank that computes it; others say 0.
        samples = [(run.request.id, lake.instances[v])
                   for run, v in zip(plan.runs, plan.instance.tolist()) if run.samples]
        now = time.monotonic_ns() - self.started
        if plan.runs:
            self.iterations += 1
            self.profile and self.profile.step()
            self.reads.append(plan.reads)
            features = lake.features(plan, transfer_plan)
            times = model.time(*features.T)
            self.busy += times.mean(), times.max()
            if cluster.rank == 0:  # the others hear of it, and all plan with the same model
                model.measured(features, (now - self.clock) / 1e9)
        said = cluster.gather([now, *model.fitted, *(tokens.get(id, 0) for id, _ in samples)])
        self.clock, model.coefficients = said[0][0], said[0][1:5]
        sampled = {id: said[rank][5 + i] for i, (id, rank) in enumerate(samples)}
        return sampled, self.scheduler.update(plan, sampled)

    def _compute(self, batches, groups, plan, transfer_plan) -> dict[int, int]:
        """This rank's rows through the model → the tokens that they give, by request id."""
        lake = self.lake
        batch, group = next((at for at in zip(batches, groups) if lake.index in at[1]), ([], []))
        q_buf = lake.init_query(batch, group, plan)
        kv_buf = lake.init_transfer(batch, transfer_plan)

        def attend(layer, q, k, v):
            self.cluster.confirm()  # before the first exchange of data, behind embedding and QKV
            kv_buf.write(layer, k, v)
            lake.put(kv_buf)
            q_buf.write(layer, q)
            return lake.query(q_buf)
        rows = [(run.request, p) for run, v in zip(plan.runs, plan.instance) if v == lake.index
                for p in range(run.position, run.position + run.rows)]
        last = [i for i, (request, p) in enumerate(rows) if p + 1 == len(request.tokens)]
        ids, positions, at = to_device([np.array(x, np.int64) for x in (
            [r.tokens[p] for r, p in rows], [p for _, p in rows], last)], lake.pool.device)
        logits = self.model.forward(ids, positions, attend, at)
        keys = [(rows[i][0].id, rows[i][1] + 1) for i in last]
        return dict(zip((id for id, _ in keys), self.sampler.sample(logits, keys)))

    def verify(self, requests: list[Request], progress) -> dict[int, float]:
        """Each request's gap in logits (Llama.score_gap); after a signal, of those done by then."""
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
        eos = model.config.eos_token_ids if options.stop_at_eos else ()
        self.scheduler = Scheduler(self.lake, eos, options.scheduler, options.tbt_slo_ms)
        self.engine = Engine(cluster, self.lake, self.scheduler, model,
                             Sampler(options.temperature, options.seed))
        self.drawn = model.config.vocab_size, BLOCK // (options.trace_scale or 1), options.seed
        self.records: dict[int, dict] = {}  # of finished requests, by request id
        self.next_turn = {line.previous.index: line for line in lines if line.previous}
        self.ns = ns = lambda ms: int(ms * 1e6 / options.speed)
        # A heap of (time, index): sorted, as the lines are.
        self.arrivals = [(ns(x.keys["timestamp"]), x.index) for x in lines if not x.previous]

    def serve(self, file, bar, on_iteration):
        """Iterations until all is finished, and its records written. Raises LakeError, Stopped."""
        engine, arrivals, scheduler = self.engine, self.arrivals, self.scheduler
        while arrivals or scheduler.waiting or scheduler.running:
            while arrivals and arrivals[0][0] <= engine.clock:
                arrival, index = heapq.heappop(arrivals)
                scheduler.add(self.lines[index].arrive(arrival, *self.drawn))
            tokens, ended = engine.step((arrivals[0][0] - engine.clock) / 1e9 if arrivals else 0)
            for id in tokens:
                self.lines[id].times.append(engine.clock)
            finished = [self.lines[r.id].record(scheduler.cached_tokens[r.id]) for r in ended]
            for record in finished:
                self.records[record["request_id"]] = record
                print(json.dumps(record), file=file, flush=True)
                if turn := self.next_turn.get(record["request_id"]):
                    due, think = self.ns(turn.keys["timestamp"]), self.ns(turn.keys["think_ms"])
                    heapq.heappush(arrivals, (max(due, engine.clock + think), turn.index))
            bar.update(len(finished))
            on_iteration(self, finished)


def summarise(server: Server, gaps: dict | None, wrong: list, error: str | None) -> dict:
    """summary.json: names as in vLLM's and SGLang's serving benchmarks, then ours. Collective."""
    engine, lake, counters = server.engine, server.lake, server.scheduler.counters
    ranks, records = server.cluster.share(lake.pool.bytes), list(server.records.values())
    inputs, cached = (sum(r[key] for r in records) for key in ("input_length", "cached_tokens"))
    outputs = sum(len(r["output_ids"]) for r in records)
    seconds = engine.clock / 1e9 - min((r["arrival_s"] for r in records), default=0.0)
    amounts = dict(request=len(records), output=outputs, total_token=inputs + outputs)
    ratio = lambda part, whole: part / whole if whole else None
    s = {f"{kind}_throughput": ratio(n, records and seconds) for kind, n in amounts.items()}
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        values = [v for r in records for v in np.atleast_1d(r[name]) if v is not None]
        found = [np.mean(values), *np.percentile(values, (50, 90, 99))] if values else [None] * 4
        s |= zip((f"{kind}_{name}" for kind in KINDS), found)
    s |= {f"{kind}_bytes": sum(bytes[kind] for bytes in ranks) for kind in lake.pool.bytes}
    s |= {key: counters[key] for key in ("computed_tokens", "recomputed_tokens", "preemptions")}
    s |= {f"{k}_local": ratio(counters[f"{k}_local"], counters[k]) for k in ("puts", "decode_puts")}
    gap = float(np.max([*gaps.values()])) if gaps else np.nan  # NaN if one is
    windows = [sum(engine.reads[i:i + CV_WINDOW]) for i in range(0, len(engine.reads), CV_WINDOW)]
    windows = windows[:len(engine.reads) // CV_WINDOW] or windows  # a shorter one only if alone
    s |= dict(completed=len(records), duration=seconds, total_input_tokens=inputs,
              total_output_tokens=outputs, hit_rate=ratio(cached, inputs), error=error)
    return s | dict(
        evictions=lake.balancer.evictions, replicas_max=lake.balancer.replicas_max,
        cache_reads=sum(engine.reads, np.zeros(server.cluster.size, np.int64)).tolist(),
        asked_tokens=sum(line.request.peak for line in server.lines if line.request),
        idle_fraction=ratio(np.ptp(engine.busy), engine.busy[1]), iterations=engine.iterations,
        cache_load_cv=variation(windows), max_logit_gap=None if np.isnan(gap) else gap,
        verified=None if gaps is None else len(gaps) - len(wrong), config={
            k: v if v is None or isinstance(v, int) else str(v) for k, v in (
                vars(server.options) | vars(lake.config) | dict(
                    ranks=server.cluster.size, torch=torch.__version__, device=server.model.device,
                    dtype=str(server.model.dtype).removeprefix("torch."))).items()})


REPORT = """\
    requests  {completed} in {duration:.1f} s, {output_throughput:,.0f} output tokens/s
    hit rate  {hit_rate:.1%} of {total_input_tokens:,} prompt tokens
    computed  {computed_tokens:,} of {asked_tokens:,} tokens asked for ({recomputed_tokens:,} again)
  cache load  {shares} of reads per instance; CV within {window} iterations {cache_load_cv:.2f}
     TTFT ms  {ttft}
     TPOT ms  {tpot}
       moved  {moved} ({puts_local:.1%} of all new KV stayed)
    pressure  {evictions:,} evictions, {preemptions:,} preemptions"""


def table(s: dict) -> str:
    """The report that ends a run, from its summary. What was not measured is a dash."""
    form, reads = REPORT, s["cache_reads"]
    if s["verified"] is not None:
        form += "\n    verified  {verified}/{completed} " + (
            "equal recomputation without a cache, token for token" if s["max_logit_gap"] == 0 else
            "within {max_logit_gap:.1e} logits of recomputation without a cache")
    s = {key: np.nan if value is None else value for key, value in s.items()}
    kinds = dict(query="queries and results", pull="pulled KV", put="new KV", replica="replicas")
    text = form.format(
        **s, shares="  ".join(f"{n / max(1, sum(reads)):.1%}" for n in reads), window=CV_WINDOW,
        moved=", ".join(f"{kinds[k]} {s[f'{k}_bytes'] / 1e6:,.1f} MB" for k in kinds),
        ttft="  ".join(f"{kind} {s[f'{kind}_ttft_ms']:,.0f}" for kind in KINDS),
        tpot="  ".join(f"{kind} {s[f'{kind}_tpot_ms']:,.0f}" for kind in KINDS))
    return text.replace("nan%", "–").replace("nan", "–")


def run(arguments: list[str], on_iteration=lambda server, finished: None) -> int:
    """The whole program on one rank; returns its exit status. One rank says what went wrong."""
    timeout, error, first = 60.0, None, os.environ.get("RANK", "0") == "0"
    with (contextlib.suppress(ValueError),  # said below, once; and so is --help
          contextlib.redirect_stdout(sys.stdout if first else open(os.devnull, "w"))):
        timeout = parse_options(arguments).timeout
    cluster = Cluster(timeout)
    try:
        options = cluster.together(parse_options, arguments)
        if cluster.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:
            cores = (os.cpu_count() or 1) if options.model else 1  # the small model needs no more
            torch.set_num_threads(max(1, cores // cluster.local_size))
        device, memory = cluster.together(cluster.find_device, options.device)
        lines, lake, model = cluster.together(prepare, options, cluster, device,
                                              min(cluster.share(memory)))
        made = model.config, model.dtype, [float(w.flatten()[0]) for w in model.weights.values()]
        cluster.together(cluster.same, repr((vars(options), lines, lake, made)),
                         "options, another trace or another model")
        server = Server(options, cluster, lines, lake, model)
        error = serve(server, cluster.together(open_output, options.output, cluster), on_iteration)
    except (SetupError, LakeError, KeyboardInterrupt) as problem:
        error = problem if str(problem) else "stopped by a signal"
    finally:
        if error and cluster.speaks():
            print(f"run_cluster.py: {error}", file=sys.stderr, flush=True)
        cluster.close()
    return 2 if isinstance(error, SetupError) else int(error is not None)


def serve(server: Server, file, on_iteration) -> str | None:
    """Serves, verifies and reports; returns what is wrong. `on_iteration(server, new records)`."""
    first, lines, records = server.cluster.rank == 0, server.lines, server.records
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: setattr(server.engine, "stop", True))
    error, gaps, wrong = None, None, []
    if first and server.options.profile is not None:
        server.engine.profile = profiler(server.options.output, server.options.profile)
    with file, tqdm(total=len(lines), unit="request", leave=False, disable=not first) as bar:
        try:
            with server.engine.profile or contextlib.nullcontext():
                server.serve(file, bar, on_iteration)
        except Stopped as stopped:
            error = f"{stopped}; {len(records)} of {len(lines)} are finished"
        if server.options.verify and not error:
            bar.set_description("verifying")
            bar.reset(len(records))
            gaps = server.engine.verify([lines[id].request for id in sorted(records)], bar.update)
            wrong = [i for i in sorted(gaps) if not gaps[i] <= TOLERANCE[server.model.dtype]]
            if wrong:  # also by NaN
                error = f"request {wrong[0]} differs from recomputation without a cache"
            elif len(gaps) < len(records):
                error = f"stopped by a signal; {len(gaps)} of {len(records)} are verified"
    summary = summarise(server, gaps, wrong, error)
    if first:
        print(table(summary), flush=True)
        if server.options.output:
            text = json.dumps(summary, indent=1, default=str)
            (server.options.output / "summary.json").write_text(text + "\n")
    return error


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
