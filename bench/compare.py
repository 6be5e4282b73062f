"""Why a pool? TokenLake against cache-aware routing and PD disaggregation (§7).

    python bench/compare.py --workload loogle --capacity-tokens 400000 \\
        --policies tokenlake,router,pd:1x3,pd:3x1 --seeds 3 --output DIR
    torchrun --standalone --nproc-per-node=4 bench/compare.py --real

The first simulates: per policy it finds the P90 goodput, the highest rate of requests at which 90 %
of them keep their SLO (simulate.py), by bisection, then runs all policies at the same rates. It
prints a table. With `--output DIR` it writes compare.json and figures: latency.svg (attainment and
latency over rate), balance.svg (cache reads per instance over time), and with `--capacities`
capacity.svg. A request of which TTFT or TPOT is not kept, and one that is refused as too long, has
missed.

What it measures it writes to DIR/measured.jsonl as it is found. So nothing is lost when it is
stopped: the same command goes on from there, and with more policies, seeds or rates measures only
what is new. What was made by other options, or by other code, is refused.

The second runs the policies one after another on real ranks, with the small model under memory
pressure, and compares every token with recomputation without a cache. Time means little there.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import product
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import simulate as sim  # noqa: E402
from balancer import variation  # noqa: E402
from baselines import make_fleet  # noqa: E402
from engine import Engine  # noqa: E402
from model import Llama, LlamaConfig, Sampler, random_weights, shown  # noqa: E402
from cluster import Cluster, LakeError  # noqa: E402
from pool import (  # noqa: E402
    PUT,
    InstanceMoves,
    LakeConfig,
    Moves,
)
from options import number, run_main, warn  # noqa: E402
from provenance import describe_machine, digest_of_code  # noqa: E402
from results import CV_WINDOW, sum_bytes  # noqa: E402
from oracle import verify  # noqa: E402
from run_cluster import PATH, Forgiving  # noqa: E402
from traces import RandomTokens, TraceForm, read_trace  # noqa: E402
from workloads import BLOCK, WORKLOADS, generate  # noqa: E402

PRECISION = 0.04  # of a goodput
LOWEST = 1 / 256  # requests/s that are tried
HIGHEST = 4096.0
# Rates of the curves, times the best goodput.
RATE_FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25)
POINT_KEYS = "slo_attainment refused normalised_ttft mean_tpot_ms hit_rate cache_load_cv".split()
SEGMENT = 8  # tokens, on real ranks; so are the blocks of their traces
IN_FLIGHT = 4  # requests for each of them
MEASURED = "measured.jsonl"
MEASURING = {  # what, in the words of its progress
    "goodput": "searches for a goodput",
    "point": "simulations at common rates",
}


# Simulated.


def attained(options, policy: str, seed: int, rate: float, capacity: int) -> bool:
    """Whether nine of ten requests keep their SLO."""
    limit = options.num_requests // 10
    run = sim.simulate(
        options, policy, rate=rate, seed=seed, limit=limit, capacity=capacity
    )
    return run.kept >= 0.9 * len(run.lines)


def goodput(options, policy: str, seed: int, capacity: int) -> float:
    """P90 goodput in requests/s: the rate is doubled or halved, then bisected. 0: none is kept."""
    low = 0.0
    high = np.inf
    rate = options.rate
    while high - low > PRECISION * high or high == np.inf:
        if attained(options, policy, seed, rate, capacity):
            low = rate
        else:
            high = rate
        if high == np.inf:
            rate = 2 * low
        elif low == 0:
            rate = high / 2
        else:
            rate = (low + high) / 2
        if rate < LOWEST or rate > HIGHEST:
            break
    return low


def point(options, policy: str, seed: int, rate: float, capacity: int) -> dict:
    """A whole run at a rate: parts of its summary, and cache reads per window and instance."""
    run = sim.simulate(options, policy, rate=rate, seed=seed, capacity=capacity)
    summary = run.summary()
    idle = np.zeros(options.instances)
    reads = []
    for window in range(max(run.window_reads, default=-1) + 1):
        instance_reads = run.window_reads.get(window, idle)
        reads.append(instance_reads.tolist())
    means = {key: summary[key] for key in POINT_KEYS}
    return dict(rate=rate, **means, reads=reads)


def mean(points: list[dict]) -> dict:
    """Of each value but `reads`; None where no point has it."""
    means = {}
    for key in points[0]:
        if key != "reads":
            values = [p[key] for p in points if p[key] is not None]
            means[key] = sim.mean(values)
    return means


# What is measured, side by side.


def begin_worker():
    """A worker leaves when its parent does, however that ends; Ctrl-C, which reaches both, is the
    parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent():
    parent_process().join()
    os._exit(1)


