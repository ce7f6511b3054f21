"""Multi-head attention in terms of projections, whose outputs have the example as dimension 0."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_lightning.perturbed.rules import register_composite


@register_composite(F.multi_head_attention_forward)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` of [T, B, E].

    Raises:
        NotImplementedError: one sequence without a batch, or keys or values that are projected already.
    """
    if query.ndim != 3 or static_k is not None or static_v is not None:
        raise NotImplementedError
    steps, examples, width = query.shape
    if query is key and key is value and in_proj_weight is not None:
        q, k, v = F.linear(query.transpose(0, 1), in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight) if in_proj_weight is None else in_proj_weight.chunk(3)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        inputs = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))  # type: ignore[arg-type]
    more = 0  # keys that are no input's
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, b.expand(examples, 1, width)], 1) for x, b in ((k, bias_k), (v, bias_v)))
        more += 1
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        more += 1
    q, k, v = (x.reshape(examples, x.shape[1], num_heads, -1).transpose(1, 2) for x in (q, k, v))
    mask = None
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None  # as PyTorch does: it is a hint then
    if attn_mask is not None:
        mask = _added(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (examples, num_heads)), query.dtype)
    if key_padding_mask is not None:
        padding = _added(key_padding_mask.view(examples, 1, 1, -1), query.dtype)
        mask = padding if mask is None else mask + padding
    if mask is not None and more:
        mask = F.pad(mask, (0, more))
    dropout = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        heads = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and mask is None)
    joined = heads.transpose(1, 2).reshape(examples, steps, width)
    return F.linear(joined, out_proj_weight, out_proj_bias).transpose(0, 1), weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention mask as what is added to the scores; a boolean one is true where no attention is paid."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else mask
