"""The decoders that the published rows were measured on, as their projects wrote them, in one module.

The planner traces whatever model a run has. Published rows ran other people's code, whose saved tensors differ from those
of transformers' models in details that add up: a fused projection whose value slice keeps the whole of it alive, a norm
that widens to fp32 or does not, adapters that save a padded copy. `Decoder` is that computation for `litgpt`, `torchtune`,
`llm-foundry` and a plain `transformers` style, over the dimensions that a row names. Only shapes and operators matter here.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Spec:
    """Dimensions and style of a decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    style: str = "transformers"  # transformers, litgpt, torchtune, llmfoundry
    head_dim: int = 0  # 0: hidden / heads
    norm: str = "rms"  # rms, layer
    gated: bool = True  # SwiGLU or GeGLU; else GELU with one up projection
    bias: bool = False
    parallel: bool = False  # attention and MLP side by side on the residual stream
    shared_norm: bool = False  # and reading the same norm
    tied: bool = False
    rotary: float = 1.0
    positions: int = 0  # learned positions
    lora: tuple[str, ...] = ()  # which of q k v o mlp head carry adapters
    rank: int = 0
    dropout: float = 0.0
    quantised: bool = False  # 4-bit layers, of a bitsandbytes that keeps their inputs
    head_chunk: int = 0  # tokens of the output layer computed at a time
    chunks: int = 0  # chunks of the loss
    causal: bool = True


def hashed(made: Spec, *others: object) -> str:
    """A name for the trace of a decoder: changes with its dimensions and with this module and the tracer."""
    from pathlib import Path

    here = Path(__file__)
    code = here.read_bytes() + b"".join(
        (here.parents[1] / "train" / "plan" / f).read_bytes() for f in ("trace.py", "shapes.py")
    )
    text = repr(sorted(asdict(made).items())) + repr(others)
    return hashlib.sha256(code + text.encode()).hexdigest()[:24]


class Norm(nn.Module):
    def __init__(self, s: Spec) -> None:
        super().__init__()
        self.s = s
        self.weight = nn.Parameter(torch.empty(s.hidden))
        self.bias = nn.Parameter(torch.empty(s.hidden)) if s.norm == "layer" and s.style != "llmfoundry" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.s.norm == "layer":
            return F.layer_norm(x, (self.s.hidden,), self.weight, self.bias)
        if self.s.style == "litgpt":
            return self.weight * (x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5))
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x)
        return self.weight * normed


