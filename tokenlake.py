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

import hashlib
from bisect import insort
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from balancer import Balancer, PrefixTree, Request, Run
from kernels import ranges
from pool import (KINDS, Cluster, KVBuffer, LakeError, Moves, Pool, QueryBuffer, QueryPlan,
                  TransferPlan)

PUT, REPLICA, PULL = range(len(KINDS))
EXCHANGE_BYTES = 3_000_000  # what crosses in the 10 µs that an exchange takes anyway, at 300 GB/s
FLOPS, BANDWIDTH = 312e12, 2.04e12  # of one instance, 1/s and B/s: an A100's, in bf16


@dataclass(frozen=True)
class LakeConfig:
    """How a lake is cut."""

    segment_tokens: int = 16  # C
    slots: int = 512  # segments per instance
    placement: str = "stripe"  # or "hash"
    replicate_factor: float = 3.0  # c of c·N·ln N heavy hitters
    pull_tokens: int = 16_384  # of old KV that an instance pulls per iteration
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
        self.query_bytes = heads * (model.head_dim * (dtype.itemsize + wide.itemsize) + wide.itemsize)
        self.kv_bytes = 2 * model.num_kv_heads * model.head_dim * dtype.itemsize
        self.balancer = Balancer(N, config.slots, config.segment_tokens, config.placement,
                                 config.replicate_factor)
        self.pool = self.index = None
        self.exchange_bytes = EXCHANGE_BYTES
        # Rows from which on attention to a token costs more than reading it.
        self.ridge = max(1, round(FLOPS / BANDWIDTH * model.num_kv_heads / heads))
        groups = cluster.new_groups(instances, torch.device(device), 2) if cluster and N > 1 else []
        if cluster and cluster.rank in instances:
            self.index = instances.index(cluster.rank)
            self.pool = Pool(cluster, groups, model, config.slots, config.segment_tokens,
                             config.staging(N), dtype, device)

    # ── control plane ─────────────────────────────────────────────────────────────────────────

    def get_prefix_tree(self) -> PrefixTree:
        """The published segments. Read it; the calls below change it."""
        return self.balancer.tree

    def get_cache_load(self, reqs: list[Request], tree: PrefixTree, flops: float = FLOPS,
                       bandwidth: float = BANDWIDTH) -> float:
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
            memory += m.num_layers * self.kv_bytes * (prefix + new)
            compute += m.num_layers * 4.0 * m.num_heads * m.head_dim * prefix * new
            linear += 2.0 * m.num_linear_parameters * new
        if not linear:
            return 0.0
        ideal = linear / (N * flops)
        return max(memory / (memory + N * bandwidth * ideal),
                   compute / (compute + N * flops * ideal))

    def gen_plans(self, batches: list[list[Run]], dops: list[int], tree: PrefixTree):
        """Plans of an iteration (§5): batches of runs with their degrees of parallelism → query
        plan, transfer plan, groups (for each batch, the instance of each of its runs).

        A batch of DoP k is cut into k parts of about equal rows; parts are matched with instances,
        at most one each, so that the fewest bytes travel. Replicas are chosen first, by load; one
        at the instance that computes is then taken instead. Old KV travels to a prompt's rows where
        that is fewer bytes than their queries and results. So does fresh KV between the parts of
        one prompt; as that depends on pairs of parts, the matching counts it as read at home.
        `tree` is as in Fig. 5. Raises LakeError if the DoPs ask for more instances than there are,
        or the tree is another lake's."""
        if tree is not self.balancer.tree:
            raise LakeError("plans are made with the lake's own prefix tree")
        if sum(dops) > len(self.instances) or any(b and k < 1 for b, k in zip(batches, dops)):
            raise LakeError(f"DoPs {dops} for {len(batches)} batches on {len(self.instances)} "
                            "instances; one at least for each batch, and no more than there are")
        bal, (N, S, C), kv = self.balancer, self.balancer.sizes, self.kv_bytes
        copies, each = bal.replicate(), np.arange(len(self.instances))

        # Runs by request and position. A share is what a part has of a request.
        flat = [run for batch in batches for run in batch]
        B = len(flat)
        ids, position, rows, slot, puts, decode, done = columns = [
            np.fromiter(map(attrgetter(name), flat), np.int64, B) for name in (
                "request.id", "position", "rows", "slot", "puts", "decode", "request.done")]
        part, order = cut(batches, dops, rows), np.lexsort((position, ids))
        ids, position, rows, slot, puts, decode, done = (x[order] for x in columns)
        part, home = part[order], slot // S
        request = np.cumsum(np.diff(ids, prepend=-1) != 0)
        _, head, share = np.unique(part * (B + 1) + request, return_index=True, return_inverse=True)
        G, n, of_part = len(head), np.bincount(share, rows).astype(np.int64), part[head]
        ship, prefill = n[:, None] * self.query_bytes, decode[head][:, None] == 0

        # Old KV, replicas chosen (§4.4): tokens that a share reads at each holder.
        old, requests = done[head] + 1 - puts[head], [flat[order[b]].request for b in head]
        count = -(-old // C)
        held = np.array([r.held for r in requests], np.int64).reshape(G, N)
        ref_slot = np.concatenate([r.table[:k] for r, k in zip(requests, count.tolist())]
                                  or [slot]).astype(np.int64)
        end, some = np.cumsum(count), np.flatnonzero(count)
        hot, places = bal.places(ref_slot)
        of = np.searchsorted(end, hot, side="right")
        np.subtract.at(held, (of, ref_slot[hot] // S), 1)  # the cold ones

        def read(slots) -> np.ndarray:
            """[G, N] tokens, if the hot references are to these slots."""
            ref_slot[hot], tokens = slots, held * C
            np.add.at(tokens, (of, slots // S), C)
            tokens[some, ref_slot[end[some] - 1] // S] -= (count * C - old)[some]
            return tokens

        weight = np.maximum(n, self.ridge)
        tokens = read(bal.choose(places, C * weight[of], bal.load + C * (weight @ held)))

        # Ship or pull, the largest savings first, as long as the part has room.
        pulled = prefill & (tokens > 0) & (tokens * kv < ship)
        g, w = np.nonzero(pulled)
        by = np.lexsort(((tokens * kv - ship)[g, w], of_part[g]))
        g, w = g[by], w[by]
        upto = np.cumsum(tokens[g, w])
        before = (upto - tokens[g, w])[np.searchsorted(of_part[g], of_part[g])]
        full = upto - before > self.config.pull_tokens
        pulled[g[full], w[full]] = False

        # Fresh KV: a run reads what its request's runs write, up to its own.
        before = np.arange(B) - np.searchsorted(request, request)
        reader = np.repeat(np.arange(B), before + 1)
        writer = ranges(np.searchsorted(request, request), before + 1)
        reader, writer = reader[puts[writer] > 0], writer[puts[writer] > 0]

        # Matching (§5): bytes of a part at each holder, saved if that computes the part, or who
        # else has all that would be read there.
        cost, cells = np.zeros((2, sum(dops), N), np.int64)
        np.add.at(cells, of_part, np.where(pulled, tokens * kv, ship * (tokens > 0)))
        across = part[reader] != part[writer]
        np.add.at(cells, (part[reader[across]], home[writer[across]]), np.minimum(
            rows[reader] * self.query_bytes, rows[writer] * kv)[across])
        np.add.at(cost, part, (rows * puts * kv)[:, None] * (home[:, None] != each))
        there, at = places >= 0, ref_slot[hot] // S
        there[np.arange(len(hot)), at] = False  # counted already
        p = pulled[of, at]
        np.subtract.at(cost, of_part[of[p]], C * kv * there[p])
        cell, index, number = np.unique((of * N + at)[~p], return_inverse=True, return_counts=True)
        whole = np.ones((len(cell), N), bool)
        np.logical_and.at(whole, index, there[~p])
        g, w = np.divmod(cell, N)
        whole &= (tokens[g, w] == number * C)[:, None]
        np.subtract.at(cost, of_part[g], ship[g] * whole)
        cost += cells.sum(1, keepdims=True) - cells
        best = linear_sum_assignment(cost)[1]
        if len(best) == N and not (puts * (home != part)).any():  # every row where it will live
            gain = cost[each, each].sum() - cost[each, best].sum()
            best = each if gain <= self.exchange_bytes else best
        instance = best[part]

        # Now by instance, then request, then position. Replicas at hand are taken (§4.4).
        given, v = np.argsort(order), instance[head]
        groups = [group.tolist() for group in np.split(
            instance[given], np.cumsum([len(batch) for batch in batches]))[:len(batches)]]
        own = places[np.arange(len(hot)), v[of]]
        tokens = read(np.where(own >= 0, own, ref_slot[hot]))
        by_instance = np.argsort(instance, kind="stable")
        instance, rows, position, slot, puts, home, share = (
            x[by_instance] for x in (instance, rows, position, slot, puts, home, share))
        reader, writer = (np.argsort(by_instance)[x] for x in (reader, writer))
        before = np.cumsum(rows) - rows
        start = np.searchsorted(instance, instance)
        last = np.append(share[1:] != share[:-1], True)

        # Rows ship to old KV that is not pulled; and to fresh KV at its home, or that comes here.
        ships = (tokens > 0) & ~pulled & (v[:, None] != each)
        away = (instance[reader] != instance[writer]) & (instance[reader] != home[writer])
        g, w, fresh = share[reader], home[writer], np.zeros((G, N), np.int64)
        np.add.at(fresh, (g, w), rows[writer] * (away & last[reader]))
        sibling = away & (prefill & ~ships & (fresh * kv < ship))[g, w]
        ships = ships[share]
        ships[reader[away & ~sibling], w[away & ~sibling]] = True

        # KV on the move: old to who pulls it; new to its home and to siblings; copies.
        ref_share = np.repeat(np.arange(G), count) if pulled.any() else count[:0]
        holder = ref_slot[:len(ref_share)] // S
        pull_ref = np.flatnonzero(pulled[ref_share, holder] & (holder != v[ref_share]))
        g, source = ref_share[pull_ref], holder[pull_ref]
        length = np.minimum(old[g] - (pull_ref - (end - count)[g]) * C, C)
        pulls = Moves.of((PULL, source, ref_slot[pull_ref] % S * C, v[g], -1, length))
        staged = rows * puts * (home != instance)
        kept, offset = slot % S * C + position % C, np.cumsum(staged) - staged
        written = np.where(staged > 0, S * C + offset - offset[start], kept)
        to, at = np.flatnonzero(staged), np.flatnonzero(sibling & last[reader])
        filled, copied = (np.array([*x], np.int64) for x in (copies.keys(), copies.values()))
        moves = Moves.of(
            (PULL, instance[writer[at]], written[writer[at]], instance[reader[at]], -1,
             rows[writer[at]]),
            (PUT, instance[to], written[to], home[to], kept[to], rows[to]),
            (REPLICA, copied // S, copied % S * C, filled // S, filled % S * C, C))
        key, row = share[reader] * B + writer, np.full(len(reader), -1)
        by = np.argsort(key[at])
        row[sibling] = moves.offsets()[by[np.searchsorted(key[at], key[sibling], sorter=by)]]

        # Attention by where it is done (§4.3, §6), and cache read by holder, once a request (§7.2).
        meet = np.where(instance[reader] == instance[writer], instance[reader], w)
        meet[sibling] = instance[reader[sibling]]
        pairs = (n[:, None] * tokens * ~pulled).sum(0)
        np.add.at(pairs, v, (n[:, None] * tokens * pulled).sum(1))
        np.add.at(pairs, meet, rows[reader] * rows[writer])
        load = (weight[:, None] * tokens * ~pulled).sum(0)
        np.add.at(load, v, (weight[:, None] * tokens * pulled).sum(1))
        bal.observe(load)
        _, once = np.unique(request[head], return_index=True)

        plan = QueryPlan(
            [flat[b] for b in order[by_instance]], instance, before - before[start], rows, position,
            home, kept, written, share, old, ref_slot, pull_ref, pulls.offsets(), reader, writer,
            row, ships, pulls, tokens[once].sum(0), pairs, bal.sizes)
        kept_here = np.flatnonzero(puts)
        transfer = TransferPlan(*(x[kept_here] for x in (instance, plan.first, written, rows)),
                                moves, N)
        return plan, transfer, groups

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
        kv_buf = KVBuffer(transfer_plan, self.index, self.pool.rows, self.pool.device)
        if len(kv_buf.fresh) > sum(run.rows for run in batch if run.puts):
            raise LakeError(f"instance {self.index} is to put rows of another batch")
        return kv_buf

    def put(self, kv_buf: KVBuffer):
        """Writes the layer's new KV to its homes: at once here, elsewhere behind `query`, which
        must follow."""
        self.pool.put(kv_buf)


def cut(batches, dops, rows) -> np.ndarray:
    """The part of each run: batches one after another, a batch of DoP k cut in k of equal rows."""
    parts, base, at = [np.zeros(0, np.int64)], 0, 0
    for batch, dop in zip(batches, dops):
        own = rows[at:at + len(batch)]
        parts.append(base + (np.cumsum(own) - own) * dop // max(1, own.sum()))
        base, at = base + dop, at + len(batch)
    return np.concatenate(parts)


def plan_digest(iteration: int, query_plan: QueryPlan, transfer_plan: TransferPlan) -> bytes:
    """16 bytes that two ranks share only if they planned the same: who computes what, which slots
    are read, what travels where."""
    digest = hashlib.blake2b(str(iteration).encode(), digest_size=16)
    requests = np.array([run.request.id for run in query_plan.runs], np.int64)
    moves = [part for table in (query_plan.pulls, transfer_plan.moves)
             for part in (table.source, table.leave, table.target, table.arrive, table.length)]
    for part in (requests, query_plan.instance, query_plan.rows, query_plan.position,
                 query_plan.ref_slot, query_plan.ships, query_plan.written, *moves):
        digest.update(np.ascontiguousarray(part).tobytes() + b"|")
    return digest.digest()


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
