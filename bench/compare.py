"""Why a pool? TokenLake against cache-aware routing and PD disaggregation (§7).

    python bench/compare.py --workload loogle --capacity-tokens 400000 \\
        --policies tokenlake,router,pd:1x3,pd:3x1 --seeds 3 --output DIR
    torchrun --standalone --nproc-per-node=4 bench/compare.py --real

The first simulates: per policy it finds the P90 goodput, the highest rate of requests at which 90 %
of them keep their SLO (simulate.py), by bisection, then runs all policies at the same rates. It
prints a table and writes compare.json and figures: latency.png (attainment and latency over rate),
balance.png (cache reads per instance over time), and with `--capacities` capacity.png. A request of
which TTFT or TBT is not kept, and one that is refused as too long, has missed.

The second runs the policies one after another on real ranks, with the small model under memory
pressure, and compares every token with recomputation without a cache. Time means little there.
"""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import simulate as sim  # noqa: E402
from balancer import variation  # noqa: E402
from baselines import make_fleet  # noqa: E402
from engine import Engine  # noqa: E402
from model import Llama, LlamaConfig, Sampler, random_weights  # noqa: E402
from cluster import Cluster, LakeError  # noqa: E402
from pool import (  # noqa: E402
    PUT,
    InstanceMoves,
    LakeConfig,
    Moves,
)
from options import number  # noqa: E402
from results import CV_WINDOW, sum_bytes  # noqa: E402
from oracle import verify  # noqa: E402
from run_cluster import PATH  # noqa: E402
from traces import RandomTokens, TraceForm, read_trace  # noqa: E402
from workloads import BLOCK, WORKLOADS, generate  # noqa: E402

PRECISION = 0.04  # of a goodput
LOWEST = 1 / 256  # requests/s that are tried
HIGHEST = 4096.0
# Rates of the curves, times the best goodput.
RATE_FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25)
POINT_KEYS = "slo_attainment refused normalised_ttft tbt_ms hit_rate cache_load_cv".split()
SEGMENT = 8  # tokens, on real ranks; so are the blocks of their traces


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


