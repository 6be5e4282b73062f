"""The compute engine: what does one rank do in an iteration? (Fig. 5)

    plan, or take what was planned ahead ─▶ announce ─▶ layers: put, query ─▶ sample ─┐
                                                                                      │
    tokens of all ranks ◀─ samples are read ◀─ counts, features, the next plan ◀──────┘

Every rank runs it, with the same clock, requests and tokens, and so plans the same. It computes the
rows that the plan gives it; the sampled tokens cross at the end. A device is waited for once in an
iteration, when the samples are read. Until then it computes, and the host goes on. On a GPU it even
plans the next iteration meanwhile (scheduler.py says why it may), so that only the tokens, and the
announcement that covers them, lie between two iterations.
"""

import contextlib
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import numpy as np
import torch

from cluster import THE_END, Cluster, LakeError
from kernels import warm_up
from model import NOT_FINITE, Llama, Sampler
from pool import QueryPlan, TransferPlan, digest_with_tokens, hash_plan
from results import CV_WINDOW
from scheduler import Scheduler
from tokenlake import TokenLake
from work import ranges, select, starts, to_device


class EndOfIteration(NamedTuple):
    """What a rank says when an iteration is over. All take what rank 0 has fitted."""
    nonfinite_layer: int  # the first in which its new KV is not finite, −1 if there is none
    nonfinite_request: int
    fitted: list[int]  # TimePredictor.fitted
    # Of each request that samples; 0 where another rank computes it.
    tokens: list[int]
    logprobs: list[float]

    @classmethod
    def gather(cls, cluster, mine, now) -> tuple:
        """What rank 0's clock says when it has all, and every rank's, by rank."""
        *nonfinite, fitted, tokens, logprobs = mine
        bits = np.array(logprobs, np.float32).view(np.int32).tolist()
        values = [*nonfinite, *fitted, *tokens, *bits]
        clock, rows = cluster.gather_and_time(values, now)
        ends = 2 + np.cumsum([len(fitted), len(tokens)])

        def read(row):
            nonfinite, fitted, tokens, bits = np.split(np.array(row), [2, *ends])
            logprobs = bits.astype(np.int32).view(np.float32)
            return cls(*map(int, nonfinite), *(x.tolist() for x in (fitted, tokens, logprobs)))

        return clock, list(map(read, rows))


class Planned(NamedTuple):
    """An iteration, the same on every rank."""
    batches: list
    groups: list
    plan: QueryPlan
    transfer_plan: TransferPlan
    expected: tuple  # see TimePredictor.expect
    hashed: object  # see pool.hash_plan


