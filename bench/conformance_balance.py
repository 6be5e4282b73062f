"""What keeps instances evenly loaded, and who computes what, as small fixed cases (see
conformance.py): copies, choice of a replica, dispatch, batches, what ships, what is pulled or sent.

Each kind has its cases, the answer of this implementation, whose docstring is the kind's page in
the README of the vectors, and where several answers are right, what one costs.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balancer import FORBIDDEN, Balancer, dynamic_program  # noqa: E402
from conformance_cases import (  # noqa: E402
    Case,
    Draws,
    Kind,
    Recorded,
    balancer_of,
    column,
    exact_case,
    make_pool,
    make_segment,
    segment_id,
)
from model import LlamaConfig  # noqa: E402
from pool import LakeConfig, RunTable  # noqa: E402
from tokenlake import FreshPairs, Pulled, Shares, TokenLake  # noqa: E402

# ── replication ──────────────────────────────────────────────────────────────────────────────────


def answer_replication(given: dict) -> dict:
    """Which segment is copied, from which slot to which (§4.3).

    An instance is *overloaded* if load · N · 10 is over the sum of loads · 11. `heavy` is
    ceil(replicate_factor · N · ln N), and `enough` = hits / (heavy · N). If none is overloaded, or
    heavy is 0, nothing is copied. Else segments with heat over `enough` are looked at one by one,
    `heavy` of them at most: always the hottest of those whose parent has been looked at or is none,
    of equals that with the smallest id, byte by byte. And for each all instances: those with a free
    slot first, then by load, then by number; as all of this was before the first copy. A segment
    wants a copy at an instance if it has none there, if its heat is over `enough` times its
    replicas, and if an instance that has one is overloaded; those that were made just now count as
    replicas.

    The slot is taken from the end of that instance's free list, or evicted (see eviction), wherever
    that is. If the segment had a replica at the slot's instance before this, it does not fit: it
    goes to the end of its instance's free list when all is done. Else it holds a replica now, and
    is the youngest of `extras`.

    Before each copy: all ends if `extras` has floor(N·S / 16) or more, if N copies were made, or if
    N slots did not fit; and if no slot is to be had. A copy whose replica has been evicted for a
    later one is not made. The source is the segment's first replica.

    - input: `pool`
    - output: `copies`, [[from, to]], global slots, in the order made; `free` and `extras`
      afterwards"""
    balancer = balancer_of(given["pool"])
    copies = [[source, target] for target, source in balancer.replicate().items()]
    return dict(copies=copies, free=balancer.free, extras=list(balancer.tree.extras))


def copy_case(name, shows, segments, S=16, **pool) -> Case:
    """Three instances, heavy = 10. If not said otherwise, instance 0 is overloaded, and enough is
    90 / (10 · 3) = 3."""
    pool = dict(load=[1000, 100, 200], hits=90.0) | pool
    pool = make_pool(3, S, 4, segments=segments, **pool)
    return exact_case(name, shows, "copies free extras", pool=pool)


HOT, WARM, COLD = (segment_id(0, number) for number in (20, 21, 22))
ONE = [make_segment(HOT, [0], heat=9.0)]


def replication_cases() -> list[Case]:
    return [*overload_cases(), *heat_cases(), *copy_slot_cases()]


def overload_cases():
    """Whether anything is copied at all."""
    said = "Instance 0 is overloaded: its segment, with 9 hits where 3 are enough, gets two more, "
    said += "at 1, which has the least load, then at 2."
    yield copy_case("a hot one", said, ONE)
    said = "11/10 of the mean load exactly is not over it."
    yield copy_case("nobody is overloaded", said, ONE, load=[1100, 950, 950])
    yield copy_case("just overloaded", "One more is.", ONE, load=[1101, 950, 949])
    said = "It lives at 1, which is not overloaded: no copy."
    yield copy_case("elsewhere", said, [make_segment(HOT, [16], heat=9.0)])
    said = "replicate_factor 0 has no heavy hitters."
    yield copy_case("no factor", said, ONE, replicate_factor=0.0)
    yield copy_case(
        "an idle pool", "Without load none is overloaded.", ONE, load=[0, 0, 0]
    )


def heat_cases():
    """Which segments, and how many copies."""
    said = "Heat 3 is not over 3: no copy."
    yield copy_case("as much as is enough", said, [make_segment(HOT, [0], heat=3.0)])
    said = "Heat 6 is over 3, not over twice 3: one copy, at 1."
    yield copy_case("a second is enough", said, [make_segment(HOT, [0], heat=6.0)])
    warm = make_segment(WARM, [1], HOT, 9.0)
    chain = [*ONE, warm, make_segment(COLD, [2], WARM, 3.0)]
    said = "N = 3 copies an iteration, though a sixteenth of 96 slots is 6: two of the parent, "
    said += "then one of its child, of equal heat."
    yield copy_case("three at most", said, chain, 32)
    said = "Of equals the smaller id goes first, whatever order they came in."
    equals = [make_segment(WARM, [1], heat=8.0), make_segment(HOT, [0], heat=8.0)]
    yield copy_case("equal heat", said, equals)
    said = "All three have heat 9. The smallest id is a child's, which waits for its parent, and "
    said += "that has the largest one: so the one in between goes first, then the parent."
    family = [make_segment(COLD, [0], heat=9.0), make_segment(WARM, [1], heat=9.0)]
    family.append(make_segment(HOT, [2], COLD, 9.0))
    yield copy_case("parents first", said, family, 32)
    said = "heavy is 9.89 rounded up: 3 are enough, and 3.25 more, so there is one copy. By 9 of "
    said += "them, 3.33 would be enough."
    yield copy_case("rounded up", said, [make_segment(HOT, [0], heat=3.25)])
    said = "heavy is 0.99 rounded up, so one segment is looked at, and gets a copy at 1. Both are "
    said += "over 18 / 3."
    two = [make_segment(HOT, [0], heat=9.0), make_segment(WARM, [1], heat=8.0)]
    yield copy_case("one heavy hitter", said, two, replicate_factor=0.3, hits=18.0)
    said = "A pool of 24 slots has one further replica at most."
    yield copy_case("a sixteenth", said, chain, 8)
    yield copy_case("no sixteenth", "A pool of 15 slots has none.", chain, 5)


def copy_slot_cases():
    """Where a copy's slot comes from."""
    cold = make_segment(COLD, [17], touched=1)
    warm = make_segment(WARM, [2], touched=2)
    full = dict(taken=range(32), lru=[COLD, WARM])
    said = "1 has the least load, but 2 a free slot: the first copy goes to 2. For the one at 1 "
    said += "what was touched earliest leaves: slot 17."
    recent = make_segment(HOT, [0], heat=9.0, touched=3)
    yield copy_case("free slots first", said, [recent, cold, warm], **full)
    said = "The same, but the hot segment was touched before the others: for 1, its new replica at "
    said += "2 leaves again, which is of no use there. So nothing is copied, and the slot is free."
    yield copy_case("a copy that does not stay", said, [*ONE, cold, warm], **full)
    said = "Nothing is free. Eviction gives slot 2, of instance 0, where the segment is already: "
    said += "it does not fit, and is free afterwards. The next is slot 17, of 1."
    warm = make_segment(WARM, [2], touched=1)
    cold = make_segment(COLD, [17], touched=2)
    none_free = dict(taken=range(48), lru=[WARM, COLD])
    yield copy_case("a slot that does not fit", said, [*ONE, warm, cold], **none_free)
    said = "Eviction gives slots 2, 3 and 4, of instance 0, where both hot segments are: after "
    said += "N = 3 that do not fit all ends. (Slot 17 would have fitted next.)"
    two = [make_segment(HOT, [0], heat=9.0), make_segment(WARM, [1], heat=8.0)]
    idle = [segment_id(0, number) for number in range(30, 34)]
    old = [make_segment(id, [slot]) for id, slot in zip(idle, (2, 3, 4, 17))]
    all_taken = dict(taken=range(48), lru=idle)
    yield copy_case("three do not fit", said, [*two, *old], **all_taken)


