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
import shlex
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

if __name__ == "__main__":
    # Until `run` heeds signals, one ends the program without a word: imports take seconds.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The next file that is opened would take the number of a stream that is closed.
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
# What PyTorch's C++ has to say of lost ranks is said by us, in one line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

# First, as it asks who the parent is: the other imports take seconds.
from cluster import THE_END, Cluster, LakeError, SetupError, Stopped

import numpy as np
import torch
from tqdm import tqdm

from engine import Engine
from model import (
    HEAD,
    Llama,
    LlamaConfig,
    OptionParser,
    Sampler,
    Text,
    checksums,
    dtype_name,
    load_config,
    load_weights,
    one_line,
    random_weights,
    require,
    shown,
    with_own_head,
)
from oracle import WIDER, verify
from pool import LakeConfig, iteration_bytes
from record import Observer, PlansFile, describe_run, explain
from results import Outcome, Results, answers_basis, format_header, format_report
from results import require_unused, resumes, sum_bytes, summarise, summarise_again
from scheduler import Policy, Scheduler
from tokenlake import TokenLake
from traces import (
    TIME_UNITS,
    RandomTokens,
    TraceForm,
    TraceLine,
    demo_trace,
    open_trace,
    predecessors,
    read_trace,
    warn_of_long_segments,
)

DTYPES = [dtype_name(dtype) for dtype in WIDER]
# Bytes of a GPU for the contexts of CUDA, cuBLAS and NCCL, for each rank.
GPU_RESERVE = 1 << 30
FEW_TOKENS = 3  # in a block that stands for a hash id: of a vocabulary of 512 such ones are alike
SHOWN_PAUSE = 2  # seconds without anything to do, from which on they are shown
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
UP_TO_A_MILLION = OptionType(float, lambda x: 0 <= x <= 1e6, "a number from 0 to 1e6")
POSITIVE = OptionType(float, lambda x: x >= 1e-6, "a positive number")  # or inf
SECONDS = OptionType(float, lambda x: 1 <= x < 1e9, "a number from 1")
POLICY = OptionType(
    str,
    re.compile(r"auto|even|dp|pd:[1-9]\d{0,3}x[1-9]\d{0,3}").fullmatch,
    "auto, even, dp or pd:PxD",
)
FLAG = None  # given or not
SWITCH = argparse.BooleanOptionalAction  # --name or --no-name; neither: what suits
CHOICES = None  # --help names them