class _KeepsInput(torch.autograd.Function):
    """A frozen 4-bit product of a bitsandbytes that saves its input though no gradient of the weight is wanted."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        return grad @ ctx.saved_tensors[1], None


class _FusedCrossEntropy(torch.autograd.Function):
    """llm-foundry's loss: keeps the logits and writes their gradient over them."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(logits, labels)
        return logits.new_empty(labels.shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        return ctx.saved_tensors[0].mul_(1.0), None


class Layer(nn.Linear):
    """A linear layer, with an adapter where the row has one."""

    def __init__(self, s: Spec, name: str, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.s, self.adapted = s, name in s.lora
        if s.lora:
            self.requires_grad_(False)
        if self.adapted:
            self.lora_a = nn.Parameter(torch.empty(s.rank, inputs))
            self.lora_b = nn.Parameter(torch.empty(outputs, s.rank))

    def forward(self, x: Tensor) -> Tensor:
        out = _KeepsInput.apply(x, self.weight) if self.s.quantised and self.s.style == "litgpt" else super().forward(x)
        if self.adapted:
            dropped = F.dropout(x, self.s.dropout) if self.s.dropout else x
            out = out + (2.0 * F.linear(F.linear(dropped, self.lora_a), self.lora_b))
        return out


class FusedQKV(nn.Linear):
    """litgpt's one projection for q, k and v; adapters of some of them are padded with zeros to its width."""

    def __init__(self, s: Spec, widths: tuple[int, int, int]) -> None:
        super().__init__(s.hidden, sum(widths), s.bias)
        self.s, self.widths = s, widths
        self.on = [name in s.lora for name in "qkv"]
        if s.lora:
            self.requires_grad_(False)
        if any(self.on):
            self.lora_a = nn.Parameter(torch.empty(s.rank * sum(self.on), s.hidden))
            self.lora_b = nn.Parameter(torch.empty(sum(w for w, on in zip(widths, self.on) if on), s.rank))

    def forward(self, x: Tensor) -> Tensor:
        out = _KeepsInput.apply(x, self.weight) if self.s.quantised else super().forward(x)
        if not any(self.on):
            return out
        after = F.linear(F.dropout(x, self.s.dropout) if self.s.dropout else x, self.lora_a)
        parts, row = [], 0
        for i in range(sum(map(bool, self.on))):
            width = [w for w, o in zip(self.widths, self.on) if o][i]
            parts.append(F.linear(after[..., i * self.s.rank : (i + 1) * self.s.rank], self.lora_b[row : row + width]))
            row += width
        added = torch.cat(parts, dim=-1)
        if not all(self.on):
            index = torch.zeros(added.shape[-1], dtype=torch.long, device=x.device)
            padded = x.new_zeros(x.shape[0] * x.shape[1], self.out_features)
            added = padded.index_copy(1, index, added.reshape(-1, added.shape[-1])).view(*x.shape[:-1], -1)
        return out + added * 2.0


class Attention(nn.Module):
    def __init__(self, s: Spec) -> None:
        super().__init__()
        self.s, self.d = s, s.head_dim or s.hidden // s.heads
        widths = (s.heads * self.d, s.kv_heads * self.d, s.kv_heads * self.d)
        self.fused = s.style in ("litgpt", "llmfoundry")
        if self.fused:
            self.qkv = FusedQKV(s, widths)
        else:
            self.q, self.k, self.v = (Layer(s, n, s.hidden, w, s.bias) for n, w in zip("qkv", widths))
        self.o = Layer(s, "o", s.heads * self.d, s.hidden, s.bias)

    def rope(self, x: Tensor) -> Tensor:
        """Rotate the first part of each head: elementwise with constants, so nothing of it is saved."""
        n = int(self.s.rotary * self.d)
        if n == 0:
            return x
        turned = x[..., :n]
        half = torch.cat((-turned[..., n // 2 :], turned[..., : n // 2]), dim=-1)
        out = turned * torch.empty(x.shape[-2], n, dtype=x.dtype) + half * torch.empty(x.shape[-2], n, dtype=x.dtype)
        return torch.cat((out, x[..., n:]), dim=-1) if n < self.d or self.s.style == "litgpt" else out

    def forward(self, x: Tensor) -> Tensor:
        s, (batch, rows, _) = self.s, x.shape
        if self.fused:
            q, k, v = self.qkv(x).split([s.heads * self.d, s.kv_heads * self.d, s.kv_heads * self.d], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (t.view(batch, rows, -1, self.d).transpose(1, 2) for t in (q, k, v))
        if s.style == "litgpt" and s.kv_heads != s.heads:
            k, v = (
                t.unsqueeze(2).expand(-1, -1, s.heads // s.kv_heads, -1, -1).reshape(batch, s.heads, rows, self.d)
                for t in (k, v)
            )
        q, k = self.rope(q), self.rope(k)
        gqa = k.shape[1] != s.heads
        out = F.scaled_dot_product_attention(q, k, v, is_causal=s.causal, enable_gqa=gqa)
        return self.o(out.transpose(1, 2).reshape(batch, rows, -1))


class MLP(nn.Module):
    def __init__(self, s: Spec) -> None:
        super().__init__()
        self.s = s
        self.up = Layer(s, "mlp", s.hidden, s.ffn, s.bias)
        self.gate = Layer(s, "mlp", s.hidden, s.ffn, s.bias) if s.gated else None
        self.down = Layer(s, "mlp", s.ffn, s.hidden, s.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, s: Spec) -> None:
        super().__init__()
        self.s = s
        self.norm_1, self.attention = Norm(s), Attention(s)
        self.norm_2 = None if s.shared_norm else Norm(s)
        self.mlp = MLP(s)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_1(x)
        h = self.attention(normed)
        if self.s.parallel:
            return self.mlp(normed if self.norm_2 is None else self.norm_2(x)) + h + x
        x = h + x
        assert self.norm_2 is not None
        return self.mlp(self.norm_2(x)) + x


class Decoder(nn.Module):
    """Tokens to logits, or a list of logits by chunks of rows."""

    def __init__(self, s: Spec) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.embed_positions = nn.Embedding(s.positions, s.hidden) if s.positions else None
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = Norm(s)
        self.head = Layer(s, "head", s.hidden, s.vocab, False)
        if s.lora:
            for name, p in self.named_parameters():
                p.requires_grad_("lora_" in name)
        if s.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor | list[Tensor]:
        x = self.embed(tokens)
        if self.embed_positions is not None:
            x = x + self.embed_positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.s.head_chunk:
            return [self.head(part) for part in x.split(self.s.head_chunk, dim=1)]
        if self.s.chunks:
            return [self.head(part) for part in x.chunk(self.s.chunks, dim=1)]
        return self.head(x)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy as the style computes it."""
    s: Spec = model.s  # type: ignore[assignment]
    logits, labels = model(batch["tokens"]), batch["labels"]
    if isinstance(logits, list):
        parts = labels.split([part.shape[1] for part in logits], dim=1)
        wide = s.style == "torchtune"
        losses = [
            F.cross_entropy((part.float() if wide else part).reshape(-1, s.vocab), label.reshape(-1), reduction="none")
            for part, label in zip(logits, parts)
        ]
        return torch.cat(losses).mean()
    if s.style == "llmfoundry":
        return _FusedCrossEntropy.apply(logits.reshape(-1, s.vocab), labels.reshape(-1)).mean()
    if s.style in ("torchtune", "transformers"):
        logits = logits.float()
    return F.cross_entropy(logits.reshape(-1, s.vocab), labels.reshape(-1))


def batch(rows: int) -> object:
    """A function of the micro-batch that makes a batch of rows of that many tokens."""

    def make(size: int) -> dict[str, Tensor]:
        return {k: torch.zeros(size, rows, dtype=torch.long) for k in ("tokens", "labels")}

    return make
