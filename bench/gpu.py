"""What is proven on a GPU? One command says so, on a bare machine with a card, in eight minutes.

    python bench/gpu.py                              # all steps; results: gpu.json, and a table
    python bench/gpu.py engine kernels --output FILE # some of them
    torchrun --nproc-per-node=8 bench/gpu.py         # several cards: what one cannot show

Each step is a process with a limit of its own, in order of worth; what it found is written as it
comes, so that a cut loses nothing. A step that fails is a line that says so, exit status 1.
Without a GPU all of it runs with tiny shapes, kernels in Triton's interpreter: that is a rehearsal
(a test does it), and its times mean nothing.

    facts      versions, what the device copies and multiplies in a second
    tests      the tests of kernels and engine, on the device
    demo       the README's first command, four ranks on one card, all verified
    bf16-1b    two ranks, bfloat16, at Llama-3.2-1B's shapes, verified by log-probabilities
    bf16-8b    one rank at Llama-3.1-8B's
    engine     an iteration of decodes beside its floor (weights and KV once, at copy speed), what
               host and device do in it, launches, the longest kernels, memory
    kernels    bench/kernel_speed.py, a few shapes
    sanitizer  compute-sanitizer over ragged shapes, where it is installed
    generate   Hugging Face transformers at the same shapes, where it is installed

On several cards every rank takes part: exchanges that are uneven or empty, of both groups at once;
a thousand iterations, verified; bandwidth; an iteration beside its floor; a rank that is killed.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import kernels  # noqa: E402
import oracle  # noqa: E402
from balancer import Request  # noqa: E402
from cluster import Cluster, LakeError  # noqa: E402
from engine import Engine  # noqa: E402
from kernel_speed import copy_bandwidth  # noqa: E402
from model import Llama, LlamaConfig, Sampler, cut, one_line, random_weights  # noqa: E402
from options import Parser, run_main  # noqa: E402
from pool import LakeConfig  # noqa: E402
from provenance import describe_machine  # noqa: E402
from scheduler import Scheduler  # noqa: E402
from tokenlake import TokenLake  # noqa: E402
from work import AtOnce, KVSpans, QueryRows, Work  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
TOTAL_SECONDS = 470  # of all steps
TINY = LlamaConfig(num_layers=2)
LLAMA_1B = LlamaConfig(128_256, 2048, 8192, 16, 32, 8, 64, rope_theta=5e5, max_positions=131_072)
LLAMA_8B = LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, 128, rope_theta=5e5, max_positions=131_072)
ON_A_DEVICE = (
    "on_a_gpu or over_nccl or free_of_a_gpu or test_partial_attention or test_merge "
    "or anothers_nan or what_a_kernel_reads or same_everywhere"
)


class Skipped(Exception):
    """Something that a step needs is not there."""


def synchronize():
    if GPU:
        torch.cuda.synchronize()


def shapes(config: LlamaConfig) -> LlamaConfig:
    """Those, or tiny ones in a rehearsal."""
    return config if GPU else TINY


# ── steps on one card ────────────────────────────────────────────────────────────────────────────


def facts() -> dict:
    import triton

    found = dict(
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
        cpus=os.cpu_count(),
        device=torch.cuda.get_device_name() if GPU else "none",
    )
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        found |= dict(
            multiprocessors=properties.multi_processor_count,
            memory_gb=properties.total_memory / 1e9,
            nccl=".".join(map(str, torch.cuda.nccl.version())),
            copy_tb_s=copy_bandwidth() / 1e12,
        )
    n = 8192 if GPU else 64
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in "ab")
    a @ b
    synchronize()
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize()
    found["bf16_product_tflop_s"] = 10 * 2 * n**3 / (time.perf_counter() - started) / 1e12
    return found


def tests() -> dict:
    """The machine may have nothing but pytest. Raises RuntimeError if a test fails."""
    if not importlib.util.find_spec("pytest"):
        raise Skipped("pytest is not installed")
    chosen = ON_A_DEVICE if GPU else "test_merge"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "6"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        raise RuntimeError("; ".join([str(counts), *failed[:5]]))
    return counts


def serve(ranks, *options) -> dict:
    """run_cluster.py as a user runs it → what its summary says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", str(HERE.parent / "run_cluster.py"), *options]
        command += ["--output", f"{folder}/out", "--timeout", "60"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = re.findall(r"run_cluster.py: .*", done.stderr) or done.stderr.splitlines()
            raise RuntimeError(said[-1] if said else f"exit status {done.returncode}")
        summary = json.loads(Path(folder, "out", "summary.json").read_text())
    keys = "completed verified max_logit_gap max_logprob_error logprob_rounding duration iterations"
    keys += " output_throughput hit_rate median_ttft_ms median_tpot_ms query_bytes"
    return {key: summary[key] for key in keys.split()} | dict(slots=summary["config"]["slots"])


def demo() -> dict:
    return serve(4, "--device", DEVICE, *([] if GPU else ["--num-requests", "6"]))


def serve_in_16_bits(config: LlamaConfig, ranks) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config = shapes(config)
        file = dict(
            model_type="llama",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
            torch_dtype="bfloat16",
        )
        Path(folder, "config.json").write_text(json.dumps(file))
        options = ["--model", folder, "--random-weights", "--dtype", "bfloat16", "--verify"]
        options += ["--segment-tokens", "64", "--device", DEVICE]
        return serve(ranks, *options, "--num-requests", "24" if GPU else "6")


def kernel_table() -> list:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.json")
        command = [sys.executable, str(HERE / "kernel_speed.py"), "--small", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.splitlines()[-1])
        return json.loads(file.read_text())


def sanitizer() -> dict:
    """The kernels over ragged shapes, every access checked."""
    places = Path("/usr/local").glob("cuda*/bin/compute-sanitizer")
    tool = shutil.which("compute-sanitizer") or next(map(str, places), None)
    if GPU and not tool:
        raise Skipped("compute-sanitizer is not installed")
    command = [sys.executable, str(HERE / "gpu.py"), "--ragged"]
    command = [tool, "--tool", "memcheck", *command] if GPU else command
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = re.findall(r"ERROR SUMMARY: .*", done.stdout) or done.stdout.splitlines()[-1:]
    if done.returncode or GPU and "ERROR SUMMARY: 0 errors" not in said:
        raise RuntimeError("; ".join(said or done.stderr.splitlines()[-1:]))
    return dict(said=said[0])


def ragged():
    """For `sanitizer`: heads that no power of two divides, ends of segments, rows without keys."""
    for heads, kv_heads, head_dim, rows, context in (32, 8, 128, 37, 333), (6, 2, 24, 5, 117):
        q = torch.randn(rows + 1, heads, head_dim, device=DEVICE)
        kv = torch.randn(2 * context, 2, kv_heads, head_dim, device=DEVICE)
        reader = np.append(np.zeros(rows, int), 1)
        position = np.append(np.arange(context - rows, context), 0)
        work = Work(
            QueryRows(reader, np.arange(rows + 1), position),
            KVSpans(*np.array([[0, 0], [7, 99], [50, context - 50], [0, 50]])),
            heads,
            kv_heads,
            resident=AtOnce(64, 21),
        )
        o, lse = kernels.partial_attention(q, kv, work, 0.1, "triton")
        if not (o.isfinite().all() and lse[:-1].isfinite().all()):
            raise RuntimeError("a result is not finite")
        if o[-1].any() or not (lse[-1] == -torch.inf).all():
            raise RuntimeError("a row without keys is not empty")
        print(f"{heads} heads of {head_dim}: right")


# ── the engine: an iteration beside its floor ────────────────────────────────────────────────────


class Clock:
    """Host seconds of functions by name, while it is on."""
    def __init__(self, *functions):
        self.functions = functions  # (owner, name)
        self.seconds = defaultdict(list)

    def __enter__(self):
        self.before = [getattr(owner, name) for owner, name in self.functions]
        for (owner, name), function in zip(self.functions, self.before):
            setattr(owner, name, self._timed(name, function))
        return self

    def __exit__(self, *_):
        for (owner, name), function in zip(self.functions, self.before):
            setattr(owner, name, function)

    def _timed(self, name, function):
        def timed(*arguments, **options):
            started = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[name].append(time.perf_counter() - started)
            return result

        return timed

    def per_iteration(self, iterations) -> dict:
        return {name: 1e3 * sum(x) / iterations for name, x in self.seconds.items()}


def make_engine(cluster, model, lake_config) -> Engine:
    """Over all ranks of the job, as they are served."""
    ranks = [*range(cluster.size)]
    device = torch.device(model.device)
    lake = TokenLake(ranks, model.config, lake_config, cluster, model.dtype, device)
    return Engine(cluster, lake, Scheduler(lake), model, Sampler(), plan_ahead=GPU)


def decode_scene(cluster, model, batch, prompt, copy) -> dict:
    """`batch` requests of so many tokens, all decoding: an iteration, and what is in it."""
    C = 512 if GPU else 16
    rounds = 15 if GPU else 3
    chunk = 4096 if GPU else 64
    answer = rounds + 10 + batch * prompt // chunk
    slots = batch * -(-(prompt + answer + C) // C) // cluster.size + 2 * batch
    lake_config = LakeConfig(C, slots, chunk_tokens=chunk, max_batch=batch)
    engine = make_engine(cluster, model, lake_config)
    rng = np.random.default_rng(0)
    V = model.config.vocab_size
    requests = [
        Request(id, rng.integers(V, size=prompt).tolist(), prompt + answer) for id in range(batch)
    ]
    for request in requests:
        engine.scheduler.add(request)
    synchronize()
    started = time.perf_counter()
    while any(len(request.tokens) == prompt for request in requests):
        engine.step()
    synchronize()
    prefill = time.perf_counter() - started
    parts = Clock(
        *[(Scheduler, name) for name in ("schedule", "advance", "fill")],
        *[(TokenLake, name) for name in ("gen_plans", "init_query", "put", "query")],
        (Llama, "forward"),
    )
    seconds = []
    with parts:
        for _ in range(rounds):
            synchronize()
            started = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started)
    tokens = sum(len(request.tokens) for request in requests)
    kv_bytes = tokens * engine.lake.kv_bytes * model.config.num_layers
    found = dict(
        scene=f"{batch} x {prompt:,}",
        iteration_ms=1e3 * statistics.median(seconds),
        least_ms=1e3 * min(seconds),
        prefill_tokens_s=batch * prompt / prefill,
        host_ms=parts.per_iteration(rounds),
    )
    if GPU:
        weights = model.config.num_linear_parameters * model.dtype.itemsize
        floor = 1e3 * (weights + kv_bytes / cluster.size) / copy
        found |= dict(floor_ms=floor, over_floor=found["iteration_ms"] / floor)
        found |= device_side(engine)
        found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return found


def device_side(engine, iterations=2) -> dict:
    """What the device does in an iteration: how long, in how many launches, and most of all."""
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as seen:
        for _ in range(iterations):
            engine.step()
        synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [event for event in seen.key_averages() if event.device_type == on_device]
    events.sort(key=lambda event: -event.self_device_time_total)
    count = sum(event.count for event in events) / iterations
    return dict(
        device_busy_ms=sum(e.self_device_time_total for e in events) / iterations / 1e3,
        launches=count,
        launches_per_layer=count / engine.model.config.num_layers,
        longest={cut(e.key, 60): e.self_device_time_total / iterations / 1e3 for e in events[:8]},
    )


def random_model(config) -> Llama:
    dtype = torch.bfloat16 if GPU else torch.float32
    return Llama(config, random_weights(config, 0, dtype, DEVICE))


def engine() -> dict:
    started = time.perf_counter()
    model = random_model(shapes(LLAMA_8B))
    synchronize()
    found = dict(weights_s=time.perf_counter() - started)
    copy = copy_bandwidth()
    cluster = Cluster()
    scenes = [(1, 16_384), (64, 4096), (16, 16_384)] if GPU else [(1, 40), (3, 24)]
    found["scenes"] = [decode_scene(cluster, model, *scene, copy) for scene in scenes]
    return found


def generate() -> list:
    """What a user would take instead."""
    if not importlib.util.find_spec("transformers"):
        raise Skipped("transformers is not installed")
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    config = shapes(LLAMA_8B)
    theirs = TheirConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(theirs).eval()
    found = []
    for batch, prompt in [(1, 16_384), (16, 4096), (64, 4096)] if GPU else [(1, 40)]:
        ids = torch.randint(config.vocab_size, (batch, prompt), device=DEVICE)
        seconds = []
        for tokens in (2, 2, 18):  # the first warms up
            synchronize()
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            synchronize()
            seconds.append(time.perf_counter() - started)
        step = (seconds[2] - seconds[1]) / 16
        found.append(
            dict(scene=f"{batch} x {prompt:,}", decode_ms=1e3 * step, two_tokens_s=seconds[1])
        )
    return found


# ── several cards ────────────────────────────────────────────────────────────────────────────────


def check_exchanges(cluster, rounds) -> dict:
    """Rows that say where they come from, over both groups at once, in numbers that differ, and
    are zero for some: every one has to arrive."""
    engine = make_engine(cluster, random_model(TINY), LakeConfig(slots=8))
    pool = engine.lake.pool
    N = cluster.size
    rng = np.random.default_rng(0)
    for turn in range(rounds):
        waits = []
        for group in pool.query_group, pool.move_group:
            rows = rng.integers(0, 4, (N, N)) * rng.integers(0, 300, (N, N))
            sends = rows[cluster.rank].tolist()
            receives = rows[:, cluster.rank].tolist()
            mine = torch.full((sum(sends), 3), cluster.rank, device=pool.device)
            mine[:, 1] = torch.from_numpy(np.repeat(np.arange(N), sends))
            mine[:, 2] = turn
            waits.append((receives, pool._exchange(mine, sends, receives, group)))
        for receives, wait in waits:
            source = torch.from_numpy(np.repeat(np.arange(N), receives))
            expected = torch.stack(
                (source, torch.full_like(source, cluster.rank), torch.full_like(source, turn)), 1
            )
            if not torch.equal(wait().cpu(), expected):
                raise RuntimeError(f"round {turn}: rows are lost, or changed")
    return dict(rounds=rounds, backend=dist.get_backend(pool.query_group))


def check_engine(cluster, iterations) -> dict:
    """So many iterations of a small model, and every answer verified."""
    lake_config = LakeConfig(segment_tokens=16, slots=200, chunk_tokens=64, max_batch=8)
    model = Llama(TINY, random_weights(TINY, 0, torch.float32, DEVICE))
    engine = make_engine(cluster, model, lake_config)
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(TINY.vocab_size, size=200).tolist() for _ in range(3)]
    requests = []
    while engine.iterations < iterations:
        while len(engine.scheduler.waiting) + len(engine.scheduler.running) < 8:
            own = rng.integers(TINY.vocab_size, size=rng.integers(1, 90)).tolist()
            prompt = prefixes[rng.integers(3)] + own
            requests.append(Request(len(requests), prompt, len(prompt) + int(rng.integers(1, 24))))
            engine.scheduler.add(requests[-1])
        engine.step()
    while engine.scheduler.waiting or engine.scheduler.running:
        engine.step()
    verdict = oracle.verify(engine, requests, lambda n: None)
    if verdict.wrong:
        raise RuntimeError(f"{len(verdict.wrong)} of {len(requests)} answers are wrong")
    return dict(iterations=engine.iterations, verified=len(requests), error=verdict.error)


