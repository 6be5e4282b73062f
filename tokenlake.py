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

Every rank plans for all, so nobody has to be told: given the trace, the clock and the sampled
tokens, `gen_plans` gives the same on each. A digest of the plan crosses before the first exchange
of data, and a rank that planned otherwise, or has other tokens, stops all (`plan_digest`).

Notation: N instances · S slots per instance · C tokens per segment · T rows · H query heads ·
Hkv KV heads · D head dim. A plan counts in these things, and a table has rows of one kind only:

    B runs      rows of a request within one segment; by request, then by instance
    parts       a batch of DoP k is k parts of about equal rows; an instance computes one at most
    G shares    what a part has of one request: its rows there attend to the same old KV
    N instances

A plan by example: two instances of ten slots, C = 4. Request 0 decodes its row 10; request 1 has a
prompt of 9 tokens, of which 4 are cached; request 2 repeats 8 cached tokens, so only its last row is
computed, for its logits, and its KV goes nowhere. Numbers are positions of the request:

       run  request  rows  computed  KV goes  reads at 0    reads at 1
         0        0  10           0  slot 1   0–3, 8–9, 10  4–7
         1        1  4–7          0  slot 2   0–3, 4–7      –
         2        1  8            1  slot 11  0–3, 4–7      8
         3        2  7            1  –        0–3           4–7

