"""Llama without a cache: what does a transformer need from attention?

    tokens [T] ─ embed ─▶ x ─ norm ─ q, k, v ─ RoPE ─ attend(layer, q, k, v) ─ o ─▶ + ─┐
                          ▲                                                            │ × L
                          └────────────────────── + ◀─ SwiGLU ─ norm ◀─────────────────┘
                          x after L layers ─ norm ─ head ─▶ logits

The forward works on flat rows: T tokens with absolute positions, of any number of requests, in any
order. Projections, norms and FFN see rows one by one; only `attend` connects them, and the caller
supplies it. That is the whole seam the segment pool needs: on one side a model that does not know
where its keys and values live, on the other a pool that does not know what a layer is.

`causal_attend` is the attend of one sequence alone. With it the tests recompute everything for each
token, without any cache: slow, obvious, and the oracle of all that is distributed.

Left out, and refused by name: tensor parallelism, quantisation, attention biases, sliding windows.

Notation: T rows · V vocabulary · L layers · H query heads · Hkv KV heads · D head dim.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

# Keys of config.json that change what is computed: the one value each may have, also if absent.
SUPPORTED = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False,
                 quantization_config=None, sliding_window=None, partial_rotary_factor=1)


def require(ok, *said):
    """A ValueError is a user's mistake: one line that names file or option, and what is wrong."""
    if not ok:
        raise ValueError(": ".join(map(str, said)))


@dataclass(frozen=True)
class Config:
    """Shape of a Llama. The defaults are the built-in model: small, yet grouped and deep enough
    that a wrong partial result changes its tokens."""
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 3
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 16
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: tuple | None = None  # llama3: factor, low_freq_factor, high_freq_factor, original
    tie_word_embeddings: bool = False
    max_positions: int = 8192
    eos_token_ids: tuple = (0,)
    dtype: str = "float32"

    @property
    def num_linear_parameters(self) -> int:
        """Weights that every row is multiplied with (the P of a roofline)."""
        linear = (s for n, s in tensor_shapes(self).items() if "layers" in n and len(s) == 2)
        return self.vocab_size * self.hidden_size + sum(map(math.prod, linear))


