"""TokenLake: what does a serving engine see of a pooled prefix cache? Seven calls (§3.2, Fig. 5).

    control plane, the same on every rank            data plane, collective over the lake
      get_prefix_tree() → tree                         init_query(batch, group, query_plan) → q_buf
      get_cache_load(reqs, tree) → load                query(q_buf) → out
      gen_plans(batches, DoPs, tree)                   init_transfer(batch, transfer_plan) → kv_buf
          → query_plan, transfer_plan, groups          put(kv_buf)

The scheduler says which rows run together, the engine writes Q and new KV into buffers, and neither
knows where the cache is. Over one instance a lake never communicates: that is a conventional one.

The scheduler keeps queues, not places: any row can run anywhere. So the *even split* gives every
instance about the same rows, decode and prefill mixed; rows of one prompt on k instances
are sequence parallelism. The paper's dynamic program over batches and degrees of parallelism (DoP)
and fixed PD are here to compare: in lock-step the even split wins.

Notation: N instances · C tokens per segment · T rows · H query heads · Hkv KV heads · D head dim.
"""

import hashlib
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, fields
from itertools import chain, islice
from operator import attrgetter

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, nnls

from balancer import Balancer, PrefixTree, Request, Run
from kernels import ranges
from pool import (HERE, KINDS, LATE, SIBLING, Cluster, KVBuffer, LakeError, Moves, Pool,
                  QueryBuffer, QueryPlan, TransferPlan, old_segments)

