"""Llama without a cache: what does a transformer need from attention?

    tokens [T] ─ embed ─▶ x ─ norm ─ q, k, v ─ RoPE ─ attend(layer, q, kv) ─ o ─▶ + ─┐
                          ▲                                                          │ × L
                          └───────────────────── + ◀─ SwiGLU ─ norm ◀────────────────┘
                          x after L layers ─ norm ─ head ─▶ logits

The forward works on flat rows: T tokens with absolute positions, of any number of requests, in any
order. Projections, norms and FFN see rows one by one; only `attend` connects them, and the caller
supplies it. That is the whole seam that the pool needs: on one side a model that does not know
where its keys and values live, on the other a pool that knows of the model only how many layers and
heads it has.

`causal_attend` is the attend of one sequence alone. With it `--verify` and the tests recompute
whole requests, and `python model.py` answers a prompt, without any cache: slow, obvious, and the
oracle of all that is distributed.

Left out, and refused by name: tensor parallelism, quantisation, attention biases, sliding windows.

Notation: T rows · V vocabulary · L layers · H query heads · Hkv KV heads · D head dim.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from kernels import rotate, suits_triton
from work import run_lesson

# Keys of config.json that change what is computed, and the one value that each may have. An absent
# one counts as that, but for model_type.
SUPPORTED = dict(
    model_type="llama",
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    quantization_config=None,
    sliding_window=None,
    partial_rotary_factor=1,
)
# Keys of which transformers takes null for absent. On any other null it fails.
NULL_IS_ABSENT = (
    "dtype",
    "eos_token_id",
    "head_dim",
    "num_key_value_heads",
    "partial_rotary_factor",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "torch_dtype",
)
LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
# Files of a checkpoint. One has all weights, or an index names the file of each.
CONFIG = "config.json"
GENERATION = "generation_config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FOREIGN = (".bin", ".gguf", ".pt", ".pth")  # weights that are not read
LFS_POINTER = b"version https://git-lfs.github.com/"
SURROGATE = re.compile("[\ud800-\udfff]")
# organisation/model, as the hub names models.
HUB_NAME = re.compile(r"\w[\w.-]{,95}/\w[\w.-]{,95}", re.ASCII)
# Weights of no layer.
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
# Words of four bytes. The sum so far is multiplied by an odd number between chunks of so many: so
# their order counts.
CHUNK_WORDS = 1 << 18
MIXER = 0x9E3779B97F4A7C1
ORACLE_ROWS = 1024  # that `causal_attend` takes at a time
DRAWN_AT_ONCE = 1 << 24  # random numbers of a weight
COMPARED_AT_ONCE = 1 << 22  # values of head and embedding
NOT_FINITE = -1  # in place of a token, where logits are not finite
# Sizes of a config.json are below 2**48, so that products of a few stay exact and printable, and
# other numbers fit into float32.
LIMITS = {int: 2**48, float: 1e38}
# Every layer has nine tensors, each found by its name. The deepest models have a thousand layers.
MAX_LAYERS = 10_000


def require(ok, *said):
    """Raises ValueError if not ok. That is a user's mistake: one line that names file or option,
    and what is wrong."""
    if not ok:
        raise ValueError(": ".join(map(str, said)))


def cut(text, most=80) -> str:
    """Text that a user gave, in at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def shown(value) -> str:
    """A refused value, in at most 80 characters with the colon behind it."""
    try:
        return cut(repr(value), 79)
    except RecursionError:
        return "a value nested too deep"


