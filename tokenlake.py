"""TokenLake: what does a serving engine see of a pooled prefix cache? Seven calls (§3.2, Fig. 5).

    control plane, the same on every rank            data plane, collective over the lake
      get_prefix_tree() → tree                         init_query(batch, group, query_plan) → q_buf
      get_cache_load(reqs, tree) → load                query(q_buf) → out
      gen_plans(batches, DoPs, tree)                   init_transfer(batch, transfer_plan) → kv_buf
          → query_plan, transfer_plan, groups          put(kv_buf)

The interface is declarative: the scheduler says which rows run together, the engine writes Q and
new KV into buffers, and neither knows where the cache is. A `TokenLake` is made over any list of
instances. Over one it never communicates: a conventional instance is a lake of one.

The scheduler is stateless in the paper's sense: it keeps queues, not places. Any row can run
anywhere, so the *even split* simply gives every instance the same rows per iteration, to a segment,
decode and prefill mixed; rows of one prompt on k instances are sequence parallelism, with no path
of its own.

Left out so far: the dynamic program of §6.2 over batches and degrees of parallelism (DoP).

Notation: N instances · C tokens per segment · T rows · H query heads · Hkv KV heads · D head dim.
"""

import time
from bisect import insort
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from balancer import Balancer, Geometry, PrefixTree, QueryPlan, Request, Run, plan_digest
from pool import Cluster, KVBuffer, LakeError, Pool, QueryBuffer


