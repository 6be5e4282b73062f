"""Was what was served right? Every request again, without a cache, and how near it has to come.

Tokens alone tell little. In 16 bits one differs wherever two are near a tie, though nothing is
wrong; and where a segment was lost, most are the same. What tells is the *log-probability* of each
served token: everything that its row has read moves it.

Rounding moves it, too, and how far depends on the type, on the depth, and on the weights. So that
is measured, not assumed: the oracle computes each request twice, as the model does and in the next
wider type, a layer's weights at a time.

    served ──────────────── error ────────────────┐
                                                  ├─▶ in the wider type
    as the model does, alone ─── rounding ────────┘

If serving was right, both differ from the wider type by rounding, and so by as much: in root mean
square over the tokens of an answer, and the fewer these are, the more by chance (`limit`). In
float32 and float64 the tokens themselves have to be those of recomputation as well, but for ties.

The oracle shares no code with what it checks but the model's own: attention is PyTorch's, and no
rank checks its own work (`deal`).
"""

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from balancer import Request
from model import Llama, logprobs

# The type in which rounding is measured.
WIDER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}
# So far may the score of a served token be below the best one of recomputation. In 16 bits such a
# gap says nothing.
TIE = {torch.float32: 1e-3, torch.float64: 1e-9}
# What stands out in rounding: see `usual_rounding`.
RANKS_APART = 2
REQUESTS_APART = 4
ENOUGH_TOKENS = 32
RECORDED = 2.0**-24  # log-probabilities are kept in float32: so they are rounded, by this part


class Widened:
    """Weights in a wider type, each made when it is asked for: there is no second copy of all."""
    def __init__(self, weights, dtype):
        self.weights = weights
        self.dtype = dtype

    def __getattr__(self, name):
        return getattr(self.weights, name).to(self.dtype)

    @property
    def layers(self):
        return [Widened(layer, self.dtype) for layer in self.weights.layers]


class Recomputed(NamedTuple):
    """A request, served and computed again."""
    tokens: int  # of its answer
    gap: float  # logits: how far a served token's score is below the best one, at worst
    # Sums of squared differences from log-probabilities in the wider type:
    error: float  # of those that were served
    rounding: float  # of the model's own


@dataclass
class Verdict:
    """Of all requests that were recomputed."""
    recomputed: dict[int, Recomputed]  # by request id
    wrong: list[int]  # request ids, in order
    gap: float  # the largest
    error: float  # the largest of a request: root mean square over its tokens
    rounding: float  # the usual one: root mean square over tokens


def recompute(model: Llama, sampler, request: Request) -> Recomputed:
    """A request from nothing: one forward over prompt and answer gives what each token was drawn
    from. The higher the temperature, the less the gap notices."""
    tokens = request.tokens
    answer = range(request.num_prompt, len(tokens))  # positions
    rows = [position - 1 for position in answer]
    served = torch.tensor(tokens[request.num_prompt :], device=model.device)
    recorded = torch.tensor(request.logprobs, dtype=torch.float64)
    logits = model.forward_alone(tokens[:-1], rows)
    own = logprobs(logits, served).cpu().double()
    scores = sampler.scores(logits, [(request.id, position) for position in answer])
    gaps = scores.amax(-1) - scores.gather(1, served[:, None])[:, 0]
    widened = Llama(model.config, Widened(model.weights, WIDER[model.dtype]))
    wide = logprobs(widened.forward_alone(tokens[:-1], rows), served).cpu().double()
    return Recomputed(
        len(answer),
        float(gaps.max()),
        float((recorded - wide).square().sum()),
        float((own - wide).square().sum() + (RECORDED * wide).square().sum()),
    )


def limit(tokens: int) -> float:
    """How many times as large as rounding the error of so many tokens may be, both in root mean
    square. Errors are spread like a normal variable: one token of a thousand has more than three
    times the usual one, and the mean of n squares varies by 1/√n. The factor is chosen over 1,224
    right answers, whole and in parts (bench/NOTES.md)."""
    return max(2.0, 1 + 3 / math.sqrt(tokens))


