"""How long would it take? Scheduler and balancer as they are, a roofline in place of the tensors.

    python bench/simulate.py --workload loogle --policy tokenlake --instances 4 --rate 2
    python bench/simulate.py --table        # even split, DP and fixed PD, side by side
    python bench/simulate.py --validate     # measured against simulated iterations, on this machine

Every lake has its own clock, and one heap holds what happens next: a request arrives, an iteration
ends, a transfer lands. So TokenLake is simulated in lock-step, as it is built, and lakes of one
(baselines.py) are not. An iteration lasts as long as its slowest instance:

    max(2·P·rows / F, weights / B) + 4·L·H·D·rows·tokens / F     F: 0.6 of peak, B: 0.8 of peak
    or what it sends over its link, if that takes longer; + α per exchange and layer

where rows that attend alone wait for memory, and weigh as many rows as that takes; α = 10 µs. A TP
group adds two all-reduces per layer. Planning is not in it: see bench/plan.py. `demo` is what
run_cluster.py serves without options; any other name that is no load is a trace's file.
"""

import argparse
import heapq
import json
import os
import sys
import time
from array import array
from dataclasses import dataclass
from itertools import count, groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import run_cluster  # noqa: E402
from balancer import BLOCK, WINDOW, Request, variation  # noqa: E402
from baselines import VARIANTS, make_fleet  # noqa: E402
from model import Config  # noqa: E402
from run_cluster import demo_trace, read_trace  # noqa: E402
from tokenlake import LakeConfig  # noqa: E402
from workloads import WORKLOADS, generate  # noqa: E402

MODELS = {
    "tiny": Config(),
    "lwm-7b": Config(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_layers=32,
                     num_heads=32, num_kv_heads=32, head_dim=128),
    "llama-3.1-8b": Config(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336,
                           num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128),
}
# FLOP/s in bf16, memory B/s, NVLink B/s each way, bytes of memory.
HARDWARE = {"a100": (312e12, 2.04e12, 300e9, 80e9), "h100": (989e12, 3.35e12, 450e9, 80e9),
            "h200": (989e12, 4.8e12, 450e9, 141e9)}
MFU, OF_BANDWIDTH, ALPHA = 0.6, 0.8, 10e-6
REUSE = 16  # iterations at most
SLO = 10  # TTFT per input token and TBT, times those of a request served alone


class Roofline:
    """Seconds that things take on instances of `tp` GPUs."""
    def __init__(self, model: Config, hardware: str, tp: int = 1, itemsize: int = 2):
        flops, bandwidth, link, memory = HARDWARE[hardware]
        self.model = model
        self.flops, self.bandwidth = flops * tp * MFU, bandwidth * tp * OF_BANDWIDTH
        self.link, self.linear, self.attention = link * tp, model.num_linear_parameters, self.flops
        self.weights = self.linear * itemsize / self.bandwidth
        # A row that attends alone weighs as many as can attend while its KV is read.
        self.ridge = max(1, round(self.flops / self.bandwidth * model.num_kv_heads
                                  / model.num_heads * itemsize / 2))
        self.reduce = 4 * model.hidden_size * itemsize * (tp - 1) / tp / link  # of a row, a layer
        self.hop = 2 * ALPHA * (tp > 1)
        self.kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize  # a token
        self.capacity = int((0.9 * memory * tp - itemsize * self.linear) / self.kv)  # tokens

    def compute(self, rows, load):
        """Of rows with attention `load` (rows × tokens): an instance alone."""
        m = self.model
        linear = np.maximum(2 * self.linear * rows / self.flops, self.weights)
        attention = 4 * m.num_layers * m.num_heads * m.head_dim * load / self.attention
        return linear + attention + m.num_layers * (self.hop + self.reduce * rows)

    def iteration(self, features, query_plan, transfer_plan) -> np.ndarray:
        """[N] of an iteration at each instance, from TokenLake.features."""
        rows, load, sent = features.T
        exchanges = 2 * query_plan.ships.any() + bool(len(transfer_plan.moves.kind)) + bool(
            len(query_plan.pulls.kind))
        return (np.maximum(self.compute(rows, load), 1024 * sent / self.link)
                + exchanges * self.model.num_layers * ALPHA)

    def transfer(self, tokens: int) -> float:
        """Of KV between two instances."""
        return ALPHA + self.kv * tokens / self.link

    def alone(self, line, chunk: int = 1024) -> tuple[float, float]:
        """TTFT and TBT of a request on an idle instance, without cache."""
        output = line.keys["output_length"]
        prompt = line.total - output
        start = np.arange(0, prompt, chunk)
        rows = np.minimum(prompt - start, chunk)
        ttft = self.compute(rows, np.maximum(rows, self.ridge) * (start + rows / 2)).sum()
        return float(ttft), float(self.compute(1, self.ridge * (prompt + output / 2)))


