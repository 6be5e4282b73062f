"""Which rows run in the next iteration, and when may it be planned? (§6)

Continuous batching with chunked prefill. No request is bound to an instance: any row can run
anywhere. By default (the *even split*) the scheduler takes the balancer's proposal for each, near
its segment and about as many rows for every instance, decode and prefill mixed; rows of one prompt
on k instances are sequence parallelism. The paper's dynamic program over batches and degrees of
parallelism (DoP) and fixed PD are here to compare: as all ranks wait for the slowest in each layer,
the even split wins.

May the next iteration be planned before the tokens of this one are known? A plan depends on how
many tokens there are, not on which. Lengths are known when an iteration begins. A segment that it
fills consists of its inputs, which are known, too; and what it writes is written before the next
one reads it. So `advance` goes as far as that, the next plan is made while the device computes, and
`fill` has the tokens when they come. Only an end token comes too late: its request has a row too
many in the next plan, which is computed and dropped.
"""

from bisect import bisect_left, insort
from collections import Counter
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from balancer import (
    FORBIDDEN,
    UNLIMITED,
    BatchRange,
    Request,
    TimePredictor,
    dynamic_program,
)
from pool import EVEN_SLACK

UNKNOWN = -1  # in place of a token that is not known yet
# Fewer rows take no less time, as the weights have to be read: FLOPS / BANDWIDTH is 153 rows with
# two bytes a weight, and a power of two is near enough.
FEW_ROWS = 128
# A request seems a sixteenth of a chunk shorter for each that came after it. In overload 86 % then
# keep their SLO; 67 % with a quarter; 89 % with a 64th, but some wait longer (bench/NOTES.md).
AGEING = 16


class Policy(NamedTuple):
    """How batches are formed: the even split, the dynamic program, or PD with a fixed partition."""
    kind: str  # even, dp or pd
    prefills: int = 0  # pd: instances for prompts
    decodes: int = 0

    @classmethod
    def parse(cls, name) -> "Policy":
        """`auto` (which is `even`), `even`, `dp` or `pd:PxD`."""
        kind, _, counts = name.partition(":")
        if kind == "pd":
            return cls(kind, *map(int, counts.split("x")))
        return cls("even" if kind == "auto" else kind)


class Batch(NamedTuple):
    """Requests that run together, in the scheduler's words."""
    items: list[tuple[Request, int]]  # and how many rows of each
    dop: int
    work: tuple  # of each of its instances, as TimePredictor.split has it