# ── choice of a replica ──────────────────────────────────────────────────────────────────────────


def answer_choice(given: dict) -> dict:
    """Which of several replicas is read: the power of two choices (§4.4).

    For each read, of a segment with n replicas (numbered from 0 by instance), two are drawn: the
    first is `first`, below n; the second is (first + 1 + `other`) mod n, where `other` is below
    max(n - 1, 1). So they differ if n > 1. The second is read if its instance has less load, else
    the first; and the cost is added to the load there. Reads choose N at a time: all of them by the
    loads before, which then take all N costs.

    This implementation draws by `numpy.random.Generator(PCG64(0)).integers`, all of `first`, then
    all of `other`. Any other generator serves, if all ranks have the same.

    - input: `candidates` [reads][N], global slots of the replicas, -1 where there is none; `cost`
      [reads]; `load` [N]; the draws, `first` and `other` [reads]
    - output: `slots` [reads]; `load` [N] afterwards"""
    load = column(given["load"])
    balancer = Balancer(len(load), 64, 4)
    balancer._rng = Recorded([given["first"], given["other"]])
    candidates = np.array(given["candidates"], np.int32)
    slots = balancer.choose_replicas(candidates, column(given["cost"]), load)
    return dict(slots=slots.tolist(), load=load.tolist())


