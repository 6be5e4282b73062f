"""What does a run leave behind? The folder of --output, and the table at the end.

    run.json         what the answers depend on: who goes on with the folder has to have the same
    requests.jsonl   a line for each request, as it finishes: each write leaves a whole line or none
    summary.json     at the end, however the run ends: a whole file or none
    plans.jsonl      with --record: a line for each iteration, see record.py

A crash loses what was cached, and what was computed of requests that were not finished: `--resume`
serves these again. Their answers are the same, as each token is drawn with noise of its own (see
model.Sampler): in float64 token for token, in float32 but for near ties, since batches differ.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from array import array
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from balancer import variation
from model import GENERATOR, dtype_name, one_line, read_json, require, shown
from oracle import Verdict
from traces import predecessors

HERE = Path(__file__).resolve().parent
CV_WINDOW = 32  # iterations
TIMES = ("ttft_ms", "tpot_ms", "itl_ms")
STATISTICS = ("mean", "median", "p90", "p99")  # of times
OUTPUTS = ("requests.jsonl", "summary.json", "profile.json.gz", "plans.jsonl")
LAUNCH = "launch"  # key of run.json: see `launch_id`

# ── the folder ───────────────────────────────────────────────────────────────────────────────────


class EarlierAnswer(NamedTuple):
    """What the rest of a run needs of a request that an earlier run has finished."""
    ended_ns: int  # when its last token was known, by the clock
    output_ids: list[int]
    output_logprobs: list[float]


class Results:
    """What --output holds: run.json, which says what the answers depend on; requests.jsonl, a line
    for each request as it finishes; at the end summary.json. Rank 0 has the folder; elsewhere, and
    without --output, nothing is written."""
    def __init__(self, folder: Path | None, cluster, vocab_size, eos: tuple):
        self.vocab_size = vocab_size
        self.eos = eos  # tokens that end an answer early
        self.is_rank_0 = cluster.rank == 0
        self.folder = folder if self.is_rank_0 else None
        self.totals = Totals()
        # EarlierAnswers by request id, of the run that this one goes on with.
        self.earlier = {}
        # What that run has said at its end, if it has served all.
        self.earlier_summary = None
        self.error = None  # why nothing is written any more
        self._file = None

    def begin(self, basis: dict, lines, resuming):
        """Makes the folder or, `resuming`, goes on with what it holds, if that is of the same
        basis. Raises ValueError."""
        if self.folder is None:
            return
        path = self.folder / "requests.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)
            self._lock()
            if not resuming:
                # Since that was asked first, another run may have begun and ended.
                require_unused(self.folder)
            if resuming and path.stat().st_size:
                self._require_same_basis(basis)
                self._recover(path, lines)
            if len(self.earlier) == len(lines):
                self.earlier_summary = self._read_summary()
            if self.earlier_summary is None:
                # It says how the earlier run ended, not this one.
                (self.folder / "summary.json").unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"--output {self.folder}: {error.strerror}") from None
        self.write_json("run.json", basis | {LAUNCH: launch_id()})

    def _read_summary(self) -> dict | None:
        """That of a run which has ended well."""
        with contextlib.suppress(ValueError):
            summary = read_json(self.folder / "summary.json")
            if isinstance(summary, dict) and summary.get("status") == "completed":
                return summary

    def _lock(self):
        """For as long as it is open: two runs would write a request twice."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = "another run writes there; a new folder is expected"
            raise ValueError(f"--output {self.folder}: {said}") from None

    def _require_same_basis(self, basis):
        before = read_basis(self.folder)
        for what, value in basis.items():
            said = "it was begun by another version of this program; a new folder is expected"
            require(what in before, f"--resume {self.folder}: {said}")
            was = before[what]
            said = f"it was begun with another {what}"
            if what not in ("trace", "model"):
                said += f": {shown(was)}, now {shown(value)}"
            said += "; the same, or a new folder, is expected"
            require(was == value, f"--resume {self.folder}: {said}")

    def _recover(self, path, lines):
        """Takes over the records of finished requests. The last line may be torn: it is cut off."""
        text = path.read_bytes()
        *whole, torn = text.split(b"\n")
        for number, record_text in enumerate(whole, 1):
            where = f"{path}:{number}"
            line, answer = self._take_over(record_text, lines, where)
            id = line.index
            require(id not in self.earlier, where, f"request {id} is there twice")
            before = line.previous
            said = f"request {id} is there, but not the one before it in its session"
            require(before is None or before.index in self.earlier, where, said)
            self.earlier[id] = answer
        os.truncate(path, len(text) - len(torn))

    def _take_over(self, record_text, lines, where):
        """The line of the trace that a record answers, and the answer."""
        try:
            record = json.loads(record_text)
            line = lines[range(len(lines)).index(record["request_id"])]
            tokens = record["output_ids"]
            logprobs = record["output_logprobs"]
            ended_ns = round(record["finished_s"] * 1e9)
            ok = self._is_sound(record) and self._is_whole(tokens, line)
            ok = ok and are_logprobs(logprobs, len(tokens))
            self.totals.add(record, len(tokens))
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
            ok = False
        require(ok, where, "not the record of a request of this trace")
        return line, EarlierAnswer(ended_ns, tokens, logprobs)

    def _is_sound(self, record) -> bool:
        counts = [record[key] for key in ("request_id", "input_length", "cached_tokens")]
        times = [record[key] for key in ("arrival_s", "finished_s", "ttft_ms")]
        return (
            record["status"] == "completed"
            and all(type(count) is int and 0 <= count < 2**48 for count in counts)
            and all(0 <= time < 1e9 for time in [*times, *record["itl_ms"]])
        )

    def _is_whole(self, tokens, line) -> bool:
        """Whether an answer has all its tokens, and none that does not exist."""
        vocabulary = range(self.vocab_size)
        exist = all(type(token) is int and token in vocabulary for token in tokens)
        ended = len(tokens) == line.output_length or tokens[-1] in self.eos
        return exist and ended and 0 < len(tokens) <= line.output_length

    def append(self, record: dict):
        """A request has finished. What goes wrong is kept in `error`."""
        if self._file and not self.error:
            self._append_line(json.dumps(record).encode() + b"\n")
        if self.is_rank_0 and not self.error:
            self.totals.add(record, len(record["output_ids"]))

    def _append_line(self, line):
        """Writes it whole, or notes in `error` what went wrong: also that what was written is gone,
        as the file was removed, or another stands in its place."""
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
            written = os.fstat(self._file.fileno())
            if not os.path.samestat(written, os.stat(self._file.name)):
                raise OSError(errno.ESTALE, "it was replaced by another file")
        except OSError as error:
            self.error = f"{self._file.name}: {error.strerror}"
            with contextlib.suppress(OSError):
                self._file.truncate(size)

    def write_json(self, name, value):
        """A JSON file, whole or not at all. Raises ValueError."""
        if self.folder is None:
            return
        file = self.folder / name
        partial = self.folder / f"{name}.partial"
        try:
            partial.write_text(json.dumps(value, indent=1, default=str) + "\n")
            partial.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise ValueError(f"{file}: {error.strerror}") from None