Slots 0 to 9 are at instance 0, and slot 0 has positions 0–3 of all three requests; so run 0 travels
to instance 1 too, and runs 2 and 3 to instance 0. No KV has to move.
"""

from bisect import bisect_left, insort
from collections import Counter
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, nnls

from balancer import Balancer, PrefixTree, Request, Run
from kernels import Column, ranges, select, starts, starts_in_groups
from pool import EVEN_SLACK, HERE, LATE, PULL, PUT, REPLICA, SIBLING
from pool import Cluster, KVBuffer, LakeConfig, LakeError, Pool, QueryBuffer
from pool import FreshReads, Moves, OldKV, PulledSegments, QueryPlan, RunTable
from pool import SegmentReads, SlabWrites, TransferPlan, slab_row

# Of an instance, before anything is measured: an A100 in bf16, 1/s and B/s.
FLOPS = 312e12
BANDWIDTH = 2.04e12
LINK = 300e9
EXCHANGE_SECONDS = 10e-6  # of an exchange, however little it carries

# What a plan takes of a Run: the first columns of RunTable, then what shares need to know.
RUN_FIELDS = ["request.id", "position", "rows", "slot", "puts", "decode"]
RUN_FIELDS += ["request.done", "request.held_row"]

FORBIDDEN = 1 << 60  # ps, a time that nothing takes
UNLIMITED = 1 << 60  # rows
FEW_ROWS = 128  # fewer take as long, as the weights have to be read anyway
# A request counts 1/16 of a chunk less for each later one: see bench/NOTES.md.
AGEING = 16


# ── tables of an iteration ───────────────────────────────────────────────────────────────────────


class Shares(NamedTuple):
    """A row is a share: what a part has of one request. By part and request."""

    part: Column
    request: Column  # its request, by the number of that one's first run
    rows: Column
    weight: Column  # rows that attend in the same time: one alone waits for memory
    old_tokens: Column  # of its request in the pool: all its rows read them
    is_prompt: Column
    held_row: Column  # of its request, in Balancer.held
    first_run: Column
    instance: Column | None = None  # that computes it: after matching


class OldReads(NamedTuple):
    """Old KV, and where the shares read it."""

    tables: list[Column]  # [G] global slots of the segments of the share's request
    unique: Column  # [G, N] tokens of segments with one replica
    replicated: SegmentReads  # segments with more, and the slot chosen for each: [h]
    candidates: Column  # [h, N] slots of all of their replicas, −1 where there is none
    tokens: Column  # [G, N] of all segments, with the chosen replicas


class Pulled(NamedTuple):
    """A row is a share and a holder whose old KV comes to it: its rows do not go there."""

    share: Column
    holder: Column


class FreshPairs(NamedTuple):
    """A row is a pair of runs: the reader reads what the writer puts, the same or one before."""

    reader: Column
    writer: Column


class Siblings(NamedTuple):
    """A row is a run whose fresh KV comes to a share of its request on another instance."""

    share: Column
    writer: Column


class FreshRows(NamedTuple):
    """A row is a run, as in the plan: where its fresh KV is written."""

    at_home: Column  # first slab row at its home, where it will live
    written: Column  # first slab row where it is computed: at home, or in staging
    staged: Column  # rows in staging


class TokenLake:
    """A prefix cache pool over `instances` (ranks of the cluster), for a Llama of a given shape.
    Every rank makes all lakes, in order; one that is no instance has but the control plane."""

    def __init__(
        self,
        instances: list[int],
        llama_config,
        config: LakeConfig,
        cluster: Cluster | None = None,
        dtype=torch.float32,
        device="cpu",
    ):
        if instances != sorted(set(instances)):
            raise LakeError(
                f"instances {instances}: distinct, ascending ranks are expected"
            )
        self.instances = instances
        self.llama_config = llama_config
        self.config = config
        N = len(instances)
        H = llama_config.num_heads
        D = llama_config.head_dim
        Hkv = llama_config.num_kv_heads
        wide = torch.promote_types(dtype, torch.float32).itemsize
        # Per row and layer: Q on its way, O and LSE on the way back. Per token and layer: K and V.
        self.query_bytes = H * (D * (dtype.itemsize + wide) + wide)
        self.kv_bytes = 2 * Hkv * D * dtype.itemsize
        self.exchange_bytes = round(LINK * EXCHANGE_SECONDS)
        self.weight_bytes = llama_config.num_linear_parameters * dtype.itemsize
        # From so many rows on, attention to a token costs more than reading it.
        self.ridge = max(1, round(FLOPS / BANDWIDTH * Hkv / H))
        sizes = N, config.slots, config.segment_tokens
        self.balancer = Balancer(*sizes, config.placement, config.replicate_factor)
        self.pool = self.index = None
        groups = []
        if cluster and N > 1:
            groups = cluster.new_groups(instances, torch.device(device), 2)
        if cluster and cluster.rank in instances:
            self.index = instances.index(cluster.rank)
            staging = config.staging(N)
            self.pool = Pool(
                cluster, groups, llama_config, config, staging, dtype, device
            )

    # ── the control plane's calls ──

    def get_prefix_tree(self) -> PrefixTree:
        return self.balancer.tree

    def get_cache_load(self, reqs, tree, flops=FLOPS, bandwidth=BANDWIDTH) -> float:
        """The share of the cluster that reading the cache costs for these requests (§6.1), 0 to 1:
        the larger of its memory and compute shares. flops [1/s] and bandwidth [B/s] of an instance.
        Unlike the paper: 4·d·prefix·input FLOPs, KV bytes at true width, both over all layers."""
        if not reqs:
            return 0.0
        shape = self.llama_config
        tokens = pairs = rows = 0
        for request in reqs:
            self.balancer.extend_ids(request)
            matched = tree.match(request.ids) * self.config.segment_tokens
            length = len(request.tokens)
            new = max(1, length - (request.done or matched))
            tokens += length
            pairs += (length - new) * new
            rows += new
        memory = shape.num_layers * self.kv_bytes * tokens
        compute = shape.num_layers * 4.0 * shape.num_heads * shape.head_dim * pairs
        # What the ideal time of N instances is made of.
        linear = 2.0 * shape.num_linear_parameters * rows
        memory_share = memory / (memory + linear / flops * bandwidth)
        return max(memory_share, compute / (compute + linear))

    def gen_plans(self, batches: list[list[Run]], dops: list[int], tree):
        """Plans of an iteration (§5): batches of runs with their degrees of parallelism → query
        plan, transfer plan, groups (for each batch, the instance of each of its runs).

        A batch of DoP k is cut into k parts of about equal rows; parts are matched with instances,
        at most one each, so that the fewest bytes travel. Raises LakeError if the DoPs ask for more
        instances than there are, or the tree is another lake's."""
        self._check(batches, dops, tree)
        # An idle iteration moves nothing.
        copies = self.balancer.replicate() if any(batches) else {}
        given = list(chain.from_iterable(batches))
        parts = parts_of_runs(batches, dops)
        # Runs by request and position.
        order, runs, shares = self._tabulate(given, parts)
        tables = [given[i].request.table for i in order[shares.first_run].tolist()]
        # Replicas are chosen first, by load alone: what a part would send depends on them.
        old = self._find_old(runs, shares, tables)
        old = self._choose_replicas(shares, old)
        pulled = self._ship_or_pull(shares, old.tokens)
        instance_of_part = self._match(runs, shares, old.tokens, pulled, sum(dops))
        groups = [instance_of_part[part].tolist() for part in parts]
        # Only now is it known where a share is computed, and so which replica is at hand there.
        shares = shares._replace(instance=instance_of_part[shares.part])
        old = self._take_replicas_at_hand(shares, old)
        ships = old.tokens > 0
        ships[pulled] = False
        ships[np.arange(len(ships)), shares.instance] = False
        # From here on runs are by instance, request and position.
        by_instance = np.argsort(shares.instance[runs.share], kind="stable")
        pairs = self._pair(runs, by_instance)
        runs = select(runs, by_instance)
        instance = shares.instance[runs.share]
        runs = runs._replace(
            instance=instance, first_row=starts_in_groups(runs.rows, instance)
        )
        fresh, transfer_plan = self._plan_fresh(runs, shares, pairs, ships, copies)
        load, reads = self._loads(runs, shares, old.tokens, pulled, fresh)
        self.balancer.observe(load)
        query_plan = QueryPlan(
            [given[i] for i in order[by_instance].tolist()],
            runs,
            self._plan_old(shares, old, pulled),
            fresh,
            self._all_ships(runs, ships, fresh),
            reads,
            load,
            self.balancer.sizes,
        )
        return query_plan, transfer_plan, groups

    # ── its steps: runs, shares and the old KV that they read ──

    def _check(self, batches: list[list[Run]], dops: list[int], tree):
        if tree is not self.balancer.tree:
            raise LakeError("plans are made with the lake's own prefix tree")
        too_few = any(batch and dop < 1 for batch, dop in zip(batches, dops))
        if too_few or sum(dops) > len(self.instances):
            said = f"DoPs {dops}: one at least for each batch, and no more than instances"
            raise LakeError(said)

    def _tabulate(self, given: list[Run], parts):
        """Runs by request and position: their numbers as given, and the table; and the shares."""
        values = chain.from_iterable(map(attrgetter(*RUN_FIELDS), given))
        columns = np.fromiter(values, np.int64, len(given) * len(RUN_FIELDS))
        columns = columns.reshape(-1, len(RUN_FIELDS)).T
        order = np.lexsort((columns[1], columns[0]))
        *columns, done, held_row = columns[:, order].copy()
        part = np.concatenate([order[:0], *parts])[order]
        request_id, _, rows, slot, puts, decode = columns
        first = np.searchsorted(request_id, request_id)  # the first run of its request
        key = part * (len(given) + 1) + first
        _, head, share = np.unique(key, return_index=True, return_inverse=True)
        runs = RunTable(*columns, slot // self.config.slots, share)
        share_rows = np.bincount(share, rows, len(head)).astype(np.int64)
        shares = Shares(
            part[head],
            first[head],
            share_rows,
            np.maximum(share_rows, self.ridge),
            # A fully cached prompt computes its last row once more, for its logits alone. That row
            # puts nothing: its own token is old, too.
            done[head] + (puts[head] == 0),
            decode[head] == 0,
            held_row[head],
            head,
        )
        return order, runs, shares

    def _find_old(self, runs, shares, tables) -> OldReads:
        """Old KV as the tables of the shares' requests have it; no replicas are chosen yet."""
        _, S, C = self.balancer.sizes
        counts = -(-shares.old_tokens // C)
        tokens = self.balancer.held[shares.held_row]
        tokens *= C
        # The last old segment may not be full: it is the one that the request writes to next.
        missing = counts * C - shares.old_tokens
        tokens[np.arange(len(counts)), runs.home[shares.request]] -= missing
        deepest = self.balancer.deepest_replicated
        reads = SegmentReads.of(tables, np.minimum(counts, deepest))
        replicated, candidates = self.balancer.replicas_of(reads.slot)
        reads = select(reads, replicated)
        np.subtract.at(tokens, (reads.share, reads.slot // S), C)
        return OldReads(tables, tokens, reads, candidates, tokens)

    def _reading(self, old, slots) -> OldReads:
        """Old KV with the replicas in other slots: [h]."""
        if not len(slots):
            return old
        _, S, C = self.balancer.sizes
        replicated = old.replicated._replace(slot=slots)
        tokens = old.unique.copy()
        np.add.at(tokens, (replicated.share, slots // S), C)
        return old._replace(replicated=replicated, tokens=tokens)

    def _choose_replicas(self, shares, old) -> OldReads:
        """A replica of each segment with several, by the load so far (§4.4)."""
        load = self.balancer.load + shares.weight @ old.unique
        cost = self.config.segment_tokens * shares.weight[old.replicated.share]
        return self._reading(
            old, self.balancer.choose_replicas(old.candidates, cost, load)
        )

    def _ship_or_pull(self, shares, tokens) -> Pulled:
        """A decode ships its row. A prompt pulls what a holder has for it, if that is fewer bytes
        than its queries and results, as far as its part of the receive buffer goes."""
        prompts = np.flatnonzero(shares.is_prompt)
        part = shares.part[prompts]
        room = self.config.pull_tokens // np.maximum(1, np.bincount(part))[part]
        wanted = tokens[prompts]
        ship_bytes = shares.rows[prompts] * self.query_bytes
        cheaper = (wanted > 0) & (wanted * self.kv_bytes < ship_bytes[:, None])
        in_buffer = np.cumsum(wanted * cheaper, 1)
        prompt, holder = np.nonzero(cheaper & (in_buffer <= room[:, None]))
        return Pulled(prompts[prompt], holder)

    def _match(self, runs, shares, tokens, pulled, num_parts: int) -> Column:
        """[parts] the instance of each (§5): parts and instances matched so that the fewest bytes
        travel. An instance saves what its part exchanges with itself. Fresh KV between the parts of
        a prompt depends on pairs of parts, and is left out."""
        N = len(self.instances)
        share_bytes = (tokens > 0) * (shares.rows * self.query_bytes)[:, None]
        share_bytes[pulled] = tokens[pulled] * self.kv_bytes
        exchanged = np.zeros((num_parts, N), np.int64)
        present, first_share = np.unique(shares.part, return_index=True)
        if len(present):
            exchanged[present] = np.add.reduceat(share_bytes, first_share)
        part = shares.part[runs.share]
        np.add.at(exchanged, (part, runs.home), runs.rows * runs.puts * self.kv_bytes)
        cost = exchanged.sum(1, keepdims=True) - exchanged
        _, best = linear_sum_assignment(cost)
        # The even split's parts are made by home: every row is computed where its KV will live.
        # That is left for a gain only that takes longer to send than an exchange takes anyway.
        if num_parts == N and not (runs.puts * (runs.home != part)).any():
            by_home = np.arange(N)
            gain = cost[by_home, by_home].sum() - cost[by_home, best].sum()
            if gain <= self.exchange_bytes:
                return by_home
        return best

    def _take_replicas_at_hand(self, shares, old) -> OldReads:
        """A replica where the share is computed is read instead of the chosen one: nothing has to
        travel. (Matching does not count on it: that saved few bytes and cost much planning.)"""
        reads = old.replicated
        at_hand = old.candidates[
            np.arange(len(reads.share)), shares.instance[reads.share]
        ]
        return self._reading(old, np.where(at_hand >= 0, at_hand, reads.slot))

    def _plan_old(self, shares, old, pulled) -> OldKV:
        """What travels of old KV to the shares that pull it, but for what is at hand there."""
        _, S, C = self.balancer.sizes
        pulls = np.zeros(old.tokens.shape, bool)
        pulls[pulled] = True
        pulls[np.arange(len(pulls)), shares.instance] = False
        counts = np.where(pulls.any(1), -(-shares.old_tokens // C), 0)
        reads = SegmentReads.of(old.tables, counts, old.replicated)
        source = reads.slot // S
        travels = pulls[reads.share, source]
        reads = select(reads, travels)
        rows = np.minimum(shares.old_tokens[reads.share] - reads.segment * C, C)
        source_row = slab_row(reads.slot, S, C)
        target = shares.instance[reads.share]
        moves = Moves.of((PULL, source[travels], source_row, target, -1, rows))
        segments = PulledSegments(reads.share, reads.segment, moves.receive_rows())
        return OldKV(shares.old_tokens, old.tables, old.replicated, segments, moves)

    # ── its steps: fresh KV, with runs by instance ──

    def _pair(self, runs, by_instance) -> FreshPairs:
        """Who reads fresh KV: a run reads what the runs of its request put, from the first one up
        to itself. Takes runs by request, gives their numbers by instance."""
        run = np.arange(len(by_instance))
        first = np.searchsorted(runs.request_id, runs.request_id)  # of its request
        count = run - first + 1
        reader = np.repeat(run, count)
        writer = ranges(first, count)
        put = runs.puts[writer] > 0
        number = np.argsort(by_instance)
        return FreshPairs(number[reader[put]], number[writer[put]])

    def _plan_fresh(self, runs, shares, pairs, ships, copies):
        """Where fresh KV meets its readers, and the transfer plan, in which copies travel too."""
        fresh_rows = self._write_fresh(runs)
        siblings, sibling = self._choose_siblings(runs, shares, pairs, ships)
        moves = self._move(runs, shares, fresh_rows, siblings, copies)
        fresh = self._meet(runs, pairs, fresh_rows, sibling, moves)
        writes = SlabWrites(runs.instance, runs.first_row, fresh_rows.written, runs.rows)
        writes = select(writes, runs.puts > 0)
        return fresh, TransferPlan(writes, moves, len(self.instances))

    def _write_fresh(self, runs) -> FreshRows:
        """What lives elsewhere waits in staging, behind the slots."""
        _, S, C = self.balancer.sizes
        at_home = slab_row(runs.slot, S, C) + runs.position % C
        staged = runs.rows * runs.puts * (runs.home != runs.instance)
        in_staging = S * C + starts_in_groups(staged, runs.instance)
        return FreshRows(at_home, np.where(staged > 0, in_staging, at_home), staged)

    def _choose_siblings(self, runs, shares, pairs, ships):
        """Of fresh KV that is neither written nor put where its reader is computed: either readers'
        rows travel to its home, or it comes to their share, as a sibling's. It comes if that is
        fewer bytes, but not to a decode, nor where rows go to its home anyway. → Siblings, and of
        each pair the sibling that brings its KV: −1 where none does."""
        reader, writer = pairs
        N = len(self.instances)
        B = len(runs.rows)
        far = runs.instance[reader] != runs.instance[writer]
        away = np.flatnonzero(far & (runs.instance[reader] != runs.home[writer]))
        key = runs.share[reader[away]] * B + writer[away]
        key, option = np.unique(key, return_inverse=True)
        share, written = np.divmod(key, B)
        # All that a share reads at one home comes or none: rows that go there read it all.
        home = runs.home[written]
        trip, of_trip = np.unique(share * N + home, return_inverse=True)
        tokens = np.bincount(of_trip, runs.rows[written], len(trip))[of_trip]
        cheaper = tokens * self.kv_bytes < shares.rows[share] * self.query_bytes
        comes = cheaper & shares.is_prompt[share] & ~ships[share, home]
        sibling = np.full(len(reader), -1)
        sibling[away] = np.where(comes, np.cumsum(comes) - 1, -1)[option]
        return Siblings(share[comes], written[comes]), sibling

    def _move(self, runs, shares, fresh_rows, siblings, copies):
        """New KV to siblings and to its home, and copies. Siblings come first: so the n-th of them
        is the n-th move, which says where it lies in the receive buffer."""
        _, S, C = self.balancer.sizes
        staged = np.flatnonzero(fresh_rows.staged)
        to_sibling = select(runs, siblings.writer)
        to_home = select(runs, staged)
        filled, copied = np.array([*copies.items()], np.int64).reshape(-1, 2).T
        target = shares.instance[siblings.share]
        source_row = fresh_rows.written[siblings.writer]
        return Moves.of(
            (PULL, to_sibling.instance, source_row, target, -1, to_sibling.rows),
            (
                PUT,
                to_home.instance,
                fresh_rows.written[staged],
                to_home.home,
                fresh_rows.at_home[staged],
                to_home.rows,
            ),
            (
                REPLICA,
                copied // S,
                slab_row(copied, S, C),
                filled // S,
                slab_row(filled, S, C),
                C,
            ),
        )

    def _meet(self, runs, pairs, fresh_rows, sibling, moves):
        """FreshReads. Computed on one instance, a pair meets there. Else it does at the home of the
        KV, where this was written or a move has brought it by then; or it came as a sibling's."""
        reader, writer = pairs
        far = runs.instance[reader] != runs.instance[writer]
        instance = np.where(far, runs.home[writer], runs.instance[reader])
        late = instance != runs.instance[writer]
        place = np.where(late, LATE, HERE)
        first_row = np.where(late, fresh_rows.at_home[writer], fresh_rows.written[writer])
        came = sibling >= 0
        instance[came] = runs.instance[reader[came]]
        place[came] = SIBLING
        first_row[came] = moves.receive_rows()[sibling[came]]
        return FreshReads(reader, writer, instance, place, first_row)

    # ── its steps: what comes of it ──

    def _all_ships(self, runs, ships, fresh) -> Column:
        """[B, N] whether a run's rows travel to an instance: to old KV, where its share reads some,
        and to fresh KV."""
        ships = ships[runs.share]
        away = (fresh.place != SIBLING) & (fresh.instance != runs.instance[fresh.reader])
        ships[fresh.reader[away], fresh.instance[away]] = True
        return ships

    def _loads(self, runs, shares, tokens, pulled, fresh):
        """[N] attention done at each instance, for the balance (§4.3), and [N] tokens of cache read
        at each holder, once a request, as §7.2 counts."""
        load = shares.weight @ tokens
        moved = shares.weight[pulled.share] * tokens[pulled]  # it is read where it comes
        np.subtract.at(load, pulled.holder, moved)
        np.add.at(load, shares.instance[pulled.share], moved)
        fresh_pairs = runs.rows[fresh.reader] * runs.rows[fresh.writer]
        np.add.at(load, fresh.instance, fresh_pairs)
        _, first_share = np.unique(shares.request, return_index=True)
        once = np.zeros(len(shares.request), np.int64)
        once[first_share] = 1
        return load, once @ tokens

    def features(self, query_plan, transfer_plan) -> Column:
        """[N, 3] what each instance does in an iteration: rows it computes, its attention (see
        QueryPlan.load), KiB it sends or receives, the larger."""
        N = len(self.instances)
        runs = query_plan.run_table
        rows = np.bincount(runs.instance, runs.rows, N).astype(np.int64)
        kv_rows = transfer_plan.moves.rows_between(N)
        kv_rows += query_plan.old.pulls.rows_between(N)
        query_rows = query_plan.rows_shipped()
        layer_bytes = query_rows * self.query_bytes + kv_rows * self.kv_bytes
        most = np.maximum(layer_bytes.sum(0), layer_bytes.sum(1))
        kib = self.llama_config.num_layers * most // 1024
        return np.stack((rows, query_plan.load, kib), 1)

    # ── the data plane's calls ──

    def init_query(self, batch: list[Run], group, query_plan: QueryPlan) -> QueryBuffer:
        """The buffer for Q of the rows that this instance computes: those of `batch` whose entry
        in `group` it is, in order. One per iteration; `q_buf.write(layer, q [T, H, D])`."""
        q_buf = QueryBuffer(query_plan, self.index, self.pool)
        rows = [run.rows for run, instance in zip(batch, group) if instance == self.index]
        if sum(rows) != q_buf.num_rows:
            said = f"instance {self.index} was handed another batch than is planned"
            raise LakeError(said)
        return q_buf

    def query(self, q_buf):
        """Attention of the buffer's rows over prefix and new KV → [T, H, D]. Every instance of the
        lake calls it for every layer, with or without rows, after `put`."""
        return self.pool.query(q_buf)

    def init_transfer(self, batch: list[Run], transfer_plan) -> KVBuffer:
        """The buffer for new K and V of those rows: `kv_buf.write(layer, k, v)`, [T, Hkv, D] each.
        Rows of `batch` that only want logits of published tokens are not put."""
        return KVBuffer(transfer_plan, self.index, self.pool.num_rows, self.pool.device)

    def put(self, kv_buf):
        """Writes the layer's new KV to its homes: here at once, elsewhere in the `query` after."""
        self.pool.put(kv_buf)


def parts_of_runs(batches: list[list[Run]], dops: list[int]) -> list[Column]:
    """The part of each run, by batch: one of DoP k is cut into k of about equal rows."""
    parts = []
    first = 0
    for batch, dop in zip(batches, dops):
        rows = np.array([run.rows for run in batch], np.int64)
        parts.append(first + starts(rows) * dop // max(1, rows.sum()))
        first += dop
    return parts


# ── the scheduler ────────────────────────────────────────────────────────────────────────────────


class BatchRange(NamedTuple):
    """A batch of consecutive items, first to end − 1, and its DoP."""

    first: int
    end: int
    dop: int


def dynamic_program(
    time, R: int, N: int, slo: int | None = None
) -> list[BatchRange] | None:
    """Cuts R requests into batches with DoPs on N instances (§6.2), every time at most `slo`, by

        f(i, k) = min over j < i, l < k of f(j, l) + (i − j)·T(j+1..i, k − l)

    time(i, dop) → [i] integer times of the batches j..i, j < i; FORBIDDEN rules one out. None if
    nothing is allowed."""
    best = np.full((R + 1, N + 1), FORBIDDEN)
    best[0] = 0
    best_first = np.zeros((R + 1, N + 1), np.int64)
    best_dop = np.zeros((R + 1, N + 1), np.int64)
    for i in range(1, R + 1):
        for dop in range(1, N + 1):
            times = time(i, dop)
            # Sums of allowed times stay below FORBIDDEN.
            allowed = (times < FORBIDDEN // (R + 1)) & (times <= (slo or FORBIDDEN))
            cost = np.where(allowed, times, 0) * np.arange(i, 0, -1)
            total = best[:i, : N + 1 - dop] + cost[:, None]  # [j, instances before]
            total = np.where(allowed[:, None], total, FORBIDDEN)
            better = np.flatnonzero(total.min(0) < best[i, dop:])
            k = dop + better
            best[i, k] = total.min(0)[better]
            best_first[i, k] = total.argmin(0)[better]
            best_dop[i, k] = dop
    if best[R, N] == FORBIDDEN:
        return None
    batches = []
    i = R
    k = N
    while i:
        batches.insert(0, BatchRange(int(best_first[i, k]), i, int(best_dop[i, k])))
        i = batches[0].first
        k -= batches[0].dop
    return batches


class TimePredictor:
    """The time of an instance (§6.2), in ps: a + b·rows + c·rows·context + e·KiB sent. Integers,
    so that ranks agree: a roofline at first; what rank 0 has `fitted` counts once all have it."""

    def __init__(self, lake):
        shape = lake.llama_config
        self.bytes_per_row = shape.num_layers * lake.kv_bytes
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim
        linear = 2 * shape.num_linear_parameters
        weights = lake.weight_bytes / BANDWIDTH
        seconds = weights, linear / FLOPS, attention / FLOPS, 1024 / LINK
        self.fitted = [round(x * 1e12) for x in seconds]
        self.coefficients = self.fitted
        self.samples: list[tuple] = []
        self.count = 0

    def time(self, rows, pairs, kib):
        """ps, for integers or arrays of them."""
        a, b, c, e = self.coefficients
        return a + b * rows + c * pairs + e * kib

    def split_time(self, rows, pairs, dop: int):
        """ps of rows split evenly over `dop` instances: fresh KV goes to half of the siblings."""
        kib = rows * self.bytes_per_row * (dop - 1) // 2048
        return self.time(-(-rows // dop), -(-pairs // dop), -(-kib // dop))

    def measured(self, features, seconds: float):
        """An iteration with `features` [N, 3]; in lock-step the slowest instance counts. Every 32,
        a least squares fit of the last 256, but for the first 8, without negative terms."""
        slowest = features[np.argmax(self.time(*features.T))].tolist()
        self.count += 1
        if self.count > 8:
            self.samples = [*self.samples, (1, *slowest, seconds)][-256:]
        if self.count % 32 == 0:
            work, times = np.split(np.array(self.samples), [4], 1)
            scale = np.maximum(1, work.max(0))
            solution, _ = nnls(work / scale, times[:, 0])
            self.fitted = [round(x * 1e12) for x in solution / scale]


class Policy(NamedTuple):
    """How batches are formed: the even split, the dynamic program, or PD with a fixed partition."""

    kind: str  # even, dp or pd
    prefills: int = 0  # pd: instances for prompts
    decodes: int = 0

    @classmethod
    def parse(cls, name: str) -> "Policy":
        """`auto` (which is `even`), `even`, `dp` or `pd:PxD`."""
        kind, _, counts = name.partition(":")
        if kind == "pd":
            return cls(kind, *map(int, counts.split("x")))
        return cls("even" if kind == "auto" else kind)


class Batch(NamedTuple):
    """Rows that run together."""

    items: list[tuple[Request, int]]  # how many of each request
    dop: int


class Scheduler:
    """Continuous batching, chunked prefill (§6), stateless. In queue and iteration, who needs the
    fewest rows goes first, but nobody is passed by many (`urgency`). policy: `even` gives every
    instance the same rows, prompt and decode mixed; `dp` is the paper's dynamic program; `pd:PxD`
    keeps P instances for prompts and D for decodes; `auto` is `even`. tbt_slo: ms between tokens,
    kept by fewer prompt rows where that is possible at all."""

    def __init__(self, lake, eos: tuple = (), policy: str = "auto", tbt_slo=None):
        self.lake = lake
        self.balancer = lake.balancer
        self.eos = eos
        self.policy = Policy.parse(policy)
        self.slo = tbt_slo and max(1, int(min(tbt_slo, 1e9) * 1e9))  # ps
        self.predictor = TimePredictor(lake)
        self.waiting: list[Request] = []  # by arrival
        self.running: list[Request] = []  # by admission, the last one last
        self.cached_tokens: dict[int, int] = {}  # by request id, at its first admission
        self.counters: Counter = Counter()
        self._arrived = 0

    def add(self, request):
        if request.order is None:
            self._arrived += 1
            request.order = self._arrived
        insort(self.waiting, request, key=attrgetter("order"))

    def urgency(self, request, done: int) -> int:
        """The lowest goes first: rows to compute, less a part of a chunk per later request."""
        later = self._arrived - (request.order or 0)
        rows_per_arrival = max(1, self.lake.config.chunk_tokens // AGEING)
        return len(request.tokens) - done - later * rows_per_arrival

    def schedule(self) -> tuple[list[list[Run]], list[int]]:
        """Batches for the next iteration and their DoPs, their slots reserved; when all are pinned,
        the last admitted is preempted."""
        self._admit()
        batches = self._batches_within_slo()
        whole = len(batches) == 1 and batches[0].dop == len(self.lake.instances)
        reserved = self._reserve(batches, even=whole)
        if whole:
            return self._split_by_instance(reserved)
        runs = [
            [run for request, _ in batch.items for run in reserved.get(request.id, ())]
            for batch in batches
        ]
        return runs, [batch.dop for batch in batches]

    # ── admission ──

    def _admit(self):
        """Admits the most urgent of the first to come, but for who awaits a prefix in progress."""
        balancer = self.balancer
        most = self.lake.config.max_batch
        if len(self.running) == most:
            return
        promised = sum(map(self._growth, self.running))
        first = [(balancer.match(request), request) for request in self.waiting[:most]]

        def urgency(candidate):
            matched, request = candidate
            return self.urgency(request, matched * balancer.segment_tokens)

        for matched, request in sorted(first, key=urgency):
            if balancer.awaited(request, matched):
                continue
            if len(self.running) == most or not balancer.fits(request, matched, promised):
                break
            balancer.admit(request, matched)
            promised += self._growth(request)
            self.cached_tokens.setdefault(request.id, request.done)
            self.waiting.remove(request)
            self.running.append(request)

    def _growth(self, request) -> int:
        """Slots that it still takes for the rest of its prompt, and a segment of its answer."""
        longer = len(request.tokens) + self.balancer.segment_tokens
        end = min(longer, request.max_tokens - 1)
        return self.balancer.num_segments(end) - request.num_slots

    def _preempt(self):
        """The last admitted starts over: what it published stays, and it will hit it."""
        request = self.running.pop()
        self.balancer.release(request)
        self.counters["preemptions"] += 1
        self.add(request)

    # ── which rows, in which batches ──

    def _batches_within_slo(self) -> list[Batch]:
        """The most prompt rows, in 16ths of a chunk, that keep the SLO while decodes wait, and one
        at least, or prompts would starve. If not even decodes alone keep it, it is dropped."""
        chunk = self.lake.config.chunk_tokens
        batches, time = self._form_batches(chunk)
        decodes_wait = any(request.remaining == 1 for request in self.running)
        if not (self.slo and time > self.slo and decodes_wait):
            return batches
        sizes = [chunk * i // 16 for i in range(17)]

        def misses(rows):
            return self._form_batches(rows)[1] > self.slo

        kept = bisect_left(sizes, True, key=misses)
        if not kept:
            return batches
        return self._form_batches(max(1, sizes[kept - 1]))[0]

    def _form_batches(self, budget: int) -> tuple[list[Batch], int]:
        """Batches with `budget` prompt rows per instance that has any, and the time of the slowest,
        in ps."""
        N = len(self.lake.instances)
        decodes = [(request, 1) for request in self.running if request.remaining == 1]
        own_for_decodes = self.policy.kind == "dp" and N > 1 and bool(decodes)
        for_prompts = self.policy.prefills or N - own_for_decodes
        prompts = self._choose_prompt_rows(budget * for_prompts)
        items = decodes + sorted(prompts, key=lambda item: len(item[0].tokens))
        # [items + 1, 2] rows, and rows × tokens, of the first items.
        ridge = self.lake.ridge
        work = [(rows, max(rows, ridge) * (r.done + rows // 2)) for r, rows in items]
        upto = np.cumsum([(0, 0), *work], 0)
        batches = []
        slowest = 0
        for first, end, dop in self._divide(upto, len(decodes)):
            batches.append(Batch(items[first:end], dop))
            rows, pairs = (upto[end] - upto[first]).tolist()
            slowest = max(slowest, self.predictor.split_time(rows, pairs, dop))
        return batches, slowest

    def _divide(self, upto, num_decodes: int) -> list[BatchRange]:
        """The policy's batches; decodes come first among the items. upto: see `_form_batches`."""
        whole = [BatchRange(0, len(upto) - 1, len(self.lake.instances))]
        if self.policy.kind == "pd":
            decodes = BatchRange(0, num_decodes, self.policy.decodes)
            return [decodes, BatchRange(num_decodes, len(upto) - 1, self.policy.prefills)]
        if self.policy.kind == "dp" and len(self.lake.instances) > 1:
            return self._divide_by_dynamic_program(upto, num_decodes) or whole
        return whole

    def _choose_prompt_rows(self, budget: int) -> list[tuple[Request, int]]:
        """`budget` prompt rows in all, the most urgent requests first."""
        prompts = []
        for request in sorted(self.running, key=lambda r: self.urgency(r, r.done)):
            if request.remaining > 1 and budget > 0:
                rows = min(request.remaining, budget)
                prompts.append((request, rows))
                budget -= rows
        return prompts

    def _divide_by_dynamic_program(
        self, upto, num_decodes: int
    ) -> list[BatchRange] | None:
        """A batch is of one kind, decodes have DoP 1, and prompts a chunk per instance at most."""

        def time(i, dop):
            rows, pairs = (upto[i] - upto[:i]).T
            if i <= num_decodes:
                forbidden = np.full(i, dop > 1)
            else:
                too_wide = rows > dop * self.lake.config.chunk_tokens
                mixed = np.arange(i) < num_decodes
                forbidden = too_wide | mixed
            times = self.predictor.split_time(rows, pairs, dop)
            return np.where(forbidden, FORBIDDEN, times)

        sizes = len(upto) - 1, len(self.lake.instances)
        return dynamic_program(time, *sizes, self.slo) or dynamic_program(time, *sizes)

    # ── slots for them ──

    def _reserve(self, batches: list[Batch], even: bool) -> dict[int, list[Run]]:
        """Runs of the running requests, by request id, in slots of their own. If these run out, the
        last admitted is preempted: never one whose rows are reserved, those are older."""
        rows = {request.id: n for batch in batches for request, n in batch.items}
        most = self._most_rows(sum(rows.values())) if even else UNLIMITED
        planned = [0] * len(self.lake.instances)
        tails = self.balancer.open_tails(self.running)
        reserved: dict[int, list[Run]] = {}
        while len(reserved) < len(self.running):
            request = self.running[len(reserved)]
            own = rows.get(request.id, 0)
            runs = self.balancer.reserve(request, own, planned, tails, most)
            if runs is None:
                self._preempt()
            else:
                reserved[request.id] = runs
        return reserved

    def _most_rows(self, total: int) -> int:
        """Of an instance in the even split: an even share and a little. Small shares keep whole
        segments together, as few rows take as long as a few more."""
        even = -(-total // len(self.lake.instances))
        with_a_segment = min(even + self.lake.config.segment_tokens, FEW_ROWS)
        return max(even + even // EVEN_SLACK, with_a_segment)

    def _split_by_instance(self, reserved: dict[int, list[Run]]):
        """The even split: a batch for each instance, of the rows whose KV will live there."""
        N = len(self.lake.instances)
        batches: list[list[Run]] = [[] for _ in range(N)]
        for run in chain.from_iterable(reserved.values()):
            batches[run.instance].append(run)
        return batches, [1] * N

    # ── afterwards ──

    def update(self, query_plan, tokens: dict[int, int]) -> list[Request]:
        """After the iteration: publishes what is full, appends the sampled tokens (by request id)
        and releases the requests that end. Returns those."""
        self._count(query_plan)
        for run in sorted(query_plan.runs, key=attrgetter("request.id", "position")):
            self.balancer.commit(run.request, run.rows)
        ended = []
        for request in self.running:
            if request.id not in tokens:
                continue
            token = tokens[request.id]
            request.tokens.append(token)
            self.balancer.extend_ids(request)
            if len(request.tokens) == request.max_tokens or token in self.eos:
                self.balancer.release(request)
                ended.append(request)
        self.running = [request for request in self.running if request not in ended]
        return ended

    def _count(self, query_plan):
        for run, local in zip(query_plan.runs, query_plan.local.tolist()):
            put = run.rows * run.puts
            again = min(run.request.peak - run.position, run.rows)
            self.counters.update(
                computed_tokens=run.rows,
                puts=put,
                puts_local=put * local,
                decode_puts=put * run.decode,
                decode_puts_local=put * run.decode * local,
                recomputed_tokens=max(0, again),
            )