def choice_case(name, shows, candidates, cost, load, first, other) -> Case:
    given = dict(candidates=candidates, cost=cost, load=load, first=first, other=other)
    return exact_case(name, shows, "slots load", **given)


def choice_cases() -> list[Case]:
    return [*few_read_cases(), many_reads_case()]


def few_read_cases():
    """Four instances of 64 slots."""
    everywhere = [0, 64, 128, 192]
    two = [-1, 64, -1, 192]
    said = "The first draw is replica 0, at instance 1, the second replica 1, at 3, with less load."
    yield choice_case("less loaded", said, [two], [5], [0, 9, 0, 4], [0], [0])
    said = "Both have load 4: the first draw counts, replica 1 at 3."
    yield choice_case("of equals the first", said, [two], [5], [0, 4, 0, 4], [1], [0])
    said = "n = 1: both draws are 0, and the same replica."
    yield choice_case(
        "one replica", said, [[-1, -1, 130, -1]], [3], [0, 0, 7, 0], [0], [0]
    )
    said = "n = 4, first 3, other 1: the second is (3 + 1 + 1) mod 4 = 1."
    yield choice_case("around", said, [everywhere], [1], [5, 1, 5, 2], [3], [1])
    said = "Four see load 0 at 0, and all go there; the fifth sees what they cost."
    draws = [0] * 5
    yield choice_case(
        "four at a time", said, [everywhere] * 5, [2] * 5, [0, 1, 1, 1], draws, draws
    )


def many_reads_case() -> Case:
    draws = Draws(5)
    instances = [[0], [1, 3], [0, 1, 2], [0, 1, 2, 3]]
    replicas = [instances[kind] for kind in draws.below(4, 23)]
    candidates = [
        [i * 64 + read if i in its else -1 for i in range(4)]
        for read, its in enumerate(replicas)
    ]
    count = column([len(its) for its in replicas])
    first = draws.integers(count).tolist()
    other = draws.integers(np.maximum(count - 1, 1)).tolist()
    cost = [1 + drawn for drawn in draws.below(40, 23)]
    said = "23 reads of one to four replicas: five times four, then three."
    return choice_case(
        "many reads", said, candidates, cost, [20, 0, 10, 30], first, other
    )


# ── dispatch ─────────────────────────────────────────────────────────────────────────────────────