def are_logprobs(values, number) -> bool:
    sound = (type(value) is float and -1e9 < value <= 0 for value in values)
    return len(values) == number and all(sound)


def read_basis(folder: Path) -> dict:
    """run.json. Raises ValueError."""
    file = folder / "run.json"
    basis = read_json(file)
    require(isinstance(basis, dict), file, "a JSON object is expected")
    return basis


def launch_id() -> str:
    """The same for all restarts by one torchrun, and another for another torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"process {os.getppid()}" if run == "none" else run


def resumes(options) -> bool:
    """Whether to go on with what --output holds: if that is asked for, or torchrun has restarted
    the run that wrote it."""
    if options.resume or not options.output:
        return options.resume
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    with contextlib.suppress(ValueError):
        return restarted and read_basis(options.output).get(LAUNCH) == launch_id()
    return False


def require_unused(folder: Path):
    """Raises ValueError if a folder holds results. An empty file holds none."""
    for name in OUTPUTS:
        file = folder / name
        said = f"already holds {name}; a new folder, or --resume, is expected"
        used = os.path.exists(file) and os.path.getsize(file)
        require(not used, f"--output {folder}: {said}")


def answers_basis(options, lines, model, sums: dict) -> dict:
    """What the answers of a run, and their times, depend on. sums: checksums of the model's
    weights."""

    def digest(value):
        return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()

    fields = "session_id timestamp think_ms salt input_length output_length"
    fields = [*fields.split(), "input_ids", "hash_ids"]
    asked = [attrgetter(*fields)(line) for line in lines]
    names = "trace_scale", "trace_block", "seed", "temperature", "stop_at_eos", "speed"
    return {
        "number of requests": len(lines),
        "--dtype": dtype_name(model.dtype),
        "generator of noise": GENERATOR,
        **{"--" + name.replace("_", "-"): plain(getattr(options, name)) for name in names},
        # What depends on these comes last, so that they are named.
        "trace": digest((asked, predecessors(lines))),
        "model": digest((model.config, sums)),
    }


# ── summary and table ────────────────────────────────────────────────────────────────────────────


class Totals:
    """What the report needs of finished requests."""
    def __init__(self):
        self.counts = Counter()
        self.first_arrival = math.inf  # s
        self.times = {name: array("d") for name in TIMES}

    def add(self, record: dict, output_tokens: int):
        self.counts.update(
            requests=1,
            inputs=record["input_length"],
            cached=record["cached_tokens"],
            outputs=output_tokens,
        )
        self.first_arrival = min(self.first_arrival, record["arrival_s"])
        for name, values in self.times.items():
            values.extend(x for x in np.atleast_1d(record[name]) if x is not None)


@dataclass
class Outcome:
    """How a run ended."""
    resumed: int  # requests that an earlier run had finished
    status: str = "failed"  # or completed, or stopped (by a signal)
    error: str | None = None
    verdict: Verdict | None = None  # None: it was not asked for
    moved: dict | None = None  # bytes by kind


def ratio(part, whole):
    return part / whole if whole else None


def summarise_totals(totals, clock_s) -> dict:
    """Of finished requests, as vLLM's and SGLang's serving benchmarks name it."""
    counts = totals.counts
    inputs = counts["inputs"]
    outputs = counts["outputs"]
    any_finished = counts["requests"] > 0
    seconds = clock_s - (totals.first_arrival if any_finished else 0.0)
    seconds_if_any = seconds if any_finished else None
    summary = dict(
        completed=counts["requests"],
        duration=seconds,
        total_input_tokens=inputs,
        total_output_tokens=outputs,
        request_throughput=ratio(counts["requests"], seconds_if_any),
        output_throughput=ratio(outputs, seconds_if_any),
        total_token_throughput=ratio(inputs + outputs, seconds_if_any),
        hit_rate=ratio(counts["cached"], inputs),
    )
    for name, values in totals.times.items():
        statistics = [None] * len(STATISTICS)
        if values:
            statistics = [np.mean(values), *np.percentile(values, (50, 90, 99))]
        summary |= {f"{kind}_{name}": x for kind, x in zip(STATISTICS, statistics)}
    return summary


def sum_bytes(cluster, pool) -> dict[str, int]:
    """Bytes that left any rank, by kind. Collective."""
    bytes_of_ranks = cluster.gather_objects(pool.bytes)
    return {kind: sum(left[kind] for left in bytes_of_ranks) for kind in pool.bytes}


def summarise_pool(server) -> dict:
    """What the pool did in this run: counters and balance."""
    engine = server.engine
    lake = server.lake
    scheduler = server.scheduler
    counters = scheduler.counters
    # The last, shorter one counts only if there is no other.
    whole = engine.iterations // CV_WINDOW
    unfinished = [r for r in scheduler.waiting + scheduler.running if r not in scheduler.ending]
    longest = engine.busy[1]
    return dict(
        iterations=engine.iterations,
        computed_tokens=counters["computed_tokens"],
        recomputed_tokens=counters["recomputed_tokens"],
        dropped_rows=counters["dropped_rows"],
        asked_tokens=server.asked_tokens + sum(request.peak for request in unfinished),
        preemptions=counters["preemptions"],
        evictions=lake.balancer.evictions,
        replicas_max=lake.balancer.replicas_max,
        puts_local=ratio(counters["puts_local"], counters["puts"]),
        decode_puts_local=ratio(counters["decode_puts_local"], counters["decode_puts"]),
        cache_reads=sum(engine.reads, np.zeros(server.cluster.size, np.int64)).tolist(),
        cache_load_cv=variation(engine.reads[:whole] or engine.reads),
        kv_bytes_read=engine.tokens_read * lake.kv_bytes * lake.llama_config.num_layers,
        idle_fraction=ratio(np.ptp(engine.busy), longest),
    )


def summarise_config(server) -> dict:
    """Every option as it was taken. JSON has no infinity: that is text."""
    values = vars(server.options) | vars(server.lake.config)
    values |= dict(
        ranks=server.cluster.size,
        device=server.model.device,
        dtype=dtype_name(server.model.dtype),
    )
    del values["command"]
    return {key: plain(value) for key, value in values.items()}


def plain(value):
    """As JSON has it; else as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, int) else str(value)