# fmt: off
# By group: name, type, what a value is called in --help, default, help.
OPTIONS = {
    "what is served": [
        ("--trace", PATH, "FILE", None,
         "a request per line, as JSON (README: Traces and results); default: a demo of chat sessions"),
        ("--num-requests", COUNT, "K", None,
         "only the first K requests (the demo has 48)"),
        ("--trace-block", COUNT, "B", None,
         "tokens that a hash id of the trace stands for (Mooncake: 512, the default; Bailian: "
         "16)"),
        ("--trace-time-unit", one_of(*TIME_UNITS), CHOICES, None,
         "of the trace's timestamps; default: ms"),
        ("--trace-scale", COUNT, "F", None,
         "make a trace smaller: divide its lengths by F, and its blocks, which F has to divide"),
        ("--speed", POSITIVE, "X", 1.0,
         "requests come, and users think, X times faster (1); inf: all at once"),
    ],
    "the model": [
        ("--model", PATH, "DIR", None,
         "Hugging Face folder of a Llama; default: a tiny one with random weights"),
        ("--random-weights", FLAG, None, False,
         "with --model: read no weights, but draw them"),
        ("--dtype", one_of(*DTYPES), CHOICES, None,
         "default: float32; on a GPU what config.json says"),
        ("--device", one_of("auto", "cpu", "cuda"), CHOICES, "auto",
         "default: a GPU if there is one"),
        ("--temperature", UP_TO_A_MILLION, "T", 0.0,
         "of sampling; 0, the default, takes the likeliest token"),
        ("--stop-at-eos", FLAG, None, False,
         "the model's end token ends an answer early"),
        ("--seed", NATURAL, "N", 0,
         "of random weights, the demo, tokens for hash ids, and sampling (0)"),
    ],
    "the pool": [
        ("--segment-tokens", COUNT, "C", None,
         "tokens of a segment, which is cached, found and moved as a whole; default: 16, with "
         "--model on a GPU 512"),
        ("--slots", COUNT, "S", None,
         "segments that an instance holds; default: what fits into its memory, on a CPU 32k "
         "tokens"),
        ("--placement", one_of("stripe", "hash"), CHOICES, "stripe",
         "where segments live: those of a prompt on one instance after the other (the "
         "default), or wherever a hash says"),
        ("--replicate-factor", UP_TO_A_MILLION, "c", 3.0,
         "how many of the most read segments may be copied to further instances: c·N·ln N, "
         "with N instances (3; 0: none)"),
        ("--pull-tokens", NATURAL, "T", 16384,
         "cached tokens that an instance fetches per iteration, where that is less than "
         "sending queries (16384)"),
        ("--one-communicator", FLAG, None, False,
         "queries and moves of cache share one (if two do not get on)"),
    ],
    "scheduling": [
        ("--chunk-tokens", COUNT, "T", None,
         "prompt tokens per instance and iteration; default: 4 segments"),
        ("--max-batch", COUNT, "R", None,
         "requests that run at once, on all instances together; default: 32, on GPUs 64 each"),
        ("--scheduler", POLICY, "NAME", "auto",
         "who computes what: auto and even split all work evenly, dp forms batches for some "
         "instances each, pd:PxD keeps P instances for prompts and D for answers"),
        ("--tbt-slo-ms", POSITIVE, "MS", None,
         "keep the time between an answer's tokens below this, by fewer prompt tokens beside "
         "them"),
        ("--plan-ahead", SWITCH, None, None,
         "plan an iteration while the device computes the one before; default: on GPUs"),
    ],
    "results, and what may go wrong": [
        ("--output", PATH, "DIR", None,
         "write requests.jsonl and summary.json there"),
        ("--resume", FLAG, None, False,
         "go on with what --output holds, if it holds anything: of the same trace, model, "
         "--seed and the like"),
        ("--verify", SWITCH, None, None,
         "compute every answer again, without a cache, and compare; default: for the demo"),
        ("--record", COUNT, "K", None,
         "with --output: write the plans of the first K iterations into plans.jsonl "
         "(bench/watch.py shows them)"),
        ("--explain", COUNT, "K", None,
         "print the plan of iteration K, and go on"),
        ("--timeout", SECONDS, "SECONDS", 300.0,
         "after which a silent rank counts as lost (300)"),
    ],
}
# fmt: on
# Not as the others: its value may be left out.
PROFILE = dict(
    type=NATURAL,
    metavar="K",
    nargs="?",
    const=0,
    help="with --output: rank 0 writes profile.json.gz, of 8 iterations after the first K (0)",
)
DESCRIPTION = """\
Serve a trace with one pool of KV cache over all ranks. Each rank is an instance: it computes, and
holds a part of the pool, in segments of a few tokens. Prompts that begin alike share segments,
wherever these are."""
EXAMPLES = """\
examples:
  torchrun --standalone --nproc-per-node=4 run_cluster.py
      serves the demo on four ranks of this machine, with or without GPUs
  torchrun --standalone --nproc-per-node=8 run_cluster.py \\
      --model DIR --trace FILE.jsonl --output out
      serves a trace on eight GPUs, and writes answers and times into out/
"""