@dataclass(frozen=True)
class LakeConfig:
    """How a lake is cut."""

    segment_tokens: int = 16  # C
    slots: int = 512  # segments per instance
    placement: str = "stripe"  # or "hash"
    chunk_tokens: int = 64  # prompt rows per instance and iteration
    max_batch: int = 32  # running requests in the whole lake

    def staging(self, num_instances: int) -> int:
        """Slab rows for KV that lives elsewhere: at most what an instance computes, which is its
        share of prompt rows, its share of decode rows, and one segment (Balancer.reserve). A lake
        of one has no elsewhere."""
        decodes = -(-self.max_batch // num_instances)
        return (self.chunk_tokens + decodes + self.segment_tokens) * (num_instances > 1)


class TokenLake:
    """A prefix cache pool over `instances` (ranks of the cluster).

    model: shape of the Llama (model.Config). Every rank of the cluster makes all lakes, in the same
    order. Without a cluster, or on a rank that is not an instance, it is control plane only."""

    def __init__(self, instances: list[int], model, config: LakeConfig,
                 cluster: Cluster | None = None, dtype=torch.float32, device="cpu"):
        if instances != sorted(set(instances)):
            raise LakeError(f"instances {instances}: distinct, ascending ranks are expected")
        self.instances, self.model, self.config = instances, model, config
        N, wide = len(instances), torch.promote_types(dtype, torch.float32)
        heads = model.num_heads
        query_bytes = heads * (model.head_dim * (dtype.itemsize + wide.itemsize) + wide.itemsize)
        kv_bytes = 2 * model.num_kv_heads * model.head_dim * dtype.itemsize
        self.balancer = Balancer(Geometry(N, config.slots, config.segment_tokens, query_bytes,
                                          kv_bytes), config.placement)
        self.pool = self.index = None
        groups = cluster.new_groups(instances, torch.device(device), 2) if cluster and N > 1 else []
        if cluster and cluster.rank in instances:
            self.index = instances.index(cluster.rank)
            self.pool = Pool(cluster, groups, model, config.slots, config.segment_tokens,
                             config.staging(N), dtype, device)

    # ── control plane ─────────────────────────────────────────────────────────────────────────

    def get_prefix_tree(self) -> PrefixTree:
        """The published segments. Read it; the calls below change it."""
        return self.balancer.tree

    def get_cache_load(self, reqs: list[Request], tree: PrefixTree, flops: float = 312e12,
                       bandwidth: float = 2.04e12) -> float:
        """The share of the cluster that reading the cache itself would cost for these requests
        (§6.1), between 0 and 1: the larger of its memory and its compute share.

        flops [1/s] and bandwidth [B/s] of one instance; the defaults are an A100's. Differs from
        the paper: 4·d·prefix·input FLOPs (a score and a weighted sum, two each), KV bytes at the
        model's true width, and both over all layers."""
        m, N = self.model, len(self.instances)
        memory = compute = linear = 0.0
        for request in reqs:
            self.balancer.extend_ids(request)
            prefix = request.done or tree.match(request.ids) * self.config.segment_tokens
            prefix = min(prefix, len(request.tokens) - 1)
            new = len(request.tokens) - prefix
            memory += m.num_layers * self.balancer.geometry.kv_bytes * (prefix + new)
            compute += m.num_layers * 4.0 * m.num_heads * m.head_dim * prefix * new
            linear += 2.0 * m.num_linear_parameters * new
        if not linear:
            return 0.0
        ideal = linear / (N * flops)
        return max(memory / (memory + N * bandwidth * ideal),
                   compute / (compute + N * flops * ideal))

    def gen_plans(self, batches: list[list[Run]], dops: list[int], tree: PrefixTree):
        """Plans of an iteration: batches of runs with their degrees of parallelism → query plan,
        transfer plan, groups (for each batch, the instance of each of its runs). §5: sub-batches
        are matched with instances so that the fewest bytes cross. `tree` is as in Fig. 5; what the
        runs read is in their requests' tables already. Raises LakeError if the DoPs ask for more
        instances than there are, or the tree is another lake's."""
        if tree is not self.balancer.tree:
            raise LakeError("plans are made with the lake's own prefix tree")
        if sum(dops) > len(self.instances) or any(b and k < 1 for b, k in zip(batches, dops)):
            raise LakeError(f"DoPs {dops} for {len(batches)} batches on {len(self.instances)} "
                            "instances; one at least for each batch, and no more than there are")
        return self.balancer.gen_plans(batches, dops)

    # ── data plane ────────────────────────────────────────────────────────────────────────────

    def init_query(self, batch: list[Run], group: list[int], query_plan: QueryPlan) -> QueryBuffer:
        """The buffer for Q of the rows that this instance computes: those of `batch` whose entry
        in `group` it is, in order. One per iteration; `q_buf.write(layer, q [T, H, D])`."""
        q_buf = QueryBuffer(query_plan, self.index, self.pool.heads_per_kv, self.pool.device)
        share = sum(run.rows for run, v in zip(batch, group) if v == self.index)
        if share != q_buf.num_rows:
            raise LakeError(f"instance {self.index} was handed a batch with {share} rows for it, "
                            f"the plan has {q_buf.num_rows}")
        return q_buf

    def query(self, q_buf: QueryBuffer):
        """Attention of the rows in the buffer over prefix and new KV → [T, H, D]. Every instance
        of the lake calls it for every layer, with or without rows, after `put`."""
        return self.pool.query(q_buf)

    def init_transfer(self, batch: list[Run], transfer_plan) -> KVBuffer:
        """The buffer for new K and V of the rows that this instance computes; rows of `batch` that
        only want logits of published tokens are not put. `kv_buf.write(layer, k, v)`, each
        [T, Hkv, D]."""
        kv_buf = KVBuffer(transfer_plan, self.index, self.pool.staging, self.pool.device)
        if len(kv_buf.fresh) > sum(run.rows for run in batch if run.puts):
            raise LakeError(f"instance {self.index} is to put rows of another batch")
        return kv_buf

    def put(self, kv_buf: KVBuffer):
        """Writes the layer's new KV to its homes: at once here, elsewhere behind `query`, which
        must follow."""
        self.pool.put(kv_buf)


@dataclass
class Counters:
    """What the control plane did, in rows, tokens and events."""

    computed_tokens: int = 0
    recomputed_tokens: int = 0  # rows that this request had computed before (preemption)
    preemptions: int = 0
    decode_puts: int = 0
    decode_puts_local: int = 0
    puts: int = 0
    puts_local: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)  # request → at first admission