@contextmanager
def worker_processes():
    """One for each core. Who is interrupted does not wait for them."""
    executor = ProcessPoolExecutor(os.cpu_count(), initializer=begin_worker)
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()


def basis(options) -> dict:
    """What a measurement depends on, besides its case."""
    names = "workload num_requests model hardware tp instances chunk_tokens max_batch"
    named = {
        "--" + name.replace("_", "-"): getattr(options, name)
        for name in [*names.split(), "tbt_slo_ms", "rate"]
    }
    trace = None
    if options.workload not in WORKLOADS:
        content = Path(options.workload).read_bytes()
        trace = hashlib.blake2b(content, digest_size=16).hexdigest()
    code = digest_of_code(Path(__file__).resolve())
    return named | {"content of the trace": trace, "version of the code": code}


class Measured:
    """All that was measured: by what (a function's name) and case. In a folder it is a file, to
    which each is added as it is found."""
    def __init__(self, folder: Path | None, basis: dict):
        self.found = {}
        self.file = None
        if folder:
            self.where = f"--output {folder}"
            self._open(folder, basis)

    def _open(self, folder: Path, basis: dict):
        """Takes over what is there. Raises ValueError if it is of another comparison."""
        name = folder / MEASURED
        if (folder / "compare.json").exists() and not name.exists():
            said = f"already holds compare.json, without {MEASURED}; a new folder is expected"
            raise ValueError(f"{self.where}: {said}")
        self.file = open(name, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = "another comparison writes there; a new folder is expected"
            raise ValueError(f"{self.where}: {said}") from None
        self.file.seek(0)
        *lines, torn = self.file.read().split(b"\n")
        self.file.truncate(self.file.tell() - len(torn))
        entries = [read_entry(line, f"{name}:{n}") for n, line in enumerate(lines, 1)]
        if not entries:
            self._write(basis)
            return
        self._require_same(entries[0], basis)
        for entry in entries[1:]:
            self.found[entry["what"], tuple(entry["case"])] = entry["found"]

    def _require_same(self, before: dict, basis: dict):
        for what, value in basis.items():
            was = before.get(what)
            if was != value:
                values = f": {shown(was)}, now {shown(value)}" if what[0] == "-" else ""
                said = f"it was begun with another {what}{values}"
                raise ValueError(f"{self.where}: {said}; the same, or a new folder, is expected")

    def _write(self, entry: dict):
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()

    def add(self, what: str, case: tuple, found):
        self.found[what, case] = found
        if self.file:
            self._write(dict(what=what, case=case, found=found))


def read_entry(line: bytes, where: str) -> dict:
    """A line of MEASURED: the first is a basis, the others are measurements."""
    try:
        entry = json.loads(line)
        ok = entry.keys() >= {"version of the code"} or (
            entry["what"] in MEASURING and isinstance(entry["case"], list) and "found" in entry
        )
    except (ValueError, TypeError, LookupError, AttributeError):
        ok = False
    if not ok:
        raise ValueError(f"{where}: no measurement; a new folder is expected")
    return entry


class Comparison:
    """Goodputs, then points at common rates, of every policy and seed."""
    def __init__(self, options):
        self.options = options
        self.policies = options.policies
        self.seeds = range(options.seed, options.seed + options.seeds)
        self.capacity = options.capacity_tokens
        self.capacities = sorted({self.capacity, *options.capacities})
        self.measured = Measured(options.output, basis(options))

    def run(self):
        with worker_processes() as executor:
            searches = product(self.policies, self.seeds, self.capacities)
            self.goodputs = self._measure(executor, goodput, searches)
            self.rates = self.options.rates or self._rates()
            self.middle = self.rates[len(self.rates) // 2]
            curves = product(self.policies, self.seeds, self.rates, [self.capacity])
            sizes = product(self.policies, self.seeds, [self.middle], self.capacities)
            self.points = self._measure(executor, point, [*curves, *sizes])

    def _measure(self, executor, measure, cases) -> dict:
        """measure(options, *case) of each case, side by side: by case."""
        what = measure.__name__
        found = self.measured.found
        cases = list(dict.fromkeys(cases))  # some are there twice
        new = [case for case in cases if (what, case) not in found]
        kept = f", {len(cases) - len(new)} are there already" if len(new) < len(cases) else ""
        say(f"{len(cases)} {MEASURING[what]}{kept}")
        futures = {executor.submit(measure, self.options, *case): case for case in new}
        with tqdm(total=len(new), unit=what, leave=False, disable=None) as bar:
            for future in as_completed(futures):
                case = futures[future]
                self.measured.add(what, case, future.result())
                bar.update()
                if measure is goodput and case[-1] == self.capacity:
                    self._say_goodput(case[0])
        return {case: found[what, case] for case in cases}

    def _say_goodput(self, policy: str):
        """As soon as all its seeds are there."""
        found = self.measured.found
        keys = [("goodput", (policy, seed, self.capacity)) for seed in self.seeds]
        if all(key in found for key in keys):
            mean = np.mean([found[key] for key in keys])
            say(f"{policy}: goodput {format_goodput(mean)} requests/s")

    def _rates(self) -> list[float]:
        """Around the best goodput."""
        goodputs = [self._goodput(policy, self.capacity) for policy in self.policies]
        best = max(goodputs) or self.options.rate
        return [round(best * factor, 4) for factor in RATE_FACTORS]

    def _goodput(self, policy: str, capacity: int) -> float:
        by_seed = [self.goodputs[policy, seed, capacity] for seed in self.seeds]
        return float(np.mean(by_seed))

    def _mean_point(self, policy: str, rate: float, capacity: int) -> dict:
        by_seed = [self.points[policy, seed, rate, capacity] for seed in self.seeds]
        return mean(by_seed)

    def result(self, policy: str) -> dict:
        """A policy's entry in compare.json."""
        goodputs = [self.goodputs[policy, seed, self.capacity] for seed in self.seeds]
        curve = [self._mean_point(policy, rate, self.capacity) for rate in self.rates]
        overall = mean(curve)
        first_run = self.points[policy, self.seeds[0], self.middle, self.capacity]
        result = dict(
            p90_goodput=dict(
                mean=float(np.mean(goodputs)),
                spread=max(goodputs) - min(goodputs),
                seeds=goodputs,
            ),
            curve=curve,
            **{key: overall[key] for key in ("refused", "hit_rate", "cache_load_cv")},
            reads=first_run["reads"],
        )
        if len(self.capacities) > 1:
            result["capacities"] = [
                self._at(policy, capacity) for capacity in self.capacities
            ]
        return result

    def _at(self, policy: str, capacity: int) -> dict:
        """Goodput, and hits at the middle rate, with another capacity."""
        at_middle = self._mean_point(policy, self.middle, capacity)
        return dict(
            capacity_tokens=capacity,
            p90_goodput=self._goodput(policy, capacity),
            hit_rate=at_middle["hit_rate"],
        )


def say(text: str):
    """Of progress: above the bar, or into a log."""
    tqdm.write(text, file=sys.stderr)


def compare(options) -> dict:
    """compare.json: options, and results by policy."""
    comparison = Comparison(options)
    comparison.run()
    config = {}
    for name, value in vars(options).items():
        config[name] = str(value) if isinstance(value, Path) else value
    policies = {policy: comparison.result(policy) for policy in options.policies}
    return dict(config=config, policies=policies)


def describe(config: dict) -> str:
    """What was measured, on what, with which settings: the lines above a table."""
    roofline = sim.Roofline(sim.MODELS[config["model"]], config["hardware"], config["tp"])
    last_seed = config["seed"] + config["seeds"] - 1
    seeds = f"Seed {last_seed}"
    if config["seeds"] > 1:
        seeds = f"Means of seeds {config['seed']} to {last_seed}"
    return (
        f"P90 goodput: the highest rate at which 90 % of requests keep their SLO, TTFT and mean "
        f"TPOT at most {sim.SLO} times\n"
        "those of the request alone; spread: between seeds. CV: of the cache reads of instances, "
        f"in 10 s. {seeds}.\n"
        f"Simulated: {Path(config['workload']).stem}, {config['num_requests']:,} requests; "
        f"{name_fleet(config)}, {config['capacity_tokens']:,} tokens of cache,\n"
        f"chunks of {config['chunk_tokens']:,} tokens, up to {config['max_batch']:,} requests "
        f"at once. Run on {describe_machine()}.\n"
        f"Assumed: {sim.FLOPS_SHARE} of the peak FLOP/s, {sim.BANDWIDTH_SHARE} of the memory's "
        f"bandwidth, {1e6 * sim.ALPHA:.0f} µs an exchange, 16 bits, "
        f"{roofline.token_bytes:,} bytes of KV a token."
    )


def name_fleet(config: dict) -> str:
    hardware = config["hardware"].upper()
    return f"{config['instances']} instances of {config['tp']} {hardware}, {config['model']}"


def show(result: dict) -> str:
    """A table of what was found, at the lowest and the middle rate of the curve."""
    policies = result["policies"]
    curve = next(iter(policies.values()))["curve"]
    middle = len(curve) // 2
    low, high = (f"at {curve[i]['rate']:.3g} requests/s:" for i in (0, middle))
    names = "goodput spread TTFT TTFT TPOT hits CV refused".split()
    units = "requests/s requests/s ms/token ms/token ms % reads %".split()
    table = [
        describe(result["config"]),
        "",
        f"{'':>40} {low:>20}  {high}",
        f"{'policy':>18}" + format_cells(names),
        f"{'':>18}" + format_cells(units),
    ]
    for policy, entry in policies.items():
        goodputs = entry["p90_goodput"]
        at_lowest = entry["curve"][0]
        at_middle = entry["curve"][middle]
        cells = [
            format_goodput(goodputs["mean"]),
            cell(goodputs["spread"], ".3g"),
            cell(at_lowest["normalised_ttft"], ".4f"),
            cell(at_middle["normalised_ttft"], ".4f"),
            cell(at_middle["mean_tpot_ms"], ".1f"),
            cell(at_middle["hit_rate"], ".1%").rstrip("%"),
            cell(at_middle["cache_load_cv"], ".3f"),
            cell(at_middle["refused"], ".1%").rstrip("%"),
        ]
        table.append(f"{policy:>18}" + format_cells(cells))
    return "\n".join(table)


def format_cells(cells: list[str]) -> str:
    """Behind the name of a policy."""
    widths = (10, 10, 20, 12, 8, 6, 6, 8)
    return "".join(f" {text:>{width}}" for text, width in zip(cells, widths))


def format_goodput(rate: float) -> str:
    """Where all may come at once and keep the SLO, no limit was found."""
    return "unlimited" if rate > HIGHEST / 4 else f"{rate:.3g}"


def cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# Figures.


# A line each: colours of a middle tone, on white as on black, and a marker and a dash for who tells
# no colours apart.
COLOURS = "#2e86d1 #d5600f #1a9e74 #b565a7 #a8861d #7f7f7f".split()
MARKERS = "osDv^P"
DASHES = "-", "--", "-.", ":"
INK = "#787d85"  # of text and axes
MOST_LINES = 8  # that a legend names


def pyplot():
    """Matplotlib, which is not required, to draw into files. There is no background, so that a page
    may have any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inked = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color grid.color"
    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "figure.constrained_layout.use": True,
            "figure.titlesize": "medium",
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "savefig.transparent": True,
            "svg.hashsalt": "tokenlake",  # the same figure is the same file
            **dict.fromkeys(inked.split(), INK),
        }
    )
    return plt


def draw(result: dict, folder: Path):
    """The figures, after Figures 9 to 12 of the paper."""
    plt = pyplot()
    config = result["config"]
    policies = result["policies"]
    workload = Path(config["workload"]).stem
    setting = f"{workload}, {config['num_requests']:,} requests, {name_fleet(config)}"
    title = f"{setting}, {config['capacity_tokens']:,} tokens of cache"
    seeds = "one seed" if config["seeds"] == 1 else f"mean of {config['seeds']} seeds"
    save(draw_latency(plt, policies), f"{title}; {seeds}", folder / "latency.svg")
    curve = next(iter(policies.values()))["curve"]
    shown = f"lines: seed {config['seed']}; CV: {seeds}"
    at_rate = f"{title}\nat {curve[len(curve) // 2]['rate']:g} requests/s; {shown}"
    save(draw_balance(plt, policies), at_rate, folder / "balance.svg")
    if any("capacities" in entry for entry in policies.values()):
        save(draw_capacity(plt, policies), f"{setting}; {seeds}", folder / "capacity.svg")


def save(figure, title: str, path: Path):
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None})


def draw_latency(plt, policies: dict):
    """Attainment and latency over rate."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9))
    attainment, ttft, tbt = axes
    for axis, key in zip(axes, ("slo_attainment", "normalised_ttft", "mean_tpot_ms")):
        plot_curves(axis, policies, "curve", "rate", key)
        axis.set_xlabel("requests/s")
    attainment.set_ylabel("share of requests that keep the SLO")
    attainment.axhline(0.9, color=INK, linestyle=(0, (1, 3)))
    along_axis = attainment.get_yaxis_transform()
    attainment.text(1, 0.89, "goal: 0.9", transform=along_axis, ha="right", va="top")
    attainment.set_ylim(0, 1.03)
    ttft.set_ylabel("TTFT, ms per input token")
    ttft.set_yscale("log")
    tbt.set_ylabel("time between tokens, ms")
    add_legend(figure, attainment)
    return figure


def add_legend(figure, axis, title: str | None = None):
    """Below all panels, of the lines in one of them."""
    handles, labels = axis.get_legend_handles_labels()
    place = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=MOST_LINES, title=title)


def draw_balance(plt, policies: dict):
    """Cache reads per instance over time."""
    columns = min(3, len(policies))
    rows = -(-len(policies) // columns)
    figsize = (4 * columns, 1.1 + 2.5 * rows)
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, sharey=True, figsize=figsize
    )
    for axis in axes.ravel()[len(policies) :]:
        axis.remove()
    for axis, (policy, entry) in zip(axes.ravel(), policies.items()):
        plot_reads(axis, np.array(entry["reads"]).T / 1e6)
        middle = entry["curve"][len(entry["curve"]) // 2]
        axis.set_title(f"{policy}: CV {cell(middle['cache_load_cv'], '.2f')}")
        axis.set_xlabel("seconds")
    for first in axes[:, 0]:
        first.set_ylabel("million tokens of cache\nread in 10 s")
    if len(axes[0][0].lines) <= MOST_LINES:
        of_pd = " (of pd:PxD the first P compute prompts, the others decode)"
        named = of_pd if any("pd:" in policy for policy in policies) else ""
        add_legend(figure, axes[0][0], f"instances{named}")
    return figure


def plot_reads(axis, reads: np.ndarray):
    """A line per instance. reads: [instances, windows of 10 s]"""
    for instance, values in enumerate(reads):
        axis.plot(
            np.arange(len(values)) * 10,
            values,
            color=COLOURS[instance % len(COLOURS)],
            linestyle=DASHES[instance % len(DASHES)],
            linewidth=1.4,
            label=str(instance),
        )


def draw_capacity(plt, policies: dict):
    """Hits and goodput over capacity."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.9))
    hits, goodputs = axes
    for axis, key in zip(axes, ("hit_rate", "p90_goodput")):
        plot_curves(axis, policies, "capacities", "capacity_tokens", key, x_unit=1e3)
        axis.set(xlabel="cache, thousand tokens", ylim=(0, None))
    hits.set_ylabel("hit rate")
    goodputs.set_ylabel("P90 goodput, requests/s")
    add_legend(figure, hits)
    return figure


def plot_curves(axis, policies: dict, curve: str, x: str, y: str, x_unit: float = 1):
    """A line per policy; dotted, with hollow markers, in its colour what serves in order of
    arrival."""
    families = []
    for policy, entry in policies.items():
        family = policy.removesuffix(":fcfs")
        if family not in families:
            families.append(family)
        number = families.index(family)
        points = [p for p in entry[curve] if p[y] is not None]
        axis.plot(
            [p[x] / x_unit for p in points],
            [p[y] for p in points],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            fillstyle="full" if policy == family else "none",
            linestyle="-" if policy == family else ":",
            label=policy,
        )


# On real ranks.


class RealRun:
    """A fleet on real ranks: every lake steps in turn, on every rank, and transfers are moves."""
    def __init__(
        self, policy: str, cluster: Cluster, group, model: Llama, config: LakeConfig
    ):
        self.cluster = cluster
        self.policy = policy
        self.model = model
        self.fleet = make_fleet(
            policy,
            cluster.size,
            model.config,
            config,
            cluster=cluster,
            dtype=model.dtype,
        )
        self.engines = [
            Engine(cluster, lake, scheduler, model, Sampler())
            for lake, scheduler in zip(self.fleet.lakes, self.fleet.schedulers)
        ]
        # A request may have rows in several lakes: who has done what is counted together.
        for engine in self.engines:
            engine.computed = self.engines[0].computed
            engine.sampled = self.engines[0].sampled
        self.pool = next(lake.pool for lake in self.fleet.lakes if lake.pool)
        if self.pool.move_group is None:  # a lake of one has no group of its own
            self.pool.move_group = group[0]
        self.reads = []  # per iteration: [ranks] tokens of cache

    def carry(self, transfers):
        """Moves the KV, layer by layer, and tells the fleet."""
        while transfers:
            transfer = transfers.pop(0)
            leave, arrive, length = transfer.spans(SEGMENT)
            moves = Moves.of(
                (PUT, transfer.source, leave, transfer.target, arrive, length)
            )
            own_moves = InstanceMoves(
                moves, self.cluster.size, self.cluster.rank, self.pool.device
            )
            for layer in range(len(self.pool.slabs)):
                wait = self.pool.move(layer, own_moves)
                wait()
            self.fleet.landed(transfer)
            for i in range(len(self.engines)):
                transfers += self.fleet.advance(i)

    def check_room(self, lines):
        """Raises ValueError for a request that no lake has room for."""
        lake = self.fleet.lakes[0]
        room = len(lake.instances) * lake.balancer.slots * SEGMENT
        longest = max(line.total for line in lines)
        if longest > room:
            raise ValueError(
                f"--slots: a request has {longest} tokens, {room} fit into a lake"
            )

    def serve(self, lines, at_once: int) -> dict:
        """All lines, `at_once` of them in flight. Collective; the report is the same everywhere."""
        self.check_room(lines)
        waiting = list(lines)
        tokens = RandomTokens(self.model.config.vocab_size, SEGMENT, 0)
        requests = []
        in_flight = 0
        while waiting or in_flight:
            while waiting and in_flight < at_once:
                line = waiting.pop(0)
                request = line.arrive(tokens)
                requests.append(request)
                in_flight += 1
                self.carry(self.fleet.arrive(request))
            in_flight -= self.step()
        return self.report(requests)

    def step(self) -> int:
        """An iteration of every lake that has requests; returns how many of these ended."""
        num_ended = 0
        reads = np.zeros(self.cluster.size)
        for i, engine in enumerate(self.engines):
            if engine.scheduler.waiting or engine.scheduler.running:
                before = sum(engine.reads)
                _, ended = engine.step()
                num_ended += len(ended)
                reads[engine.lake.instances] += sum(engine.reads) - before
                self.carry(self.fleet.advance(i))
        self.reads.append(reads)
        return num_ended

    def reads_by_window(self) -> list:
        """As Engine.reads has them: here an iteration is one of every lake."""
        first_iterations = range(0, len(self.reads), CV_WINDOW)
        return [sum(self.reads[first : first + CV_WINDOW]) for first in first_iterations]

    def report(self, requests) -> dict:
        """What real.json says. Collective."""
        verdict = verify(self.engines[0], requests, lambda n: None)
        schedulers = self.fleet.schedulers
        prompts = sum(request.num_prompt for request in requests)
        return dict(
            policy=self.policy,
            requests=len(requests),
            rounds=len(self.reads),  # an iteration of every lake
            computed_tokens=sum(s.counters["computed_tokens"] for s in schedulers),
            preemptions=sum(s.counters["preemptions"] for s in schedulers),
            verified=len(verdict.recomputed) - len(verdict.wrong),
            hit_rate=sum(self.fleet.cached_tokens.values()) / prompts,
            cache_load_cv=variation(self.reads_by_window()),
            moved_bytes=sum_bytes(self.cluster, self.pool),
            evictions=sum(lake.balancer.evictions for lake in self.fleet.lakes),
        )


def real(options) -> int:
    """Every policy on these ranks. Returns 0 if all tokens are right."""
    cluster = Cluster().connect()
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // cluster.local_size))
    try:
        config = LlamaConfig()
        weights = random_weights(config, options.seed, torch.float32, "cpu")
        model = Llama(config, weights)
        ranks = list(range(cluster.size))
        group = cluster.new_groups(ranks, torch.device("cpu"), 1)
        lake_config = LakeConfig(SEGMENT, options.slots, chunk_tokens=64, max_batch=8)
        trace = generate(options.workload, options.num_requests, 1.0, options.seed)
        trace = [json.dumps(line) for line in trace]
        out = Forgiving(sys.stdout)  # all ranks go on, also if nobody reads what one says
        if cluster.rank == 0 and not options.json:
            heading = describe_real(options, cluster.size, len(trace))
            print(f"{heading}\n\n{REAL_HEADER}", file=out, flush=True)
        results = []
        for policy in options.policies:
            run = RealRun(policy, cluster, group, model, lake_config)
            form = TraceForm(scale=BLOCK // SEGMENT)
            lines = read_trace(trace, options.workload, form)
            results.append(run.serve(lines, IN_FLIGHT * cluster.size))
            if cluster.rank == 0:
                row = json.dumps(results[-1]) if options.json else show_real(results[-1])
                print(row, file=out, flush=True)
        if cluster.rank == 0 and options.output:
            write_json(options.output / "real.json", results)
    finally:
        cluster.close()
    wrong = [result for result in results if result["verified"] < result["requests"]]
    return 1 if wrong else 0


def describe_real(options, ranks: int, num_requests: int) -> str:
    """What is measured, on what, with which settings: the lines above the table."""
    scale = BLOCK // SEGMENT
    return (
        f"Every policy serves the same requests on {ranks} real ranks, one policy after another, "
        "and every token is compared\nwith recomputation without a cache. "
        f"{options.workload}, its lengths divided by {scale}: {num_requests} requests, seed "
        f"{options.seed}, {IN_FLIGHT * ranks} at once;\nthe built-in model in float32, "
        f"{options.slots} segments of {SEGMENT} tokens a rank. Run on {describe_machine()}:\n"
        "ranks share its cores, so times would mean little, and none is shown. "
        f"CV: of the cache reads of ranks, within {CV_WINDOW} iterations."
    )


MOVED = "query put replica pull".split()
REAL_HEADER = (
    f"{'policy':>10} {'verified':>9} {'hits':>6} {'CV':>5} {'computed':>9} {'evicted':>8} "
    f"{'rounds':>10} {'queries':>8} {'new KV':>8} {'replicas':>8} {'pulled':>8}\n"
    f"{'':>10} {'requests':>9} {'%':>6} {'reads':>5} {'tokens':>9} {'segments':>8} "
    f"{'':>10} {'MB moved':>8} {'MB moved':>8} {'MB moved':>8} {'MB moved':>8}"
)


def show_real(result: dict) -> str:
    """A row of the table."""
    query, put, replica, pull = (result["moved_bytes"][kind] / 1e6 for kind in MOVED)
    return (
        f"{result['policy']:>10} {result['verified']:>5}/{result['requests']:<3} "
        f"{100 * result['hit_rate']:>6.1f} {result['cache_load_cv']:>5.2f} "
        f"{result['computed_tokens']:>9,} {result['evictions']:>8,} "
        f"{result['rounds']:>10,} {query:>8,.1f} {put:>8,.1f} {replica:>8,.1f} {pull:>8,.1f}"
    )


# The command line.


def write_json(path: Path, result):
    path.write_text(json.dumps(result, indent=1) + "\n")


def by_commas(convert):
    """The type of an option with several values."""

    def values(text: str) -> list:
        return [convert(part) for part in text.split(",") if part]

    return values


def parser():
    command_line = sim.parser("Compare TokenLake with routing and PD disaggregation.")
    command_line.set_defaults(num_requests=None)
    add = command_line.add_argument
    add(
        "--policies",
        type=by_commas(str),
        default=["tokenlake", "router", "pd:1x3", "pd:3x1"],
        help="separated by commas; see simulate.py --policy",
    )
    add("--seeds", type=number(int, 1, 1000), default=3, help="runs of each (default 3)")
    add(
        "--rate",
        type=sim.RATE,
        default=1.0,
        help="where the search begins (default 1 per second)",
    )
    add(
        "--rates",
        type=by_commas(sim.RATE),
        default=[],
        help="of the curves; default: around the best goodput",
    )
    add(
        "--capacities",
        type=by_commas(sim.TOKENS),
        default=[],
        help="tokens; goodput and hits at each",
    )
    add("--output", type=PATH, help="folder for compare.json and figures")
    add("--json", action="store_true", help="print JSON in place of the table")
    add("--real", action="store_true", help="on these ranks, with the small model")
    add(
        "--slots",
        type=number(int, 1, 2**16),
        default=160,
        help="with --real: segments of 8 tokens per instance",
    )
    return command_line


def check(options):
    """Raises ValueError naming the option. Fills in what depends on others."""
    options.num_requests = options.num_requests or (80 if options.real else 300)
    sim.check(options)
    N = int(os.environ.get("WORLD_SIZE", 1)) if options.real else options.instances
    if options.real and (N < 2 or options.workload not in WORKLOADS):
        raise ValueError("--real: a generated load, and ranks by torchrun, are expected")
    for tokens in options.capacities:
        sim.check_capacity(options, "--capacities", tokens)
    if not options.policies:
        raise ValueError("--policies: names separated by commas are expected")
    if options.workload == "demo":
        raise ValueError(
            "--workload demo has no rate; a generated load or a file is expected"
        )
    for policy in options.policies:
        make_fleet(policy, N, sim.MODELS["tiny"], LakeConfig())


def main(arguments: list[str]) -> int:
    command_line = parser()
    options = command_line.parse_args(arguments)
    try:
        check(options)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
        if options.real:
            return real(options)
        result = compare(options)
        if options.output:
            write_json(options.output / "compare.json", result)
    except BrokenPipeError:
        raise  # see run_main
    except (OSError, ValueError, LakeError) as error:
        command_line.refuse(error)
    except BrokenProcessPool:
        return give_up(options, "a simulation was killed; is there too little memory?")
    except KeyboardInterrupt:
        return give_up(options, "stopped by Ctrl-C")
    print(json.dumps(result) if options.json else show(result))
    if options.output:
        draw_if_possible(result, options.output)
    return 0


def give_up(options, why: str) -> int:
    """Says what is left of it; the exit status."""
    kept = "nothing is kept"
    if not options.real:
        kept += "; --output DIR keeps what was found"
    if options.output and not options.real:
        kept = f"{options.output / MEASURED} has what was found, the same command goes on"
    if os.environ.get("RANK", "0") == "0":
        warn(f"compare.py: {why}; {kept}")
    return 1


def draw_if_possible(result: dict, folder: Path):
    """Figures, where Matplotlib is."""
    try:
        draw(result, folder)
    except ModuleNotFoundError:
        warn("compare.py: no figures without Matplotlib (pip install matplotlib)")


if __name__ == "__main__":
    run_main(main)