PUT, REPLICA, PULL = range(len(KINDS))
FLOPS, BANDWIDTH, LINK = 312e12, 2.04e12, 300e9  # of an instance, 1/s and B/s: an A100's in bf16
NEVER = 1 << 60  # ps
FEW = 128  # rows: fewer of them take as long, as the weights have to be read anyway


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
        """Slab rows for KV that lives elsewhere: the most that an instance computes."""
        rows = self.chunk_tokens + self.max_batch  # an even share, and what may be over it
        return (rows + max(rows // 16 + 1, self.segment_tokens)) * (num_instances > 1)


class TokenLake:
    """A prefix cache pool over `instances` (ranks of the cluster), for a Llama of shape `model`.
    Every rank makes all lakes, in order; one that is no instance has but the control plane."""
    def __init__(self, instances: list[int], model, config: LakeConfig,
                 cluster: Cluster | None = None, dtype=torch.float32, device="cpu"):
        if instances != sorted(set(instances)):
            raise LakeError(f"instances {instances}: distinct, ascending ranks are expected")
        self.instances, self.model, self.config = instances, model, config
        N, H, D = len(instances), model.num_heads, model.head_dim
        size, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
        # Per row or token, and layer: Q on its way, O and LSE on the way back; K and V.
        self.query_bytes, self.kv_bytes = H * (D * (size + wide) + wide), (
            2 * model.num_kv_heads * D * size)
        self.exchange_bytes = 3_000_000  # what crosses a link in the 10 µs that it takes anyway
        self.weight_bytes = model.num_linear_parameters * size
        self.balancer = Balancer(N, config.slots, config.segment_tokens, config.placement,
                                 config.replicate_factor)
        # From so many rows on, attention to a token costs more than reading it.
        self.ridge = max(1, round(FLOPS / BANDWIDTH * model.num_kv_heads / H))
        self.pool = self.index = None
        groups = cluster.new_groups(instances, torch.device(device), 2) if cluster and N > 1 else []
        if cluster and cluster.rank in instances:
            self.index = instances.index(cluster.rank)
            self.pool = Pool(cluster, groups, model, config.slots, config.segment_tokens,
                             config.staging(N), dtype, device)

    def get_prefix_tree(self) -> PrefixTree:
        return self.balancer.tree

    def get_cache_load(self, reqs: list[Request], tree: PrefixTree, flops: float = FLOPS,
                       bandwidth: float = BANDWIDTH) -> float:
        """The share of the cluster that reading the cache costs for these requests (§6.1), 0 to 1:
        the larger of its memory and compute shares. flops [1/s] and bandwidth [B/s] of an instance.
        Unlike the paper: 4·d·prefix·input FLOPs, KV bytes at true width, both over all layers."""
        m, tokens, compute, linear = self.model, 0.0, 0.0, 0.0
        for request in reqs:
            self.balancer.extend_ids(request)
            prefix = request.done or tree.match(request.ids) * self.config.segment_tokens
            new = max(1, len(request.tokens) - prefix)
            tokens, prefix = tokens + len(request.tokens), len(request.tokens) - new
            compute += m.num_layers * 4.0 * m.num_heads * m.head_dim * prefix * new
            linear += 2.0 * m.num_linear_parameters * new  # in the ideal time of N instances
        memory = m.num_layers * self.kv_bytes * tokens
        return max(memory / (memory + linear / flops * bandwidth),
                   compute / (compute + linear)) if reqs else 0.0

    def gen_plans(self, batches: list[list[Run]], dops: list[int], tree: PrefixTree):
        """Plans of an iteration (§5): batches of runs with their degrees of parallelism → query
        plan, transfer plan, groups (for each batch, the instance of each of its runs).

        A batch of DoP k is cut into k parts of about equal rows; parts are matched with instances,
        at most one each, so that the fewest bytes travel to the replicas chosen first, by load; one
        where the part is computed is then taken instead. Old KV travels to a prompt's rows where
        that is fewer bytes than their queries and results; so does fresh KV between the parts of a
        prompt, which depends on pairs of parts and is left out of the matching. Raises LakeError
        if the DoPs ask for more instances than there are, or the tree is another lake's."""
        if tree is not self.balancer.tree:
            raise LakeError("plans are made with the lake's own prefix tree")
        if sum(dops) > len(self.instances) or any(b and k < 1 for b, k in zip(batches, dops)):
            raise LakeError(f"DoPs {dops}: one at least for each batch, and no more than instances")
        bal, (N, S, C), kv = self.balancer, self.balancer.sizes, self.kv_bytes
        copies = bal.replicate() if any(batches) else {}  # an idle iteration moves nothing
        # Runs by request and position. A share is what a part has of a request.
        flat = [run for batch in batches for run in batch]
        B, each = len(flat), np.arange(N)
        values = map(attrgetter("request.id", "position", "rows", "slot", "puts", "decode",
                                "request.done", "request.line"), flat)
        columns = np.fromiter(chain.from_iterable(values), np.int64, 8 * B).reshape(B, 8).T
        part, order = cut(batches, dops, columns[2]), np.lexsort((columns[1], columns[0]))
        ids, position, rows, slot, puts, decode, done, line = columns[:, order].copy()
        part, home, flat = part[order], slot // S, [flat[b] for b in order.tolist()]
        request = np.cumsum(np.diff(ids, prepend=-1) != 0)
        _, head, share = np.unique(part * (B + 1) + request, return_index=True, return_inverse=True)
        G, of_part, requests = len(head), part[head], [flat[b].request for b in head.tolist()]
        n = np.bincount(share, rows, G).astype(np.int64)
        ship, weight = n * self.query_bytes, np.maximum(n, self.ridge)
        # Old KV, replicas chosen (§4.4): tokens [G, N] that a share reads at each holder.
        old = done[head] + 1 - puts[head]
        tables, count, held = [r.table for r in requests], -(-old // C), bal.held[line[head]]
        held *= C
        begin, g = np.searchsorted(request, request), np.arange(G)
        held[g, slot[begin[head]] // S] -= count * C - old  # of a segment that is not yet full
        hot = old_segments(tables, np.minimum(count, bal.deepest))
        at, places = bal.places(hot[2])
        hot = of, _, at = np.stack(hot)[:, at]
        np.subtract.at(held, (of, at // S), C)  # the cold ones

        def read(slots) -> np.ndarray:
            """[G, N] tokens, if hot segments are read in these slots."""
            hot[2], tokens = slots, held.copy() if len(of) else held
            np.add.at(tokens, (of, slots // S), C)
            return tokens

        tokens = read(bal.choose(places, C * weight[of], bal.load + weight @ held))
        # Ship or pull: a decode ships; a prompt pulls what it has room for in its part.
        prompt, pulled = np.flatnonzero(decode[head] == 0), np.zeros((G, N), bool)
        room = self.config.pull_tokens // np.maximum(1, np.bincount(of_part[prompt], minlength=N))
        wanted = tokens[prompt]
        cheap = (wanted > 0) & (wanted * kv < ship[prompt, None])
        pulled[prompt] = cheap & (np.cumsum(wanted * cheap, 1) <= room[of_part[prompt], None])
        puller, source = np.nonzero(pulled) if len(prompt) else (prompt, prompt)
        # Matching (§5): bytes of a part at each holder and home, saved if that computes the part.
        cells = np.zeros((sum(dops), N), np.int64)
        by_share = (tokens > 0) * ship[:, None]
        by_share[puller, source] = tokens[puller, source] * kv
        present, start = np.unique(of_part, return_index=True)
        cells[present] = np.add.reduceat(by_share, start) if G else 0
        np.add.at(cells, (part, home), rows * puts * kv)
        cost = cells.sum(1, keepdims=True) - cells
        best = linear_sum_assignment(cost)[1]
        if len(best) == N and not (puts * (home != part)).any():  # every row where it will live
            gain = cost[each, each].sum() - cost[each, best].sum()
            best = each if gain <= self.exchange_bytes else best
        instance, v = best[part], best[of_part]
        given = iter(instance[np.argsort(order)].tolist())
        groups = [list(islice(given, len(batch))) for batch in batches]
        own = places[np.arange(len(of)), v[of]]  # a replica at hand is taken
        tokens = read(np.where(own >= 0, own, hot[2])) if len(of) else tokens
        # By instance, request, position. Fresh KV: a run reads its request's writes up to itself.
        upto = np.arange(B) - begin + 1
        reader, writer = np.repeat(np.arange(B), upto), ranges(begin, upto)
        order2 = np.argsort(instance, kind="stable")
        place = np.argsort(order2)
        reader, writer = (place[b[puts[writer] > 0]] for b in (reader, writer))
        instance, rows, position, slot, puts, home, share = (
            x[order2] for x in (instance, rows, position, slot, puts, home, share))
        first, start = np.cumsum(rows) - rows, np.searchsorted(instance, instance)
        # Rows ship to old KV that is not pulled. They ship to fresh KV elsewhere too, or what run c
        # writes comes to share g, a sibling, if that is fewer bytes.
        ships = tokens > 0
        ships[puller, source] = ships[np.arange(G), v] = False
        far = instance[reader] != instance[writer]
        away = np.flatnonzero(far & (instance[reader] != home[writer]))
        key, index = np.unique(share[reader[away]] * B + writer[away], return_inverse=True)
        g, c = np.divmod(key, B)
        cell, at = np.unique(g * N + home[c], return_inverse=True)
        few = np.bincount(at, rows[c], len(cell))[at] * kv < ship[g]
        comes = (decode[head][g] == 0) & ~ships[g, home[c]] & few
        sibling, shipped = away[comes[index]], away[~comes[index]]
        ships = ships[share]
        ships[reader[shipped], home[writer[shipped]]] = True
        # KV on the move: old to who pulls it; new to its home and to siblings; copies.
        to, _, at = pull = np.stack(old_segments(tables, np.where(pulled.any(1), count, 0), hot))
        to, segment, at = pull = pull[:, pulled[to, at // S] & (at // S != v[to])]
        length = np.minimum(old[to] - segment * C, C)
        pulls = Moves.of((PULL, at // S, at % S * C, v[to], -1, length))
        pull[2] = pulls.offsets()
        staged = rows * puts * (home != instance)
        kept, offset = slot % S * C + position % C, np.cumsum(staged) - staged
        written = np.where(staged > 0, S * C + offset - offset[start], kept)
        to, g, c = np.flatnonzero(staged), g[comes], c[comes]
        filled, copied = np.array([*copies.items()], np.int64).reshape(-1, 2).T
        moves = Moves.of((PULL, instance[c], written[c], v[g], -1, rows[c]),
                         (PUT, instance[to], written[to], home[to], kept[to], rows[to]),
                         (REPLICA, copied // S, copied % S * C, filled // S, filled % S * C, C))
        # Where fresh KV meets its readers: written there, arrived by then, or of a sibling.
        meet = np.where(far, home[writer], instance[reader])
        late = instance[writer] != meet
        fresh = np.stack((reader, writer, meet, np.where(late, LATE, HERE),
                          np.where(late, kept[writer], written[writer])))
        fresh[2:4, sibling] = instance[reader[sibling]], np.full(len(sibling), SIBLING)
        fresh[4, sibling] = moves.offsets()[(np.cumsum(comes) - 1)[index[comes[index]]]]
        # Attention where it is done, for the load (§4.3); cache reads by holder, once a request.
        once = np.bincount(np.unique(request[head], return_index=True)[1], minlength=G)
        load, reads = np.stack((weight, once)) @ tokens
        moved = weight[puller] * tokens[puller, source]
        np.add.at(load, np.concatenate((fresh[2], v[puller], source)),
                  np.concatenate((rows[reader] * rows[writer], moved, -moved)))
        bal.observe(load)

        plan = QueryPlan([flat[b] for b in order2.tolist()], instance, first - first[start], rows,
                         position, home, share, old, tables, hot, pull, fresh, ships, pulls, reads,
                         load, bal.sizes)
        writes = (x[puts > 0] for x in (instance, plan.first, written, rows))
        return plan, TransferPlan(*writes, moves, N), groups

    def features(self, query_plan: QueryPlan, transfer_plan: TransferPlan) -> np.ndarray:
        """[N, 3] what each instance does in an iteration: rows it computes, its attention (see
        QueryPlan.load), KiB it sends or receives, the larger."""
        N = len(self.instances)
        rows = np.bincount(query_plan.instance, query_plan.rows, N).astype(np.int64)
        kv = transfer_plan.moves.moved(N) + query_plan.pulls.moved(N)
        sent = query_plan.shipped() * self.query_bytes + kv * self.kv_bytes
        most = self.model.num_layers * np.maximum(sent.sum(0), sent.sum(1))
        return np.stack((rows, query_plan.load, most // 1024), 1)

    def init_query(self, batch: list[Run], group: list[int], query_plan: QueryPlan) -> QueryBuffer:
        """The buffer for Q of the rows that this instance computes: those of `batch` whose entry
        in `group` it is, in order. One per iteration; `q_buf.write(layer, q [T, H, D])`."""
        q_buf = QueryBuffer(query_plan, self.index, self.pool)
        if sum(run.rows for run, v in zip(batch, group) if v == self.index) != q_buf.num_rows:
            raise LakeError(f"instance {self.index} was handed another batch than is planned")
        return q_buf

    def query(self, q_buf: QueryBuffer):
        """Attention of the buffer's rows over prefix and new KV → [T, H, D]. Every instance of the
        lake calls it for every layer, with or without rows, after `put`."""
        return self.pool.query(q_buf)

    def init_transfer(self, batch: list[Run], transfer_plan) -> KVBuffer:
        """The buffer for new K and V of those rows: `kv_buf.write(layer, k, v)`, [T, Hkv, D] each.
        Rows of `batch` that only want logits of published tokens are not put."""
        return KVBuffer(transfer_plan, self.index, self.pool.rows, self.pool.device)

    def put(self, kv_buf: KVBuffer):
        """Writes the layer's new KV to its homes: here at once, elsewhere in the `query` after."""
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
    """16 bytes that two ranks share only if they planned the same: every array of the plans."""
    runs = [run.request.id for run in query_plan.runs]
    digest = hashlib.blake2b(repr((iteration, runs)).encode(), digest_size=16)
    plans = query_plan, query_plan.pulls, transfer_plan, transfer_plan.moves
    values = [getattr(plan, field.name) for plan in plans for field in fields(plan)]
    for array in (query_plan.segments[2], *values):
        if isinstance(array, np.ndarray):
            digest.update(array.tobytes() + b"|")
    return digest.digest()


def dynamic_program(time, R: int, N: int, slo: int | None = None):
    """Cuts R requests into batches with DoPs on N instances (§6.2), every time at most `slo`, by

        f(i, k) = min over j < i, l < k of f(j, l) + (i − j)·T(j+1..i, k − l)

    time(i, dop) → [i] integer times of the batches j..i, j < i; NEVER forbids one. Returns
    [(j, i, dop)], or None if nothing is allowed."""
    best, choice = np.full((R + 1, N + 1), NEVER), np.zeros((R + 1, N + 1, 2), np.int64)
    best[0] = 0
    for i in range(1, R + 1):
        for dop in range(1, N + 1):
            t = time(i, dop)
            allowed = (t < NEVER // (R + 1)) & (t <= (slo or NEVER))  # sums stay below NEVER
            cost = np.where(allowed, t, 0) * np.arange(i, 0, -1)
            total = np.where(allowed[:, None], best[:i, :N + 1 - dop] + cost[:, None], NEVER)
            j, value = total.argmin(0), total.min(0)
            better = np.flatnonzero(value < best[i, dop:])
            best[i, dop + better] = value[better]
            choice[i, dop + better, 0], choice[i, dop + better, 1] = j[better], dop
    out, i, k = [], R, N
    while i and best[R, N] < NEVER:
        j, dop = choice[i, k].tolist()
        out, i, k = [(j, i, dop), *out], j, k - dop
    return None if i else out


class TimeModel:
    """The time of an instance (§6.2), in ps: a + b·rows + c·rows·context + e·KiB sent. Integers,
    so that ranks agree: a roofline at first; what rank 0 has `fitted` counts once all have it."""
    def __init__(self, lake: "TokenLake"):
        m, self.samples, self.count = lake.model, [], 0
        self.bytes_per_row = m.num_layers * lake.kv_bytes
        seconds = (lake.weight_bytes / BANDWIDTH, 2 * m.num_linear_parameters / FLOPS,
                   4 * m.num_layers * m.num_heads * m.head_dim / FLOPS, 1024 / LINK)
        self.coefficients = self.fitted = [round(x * 1e12) for x in seconds]

    def time(self, rows, pairs, sent):
        """ps, for integers or arrays of them."""
        a, b, c, e = self.coefficients
        return a + b * rows + c * pairs + e * sent

    def split(self, rows, pairs, dop):
        """ps of rows split evenly over `dop` instances: fresh KV goes to half of the siblings."""
        sent = rows * self.bytes_per_row * (dop - 1) // 2048
        return self.time(*(-(-x // dop) for x in (rows, pairs, sent)))

    def measured(self, features, seconds: float):
        """An iteration with `features` [N, 3]; in lock-step the slowest instance counts. Every 32,
        a least squares fit of the last 256, but for the first 8, without negative terms."""
        slowest = features[np.argmax(self.time(*features.T))].tolist()
        self.count += 1
        self.samples = [*self.samples, (1, *slowest, seconds)][-256:] if self.count > 8 else []
        if self.count % 32 == 0:
            work, seconds = np.split(np.array(self.samples), [4], 1)
            scale = np.maximum(1, work.max(0))
            self.fitted = [round(x * 1e12) for x in nnls(work / scale, seconds[:, 0])[0] / scale]


class Scheduler:
    """Continuous batching, chunked prefill (§6), stateless. In queue and iteration, who needs the
    fewest rows goes first, but nobody is passed by many (`urgency`). policy: `even` gives every
    instance the same rows, prompt and decode mixed; `dp` is the paper's dynamic program; `pd:PxD`
    keeps P instances for prompts and D for decodes; `auto` is `even`. tbt_slo: ms between tokens,
    kept by fewer prompt rows where that is possible at all."""
    def __init__(self, lake: TokenLake, eos: tuple = (), policy: str = "auto", tbt_slo=None):
        self.lake, self.balancer, self.eos, self.policy = lake, lake.balancer, eos, policy
        self.slo = tbt_slo and max(1, int(min(tbt_slo, 1e9) * 1e9))  # ps
        self.model = TimeModel(lake)
        self.waiting: list[Request] = []  # by arrival
        self.running: list[Request] = []  # by admission, the last one last
        self.cached_tokens: dict[int, int] = {}  # by request id, at its first admission
        self.counters, self._arrived = Counter(), 0

    def add(self, request: Request):
        if request.order is None:
            request.order = self._arrived = self._arrived + 1
        insort(self.waiting, request, key=lambda r: r.order)

    def urgency(self, request: Request, done: int) -> int:
        """The lowest goes first: rows to compute, less 1/16 of a chunk per later request."""
        later = self._arrived - (request.order or 0)
        return len(request.tokens) - done - later * max(1, self.lake.config.chunk_tokens // 16)

    def _admit(self):
        """Admits the most urgent of the first to come, but for who awaits a prefix in progress."""
        balancer, C, most = self.balancer, self.balancer.segment_tokens, self.lake.config.max_batch

        def grows(request):  # slots for the rest of its prompt, and a segment of its answer
            end = min(len(request.tokens) + C, request.max_tokens - 1)
            return balancer.num_segments(end) - request.num_slots

        promised = sum(map(grows, self.running))
        first = [(balancer.match(r), r) for r in self.waiting[:most * (len(self.running) < most)]]
        for matched, request in sorted(first, key=lambda at: self.urgency(at[1], at[0] * C)):
            if balancer.awaited(request, matched):
                continue
            if len(self.running) == most or not balancer.fits(request, matched, promised):
                break
            balancer.admit(request, matched)
            promised += grows(request)
            self.cached_tokens.setdefault(request.id, request.done)
            self.waiting.remove(request)
            self.running.append(request)

    def _preempt(self):
        """The last admitted starts over: what it published stays, and it will hit it."""
        self.balancer.release(self.running[-1])
        self.counters["preemptions"] += 1
        self.add(self.running.pop())

    def _groups(self, budget: int):
        """Requests that run together, with `budget` prompt rows per instance that has any, as
        ([(request, rows)], DoP) each, and the time of the slowest (ps)."""
        N, decodes = len(self.lake.instances), [(r, 1) for r in self.running if r.remaining == 1]
        pd = [int(x) for x in self.policy[3:].split("x")] if self.policy[:3] == "pd:" else None
        dp = self.policy == "dp" and N > 1
        prompts, left = [], budget * (pd[0] if pd else N - (dp and bool(decodes)))
        for request in sorted(self.running, key=lambda r: self.urgency(r, r.done)):
            if request.remaining > 1 and left > 0:
                prompts.append((request, min(request.remaining, left)))
                left -= prompts[-1][1]
        items = decodes + sorted(prompts, key=lambda item: len(item[0].tokens))
        size = [(0, 0), *((n, max(n, self.lake.ridge) * (r.done + n // 2)) for r, n in items)]
        upto, D = np.cumsum(size, 0), len(decodes)

        def time(i, dop):
            """Of the batches j..i, j < i, of one kind and within a chunk per instance."""
            rows, pairs = (upto[i] - upto[:i]).T
            wide = dop > 1 if i <= D else rows > dop * self.lake.config.chunk_tokens
            mixed = (np.arange(i) < D) & (i > D)
            return np.where(mixed | wide, NEVER, self.model.split(rows, pairs, dop))

        cuts = [(0, D, pd[1]), (D, len(items), pd[0])] if pd else [(0, len(items), N)]
        if dp:
            cuts = (dynamic_program(time, len(items), N, self.slo)
                    or dynamic_program(time, len(items), N) or cuts)
        slowest = max(self.model.split(*(upto[i] - upto[j]).tolist(), dop) for j, i, dop in cuts)
        return [(items[j:i], dop) for j, i, dop in cuts], slowest

    def schedule(self) -> tuple[list[list[Run]], list[int]]:
        """Batches for the next iteration and their DoPs, their slots reserved; when all are pinned,
        the last admitted is preempted. Even split: a batch per instance, of rows living there."""
        self._admit()
        budget, N = self.lake.config.chunk_tokens, len(self.lake.instances)
        groups, time = self._groups(budget)
        if self.slo and time > self.slo and any(r.remaining == 1 for r in self.running):
            # The most prompt rows, in 16ths, that keep the SLO, and one at least, or prompts would
            # starve. If not even decodes alone keep it, it is dropped (§6.2).
            sizes = [budget * i // 16 for i in range(17)]
            late = bisect_left(sizes, 1, key=lambda n: self._groups(n)[1] > self.slo)
            groups = self._groups(max(1, sizes[late - 1]))[0] if late else groups
        even = len(groups) == 1 and groups[0][1] == N
        rows = {request.id: n for items, _ in groups for request, n in items}
        planned, tails = [0] * N, self.balancer.open_tails(self.running)
        share, C = -(-sum(rows.values()) // N), self.lake.config.segment_tokens
        most = max(share * 17 // 16, min(share + C, FEW)) if even else NEVER
        reserved = {}
        while len(reserved) < len(self.running):
            request = self.running[len(reserved)]
            runs = self.balancer.reserve(request, rows.get(request.id, 0), planned, tails, most)
            if runs is None:
                self._preempt()  # never one whose rows are reserved: those are older
            else:
                reserved[request.id] = runs
        if even:
            batches = [[] for _ in range(N)]
            for run in chain.from_iterable(reserved.values()):
                batches[run.instance].append(run)
            return batches, [1] * N
        batches = [[run for r, _ in items for run in reserved.get(r.id, ())] for items, _ in groups]
        return batches, [dop for _, dop in groups]

    def update(self, query_plan: QueryPlan, tokens: dict[int, int]) -> list[Request]:
        """After the iteration: publishes what is full, appends the sampled tokens (by request id)
        and releases the requests that end. Returns those."""
        for run, local in zip(query_plan.runs, (query_plan.instance == query_plan.home).tolist()):
            put = run.rows * run.puts
            self.counters.update(
                computed_tokens=run.rows, puts=put, puts_local=put * local,
                decode_puts=put * run.decode, decode_puts_local=put * run.decode * local,
                recomputed_tokens=max(0, min(run.request.peak - run.position, run.rows)))
        for run in sorted(query_plan.runs, key=lambda run: (run.request.id, run.position)):
            self.balancer.commit(run.request, run.rows)
        ended = []
        for request in self.running:
            if request.id in tokens:
                request.tokens.append(tokens[request.id])
                self.balancer.extend_ids(request)
                if len(request.tokens) == request.max_tokens or tokens[request.id] in self.eos:
                    self.balancer.release(request)
                    ended.append(request)
        self.running = [request for request in self.running if request not in ended]
        return ended
