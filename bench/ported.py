"""How does an engine with paged KV join a lake? A toy engine: its own memory, its own exchanges.

    python bench/ported.py
    python bench/ported.py --ranks 3

PORTING.md says what an engine gives up. Here it is done:

    gives up      block allocator and prefix cache    ─▶  Balancer
                  who computes which rows             ─▶  TokenLake.gen_plans
                  attention                           ─▶  Work, partial_attention, merge
    keeps         scheduler, model, sampling, and KV in pages (`PagedCache`)
    writes anew   the exchanges of a layer (`PagedAttention`), in place of our Pool and its buffers

The balancer gives out slots, and a slot has room for a segment. Here two pages make a slot. They
lie anywhere, and elsewhere on each rank, since nobody else has to know where:

    slot of the plan       0        1        2     staging       row 53 of the plan is in slot 1,
    rows of the plan    0 … 31  32 … 63  64 … 95   96 …          and there in the second page,
    block table          5  2     7  0     1  6     3  4         which is page 0: so row 5 of that

A plan names rows in three places: what is written (`SlabWrites`), what travels (`Moves`) and what
is read (`ReadSpans`). The first two go through the block table row by row, as any slot mapping
does. A span is cut where its pages end. That is all that paging asks for.

A layer is in an order that is easy to follow. KV travels first: so all that is read lies in pages
when attention begins, and rows of all ranks are done at once:

    write new KV ─▶ KV moves ─▶ Q leaves ─▶ attention: own rows, and those ─▶ results ─▶ merge
                                            that came from other ranks        return

Left out: pulls and replicas, which are the next step; preemption, as who is admitted has room for
its answer, too; and all that would hide an exchange behind attention.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from balancer import Request  # noqa: E402
from kernels import merge, partial_attention  # noqa: E402
from model import Llama, LlamaConfig, random_weights  # noqa: E402
from options import Parser, number, run_main  # noqa: E402
from pool import SIBLING, LakeConfig, plan_digest  # noqa: E402
from tokenlake import TokenLake  # noqa: E402
from work import KVSpans, QueryRows, Work, ranges, select, starts  # noqa: E402

PAGE = 16  # tokens of a page
C = 32  # tokens of a segment: two pages
CHUNK = 48  # rows of a request in an iteration, at most
DTYPE = torch.float64  # so that rounding does not change a token
LLAMA = LlamaConfig()
# So few slots that something has to be evicted. Three requests run, a chunk each.
LAKE = LakeConfig(
    C, slots=6, max_batch=3, chunk_tokens=3 * CHUNK, pull_tokens=0, replicate_factor=0
)


class PagedCache:
    """KV of one rank as engines have it: a tensor of pages for each layer, and a block table.

    Behind the slots lie rows that are never published: staging, for new KV that is computed here
    and lives elsewhere, then `incoming`, for KV that comes only to be read in this iteration.
    """
    def __init__(self, num_ranks, rank):
        self.incoming = LAKE.slots * C + LAKE.staging(num_ranks)
        num_rows = self.incoming + LAKE.max_batch * CHUNK  # all of an iteration may come
        num_pages = -(-num_rows // PAGE)
        # The n-th C / PAGE entries are the pages of slot n. Each rank shuffles them for itself.
        self.block_table = np.random.default_rng(rank).permutation(num_pages)
        shape = num_pages, PAGE, 2, LLAMA.num_kv_heads, LLAMA.head_dim
        self.layers = torch.zeros(LLAMA.num_layers, *shape, dtype=DTYPE)

    def slot_mapping(self, first_row, rows):
        """Stretches of rows of the plan, [n] and [n] → the row in pages of each of their tokens."""
        row = ranges(first_row, rows)
        return torch.from_numpy(self.block_table[row // PAGE] * PAGE + row % PAGE)

    def cut(self, reader, first_row, length, position):
        """Spans of rows of the plan, [n] each → spans in pages, one for each page they touch."""
        first_page = first_row // PAGE
        end = first_row + length
        num_pages = -(-end // PAGE) - first_page
        span = np.repeat(np.arange(len(length)), num_pages)
        page = ranges(first_page, num_pages)
        begin = np.maximum(page * PAGE, first_row[span])
        piece = np.minimum((page + 1) * PAGE, end[span]) - begin
        row = self.block_table[page] * PAGE + begin % PAGE
        return KVSpans(reader[span], row, piece, position[span] + begin - first_row[span])


def exchange(rows, sends, receives):
    """Rows by target → rows by source. All ranks call it, also those without rows."""
    came = rows.new_empty(sum(receives), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), receives, sends)
    return came


class PagedAttention:
    """An iteration's attention backend: its tables are made once of the plan, for all layers."""
    def __init__(self, plan, transfer_plan, cache, rank):
        self.cache = cache
        self._list_new_kv(transfer_plan, rank)
        self._list_queries(plan, rank)
        self._list_reads(plan, rank)

    def _list_new_kv(self, transfer_plan, rank):
        """Where new KV is written, which rows leave, and where those land that come."""
        cache = self.cache
        writes = select(transfer_plan.writes, transfer_plan.writes.instance == rank)
        self.computed = torch.from_numpy(ranges(writes.first_row, writes.rows))
        self.written = cache.slot_mapping(writes.slab_row, writes.rows)
        moves = transfer_plan.moves
        # What comes only to be read has no slot, but a place in the order in which it comes.
        only_read = moves.target_row < 0
        incoming = cache.incoming + moves.receive_rows()
        target_row = np.where(only_read, incoming, moves.target_row)
        # Rows leave by target, and come by source; those between two ranks as the table has them.
        leave = np.argsort(moves.target, kind="stable")
        leave = leave[moves.source[leave] == rank]
        come = np.argsort(moves.source, kind="stable")
        come = come[moves.target[come] == rank]
        self.leaving = cache.slot_mapping(moves.source_row[leave], moves.rows[leave])
        self.landing = cache.slot_mapping(target_row[come], moves.rows[come])
        between = moves.rows_between(transfer_plan.num_instances)
        self.kv_splits = between[rank].tolist(), between[:, rank].tolist()

    def _list_queries(self, plan, rank):
        """Which own rows go to whom, and which results are merged for each own row."""
        is_own = plan.run_table.instance == rank
        own = select(plan.run_table, is_own)
        num_own = own.rows.sum()
        # By holder: in this order rows leave.
        holder, run = np.nonzero(plan.ships[is_own].T)
        rows = ranges(own.first_row[run], own.rows[run])
        self.shipped = torch.from_numpy(rows)
        # By own row and rank: the result from there, −1 if there is none. Those that return are
        # numbered behind the own ones.
        self.parts = torch.full((num_own, plan.sizes[0]), -1)
        self.parts[:, rank] = torch.arange(num_own)
        returned = num_own + torch.arange(len(rows))
        self.parts[rows, np.repeat(holder, own.rows[run])] = returned
        between = plan.rows_shipped()
        self.q_splits = between[rank].tolist(), between[:, rank].tolist()

    def _list_reads(self, plan, rank):
        """The Work: all rows that read here, and what they read."""
        runs = plan.run_table
        # Own rows, then those that come, by source: in this order runs stand already.
        own = np.flatnonzero(runs.instance == rank)
        here = select(runs, np.concatenate((own, np.flatnonzero(plan.ships[:, rank]))))
        # A share (what a rank computes of one request) is a reader. Its runs stand side by side.
        reader = np.cumsum(np.diff(here.share, prepend=here.share[:1]) != 0)
        rows = QueryRows.of_runs(reader, starts(here.rows), here.rows, here.position)
        reader_of_share = np.zeros(len(plan.old.tokens), np.int64)
        reader_of_share[here.share] = reader
        spans = plan.spans_read_at(rank)
        # A sibling's rows are counted in what comes; all others are rows of the plan.
        span_row = spans.first_row + self.cache.incoming * (spans.place == SIBLING)
        reader = reader_of_share[spans.share]
        spans = self.cache.cut(reader, span_row, spans.length, spans.position)
        self.work = Work(rows, spans, LLAMA.num_heads, LLAMA.num_kv_heads, DTYPE)

    def __call__(self, layer, q, kv):
        """q [T, H, D], kv [T, 2, Hkv, D] of own rows → [T, H, D]."""
        # Pages as rows, which copies nothing.
        slab = self.cache.layers[layer].view(-1, *kv.shape[1:])
        slab[self.written] = kv[self.computed]
        slab[self.landing] = exchange(slab[self.leaving], *self.kv_splits)
        sends, receives = self.q_splits
        queries = torch.cat((q, exchange(q[self.shipped], sends, receives)))
        o, lse = partial_attention(queries, slab, self.work, scale=LLAMA.head_dim**-0.5)
        # o and the log-sum-exp travel side by side.
        results = torch.cat((o, lse[..., None]), -1)
        returned = exchange(results[len(q) :], receives, sends)
        results = torch.cat((results[: len(q)], returned))
        return merge(results[..., :-1], results[..., -1], self.parts)[0]