def lake_of(given: dict, instances: int) -> TokenLake:
    """A lake without a pool, with the sizes that a case has."""
    config = LakeConfig(slots=16, pull_tokens=given.get("pull_tokens", 0))
    lake = TokenLake(list(range(instances)), LlamaConfig(), config)
    lake.query_bytes = given["query_bytes"]
    lake.kv_bytes = given["kv_bytes"]
    lake.exchange_bytes = given.get("exchange_bytes", 0)
    return lake


def some_columns(kind, **columns):
    """A table of which only some columns are asked for."""
    none = dict.fromkeys(kind._fields)
    return kind(**none | {name: column(values) for name, values in columns.items()})


def answer_dispatch(given: dict) -> dict:
    """Which instance computes which part (§5): the cheapest matching, where each instance has one
    part at most.

    The bytes of a part at an instance are: of each of its shares that reads any `tokens` there,
    rows · query_bytes, or where [share, instance] is one of `pulls`, tokens · kv_bytes; and of each
    of its runs that puts KV and whose home is there, rows · kv_bytes. A part that is computed at an
    instance costs what it has at all others.

    If there are N parts, and each run that puts KV has its home at the instance with the number of
    its part, part i stays at instance i, unless the cheapest matching saves more than
    exchange_bytes. Several matchings may cost the same: so the cost is compared.

    - input: `instances`, `parts`, numbers of them; shares as columns, `share_part` (ascending),
      `share_rows`, `tokens` [shares][N] of old KV; `pulls`, [[share, instance]]; runs as columns,
      `run_share`, `run_rows`, `run_home`, `run_puts`; `query_bytes`, `kv_bytes`, `exchange_bytes`
    - output: `instance_of_part` [parts], by cost; `cost` in bytes, exactly"""
    N = given["instances"]
    runs = some_columns(
        RunTable,
        share=given["run_share"],
        rows=given["run_rows"],
        home=given["run_home"],
        puts=given["run_puts"],
    )
    shares = some_columns(Shares, part=given["share_part"], rows=given["share_rows"])
    pulled = Pulled(*column(given["pulls"]).reshape(-1, 2).T)
    tokens = column(given["tokens"]).reshape(-1, N)
    instances = lake_of(given, N)._assign(runs, shares, tokens, pulled, given["parts"])
    instances = instances.tolist()
    return dict(instance_of_part=instances, cost=dispatch_cost(given, instances))


def are_integers(numbers: list) -> bool:
    """As JSON has them: true is none, nor is 1.0."""
    return all(type(number) is int for number in numbers)


def dispatch_cost(given: dict, instance_of_part: list[int]) -> int:
    """Bytes that cross instances, counted one by one."""
    all_there = are_integers(instance_of_part) and all(
        0 <= instance < given["instances"] for instance in instance_of_part
    )
    distinct = len({*instance_of_part}) == len(instance_of_part) == given["parts"]
    if not all_there or not distinct:
        raise ValueError("another instance for each part is expected")
    cost = 0
    for share, tokens in enumerate(given["tokens"]):
        for instance, count in enumerate(tokens):
            is_own = instance == instance_of_part[given["share_part"][share]]
            if [share, instance] in given["pulls"] and not is_own:
                cost += count * given["kv_bytes"]
            elif count and not is_own:
                cost += given["share_rows"][share] * given["query_bytes"]
    columns = (given[f"run_{name}"] for name in ("share", "rows", "home", "puts"))
    for share, rows, home, puts in zip(*columns):
        if puts and home != instance_of_part[given["share_part"][share]]:
            cost += rows * given["kv_bytes"]
    return cost


def dispatch_case(name, shows, instances, parts, shares, runs, pulls=(), limit=0) -> Case:
    """A share is (part, rows, tokens at each instance), a run (share, rows, home, puts)."""
    given = dict(instances=instances, parts=parts)
    given |= zip(("share_part", "share_rows", "tokens"), map(list, zip(*shares)))
    given["pulls"] = list(pulls)
    run_columns = "run_share", "run_rows", "run_home", "run_puts"
    given |= zip(run_columns, map(list, zip(*runs)))
    given |= dict(query_bytes=320, kv_bytes=128, exchange_bytes=limit)
    return Case(name, shows, given, dict(instance_of_part="cost", cost="exactly"))


