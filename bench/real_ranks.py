"""The policies of a comparison on real ranks: `torchrun … bench/compare.py --real`.

They run one after another with the small model under memory pressure, and every token is compared
with recomputation without a cache. Times mean little there.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from balancer import variation  # noqa: E402
from baselines import make_fleet  # noqa: E402
from cluster import Cluster  # noqa: E402
from engine import Engine  # noqa: E402
from model import Llama, LlamaConfig, Sampler, random_weights  # noqa: E402
from oracle import verify  # noqa: E402
from pool import PUT, InstanceMoves, LakeConfig, Moves  # noqa: E402
from provenance import describe_machine  # noqa: E402
from results import CV_WINDOW, sum_bytes  # noqa: E402
from run_cluster import Forgiving  # noqa: E402
from traces import RandomTokens, TraceForm, read_trace  # noqa: E402
from workloads import BLOCK, generate  # noqa: E402

SEGMENT = 8  # tokens; so are the blocks of the traces
IN_FLIGHT = 4  # requests for each rank


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
        moved = sum_bytes(self.cluster, self.pool)
        return dict(
            policy=self.policy,
            completed=len(requests),
            rounds=len(self.reads),  # an iteration of every lake
            computed_tokens=sum(s.counters["computed_tokens"] for s in schedulers),
            preemptions=sum(s.counters["preemptions"] for s in schedulers),
            verified=len(verdict.recomputed) - len(verdict.wrong),
            hit_rate=sum(self.fleet.cached_tokens.values()) / prompts,
            cache_load_cv=variation(self.reads_by_window()),
            evictions=sum(lake.balancer.evictions for lake in self.fleet.lakes),
            **{f"{kind}_bytes": n for kind, n in moved.items()},
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
            text = json.dumps(results, indent=1) + "\n"
            (options.output / "real.json").write_text(text)
    finally:
        cluster.close()
    wrong = [result for result in results if result["verified"] < result["completed"]]
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


MOVED = "query put sibling replica pull".split()
REAL_HEADER = (
    f"{'policy':>10} {'verified':>9} {'hits':>6} {'CV':>5} {'computed':>9} {'evicted':>8} "
    f"{'rounds':>10} {'queries':>8} {'new KV':>8} {'replicas':>8} {'pulled':>8}\n"
    f"{'':>10} {'requests':>9} {'%':>6} {'reads':>5} {'tokens':>9} {'segments':>8} "
    f"{'':>10} {'MB moved':>8} {'MB moved':>8} {'MB moved':>8} {'MB moved':>8}"
)


def show_real(result: dict) -> str:
    """A row of the table."""
    query, put, sibling, replica, pull = (result[f"{kind}_bytes"] / 1e6 for kind in MOVED)
    return (
        f"{result['policy']:>10} {result['verified']:>5}/{result['completed']:<3} "
        f"{100 * result['hit_rate']:>6.1f} {result['cache_load_cv']:>5.2f} "
        f"{result['computed_tokens']:>9,} {result['evictions']:>8,} "
        f"{result['rounds']:>10,} {query:>8,.1f} {put + sibling:>8,.1f} {replica:>8,.1f} "
        f"{pull:>8,.1f}"
    )


if __name__ == "__main__":
    print(__doc__)