class Scheduler:
    """Continuous batching, chunked prefill (§6). In the queue and in an iteration, the request that
    needs the fewest rows goes first, but each that comes after it makes it seem shorter. policy:
    `even` gives every instance the same rows, prompt and decode mixed; `dp` is the paper's dynamic
    program; `pd:PxD` keeps P instances for prompts and D for decodes; `auto` is `even`. tbt_slo: ms
    between tokens, kept by fewer prompt rows where that is possible at all."""
    def __init__(self, lake, eos: tuple = (), policy="auto", tbt_slo=None):
        self.lake = lake
        self.balancer = lake.balancer
        self.eos = eos
        self.policy = Policy.parse(policy)
        self.slo = tbt_slo and max(1, int(min(tbt_slo, 1e9) * 1e9))  # ps
        self.predictor = TimePredictor(lake)
        self.waiting = []  # requests by arrival
        self.running = []  # requests by admission, the last one last
        self.cached_tokens = {}  # by request id, at its first admission
        self.counters = Counter()
        self._arrived = 0
        self._sampling = []  # whose tokens are not known yet
        self.ending = []  # ended by an end token, not released yet
        self.preempted = []  # request ids, by the last `schedule`

    def add(self, request):
        if request.order is None:
            self._arrived += 1
            request.order = self._arrived
        insort(self.waiting, request, key=attrgetter("order"))

    def patience(self, request, done) -> int:
        """Who has least goes first: rows to compute, less some for each request that came later."""
        later = self._arrived - (request.order or 0)
        rows_per_arrival = max(1, self.lake.config.chunk_tokens // AGEING)
        return len(request.tokens) - done - later * rows_per_arrival

    def schedule(self):
        """Batches of runs for the next iteration, and their DoPs. Their slots are reserved; if all
        slots are pinned, the last admitted requests are preempted."""
        self.preempted = []
        self._admit()
        batches = self._batches_within_slo()
        # Predictions are corrected by iterations that the SLO limits: prompts, while decodes wait.
        kinds = {request.remaining == 1 for batch in batches for request, _ in batch.items}
        self.predictor.expect([b.work for b in batches] if len(kinds) > 1 else [])
        # One batch over all instances is not left to gen_plans to cut, but cut by `preferred`:
        # the even split.
        even = len(batches) == 1 and batches[0].dop == len(self.lake.instances)
        reserved = self._reserve(batches, even)
        if even:
            return self._split_by_instance(reserved)
        runs = [
            [run for request, _ in batch.items for run in reserved.get(request.id, ())]
            for batch in batches
        ]
        return runs, [batch.dop for batch in batches]

    # ── admission ──

    def _admit(self):
        """Of the first max_batch that wait, admits who has least patience, while there is room.
        One whose next segment is being prefilled by another waits for that, and is passed."""
        balancer = self.balancer
        most = self.lake.config.max_batch
        if len(self.running) == most:
            return
        promised = sum(map(self._growth, self.running))
        first = [(balancer.match(request), request) for request in self.waiting[:most]]

        def by_patience(candidate):
            matched, request = candidate
            return self.patience(request, matched * balancer.segment_tokens)

        for matched, request in sorted(first, key=by_patience):
            if balancer.awaited(request, matched):
                continue
            if len(self.running) == most or not balancer.fits(request, matched, promised):
                break
            balancer.admit(request, matched)
            promised += self._growth(request)
            self.cached_tokens.setdefault(request.id, request.done)
            self.waiting.remove(request)
            self.running.append(request)

    def _growth(self, request):
        """Slots that a request still takes for the rest of its prompt, and a segment of its answer.
        Its last token takes none: it is never fed to the model."""
        longer = len(request.tokens) + self.balancer.segment_tokens
        end = min(longer, request.max_tokens - 1)
        return self.balancer.num_segments(end) - request.num_slots

    def _preempt(self):
        """The last admitted request starts over, and hits what it published."""
        request = self.running.pop()
        self.balancer.release(request)
        self.counters["preemptions"] += 1
        self.preempted.append(request.id)
        self.add(request)

    # ── which rows, in which batches ──

    def _batches_within_slo(self):
        """Batches with the most prompt rows, in sixteenths of a chunk, with which the slowest keeps
        the SLO while decodes wait; with one at least, or prompts would starve. If not even decodes
        alone keep it, the SLO is dropped for this iteration."""
        chunk = self.lake.config.chunk_tokens
        shared = self.lake.list_shared(self.running)
        batches, time = self._form_batches(chunk, shared)
        decodes_wait = any(request.remaining == 1 for request in self.running)
        if not (self.slo and time > self.slo and decodes_wait):
            return batches
        sizes = [chunk * i // 16 for i in range(17)]

        def misses(rows):
            return self._form_batches(rows, shared)[1] > self.slo

        kept = bisect_left(sizes, True, key=misses)
        if not kept:
            return batches
        return self._form_batches(max(1, sizes[kept - 1]), shared)[0]

    def _form_batches(self, budget, shared):
        """Batches with `budget` prompt rows per instance that has any, and the slowest one's ps.
        shared: TokenLake.list_shared of the running requests."""
        N = len(self.lake.instances)
        # What needs one row runs as a decode does, also a prompt of which one is left. (In a plan
        # that is none: see Request.decoding.)
        decodes = [(request, 1) for request in self.running if request.remaining == 1]
        own_for_decodes = self.policy.kind == "dp" and N > 1 and bool(decodes)
        for_prompts = self.policy.prefills or N - own_for_decodes
        prompts = self._choose_prompt_rows(budget * for_prompts)
        items = decodes + sorted(prompts, key=lambda item: len(item[0].tokens))
        pairs = self._weigh_attention(items, *shared)
        # [items + 1, 2] sums over the first items: rows, and rows × tokens that one sees on
        # average.
        upto = np.cumsum([(0, 0), *zip((rows for _, rows in items), pairs)], 0)
        batches = []
        slowest = 0
        for first, end, dop in self._divide(upto, len(decodes)):
            rows, pairs = (upto[end] - upto[first]).tolist()
            work = self.predictor.split(rows, pairs, dop)
            batches.append(Batch(items[first:end], dop, work))
            slowest = max(slowest, self.predictor.longest_time(*work))
        return batches, slowest

    def _weigh_attention(self, items, num_shared, reads) -> list[int]:
        """Of each item: rows × tokens that one sees on average. The cost of a segment that several
        read, once for all, is divided among them by their rows. num_shared [running requests],
        reads: see TokenLake.list_shared."""
        lake = self.lake
        C = lake.config.segment_tokens
        number_of = {request.id: number for number, request in enumerate(self.running)}
        number = np.array([number_of[request.id] for request, _ in items], np.int64)
        rows = np.zeros(len(self.running), np.int64)
        rows[number] = [n for _, n in items]
        done = np.array([request.done for request in self.running], np.int64)
        alone = np.maximum(done - C * num_shared, 0) + rows // 2
        own_rows = rows[reads.share]
        together = np.bincount(reads.slot, own_rows).astype(np.int64)[reads.slot]
        borne = C * lake.weigh(together) * own_rows // np.maximum(together, 1)
        borne = np.bincount(reads.share, borne, len(rows)).astype(np.int64)
        return (lake.weigh(rows) * alone + borne)[number].tolist()

    def _divide(self, upto, num_decodes):
        """The policy's batches; decodes come first among the items. upto: see `_form_batches`."""
        whole = [BatchRange(0, len(upto) - 1, len(self.lake.instances))]
        if self.policy.kind == "pd":
            decodes = BatchRange(0, num_decodes, self.policy.decodes)
            return [decodes, BatchRange(num_decodes, len(upto) - 1, self.policy.prefills)]
        if self.policy.kind == "dp" and len(self.lake.instances) > 1:
            return self._divide_by_dynamic_program(upto, num_decodes) or whole
        return whole

    def _choose_prompt_rows(self, budget):
        """`budget` prompt rows in all, the most urgent requests first."""
        prompts = []
        for request in sorted(self.running, key=lambda r: self.patience(r, r.done)):
            if request.remaining > 1 and budget > 0:
                rows = min(request.remaining, budget)
                prompts.append((request, rows))
                budget -= rows
        return prompts

    def _divide_by_dynamic_program(self, upto, num_decodes):
        """A batch is of one kind, decodes have DoP 1, and prompts a chunk per instance at most."""

        def time(i, dop):
            rows, pairs = (upto[i] - upto[:i]).T
            if i <= num_decodes:
                forbidden = np.full(i, dop > 1)
            else:
                too_wide = rows > dop * self.lake.config.chunk_tokens
                mixed = np.arange(i) < num_decodes
                forbidden = too_wide | mixed
            times = self.predictor.longest_time(*self.predictor.split(rows, pairs, dop))
            return np.where(forbidden, FORBIDDEN, times)

        # If nothing keeps the SLO, it is dropped (§6.2).
        sizes = len(upto) - 1, len(self.lake.instances)
        return dynamic_program(time, *sizes, self.slo) or dynamic_program(time, *sizes)

    # ── slots for them ──

    def _reserve(self, batches, even):
        """Runs of the running requests, by request id, and slots for them, the first admitted
        first. If slots run out, the last admitted is preempted: it has none of these yet."""
        rows = {request.id: n for batch in batches for request, n in batch.items}
        most = self._most_rows(sum(rows.values())) if even else UNLIMITED
        planned = [0] * len(self.lake.instances)
        tails = self.balancer.open_tails(self.running)
        reserved = {}
        while len(reserved) < len(self.running):
            request = self.running[len(reserved)]
            own = rows.get(request.id, 0)
            runs = self.balancer.reserve(request, own, planned, tails, most)
            if runs is None:
                self._preempt()
            else:
                reserved[request.id] = runs
        return reserved

    def _most_rows(self, total):
        """The most rows that an instance may have in the even split: an even share and a sixteenth,
        or an even share and a segment, but FEW_ROWS at most: up to there more rows take no
        longer. (LakeConfig.staging allows for both.)"""
        even = -(-total // len(self.lake.instances))
        with_a_segment = min(even + self.lake.config.segment_tokens, FEW_ROWS)
        return max(even + even // EVEN_SLACK, with_a_segment)

    def _split_by_instance(self, reserved):
        """The even split: a batch for each instance, of the runs that are preferred there."""
        N = len(self.lake.instances)
        batches = [[] for _ in range(N)]
        for run in chain.from_iterable(reserved.values()):
            batches[run.preferred].append(run)
        return batches, [1] * N

    # ── afterwards ──

    def update(self, query_plan, tokens: dict[int, int]) -> list[Request]:
        """After the iteration, with the sampled tokens by request id: `advance`, then `fill`, and
        those that end are released. Returns them."""
        self.advance(query_plan, tokens)
        ended = self.fill(tokens)
        self._release_ending()
        return ended

    def advance(self, query_plan, sampling):
        """What is known of an iteration before its tokens are: publishes what it fills, makes room
        for the tokens of the requests that sample (their ids), and releases those whose last one
        comes. Then the next may be planned: plans depend on how many tokens there are, not on
        which."""
        self._count(query_plan)
        for run in sorted(query_plan.runs, key=attrgetter("request.id", "position")):
            if run.request not in self.ending:
                self.balancer.commit(run.request, run.rows)
        self._release_ending()
        self._sampling = [request for request in self.running if request.id in sampling]
        for request in self._sampling:
            request.tokens.append(UNKNOWN)
            if len(request.tokens) == request.max_tokens:
                self._release(request)

    def fill(self, tokens: dict[int, int]) -> list[Request]:
        """The tokens that `advance` made room for, by request id. Returns the requests that have
        ended. One that ends early, by an end token, may have rows in the next plan: it is released
        when that has been computed, and what it gives is dropped."""
        ended = []
        for request in self._sampling:
            token = request.tokens[-1] = tokens[request.id]
            self.balancer.extend_ids(request)
            is_last = len(request.tokens) == request.max_tokens
            if is_last or token in self.eos:
                ended.append(request)
            if token in self.eos and not is_last:
                if request in self.waiting:  # the next plan has preempted it
                    self.waiting.remove(request)
                else:
                    self.ending.append(request)
        self._sampling = []
        return ended

    def _release(self, request):
        self.balancer.release(request)
        self.running.remove(request)

    def _release_ending(self):
        for request in self.ending:
            self._release(request)
        self.ending = []

    def _count(self, query_plan):
        """Adds the plan to the counters. `again`: rows computed once before a preemption."""
        for run, local in zip(query_plan.runs, query_plan.local.tolist()):
            if run.request in self.ending:
                self.counters["dropped_rows"] += run.rows
                continue
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


if __name__ == "__main__":
    print(__doc__)