class Engine:
    """One rank. All have the same requests, in the same order, and so decide the same."""
    def __init__(self, requests, num_ranks, rank):
        self.rank = rank
        # Without a cluster it only plans: it makes no pool.
        self.lake = TokenLake(list(range(num_ranks)), LLAMA, LAKE, dtype=DTYPE)
        self.model = Llama(LLAMA, random_weights(LLAMA, 0, DTYPE, "cpu"))
        self.cache = PagedCache(num_ranks, rank)
        self.waiting = list(requests)
        self.running = []
        self.hits = {}  # cached tokens by request
        self.iterations = 0

    def admit(self):
        """First come, first served; but who needs what another computes just now waits for it."""
        balancer = self.lake.balancer
        for request in list(self.waiting):
            matched = balancer.match(request)
            if balancer.awaited(request, matched):
                continue
            # Slots that others will still take, and one for this one's answer, which is short.
            segments = [balancer.num_segments(other.max_tokens) for other in self.running]
            promised = sum(segments) - sum(other.num_slots for other in self.running) + 1
            is_full = len(self.running) == LAKE.max_batch
            if is_full or not balancer.fits(request, matched, promised):
                break
            balancer.admit(request, matched)
            self.hits[request.id] = request.done
            self.waiting.remove(request)
            self.running.append(request)

    def schedule(self):
        """Rows of each running request, and runs of these: a batch for each rank."""
        balancer = self.lake.balancer
        counts = [min(request.remaining, CHUNK) for request in self.running]
        planned = [0] * balancer.num_instances
        tails = balancer.open_tails(self.running)
        most = -(-sum(counts) // balancer.num_instances)  # evenly
        batches = [[] for _ in planned]
        for request, rows in zip(self.running, counts):
            runs = balancer.reserve(request, rows, planned, tails, most)
            if runs is None:  # here an engine preempts; `admit` has left room enough
                raise RuntimeError("all slots are pinned")
            for run in runs:
                batches[run.preferred].append(run)
        return counts, batches

    def step(self):
        """An iteration → its plan, and the KV that moved."""
        self.admit()
        counts, batches = self.schedule()
        tree = self.lake.get_prefix_tree()
        plan, transfer_plan, _ = self.lake.gen_plans(batches, [1] * len(batches), tree)
        require_same(plan_digest(self.iterations, plan, transfer_plan))
        tokens = self.forward(plan, transfer_plan)
        # All layers are written: from the next iteration on others may read what these rows fill.
        for request, rows in zip(self.running, counts):
            self.lake.balancer.commit(request, rows)
        for request, token in tokens:
            request.tokens.append(token)
            self.lake.balancer.extend_ids(request)
            if len(request.tokens) == request.max_tokens:
                self.running.remove(request)
                self.lake.balancer.release(request)
        self.iterations += 1
        return plan, transfer_plan.moves

    def forward(self, plan, transfer_plan):
        """Own rows go through the model → the tokens of all requests that sample, greedily."""
        runs = plan.run_table
        own = np.repeat(runs.instance, runs.rows) == self.rank
        inputs = torch.from_numpy(plan.token_ids[own])
        positions = torch.from_numpy(ranges(runs.position, runs.rows)[own])
        sampling = np.flatnonzero(plan.samples)
        is_own = runs.instance[sampling] == self.rank
        last_row = runs.first_row[sampling] + runs.rows[sampling] - 1
        attend = PagedAttention(plan, transfer_plan, self.cache, self.rank)
        logits = self.model.forward(inputs, positions, attend, last_row[is_own].tolist())
        tokens = torch.zeros(len(sampling), dtype=torch.int64)
        tokens[torch.from_numpy(is_own)] = logits.argmax(-1)
        dist.all_reduce(tokens)  # one rank knows a token, the others add 0
        requests = [plan.runs[run].request for run in sampling]
        return zip(requests, tokens.tolist())


def require_same(digest):
    """Ranks that have planned otherwise would mix up rows, or wait for each other for ever."""
    mine = torch.tensor(list(digest), dtype=torch.uint8)
    digests = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(digests, mine)
    if not all(mine.equal(other) for other in digests):
        raise RuntimeError("ranks have planned otherwise")


def make_requests():
    """Three that begin alike, one that is cached as a whole, and two that share nothing."""
    draw = np.random.default_rng(0)

    def text(length):
        return draw.integers(LLAMA.vocab_size, size=length).tolist()

    system = text(70)
    prompts = [system + text(length) for length in (30, 20, 45)]
    prompts += [system[: 2 * C], text(150), text(120)]
    return [Request(id, prompt, len(prompt) + 8) for id, prompt in enumerate(prompts)]


def serve(rank, num_ranks, meet, num_equal):
    """The main loop of a rank. Rank 0 tells of all, as each knows the whole plan."""
    torch.set_num_threads(1)  # tensors are small, and ranks share the cores
    dist.init_process_group("gloo", meet, rank=rank, world_size=num_ranks)
    requests = make_requests()
    engine = Engine(requests, num_ranks, rank)
    travelled = np.zeros(3, np.int64)
    while engine.waiting or engine.running:
        plan, moves = engine.step()
        rows = np.bincount(plan.run_table.instance, plan.run_table.rows, num_ranks)
        only_read = moves.rows[moves.target_row < 0].sum()
        travelling = plan.rows_shipped().sum(), moves.rows.sum() - only_read, only_read
        travelled += travelling
        if rank == 0:
            computed = " + ".join(f"{n:.0f}" for n in rows)
            print(f"iteration {engine.iterations}: {computed} rows; {tell(*travelling)}")
    if rank == 0:
        print(f"in all: {tell(*travelled)}")
        num_equal.put(compare(engine, requests))


def tell(queries, home, only_read):
    """Of rows that travel in each layer. Results are as many as rows of Q."""
    return f"{queries} of Q travel, {home} of KV to its home, {only_read} to readers"


def compare(engine, requests):
    """Holds all answers against those without a cache → how many are equal."""
    num_equal = 0
    for request in requests:
        alone = engine.model.forward_alone(request.tokens[:-1]).argmax(-1).tolist()
        answer = request.tokens[request.num_prompt :]
        is_equal = answer == alone[request.num_prompt - 1 :]
        num_equal += is_equal
        hit = f"{engine.hits[request.id]} of {request.num_prompt} prompt tokens"
        says = "equal" if is_equal else "WRONG"
        print(f"request {request.id}: {hit} were there; answer {says}: {answer}")
    print(f"{engine.lake.balancer.evictions} segments were evicted")
    print(f"{num_equal} of {len(requests)} answers equal")
    return num_equal


def main(arguments):
    parser = Parser(description="A toy engine with paged KV, brought into a lake.")
    parser.add_argument("--ranks", type=number(int, 1, 8), default=2, help="default 2")
    options = parser.parse_args(arguments)
    num_equal = torch.multiprocessing.get_context("fork").SimpleQueue()
    # Ranks meet in a file: a store of TCP has threads, and so would fork badly.
    with TemporaryDirectory() as folder:
        settings = options.ranks, f"file://{folder}/meet", num_equal
        start = torch.multiprocessing.start_processes
        start(serve, settings, options.ranks, start_method="fork")
    return num_equal.get() < len(make_requests())


if __name__ == "__main__":
    run_main(main)
