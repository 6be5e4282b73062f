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
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import simulate as sim  # noqa: E402
from cluster import LakeError  # noqa: E402
from drawing import cell, draw, name_fleet  # noqa: E402
from model import one_line, shown  # noqa: E402
from options import is_first_rank, number, run_main, warn  # noqa: E402
from provenance import describe_machine, digest_of_code  # noqa: E402
from real_ranks import real  # noqa: E402
from results import command_line, plain, summarise_environment  # noqa: E402
from run_cluster import PATH  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

PRECISION = 0.04  # of a goodput
LOWEST = 1 / 256  # requests/s that are tried
HIGHEST = 4096.0
NO_LIMIT = HIGHEST / 4  # a goodput over that: all may come at once and keep the SLO
# Rates of the curves, times the best goodput.
RATE_FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25)
POINT_KEYS = "slo_attainment refused normalised_ttft mean_tpot_ms hit_rate cache_load_cv".split()
MEASURED = "measured.jsonl"
NOT_IN_BASIS = (
    "policies seeds seed rates capacities capacity_tokens output json real slots trace"
).split()
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
    """What a measurement depends on, besides its case: every option but those that say which cases
    there are, and where they go."""
    named = {
        "--" + name.replace("_", "-"): plain(value)
        for name, value in vars(options).items()
        if name not in NOT_IN_BASIS
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
    environment = summarise_environment(command_line("bench/compare.py"))
    return dict(config=config, environment=environment, policies=policies)


def describe(config: dict) -> str:
    """What was measured, on what, with which settings: the lines above a table."""
    roofline = sim.Roofline(sim.MODELS[config["model"]], config["hardware"], config["tp"])
    last_seed = config["seed"] + config["seeds"] - 1
    seeds = f"Seed {last_seed}"
    if config["workload"] not in WORKLOADS:
        seeds = "A file has no seed, so there is one run of each"
    elif config["seeds"] > 1:
        seeds = f"Means of seeds {config['seed']} to {last_seed}"
    return (
        f"P90 goodput: the highest rate at which 90 % of requests keep their SLO, TTFT and mean "
        f"TPOT at most {sim.SLO} times\n"
        "those of the request alone; spread: between seeds. CV: of the cache reads of instances, "
        f"in 10 s. {seeds}.\n"
        f"Simulated: {one_line(Path(config['workload']).stem)}, {config['num_requests']:,} requests; "
        f"{name_fleet(config)}, {config['capacity_tokens']:,} tokens of cache,\n"
        f"chunks of {config['chunk_tokens']:,} tokens, up to {config['max_batch']:,} requests "
        f"at once. Run on {describe_machine()}.\n"
        f"Assumed: {sim.FLOPS_SHARE} of the peak FLOP/s, {sim.BANDWIDTH_SHARE} of the memory's "
        f"bandwidth, {1e6 * sim.ALPHA:.0f} µs an exchange, 16 bits, "
        f"{roofline.token_bytes:,} bytes of KV a token."
    )


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
    return "unlimited" if rate > NO_LIMIT else f"{rate:.3g}"


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
    if options.workload not in WORKLOADS:
        options.seeds = 1  # a file is the same with each
    if not options.policies:
        raise ValueError("--policies: names separated by commas are expected")
    if options.workload == "demo":
        raise ValueError(
            "--workload demo has no rate; a generated load or a file is expected"
        )
    for policy in options.policies:
        sim.check_policy("--policies", policy, N)
    options.rates.sort()


def main(arguments: list[str]) -> int:
    command_line = parser()
    options = command_line.parse_args(arguments)
    try:
        sim.choose_trace(options)
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
    if is_first_rank():
        warn(f"compare.py: {why}; {kept}")
    return 1


def draw_if_possible(result: dict, folder: Path):
    """Figures, where Matplotlib is, and the folder takes them."""
    try:
        draw(result, folder, NO_LIMIT)
    except ModuleNotFoundError:
        warn("compare.py: no figures without Matplotlib (pip install matplotlib)")
    except (OSError, ValueError) as error:
        warn(f"compare.py: no figures in {folder}: {error}")


if __name__ == "__main__":
    run_main(main)