@dataclass
class Engine:
    """One rank of the compute engine (Fig. 5): the loop body of every rank of the cluster, also of
    one that is not in the lake. model, sampler: those of model.py, or what has their methods."""
    cluster: Cluster
    lake: TokenLake
    scheduler: Scheduler
    model: Llama
    sampler: Sampler
    # Plan an iteration while the device computes the one before: see `step`.
    plan_ahead: bool = False
    clock: int = 0  # ns since the start, rank 0's on every rank
    iterations: int = 0
    profile: object = None  # see `profiler`
    observer: object = None  # is told of every plan: see record.Observer
    # Cache tokens read, [N], once a request, by window of CV_WINDOW iterations.
    reads: list = field(default_factory=list)
    tokens_read: int = 0  # of KV, by all instances, shared ones once: see QueryPlan
    # By request id and rank, for `verify`: rows that it has computed, tokens that it has sampled.
    computed: Counter = field(default_factory=Counter)
    sampled: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.next = None  # what was planned ahead, or why it failed; and its buffers
        # Sums over iterations of the predicted time: the mean over instances, and the longest.
        self.busy = np.zeros(2)
        if self.lake.pool and self.model.device.type == "cuda":
            self._warm_up()
        # A barrier: the clock starts when every rank is here.
        self.cluster.gather_objects(None)
        self.started = time.monotonic_ns() - self.clock

    def _warm_up(self):
        """Before the clock starts: or the first requests would wait, for seconds, until kernels are
        compiled and libraries have made their plans."""
        config = self.lake.llama_config
        H = config.num_heads
        Hkv = config.num_kv_heads
        # Alone, it leaves q where the model has it, beside keys and values.
        row_heads = H if len(self.lake.instances) > 1 else H + 2 * Hkv
        warm_up(H, Hkv, row_heads, config.head_dim, self.model.dtype, self.model.device)
        for rows in 1, self.lake.config.most_rows():
            ids = torch.zeros(rows, dtype=torch.int64, device=self.model.device)
            sampled = ids[: self.lake.config.max_batch]
            logits = self.model.forward(ids, ids, lambda layer, q, kv: q, sampled)
            self.sampler.sample(logits, [(0, 0)] * len(sampled))

    def now(self) -> int:
        """ns since the start, by this rank's clock."""
        return time.monotonic_ns() - self.started

    def step(self, pause=0.0):
        """One iteration: plan, agree, compute, exchange tokens, publish. With nothing to run it
        sleeps, `pause` seconds at most. Returns the sampled tokens by request id and the requests
        that ended. Raises LakeError, Stopped.

        With `plan_ahead` the next iteration is planned while the device computes this one. Plans
        depend on how many tokens there are, and that is known by then; which ones is filled in
        before the plan is announced, and so agreed upon. What comes meanwhile is heeded one
        iteration later: requests, end tokens (a row too many is computed, and dropped), and what
        the time predictor has learned."""
        self.cluster.doing = f"iteration {self.iterations + 1}"
        before = self.clock
        planned, buffers = self._take_plan()
        plan = planned.plan
        self.cluster.announce(digest_with_tokens(planned.hashed, plan))
        # They have ended, and have rows in this plan nevertheless.
        dropped = {request.id for request in self.scheduler.ending}
        wait_for_samples = None
        if not plan.runs:  # signals are looked at in between
            time.sleep(max(0.0, min(0.05, pause)))
        elif self.lake.pool:
            buffers = buffers or self._make_buffers(planned)
            wait_for_samples = self._launch(plan, buffers, dropped)
        self.cluster.confirm()  # for ranks that have not computed: the others have done so there
        # From here until the samples are read the device computes, and nobody waits for the host.
        if plan.runs:
            self._count(plan, dropped)
            features = self.lake.features(plan, planned.transfer_plan)
            if self.plan_ahead:
                sampling = plan.run_table.request_id[plan.samples]
                self.scheduler.advance(plan, set(sampling.tolist()))
                self._plan_next()
        sampled = self._exchange_tokens(plan, wait_for_samples, dropped)
        if plan.runs:
            self._measure(features, self.clock - before, planned.expected)
        if self.plan_ahead:
            return sampled, self.scheduler.fill(sampled)
        return sampled, self.scheduler.update(plan, sampled)

    def _take_plan(self):
        """The plan that was made ahead, with its buffers, or one that is made now. If planning has
        failed all stop, and say so."""
        planned, buffers = self.next or (None, None)
        self.next = None
        try:
            if isinstance(planned, Exception):
                raise planned
            if planned and planned.plan.runs:
                return planned, buffers
            # Nothing was to run then: something may have come.
            return self._plan(), None
        except Exception:
            with contextlib.suppress(LakeError):  # the others stop too, and say so
                self.cluster.announce(THE_END, fault=True)
                self.cluster.confirm()
            raise

    def _plan_next(self):
        """Ahead, while the device computes. A failure is told with the next announcement."""
        try:
            planned = self._plan()
            has_buffers = planned.plan.runs and self.lake.pool
            self.next = planned, self._make_buffers(planned) if has_buffers else None
        except Exception as error:
            self.next = error, None

    def _plan(self) -> Planned:
        if self.observer:
            self.observer.look()
        batches, dops = self.scheduler.schedule()
        expected = self.scheduler.predictor.expected
        tree = self.lake.get_prefix_tree()
        plan, transfer_plan, groups = self.lake.gen_plans(batches, dops, tree)
        hashed = hash_plan(self.iterations, plan, transfer_plan)
        if self.observer:
            self.observer.see(self.iterations + 1, plan, transfer_plan)
        return Planned(batches, groups, plan, transfer_plan, expected, hashed)

    def _make_buffers(self, planned):
        """For this rank's rows: of queries, and of KV."""
        lake = self.lake
        # An instance computes rows of one batch at most.
        mine = (pair for pair in zip(planned.batches, planned.groups) if lake.index in pair[1])
        batch, group = next(mine, ([], []))
        q_buf = lake.init_query(batch, group, planned.plan)
        return q_buf, lake.init_transfer(batch, planned.transfer_plan)

    def _launch(self, plan, buffers, dropped) -> Callable:
        """This rank's rows go through the model. Returns a function that waits for what they give:
        see `_read_samples`."""
        lake = self.lake
        q_buf, kv_buf = buffers

        def attend(layer, q, kv):
            # Before the first exchange of data; embedding and the first QKV hide the wait.
            self.cluster.confirm()
            kv_buf.write(layer, kv)
            lake.put(kv_buf)
            q_buf.write(layer, q)
            return lake.query(q_buf)

        table = plan.run_table
        own = np.flatnonzero(table.instance == lake.index)
        sampling = own[plan.samples[own]].tolist()
        ids, positions, last_rows = to_device(
            [
                plan.token_ids[ranges(starts(table.rows)[own], table.rows[own])],
                ranges(table.position[own], table.rows[own]),
                (table.first_row + table.rows - 1)[sampling],
            ],
            lake.pool.device,
        )
        logits = self.model.forward(ids, positions, attend, last_rows)
        requests = [plan.runs[i].request for i in sampling]
        keys = [(request.id, len(request.tokens)) for request in requests]
        tokens, logprobs = self.sampler.sample(logits, keys)
        on_device = torch.cat(
            (tokens.double(), logprobs.double(), lake.pool.sum_of_new(kv_buf))
        )
        own_runs = select(table, own)
        return lambda: self._read_samples(on_device, requests, kv_buf, own_runs, dropped)

    def _read_samples(self, on_device, requests, kv_buf, own_runs, dropped):
        """→ By request id token and log-probability; and, if new KV is not finite, its layer and
        request. The device is waited for here, once."""
        *drawn, kv_sum = on_device.tolist()
        tokens, logprobs = np.split(np.array(drawn), 2)
        samples = zip(tokens.astype(int).tolist(), logprobs.tolist())
        nonfinite = None
        if not math.isfinite(kv_sum):
            late = select(own_runs, np.isin(own_runs.request_id, list(dropped)))
            ignored = ranges(late.first_row, late.rows).tolist()
            nonfinite = self.lake.pool.first_nonfinite(kv_buf, ignored)
        if nonfinite:
            layer, row = nonfinite
            run = np.searchsorted(own_runs.first_row, row, "right") - 1
            nonfinite = layer, int(own_runs.request_id[run])
        return {r.id: sample for r, sample in zip(requests, samples)}, nonfinite

    def _count(self, plan, dropped):
        """Adds the iteration to what reports and `verify` need."""
        if self.iterations % CV_WINDOW == 0:
            self.reads.append(np.zeros_like(plan.reads))
        self.reads[-1] += plan.reads
        self.tokens_read += int(plan.tokens_read.sum())
        self.iterations += 1
        instances = plan.run_table.instance.tolist()
        for run, instance, samples in zip(plan.runs, instances, plan.samples.tolist()):
            if run.request.id not in dropped:
                request_and_rank = run.request.id, self.lake.instances[instance]
                self.computed[request_and_rank] += run.rows
                self.sampled[request_and_rank] += samples
        if self.observer:
            self.observer.tell(self.clock, dropped)

    def _measure(self, features, ns, expected):
        """Rank 0 fits the time predictor to the iteration, and the others receive its fit."""
        if self.profile:
            self.profile.step()
        predictor = self.scheduler.predictor
        times = predictor.time(*features.T)
        self.busy += times.mean(), times.max()
        if self.cluster.rank == 0:
            predictor.measured(features, ns / 1e9, expected)

    def _exchange_tokens(self, plan, wait_for_samples, dropped):
        """The tokens of all requests that sample, from the ranks that computed them, without those
        that are dropped; requests keep the log-probabilities. They are known when rank 0 has them
        all: its clock says when, for all. Raises LakeError if any new KV, or the logits of a token,
        are not finite: so such a segment is never read."""
        predictor = self.scheduler.predictor
        samples, nonfinite = wait_for_samples() if wait_for_samples else ({}, None)
        wanted = plan.samples & ~np.isin(plan.run_table.request_id, list(dropped))
        sampling = select(plan.run_table, wanted)
        ids = sampling.request_id.tolist()
        mine = [samples.get(id, (0, 0.0)) for id in ids]
        tokens = [token for token, _ in mine]
        logprobs = [logprob for _, logprob in mine]
        nonfinite = nonfinite or (-1, -1)
        end = EndOfIteration(*nonfinite, predictor.fitted, tokens, logprobs)
        self.clock, ends = EndOfIteration.gather(self.cluster, end, self.now)
        predictor.coefficients = ends[0].fitted
        # The lowest layer: in later ones the rows that have read it are not finite, either.
        nonfinite = [end[:2] for end in ends if end.nonfinite_layer >= 0]
        if nonfinite:
            layer, request_id = min(nonfinite)
            said = f"the KV of layer {layer} is not finite"
            raise self.cluster.problem(f"request {request_id}: {said}")
        ranks = [self.lake.instances[instance] for instance in sampling.instance]
        sampled = [ends[rank].tokens[i] for i, rank in enumerate(ranks)]
        for id, token in zip(ids, sampled):
            if token == NOT_FINITE:
                raise self.cluster.problem(f"request {id}: its logits are not finite")
        requests = [plan.runs[i].request for i in np.flatnonzero(wanted)]
        for i, (request, rank) in enumerate(zip(requests, ranks)):
            request.logprobs.append(ends[rank].logprobs[i])
        return dict(zip(ids, sampled))


if __name__ == "__main__":
    print(__doc__)
