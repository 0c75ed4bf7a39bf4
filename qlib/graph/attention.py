"""Attention blocks rewritten from linear, matmul and softmax, which the tracer then sees."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from qlib.errors import ModelError
from qlib.graph.ops import Add, Function, MaskedSoftmax, MatMul, Mul, WindowPartition, WindowReverse

__all__ = ["expand_attention"]


def expand_attention(model: nn.Module) -> None:
    """Replaces, in place, each `nn.MultiheadAttention` and Swin attention of `model` by its expanded form."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.MultiheadAttention):
            setattr(model, name, SelfAttention(child, name))
        elif isinstance(child, ShiftedWindowAttention):
            setattr(model, name, WindowAttention(child))
        else:
            expand_attention(child)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer whose weight and bias lie in the memory of those given, and train if those do."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` without masks: ``softmax(q k^T / sqrt(d)) v`` for ``[N, L, E]`` (or ``[L, N, E]``).

    Raises ModelError for the variants that have no such form.
    """

    def __init__(self, source: nn.MultiheadAttention, name: str) -> None:
        super().__init__()
        if source.bias_k is not None or source.add_zero_attn or source.in_proj_weight is None:
            raise ModelError(
                f"attention {name!r} uses bias_kv, zero attention or separate key/value sizes, which cannot be"
                " quantized; exclude them from the model"
            )
        self.heads, self.batch_first = source.num_heads, source.batch_first
        weights = source.in_proj_weight.chunk(3)
        biases = source.in_proj_bias.chunk(3) if source.in_proj_bias is not None else (None, None, None)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.matmul = MatMul(transpose=True, alpha=1 / math.sqrt(source.head_dim))
        self.softmax = nn.Softmax(-1)
        self.matmul_1 = MatMul()
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)

    def _split(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return x.reshape(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ModelError("attention with a mask cannot be quantized; call it without masks")
        q, k, v = (
            self._split(project(x)) for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        x = self.matmul_1(self.softmax(self.matmul(q, k)), v)
        x = x.transpose(1, 2).reshape(x.size(0), x.size(2), -1)
        x = x if self.batch_first else x.transpose(0, 1)
        return self.out_proj(x), None


class WindowAttention(nn.Module):
    """Swin's (shifted) window attention, versions 1 and 2, for ``[N, H, W, C]`` (Liu et al. 2021, 2022).

    What does not depend on the input - position bias, logit scale - becomes a constant.
    """

    def __init__(self, source: ShiftedWindowAttention) -> None:
        super().__init__()
        self.heads = source.num_heads
        bias = source.qkv.bias
        self.cosine = isinstance(source, ShiftedWindowAttentionV2)
        if self.cosine and bias is not None:  # version 2 has no bias on the keys
            bias = bias.detach().clone()
            bias[bias.numel() // 3 : 2 * bias.numel() // 3] = 0
        self.partition = WindowPartition(source.window_size, source.shift_size)
        self.qkv = _linear(source.qkv.weight, bias)
        head_size = source.qkv.in_features // self.heads
        self.matmul = MatMul(transpose=True, alpha=1.0 if self.cosine else head_size**-0.5)
        if self.cosine:
            self.normalize_q = Function(F.normalize, (Function.Slot(0),), {"dim": -1})
            self.normalize_k = Function(F.normalize, (Function.Slot(0),), {"dim": -1})
            self.mul = Mul()
            logit_scale = source.logit_scale.detach().clamp(max=math.log(100.0)).exp()
            self.register_buffer("logit_scale", logit_scale)
        self.add = Add()
        with torch.no_grad():
            self.register_buffer("position_bias", source.get_relative_position_bias().detach())
        self.softmax = MaskedSoftmax(source.window_size, source.shift_size)
        self.matmul_1 = MatMul()
        self.proj = _linear(source.proj.weight, source.proj.bias)
        self.reverse = WindowReverse(source.window_size, source.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        windows = self.partition(x)
        qkv = self.qkv(windows)
        qkv = qkv.reshape(windows.size(0), windows.size(1), 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.cosine:
            q, k = self.normalize_q(q), self.normalize_k(k)
        logits = self.matmul(q, k)
        if self.cosine:
            logits = self.mul(logits, self.logit_scale)
        attention = self.softmax(self.add(logits, self.position_bias), shape)
        out = self.matmul_1(attention, v).transpose(1, 2).reshape(windows.size(0), windows.size(1), -1)
        result: Tensor = self.reverse(self.proj(out), shape)
        return result
