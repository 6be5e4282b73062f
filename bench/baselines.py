"""What the pool is compared with: N lakes of one, and a router in front (§7.1).

A fleet is some lakes, a scheduler for each, and the decision who serves a request:

    Fleet           one lake over all instances, nothing to route: TokenLake itself
    Router          cache-aware routing as SGLang's launcher sets it up: the instance that was sent
                    the longest prefix, unless in-flight requests are far apart. In front of lakes
                    of several instances it chooses among lakes instead: so many GPUs are served as
                    one flat lake is too slow for (`lakes:KxM`)
    Disaggregated   PD disaggregation with Mooncake's conductor: the prefill instance with the least
                    estimated TTFT, prefixes copied to it where that pays, KV streamed to the least
                    loaded decode instance, which keeps what it received

Lakes, balancers, schedulers and engines are the project's own. Whoever executes a fleet (the
simulator, or compare.py on real ranks) calls `arrive` for every request and `advance` after every
iteration of a lake, carries out the transfers they return, and says `landed` for each.
"""

import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balancer import FORBIDDEN, Request  # noqa: E402
from model import cut  # noqa: E402
from pool import LakeConfig  # noqa: E402
from scheduler import Scheduler  # noqa: E402
from tokenlake import TokenLake  # noqa: E402


@dataclass
class Transfer:
    """KV of the tokens [start, stop) of a request on its way between two lakes of one."""
    source: int
    target: int
    leaving: Request  # holds the KV at the source until it has landed
    arriving: Request  # has slots for it at the target
    start: int
    stop: int
    streamed: int  # of these tokens, those that did not travel behind the prefill
    when_landed: Callable[[], None]

    def spans(self, C: int) -> np.ndarray:
        """[3, n] first slab row at the source and at the target, and rows: by segments."""
        next_segment = -(-self.start // C) * C
        first = np.unique([self.start, *range(next_segment, self.stop, C)])
        length = np.diff(first, append=self.stop)
        leave = self.leaving.table[first // C] * C + first % C
        arrive = self.arriving.table[first // C] * C + first % C
        return np.stack((leave, arrive, length))


def by_arrival(request: Request, done: int) -> int:
    """In place of Scheduler.patience: first come, first served."""
    return request.order or 0


class Fleet:
    """Lakes, a scheduler for each, and as long as there is one lake nothing to route."""
    # Of arrival, as conventional engines serve; else by Scheduler.patience.
    in_order = False

    def __init__(self, lakes: list[TokenLake], make_scheduler=Scheduler):
        self.lakes = lakes
        self.schedulers = [make_scheduler(lake) for lake in lakes]

    @property
    def segment_tokens(self) -> int:
        return self.lakes[0].config.segment_tokens

    def serve_in_order(self):
        self.in_order = True
        for scheduler in self.schedulers:
            scheduler.patience = by_arrival

    def fits(self, request: Request) -> bool:
        """Whether the smallest lake can hold it at all, when it is empty."""
        lake = self.lakes[0]
        slots = len(lake.instances) * lake.balancer.slots
        return lake.balancer.num_segments(request.max_tokens - 1) <= slots

    def arrive(self, request: Request) -> list[Transfer]:
        """Gives a request to a lake's scheduler, now or when what it returns has landed."""
        self.schedulers[0].add(request)
        return []

    def advance(self, lake: int) -> list[Transfer]:
        """What an iteration of a lake sets in motion."""
        return []

    def landed(self, transfer: Transfer):
        """The KV is there: the target publishes it, the source lets go."""
        source = self.lakes[transfer.source].balancer
        target = self.lakes[transfer.target].balancer
        target.commit(transfer.arriving, transfer.stop - transfer.start)
        source.release(transfer.leaving)
        transfer.when_landed()

    @property
    def cached_tokens(self) -> dict[int, int]:
        """By request id: hits at its first admission, where its prompt is computed."""
        hits = {}
        # Prefill instances come first, and decide.
        for scheduler in reversed(self.schedulers):
            hits |= scheduler.cached_tokens
        return hits


class Router(Fleet):
    """Cache-aware routing among lakes, each of one instance or of several. Its tree of a lake is
    what it sent there, LRU by tokens; whether the lake still holds it, it does not know."""
    CACHE_THRESHOLD = 0.3  # of a prompt: a longer match decides
    BALANCE_ABS = 64  # in-flight requests: queues that are further apart,
    BALANCE_REL = 1.5  # and so many times as long, are balanced first
    MAX_TREE = 2**26  # tokens

    def __init__(self, lakes, make_scheduler=Scheduler):
        super().__init__(lakes, make_scheduler)
        self.trees = [OrderedDict() for _ in lakes]  # ids of segments, the oldest first

    def choose(self, request: Request) -> int:
        """The lake that serves a request."""
        in_flight = [len(s.waiting) + len(s.running) for s in self.schedulers]
        shortest = min(in_flight)
        longest = max(in_flight)
        apart = longest - shortest > self.BALANCE_ABS
        if apart and longest > self.BALANCE_REL * shortest:
            return in_flight.index(shortest)
        matched = [self.matched_tokens(request, tree) for tree in self.trees]
        if max(matched) > self.CACHE_THRESHOLD * len(request.tokens):
            return matched.index(max(matched))
        sizes = [len(tree) for tree in self.trees]
        return sizes.index(min(sizes))

    def matched_tokens(self, request: Request, tree: OrderedDict) -> int:
        """How much of a prompt was sent to the lake before."""
        for index, id in enumerate(request.ids):
            if id not in tree:
                return index * self.segment_tokens
        return len(request.ids) * self.segment_tokens

    def arrive(self, request):
        self.lakes[0].balancer.extend_ids(request)
        chosen = self.choose(request)
        tree = self.trees[chosen]
        for id in reversed(request.ids):  # a prefix is younger than what follows it
            tree[id] = None
            tree.move_to_end(id)
        while len(tree) * self.segment_tokens > self.MAX_TREE:
            tree.popitem(last=False)
        self.schedulers[chosen].add(request)
        return []


class Prefill(Scheduler):
    """Parks a request at its first token, its KV pinned until a decode instance has it."""
    def __init__(self, lake):
        super().__init__(lake)
        self.parked: list[Request] = []

    def update(self, query_plan, tokens):
        ended = super().update(query_plan, tokens)
        self.parked += [r for r in self.running if len(r.tokens) > r.num_prompt]
        self.running = [r for r in self.running if len(r.tokens) == r.num_prompt]
        return ended


class Disaggregated(Fleet):
    """The first `prefills` lakes compute prompts, the others decode. In its favour, links are never
    shared, and what streams behind a prefill takes no time but for the last layer's."""
    BALANCING = 1.25  # a prefix elsewhere that is so many times as long is copied
    bandwidth = 300e9  # B/s of a link, as the conductor reckons

    def __init__(self, lakes, prefills: int):
        super().__init__(lakes, Scheduler)
        self.schedulers[:prefills] = map(Prefill, lakes[:prefills])
        self.prefills = prefills
        self.flying: list[list[Request]] = [[] for _ in lakes]  # on their way to each

    # Prompts.

    def estimate(self, lake: int, new: int, prefix: int) -> float:
        """Seconds of a prefill of `new` rows behind a prefix, by the time model of that instance's
        scheduler."""
        per_chunk, per_row, per_pair, *_ = self.schedulers[lake].predictor.coefficients
        chunks = -(-new // self.lakes[lake].config.chunk_tokens)
        context = prefix + new / 2  # of a row, on average
        return (per_chunk * chunks + new * (per_row + per_pair * context)) / 1e12

    def queue(self, lake: int, new: int) -> float:
        """Seconds until a prefill instance turns to a prompt with `new` rows."""
        scheduler = self.schedulers[lake]
        # Without order, the shortest goes first.
        passes = FORBIDDEN if self.in_order else new
        ahead = [(r, r.done) for r in scheduler.running]
        ahead += [(r, self._held(lake, r)) for r in scheduler.waiting]
        seconds = 0
        for request, prefix in ahead:
            rows = len(request.tokens) - prefix
            if rows <= passes:
                seconds += self.estimate(lake, rows, prefix)
        return seconds

    def _held(self, lake: int, request: Request) -> int:
        """Tokens of a prompt that an instance has."""
        return self.lakes[lake].balancer.match(request) * self.segment_tokens

    def choose(self, request: Request) -> tuple[int, int]:
        """The prefill instance with the least estimated TTFT, and the one that its prefix is
        copied from: itself, where what it has is about as long as any."""
        row_bytes = self.lakes[0].llama_config.num_layers * self.lakes[0].kv_bytes
        most = len(request.tokens) - 1  # the last row is always computed
        prefixes = [min(self._held(lake, request), most) for lake in range(self.prefills)]
        longest = prefixes.index(max(prefixes))
        ttfts = []
        for lake, prefix in enumerate(prefixes):
            source = lake if prefixes[longest] <= self.BALANCING * prefix else longest
            new = len(request.tokens) - prefixes[source]
            copying = (prefixes[source] - prefix) * row_bytes / self.bandwidth
            computing = self.estimate(lake, new, prefixes[source])
            ttft = self.queue(lake, new) + copying + computing
            ttfts.append((ttft, lake, source))
        _, chosen, source = min(ttfts)
        return chosen, source

    def arrive(self, request):
        chosen, source = self.choose(request)
        if chosen != source:
            copy = self._copy_prefix(request, source, chosen)
            if copy is not None:
                return [copy]
        self.schedulers[chosen].add(request)
        return []

    def _copy_prefix(self, request: Request, source: int, target: int) -> Transfer | None:
        """Of the source's part of a prompt, which the target's scheduler gets when that has
        landed; None if the target is full."""
        holder = self.lakes[source].balancer
        matched = holder.match(request)
        stop = matched * self.segment_tokens

        def prefix():
            part = Request(-1, request.tokens[:stop], stop, request.salt)
            part.ids = request.ids[:matched]
            return part

        leaving = prefix()
        arriving = prefix()

        def add():
            self.lakes[target].balancer.release(arriving)
            self.schedulers[target].add(request)

        transfer = self._transfer(source, target, leaving, arriving, stop, add)
        if transfer:
            holder.admit(leaving, matched)
        return transfer

    # KV on its way.

    def _transfer(
        self, source, target, leaving, arriving, stop, when_landed
    ) -> Transfer | None:
        """Slots at the target for what it lacks of the first `stop` tokens; None if it is full."""
        balancer = self.lakes[target].balancer
        matched = balancer.match(arriving)
        if not balancer.fits(arriving, matched, self._promised(target, arriving)):
            return None
        balancer.admit(arriving, matched)
        start = arriving.done
        runs = balancer.reserve(arriving, stop - start, [0], [0], stop)
        if runs is None:
            balancer.release(arriving)
            return None
        streamed = stop - start
        return Transfer(
            source, target, leaving, arriving, start, stop, streamed, when_landed
        )

    def _promised(self, target: int, arriving: Request) -> int:
        """Slots that the answers of all who decode there, and of who arrives, will still take."""
        num_segments = self.lakes[target].balancer.num_segments
        slots = num_segments(arriving.max_tokens - 1) - num_segments(len(arriving.tokens))
        for request in self._decoding(target):
            slots += num_segments(request.max_tokens - 1) - request.num_slots
        return slots

    # Decodes.

    def _decoding(self, lake: int) -> list[Request]:
        """Who decodes at an instance, or is on the way there."""
        return self.schedulers[lake].running + self.flying[lake]

    def _least_loaded(self) -> int:
        """The decode instance with the fewest tokens."""

        def num_tokens(lake):
            return sum(len(request.tokens) for request in self._decoding(lake))

        return min(range(self.prefills, len(self.lakes)), key=num_tokens)

    def advance(self, lake):
        """Parked requests go on, the oldest first, as long as a decode instance has room."""
        parked = []
        for source in range(self.prefills):
            parked += [(request, source) for request in self.schedulers[source].parked]
        parked.sort(key=lambda pair: pair[0].id)
        transfers = []
        for request, source in parked:
            target = self._least_loaded()
            if len(self._decoding(target)) >= self.lakes[target].config.max_batch:
                break
            transfer = self._hand_over(request, source, target)
            if transfer is None:
                break
            if source == lake:
                self._stream(transfer)
            self.schedulers[source].parked.remove(request)
            self.flying[target].append(transfer.arriving)
            transfers.append(transfer)
        return transfers

    def _hand_over(self, request: Request, source: int, target: int) -> Transfer | None:
        """Of a prompt's KV to where it decodes; None if there is no room."""
        arriving = replace(
            request,
            ids=list(request.ids),
            segments=[],
            num_shared=0,
            num_slots=0,
            done=0,
            order=None,  # that is the other scheduler's
        )
        arriving.num_prompt = request.num_prompt

        def decode():
            self.flying[target].remove(arriving)
            self.schedulers[target].running.append(arriving)

        return self._transfer(
            source, target, request, arriving, request.num_prompt, decode
        )

    def _stream(self, transfer: Transfer):
        """It went layer by layer behind its prefill: only the last chunk's last layer is left."""
        lake = self.lakes[transfer.source]
        chunk = min(lake.config.chunk_tokens, transfer.stop - transfer.start)
        transfer.streamed = -(-chunk // lake.llama_config.num_layers)


# Variants of TokenLake, for ablations: what differs from its defaults.
VARIANTS = {
    "tokenlake": {},
    "hash": dict(placement="hash"),
    "unreplicated": dict(replicate_factor=0.0),
    "ship": dict(pull_tokens=0),
    "read-alone": dict(read_once=False),
}
# And lakes:KxM, pd:PxD.
POLICIES = (*VARIANTS, "tokenlake:auto", "tokenlake:even", "tokenlake:dp", "router")


def pd_counts(policy: str, N: int) -> tuple[int, int] | None:
    """P and D of `pd:PxD` and `tokenlake:pd:PxD`; None for others. Raises ValueError if they do
    not make N instances."""
    match = re.fullmatch(r"pd:(\d{1,4})x(\d{1,4})", policy.removeprefix("tokenlake:"))
    if match is None:
        return None
    prefills = int(match[1])
    decodes = int(match[2])
    if 0 in (prefills, decodes) or prefills + decodes != N:
        raise ValueError(
            f"{policy}: P + D = {N} instances, one at least of each, are expected"
        )
    return prefills, decodes


def count_lakes(policy: str, N: int) -> int:
    """Lakes that N instances are. Raises ValueError for another policy, or for one that is not for
    so many instances."""
    match = re.fullmatch(r"lakes:(\d{1,4})x(\d{1,4})", policy)
    if match:
        lakes = int(match[1])
        if lakes * int(match[2]) != N:
            raise ValueError(f"{policy}: K x M = {N} instances are expected")
        return lakes
    if pd_counts(policy, N) is None and policy not in POLICIES:
        raise ValueError(
            f"{cut(policy)}: no such policy; {', '.join(VARIANTS)}, tokenlake:SCHEDULER, "
            "lakes:KxM, router and pd:PxD are there, and each with :fcfs behind it"
        )
    is_pool = policy in VARIANTS or policy.startswith("tokenlake:")
    return 1 if is_pool else N


def make_fleet(
    policy: str,
    N: int,
    model,
    config: LakeConfig,
    slo: float | None = None,
    cluster=None,
    **options,
) -> Fleet:
    """A fleet of N instances: `tokenlake`, one of its variants (or a scheduler of its own, such as
    `tokenlake:pd:1x3`), `lakes:KxM`, `router`, or `pd:PxD`; all serve by patience, with `:fcfs`
    behind the name in order of arrival. config is that of one instance; slo: ms between tokens,
    which schedulers keep (not those of `pd:PxD`). Raises ValueError for another policy."""
    if policy.endswith(":fcfs"):
        by_urgency = policy.removesuffix(":fcfs")
        fleet = make_fleet(by_urgency, N, model, config, slo, cluster, **options)
        fleet.serve_in_order()
        return fleet
    num_lakes = count_lakes(policy, N)
    size = N // num_lakes  # instances of a lake
    variant = VARIANTS.get(policy, {})
    config = replace(config, max_batch=size * config.max_batch, **variant)
    lakes = []
    for first in range(0, N, size):
        instances = list(range(first, first + size))
        lakes.append(TokenLake(instances, model, config, cluster, **options))
    if policy.startswith("pd:"):
        return Disaggregated(lakes, prefills=pd_counts(policy, N)[0])

    def make_scheduler(lake):
        has_own = policy.startswith("tokenlake:")
        own = policy.removeprefix("tokenlake:") if has_own else "auto"
        return Scheduler(lake, policy=own, tbt_slo=slo)

    kind = Fleet if num_lakes == 1 else Router
    return kind(lakes, make_scheduler)


if __name__ == "__main__":
    print(__doc__)