def root_mean_square(squares: list[float], tokens: list[int]) -> float:
    """Of sums of squares over so many tokens."""
    return math.sqrt(sum(squares) / max(1, sum(tokens)))


def rounding_of(answers) -> float:
    return root_mean_square([a.rounding for a in answers], [a.tokens for a in answers])


def usual_rounding(by_rank: list[list[Recomputed]]) -> float:
    """Of all tokens, but for what stands out: or one that is wrong would excuse the others. A rank
    that rounds twice as much as another computes wrongly itself (few tokens do not tell); so may a
    request that rounds four times as much as most do."""
    by_rank = [[a for a in answers if math.isfinite(a.rounding)] for answers in by_rank]
    enough = [sum(a.tokens for a in answers) >= ENOUGH_TOKENS for answers in by_rank]
    of_rank = [rounding_of(answers) for answers in by_rank]
    most = RANKS_APART * min((x for x, told in zip(of_rank, enough) if told), default=math.inf)
    kept = [x <= most or not told for x, told in zip(of_rank, enough)]
    answers = [a for answers, keep in zip(by_rank, kept) if keep for a in answers]
    if not answers:
        return math.nan
    most = REQUESTS_APART * statistics.median(rounding_of([a]) for a in answers)
    return rounding_of([a for a in answers if rounding_of([a]) <= most])


def judge(by_rank: list[dict[int, Recomputed]], dtype) -> Verdict:
    """by_rank: what each rank has recomputed, by request id. A request is judged by the usual
    rounding, or by its own, if that is more: but not by much more."""
    recomputed = {id: answer for part in by_rank for id, answer in part.items()}
    rounding = usual_rounding([[*part.values()] for part in by_rank])
    errors = {}
    wrong = []
    for id, answer in sorted(recomputed.items()):
        errors[id] = root_mean_square([answer.error], [answer.tokens])
        own = min(rounding_of([answer]), REQUESTS_APART * rounding)
        # NaN is wrong, too.
        near = errors[id] <= limit(answer.tokens) * max(rounding, own)
        if not (near and answer.gap <= TIE.get(dtype, math.inf)):
            wrong.append(id)
    # Not Python's max: NaN, if there is one.
    largest = lambda values: float(torch.tensor([*values, 0.0], dtype=torch.float64).max())
    gap = largest(answer.gap for answer in recomputed.values())
    return Verdict(recomputed, wrong, gap, largest(errors.values()), rounding)


def verify(engine, requests: list[Request], on_progress) -> Verdict:
    """Each request is recomputed by one rank; after a signal, there are those done by then.
    Collective. engine: engine.Engine."""
    cluster = engine.cluster
    cluster.doing = "verifying"
    done = {}
    dealt = deal(requests, engine.computed, engine.sampled, cluster.size)
    for turn in range(max(map(len, dealt))):
        for request in dealt[cluster.rank][turn : turn + 1]:
            done[request.id] = recompute(engine.model, engine.sampler, request)
        on_progress(sum(len(share) > turn for share in dealt))
        stop = cluster.stop_asked_at is not None
        if any(asked for (asked,) in cluster.gather_integers([stop])):
            break
    return judge(cluster.gather_objects(done), engine.model.dtype)


def deal(requests, computed: Counter, sampled: Counter, num_ranks) -> list[list[Request]]:
    """Who recomputes what: lists of requests, by rank. No rank is to check its own work: if it is
    wrong in itself, it makes the same mistake again. So a request goes to a rank that has sampled
    no more than an even share of its answer; if possible, to one that has computed no more than an
    even share of its rows, too; and of these to the one with the least to do. computed, sampled:
    rows and tokens by request id and rank."""
    dealt = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks

    def even_share_at_most(done, request, ranks):
        own = [done[request.id, rank] for rank in range(num_ranks)]
        return [rank for rank in ranks if own[rank] * num_ranks <= sum(own)]

    for request in requests:
        others = even_share_at_most(sampled, request, range(num_ranks))
        others = even_share_at_most(computed, request, others) or others
        rank = min(others, key=lambda rank: tokens[rank])
        tokens[rank] += len(request.tokens)
        dealt[rank].append(request)
    return dealt


if __name__ == "__main__":
    print(__doc__)
