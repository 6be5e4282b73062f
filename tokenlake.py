"""TokenLake: what does a serving engine see of a pooled prefix cache? Seven calls (§3.2, Fig. 5).

    control plane, the same on every rank            data plane, collective over the lake
      get_prefix_tree() → tree                         init_query(batch, group, query_plan) → q_buf
      get_cache_load(reqs, tree) → load                query(q_buf) → out
      gen_plans(batches, DoPs, tree)                   init_transfer(batch, transfer_plan) → kv_buf
          → query_plan, transfer_plan, groups          put(kv_buf)

The engine writes Q and new KV into buffers and never knows where the cache is. Over one instance a
lake never communicates: then it is a conventional, private cache.

Every rank plans for all: with the same trace, clock, time predictor and sampled tokens the same
calls decide the same on each. A digest of the plan and its tokens crosses before the first exchange
of data, and a rank that has another stops all (`pool.hash_plan`).

Where does a query row go? The balancer says where its segment lives, and proposes to compute it
there, or, if that instance has rows enough, where the fewest are. The even split makes a part of
what is proposed for each instance; the other schedulers cut batches by rows. `_assign` decides
which instance computes which part. From there a row travels to all instances that hold *old* KV of
its request, but for those whose KV comes to it instead (`_ship_or_pull`), and to where it meets
*fresh* KV of other instances, written in this iteration (`_meet`).

Notation: N instances · S slots per instance · C tokens per segment · T rows · H query heads ·
Hkv KV heads · D head dim. A table of a plan has an entry for each

    run         rows of a request within one segment: [B]
    part        a batch of DoP k is cut into k; an instance computes one at most, of all batches
    share       all rows that a part has of one request: they read the same old KV, [G]
    instance    [N]
    request     all its shares, of all parts
    replicated  read of a segment that has several replicas: [h]
    bundle      such reads of one segment that are given to one replica together, of about `ridge`
                rows: a replica that fewer read takes as long

Shares stand by part and request. Runs stand by request and position until it is known where they
are computed, from then on by instance, request and position.

A plan by example: two instances of ten slots, C = 4. Request 0 decodes its row 10; request 1 has a
prompt of 9 tokens, of which 4 are cached; request 2 repeats 8 cached tokens, so only its last row
is computed, for its logits, and its KV goes nowhere. Rows and reads are positions in the request:

       run  request  rows  computed  KV goes  reads at 0    reads at 1
         0        0  10           0  slot 1   0–3, 8–9, 10  4–7
         1        1  4–7          0  slot 2   0–3, 4–7      –
         2        1  8            1  slot 11  0–3, 4–7      8
         3        2  7            1  –        0–3           4–7

Slots 0 to 9 are at instance 0. Slot 0 has positions 0–3 of all requests, slot 1 8–9 of request 0,
slot 10 4–7 of requests 0 and 2. Fresh are the rows of runs 0 to 2; run 3 finds its own row in slot
10. So run 0 travels to instance 1, too, and runs 2 and 3 to instance 0. No KV has to move.
"""

from functools import cached_property, partial
from itertools import chain
from operator import attrgetter
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from balancer import (
    BANDWIDTH,
    EXCHANGE_SECONDS,
    FLOPS,
    LINK,
    Balancer,
    PrefixTree,
    Request,
    Run,
)
from cluster import Cluster, LakeError
from kernels import attend_at_once
from pool import HERE, LATE, PULL, PUT, REPLICA, SIBLING, TO_SIBLING
from pool import KVBuffer, LakeConfig, Pool, QueryBuffer
from pool import FreshReads, Moves, OldKV, PulledSegments, QueryPlan, RunTable
from pool import SegmentReads, SlabWrites, TransferPlan, slab_row
from work import Column, ranges, run_lesson, select, starts, starts_in_groups

# What a plan takes of a Run: the first columns of RunTable, then what shares need to know.
RUN_FIELDS = ["request.id", "position", "rows", "slot", "puts", "decode"]
RUN_FIELDS += ["request.done", "request.held_row", "request.num_shared"]



# ── tables of an iteration ───────────────────────────────────────────────────────────────────────


class Shares(NamedTuple):
    """An entry is a share: what a part has of one request. By part and request."""
    part: Column
    first_of_request: Column  # the first run of its request: stands for the request
    first_run: Column  # its own; both in the order by request
    request: Column  # number of its request
    first_share: Column  # [requests] the first share of each
    held_row: Column  # of its request, in Balancer.held
    num_shared: Column  # first segments of its request that others read, too
    rows: Column  # how many
    old_tokens: Column  # of its request in the pool
    is_prompt: Column
    instance: Column | None = None  # that computes it, once it is known

    @property
    def is_first(self) -> Column:
        """[G] whether it is the first share of its request."""
        return self.first_share[self.request] == np.arange(len(self.request))


