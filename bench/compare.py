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
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import simulate as sim  # noqa: E402
from balancer import variation  # noqa: E402
from baselines import make_fleet  # noqa: E402
from model import Config, Llama, Sampler, random_weights  # noqa: E402
from pool import KINDS, Cluster, Exchange, LakeError, Moves  # noqa: E402
from run_cluster import CV_WINDOW, TOLERANCE, Engine, read_trace  # noqa: E402
from tokenlake import PUT, LakeConfig  # noqa: E402
from workloads import WORKLOADS, generate  # noqa: E402

PRECISION, LOWEST, HIGHEST = 0.04, 1 / 256, 4096.0  # of a goodput; requests/s that are tried


def attained(options, policy: str, seed: int, rate: float, capacity: int) -> bool:
    """Whether nine of ten requests keep their SLO."""
    run = sim.simulate(options, policy, rate=rate, seed=seed, capacity=capacity,
                       limit=options.num_requests // 10)
    return run.kept >= 0.9 * len(run.lines)


def goodput(options, policy: str, seed: int, capacity: int) -> float:
    """P90 goodput in requests/s: the rate is doubled or halved, then bisected. 0: none is kept."""
    low, high, rate = 0.0, np.inf, options.rate
    while high - low > PRECISION * high or high == np.inf:
        if attained(options, policy, seed, rate, capacity):
            low = rate
        else:
            high = rate
        rate = (low + high) / 2 if low and high < np.inf else 2 * low or high / 2
        if rate < LOWEST or rate > HIGHEST:
            break
    return low


def point(options, policy: str, seed: int, rate: float, capacity: int, windows=False):
    """A whole run at a rate: its summary, and cache reads per window."""
    run = sim.simulate(options, policy, rate=rate, seed=seed, capacity=capacity)
    keep = ("slo_attainment", "refused", "normalised_ttft", "tbt_ms", "hit_rate", "cache_load_cv")
    summary = run.summary()
    out = dict(rate=rate, **{key: summary[key] for key in keep})
    if windows:
        out["reads"] = [np.asarray(run.windows.get(i, np.zeros(options.instances))).tolist()
                        for i in range(max(run.windows, default=-1) + 1)]
    return out


def mean(points: list[dict]) -> dict:
    """Over seeds."""
    keys = [key for key in points[0] if key != "reads"]
    values = {key: [p[key] for p in points if p[key] is not None] for key in keys}
    return {key: float(np.mean(found)) if found else None for key, found in values.items()}


def compare(options) -> dict:
    """Goodput, then curves at common rates, by policy."""
    policies, capacity = options.policies, options.capacity_tokens
    seeds = range(options.seed, options.seed + options.seeds)
    capacities = sorted({capacity, *options.capacities})
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        submit = lambda *job: pool.submit(*job[:1], options, *job[1:])
        found = {(p, c, s): submit(goodput, p, s, c)
                 for p in policies for c in capacities for s in seeds}
        found = {key: future.result() for key, future in found.items()}
        best = max(np.mean([found[p, capacity, s] for s in seeds]) for p in policies)
        rates = options.rates or [round(float(best or options.rate) * f, 4)
                                  for f in (0.1, 0.25, 0.5, 0.75, 1.0, 1.25)]
        middle = rates[len(rates) // 2]
        curves = {(p, r, s): submit(point, p, s, r, capacity, r == middle and s == seeds[0])
                  for p in policies for r in rates for s in seeds}
        hits = {(p, c, s): submit(point, p, s, middle, c)
                for p in policies for c in capacities[:len(capacities) * (len(capacities) > 1)]
                for s in seeds}
        curves, hits = ({key: future.result() for key, future in jobs.items()}
                        for jobs in (curves, hits))
    out = {}
    for p in policies:
        good = [found[p, capacity, s] for s in seeds]
        curve = [mean([curves[p, r, s] for s in seeds]) for r in rates]
        out[p] = dict(
            p90_goodput=dict(mean=float(np.mean(good)), spread=max(good) - min(good), seeds=good),
            curve=curve, **{k: mean(curve)[k] for k in ("refused", "hit_rate", "cache_load_cv")},
            reads=curves[p, middle, seeds[0]]["reads"])
        if hits:
            out[p]["capacities"] = [
                dict(capacity_tokens=c, p90_goodput=float(np.mean([found[p, c, s] for s in seeds])),
                     hit_rate=mean([hits[p, c, s] for s in seeds])["hit_rate"])
                for c in capacities]
    return dict(config={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
                policies=out)


def show(result: dict) -> str:
    """A table of what was found, at the lowest and the middle rate of the curve."""
    rows = list(result["policies"].items())
    curve = rows[0][1]["curve"]
    low, middle = 0, len(curve) // 2
    text = [f"{'':>18} {'goodput':>8} {'spread':>7}   at {curve[low]['rate']:.3g} requests/s: TTFT "
            f"ms/token   at {curve[middle]['rate']:.3g}: TTFT   TBT ms   hits    CV refused"]
    number = lambda x, form: "–" if x is None else format(x, form)
    most = lambda x: f"{'>' * (x > HIGHEST / 4)}{x:.3g}"  # all at once keep the SLO: no limit found
    for name, r in rows:
        a, b, good = r["curve"][low], r["curve"][middle], r["p90_goodput"]
        text.append(
            f"{name:>18} {most(good['mean']):>8} {good['spread']:>7.2g} "
            f"{number(a['normalised_ttft'], '.4f'):>36} {number(b['normalised_ttft'], '.4f'):>20} "
            f"{number(b['tbt_ms'], '.1f'):>8} {number(b['hit_rate'], '.1%'):>6} "
            f"{number(b['cache_load_cv'], '.3f'):>5} {b['refused']:>7.1%}")
    return "\n".join(text)


def draw(result: dict, folder: Path):
    """The figures, after Figures 9 to 12 of the paper."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.3, "figure.constrained_layout.use": True})
    policies, config = result["policies"], result["config"]
    kinds = list(dict.fromkeys(name.removesuffix(":fcfs") for name in policies))
    style = {name: dict(color=f"C{kinds.index(name.removesuffix(':fcfs'))}", marker="o",
                        markersize=4, linestyle=":" if name.endswith(":fcfs") else "-", label=name)
             for name in policies}
    title = (f"{Path(config['workload']).stem}, {config['instances']} instances of {config['tp']} "
             f"{config['hardware'].upper()}, {config['model']}, "
             f"{config['capacity_tokens']:,} tokens of cache")

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, key, label in zip(axes, ("slo_attainment", "normalised_ttft", "tbt_ms"), (
            "requests that keep the SLO", "TTFT, ms per input token", "time between tokens, ms")):
        for name, r in policies.items():
            points = [(x["rate"], x[key]) for x in r["curve"] if x[key] is not None]
            axis.plot(*zip(*points), **style[name])
        axis.set(xlabel="requests/s", ylabel=label)
    axes[0].axhline(0.9, color="grey", linestyle=":")
    axes[0].set_ylim(0, 1.03)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    figure.savefig(folder / "latency.png", dpi=110)

    lines = -(-len(policies) // 4)
    figure, axes = plt.subplots(lines, min(4, len(policies)), squeeze=False, sharey=True,
                                figsize=(3.2 * min(4, len(policies)), 0.4 + 2.8 * lines))
    for axis in axes.ravel()[len(policies):]:
        axis.remove()
    for axis, (name, r) in zip(axes.ravel(), policies.items()):
        reads = np.array(r["reads"]) / 1e6
        axis.plot(np.arange(len(reads)) * 10, reads, linewidth=1.2)
        axis.set(title=f"{name}: CV {variation(list(reads)) or 0:.2f}", xlabel="seconds")
    axes[0][0].set_ylabel("million tokens of cache read\nper instance and 10 s")
    figure.suptitle(title)
    figure.savefig(folder / "balance.png", dpi=110)

    if any("capacities" in r for r in policies.values()):
        figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6))
        for axis, key, label in zip(axes, ("hit_rate", "p90_goodput"), (
                "hit rate", "P90 goodput, requests/s")):
            for name, r in policies.items():
                at = [(x["capacity_tokens"] / 1e3, x[key]) for x in r["capacities"]]
                axis.plot(*zip(*at), **style[name])
            axis.set(xlabel="cache, thousand tokens", ylabel=label, ylim=(0, None))
        axes[0].legend(frameon=False)
        figure.suptitle(title.rpartition(",")[0].rpartition(",")[0])
        figure.savefig(folder / "capacity.png", dpi=110)


class RealRun:
    """A fleet on real ranks: every lake steps in turn, on every rank, and transfers are moves."""
    def __init__(self, policy: str, cluster: Cluster, group, model: Llama, config: LakeConfig):
        self.cluster, self.name = cluster, policy
        self.fleet = make_fleet(policy, cluster.size, model.config, config, cluster=cluster,
                                dtype=model.dtype)
        self.engines = [Engine(cluster, lake, scheduler, model, Sampler())
                        for lake, scheduler in zip(self.fleet.lakes, self.fleet.schedulers)]
        self.pool = next(lake.pool for lake in self.fleet.lakes if lake.pool)
        if len(self.fleet.lakes) > 1:  # lakes of one have no group of their own
            self.pool.move_group = group[0]

    def carry(self, transfers):
        """Moves the KV, layer by layer, and tells the fleet."""
        cluster, pool, C = self.cluster, self.pool, self.fleet.lakes[0].config.segment_tokens
        while transfers:
            transfer = transfers.pop(0)
            leave, arrive, length = transfer.spans(C)
            moves = Moves.of((PUT, transfer.source, leave, transfer.target, arrive, length))
            part = Exchange(moves, cluster.size, cluster.rank, pool.device)
            for layer in range(len(pool.k)):
                pool.move(layer, part)()
            self.fleet.landed(transfer)
            for i in range(len(self.engines)):
                transfers += self.fleet.advance(i)

    def serve(self, lines, at_once: int) -> dict:
        """All lines, `at_once` of them in flight. Collective; the report is the same everywhere."""
        fleet, left, flying, reads, requests = self.fleet, list(lines), 0, [], []
        rows = len(fleet.lakes[0].instances) * fleet.lakes[0].balancer.slots * 8
        if (most := max(line.total for line in lines)) > rows:
            raise ValueError(f"--slots: a request has {most} tokens, {rows} fit into a lake")
        while left or flying:
            while left and flying < at_once:
                request = left.pop(0).arrive(0, self.engines[0].model.config.vocab_size, 8, 0)
                requests.append(request)
                flying += 1
                self.carry(fleet.arrive(request))
            now = np.zeros(self.cluster.size)
            for i, (engine, scheduler) in enumerate(zip(self.engines, fleet.schedulers)):
                if scheduler.waiting or scheduler.running:
                    before = len(engine.reads)
                    flying -= len(engine.step()[1])
                    now[fleet.lakes[i].instances] += sum(engine.reads[before:])
                    self.carry(fleet.advance(i))
            reads.append(now)
        gaps = self.engines[0].verify(requests, lambda n: None)
        tolerance = TOLERANCE[self.engines[0].model.dtype]
        bytes = sum((Counter(x) for x in self.cluster.share(self.pool.bytes)), Counter())
        windows = [sum(reads[i:i + CV_WINDOW]) for i in range(0, len(reads), CV_WINDOW)]
        sums = {key: sum(s.counters[key] for s in fleet.schedulers)
                for key in ("computed_tokens", "preemptions")}
        return dict(
            policy=self.name, requests=len(lines), iterations=len(reads), **sums,
            verified=sum(gap <= tolerance for gap in gaps.values()),
            hit_rate=sum(fleet.cached_tokens.values()) / sum(r.num_prompt for r in requests),
            cache_load_cv=variation(windows), moved_bytes={k: bytes[k] for k in ("query", *KINDS)},
            evictions=sum(lake.balancer.evictions for lake in fleet.lakes))


def real(options) -> int:
    """Every policy on these ranks. Returns 0 if all tokens are right."""
    cluster = Cluster()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // cluster.local_size))
    try:
        config = Config()
        model = Llama(config, random_weights(config, options.seed, torch.float32, "cpu"))
        group = cluster.new_groups(list(range(cluster.size)), torch.device("cpu"), 1)
        lake = LakeConfig(8, options.slots, chunk_tokens=64, max_batch=8)
        trace = [json.dumps(x) for x in generate(options.workload, options.num_requests, 1.0,
                                                 options.seed)]
        wrong, results = 0, []
        if cluster.rank == 0:
            print(f"{'':>10} {'verified':>9} {'hits':>6} {'CV':>5} {'computed':>9} {'evicted':>8} "
                  f"{'iterations':>10}   moved MB: queries, new KV, replicas, pulled", flush=True)
        for policy in options.policies:
            run = RealRun(policy, cluster, group, model, lake)
            r = run.serve(read_trace(iter(trace), options.workload, 64), 4 * cluster.size)
            results.append(r)
            wrong += r["requests"] - r["verified"]
            if cluster.rank == 0:
                moved = "  ".join(f"{n / 1e6:,.1f}" for n in r["moved_bytes"].values())
                print(f"{policy:>10} {r['verified']:>5}/{r['requests']:<3} {r['hit_rate']:>6.1%} "
                      f"{r['cache_load_cv']:>5.2f} {r['computed_tokens']:>9,} {r['evictions']:>8,} "
                      f"{r['iterations']:>10,}   {moved}", flush=True)
        if cluster.rank == 0 and options.output:
            (options.output / "real.json").write_text(json.dumps(results, indent=1) + "\n")
    finally:
        cluster.close()
    return int(wrong > 0)


def main(arguments: list[str]) -> int:
    parser = sim.parser("Compare TokenLake with cache-aware routing and PD disaggregation.")
    parser.set_defaults(num_requests=None)
    numbers = lambda kind: lambda text: [kind(x) for x in text.split(",") if x]
    add = parser.add_argument
    add("--policies", type=numbers(str), default=["tokenlake", "router", "pd:1x3", "pd:3x1"],
        help="separated by commas; see simulate.py --policy")
    add("--seeds", type=int, default=3, help="runs of each (default 3)")
    add("--rate", type=float, default=1.0, help="where the search begins (default 1 per second)")
    add("--rates", type=numbers(float), default=[],
        help="of the curves; default: around the best goodput")
    add("--capacities", type=numbers(int), default=[], help="tokens; goodput and hits at each")
    add("--output", type=Path, help="folder for compare.json and figures")
    add("--real", action="store_true", help="on these ranks, with the small model")
    add("--slots", type=int, default=160, help="with --real: segments of 8 tokens per instance")
    options = parser.parse_args(arguments)
    N = int(os.environ.get("WORLD_SIZE", 1)) if options.real else options.instances
    try:
        options.num_requests = options.num_requests or (80 if options.real else 300)
        sim.check(options)
        if options.real and (N < 2 or options.workload not in WORKLOADS):
            raise ValueError("--real: a generated load, and ranks by torchrun, are expected")
        if not all(0 < x < 2**40 for x in (*options.rates, *options.capacities)):
            raise ValueError("--rates and --capacities: positive numbers are expected")
        if options.workload == "demo":
            raise ValueError("--workload demo has no rate; a generated load or a file is expected")
        for policy in options.policies:
            make_fleet(policy, N, sim.MODELS["tiny"], LakeConfig())
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
        if options.real:
            return real(options)
        result = compare(options)
        print(show(result))
        if options.output:
            text = json.dumps(result, indent=1)
            (options.output / "compare.json").write_text(text + "\n")
            draw(result, options.output)
    except ModuleNotFoundError:
        print("compare.py: no figures without Matplotlib (pip install matplotlib)", file=sys.stderr)
    except (OSError, ValueError, LakeError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