def command_line(program: str) -> str:
    """As it was typed, but for where the program lies: that is nobody's business."""
    return shlex.join([program, *sys.argv[1:]])


def summarise_environment(command: str) -> dict:
    """What the run was made with, for who compares it with another."""
    has_gpu = torch.cuda.is_available()
    return dict(
        command=command,
        commit=commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version_of("triton"),
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        gpus=torch.cuda.device_count(),
        cpus=os.cpu_count(),
        platform=platform.platform(),
    )


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of this project; a plus sign if there are changes that are not committed. None without git."""
    if not (HERE / ".git").exists():
        return None
    command = "git describe --always --abbrev=12 --dirty=+ --exclude=*".split()
    try:
        # It only looks: a disk that is full would leave a lock behind.
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(
            command, cwd=HERE, capture_output=True, text=True, timeout=10, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def summarise(server, outcome) -> dict:
    """summary.json. Bytes are null if a rank was lost before it said its own."""
    summary = summarise_totals(server.results.totals, server.engine.clock / 1e9)
    summary |= summarise_pool(server)
    moved = outcome.moved or dict.fromkeys(server.lake.pool.bytes)
    summary |= {f"{kind}_bytes": count for kind, count in moved.items()}
    return summary | dict(
        status=outcome.status,
        error=outcome.error,
        resumed=outcome.resumed,
        **summarise_verdict(outcome.verdict),
        config=summarise_config(server),
        environment=summarise_environment(server.options.command),
    )


def summarise_again(earlier: dict, summary: dict, outcome) -> dict:
    """summary.json of a run that had nothing to serve: what the earlier one has measured stays, and
    what this one has found of its answers is added."""
    if earlier.keys() != summary.keys():  # of another version
        return summary
    found = summarise_verdict(outcome.verdict) if outcome.verdict else {}
    return earlier | found | dict(status=outcome.status, error=outcome.error)


def summarise_verdict(verdict) -> dict:
    """What verification found; null where it was not asked for, or is not finite."""
    names = "verified max_logit_gap max_logprob_error logprob_rounding differing_requests".split()
    if verdict is None:
        return dict.fromkeys(names)
    found = verdict.gap, verdict.error, verdict.rounding
    found = [x if math.isfinite(x) else None for x in found]
    verified = len(verdict.recomputed) - len(verdict.wrong)
    return dict(zip(names, [verified, *found, verdict.wrong]))


def format_header(server) -> str:
    """What is going to run, said before the first request."""
    options = server.options
    cluster = server.cluster
    config = server.model.config
    lake = server.lake.config
    on_gpu = server.model.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores"
    exchanges = f"exchanges by {cluster.backend}" if cluster.backend else "no exchanges"
    weights = "random weights" if options.random_weights or not options.model else "its weights"
    values = dict(
        ranks=cluster.size,
        device=device,
        exchanges=exchanges,
        model=options.model or "built-in",
        weights=weights,
        config=config,
        dtype=dtype_name(server.model.dtype),
        lake=lake,
        pool_slots=lake.slots * cluster.size,
        pool_tokens=lake.slots * cluster.size * lake.segment_tokens,
        scheduler=options.scheduler,
        trace=options.trace or "the demo",
        num_requests=len(server.lines),
        span=max(line.timestamp for line in server.lines) / 1e3,
        speed=describe_speed(options.speed),
    )
    # Names of files may have line breaks.
    return "\n".join(one_line(line.format(**values)) for line in HEADER)


HEADER = (
    "       ranks  {ranks} on {device}; {exchanges}",
    "       model  {model}, {weights}: {config.num_layers} layers, {config.num_heads} heads "
    "({config.num_kv_heads} of KV) of {config.head_dim}, {config.num_parameters:,} "
    "parameters, {dtype}",
    "        pool  {pool_slots:,} slots ({lake.slots:,} per rank), each a segment of "
    "{lake.segment_tokens} tokens: {pool_tokens:,} tokens",
    "   scheduler  {scheduler}: {lake.chunk_tokens:,} prompt tokens per rank and iteration, "
    "{lake.max_batch:,} requests at once",
    "       trace  {trace}: {num_requests:,} requests over {span:,.1f} s{speed}",
)


def describe_speed(speed: float) -> str:
    """At which time goes, if that is another than the trace's."""
    if math.isinf(speed):
        return " of trace, all sent at once"
    return "" if speed == 1 else f", {speed:g} times as fast"