class OldReads(NamedTuple):
    """Old KV, and where the shares read it."""
    tables: list[Column]  # [G] global slots of the segments of the share's request
    unreplicated: Column  # [G, N] tokens of segments with one slot, read at an instance
    alone: Column  # [requests, N] of these, tokens that no other request reads
    shared: SegmentReads  # and segments that others read
    replicated: SegmentReads  # [h] segments with several replicas, and the slot to read
    candidates: Column  # [h, N] slots of all of their replicas, −1 where there is none
    tokens: Column  # [G, N] that a share reads at an instance, these included


class Pulled(NamedTuple):
    """An entry is a share, and an instance whose old KV comes to it. Also an index into [G, N]."""
    share: Column
    holder: Column


class Attention(NamedTuple):
    """What instances do for rows that meet KV there. A token is read once for all of them."""
    load: Column  # [N] rows × tokens; as `ridge` rows where they are fewer: it takes as long
    tokens: Column  # [N] that are read


class FreshPairs(NamedTuple):
    """An entry is a pair of a request's runs: one reads what the other (or the same one) puts."""
    reader: Column
    writer: Column


class Siblings(NamedTuple):
    """An entry is a run and a share of its request on another instance, to which its KV is sent."""
    share: Column
    writer: Column


class FreshRows(NamedTuple):
    """An entry is a run: where its fresh KV is written, if it puts any."""
    at_home: Column  # first slab row at its home, where it will live
    written: Column  # first slab row where it is computed: at home, or in staging
    staged: Column  # number of rows in staging