def one_line(text) -> str:
    """The text with every character escaped that is not printable. Names may have line breaks, and
    surrogates, which cannot be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def dtype_name(dtype) -> str:
    """As --dtype and config.json have it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama. The defaults are the built-in model: small, yet with grouped KV heads, and
    deep enough that a wrong partial result changes its tokens."""
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 3
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 16
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: tuple | None = None  # llama3: the values of LLAMA3_SCALING
    tie_word_embeddings: bool = False
    max_positions: int = 8192
    eos_token_ids: tuple = (0,)
    dtype: str = "float32"

    @property
    def num_linear_parameters(self) -> int:
        """Weights that every row is multiplied with: all matrices but the embedding, the head
        included."""
        shapes = tensor_shapes(self).items()
        layers = [shape for name, shape in shapes if "layers" in name and len(shape) == 2]
        return self.vocab_size * self.hidden_size + sum(map(math.prod, layers))

    @property
    def num_parameters(self) -> int:
        """All weights: those of no layers, and of each layer as many as of the first."""
        outside, with_one = (
            sum(map(math.prod, tensor_shapes(replace(self, num_layers=n)).values()))
            for n in (0, 1)
        )
        return outside + self.num_layers * (with_one - outside)


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────


def read_json(file: Path, hint=""):
    """What a file holds. Raises ValueError naming the file; `hint` says more of one that is not
    there."""
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        more = hint if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"{file}: {error.strerror}{more}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from None


def require_folder(folder: Path):
    """Raises ValueError for a name of the hub, and for a folder of its cache, which has models
    deeper within."""
    is_name = not os.path.exists(folder) and HUB_NAME.fullmatch(str(folder))
    said = "no such folder, and nothing is downloaded: "
    said += f"`hf download {folder} --local-dir DIR`, then --model DIR"
    require(not is_name, folder, said)
    snapshots = folder / "snapshots"
    is_cache = os.path.isdir(snapshots) and not os.path.lexists(folder / CONFIG)
    said = "a folder of the hub's cache; a folder under its snapshots is expected"
    require(not is_cache, folder, f"{said} (snapshots/HASH)")


def without_nulls(values: dict) -> dict:
    """The values but for those null that count as absent."""
    return {
        key: value
        for key, value in values.items()
        if value is not None or key not in NULL_IS_ABSENT
    }


class ConfigFile:
    """The values of a config.json, or a generation_config.json, checked as they are asked for.
    Raises ValueError naming file and key."""
    def __init__(self, file: Path, hint=""):
        self.file = file
        values = read_json(file, hint)
        self.require(isinstance(values, dict), "a JSON object is expected")
        self.values = without_nulls(values)

    @cached_property
    def rope(self) -> dict:
        """RoPE's parameters stand in an object of their own. Of two, transformers takes the one
        with the older name."""
        rope = self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}
        said = f"rope parameters are {shown(rope)}; an object is expected"
        self.require(isinstance(rope, dict), said)
        return without_nulls(rope)

    def require(self, ok, said):
        require(ok, self.file, said)

    def get(self, key, kind: type, default=None, source=None):
        """The value of a key: a positive number, true or false, or a string. It is looked up in
        source, by default the whole file."""
        value = (self.values if source is None else source).get(key, default)
        is_whole = kind is float and type(value) is int
        ok = type(value) is kind or is_whole
        if ok and kind in LIMITS:
            ok = 0 < value < LIMITS[kind]
        wanted = {
            int: "a positive integer below 2**48",
            float: "a positive number below 1e38",
            bool: "true or false",
        }
        said = f"{key} is {shown(value)}; {wanted.get(kind, 'a string')} expected"
        self.require(ok, said)
        return float(value) if is_whole else value

    def require_supported(self):
        """Whatever would change what is computed has the only value that this code implements."""
        # The model_type is to be there.
        values = {"model_type": None} | self.values | self.rope
        for key, only in SUPPORTED.items():
            value = values.get(key, only)
            if isinstance(value, dict) and "quant_method" in value:
                # What matters most is shown first: the rest may be long.
                value = {"quant_method": value["quant_method"]} | value
            said = f"{key} {shown(value)} is not supported (only {only!r} is)"
            self.require(value == only, said)

    def rope_scaling(self) -> tuple | None:
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        said = f"rope_type {shown(kind)} is not supported (default, llama3 are)"
        self.require(kind in ("default", "llama3"), said)
        if kind == "default":
            return None
        scaling = tuple(self.get(key, float, source=self.rope) for key in LLAMA3_SCALING)
        _, low, high, original = scaling
        self.require(low < high, "low_freq_factor must be less than high_freq_factor")
        # Versions of transformers differ in which of two counts.
        key = LLAMA3_SCALING[-1]
        other = self.values.get(key, original)
        said = f"{key} is {shown(other)}, {original:g} in the rope parameters; one is expected"
        self.require(other == original, said)
        return scaling

    def heads(self):
        """Query heads, KV heads and head dim."""
        heads = self.get("num_attention_heads", int)
        kv_heads = self.get("num_key_value_heads", int, heads)
        said = f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        self.require(heads % kv_heads == 0, said)
        head_dim = self.get("head_dim", int, self.get("hidden_size", int) // heads)
        self.require(head_dim % 2 == 0, f"head_dim {head_dim} is odd; RoPE rotates pairs")
        return heads, kv_heads, head_dim

    def eos_token_ids(self) -> tuple:
        eos = self.values.get("eos_token_id")
        tokens = [] if eos is None else eos if isinstance(eos, list) else [eos]
        ok = all(type(token) is int and token >= 0 for token in tokens)
        said = f"eos_token_id is {shown(tokens)}; null, token ids or one are expected"
        self.require(ok, said)
        return tuple(tokens)

    def num_layers(self) -> int:
        layers = self.get("num_hidden_layers", int)
        said = f"num_hidden_layers is {layers}; at most {MAX_LAYERS} layers are supported"
        self.require(layers <= MAX_LAYERS, said)
        return layers


def load_config(folder: Path) -> LlamaConfig:
    """Reads `folder/config.json`, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`,
    `torch_dtype`) or 5 (`rope_parameters`, `dtype`). Raises ValueError naming the key at fault.
    Whether tied embeddings are, only the weights show: see `with_own_head`."""
    require_folder(folder)
    is_folder = os.path.exists(folder)
    hint = "a Hugging Face model folder has this file" if is_folder else "no such folder"
    file = ConfigFile(folder / CONFIG, f" ({hint})")
    file.require_supported()
    rope_scaling = file.rope_scaling()
    heads, kv_heads, head_dim = file.heads()
    return LlamaConfig(
        vocab_size=file.get("vocab_size", int),
        hidden_size=file.get("hidden_size", int),
        intermediate_size=file.get("intermediate_size", int),
        num_layers=file.num_layers(),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=file.get("rms_norm_eps", float, 1e-6),
        rope_theta=file.get("rope_theta", float, 10_000.0, file.values | file.rope),
        rope_scaling=rope_scaling,
        tie_word_embeddings=file.get("tie_word_embeddings", bool, False),
        max_positions=file.get("max_position_embeddings", int, 2048),
        eos_token_ids=end_tokens(file),
        dtype=file.get("dtype", str, file.values.get("torch_dtype", "float32")),
    )


def end_tokens(config: ConfigFile) -> tuple:
    """Those of config.json, then those of the generation_config.json beside it. Some models name
    the end of a turn in the second alone."""
    files = [config]
    generation = config.file.with_name(GENERATION)
    # A link to nothing is there, too, and refused.
    if os.path.lexists(generation):
        files.append(ConfigFile(generation))
    tokens = [token for file in files for token in file.eos_token_ids()]
    return tuple(dict.fromkeys(tokens))


def tensor_shapes(config) -> dict[str, tuple]:
    """Every weight by its Hugging Face name. Linear weights are [out, in]."""
    hidden = config.hidden_size
    ffn = config.intermediate_size
    q = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes |= zip(_names(i, layer), layer.values())
    shapes[NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


class Layer(NamedTuple):
    """Weights of a layer. Those that take the same input are one matrix, for one product."""
    attention_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(H + 2·Hkv)·D, hidden]
    o: torch.Tensor  # [hidden, H·D]
    ffn_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2·FFN, hidden]
    down: torch.Tensor  # [hidden, FFN]


# What a checkpoint has in place of each, one after another.
PARTS = Layer(
    attention_norm=["input_layernorm"],
    qkv=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    o=["self_attn.o_proj"],
    ffn_norm=["post_attention_layernorm"],
    gate_up=["mlp.gate_proj", "mlp.up_proj"],
    down=["mlp.down_proj"],
)


class Weights(NamedTuple):
    """All of a Llama."""
    embedding: torch.Tensor  # [V, hidden]
    layers: list[Layer]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [V, hidden], or the embedding again

    @classmethod
    def empty(cls, config, dtype, device) -> "Weights":
        shapes = tensor_shapes(config)

        def make(*names):
            rows = sum(shapes[name][0] for name in names)
            return torch.empty(rows, *shapes[names[0]][1:], dtype=dtype, device=device)

        embedding = make(EMBEDDING)
        layers = [
            Layer(*(make(*_names(number, parts)) for parts in PARTS))
            for number in range(config.num_layers)
        ]
        head = embedding if config.tie_word_embeddings else make(HEAD)
        return cls(embedding, layers, make(NORM), head)

    def by_name(self, config) -> dict[str, torch.Tensor]:
        """Views of them, as a checkpoint has them: see `tensor_shapes`."""
        shapes = tensor_shapes(config)
        views = {EMBEDDING: self.embedding, NORM: self.norm, HEAD: self.head}
        for number, layer in enumerate(self.layers):
            for joined, parts in zip(layer, PARTS):
                names = _names(number, parts)
                rows = [shapes[name][0] for name in names]
                views |= zip(names, joined.split(rows))
        return {name: views[name] for name in shapes}


def _names(layer, parts):
    return [f"model.layers.{layer}.{part}.weight" for part in parts]


# ── random numbers ───────────────────────────────────────────────────────────────────────────────
#
# SplitMix64 (Steele, Lea, Flood 2014), by counter: number i of a stream is a hash of i and the
# stream's key. So numbers are drawn where they are wanted, in any order, the same on every device.

GENERATOR = "SplitMix64"
GAMMA = 0x9E3779B97F4A7C15
MIXERS = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)


def signed(bits: int) -> int:
    """64 bits as PyTorch's int64 has them."""
    return (bits + 2**63) % 2**64 - 2**63


def mix(bits):
    """[n] int64, to be overwritten → [n] int64: every bit of the one turns half of the other's."""
    for shift, factor in MIXERS:
        # Without the mask, as the shift of a signed number copies its sign.
        bits ^= (bits >> shift) & (1 << (64 - shift)) - 1
        bits *= signed(factor)
    return bits


def streams(names):
    """Keys of streams for `draw`: [n, parts of a name] int64 → [n]."""
    key = torch.zeros_like(names[:, 0])
    for part in names.unbind(1):
        key = mix(key + part + signed(GAMMA))
    return key


def draw(keys, count, first=0):
    """Numbers `first` and on of n streams: [n] → [n, count], integers of 52 bits."""
    number = torch.arange(first, first + count, device=keys.device)
    bits = mix(keys[:, None] + (number + 1) * signed(GAMMA))
    return (bits >> 12) & (1 << 52) - 1


def random_weights(config, seed, dtype, device) -> Weights:
    """Seeded weights, uniform, and the same for every device; other types round them.

    They are made so that what a row reads shows in its logits, and rounding does not grow into more
    than that, at any depth. Large embeddings keep the rows of a deep model apart, where attention
    would make them alike; large outputs of attention, next to small ones of the FFN, make a lost
    segment count; attention that is a little peaky weighs segments unlike. (Much peakier, it is
    chaotic: a model of 16 layers turns one rounding into another answer.)"""
    scales = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 4.0, "down_proj": 0.5}
    weights = Weights.empty(config, dtype, device)
    for number, (name, weight) in enumerate(weights.by_name(config).items()):
        if weight.ndim == 1:
            weight.fill_(1)
            continue
        deviation = scales.get(name.split(".")[-2], 1.0) / math.sqrt(weight.shape[-1])
        if name == EMBEDDING and not config.tie_word_embeddings:
            deviation = 3.0
        draw_weight(weight, streams(torch.tensor([[seed, number]], device=device)), deviation)
    return weights


def draw_weight(weight, key, deviation):
    """Fills it with numbers between ±√3 deviations: exact in float32 but for one product."""
    first = 0
    for part in weight.view(-1).split(DRAWN_AT_ONCE):
        bits = draw(key, len(part), first)[0] >> 29
        centred = bits.float() * 2.0**-22 - (1 - 2.0**-23)  # between ±1
        part.copy_(centred * (math.sqrt(3) * deviation))
        first += len(part)


# ── weights of a checkpoint ──────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def opened(file: Path):
    """A safetensors file, to read single tensors from. Raises ValueError if it is damaged."""
    try:
        with safe_open(file, "pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        said = f"damaged or not a safetensors file ({cut(str(error))})"
        if is_lfs_pointer(file):
            said = "a pointer of Git LFS, not the file itself; `git lfs pull` gets that"
        raise ValueError(f"{file}: {said}") from None


def is_lfs_pointer(file: Path) -> bool:
    with contextlib.suppress(OSError), open(file, "rb") as start:
        return start.read(len(LFS_POINTER)) == LFS_POINTER
    return False


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of every stored tensor: `model.safetensors`, or else what the index names. Raises
    ValueError: no weights, not an index, one that leaves the folder, a missing file or tensor."""
    whole = folder / WHOLE
    index = folder / INDEX
    if index.exists() and not whole.exists():
        return indexed_files(index)
    require(os.path.isfile(whole), whole, "no such file" + other_weights(folder))
    with opened(whole) as content:
        return dict.fromkeys(content.keys(), whole)


def other_weights(folder: Path) -> str:
    """In brackets, what there is in place of weights that can be read."""
    names = sorted(file.name for file in folder.glob("*") if file.is_file())
    shards = [cut(name) for name in names if name.endswith(".safetensors")]
    foreign = [cut(name) for name in names if name.endswith(FOREIGN)]
    if shards:
        return f" (there is {shards[0]}, but no {INDEX})"
    if foreign:
        return f" (there is {foreign[0]}; safetensors are expected)"
    return ""


def indexed_files(index: Path) -> dict[str, Path]:
    """The file of every tensor that an index names. What else its files hold does not count: it may
    be a copy from before."""
    try:
        weight_map = read_json(index)["weight_map"]
        names = sorted(set(weight_map.values()))
    except (KeyError, TypeError, AttributeError):
        said = "not a safetensors index; a weight_map of tensors to files is expected"
        raise ValueError(f"{index}: {said}") from None
    for name in names:
        # A file of the folder may be a link to elsewhere, as it is in the hub's cache.
        inside = isinstance(name, str) and Path(name).name == name
        said = f"names the file {shown(name)}, which is outside the folder"
        require(inside, index, said)
        # os.path's answer is no, also to a name that no file can have.
        is_file = os.path.isfile(index.parent / name)
        require(is_file, index.parent / cut(name), "no such file")
        require_held(index, [key for key in weight_map if weight_map[key] == name], name)
    return {key: index.parent / name for key, name in weight_map.items()}


def require_held(index: Path, keys, name):
    """Raises ValueError if a file lacks a tensor that the index promises."""
    with opened(index.parent / name) as content:
        lacking = set(keys) - set(content.keys())
    said = f"{cut(min(lacking, default=''))} is not in {cut(name)}, where it is expected"
    require(not lacking, index, said)


class Stored(NamedTuple):
    """Where a tensor is, and what it is called there."""
    file: Path
    key: str

    def read(self) -> torch.Tensor:
        with opened(self.file) as content:
            return content.get_tensor(self.key)


def stored_tensors(folder: Path, config) -> dict[str, Stored]:
    """The tensors of a folder by the names that they have here: see `tensor_shapes`."""
    files = weight_files(folder)
    # A model that was saved without its head, and maybe got one again, has no prefix.
    prefix = "" if any(key.startswith("model.") for key in files) else "model."
    names = {key: key if key == HEAD else prefix + key for key in files}
    stored = {names[key]: Stored(file, key) for key, file in files.items()}
    # Of two tensors that are one, some programs save the first by name.
    if config.tie_word_embeddings and HEAD in stored:
        stored.setdefault(EMBEDDING, stored[HEAD])
    return stored


def with_own_head(folder: Path, config):
    """The config, no longer tied if the folder has a head that differs from the embedding. Such a
    head counts, as in transformers. To be called before memory is checked."""
    if not config.tie_word_embeddings:
        return config
    stored = stored_tensors(folder, config)
    if HEAD not in stored or stored[HEAD] == stored[EMBEDDING]:
        return config
    same = are_equal(stored[HEAD].read(), stored[EMBEDDING].read())
    return config if same else replace(config, tie_word_embeddings=False)


def are_equal(a, b) -> bool:
    """Whether two tensors, of any types, have the same values."""
    # float64 holds those of every type. It is large: so many at a time.
    parts = zip(*(x.flatten().split(COMPARED_AT_ONCE) for x in (a, b)))
    return a.shape == b.shape and all(torch.equal(x.double(), y.double()) for x, y in parts)


def load_weights(folder: Path, config, dtype, device) -> Weights:
    """The weights of a folder. ValueError, besides those of `weight_files`: a missing, misshapen
    or unknown tensor, values that are not finite, a damaged file, a head that would be lost."""
    is_whole = with_own_head(folder, config) == config
    said = f"{HEAD} is not the embedding; the config of `with_own_head` is expected"
    require(is_whole, folder, said)
    stored = stored_tensors(folder, config)
    require_known(folder, config, stored)
    weights = Weights.empty(config, dtype, device)
    views = weights.by_name(config)
    for file in sorted({stored[name].file for name in views}):
        with opened(file) as content:
            for name, view in views.items():
                where, key = stored[name]
                if where == file:
                    _fill(view, content.get_tensor(key), f"{file}: {key}")
    return weights


def require_known(folder, config, stored):
    """Raises ValueError unless all tensors of a model are there, and no others."""
    names = tensor_shapes(config)
    for name, (file, key) in stored.items():
        # The head of a model with tied embeddings, and angles that are computed here.
        unused = name == HEAD or name.endswith("rotary_emb.inv_freq")
        said = f"{cut(key)} is not a tensor of a Llama of {config.num_layers} layers"
        require(name in names or unused, file, said)
    missing = [name for name in names if name not in stored]
    if missing == [HEAD]:
        said = f"{HEAD} is missing, and {CONFIG} does not say tie_word_embeddings true"
        raise ValueError(f"{folder}: {said}")
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is missing ({len(missing)} tensors are)")


def checksums(weights: dict) -> dict[str, int]:
    """A number of each weight, made of all its bits: the same on every device, where a sum of
    floats is not. Each four bytes, as an integer, are multiplied by an odd number of their own, so
    that rows that change places show, too. The sum has 64 bits: no single bit is lost in it."""
    sums = {}
    device = next(iter(weights.values())).device
    odd = 2 * torch.arange(CHUNK_WORDS, device=device) + 1
    for name, weight in weights.items():
        content = weight.detach().flatten().view(torch.uint8)
        if padding := -len(content) % 4:
            content = F.pad(content, (0, padding))
        words = content.view(torch.int32)
        total = odd.new_zeros(())
        for chunk in words.split(CHUNK_WORDS):
            total = total * MIXER + (chunk * odd[: len(chunk)]).sum()
        sums[name] = int(total)
    return sums


def _fill(weight, tensor, where):
    """A weight of a file. It has its shape, and fits the dtype: an infinite one makes every answer
    wrong."""
    found = tuple(tensor.shape)
    wanted = tuple(weight.shape)
    said = f"{where} has the shape {shown(found)}, config.json makes it {wanted}"
    require(found == wanted, said)
    weight.copy_(tensor)
    said = f"{where} has values that are not finite in {dtype_name(weight.dtype)}"
    require(weight.isfinite().all(), said)


# ── the model ────────────────────────────────────────────────────────────────────────────────────


def causal_attend(layer, q, kv):
    """Attention of one sequence alone: row t sees rows 0..t.
    q [T, H, D] and kv [T, 2, Hkv, D] → [T, H, D]. PyTorch's, so that the oracle shares no code with
    what it is to check."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, *kv.unbind(1)))  # [1, heads, T, D]
    if q.dtype.itemsize == 2 or q.shape[2] <= ORACLE_ROWS:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)
    # In wide types a GPU would hold all T × T scores at once: so many rows at a time.
    parts = []
    position = torch.arange(q.shape[2], device=q.device)
    for first in range(0, q.shape[2], ORACLE_ROWS):
        end = min(first + ORACLE_ROWS, q.shape[2])
        sees = position[first:end, None] >= position[:end]
        some = q[:, :, first:end], k[:, :, :end], v[:, :, :end]
        parts.append(F.scaled_dot_product_attention(*some, attn_mask=sees, enable_gqa=True))
    return torch.cat(parts, 2)[0].transpose(0, 1)


def rope_frequency(config) -> torch.Tensor:
    """[D/2] angle that each pair turns by per position, in float32 whatever the dtype, as
    checkpoints were trained."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if not config.rope_scaling:
        return frequency
    # llama3: stretch waves longer than the original context, keep short ones, else blend.
    factor, low, high, original = config.rope_scaling
    turns = original * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / factor


def rope(x, cos, sin):
    """Rotates (x[i], x[i + D/2]) by its row's angle, in place. x [T, heads, D]; cos, sin
    [T, D/2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = a * cos - b * sin
    b.copy_(b * cos + a * sin)
    a.copy_(rotated)


class Llama:
    def __init__(self, config, weights: Weights):
        self.config = config
        self.weights = weights
        self.dtype = weights.norm.dtype
        self.device = weights.norm.device
        self.frequency = rope_frequency(config).to(self.device)
        use_triton = suits_triton(self.device, self.dtype, config.head_dim)
        self.rope = rotate if use_triton else rope

    @torch.inference_mode()
    def forward(self, tokens, positions, attend, wanted=None, rope=None):
        """tokens, positions [T] int64 → logits [T, V], or [len(wanted), V] for the wanted rows.

        `attend(layer, q [T, H, D], kv [T, 2, Hkv, D]) -> [T, H, D]` is called once per layer, also
        when T is 0: a rank without rows still holds cache that others read. kv is a row's key and
        value side by side, as a slab has them. rope: in place of what is fastest here."""
        rope = rope or self.rope
        weights = self.weights
        config = self.config
        H = config.num_heads
        Hkv = config.num_kv_heads
        shape = len(tokens), H + 2 * Hkv, config.head_dim
        angle = positions[:, None].float() * self.frequency  # [T, D/2]
        cos = angle.cos().to(self.dtype)
        sin = angle.sin().to(self.dtype)
        x = F.embedding(tokens, weights.embedding)  # [T, hidden]
        for number, layer in enumerate(weights.layers):
            h = self._norm(x, layer.attention_norm)
            qkv = F.linear(h, layer.qkv).view(shape)
            rope(qkv[:, : H + Hkv], cos, sin)
            kv = qkv[:, H:].unflatten(1, (2, Hkv))
            out = attend(number, qkv[:, :H], kv)
            x = x + F.linear(out.flatten(1), layer.o)
            h = self._norm(x, layer.ffn_norm)
            gate, up = F.linear(h, layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        if wanted is not None:
            x = x[wanted]
        return F.linear(self._norm(x, weights.norm), weights.head)

    def _norm(self, x, weight):
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def forward_alone(self, tokens: list[int], rows=None):
        """Logits of one sequence from nothing: no cache, no neighbours, no kernel of ours. The
        oracle's forward."""
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        positions = torch.arange(len(tokens), device=self.device)
        return self.forward(ids, positions, causal_attend, rows, rope)


@dataclass(frozen=True)
class Sampler:
    """The token with the best score, logits + temperature · Gumbel noise: a draw from
    softmax(logits / temperature), greedy at 0. The noise is seeded by (seed, request, position), so
    the draw is the same wherever and in whatever batch the row is computed."""
    temperature: float = 0.0
    seed: int = 0

    def scores(self, logits, keys):
        """logits [n, V], keys n pairs (request, position) → [n, V]; the argmax is the token."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.temperature or not keys:
            return logits
        names = torch.tensor([(self.seed, *key) for key in keys], device=logits.device)
        drawn = draw(streams(names), logits.shape[-1])
        uniform = (drawn.double() + 0.5) * 2.0**-52  # between 0 and 1, both left out
        noise = -torch.log(-torch.log(uniform))
        return logits + self.temperature * noise.to(logits)

    def sample(self, logits, keys):
        """The token of each row of logits, NOT_FINITE where the best score is not finite, and its
        log-probability: the model's own, before temperature and noise. [n], [n]; a caller that asks
        for their values waits for the device."""
        best, token = self.scores(logits, keys).max(-1)
        return torch.where(best.isfinite(), token, NOT_FINITE), logprobs(logits, token)


def logprobs(logits, tokens):
    """The log-probability of a token for each row: [n, V], [n] → [n], in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


# ── text ─────────────────────────────────────────────────────────────────────────────────────────


class Text:
    """Prompts and answers as text, by the tokenizer of a model's folder: it is loaded when a trace
    first asks for it, and the package `tokenizers` is needed only then. No chat templates."""
    def __init__(self, folder: Path | None):
        self.folder = folder
        self._tokenizer = None

    @property
    def is_used(self) -> bool:
        return self._tokenizer is not None

    def encode(self, text: str, begins: bool) -> list[int]:
        """Token ids; with the special ones of a beginning where a session begins. Raises ValueError
        if there is no tokenizer."""
        self._tokenizer = self._tokenizer or self._load()
        said = "prompt has half of a character (a surrogate); text is expected"
        require(not SURROGATE.search(text), said)
        return self._tokenizer.encode(text, add_special_tokens=begins).ids

    def decode(self, ids: list[int]) -> str:
        """Text, without special tokens."""
        self._tokenizer = self._tokenizer or self._load()
        return self._tokenizer.decode(ids)

    def _load(self):
        expected = "token ids (input_ids) are expected"
        said = f"prompt is text, and the built-in model has no tokenizer; {expected}"
        require(self.folder, said)
        file = self.folder / "tokenizer.json"
        require(os.path.isfile(file), f"prompt is text, and there is no {file}; {expected}")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            said = "prompt is text; `pip install tokenizers`, or token ids (input_ids),"
            raise ValueError(f"{said} are expected") from None
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package has no type of its own
            raise ValueError(f"{file}: not a tokenizer: {cut(str(error))}") from None
        # Files have these for training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


# ── the lesson, run: an answer without any cache ─────────────────────────────────────────────────


def token_ids(text) -> list[int]:
    """The type of --prompt-ids."""
    if not re.fullmatch(r"\d{1,15}(,\d{1,15})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{shown(text)}: token ids, by commas, are expected"
        )
    return [int(token) for token in text.split(",")]


def positive(text) -> int:
    """The type of --max-tokens."""
    if not re.fullmatch(r"[1-9]\d{0,8}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{shown(text)}: a positive integer is expected")
    return int(text)


def folder_name(text) -> Path:
    """The type of --model."""
    if not 0 < len(text) < 1000 or "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text)}: a folder is expected")
    return Path(text)


class OptionParser(argparse.ArgumentParser):
    """What it refuses is a ValueError that names the option."""
    def parse_args(self, arguments):
        for text in arguments:
            # argparse takes that for no value at all.
            ok = not re.fullmatch("--[^=]+=--", text)
            require(ok, f"{cut(text)}: a value is expected")
        return super().parse_args(arguments)

    def error(self, message):
        """argparse quotes arguments of any length."""
        words = message.removeprefix("argument ").split(" ")
        require(False, cut(" ".join(map(cut, words)), 200))


def parse_options(arguments) -> argparse.Namespace:
    """The command line. Raises ValueError naming the option."""
    description = "Answer a prompt greedily, without any cache, in float32 on the CPU."
    parser = OptionParser("model.py", description=description)
    prompt = "of the prompt, by commas (default 9,8,7,6)"
    parser.add_argument(
        "--prompt-ids", type=token_ids, default=[9, 8, 7, 6], metavar="I,I,…", help=prompt
    )
    folder = (
        "Hugging Face folder of a Llama; default: the built-in model, with random weights"
    )
    parser.add_argument("--model", type=folder_name, metavar="DIR", help=folder)
    count = "of the answer (default 8)"
    parser.add_argument("--max-tokens", type=positive, default=8, metavar="N", help=count)
    return parser.parse_args(arguments)


def load_model(folder: Path | None) -> Llama:
    """In float32, on the CPU."""
    where = torch.float32, "cpu"
    if folder is None:
        return Llama(LlamaConfig(), random_weights(LlamaConfig(), 0, *where))
    config = with_own_head(folder, load_config(folder))
    return Llama(config, load_weights(folder, config, *where))


def check_lengths(options, config):
    """Raises ValueError if the model has not so many tokens, or positions."""
    largest = max(options.prompt_ids)
    said = f"token {largest}; ids below the model's {config.vocab_size} are expected"
    require(largest < config.vocab_size, "--prompt-ids", said)
    total = len(options.prompt_ids) + options.max_tokens
    said = f"{total} tokens with the prompt; at most {config.max_positions} are expected"
    require(total <= config.max_positions, "--max-tokens", said)


def show_answer(options):
    """Each token takes a forward over all before it, of which the last row's logits count."""
    model = load_model(options.model)
    check_lengths(options, model.config)
    text = Text(options.model)
    has_text = options.model and os.path.isfile(options.model / "tokenizer.json")
    has_text = has_text and importlib.util.find_spec("tokenizers")
    prompt = options.prompt_ids
    print(f"prompt: {prompt}" + (f" {text.decode(prompt)!r}" if has_text else ""))
    print("position  token  log-probability")
    tokens = [*prompt]
    rows = 0
    for position in range(len(prompt), len(prompt) + options.max_tokens):
        token, logprob = Sampler().sample(model.forward_alone(tokens, [-1]), [])
        require(token != NOT_FINITE, "the logits are not finite")
        print(f"{position:>8}  {int(token):>5}  {float(logprob):>15.4f}")
        rows += len(tokens)
        tokens.append(int(token))
    answer = tokens[len(prompt) :]
    print(f"answer: {answer}" + (f" {text.decode(answer)!r}" if has_text else ""))
    print(
        f"{rows} rows were computed; with a cache it would have been {len(tokens) - 1}."
    )
    print("Next: engine.py, where attend is that of a pool.")


if __name__ == "__main__":
    try:
        run_lesson(show_answer, parse_options(sys.argv[1:]))
    except ValueError as problem:
        print(f"model.py: {cut(one_line(problem), 300)}", file=sys.stderr)
        raise SystemExit(2) from None