def measure_bandwidth(cluster) -> list:
    """Of an exchange of queries, by bytes that each rank sends."""
    engine = make_engine(cluster, random_model(TINY), LakeConfig(slots=8))
    pool = engine.lake.pool
    found = []
    for megabytes in (0.01, 1, 64) if GPU else (0.01, 0.1):
        rows = max(cluster.size, int(megabytes * 1e6 / 1024))
        splits = [rows // cluster.size] * cluster.size
        sent = torch.zeros(sum(splits), 256, device=pool.device)
        seconds = []
        for _ in range(10):
            synchronize()
            started = time.perf_counter()
            pool._exchange(sent, splits, splits, pool.query_group)()
            synchronize()
            seconds.append(time.perf_counter() - started)
        found.append(
            dict(
                bytes=sent.nbytes,
                us=1e6 * statistics.median(seconds),
                gb_s=sent.nbytes / statistics.median(seconds) / 1e9,
            )
        )
    return found


def large_iteration(cluster) -> dict:
    model = random_model(shapes(LLAMA_8B))
    batch, prompt = (64, 4096) if GPU else (3, 24)
    return decode_scene(cluster, model, batch, prompt, copy_bandwidth())


def lose_a_rank(cluster) -> dict:
    """The last rank dies in an iteration: what do the others say, and when?"""
    engine = make_engine(cluster, random_model(TINY), LakeConfig(slots=64))
    engine.scheduler.add(Request(0, [1] * 40, 400))
    started = time.perf_counter()
    try:
        for _ in range(5):
            engine.step()
        if cluster.rank == cluster.size - 1:
            os._exit(0)
        started = time.perf_counter()
        for _ in range(300):
            engine.step()
    except LakeError as error:
        return dict(said=str(error), seconds=time.perf_counter() - started)
    raise RuntimeError("a rank has died, and nobody has noticed")


def on_several(report, names) -> int:
    """Collective."""
    cluster = Cluster(timeout=60).connect()
    cluster.choose_device(DEVICE)
    if cluster.rank == 0:
        report.begin(cluster.size)
    failed = 0
    for name in names or STEPS_OF_SEVERAL:
        started = time.perf_counter()
        try:
            found = STEPS_OF_SEVERAL[name](cluster)
        except Exception as error:
            found = dict(failed=cut(one_line(repr(error)), 300))
            failed += 1
        if cluster.rank == 0:
            report.add(name, found, time.perf_counter() - started)
    return int(failed > 0)


# The last leaves no job to go on with.
STEPS_OF_SEVERAL = {
    "exchanges": lambda cluster: check_exchanges(cluster, 300 if GPU else 10),
    "iterations": lambda cluster: check_engine(cluster, 1000 if GPU else 20),
    "bandwidth": measure_bandwidth,
    "large": large_iteration,
    "lost-rank": lose_a_rank,
}


# ── the report ───────────────────────────────────────────────────────────────────────────────────


class Step(NamedTuple):
    seconds: int  # at most
    run: Callable


STEPS = {
    "facts": Step(30, facts),
    "tests": Step(90, tests),
    "demo": Step(50, demo),
    "bf16-1b": Step(50, lambda: serve_in_16_bits(LLAMA_1B, 2)),
    "bf16-8b": Step(60, lambda: serve_in_16_bits(LLAMA_8B, 1)),
    "engine": Step(80, engine),
    "kernels": Step(50, kernel_table),
    "sanitizer": Step(30, sanitizer),
    "generate": Step(30, generate),
}


class Report:
    """All that was found so far, in a file that is always whole, and on the screen."""
    def __init__(self, file: Path):
        self.file = file
        device = torch.cuda.get_device_name() if GPU else "none: a rehearsal"
        self.content = dict(
            device=device, date=time.strftime("%Y-%m-%d", time.gmtime()), steps={}
        )

    def begin(self, ranks: int = 1):
        """What is shown, on what, with which settings: the lines above the table, and its head."""
        several = f"on {ranks} ranks, " if ranks > 1 else ""
        rehearsed = "" if GPU else "There is no GPU: a rehearsal, whose times mean nothing. "
        print(
            f"What is proven on a GPU? Run {several}on {describe_machine(DEVICE)}. {rehearsed}\n"
            f"All that is found: {self.file}. A name is followed by its value: _ms, _s and _gb at "
            "its end are units, duration is in seconds, lengths in tokens.\n\n"
            f"{'step':<10} {'took s':>8}  found",
            flush=True,
        )

    def add(self, name, found, seconds):
        self.content["steps"][name] = dict(seconds=round(seconds, 1), found=found)
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.file)
        print(f"{name:<10} {seconds:>8.1f}  {shorten(found)}", flush=True)