def load_config(folder: Path) -> Config:
    """Reads `folder/config.json`, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`,
    `torch_dtype`) or 5 (`rope_parameters`, `dtype`). Raises ValueError naming the key at fault."""
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text())
    except OSError as error:
        said = f"{error.strerror} (a Hugging Face model folder has this file)"
        raise ValueError(f"{file}: {said}") from None
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from None

    def get(key, kind, default=None, source=raw):
        value = default if source.get(key) is None else source[key]
        value = float(value) if kind is float and type(value) is int else value
        wanted = {int: "a positive integer", float: "a positive number", bool: "true or false"}
        require(type(value) is kind and (kind not in (int, float) or 0 < value < math.inf), file,
                f"{key} is {value!r}; {wanted.get(kind, 'a string')} expected")
        return value
    require(isinstance(raw, dict), file, "a JSON object is expected")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    require(isinstance(rope, dict), file, f"rope parameters are {rope!r}; an object is expected")
    settings = {"model_type": None} | raw | rope  # the model_type is to be there
    for key, only in SUPPORTED.items():
        value = settings.get(key, only)
        require(value == only, file, f"{key} {value!r} is not supported (only {only!r} is)")
    rope_type, scaling = rope.get("rope_type", rope.get("type", "default")), None
    require(rope_type in ("default", "llama3"), file,
            f"rope_type {rope_type!r} is not supported (default, llama3 are)")
    if rope_type == "llama3":
        scaling = tuple(get(key, float, source=rope) for key in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        require(scaling[1] < scaling[2], file, "low_freq_factor must be less than high_freq_factor")
    hidden, heads = get("hidden_size", int), get("num_attention_heads", int)
    kv_heads = get("num_key_value_heads", int, heads)
    require(heads % kv_heads == 0, file,
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = get("head_dim", int, hidden // heads)
    require(head_dim % 2 == 0, file, f"head_dim {head_dim} is odd; RoPE rotates pairs")
    eos = raw.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    require(all(type(token) is int and token >= 0 for token in eos), file,
            f"eos_token_id is {eos!r}; null, token ids or one are expected")
    return Config(  # in the order of its fields
        get("vocab_size", int), hidden, get("intermediate_size", int),
        get("num_hidden_layers", int), heads, kv_heads, head_dim, get("rms_norm_eps", float, 1e-6),
        get("rope_theta", float, 10_000.0, source=settings), scaling,
        get("tie_word_embeddings", bool, False), get("max_position_embeddings", int, 2048),
        tuple(eos), get("dtype", str, raw.get("torch_dtype") or "float32"))


def tensor_shapes(config: Config) -> dict[str, tuple]:
    """Every weight by its Hugging Face name. Linear weights are [out, in]."""
    c, h, ffn = config, config.hidden_size, config.intermediate_size
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = {"input_layernorm": (h,), "post_attention_layernorm": (h,),
             "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
             "self_attn.o_proj": (h, q), "mlp.gate_proj": (ffn, h), "mlp.up_proj": (ffn, h),
             "mlp.down_proj": (h, ffn)}
    layers = {f"model.layers.{i}.{name}.weight": shape
              for i in range(c.num_layers) for name, shape in layer.items()}
    head = {} if c.tie_word_embeddings else {"lm_head.weight": (c.vocab_size, h)}
    return {"model.embed_tokens.weight": (c.vocab_size, h), **layers,
            "model.norm.weight": (h,), **head}


def random_weights(config: Config, seed: int, dtype, device) -> dict[str, torch.Tensor]:
    """Seeded weights, the same numbers for every dtype and device. Queries and keys get thrice the
    usual scale: attention is then peaky, so that a lost or doubled segment shows in the output."""
    rng, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in tensor_shapes(config).items():
        scale = (3.0 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(shape[-1])
        weight = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=rng) * scale
        weights[name] = weight.to(device, dtype)
    return weights


def load_weights(folder: Path, config: Config, dtype, device) -> dict[str, torch.Tensor]:
    """`model.safetensors`, or else the shards of `model.safetensors.index.json`. ValueError: a
    missing, misshapen or unknown tensor, a damaged file, an index that leaves the folder."""
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists() and not (folder / files[0]).exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error!r})") from None
        for name in files:
            require(isinstance(name, str) and Path(name).name == name, index,
                    f"names the file {name!r}, which is outside the folder")
    shapes, weights = tensor_shapes(config), {}
    for name in files:
        file = folder / name
        require(file.is_file(), file, "no such file")
        try:
            for key, tensor in load_file(file).items():
                if key in shapes:
                    require(tensor.shape == shapes[key], file, f"{key} has the shape "
                            f"{tuple(tensor.shape)}, config.json makes it {shapes[key]}")
                    weights[key] = tensor.to(device, dtype)
                else:
                    require(key == "lm_head.weight" or key.endswith("rotary_emb.inv_freq"), file,
                            f"{key} is not a tensor of a Llama")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from None
    if missing := [name for name in shapes if name not in weights]:
        raise ValueError(f"{folder}: {missing[0]} is missing ({len(missing)} tensors are)")
    return weights


def causal_attend(layer: int, q, k, v):
    """Attention of one sequence alone: row t sees rows 0..t.
    q [T, H, D] and k, v [T, Hkv, D] → [T, H, D]. PyTorch's own, not ours: it is the oracle's."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, D]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


class Llama:
    """A Llama over a dictionary of weights, by their Hugging Face names."""
    def __init__(self, config: Config, weights: dict[str, torch.Tensor]):
        self.config, self.weights = config, weights
        embedding = weights["model.embed_tokens.weight"]
        self.head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        self.dtype, self.device = embedding.dtype, embedding.device
        # RoPE angles are float32 whatever the dtype, as the checkpoints were trained.
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequency = 1.0 / config.rope_theta ** half
        if config.rope_scaling:
            # llama3: stretch waves longer than the original context, keep short ones, else blend.
            factor, low, high, original = config.rope_scaling
            turns = original * frequency / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = keep * frequency + (1 - keep) * frequency / factor
        self.frequency = frequency.to(self.device)

    @torch.inference_mode()
    def forward(self, tokens, positions, attend, rows=None):
        """tokens, positions [T] int64 → logits [T, V], or [len(rows), V] for the wanted rows.

        `attend(layer, q [T, H, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, H, D]` is called once per
        layer, also when T is 0: a rank without rows still holds cache that others read."""
        c, w = self.config, self.weights
        norm = lambda x, name: F.rms_norm(x, x.shape[-1:], w[name + ".weight"], c.rms_norm_eps)
        angle = positions[:, None].float() * self.frequency  # [T, D/2]
        cos, sin = (f(angle).to(self.dtype)[:, None] for f in (torch.cos, torch.sin))

        def rope(x):  # [T, heads, D]: rotates (x[i], x[i + D/2]) by its position
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        x = F.embedding(tokens, w["model.embed_tokens.weight"])  # [T, hidden]
        for layer in range(c.num_layers):
            at = f"model.layers.{layer}."
            h = norm(x, at + "input_layernorm")
            q, k, v = (F.linear(h, w[f"{at}self_attn.{name}_proj.weight"])
                       .unflatten(-1, (-1, c.head_dim)) for name in "qkv")
            out = attend(layer, rope(q), rope(k), v).flatten(1)
            x = x + F.linear(out, w[at + "self_attn.o_proj.weight"])
            h = norm(x, at + "post_attention_layernorm")
            gate, up = (F.linear(h, w[f"{at}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w[at + "mlp.down_proj.weight"])
        return F.linear(norm(x if rows is None else x[rows], "model.norm"), self.head)

    def forward_alone(self, tokens: list[int], rows=None):
        """Logits of one sequence from nothing: no cache, no neighbours. The oracle's forward."""
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        positions = torch.arange(len(tokens), device=self.device)
        return self.forward(ids, positions, causal_attend, rows)

    def score_gap(self, sampler, tokens: list[int], num_prompt: int, request: int) -> float:
        """The oracle in one forward: how far, at worst, a served token is below the best one, in
        logits, when the model sees `tokens` (prompt and answer) alone, without a cache. 0: each is
        a best one, but for ties what recomputation gives. Hotter sampling lets this notice less."""
        at = range(num_prompt, len(tokens))
        logits = self.forward_alone(tokens[:-1], rows=[p - 1 for p in at])
        scores = sampler.scores(logits, [(request, p) for p in at])
        served = torch.tensor(tokens[num_prompt:], device=scores.device)
        return float((scores.amax(-1) - scores.gather(1, served[:, None])[:, 0]).max())


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0. Above it, Gumbel noise seeded by (seed, request, position), times
    the temperature, is added and the best taken, which draws from softmax(logits / temperature):
    the same draw wherever and in whatever batch the row is computed."""
    temperature: float = 0.0
    seed: int = 0

    def scores(self, logits, keys):
        """logits [n, V], keys n pairs (request, position) → [n, V]; the argmax is the token."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.temperature or not keys:
            return logits
        noise = [np.random.default_rng((self.seed, *key)).gumbel(size=logits.shape[-1])
                 for key in keys]
        return logits + self.temperature * torch.from_numpy(np.stack(noise)).to(logits)

    def sample(self, logits, keys) -> list[int]:
        return self.scores(logits, keys).argmax(-1).tolist()