@dataclass
class Alone:
    """What gen_plans says of a lake of one, where nothing travels, in a fraction of its time."""
    runs: list
    features: np.ndarray  # [1, 3], see TokenLake.features
    reads: int  # tokens of old KV

    @property
    def instance(self):
        return np.zeros(len(self.runs), np.int64)

    home = instance

    @classmethod
    def of(cls, lake, batch):
        load = reads = rows = 0
        for request, own in groupby(batch, attrgetter("request")):
            own = list(own)
            written, old = 0, request.done + 1 - own[0].puts
            for run in own:
                written += run.rows * run.puts
                load += run.rows * written  # new KV, up to itself
            n = sum(run.rows for run in own)
            load, reads, rows = load + max(n, lake.ridge) * old, reads + old, rows + n
        return cls(batch, np.array([[rows, load, 0]]), reads)


class Simulation:
    """Serves the checked lines of a trace on a fleet without tensors."""
    def __init__(self, fleet, lines, roofline: Roofline, block: int = BLOCK, speed: float = 1.0):
        self.fleet, self.lines, self.roofline, self.block = fleet, lines, roofline, block
        self.now, self.events, self.number = 0.0, [], count()
        self.running = [False] * len(fleet.lakes)  # whether a lake is in an iteration
        self.plan, self.left = [None] * len(fleet.lakes), [0] * len(fleet.lakes)  # see `steady`
        self.following = {line.previous.index: line for line in lines if line.previous}
        self.ms = lambda value: value / 1e3 / speed
        self.arrived, self.allowed, self.times, self.prompts = {}, {}, {}, 0
        self.kept, self.refused, self.missed, self.due = 0, 0, set(), []  # requests, by their SLO
        self.busy, self.windows, self.log = np.zeros(2), {}, []
        fleet.bandwidth = roofline.link
        for lake in fleet.lakes:
            lake.ridge = roofline.ridge
        for line in lines:
            if not line.previous:
                self.at(self.ms(line.keys["timestamp"]), self.arrive, line)

    def at(self, time: float, what, *arguments):
        heapq.heappush(self.events, (time, next(self.number), what, arguments))

    def run(self, limit: int | None = None):
        """Until all is served, or more than `limit` requests have missed their SLO."""
        while self.events and (limit is None or len(self.missed) <= limit):
            self.now = self.events[0][0]
            while self.due and self.due[0][0] < self.now:  # so overload shows before it is served
                index = heapq.heappop(self.due)[1]
                if index not in self.times:
                    self.missed.add(index)
            while self.events and self.events[0][0] == self.now:
                _, _, what, arguments = heapq.heappop(self.events)
                what(*arguments)
            for i, running in enumerate(self.running):
                if not running:
                    self.start(i)
        return self

    def arrive(self, line):
        keys, n = line.keys, line.total - line.keys["output_length"]
        if "hash_ids" in keys:  # a block's tokens only have to be its own
            ids = np.asarray(keys["hash_ids"], np.int64)[:, None] * self.block
            tokens = array("q", (ids + np.arange(self.block)).ravel()[:n].tobytes())
            line.request = Request(line.index, tokens, line.total, keys["salt"])
        else:
            line.arrive(0, self.roofline.model.vocab_size, self.block, 0)
        self.arrived[line.index] = self.now
        self.prompts += line.request.num_prompt
        self.allowed[line.index] = SLO * np.array(self.roofline.alone(line))  # TTFT and TBT
        heapq.heappush(self.due, (self.now + self.allowed[line.index][0], line.index))
        if self.fleet.fits(line.request):
            self.begin(self.fleet.arrive(line.request))
        else:
            self.ended(line, refused=True)

    def begin(self, transfers):
        for transfer in transfers:
            self.at(self.now + self.roofline.transfer(transfer.streamed), self.landed, transfer)

    def landed(self, transfer):
        self.fleet.landed(transfer)
        for i in range(len(self.fleet.lakes)):  # room there, room here
            self.begin(self.fleet.advance(i))

    def start(self, i: int):
        lake, scheduler = self.fleet.lakes[i], self.fleet.schedulers[i]
        if not (scheduler.waiting or scheduler.running):
            return
        if not self.steady(i):
            self.plan[i], batches = None, scheduler.schedule()
            if not any(batches[0]):
                return
            plan, took = self.planned(lake, scheduler.model, *batches)
            self.plan[i], self.left[i] = (plan, took), REUSE
        plan, took = self.plan[i]
        self.busy += took.mean(), took.max()
        size = sum(len(x.instances) for x in self.fleet.lakes)
        self.windows.setdefault(int(self.now * 1e3 // WINDOW), np.zeros(size))[
            lake.instances] += plan.reads
        self.running[i] = True
        self.at(self.now + took.max(), self.finish, i)

    def planned(self, lake, model, batches, dops):
        """The plan of a lake's next iteration, and seconds [N] at each instance."""
        if len(lake.instances) == 1:
            plan = Alone.of(lake, batches[0])
            features = plan.features
            took = self.roofline.compute(*features.T[:2])
        else:
            started = time.perf_counter()
            plan, transfer, _ = lake.gen_plans(batches, dops, lake.get_prefix_tree())
            seconds = time.perf_counter() - started
            features = lake.features(plan, transfer)
            took = self.roofline.iteration(features, plan, transfer)
            self.log.append((1e3 * seconds, features[:, 2].mean() / 1024, plan.ships.sum(1).max()))
        model.measured(features, took.max())
        model.coefficients = model.fitted
        return plan, took

    def steady(self, i: int) -> bool:
        """Whether a lake's last plan still holds: the same decodes, in the same segments. It is
        used again a few times, as if no request had grown, which saves most of the planning."""
        scheduler, self.left[i] = self.fleet.schedulers[i], self.left[i] - 1
        if self.left[i] < 0 or scheduler.waiting or not self.plan[i]:
            return False
        runs, C = self.plan[i][0].runs, scheduler.balancer.segment_tokens
        return len(runs) == len(scheduler.running) and all(
            run.decode and run.request.num_slots and run.position // C == run.request.done // C
            for run in runs)

    def finish(self, i: int):
        plan, self.running[i] = self.plan[i][0], False
        ids = [run.request.id for run in plan.runs if run.decode or run.samples]
        sampled = {id: -1 - id for id in ids}
        for id in ids:
            self.times.setdefault(id, []).append(self.now)
        for request in self.fleet.schedulers[i].update(plan, sampled):
            self.ended(self.lines[request.id])
        self.begin(self.fleet.advance(i))

    def ended(self, line, refused=False):
        if not refused and self.good(line):
            self.kept += 1
        else:
            self.missed.add(line.index)
        self.refused += refused
        if turn := self.following.get(line.index):
            due = max(self.ms(turn.keys["timestamp"]), self.now + self.ms(turn.keys["think_ms"]))
            self.at(due, self.arrive, turn)
        if not (turn and "input_ids" in turn.keys):
            line.request = line.request.num_prompt  # its tokens are not needed any more

    def latency(self, index: int) -> tuple[float, float]:
        """TTFT and mean TBT, in seconds."""
        times = self.times[index]
        gaps = max(1, len(times) - 1)
        return times[0] - self.arrived[index], (times[-1] - times[0]) / gaps

    def good(self, line) -> bool:
        """Whether it kept the SLO."""
        return bool((self.latency(line.index) <= self.allowed[line.index]).all())

    def summary(self) -> dict:
        """Of what was served; requests that were not have missed the SLO."""
        done = [x for x in self.lines if x.index in self.times]
        latency = np.array([self.latency(x.index) for x in done]).reshape(-1, 2)
        lengths = np.array([x.total - x.keys["output_length"] for x in done])
        gaps = [g for x in done for g in np.diff(self.times[x.index])] or [0.0]
        mean = lambda values: float(np.mean(values)) if len(done) else None
        return dict(
            requests=len(done), duration_s=self.now, ttft_ms=mean(1e3 * latency[:, 0]),
            p90_ttft_ms=float(np.percentile(1e3 * latency[:, 0], 90)) if done else None,
            normalised_ttft=mean(1e3 * latency[:, 0] / lengths), tbt_ms=mean(1e3 * latency[:, 1]),
            p99_tbt_ms=1e3 * float(np.percentile(gaps, 99)),
            slo_attainment=self.kept / len(self.lines), refused=self.refused / len(self.lines),
            hit_rate=sum(self.fleet.cached_tokens.values()) / self.prompts,
            cache_load_cv=variation(self.windows.values()),
            idle_fraction=float(1 - self.busy[0] / self.busy[1])
            if len(self.fleet.lakes) == 1 and self.busy[1] else None, **self.traffic())

    def traffic(self) -> dict:
        """Of iterations that a lake of several planned."""
        if not self.log:
            return dict.fromkeys(("plan_ms_median", "sent_mib", "fan_out"))
        took, sent, fan_out = np.array(self.log, float).T
        return dict(plan_ms_median=float(np.median(took)), sent_mib=float(sent.mean()),
                    fan_out=float(fan_out.mean()))


def load(name: str, num_requests: int, rate: float, seed: int, vocab: int = 512):
    """Checked lines of the demo, a generated load, or a file."""
    if name == "demo":
        return read_trace(demo_trace(num_requests, vocab, seed), "demo")
    if name in WORKLOADS:
        return read_trace(map(json.dumps, generate(name, num_requests, rate, seed)), name)
    with open(name, "rb") as file:
        return read_trace(file, name, 1, num_requests)


def simulate(options, policy=None, workload=None, rate=None, seed=None, limit=None, model=None,
             capacity=None) -> Simulation:
    """A run by the command line's options, but for what is given."""
    name, rate = workload or options.workload, rate or options.rate
    model = model or options.model
    C, N, model = 16 if model == "tiny" else 512, options.instances, MODELS[model]
    slots = (capacity or options.capacity_tokens) // (C * N)
    config = LakeConfig(C, slots, chunk_tokens=options.chunk_tokens,
                        max_batch=options.max_batch // N)
    seed = options.seed if seed is None else seed
    lines = load(name, options.num_requests, rate or 1.0, seed)
    roofline, speed = Roofline(model, options.hardware, options.tp), 1.0
    allowed = np.percentile([SLO * 1e3 * roofline.alone(line)[1] for line in lines], 1)
    fleet = make_fleet(policy or options.policy, N, model, config, options.tbt_slo_ms or allowed,
                       dtype=torch.bfloat16)
    if rate and name not in ("demo", *WORKLOADS):  # a trace's file: arrivals as fast as that
        speed = rate * max(1.0, lines[-1].keys["timestamp"]) / (1e3 * len(lines))
    return Simulation(fleet, lines, roofline, speed=speed).run(limit)


def parser(description: str) -> argparse.ArgumentParser:
    """The options of a simulation."""
    out = argparse.ArgumentParser(description=description)
    out.add_argument("--model", choices=MODELS, default="lwm-7b", help="default lwm-7b")
    out.add_argument("--hardware", choices=HARDWARE, default="a100", help="default a100")
    for name, default in (("instances", 4), ("tp", 2), ("num-requests", 300), ("seed", 0),
                          ("chunk-tokens", 512), ("max-batch", 512)):
        out.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    out.add_argument("--capacity-tokens", type=int, metavar="T", help="of cache in all instances; "
                     "default: what 90 %% of the GPUs' memory has room for beside the weights")
    out.add_argument("--tbt-slo-ms", type=float, help="default: what 99 of 100 requests allow")
    out.add_argument("--workload", default="loogle",
                     help=f"demo, {', '.join(WORKLOADS)}, or a trace's file")
    out.print_usage = lambda *_: None  # an error is one line
    return out


def check(options):
    """Raises ValueError naming the option. Fills in the capacity that the GPUs' memory has."""
    if options.capacity_tokens is None:
        roofline = Roofline(MODELS[options.model], options.hardware, options.tp)
        options.capacity_tokens = options.instances * roofline.capacity
    for name in ("instances", "tp", "num-requests", "capacity-tokens", "chunk-tokens", "max-batch",
                 "rate", "seeds", "tbt-slo-ms"):
        value = getattr(options, name.replace("-", "_"), None)
        if value is not None and not 0 < value < 2**40:
            raise ValueError(f"--{name} {value}: a positive number is expected")
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed}: an integer from 0 is expected")
    least = options.instances * (16 if options.model == "tiny" else 512)
    if options.capacity_tokens < least:
        raise ValueError(f"--capacity-tokens {options.capacity_tokens}: {least} at least, a "
                         "segment per instance, are expected")
    if options.max_batch < options.instances:
        raise ValueError(f"--max-batch {options.max_batch}: at least --instances is expected")


def table(options):
    """Even split, DP and fixed PD on the pool, side by side."""
    N = options.instances
    rate = options.rate or 1.0
    loads = [("demo", None, "tiny"), ("loogle", rate, None), ("sharegpt", 6 * rate, None)]
    loads += [(options.trace, None, None)] if options.trace else []
    print(f"{'load':>12} {'scheduler':>10} {'makespan s':>10} {'TTFT ms':>10} {'p90':>10} "
          f"{'TBT ms':>8} {'p99':>8} {'idle':>6} {'hits':>6}")
    for name, options.rate, model in loads:
        for policy in ("even", "dp", *(f"pd:{p}x{N - p}" for p in sorted({1, N // 2, N - 1}))):
            r = simulate(options, f"tokenlake:{policy}", name, model=model).summary()
            print(f"{Path(name).stem[:12]:>12} {policy:>10} {r['duration_s']:>10.3f} "
                  f"{r['ttft_ms']:>10,.2f} {r['p90_ttft_ms']:>10,.2f} {r['tbt_ms']:>8.3f} "
                  f"{r['p99_tbt_ms']:>8.2f} {r['idle_fraction']:>6.1%} {r['hit_rate']:>6.1%}",
                  flush=True)


def validate(arguments: list[str]):
    """Serves a trace with run_cluster.py on these ranks, fits the roofline's constants to every
    second iteration, and says how well it gives the others."""
    samples = []

    def watch(server, finished):
        model = server.scheduler.model
        if model.samples and len(samples) < model.count:
            samples.append(model.samples[-1])
    status = run_cluster.run(["--no-verify", *arguments], watch)
    if status or int(os.environ.get("RANK", 0)):
        return status
    _, rows, load, sent, seconds = np.array(samples).T
    machine = Roofline(Config(), "a100", 1, 4)
    fitted = "flops", "attention", "weights", "link", "hop"

    def predict(logs):
        vars(machine).update(zip(fitted, np.exp(logs)))
        return np.maximum(machine.compute(rows, load), 1024 * sent / machine.link)

    loss = lambda logs: np.abs(np.log(predict(logs) / seconds))[::2].mean()
    start = np.log([1e10, 1e9, 1e-3, 1e9, 1e-3])
    best = min((minimize(loss, start + d, method="Nelder-Mead", options=dict(maxiter=5000))
                for d in (0, 1, -1)), key=lambda found: found.fun)
    guess, seen = predict(best.x)[1::2], seconds[1::2]
    print(json.dumps(dict(
        iterations=len(seen), correlation=float(np.corrcoef(guess, seen)[0, 1]),
        median_error=float(np.median(np.abs(guess / seen - 1))),
        seconds=[float(np.percentile(seen, p)) for p in (5, 50, 95)]), indent=1))
    return 0


def main(arguments: list[str]) -> int:
    if "--validate" in arguments:
        return validate([x for x in arguments if x != "--validate"])
    options = parser("Simulate a fleet.")
    add = options.add_argument
    add("--policy", default="tokenlake",
        help=f"{', '.join(VARIANTS)}, tokenlake:SCHEDULER, router, pd:PxD, each also with :fcfs")
    add("--rate", type=float, help="requests per second; default: 1, a trace's own")
    add("--trace", help="with --table: a trace to be in it, at its own times")
    add("--table", action="store_true", help="every scheduler on the demo and generated loads")
    add("--validate", action="store_true", help="fit it to this machine and compare; all other "
        "options are then those of run_cluster.py")
    parsed = options.parse_args(arguments)
    try:
        check(parsed)
        if parsed.table:
            table(parsed)
        else:
            print(json.dumps(simulate(parsed).summary(), indent=1))
    except (OSError, ValueError) as error:
        options.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