def shorten(found) -> str:
    """A line of what a step has found."""
    if isinstance(found, list):
        return f"{len(found)} lines"
    cells = []
    for key, value in found.items():
        if isinstance(value, float):
            value = f"{value:.3g}"
        if isinstance(value, (str, int)):
            cells.append(f"{key} {value}")
        elif isinstance(value, list) and value and "iteration_ms" in value[0]:
            for scene in value:
                over = f", {scene['over_floor']:.2f} of its floor" if "over_floor" in scene else ""
                cells.append(f"{scene['scene']}: {scene['iteration_ms']:.1f} ms{over}")
        elif isinstance(value, list):
            cells.append(f"{len(value)} {key}")
    return cut("  ".join(cells), 300)


def run_step(name, seconds) -> dict:
    """A step in a process of its own. `failed`: why there is no result; `skipped`: what lacks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        command = [sys.executable, str(HERE / "gpu.py"), "--step", name, "--output", str(file)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(timeout=seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as end:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.communicate()
            if isinstance(end, KeyboardInterrupt):
                raise
            return dict(failed=f"it took more than {seconds:.0f} s")
        if file.exists():
            return json.loads(file.read_text())
        said = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        return dict(failed=cut(one_line(said[-1]), 300))


def run_here(name, file: Path):
    """What `run_step` has started."""
    try:
        found = STEPS[name].run()
    except Skipped as lack:
        found = dict(skipped=str(lack))
    except RuntimeError as error:
        found = dict(failed=cut(one_line(error), 300))
    file.write_text(json.dumps(found))


def run_all(report, names) -> int:
    report.begin()
    started = time.monotonic()
    outcomes = Counter()
    for name in names or STEPS:
        left = TOTAL_SECONDS - (time.monotonic() - started)
        limit = min(STEPS[name].seconds if GPU else 600, max(1, left))
        began = time.perf_counter()
        found = run_step(name, limit) if left > 5 else dict(skipped="no time is left")
        report.add(name, found, time.perf_counter() - began)
        outcomes["failed"] += "failed" in found
    return int(outcomes["failed"] > 0)


def main(arguments: list[str]) -> int:
    parser = Parser(description="What is proven on a GPU?")
    add = parser.add_argument
    names = f"of {', '.join(STEPS)}; on several cards of {', '.join(STEPS_OF_SEVERAL)}"
    add("steps", nargs="*", help=f"{names}; default: all")
    add("--output", type=Path, default=Path("gpu.json"), help="a JSON file (gpu.json)")
    add("--step", choices=STEPS, help="that one, in this process")
    add("--ragged", action="store_true", help="kernels over ragged shapes, for a sanitizer")
    options = parser.parse_args(arguments)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    known = STEPS_OF_SEVERAL if several else STEPS
    for name in options.steps:
        if name not in known:
            parser.refuse(f"{cut(name, 20)}: there are {', '.join(known)}")
    if options.output.is_dir() or not options.output.absolute().parent.is_dir():
        said = "a file in a folder that is there is expected"
        parser.refuse(f"--output {cut(str(options.output), 80)}: {said}")
    if options.ragged:
        ragged()
    elif options.step:
        run_here(options.step, options.output)
    elif several:
        return on_several(Report(options.output), options.steps)
    else:
        return run_all(Report(options.output), options.steps)
    return 0


if __name__ == "__main__":
    run_main(main)