def dispatch_cases() -> list[Case]:
    return [*two_part_cases(), *other_part_cases(), six_shares_case()]


def two_part_cases():
    """Two parts of a share each, four rows, on two instances."""
    keys_elsewhere = [(0, 4, [0, 64]), (1, 4, [64, 0])]
    at_home = [(0, 4, 0, 1), (1, 4, 1, 1)]
    away = [(0, 4, 1, 1), (1, 4, 0, 1)]
    said = "Each part's keys and homes are with the other instance: they change places for 0 bytes."
    yield dispatch_case("to the keys", said, 2, 2, keys_elsewhere, away)
    said = "What they put lives with their own number, their keys do not: to change places costs "
    said += "1,024 bytes of KV, to stay 2,560 of queries. That saves more than exchange_bytes."
    yield dispatch_case("all at home", said, 2, 2, keys_elsewhere, at_home)
    said = "It saves 1,536 bytes, no more than exchange_bytes: they stay."
    args = said, 2, 2, keys_elsewhere, at_home
    yield dispatch_case("all at home and they stay", *args, limit=1536)
    said = "What they put lives elsewhere: exchange_bytes, however many, does not count."
    yield dispatch_case("not all at home", said, 2, 2, keys_elsewhere, away, limit=10**6)
    said = "Two parts on three instances: exchange_bytes does not count either, though what they "
    said += "put lives with their own number. They change places."
    keys = [(0, 4, [0, 64, 0]), (1, 4, [64, 0, 0])]
    yield dispatch_case("fewer parts", said, 3, 2, keys, at_home, limit=10**6)
    said = "Share 0 pulls 2 tokens from 1, 256 bytes, while its queries would be 1,280: so part 1, "
    said += "which ships to 1, goes there."
    shares = [(0, 4, [0, 2]), (1, 4, [0, 64])]
    no_puts = [(0, 4, 0, 0), (1, 4, 0, 0)]
    yield dispatch_case("pulled KV", said, 2, 2, shares, no_puts, [[0, 1]])


def other_part_cases():
    """As many parts as instances, or fewer."""
    said = "Nothing is read and nothing put: every matching costs nothing."
    nothing = [(0, 1, [0, 0, 0]), (1, 1, [0, 0, 0])]
    yield dispatch_case("a tie", said, 3, 2, nothing, [(0, 1, 0, 0), (1, 1, 0, 0)])
    said = "One part, three instances: it goes where it reads and puts."
    yield dispatch_case("one part", said, 3, 1, [(0, 2, [8, 0, 8])], [(0, 2, 2, 1)])
    said = "Part 1 has no shares: it takes the instance that is left."
    shares = [(0, 2, [0, 8, 0]), (2, 2, [8, 0, 0])]
    yield dispatch_case("an empty part", said, 3, 3, shares, [(0, 2, 1, 1), (1, 2, 0, 1)])


def six_shares_case() -> Case:
    draws = Draws(8)
    tokens = np.reshape(draws.below(3, 24), (6, 4)) * 16
    parts = [0, 0, 1, 2, 3, 3]
    shares = [(part, 1 + part % 3, its) for part, its in zip(parts, tokens.tolist())]
    homes = draws.below(4, 6)
    runs = [(share, shares[share][1], home, 1) for share, home in enumerate(homes)]
    return dispatch_case("six shares", "Four parts of six shares.", 4, 4, shares, runs)


# ── the dynamic program ──────────────────────────────────────────────────────────────────────────