class TokenLake:
    """A prefix cache pool over `instances` (ranks of the cluster), for a Llama of a given shape.
    Every rank makes all lakes, in one order, but has a pool only in its own.

    Without a cluster a lake of one instance serves in this process. One of several can only plan:
    the data plane's calls raise LakeError. dtype, device: of the slab, as the model has them."""
    def __init__(
        self,
        instances: list[int],
        llama_config,
        config: LakeConfig = LakeConfig(),
        cluster: Cluster | None = None,
        dtype=torch.float32,
        device="cpu",
    ):
        if not instances or instances != sorted(set(instances)):
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
        # Per row and layer: Q on its way, O in the same type and a wide LSE on the way back.
        self.query_bytes = H * (2 * D * dtype.itemsize + wide)
        # Per token and layer.
        self.kv_bytes = 2 * Hkv * D * dtype.itemsize
        self.exchange_bytes = round(LINK * EXCHANGE_SECONDS)
        self.weight_bytes = llama_config.num_linear_parameters * dtype.itemsize
        # From so many rows on, attention to a token takes longer than reading it, once for all.
        self.ridge = max(1, round(FLOPS / BANDWIDTH * Hkv / H))
        sizes = N, config.slots, config.segment_tokens
        self.balancer = Balancer(*sizes, config.placement, config.replicate_factor)
        groups = []
        if cluster and N > 1:
            count = 1 if config.one_communicator else 2
            groups = cluster.new_groups(instances, torch.device(device), count)
            groups = [groups[0], groups[-1]]
        self.rank = cluster.rank if cluster else instances[0] if N == 1 else None
        # Which of the instances this process is; None: it is none of them.
        self.index = instances.index(self.rank) if self.rank in instances else None
        self._make_pool = partial(
            Pool, cluster, groups, llama_config, config, N, dtype, device
        )
        # Ranks serve: what does not fit shows when they are set up.
        if cluster and self.index is not None:
            self.pool = self._make_pool()

    @cached_property
    def pool(self) -> Pool | None:
        """This process's slab and exchanges; None if it is no instance of the lake. Without a
        cluster the slab is made when it is first asked for: who only plans needs none."""
        return None if self.index is None else self._make_pool()

    def _require_pool(self) -> Pool:
        """Raises LakeError if this process has none."""
        if self.pool is not None:
            return self.pool
        if self.rank is None:
            said = f"instances {self.instances} exchange queries and KV, and the lake has no "
            said += "cluster; TokenLake(…, cluster=…) on every rank, or one instance, is expected"
        else:
            said = f"rank {self.rank} is none of the lake's instances {self.instances}; on these "
            said += "alone the data plane's calls are expected"
        raise LakeError(said)

    # ── the control plane's calls ──

    def get_prefix_tree(self) -> PrefixTree:
        return self.balancer.tree

    def get_cache_load(self, reqs, tree, flops=FLOPS, bandwidth=BANDWIDTH) -> float:
        """The share of the cluster that reading the cache costs for these requests (§6.1), 0 to 1:
        the larger of its memory and compute shares. flops [1/s] and bandwidth [B/s] of an instance.
        Unlike the paper: 4·d·prefix·input FLOPs, KV bytes at true width, both over all layers, and
        a segment that several hit is read once."""
        if not reqs:
            return 0.0
        shape = self.llama_config
        C = self.config.segment_tokens
        tokens = pairs = rows = 0
        hit = {}  # segments that any matches, by id
        for request in reqs:
            self.balancer.extend_ids(request)
            matched = tree.match(request.ids)
            hit.update(dict.fromkeys(request.ids[:matched]))
            length = len(request.tokens)
            new = max(1, length - (request.done or matched * C))
            tokens += length - matched * C
            pairs += (length - new) * new
            rows += new
        tokens += len(hit) * C
        memory = shape.num_layers * self.kv_bytes * tokens
        compute = shape.num_layers * 4.0 * shape.num_heads * shape.head_dim * pairs
        linear = 2.0 * shape.num_linear_parameters * rows
        memory_share = memory / (memory + linear / flops * bandwidth)
        return max(memory_share, compute / (compute + linear))

    def gen_plans(self, batches: list[list[Run]], dops: list[int], tree):
        """Plans of an iteration (§5): batches of runs with their degrees of parallelism → query
        plan, transfer plan, groups (for each batch, the instance of each of its runs).

        The order of decisions: which replica is read, then which instance computes a part, then
        whether a replica that is at hand there is read instead.

        A batch of DoP k is cut into k parts of about equal rows; parts are matched with instances,
        at most one each. To be called once an iteration: it makes replicas and adds to loads.
        LakeError: the DoPs ask for more instances than there are, or the tree is another lake's."""
        self._check(batches, dops, tree)
        # Copies travel layer by layer with the rows: an iteration without rows makes none.
        copies = self.balancer.replicate() if any(batches) else {}
        given = list(chain.from_iterable(batches))
        parts = parts_of_runs(batches, dops)
        # Runs by request and position.
        order, runs, shares = self._tabulate(given, parts)
        tables = [given[i].request.table for i in order[shares.first_run].tolist()]
        # Replicas are chosen first, by load alone: what a part would send depends on them.
        old_reads = self._find_old(runs, shares, tables)
        old_reads = self._choose_replicas(shares, old_reads)
        pulled = self._ship_or_pull(shares, old_reads.tokens)
        instance_of_part = self._assign(runs, shares, old_reads.tokens, pulled, sum(dops))
        groups = [instance_of_part[part].tolist() for part in parts]
        # Only now is it known where a share is computed, and so which replica is at hand there.
        shares = shares._replace(instance=instance_of_part[shares.part])
        old_reads = self._take_replicas_at_hand(shares, old_reads)
        # What is pulled was decided before, too: what is there already does not travel.
        pulled = select(pulled, pulled.holder != shares.instance[pulled.share])
        share_ships = old_reads.tokens > 0
        share_ships[pulled] = False
        share_ships[np.arange(len(share_ships)), shares.instance] = False
        # From here on runs are by instance, request and position.
        by_instance = np.argsort(shares.instance[runs.share], kind="stable")
        pairs = self._pair(runs, by_instance)
        runs = select(runs, by_instance)
        instance = shares.instance[runs.share]
        first_row = starts_in_groups(runs.rows, instance)
        runs = runs._replace(instance=instance, first_row=first_row)
        fresh, transfer_plan = self._plan_fresh(runs, shares, pairs, share_ships, copies)
        attention = self._count_attention(runs, shares, old_reads, pulled, fresh)
        self.balancer.observe(attention.load)
        query_plan = QueryPlan(
            runs=[given[i] for i in order[by_instance].tolist()],
            run_table=runs,
            old=self._plan_old(shares, old_reads, pulled),
            fresh=fresh,
            ships=self._all_ships(runs, share_ships, fresh),
            reads=old_reads.tokens[shares.first_share].sum(0),
            load=attention.load,
            tokens_read=attention.tokens,
            sizes=self.balancer.sizes,
        )
        return query_plan, transfer_plan, groups

    # ── its steps: runs, shares and the old KV that they read ──

    def _check(self, batches, dops, tree):
        if tree is not self.balancer.tree:
            raise LakeError("plans are made with the lake's own prefix tree")
        enough = all(dop > 0 for batch, dop in zip(batches, dops) if batch)
        if not enough or sum(dops) > len(self.instances):
            raise LakeError(
                f"DoPs {dops}: one at least for each batch, no more than instances"
            )

    def _tabulate(self, given, parts):
        """The order of runs by request and position, the runs in this order, and the shares."""
        values = chain.from_iterable(map(attrgetter(*RUN_FIELDS), given))
        columns = np.fromiter(values, np.int64, len(given) * len(RUN_FIELDS))
        columns = columns.reshape(-1, len(RUN_FIELDS)).T
        order = np.lexsort((columns[1], columns[0]))
        *columns, done, held_row, num_shared = columns[:, order].copy()
        part = np.concatenate([order[:0], *parts])[order]
        request_id, _, rows, slot, puts, decode = columns
        first = np.searchsorted(request_id, request_id)  # first run of the same request
        key = part * (len(given) + 1) + first
        _, first_run, share = np.unique(key, return_index=True, return_inverse=True)
        runs = RunTable(*columns, slot // self.config.slots, share)
        share_rows = np.bincount(share, rows, len(first_run)).astype(np.int64)
        _, first_share, request = np.unique(
            first[first_run], return_index=True, return_inverse=True
        )
        shares = Shares(
            part=part[first_run],
            first_of_request=first[first_run],
            first_run=first_run,
            request=request,
            first_share=first_share,
            held_row=held_row[first_run],
            num_shared=num_shared[first_run] * self.config.read_once,
            rows=share_rows,
            # A fully cached prompt (a multiple of C tokens) computes its last row again, for its
            # logits. It puts nothing: its KV is in the pool, though `done` stops before it.
            old_tokens=done[first_run] + (puts[first_run] == 0),
            is_prompt=decode[first_run] == 0,
        )
        return order, runs, shares

    def _find_old(self, runs, shares, tables):
        """Old KV by the tables of the shares' requests. Replicas are not chosen yet."""
        _, S, C = self.balancer.sizes
        counts = self.balancer.num_segments(shares.old_tokens)
        tokens = self.balancer.held[shares.held_row]
        tokens *= C
        # The last old segment may not be full. If so, the request's first run writes on in it.
        missing = counts * C - shares.old_tokens
        tokens[np.arange(len(counts)), runs.home[shares.first_of_request]] -= missing
        # What lies deeper has no replicas.
        listed = np.minimum(counts, self.balancer.deepest_replicated)
        reads = SegmentReads.of(tables, np.maximum(listed, shares.num_shared))
        found, candidates = self.balancer.replicas_of(reads.slot)
        replicated = select(reads, found)
        np.subtract.at(tokens, (replicated.share, replicated.slot // S), C)
        is_shared = reads.segment < shares.num_shared[reads.share]
        is_shared[found] = False
        shared = select(reads, is_shared)
        alone = tokens[shares.first_share]
        of_first = select(shared, shares.is_first[shared.share])
        request = shares.request[of_first.share]
        np.subtract.at(alone, (request, of_first.slot // S), C)
        # No replica is chosen yet: `tokens` lacks them until `_read_in`.
        return OldReads(tables, tokens, alone, shared, replicated, candidates, tokens)

    def _read_in(self, old, slots):
        """Old KV, with the replicated segments read in these slots: [h]."""
        if not len(slots):
            return old
        _, S, C = self.balancer.sizes
        replicated = old.replicated._replace(slot=slots)
        tokens = old.unreplicated.copy()
        np.add.at(tokens, (replicated.share, slots // S), C)
        return old._replace(replicated=replicated, tokens=tokens)

    def _choose_replicas(self, shares, old):
        """Replicas of segments with several, by the load so far and all other reads (§4.4). Rows
        that read a segment choose in bundles of about `ridge`: fewer take as long."""
        reads = old.replicated
        if not len(reads.slot):
            return old
        no_pulls = Pulled(*np.zeros((2, 0), np.int64))
        others = self._count_old(shares, old.alone, old.shared, no_pulls)
        load = self.balancer.load + others.load
        rows = shares.rows[reads.share]
        bundle = first = np.arange(len(rows))
        if self.config.read_once:
            bundle, first = self._bundle(reads.slot, rows)
        cost = self.weigh(np.bincount(bundle, rows).astype(np.int64))
        cost *= self.config.segment_tokens
        slots = self.balancer.choose_replicas(old.candidates[first], cost, load)
        return self._read_in(old, slots[bundle])

    def _bundle(self, slot, rows):
        """Reads of the same segment, by the slot of its first replica, in as many bundles of about
        equal rows as have `ridge` rows each, one at least: [reads] the bundle of each, and
        [bundles] a read of each."""
        order = np.argsort(slot, kind="stable")
        slot = slot[order]
        rows = rows[order]
        first = np.searchsorted(slot, slot)
        total = np.bincount(first, rows).astype(np.int64)[first]
        count = np.maximum(1, total // self.ridge)
        begins = starts_in_groups(rows, slot)
        number = first * (1 + rows.sum()) + begins * count // total
        _, first_read, bundle = np.unique(number, return_index=True, return_inverse=True)
        of_read = np.zeros_like(bundle)
        of_read[order] = bundle
        return of_read, order[first_read]

    def _ship_or_pull(self, shares, tokens):
        """A decode ships its row. A prompt's share pulls what a holder has for it, if that is fewer
        bytes than its queries and results (so seldom with one row). An instance pulls `pull_tokens`
        at most, divided evenly among the prompts of its part."""
        prompts = np.flatnonzero(shares.is_prompt)
        part = shares.part[prompts]
        room = self.config.pull_tokens // np.maximum(1, np.bincount(part))[part]
        wanted = tokens[prompts]
        ship_bytes = shares.rows[prompts] * self.query_bytes
        cheaper = (wanted > 0) & (wanted * self.kv_bytes < ship_bytes[:, None])
        in_buffer = np.cumsum(wanted * cheaper, 1)
        prompt, holder = np.nonzero(cheaper & (in_buffer <= room[:, None]))
        return Pulled(prompts[prompt], holder)

    def _assign(self, runs, shares, tokens, pulled, num_parts):
        """[parts] the instance of each (§5), matched so that the fewest bytes travel: all that a
        part exchanges with holders and homes, less what it does with its own instance. Fresh KV
        between parts of a prompt depends on pairs of parts, and is left out."""
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
        # If part i has only rows whose KV will live at instance i (the even split, if all runs
        # stayed at home), no `put` is needed. Any other assignment adds that exchange in each
        # layer: it has to save more bytes than cross a link while the smallest exchange lasts.
        if num_parts == N and not (runs.puts * (runs.home != part)).any():
            own = np.arange(N)
            saved = cost[own, own].sum() - cost[own, best].sum()
            if saved <= self.exchange_bytes:
                return own
        return best

    def _take_replicas_at_hand(self, shares, old):
        """Where the instance that computes shares has a replica, they read that, and nothing
        travels: if it is read anyway, or by `ridge` rows of theirs, so that no segment is read once
        more for a few rows. (When parts are assigned this is not counted on: to do so saved
        1 to 7 % of the bytes with the dynamic program and PD, none with the even split, and cost a
        third of the planning time.)"""
        reads = old.replicated
        number = np.arange(len(reads.share))
        at_hand = old.candidates[number, shares.instance[reads.share]]
        slots, there = np.unique(at_hand, return_inverse=True)
        rows = np.bincount(there, shares.rows[reads.share])
        enough = self.ridge if self.config.read_once else 1
        pays = (rows >= enough) | np.isin(slots, reads.slot)
        taken = (at_hand >= 0) & pays[there]
        return self._read_in(old, np.where(taken, at_hand, reads.slot))

    def _plan_old(self, shares, old, pulled):
        """What travels of old KV to the shares that pull it."""
        _, S, C = self.balancer.sizes
        pulls = np.zeros(old.tokens.shape, bool)
        pulls[pulled] = True
        num_segments = self.balancer.num_segments(shares.old_tokens)
        counts = np.where(pulls.any(1), num_segments, 0)
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

    def _pair(self, runs, by_instance):
        """Who reads fresh KV: a run reads what the runs of its request put, from the first one up
        to itself. Takes runs by request, numbers them by instance."""
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
        fresh_rows = self._place_fresh(runs)
        siblings, sibling = self._choose_siblings(runs, shares, pairs, ships)
        moves = self._move(runs, shares, fresh_rows, siblings, copies)
        fresh = self._meet(runs, pairs, fresh_rows, sibling, moves)
        writes = SlabWrites(runs.instance, runs.first_row, fresh_rows.written, runs.rows)
        writes = select(writes, runs.puts > 0)
        return fresh, TransferPlan(writes, moves, len(self.instances))

    def _place_fresh(self, runs):
        """New KV is written at home if that is here, else in staging, behind the slots."""
        _, S, C = self.balancer.sizes
        at_home = slab_row(runs.slot, S, C) + runs.position % C
        staged = runs.rows * runs.puts * (runs.home != runs.instance)
        in_staging = S * C + starts_in_groups(staged, runs.instance)
        return FreshRows(at_home, np.where(staged > 0, in_staging, at_home), staged)

    def _choose_siblings(self, runs, shares, pairs, ships):
        """Fresh KV that neither is computed nor will live where its reader is: who travels?

        Either the reader's rows go to the KV's home (it is put there anyway), or the instance that
        computes it sends it to the reader's share, too: as a sibling's. That is decided for all
        that a share would read at one home, since rows that go there for one run find the others.
        It is sent if it is fewer bytes than the share's queries and results, unless its rows go to
        that home for old KV anyway. → Siblings, and of each pair the entry there that brings its
        KV: [pairs], −1 where none does."""
        reader, writer = pairs
        N = len(self.instances)
        B = len(runs.rows)
        far = runs.instance[reader] != runs.instance[writer]
        away = np.flatnonzero(far & (runs.instance[reader] != runs.home[writer]))
        # Pairs whose KV would come together: of the same writer, to the same share.
        key = runs.share[reader[away]] * B + writer[away]
        deliveries, delivery_of_pair = np.unique(key, return_inverse=True)
        share, sender = np.divmod(deliveries, B)
        # What a share would otherwise read at one home is sent together, or not at all.
        home = runs.home[sender]
        trips, trip = np.unique(share * N + home, return_inverse=True)
        tokens = np.bincount(trip, runs.rows[sender], len(trips)).astype(np.int64)[trip]
        cheaper = tokens * self.kv_bytes < shares.rows[share] * self.query_bytes
        # (Only prompts have such pairs: a decode reads no fresh KV but its own.)
        comes = cheaper & ~ships[share, home]
        sibling = np.full(len(reader), -1)
        number = np.where(comes, np.cumsum(comes) - 1, -1)  # among those that come
        sibling[away] = number[delivery_of_pair]
        return Siblings(share[comes], sender[comes]), sibling

    def _move(self, runs, shares, fresh_rows, siblings, copies):
        """Fresh KV to siblings, new KV to its home, and copies. Siblings come first: so the n-th of
        them is the n-th move, and `_meet` finds where it lies in the receive buffer."""
        _, S, C = self.balancer.sizes
        written = fresh_rows.written
        sibling = select(runs, siblings.writer)
        sibling_row = written[siblings.writer]
        reader = shares.instance[siblings.share]
        staged = np.flatnonzero(fresh_rows.staged)
        new = select(runs, staged)
        home_row = fresh_rows.at_home[staged]
        pairs_of_slots = np.array([*copies.items()], np.int64)
        filled, copied = pairs_of_slots.reshape(-1, 2).T
        filled_row = slab_row(filled, S, C)
        copied_row = slab_row(copied, S, C)
        return Moves.of(
            (TO_SIBLING, sibling.instance, sibling_row, reader, -1, sibling.rows),
            (PUT, new.instance, written[staged], new.home, home_row, new.rows),
            (REPLICA, copied // S, copied_row, filled // S, filled_row, C),
        )

    def _meet(self, runs, pairs, fresh_rows, sibling, moves):
        """FreshReads: where each reader meets what it reads, and where that lies.

        both on one instance           there: HERE, in its slot or in staging
        KV was sent to the reader      at the reader: SIBLING
        else                           at the KV's home: HERE if it was computed there, else LATE"""
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

    def _all_ships(self, runs, share_ships, fresh):
        """[B, N] whether a run's rows travel somewhere: to the old or to the fresh KV there."""
        ships = share_ships[runs.share]
        away = (fresh.place != SIBLING) & (fresh.instance != runs.instance[fresh.reader])
        ships[fresh.reader[away], fresh.instance[away]] = True
        return ships

    def weigh(self, rows):
        """Rows that meet a token, as many as they weigh: `ridge` at least, as it is read for one
        row as for many; none where there are none."""
        return np.where(rows > 0, np.maximum(rows, self.ridge), 0)

    def list_shared(self, requests) -> tuple[Column, SegmentReads]:
        """[n] how many segments of each running request others read, too, and all of these, with
        its index in place of a share."""
        num_shared = np.array([request.num_shared for request in requests], np.int64)
        num_shared *= self.config.read_once
        tables = [request.table for request in requests]
        return num_shared, SegmentReads.of(tables, num_shared)

    def _count_attention(self, runs, shares, old, pulled, fresh):
        """Attention of the iteration, to old KV and fresh."""
        N = len(self.instances)
        listed = SegmentReads(*map(np.concatenate, zip(old.shared, old.replicated)))
        load, tokens = self._count_old(shares, old.alone, listed, pulled)
        # What is pulled is read where it comes, by the share that pulls it alone.
        came = old.tokens[pulled]
        target = shares.instance[pulled.share]
        np.add.at(load, target, self.weigh(shares.rows[pulled.share]) * came)
        np.add.at(tokens, target, came)
        fresh_pairs = runs.rows[fresh.reader] * runs.rows[fresh.writer]
        np.add.at(load, fresh.instance, fresh_pairs)
        writer, instance = np.divmod(np.unique(fresh.writer * N + fresh.instance), N)
        np.add.at(tokens, instance, runs.rows[writer])
        return Attention(load, tokens)

    def _count_old(self, shares, alone, listed, pulled):
        """Attention to old KV where it lives, but for what is pulled. alone: see OldReads; listed:
        what several requests read, or shares in different slots."""
        N, S, C = self.balancer.sizes
        # [requests, N or 1 if they are the same everywhere] rows that read there.
        rows = np.bincount(shares.request, shares.rows).astype(np.int64)[:, None]
        if len(pulled.share):
            rows = np.repeat(rows, N, 1)
            pair = shares.request[pulled.share], pulled.holder
            np.subtract.at(rows, pair, shares.rows[pulled.share])
            pulls = np.zeros((len(shares.rows), N), bool)
            pulls[pulled] = True
            listed = select(listed, ~pulls[listed.share, listed.slot // S])
        load = (self.weigh(rows) * alone).sum(0)
        read = ((rows > 0) * alone).sum(0)
        slot = listed.slot
        rows = shares.rows[listed.share]
        if self.config.read_once:
            rows_of_slot = np.bincount(slot, rows)
            slot = np.flatnonzero(rows_of_slot > 0)
            rows = rows_of_slot[slot].astype(np.int64)
        np.add.at(load, slot // S, C * self.weigh(rows))
        np.add.at(read, slot // S, C)
        return Attention(load, read)

    def features(self, query_plan, transfer_plan) -> Column:
        """[N, 3] what each instance does in an iteration: rows it computes, its attention (see
        QueryPlan.load), KiB that it sends or receives, the larger (results count the way their
        queries go)."""
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
        """The buffer for Q of the rows that this instance computes: those of `batch` for which
        `group` names it. One per iteration; `q_buf.write(layer, q [T, H, D])`."""
        q_buf = QueryBuffer(query_plan, self.index, self._require_pool())
        rows = [run.rows for run, instance in zip(batch, group) if instance == self.index]
        if sum(rows) != q_buf.num_rows:
            said = f"instance {self.index} was handed another batch than is planned"
            raise LakeError(said)
        return q_buf

    def query(self, q_buf):
        """Attention of the buffer's rows over prefix and new KV → [T, H, D]. Every instance of the
        lake calls it for every layer, with or without rows, after `put`."""
        return self._require_pool().query(q_buf)

    def init_transfer(self, batch: list[Run], transfer_plan) -> KVBuffer:
        """The buffer for new K and V of the rows that this instance computes: `kv_buf.write(layer,
        kv)`, [T, 2, Hkv, D]. (`batch` is the paper's; here the plan says which are put.)"""
        pool = self._require_pool()
        return KVBuffer(transfer_plan, self.index, pool.num_rows, pool.device)

    def put(self, kv_buf):
        """Writes the layer's new KV to its homes: here at once, elsewhere in the `query` after."""
        self._require_pool().put(kv_buf)


def parts_of_runs(batches: list[list[Run]], dops: list[int]) -> list[Column]:
    """The part of each run, by batch. One of DoP k is cut into k parts of about equal rows: a run
    falls into the part in which its first row does."""
    parts = []
    first = 0
    for batch, dop in zip(batches, dops):
        rows = np.array([run.rows for run in batch], np.int64)
        parts.append(first + starts(rows) * dop // max(1, rows.sum()))
        first += dop
    return parts


# ── the lesson, run ──────────────────────────────────────────────────────────────────────────────


def show_calls(shape):
    """The seven calls for two requests, one after the other, with random Q and KV."""
    lake = TokenLake([0], shape, LakeConfig(segment_tokens=4, slots=8))
    torch.manual_seed(0)
    print(
        "A lake of one instance, segments of 4 tokens; 1 layer, 2 heads of 8, 1 KV head."
    )
    kv = torch.zeros(0, 2, 1, 8)
    for id, tokens in enumerate([[11, 12, 13, 14, 15, 16], [11, 12, 13, 14, 19]]):
        print(f"\nrequest {id}: tokens {tokens}")
        request = Request(id, tokens, len(tokens) + 1)
        tree = lake.get_prefix_tree()
        tell("get_prefix_tree()", f"published segments: {len(tree.segments)}")
        load = lake.get_cache_load([request], tree)
        what = "share of the cluster's time that reading cache takes"
        tell("get_cache_load([request], tree)", f"{what}: {load:.2f} (§6.1)")
        lake.balancer.admit(request, lake.balancer.match(request))
        # Random ones for the rows to compute, behind those that hit.
        kv = torch.cat((kv[: request.done], torch.randn(request.remaining, 2, 1, 8)))
        show_iteration(lake, request, kv, torch.randn(request.remaining, 2, 8))
        lake.balancer.release(request)


def show_iteration(lake, request, kv, q):
    """All rows of a request that are not in the pool: q [T, H, D]. kv has the others, too."""
    first = request.done
    batch = lake.balancer.reserve(request, request.remaining)
    plan, transfer_plan, [group] = lake.gen_plans([batch], [1], lake.get_prefix_tree())
    runs = [f"{run.rows} at position {run.position} → slot {run.slot}" for run in batch]
    reads = f"old tokens to read: {plan.reads.sum()}"
    tell("gen_plans([batch], [1], tree)", f"rows: {', '.join(runs)}; {reads}")
    q_buf = lake.init_query(batch, group, plan)
    tell("init_query(batch, group, plan)", f"room for Q, rows: {q_buf.num_rows}")
    kv_buf = lake.init_transfer(batch, transfer_plan)
    slab_rows = kv_buf.slab_rows.tolist()
    tell("init_transfer(batch, plan)", f"room for their KV; slab rows {slab_rows}")
    kv_buf.write(0, kv[first:])
    lake.put(kv_buf)
    tell("put(kv_buf)", f"KV {[*kv[first:].shape]} is written there")
    q_buf.write(0, q)
    o = lake.query(q_buf)
    all_o, _ = attend_at_once(q, kv, torch.arange(first, len(kv)))
    apart = (o - all_o).abs().max()
    shapes = f"Q {[*q.shape]} → O {[*o.shape]}"
    tell("query(q_buf)", f"{shapes}, {apart:.0e} from the softmax over all keys")
    lake.balancer.commit(request, request.remaining)


def show_plan(shape):
    """Two instances, planned only: what travels in the example of the docstring."""
    plan, transfer_plan, _ = plan_example(shape)
    reads = plan.segment_reads
    print("\nA plan for two instances, of slots 0 to 9 and 10 to 19: the example of the docstring.")
    print("run  request  rows  computed at  its KV goes to  reads old KV in slots  travels to")
    for number, run in enumerate(plan.runs):
        last = run.position + run.rows - 1
        rows = f"{run.position}–{last}" if run.rows > 1 else last
        instance = plan.run_table.instance[number]
        goes = f"slot {run.slot}" if run.puts else "–"
        slots = reads.slot[reads.share == plan.run_table.share[number]]
        slots = ", ".join(map(str, slots))
        targets = ", ".join(map(str, np.flatnonzero(plan.ships[number]))) or "–"
        print(
            f"{number:>3}  {run.request.id:>7}  {rows:>4}  {instance:>11}  {goes:<14}  {slots:<21}"
            f"  {targets}"
        )
    moved = plan.old.pulls.rows.sum() + transfer_plan.moves.rows.sum()
    print(f"Rows that travel: {plan.rows_shipped().sum()}. Tokens whose KV does: {moved}.")
    said = "scheduler.py, which rows run; bench/example.py, the same calls for a model"
    print(f"\nNext: {said}.")


def plan_example(shape):
    """Three requests whose prompts begin alike; the second and third come when the first one's
    prompt has been computed. Each row is computed where its KV will live."""
    lake = TokenLake([0, 1], shape, LakeConfig(segment_tokens=4, slots=10))

    def admit(id, tokens):
        request = Request(id, tokens, len(tokens) + 4)
        lake.balancer.admit(request, lake.balancer.match(request))
        return request

    def plan_all(*requests):
        planned = [0, 0]
        runs = [lake.balancer.reserve(r, r.remaining, planned) for r in requests]
        runs = list(chain.from_iterable(runs))
        batches = [[run for run in runs if run.preferred == i] for i in (0, 1)]
        return lake.gen_plans(batches, [1, 1], lake.get_prefix_tree())

    prompt = list(range(10, 20))
    first = admit(0, prompt[:])
    plan_all(first)
    lake.balancer.commit(first, first.remaining)
    first.tokens.append(7)
    return plan_all(first, admit(1, [*prompt[:4], 1, 2, 3, 4, 5]), admit(2, prompt[:8]))


def tell(call, gives):
    print(f"  {call:<33}{gives}")


if __name__ == "__main__":
    # Of a model with one layer.
    shape = SimpleNamespace(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    shape.num_linear_parameters = 1000
    run_lesson(show_calls, shape)
    run_lesson(show_plan, shape)
