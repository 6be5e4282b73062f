"""How fast can one be with Hugging Face transformers? The peer of bench/peers.py, in three ways.

    generate   generate() as a user calls it, over batches or one request at a time; its cache is
               copied at every token, to grow
    hand       a greedy loop made by hand over batches, with a cache that is written in place
    prefix     the same, and a prefix that requests share is computed once: its KV is repeated over
               a batch of requests that share it

Prompts of one batch may differ in length: then they are padded on the left. All have as many
tokens of answer, so that no row of a batch waits for another.
"""

import inspect
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.utils import logging

PADDING = 0  # a token that is never seen


class Load(NamedTuple):
    """Requests that are there from the start: [n] each."""
    prompts: list[list[int]]
    prefix: list[int]  # which one a prompt begins with
    prefix_tokens: int
    output_tokens: int


class InPlaceCache(DynamicCache):
    """Keys and values [batch, Hkv, room, D] of each layer, with room for all from the start."""
    def __init__(self, room):
        super().__init__()
        self.room = room
        self.slabs = []  # by layer: keys and values
        self.lengths = []  # by layer: tokens that are there

    def update(self, key_states, value_states, layer_idx, *_, **__):
        """Appends; returns all keys and values of the layer."""
        if layer_idx == len(self.slabs):
            batch, heads, _, head_dim = key_states.shape
            shape = batch, heads, self.room, head_dim
            self.slabs.append((key_states.new_empty(shape), key_states.new_empty(shape)))
            self.lengths.append(0)
        first = self.lengths[layer_idx]
        end = first + key_states.shape[2]
        self.lengths[layer_idx] = end
        for slab, states in zip(self.slabs[layer_idx], (key_states, value_states)):
            slab[:, :, first:end] = states
        keys, values = self.slabs[layer_idx]
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx=0):
        return self.lengths[layer_idx] if layer_idx < len(self.lengths) else 0

    def get_mask_sizes(self, query_length, layer_idx=0):
        """Tokens that are there after the next update, and how many were dropped before them."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def crop_to(self, length):
        self.lengths = [length] * len(self.slabs)

    def repeated(self, batch):
        """A cache for `batch` rows that all begin as the one of this cache."""
        wide = InPlaceCache(self.room)
        for layer, slabs in enumerate(self.slabs):
            length = self.lengths[layer]
            keys, values = (x[:, :, :length].expand(batch, -1, -1, -1) for x in slabs)
            wide.update(keys, values, layer)
        return wide


class Peer:
    """A checkpoint in transformers, which answers a load."""
    def __init__(self, folder, load, device, dtype, threads):
        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()
        # All that a checkpoint says of sampling and of ends is replaced.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=load.output_tokens,
            pad_token_id=PADDING,
        )
        self.load = load
        self.device = device
        # Versions differ in what they call a cache.
        known = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"

    def warm_up(self):
        """What only happens once is not measured: a request for each way."""
        whole = self.load
        self.load = Load(whole.prompts[:1], [0], whole.prefix_tokens, 2)
        for way in ("generate", "hand", "prefix"):
            self.timed(way, 1)
        self.load = whole

    def timed(self, way, batch):
        """Seconds, and the answers by request: way `generate`, `hand` or `prefix`."""
        begun = time.perf_counter()
        answers = {}
        for chosen, tokens in getattr(self, "_by_" + way)(batch):
            answers |= zip(chosen, tokens.tolist())  # waits for a GPU, too
        seconds = time.perf_counter() - begun
        return seconds, [answers[index] for index in range(len(answers))]

    # ── the ways: each yields requests, and their answers [batch, output tokens] ──

    def _by_generate(self, batch):
        for chosen in cut(range(len(self.load.prompts)), batch):
            ids, mask = self._pad([self.load.prompts[index] for index in chosen])
            out = self.model.generate(ids, attention_mask=mask)
            yield chosen, out[:, ids.shape[1] :]

    def _by_hand(self, batch):
        for chosen in cut(range(len(self.load.prompts)), batch):
            prompts = [self.load.prompts[index] for index in chosen]
            cache = InPlaceCache(max(map(len, prompts)) + self.load.output_tokens)
            yield chosen, self._decode(*self._pad(prompts), cache)

    def _by_prefix(self, batch):
        load = self.load
        room = max(map(len, load.prompts)) + load.output_tokens
        for prefix in sorted(set(load.prefix)):
            alike = [index for index, other in enumerate(load.prefix) if other == prefix]
            shared = load.prompts[alike[0]][: load.prefix_tokens]
            narrow = InPlaceCache(room)
            self._forward(torch.tensor([shared], device=self.device), narrow)
            caches = {}  # by size of the batch: one is used again
            for chosen in cut(alike, batch):
                size = len(chosen)
                if size not in caches:
                    caches[size] = narrow.repeated(size)
                cache = caches[size]
                cache.crop_to(load.prefix_tokens)
                own = [load.prompts[index][load.prefix_tokens :] for index in chosen]
                yield chosen, self._decode(*self._pad(own), cache)

    # ── their steps ──

    def _pad(self, prompts):
        """ids and mask [batch, the longest], padded on the left."""
        longest = max(map(len, prompts))
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        padded = [[PADDING] * (longest - len(ids)) + ids for ids in prompts]
        mask = torch.arange(longest) >= longest - lengths
        return torch.tensor(padded, device=self.device), mask.long().to(self.device)

    @torch.inference_mode()
    def _forward(self, ids, cache, mask=None):
        """The best next token of each row: [batch, 1]. mask: of what is cached, too; None where
        all rows see all, which is faster."""
        positions = None
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: cache},
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _decode(self, ids, mask, cache):
        """Greedy answers [batch, output tokens] to prompts whose beginning may be cached."""
        mask = F.pad(mask, (cache.get_seq_length(), 0), value=1)
        padded = not mask.all()
        tokens = []
        for _ in range(self.load.output_tokens):
            ids = self._forward(ids, cache, mask if padded else None)
            mask = F.pad(mask, (0, 1), value=1)
            tokens.append(ids)
        return torch.cat(tokens, 1)

    @torch.inference_mode()
    def score_gap(self, request, answer, other) -> float:
        """How far the logits of two tokens are below the best, at worst: those that follow the
        prompt and the tokens that two answers begin with alike. Recomputed without a cache.
        """
        alike = first_difference(answer, other)
        ids = self.load.prompts[request] + answer[:alike]
        out = self.model(
            input_ids=torch.tensor([ids], device=self.device), logits_to_keep=1
        )
        logits = out.logits[0, -1].float()
        return float(logits.max() - logits[[answer[alike], other[alike]]].min())


def cut(items, size) -> list:
    """Batches of at most so many."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def first_difference(answer, other) -> int:
    return next(i for i, pair in enumerate(zip(answer, other)) if pair[0] != pair[1])


if __name__ == "__main__":
    print(__doc__)