def answer_dynamic_program(given: dict) -> dict:
    """Batches of consecutive requests, and their degrees of parallelism (§6.2). R requests are cut
    into batches, request `first` to `end` - 1 each; their DoPs are 1 at least and sum to N at most.
    A batch's time counts for each of its requests, and the sum is to be smallest. A batch that
    takes longer than the SLO is forbidden. Several cuts may cost the same: so the cost is compared.

    - input: `requests` (R); `instances` (N); `slo` in ps, or null; `times` [N][R][R] in ps:
      times[dop - 1][first][end - 1], null where it is forbidden
    - output: `batches`, [[first, end, dop]] in order, by cost; `cost` in ps, exactly; both null
      where nothing is allowed"""
    times = given["times"]

    def time(end, dop):
        of_first = (row[end - 1] for row in times[dop - 1][:end])
        return column([FORBIDDEN if ps is None else ps for ps in of_first])

    batches = dynamic_program(time, given["requests"], given["instances"], given["slo"])
    batches = batches if batches is None else [list(batch) for batch in batches]
    return dict(batches=batches, cost=batches_cost(given, batches))


def batches_cost(given: dict, batches: list | None) -> int | None:
    """The sum over requests of their batch's time."""
    if batches is None:
        return None
    R = given["requests"]
    N = given["instances"]
    at = cost = 0
    for first, end, dop in batches:
        follows = first == at < end <= R and 1 <= dop <= N
        if not follows or not are_integers([first, end, dop]):
            raise ValueError(f"batch {[first, end, dop]} does not follow")
        ps = given["times"][dop - 1][first][end - 1]
        if ps is None or ps > (given["slo"] or FORBIDDEN):
            raise ValueError(f"batch {[first, end, dop]} is forbidden")
        cost += ps * (end - first)
        at = end
    if at < R or sum(dop for *_, dop in batches) > N:
        raise ValueError(f"batches of {R} requests, on {N} instances, are expected")
    return cost