class Comparison:
    """Goodputs, then points at common rates, of every policy and seed."""
    def __init__(self, options):
        self.options = options
        self.policies = options.policies
        self.seeds = range(options.seed, options.seed + options.seeds)
        self.capacity = options.capacity_tokens
        self.capacities = sorted({self.capacity, *options.capacities})

    def run(self):
        with ProcessPoolExecutor(os.cpu_count()) as executor:
            self.goodputs = self._measure(
                executor,
                goodput,
                product(self.policies, self.seeds, self.capacities),
            )
            self.rates = self.options.rates or self._rates()
            self.middle = self.rates[len(self.rates) // 2]
            curves = product(self.policies, self.seeds, self.rates, [self.capacity])
            sizes = product(self.policies, self.seeds, [self.middle], self.capacities)
            cases = dict.fromkeys([*curves, *sizes])  # some are in both
            self.points = self._measure(executor, point, cases)

    def _measure(self, executor, measure, cases) -> dict:
        """measure(options, *case) of each case, side by side: by case."""
        futures = {case: executor.submit(measure, self.options, *case) for case in cases}
        return {case: future.result() for case, future in futures.items()}

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


def compare(options) -> dict:
    """compare.json: options, and results by policy."""
    comparison = Comparison(options)
    comparison.run()
    config = {}
    for name, value in vars(options).items():
        config[name] = str(value) if isinstance(value, Path) else value
    policies = {policy: comparison.result(policy) for policy in options.policies}
    return dict(config=config, policies=policies)


def show(result: dict) -> str:
    """A table of what was found, at the lowest and the middle rate of the curve."""
    policies = result["policies"]
    curve = next(iter(policies.values()))["curve"]
    middle = len(curve) // 2
    table = [
        f"{'':>18} {'goodput':>8} {'spread':>7}   at {curve[0]['rate']:.3g} requests/s: TTFT "
        f"ms/token   at {curve[middle]['rate']:.3g}: TTFT   TBT ms   hits    CV refused"
    ]
    for policy, entry in policies.items():
        goodputs = entry["p90_goodput"]
        at_lowest = entry["curve"][0]
        at_middle = entry["curve"][middle]
        # Where all may come at once and keep the SLO, no limit was found.
        sign = ">" if goodputs["mean"] > HIGHEST / 4 else ""
        table.append(
            f"{policy:>18} {sign + cell(goodputs['mean'], '.3g'):>8} {goodputs['spread']:>7.2g} "
            f"{cell(at_lowest['normalised_ttft'], '.4f'):>36} "
            f"{cell(at_middle['normalised_ttft'], '.4f'):>20} "
            f"{cell(at_middle['tbt_ms'], '.1f'):>8} {cell(at_middle['hit_rate'], '.1%'):>6} "
            f"{cell(at_middle['cache_load_cv'], '.3f'):>5} {at_middle['refused']:>7.1%}"
        )
    return "\n".join(table)


def cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# Figures.


def pyplot():
    """Matplotlib, which is not required, to draw into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "figure.constrained_layout.use": True,
        }
    )
    return plt


def draw(result: dict, folder: Path):
    """The figures, after Figures 9 to 12 of the paper."""
    plt = pyplot()
    config = result["config"]
    policies = result["policies"]
    setting = (
        f"{Path(config['workload']).stem}, {config['instances']} instances of "
        f"{config['tp']} {config['hardware'].upper()}, {config['model']}"
    )
    title = f"{setting}, {config['capacity_tokens']:,} tokens of cache"
    save(draw_latency(plt, policies), title, folder / "latency.png")
    save(draw_balance(plt, policies), title, folder / "balance.png")
    if any("capacities" in entry for entry in policies.values()):
        save(draw_capacity(plt, policies), setting, folder / "capacity.png")


def save(figure, title: str, path: Path):
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def draw_latency(plt, policies: dict):
    """Attainment and latency over rate."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    attainment, ttft, tbt = axes
    for axis, key in zip(axes, ("slo_attainment", "normalised_ttft", "tbt_ms")):
        plot_curves(axis, policies, "curve", "rate", key)
        axis.set_xlabel("requests/s")
    attainment.set_ylabel("requests that keep the SLO")
    attainment.axhline(0.9, color="grey", linestyle=":")
    attainment.set_ylim(0, 1.03)
    attainment.legend(frameon=False, fontsize="small")
    ttft.set_ylabel("TTFT, ms per input token")
    ttft.set_yscale("log")
    tbt.set_ylabel("time between tokens, ms")
    return figure


def draw_balance(plt, policies: dict):
    """Cache reads per instance over time."""
    columns = min(4, len(policies))
    rows = -(-len(policies) // 4)
    figsize = (3.2 * columns, 0.4 + 2.8 * rows)
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, sharey=True, figsize=figsize
    )
    for axis in axes.ravel()[len(policies) :]:
        axis.remove()
    for axis, (policy, entry) in zip(axes.ravel(), policies.items()):
        reads = np.array(entry["reads"]) / 1e6
        seconds = np.arange(len(reads)) * 10
        axis.plot(seconds, reads, linewidth=1.2)
        axis.set_title(f"{policy}: CV {variation(list(reads)) or 0:.2f}")
        axis.set_xlabel("seconds")
    axes[0][0].set_ylabel("million tokens of cache read\nper instance and 10 s")
    return figure


def draw_capacity(plt, policies: dict):
    """Hits and goodput over capacity."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6))
    hits, goodputs = axes
    for axis, key in zip(axes, ("hit_rate", "p90_goodput")):
        plot_curves(axis, policies, "capacities", "capacity_tokens", key, x_unit=1e3)
        axis.set(xlabel="cache, thousand tokens", ylim=(0, None))
    hits.set_ylabel("hit rate")
    hits.legend(frameon=False)
    goodputs.set_ylabel("P90 goodput, requests/s")
    return figure


def plot_curves(axis, policies: dict, curve: str, x: str, y: str, x_unit: float = 1):
    """A line per policy; dotted in its colour what serves in order of arrival."""
    families = []
    for policy, entry in policies.items():
        family = policy.removesuffix(":fcfs")
        if family not in families:
            families.append(family)
        points = [p for p in entry[curve] if p[y] is not None]
        axis.plot(
            [p[x] / x_unit for p in points],
            [p[y] for p in points],
            color=f"C{families.index(family)}",
            marker="o",
            markersize=4,
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
            iterations=len(self.reads),
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
        if cluster.rank == 0 and not options.json:
            print(REAL_HEADER, flush=True)
        results = []
        for policy in options.policies:
            run = RealRun(policy, cluster, group, model, lake_config)
            form = TraceForm(scale=BLOCK // SEGMENT)
            lines = read_trace(trace, options.workload, form)
            results.append(run.serve(lines, 4 * cluster.size))
            if cluster.rank == 0:
                row = json.dumps(results[-1]) if options.json else show_real(results[-1])
                print(row, flush=True)
        if cluster.rank == 0 and options.output:
            write_json(options.output / "real.json", results)
    finally:
        cluster.close()
    wrong = [result for result in results if result["verified"] < result["requests"]]
    return 1 if wrong else 0


REAL_HEADER = (
    f"{'':>10} {'verified':>9} {'hits':>6} {'CV':>5} {'computed':>9} {'evicted':>8} "
    f"{'iterations':>10}   moved MB: queries, new KV, replicas, pulled"
)


def show_real(result: dict) -> str:
    """A row of the table."""
    moved = "  ".join(f"{n / 1e6:,.1f}" for n in result["moved_bytes"].values())
    return (
        f"{result['policy']:>10} {result['verified']:>5}/{result['requests']:<3} "
        f"{result['hit_rate']:>6.1%} {result['cache_load_cv']:>5.2f} "
        f"{result['computed_tokens']:>9,} {result['evictions']:>8,} "
        f"{result['iterations']:>10,}   {moved}"
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
        print(json.dumps(result) if options.json else show(result))
        if options.output:
            write_json(options.output / "compare.json", result)
            draw(result, options.output)
    except ModuleNotFoundError:
        print(
            "compare.py: no figures without Matplotlib (pip install matplotlib)",
            file=sys.stderr,
        )
    except (OSError, ValueError, LakeError) as error:
        command_line.refuse(error)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    # As run_cluster.py: threads of process groups that are torn down may abort the process.
    os._exit(status)