def make_parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        usage="[torchrun --standalone --nproc-per-node=N] run_cluster.py [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, type, metavar, default, help in options:
            if type is FLAG:
                group.add_argument(name, action="store_true", help=help)
            elif type is SWITCH:
                group.add_argument(name, action=SWITCH, help=help)
            else:
                choices = type.expected.removeprefix("one of ")
                group.add_argument(
                    name,
                    type=type,
                    metavar=metavar or "{" + choices + "}",
                    help=help,
                    default=default,
                )
    group.add_argument("--profile", **PROFILE)
    return parser


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError naming the option."""
    options = make_parser().parse_args(arguments)
    options.command = shlex.join(["run_cluster.py", *arguments])
    require(
        options.model or not options.random_weights,
        "--random-weights needs --model DIR (the built-in model is random)",
    )
    for name in ("trace_block", "trace_time_unit", "trace_scale"):
        said = f"--{name.replace('_', '-')} needs --trace FILE"
        require(options.trace or not getattr(options, name), said)
    form = TraceForm.of(options)
    if options.trace:
        options.trace_block = form.block
        options.trace_time_unit = options.trace_time_unit or "ms"
    said = f"a divisor of {form.block} is expected (the tokens of a hash id)"
    require(form.block % form.scale == 0, f"--trace-scale: '{form.scale}': {said}")
    require(options.output or options.profile is None, "--profile needs --output DIR")
    require(options.output or not options.resume, "--resume needs --output DIR")
    require(options.output or not options.record, "--record needs --output DIR")
    if options.verify is None:
        options.verify = not (options.trace or options.model)
    return options


# ── set-up: what the user gave is checked, and made ──────────────────────────────────────────────


def prepare(options, cluster, device, memory):
    """Checks what the user gave → (lines, Text, LakeConfig, Llama). memory: bytes of the smallest
    device. (`said`, here and elsewhere: the message if what follows is not so.)"""
    if options.output and cluster.rank == 0 and not resumes(options):
        require_unused(options.output)
    config = choose_config(options, cluster)
    said = "--stop-at-eos: the model's config.json and generation_config.json have no eos_token_id"
    require(config.eos_token_ids or not options.stop_at_eos, said)
    text = Text(options.model)
    lines = read_lines(options, config, text, cluster.rank)
    check_policy(options.scheduler, cluster.size)
    dtype = choose_dtype(options, config, device)
    check_weights(options, config, dtype, device, cluster, memory)
    lake_config = size_lake(options, config, lines, dtype, device, cluster, memory)
    check_lines(lines, config, lake_config, cluster.size)
    if cluster.rank == 0:
        form = TraceForm.of(options)
        warn_of_long_segments(lines, form, lake_config.segment_tokens, warn)
    if options.model and not options.random_weights:
        weights = load_weights(options.model, config, dtype, device)
    else:
        weights = random_weights(config, options.seed, dtype, device)
    return lines, text, lake_config, Llama(config, weights)


def warn(said):
    """Of what is ignored, or may surprise."""
    print(f"run_cluster.py: {one_line(said)}", file=Forgiving(sys.stderr), flush=True)


def choose_config(options, cluster) -> LlamaConfig:
    """That of the built-in model, or of --model as its weights are."""
    folder = options.model
    config = load_config(folder) if folder else LlamaConfig()
    if not folder or options.random_weights:
        return config
    as_stored = with_own_head(folder, config)
    if as_stored != config and cluster.rank == 0:
        said = f"{HEAD} differs from the embedding, and is used"
        warn(f"--model {folder}: {said} (config.json says tie_word_embeddings true)")
    return as_stored


def read_lines(options, config, text, rank) -> list[TraceLine]:
    """The trace, or the demo. What is ignored of it rank 0 says."""
    if not options.trace:
        demo = demo_trace(options.num_requests or 48, config.vocab_size, options.seed)
        return read_trace(demo, "demo")
    form = TraceForm.of(options)
    warn_first = warn if rank == 0 else lambda said: None
    if form.scaled_block < FEW_TOKENS:
        said = f"some blocks of {form.scaled_block} tokens are equal by chance, and hit"
        warn_first(f"--trace-scale {form.scale}: {said}")
    return open_trace(
        "--trace", options.trace, form, options.num_requests, warn_first, text.encode
    )


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


def configure_lake(options, config, num_ranks, on_gpu) -> LakeConfig:
    """As the options have it, and what suits where they leave it open; slots are left to
    `size_lake`."""
    C = options.segment_tokens or (512 if options.model and on_gpu else 16)
    said = f"no more than the model's {config.max_positions} positions is expected"
    require(C <= config.max_positions, f"--segment-tokens {C}: {said}")
    return LakeConfig(
        segment_tokens=C,
        placement=options.placement,
        replicate_factor=options.replicate_factor,
        pull_tokens=options.pull_tokens,
        chunk_tokens=options.chunk_tokens or 4 * C,
        max_batch=options.max_batch or (64 * num_ranks if on_gpu else 32),
        one_communicator=options.one_communicator,
    )


def bytes_of_iteration(config, lake_config, lines, dtype, num_ranks) -> int:
    """Of tensors that an iteration takes at most: the trace may have less than is allowed."""
    tokens = sum(line.total for line in lines)
    most = replace(
        lake_config,
        chunk_tokens=min(lake_config.chunk_tokens, tokens),
        max_batch=min(lake_config.max_batch, len(lines)),
        pull_tokens=min(lake_config.pull_tokens, tokens),
    )
    return iteration_bytes(config, most, num_ranks, dtype)


def size_lake(options, config, lines, dtype, device, cluster, memory):
    """The LakeConfig, with as many slots as are wanted or as there is room for."""
    on_gpu = device.type == "cuda"
    lake_config = configure_lake(options, config, cluster.size, on_gpu)
    C = lake_config.segment_tokens
    row_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    staging_bytes = lake_config.staging(cluster.size) * row_bytes
    weight_bytes = config.num_parameters * dtype.itemsize
    taken = bytes_of_iteration(config, lake_config, lines, dtype, cluster.size)
    taken += GPU_RESERVE * on_gpu
    memory //= cluster.ranks_per_device(device)
    room = max(0, memory - weight_bytes - taken)
    # By default a tenth is left for what is not foreseen, and a CPU holds 32k tokens at most.
    slots = max(1, (9 * room // 10 - staging_bytes) // (C * row_bytes))
    if not on_gpu:
        slots = min(slots, -(-32_768 // C))
    slots = options.slots or slots
    slab_bytes = slots * C * row_bytes + staging_bytes
    require(
        slab_bytes <= room,
        f"--slots {slots} of {C} tokens, with staging for --chunk-tokens and --max-batch: a rank "
        f"needs {slab_bytes:,} bytes on {device}, of its {memory:,} there are "
        f"{room:,} beside {weight_bytes:,} of weights and {taken:,} for an iteration",
    )
    return replace(lake_config, slots=slots)


def check_lines(lines, config, lake_config, num_ranks):
    """Raises ValueError for a token that is not in the vocabulary, and for a request that is longer
    than the model's positions or than the pool."""
    V = config.vocab_size
    for line in lines:
        highest = max(line.input_ids or [0])
        said = f"the prompt has the token {highest}; ids below the vocabulary's {V} are expected"
        require(highest < V, f"{line.where}: {said}")
    longest = max(lines, key=lambda line: line.total)
    said = f"prompt and answer are {longest.total} tokens, the model has {config.max_positions}"
    said += " positions"
    if longest.input_ids is None:
        said += " (--trace-scale makes a trace smaller)"
    require(longest.total <= config.max_positions, f"{longest.where}: {said}")
    # The last token takes no room: it is never fed to the model.
    needed = -(-(longest.total - 1) // lake_config.segment_tokens)
    there = lake_config.slots * num_ranks
    said = f"the request needs {needed} segments, the pool has {there}; more --slots are expected"
    require(needed <= there, f"{longest.where}: {said}")


# ── the server ────────────────────────────────────────────────────────────────────────────────────


def profiler(file: Path, after, results):
    """Writes a profile of this rank for Perfetto: functions by name, operators, kernels. It covers
    eight iterations (a `step` ends one) after so many others: each takes megabytes, and a second to
    write."""

    def write(seen):
        try:
            seen.export_chrome_trace(str(file))
        except OSError as error:
            results.error = f"{file}: {error.strerror}"

    # It warns that nothing is left out before, which is meant.
    warnings.filterwarnings("ignore", message="Profiler won't be using warmup")
    return torch.profiler.profile(
        with_stack=True,
        schedule=torch.profiler.schedule(wait=after, warmup=0, active=8, repeat=1),
        on_trace_ready=write,
    )


def observe_plans(server):
    """--record and --explain: for as long as they want it, the engine tells an observer of its
    plans."""
    options = server.options
    header = describe_run(server.lake, server.model.dtype, options)
    file = PlansFile(options.output, header) if options.record else None
    last = last_observed(options)

    def take(record):
        iteration = record["iteration"]
        if iteration <= (options.record or 0):
            try:
                file.append(record)
            except OSError as error:
                server.results.error = f"{file.path}: {error.strerror}"
        if iteration == options.explain:
            # It clears the progress bar, and draws it again.
            tqdm.write(explain(header, record) + "\n", file=Forgiving(sys.stdout))
        if iteration == last:
            server.engine.observer = None

    server.engine.observer = Observer(server.scheduler, take)


def last_observed(options) -> int:
    """The last iteration that --record or --explain asks for; 0: none does."""
    return max(options.record or 0, options.explain or 0)


def warn_of_early_end(options, iterations):
    """--record or --explain has asked for more iterations than there were."""
    for name, asked in ("--record", options.record), ("--explain", options.explain):
        if (asked or 0) > iterations:
            warn(f"{name} {asked}: the run ended after {iterations} iterations")


class Server:
    """Serves a trace: sends requests when they are due, keeps their times, writes their records.
    text: of the model's tokenizer; earlier: what an earlier run has served of the trace, see
    `Results.earlier`."""
    def __init__(self, options, cluster, lines, text, lake_config, model, results, earlier):
        self.options = options
        self.cluster = cluster
        self.lines = lines
        self.text = text
        self.model = model
        self.results = results
        block = TraceForm.of(options).scaled_block
        self.tokens = RandomTokens(model.config.vocab_size, block, options.seed)
        ranks = list(range(cluster.size))
        self.lake = TokenLake(
            ranks, model.config, lake_config, cluster, model.dtype, model.device
        )
        self.scheduler = Scheduler(
            self.lake, results.eos, options.scheduler, options.tbt_slo_ms
        )
        sampler = Sampler(options.temperature, options.seed)
        # The clock goes on from where the earlier run is known to have been.
        clock = max((answer.ended_ns for answer in earlier.values()), default=0)
        self.engine = Engine(
            cluster,
            self.lake,
            self.scheduler,
            model,
            sampler,
            options.plan_ahead,
            clock,
        )
        self.is_finished = np.zeros(len(lines), bool)
        self.is_finished[list(earlier)] = True
        self.asked_tokens = 0  # of requests that have ended: see `summarise_pool`
        # By request id: rank 0's ns since the start, of its arrival and its tokens.
        self.times = {}
        self.arrivals = []  # a heap of (time, request id)
        self.pause_said = ""
        for line in lines:
            if line.index in earlier:
                self._recall(line, earlier[line.index])
            elif not line.previous:
                self._expect(line, 0)

    def scaled_ns(self, trace_ms) -> int:
        return int(trace_ms * 1e6 / self.options.speed)

    def count_finished(self) -> str:
        return f"{self.is_finished.sum()} of {len(self.lines)} are finished"

    def serve(self, bar, on_iteration):
        """Iterations until all is finished. Raises LakeError, Stopped."""
        engine = self.engine
        arrivals = self.arrivals
        while arrivals or self.scheduler.waiting or self.scheduler.running:
            self._send_due()
            pause = (arrivals[0][0] - engine.clock) / 1e9 if arrivals else 0
            self._show_pause(bar, pause)
            tokens, ended = engine.step(pause)
            for id in tokens:
                self.times[id].append(engine.clock)
            records = [self._finish(request) for request in ended]
            bar.update(len(records))
            on_iteration(self, records)
            if self.results.error:
                self.cluster.ask_stop()
        # Nobody leaves while another goes on.
        self.cluster.doing = "the end"
        self.cluster.announce(THE_END)
        self.cluster.confirm()

    def _show_pause(self, bar, pause):
        """If nothing runs for a while: when the next request comes, in seconds. In a log, which has
        no bar, once for each pause."""
        said = ""
        if pause >= SHOWN_PAUSE and not (self.scheduler.waiting or self.scheduler.running):
            said = f"next arrival in {pause:,.0f} s"
        if not bar.disable and said != self.pause_said:
            bar.set_postfix_str(said)
        if bar.disable and said and not self.pause_said and self.cluster.rank == 0:
            warn(said)
        self.pause_said = said

    def _expect(self, line, earliest):
        """A line is due at its time, and not before `earliest` [ns]."""
        due = max(self.scaled_ns(line.timestamp), earliest)
        heapq.heappush(self.arrivals, (due, line.index))

    def _send_due(self):
        while self.arrivals and self.arrivals[0][0] <= self.engine.clock:
            due, index = heapq.heappop(self.arrivals)
            self.times[index] = [due]
            line = self.lines[index]
            self.scheduler.add(line.arrive(self.tokens))
            self._leave(line)

    def _recall(self, line, answer):
        """What an earlier run has finished: next turns and `verify` want its tokens."""
        if self.options.verify or line.next_turns:
            request = line.arrive(self.tokens)
            request.tokens += answer.output_ids
            request.logprobs += answer.output_logprobs
        self._leave(line)
        self._end_turn(line, answer.ended_ns)

    def _leave(self, line):
        """It is sent."""
        if previous := line.leave():
            self._forget(previous)

    def _finish(self, request) -> dict:
        """A request has ended: writes and returns its record."""
        times = self.times.pop(request.id)
        record = self._record(request, times)
        self.is_finished[request.id] = True
        self.asked_tokens += request.peak
        self._end_turn(self.lines[request.id], times[-1])
        self.results.append(record)
        return record

    def _record(self, request, times) -> dict:
        """Its line of requests.jsonl."""
        first, *intervals = (round((b - a) / 1e6, 3) for a, b in zip(times, times[1:]))
        output_ids = request.tokens[request.num_prompt :]
        record = dict(
            request_id=request.id,
            session_id=self.lines[request.id].session_id,
            status="completed",
            arrival_s=times[0] / 1e9,
            input_length=request.num_prompt,
            cached_tokens=self.scheduler.cached_tokens.pop(request.id),
            output_ids=output_ids,
            output_logprobs=request.logprobs,
            ttft_ms=first,
            tpot_ms=round(sum(intervals) / len(intervals), 3) if intervals else None,
            itl_ms=intervals,
            finished_s=times[-1] / 1e9,
        )
        if self.text.is_used:
            record["output_text"] = self.text.decode(output_ids)
        return record

    def _end_turn(self, line, ended_ns):
        """The session's next turns are due a while after this one."""
        if not line.next_turns:
            self._forget(line)
        for turn in line.next_turns:
            if not self.is_finished[turn.index]:
                self._expect(turn, ended_ns + self.scaled_ns(turn.think_ms))

    def _forget(self, line):
        """Nobody asks for its tokens any more, unless they are to be verified."""
        if not self.options.verify:
            line.request = None
            for rank in range(self.cluster.size):
                self.engine.computed.pop((line.index, rank), None)
                self.engine.sampled.pop((line.index, rank), None)


# ── the program ──────────────────────────────────────────────────────────────────────────────────


def run(arguments: list[str], on_iteration=lambda server, finished: None) -> int:
    """The whole program on one rank; returns its exit status. One rank says what went wrong."""
    error = None
    cluster = Cluster(first_timeout(arguments))
    before = {kind: signal.getsignal(kind) for kind in SIGNALS}
    try:
        for kind in SIGNALS:
            signal.signal(kind, interrupt)
        server = set_up(arguments, cluster.connect())
        for kind in SIGNALS:
            signal.signal(kind, lambda *_: cluster.ask_stop())
        error = serve_and_report(server, on_iteration)
    except (SetupError, LakeError) as problem:
        error = problem
    except KeyboardInterrupt:
        error = cluster.give_up("stopped by a signal")
    finally:
        ignore_signals()  # torchrun sends one as soon as a rank has left
        if error:
            tell(error, cluster)
        else:  # with a lost rank this may wait for it
            cluster.close()
        for kind, handler in before.items():
            signal.signal(kind, handler)
    return 2 if isinstance(error, SetupError) else int(error is not None)


def interrupt(*_):
    """During set-up a signal ends all. A second one changes nothing."""
    ignore_signals()
    raise KeyboardInterrupt


def ignore_signals():
    for kind in SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


def tell(error, cluster):
    """One rank says it, and all say it to torchrun, whose own report is the last on the screen."""
    said = one_line(str(error))
    if cluster.speaks():
        # The progress bar of another rank may stand there.
        start = "\n" if cluster.rank and cluster.doing else ""
        line = f"{start}run_cluster.py: {said}"
        print(line, file=Forgiving(sys.stderr), flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(file, "w") as file:
            json.dump(dict(message=said, timestamp=int(time.time())), file)


class Forgiving:
    """A text stream that may break off, as a pipe does whose reader has left."""
    def __init__(self, stream):
        self.stream = stream
        self.broken = False

    def write(self, text):
        self._try(self.stream.write, text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, method, *arguments):
        try:
            method(*arguments)
        except (OSError, ValueError):  # a ValueError: it is closed
            self.broken = True

    def __getattr__(self, name):
        return getattr(self.stream, name)


def first_timeout(arguments: list[str]) -> float:
    """--timeout, which is needed before ranks can talk. So options are read twice: what is wrong
    with them is said the second time, by one rank; --help is printed here, by one rank."""
    first = os.environ.get("RANK", "0") == "0"
    out = sys.stdout if first else open(os.devnull, "w")
    with contextlib.suppress(ValueError), contextlib.redirect_stdout(out):
        return parse_options(arguments).timeout
    return 60.0


def set_up(arguments, cluster) -> "Server":
    """Everything that is checked or made before the first request. Raises SetupError on all ranks
    if something is wrong on any."""
    options = cluster.together(parse_options, arguments)
    set_threads(options, cluster)
    device, memory = cluster.together(cluster.choose_device, options.device)
    memory = min(cluster.gather_objects(memory))
    if options.plan_ahead is None:
        options.plan_ahead = all(cluster.gather_objects(device.type == "cuda"))
    prepared = cluster.together(prepare, options, cluster, device, memory)
    lines, text, lake_config, model = prepared
    options_but_spelling = vars(options) | dict(command=None)
    asked = lines, predecessors(lines)
    made = options_but_spelling, asked, lake_config, model.config, model.dtype
    what = "options, another trace or another model"
    cluster.together(cluster.require_same, repr(made), what)
    # They are read for other ranks and for run.json; a large model takes seconds.
    compared = cluster.size > 1 or options.output
    sums = checksums(model.weights.by_name(model.config)) if compared else {}
    require_same_weights(sums, cluster)
    eos = model.config.eos_token_ids if options.stop_at_eos else ()
    results = Results(options.output, cluster, model.config.vocab_size, eos)
    basis = answers_basis(options, lines, model, sums)
    cluster.together(results.begin, basis, lines, resumes(options))
    earlier = cluster.from_rank_0(results.earlier)
    results.earlier = {}  # the server takes of it what it needs
    return Server(options, cluster, lines, text, lake_config, model, results, earlier)


def require_same_weights(sums, cluster):
    """Raises SetupError, on all ranks, if any has other weights than rank 0."""
    every = cluster.gather_integers(list(sums.values()))
    for rank, values in enumerate(every):
        for name, value, first in zip(sums, values, every[0]):
            said = f"rank {rank} has another {name} than rank 0; the same is expected"
            if value != first:
                raise SetupError(said)


def set_threads(options, cluster):
    """The ranks of a machine share its cores; the built-in model needs one only. A rank that is
    alone heeds OMP_NUM_THREADS (torchrun sets it, to 1, for several)."""
    if cluster.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:
        cores = (os.cpu_count() or 1) if options.model else 1
        torch.set_num_threads(max(1, cores // cluster.local_size))


def serve_and_report(server, on_iteration) -> str | None:
    """Serves, verifies, and reports however that ends; returns what is wrong. To be called once.
    `on_iteration(server, new records)`."""
    outcome = Outcome(int(server.is_finished.sum()))
    try:
        serve_and_verify(server, on_iteration, outcome)
        server.cluster.doing = "the report"
        outcome.moved = sum_bytes(server.cluster, server.lake.pool)
    except LakeError as problem:
        outcome.error = f"{problem}; {server.count_finished()}"
    except BaseException as problem:
        outcome.error = f"{problem!r}; {server.count_finished()}"
        raise
    finally:
        if server.cluster.rank == 0:
            report(server, outcome)
    return outcome.error


def serve_and_verify(server, on_iteration, outcome):
    options = server.options
    first = server.cluster.rank == 0
    engine = server.engine
    if first:
        print(format_header(server), end="\n\n", file=Forgiving(sys.stdout), flush=True)
    if first and options.profile is not None:
        file = options.output / "profile.json.gz"
        engine.profile = profiler(file, options.profile, server.results)
    if first and last_observed(options):
        observe_plans(server)
    with tqdm(
        total=len(server.lines),
        initial=outcome.resumed,
        unit="request",
        leave=False,
        disable=None if first else True,  # None: where it is not drawn on a terminal
        file=Forgiving(sys.stderr),
    ) as bar:
        try:
            with engine.profile or contextlib.nullcontext():
                server.serve(bar, on_iteration)
            if first and options.profile is not None and not file.exists():
                said = f"the run ended after {engine.iterations}; nothing is written"
                warn(f"--profile {options.profile} iterations are left out: {said}")
            if first:
                warn_of_early_end(options, engine.iterations)
            if options.verify:
                verify_all(server, bar, outcome)
            if outcome.error is None:
                outcome.status = "completed"
        except Stopped as stopped:
            unwritten = server.cluster.from_rank_0(server.results.error)
            outcome.status = "failed" if unwritten else "stopped"
            outcome.error = f"{unwritten or stopped}; {server.count_finished()}"


def verify_all(server, bar, outcome):
    """All requests, which have finished."""
    requests = [line.request for line in server.lines]
    bar.set_description("verifying")
    bar.reset(len(requests))
    verdict = outcome.verdict = verify(server.engine, requests, bar.update)
    if verdict.wrong:
        first = verdict.wrong[0]
        outcome.error = f"request {first} differs from recomputation without a cache"
    elif len(verdict.recomputed) < len(requests):
        verified = f"{len(verdict.recomputed)} of {len(requests)} are verified"
        outcome.error = f"stopped by a signal; {verified}"
        outcome.status = "stopped"


def report(server, outcome):
    """summary.json, then the table. What can't be written is an error, too."""
    summary = summarise(server, outcome)
    if earlier := server.results.earlier_summary:
        summary = summarise_again(earlier, summary, outcome)
    unwritten = [server.results.error] if server.results.error else []
    if outcome.error and unwritten and unwritten[0] in outcome.error:
        unwritten = []
    try:
        server.results.write_json("summary.json", summary)
    except ValueError as problem:
        unwritten.append(str(problem))
    out = Forgiving(sys.stdout)
    print(format_report(summary), file=out, flush=True)
    if out.broken:
        unwritten.append("the report could not be printed")
    outcome.error = "; ".join(filter(None, [outcome.error, *unwritten])) or None


def main() -> int:
    # Streams that are closed lead nowhere.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # if its encoding lacks a character
    status = run(sys.argv[1:])
    for stream in streams:
        Forgiving(stream).flush()
    return status


if __name__ == "__main__":
    # At once: after a lost rank, what C++ has to do at an orderly exit may end in an abort.
    os._exit(main())