def batch_times(rows: list[int], N: int, fixed: int, each: int) -> list:
    """times [N][R][R]: a batch takes a fixed time, and some for each row of an instance."""
    ends = range(1, len(rows) + 1)

    def ps(first, end, dop):
        return fixed + each * -(-sum(rows[first:end]) // dop) if first < end else None

    return [
        [[ps(first, end, dop) for end in ends] for first in range(len(rows))]
        for dop in range(1, N + 1)
    ]


def batch_case(name, shows, rows, N, slo=None, each=10) -> Case:
    """Requests of so many rows."""
    times = batch_times(rows, N, 100, each)
    given = dict(requests=len(rows), instances=N, slo=slo, times=times)
    return Case(name, shows, given, dict(batches="cost", cost="exactly"))


def dynamic_program_cases() -> list[Case]:
    mixed = [1, 1, 1, 90]
    decodes = batch_case(
        "decodes have DoP 1",
        "Batches of the first three requests may not have more than one instance each.",
        [1, 1, 1, 20, 90],
        4,
    )
    for row in (row for of_dop in decodes.input["times"][1:] for row in of_dop[:3]):
        row[:] = [None] * 5
    return [
        batch_case("one request", "It takes all instances.", [12], 3),
        batch_case("one instance", "All run together.", [1, 1, 8], 1),
        batch_case("short ones apart", "On one instance; 90 rows on three.", mixed, 4),
        decodes,
        batch_case("an SLO", "90 rows on three take 400 ps: all on four.", mixed, 4, 399),
        batch_case("no SLO is kept", "All take over 50 ps: null.", [1, 1, 90], 3, 50),
        batch_case("a tie", "Rows take no time: any DoP will do.", [5, 5, 5], 3, each=0),
        batch_case("six requests", "On four instances.", [1, 2, 3, 10, 40, 200], 4),
    ]


# ── ship or pull, siblings ───────────────────────────────────────────────────────────────────────


def answer_ship_or_pull(given: dict) -> dict:
    """Old KV that comes to its readers, in place of their queries going there (§5). Only a prompt's
    share pulls; a decode ships its row. What an instance has for a share may be pulled if that is
    any tokens, and if tokens · kv_bytes is less than rows · query_bytes. A share has room for
    floor(pull_tokens / number of prompts' shares in its part) tokens. In order of instances, those
    that may be pulled are summed up; an instance's are pulled if the sum with them is within the
    room. (What does not fit is in the sum for those after it.)

    - input: shares as columns, ascending by part: `share_part`, `share_rows`, `is_prompt`, `tokens`
      [shares][N] of old KV to be read at each instance; `query_bytes`, `kv_bytes`, `pull_tokens`
    - output: `pulls`, [[share, instance]], by share, then instance"""
    tokens = column(given["tokens"])
    shares = some_columns(
        Shares,
        part=given["share_part"],
        rows=given["share_rows"],
        is_prompt=given["is_prompt"],
    )
    share, holder = lake_of(given, tokens.shape[1])._ship_or_pull(shares, tokens)
    return dict(pulls=np.stack((share, holder), 1).tolist())


def pull_case(name, shows, shares, pull_tokens=100) -> Case:
    """A share is (part, rows, whether it is a prompt's, tokens at each instance)."""
    names = "share_part", "share_rows", "is_prompt", "tokens"
    given = dict(zip(names, map(list, zip(*shares))))
    given |= dict(query_bytes=320, kv_bytes=128, pull_tokens=pull_tokens)
    return exact_case(name, shows, "pulls", **given)


def ship_or_pull_cases() -> list[Case]:
    return [*cheaper_cases(), *room_cases()]


def cheaper_cases():
    """Whether KV is fewer bytes than queries and results."""
    said = "4 rows are 1,280 bytes: 9 tokens (1,152) are pulled, 11 (1,408) are not."
    yield pull_case("fewer bytes", said, [(0, 4, 1, [9, 11, 0])])
    said = "10 tokens are 1,280 bytes, as many as the queries: these are shipped."
    yield pull_case("as many bytes", said, [(0, 4, 1, [10, 0, 0])])
    yield pull_case("a decode ships", "It never pulls.", [(0, 4, 0, [9, 1, 0])])


def room_cases():
    """Whether there is room for it; 40 rows may pull up to 99 tokens from an instance."""
    said = "Room for 100: the first 60 fit, the next do not, and count for the 20 after them."
    yield pull_case("room", said, [(0, 40, 1, [60, 60, 20])])
    yield pull_case("just fits", "60 and 40 are 100.", [(0, 40, 1, [60, 40, 0])])
    said = "Two prompts of one part have 50 each, that of another part 100; the decode takes none."
    shares = [(0, 40, 1, [50, 0, 0]), (0, 40, 1, [51, 0, 0]), (0, 1, 0, [5, 0, 0])]
    yield pull_case("divided room", said, [*shares, (1, 40, 1, [0, 90, 0])])
    yield pull_case("no room", "All ship.", [(0, 4, 1, [9, 1, 0])], 0)
    said = "70 tokens at 0 are dearer than 20 rows, and take no room: 40 and 49 fit."
    yield pull_case("dear ones take no room", said, [(0, 20, 1, [70, 40, 49])])


def answer_siblings(given: dict) -> dict:
    """Fresh KV that is sent to a share of its request on another instance (§5). A pair is a run,
    the reader, that reads what a run of its request, the writer, puts in this iteration. It counts
    if the reader is computed neither where the writer is, nor where the KV will live. What a share
    would read so at one home (each writer once) is sent, all of it or nothing: if tokens · kv_bytes
    is less than the share's rows · query_bytes, and if the share's rows do not go to that home for
    old KV anyway.

    - input: runs as columns, by instance: `run_instance`, `run_home`, `run_rows`, `run_share`;
      `pairs`, [[reader, writer]]; of shares `share_rows` and `ships` [shares][N], whether their
      rows go to an instance for old KV; `query_bytes`, `kv_bytes`
    - output: `siblings`, [[share, writer]], by share, then writer; `sibling_of_pair` [pairs], the
      entry there that brings a pair's KV, -1 if none does"""
    runs = some_columns(
        RunTable,
        instance=given["run_instance"],
        home=given["run_home"],
        rows=given["run_rows"],
        share=given["run_share"],
    )
    shares = some_columns(Shares, rows=given["share_rows"])
    ships = np.array(given["ships"], bool)
    pairs = FreshPairs(*column(given["pairs"]).reshape(-1, 2).T)
    lake = lake_of(given, ships.shape[1])
    siblings, of_pair = lake._choose_siblings(runs, shares, pairs, ships)
    sent = np.stack((siblings.share, siblings.writer), 1).tolist()
    return dict(siblings=sent, sibling_of_pair=of_pair.tolist())


def sibling_case(name, shows, runs, ships, share_rows) -> Case:
    """A run is (instance, home, rows, share); all are of one request, by position."""
    names = "run_instance", "run_home", "run_rows", "run_share"
    given = dict(zip(names, map(list, zip(*runs))))
    every = [
        [reader, writer] for reader in range(len(runs)) for writer in range(reader + 1)
    ]
    given |= dict(
        pairs=every, share_rows=share_rows, ships=ships, query_bytes=320, kv_bytes=128
    )
    return exact_case(name, shows, "siblings sibling_of_pair", **given)


def sibling_cases() -> list[Case]:
    return [*two_run_cases(), *more_run_cases()]


def two_run_cases():
    """Run 0, computed at 0; and run 1, at 1, which reads it."""
    stay = [[0, 0, 0], [0, 0, 0]]
    writer = 0, 2, 4, 0
    reader = 1, 1, 4, 1
    said = "Its KV will live at 2; 512 bytes are less than 1,280 of queries: it is sent to share 1."
    yield sibling_case("sent", said, [writer, reader], stay, [4, 4])
    said = "It will live with its reader: it is put there anyway."
    yield sibling_case("home is there", said, [(0, 1, 4, 0), reader], stay, [4, 4])
    said = "Share 1 goes to 2 for old KV, and finds the fresh one there."
    ships = [[0, 0, 0], [0, 0, 1]]
    yield sibling_case("ships anyway", said, [writer, reader], ships, [4, 4])
    said = "A single row is 320 bytes, less than the KV: it goes to 2."
    yield sibling_case("a row", said, [writer, (1, 1, 1, 1)], stay, [4, 1])
    said = "Five rows of KV are 640 bytes, as many as two rows' queries: these go to 2."
    yield sibling_case("as many bytes", said, [(0, 2, 5, 0), (1, 1, 2, 1)], stay, [5, 2])


def more_run_cases():
    """Several writers or readers."""
    said = "Two runs that will live at 2 have 11 rows, 1,408 bytes, over 1,280: neither is sent to "
    said += "share 1. Share 2 is at 2, where they are put, and gets the run that will live at 1."
    runs = [(0, 2, 4, 0), (0, 2, 7, 0), (1, 1, 4, 1), (2, 1, 4, 2), (2, 2, 4, 2)]
    yield sibling_case("all or nothing", said, runs, [[0, 0, 0]] * 3, [11, 4, 8])
    said = "Two shares read run 0, share 2 run 1 as well: each gets a run once."
    runs = [(0, 3, 4, 0), (1, 1, 4, 1), (2, 2, 4, 2), (2, 2, 4, 2)]
    yield sibling_case("two readers", said, runs, [[0, 0, 0, 0]] * 3, [4, 4, 8])


KINDS = dict(
    replication=Kind(replication_cases, answer_replication),
    choice=Kind(choice_cases, answer_choice),
    dispatch=Kind(dispatch_cases, answer_dispatch, cost=dispatch_cost),
    dynamic_program=Kind(
        dynamic_program_cases, answer_dynamic_program, cost=batches_cost
    ),
    ship_or_pull=Kind(ship_or_pull_cases, answer_ship_or_pull),
    siblings=Kind(sibling_cases, answer_siblings),
)


if __name__ == "__main__":
    print(__doc__)