class Scheduler:
    """Continuous batching with chunked prefill, evenly split over the lake (§6, first part)."""

    def __init__(self, lake: TokenLake, eos: tuple = ()):
        self.lake, self.balancer, self.eos = lake, lake.balancer, eos
        self.waiting: list[Request] = []  # by arrival: a preempted one is older than who waits
        self.running: list[Request] = []  # by admission, the youngest last
        self.counters = Counters()
        self._arrived = 0

    def add(self, request: Request):
        if request.order is None:
            request.order = self._arrived = self._arrived + 1
        insort(self.waiting, request, key=lambda r: r.order)

    def _admit(self):
        """First come, first served, with a look-ahead of one batch past requests that wait for a
        prefix in progress."""
        config, balancer = self.lake.config, self.balancer

        def grows(request):  # slots for the rest of its prompt, and a segment of its answer
            end = min(len(request.tokens) + config.segment_tokens, request.max_tokens - 1)
            return balancer.num_segments(end) - request.num_slots

        promised = sum(map(grows, self.running))
        for request in list(islice(self.waiting, config.max_batch)):
            if len(self.running) == config.max_batch:
                break
            matched = balancer.match(request)
            if balancer.awaited(request, matched):
                continue
            if not balancer.fits(request, matched, promised):
                break
            balancer.admit(request, matched)
            promised += grows(request)
            self.counters.cached_tokens.setdefault(request.id, request.done)
            self.waiting.remove(request)
            self.running.append(request)

    def _preempt(self):
        """The youngest starts over: what it published stays, and it will hit it."""
        request = self.running.pop()
        self.balancer.release(request)
        self.counters.preemptions += 1
        self.add(request)

    def schedule(self) -> tuple[list[list[Run]], list[int]]:
        """Batches for the next iteration and their DoPs: one batch of DoP 1 per instance, of the
        rows that live there. Slots are reserved; when all are pinned, the youngest is preempted."""
        self._admit()
        config, N = self.lake.config, len(self.lake.instances)
        budget, rows = N * config.chunk_tokens, {}
        for request in self.running:
            rows[request.id] = 1 if request.remaining == 1 else min(request.remaining, budget)
            budget -= rows[request.id] if request.remaining > 1 else 0
        planned, tails = [0] * N, self.balancer.open_tails(self.running)
        most = -(-sum(rows.values()) // N) + config.segment_tokens
        batches = [[] for _ in range(N)]
        index = 0
        while index < len(self.running):
            request = self.running[index]
            runs = self.balancer.reserve(request, rows[request.id], planned, tails, most)
            if runs is None:
                self._preempt()  # never one that is in the batches already: those are older
                continue
            for run in runs:
                batches[run.instance].append(run)
            index += 1
        return batches, [1] * N

    def samples(self, query_plan: QueryPlan) -> list[list[Run]]:
        """For each instance its runs whose last row gives a token, in the plan's order."""
        out = [[] for _ in self.lake.instances]
        for run, instance in zip(query_plan.runs, query_plan.instance.tolist()):
            if run.samples:
                out[instance].append(run)
        return out

    def update(self, query_plan: QueryPlan, tokens: dict[int, int]) -> list[Request]:
        """After the iteration: publishes what is full, appends the sampled tokens (by request id)
        and releases the requests that end. Returns those."""
        counters, ended = self.counters, []
        placed = zip(query_plan.runs, query_plan.instance.tolist())
        for run, instance in sorted(placed, key=lambda item: (item[0].request.id,
                                                              item[0].position)):
            counters.computed_tokens += run.rows
            counters.recomputed_tokens += max(0, min(run.request.peak - run.position, run.rows))
            if run.puts:
                local = run.rows * (run.slot // self.lake.config.slots == instance)
                counters.puts += run.rows
                counters.puts_local += local
                counters.decode_puts += run.rows * run.decode
                counters.decode_puts_local += local * run.decode
            self.balancer.commit(run.request, run.rows)
        for request in list(self.running):
            if request.id in tokens:
                request.tokens.append(tokens[request.id])
                self.balancer.extend_ids(request)
                if len(request.tokens) == request.max_tokens or tokens[request.id] in self.eos:
                    self.running.remove(request)
                    self.balancer.release(request)
                    ended.append(request)
        return ended


class Engine:
    """One rank of the compute engine (Fig. 5): the loop body that every rank of the cluster runs
    alike, also one that is not in the lake.

    model and sampler: a Llama and a Sampler of model.py, or what has their methods."""

    def __init__(self, cluster: Cluster, lake: TokenLake, scheduler: Scheduler, model, sampler):
        self.cluster, self.lake, self.scheduler = cluster, lake, scheduler
        self.model, self.sampler = model, sampler
        self.clock = 0  # ns since the start, rank 0's; the same everywhere
        self.iterations = 0
        self.stop = False  # set by a signal; travels with the next digest
        self.reads: list[np.ndarray] = []  # per iteration: [N] cache tokens read

    def start(self):
        """Starts the clock when every rank is here."""
        self.cluster.share(None)
        self.started = time.monotonic_ns()

    def step(self, pause: float = 0.0) -> tuple[dict[int, int], list[Request]]:
        """One iteration: plan, agree, compute, exchange tokens and clock, publish. Without
        anything to run it sleeps, `pause` seconds at most. Returns the sampled tokens by request
        id and the requests that ended. Raises LakeError, Stopped."""
        cluster, lake = self.cluster, self.lake
        try:
            batches, dops = self.scheduler.schedule()
            query_plan, transfer_plan, groups = lake.gen_plans(batches, dops,
                                                               lake.get_prefix_tree())
        except Exception:
            with suppress(LakeError):  # the others stop too, and say so
                cluster.announce(bytes(16), self.stop, fault=True)
                cluster.confirm()
            raise
        cluster.announce(plan_digest(self.iterations, query_plan, transfer_plan), self.stop)
        samples, tokens = self.scheduler.samples(query_plan), []
        if not query_plan.runs:  # signals are looked at in between
            time.sleep(max(0.0, min(0.05, pause)))
        elif lake.pool:
            tokens = self._compute(batches, groups, query_plan, transfer_plan)
        cluster.confirm()
        padding = [0] * (max(map(len, samples)) - len(tokens))
        said = cluster.gather([time.monotonic_ns() - self.started, *tokens, *padding])
        self.clock = said[0][0]
        if query_plan.runs:
            self.iterations += 1
            self.reads.append(lake.balancer.cache_reads(query_plan))
        sampled = {run.request.id: token for rank, runs in zip(lake.instances, samples)
                   for run, token in zip(runs, said[rank][1:])}
        return sampled, self.scheduler.update(query_plan, sampled)

    def _compute(self, batches, groups, query_plan, transfer_plan) -> list[int]:
        """This rank's rows through the model → the tokens that its runs give, in their order."""
        lake = self.lake
        batch, group = next(((batch, group) for batch, group in zip(batches, groups)
                             if lake.index in group), ([], []))
        runs = [run for run, instance in zip(batch, group) if instance == lake.index]
        tokens = [token for run in runs
                  for token in run.request.tokens[run.position:run.position + run.rows]]
        positions = [p for run in runs for p in range(run.position, run.position + run.rows)]
        ends = np.cumsum([run.rows for run in runs]).tolist()
        rows = [end - 1 for run, end in zip(runs, ends) if run.samples]
        q_buf = lake.init_query(batch, group, query_plan)
        kv_buf = lake.init_transfer(batch, transfer_plan)

        def attend(layer, q, k, v):
            self.cluster.confirm()  # before the first exchange of data, behind embedding and QKV
            kv_buf.write(layer, k, v)
            lake.put(kv_buf)
            q_buf.write(layer, q)
            return lake.query(q_buf)

        tokens, positions, rows = (torch.tensor(x, dtype=torch.int64, device=lake.pool.device)
                                   for x in (tokens, positions, rows))
        logits = self.model.forward(tokens, positions, attend, rows)
        return self.sampler.sample(logits, [(run.request.id, len(run.request.tokens))
                                            for run in runs if run.samples])

    def verify(self, requests: list[Request], progress) -> dict[int, float]:
        """Recomputes finished requests without a cache, one per rank and round: the gap of each in
        logits (Llama.score_gap). After a signal, of those done by then."""
        gaps, size = {}, self.cluster.size
        for start in range(0, len(requests), size):
            for r in requests[start:start + size][self.cluster.rank:][:1]:
                gaps[r.id] = self.model.score_gap(self.sampler, r.tokens, r.num_prompt, r.id)
            progress(min(size, len(requests) - start))
            if any(stop for (stop,) in self.cluster.gather([self.stop])):
                break
        return {id: gap for part in self.cluster.share(gaps) for id, gap in part.items()}