REPORT = """\
    requests  {completed} in {duration:.1f} s, {output_throughput:,.0f} output tokens/s
    hit rate  {hit_rate:.1%} of {total_input_tokens:,} prompt tokens were found in the pool
    computed  {computed_tokens:,} of {asked_tokens:,} tokens of prompts and answers; the rest were hits
              ({recomputed_tokens:,} of them twice, after a preemption)
  cache load  {shares} of cache reads, by rank
              (in 32 iterations each, on average: coefficient of variation {cache_load_cv:.2f})
     KV read  {read} MB; what several requests share counts once an iteration
     TTFT ms  {ttft} (to the first token)
     TPOT ms  {tpot} (per later token)
       moved  queries and results {query} MB, old KV pulled {pull} MB, copies {replica} MB,
              new KV to siblings {sibling} MB and to homes {put} MB ({puts_local:.1%} was computed at home)
    pressure  evictions {evictions:,}, preemptions {preemptions:,}"""
RESUMED = "\n     resumed  {resumed} of them were there already"
VERIFIED = "\n    verified  {verified}/{checked} "
DIFFERENT = "; {different} DIFFER"
EQUAL = "equal recomputation without a cache, token for token"
NEAR = "are as near recomputation without a cache as rounding allows"
LOGPROBS = "\n              log-probabilities differ by {max_logprob_error:.2g} at most; "
LOGPROBS += "the model's own rounding is {logprob_rounding:.2g}"
MOVED = "query pull replica sibling put".split()  # kinds of bytes


def format_report(summary: dict) -> str:
    """The report that ends a run, from its summary. What was not measured is a dash."""
    form = REPORT
    if summary["verified"] is not None:
        form += VERIFIED + (EQUAL if summary["max_logit_gap"] == 0 else NEAR)
        form += (DIFFERENT if summary["differing_requests"] else "") + LOGPROBS
    reads = summary["cache_reads"]
    different = len(summary["differing_requests"] or [])
    values = {key: np.nan if value is None else value for key, value in summary.items()}
    if summary["resumed"]:
        form += RESUMED

    def times(name):
        return "  ".join(f"{kind} {values[f'{kind}_{name}']:,.0f}" for kind in STATISTICS)

    text = form.format(
        **values,
        different=different,
        checked=(summary["verified"] or 0) + different,
        shares="  ".join(f"{n / max(1, sum(reads)):.1%}" for n in reads),
        read=f"{values['kv_bytes_read'] / 1e6:,.1f}",
        **{kind: f"{values[f'{kind}_bytes'] / 1e6:,.1f}" for kind in MOVED},
        ttft=times("ttft_ms"),
        tpot=times("tpot_ms"),
    )
    return text.replace("nan%", "–").replace("nan", "–")


if __name__ == "__main__":
    print(__doc__)
