"""Attention of one new token a row over vLLM's paged cache, for models whose heads each have keys of their own.

While answers grow, attention does little but read its cache. FlashAttention's tiles are made for many queries that share keys: with one
query a head it takes one and a half to four times as long as reading does (docs/gpu.md, "How fast: GRPO"). Here each head of each row has
a program of its own, and so many of them run at once that the memory is what they wait for. Rows of several new tokens, which are
prompts, are FlashAttention's; so how a token's attention is summed up follows neither what else is in its batch nor how much.
"""

import torch
import triton
import triton.language as tl
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

TILE, WARPS, STAGES = 16, 4, 4  # tokens that a program reads at once, its warps, and how many tiles are under way
LEAST = tl.constexpr(-1e30)  # below every score, and finite: two of them have a difference
LOG2_E = 1.4426950408889634


@triton.jit
def attend_kernel(
    query, key, value, cache, out, table, lengths, starts, slots, scale,
    query_stride, key_stride, value_stride, out_stride, table_stride, page_stride, head_stride, token_stride,
    PAGE: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A head of a row that has one new token: writes that token's key and value into the cache and attends to it and all before it.

    Each place of a tile keeps its own maximum, sum and weighted values in float32; they meet once, at the end.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    token, end, before = tl.load(starts + row), tl.load(starts + row + 1), tl.load(lengths + row) - 1
    if end - token == 1:
        inside = tl.arange(0, HEAD)
        place = tl.arange(0, TILE)
        dims = head * HEAD + inside
        q = tl.load(query + token * query_stride + dims).to(tl.float32) * scale
        new_key = tl.load(key + token * key_stride + dims)
        new_value = tl.load(value + token * value_stride + dims)
        slot = tl.load(slots + token)
        here = cache + (slot // PAGE) * page_stride + head * head_stride + (slot % PAGE) * token_stride + inside
        tl.store(here, new_key, mask=slot >= 0)
        tl.store(here + HEAD, new_value, mask=slot >= 0)

        peak = tl.where(place == 0, tl.sum(q * new_key.to(tl.float32), 0), LEAST)
        total = tl.where(place == 0, 1.0, 0.0)
        values = tl.where((place == 0)[:, None], new_value.to(tl.float32)[None, :], 0.0)
        for first in tl.range(0, before, TILE, num_stages=STAGES):
            at = first + place
            there = at < before
            page = tl.load(table + row * table_stride + at // PAGE, mask=there, other=0).to(tl.int64)
            tile = (cache + page * page_stride + head * head_stride + (at % PAGE) * token_stride)[:, None] + inside[None, :]
            k = tl.load(tile, mask=there[:, None], other=0.0).to(tl.float32)
            v = tl.load(tile + HEAD, mask=there[:, None], other=0.0).to(tl.float32)
            score = tl.where(there, tl.sum(q[None, :] * k, 1), LEAST)
            higher = tl.maximum(peak, score)
            fade = tl.exp2(peak - higher)
            weight = tl.where(there, tl.exp2(score - higher), 0.0)
            total = total * fade + weight
            values = values * fade[:, None] + weight[:, None] * v
            peak = higher
        fade = tl.exp2(peak - tl.max(peak, 0))
        answer = tl.sum(values * fade[:, None], 0) / tl.sum(total * fade, 0)
        tl.store(out + token * out_stride + dims, answer.to(out.dtype.element_ty))


def attend(query, key, value, cache, out, table, lengths, starts, slots, scale: float) -> None:
    """Fills `out` for each row that has one new token; other rows stay as they are.

    query, key, value, out: (tokens, heads, head size), heads side by side in memory. cache: (pages, heads, tokens of a page, 2 head sizes),
    a key and then its value. table: (rows, pages of a row). lengths: (rows,), with the new token. starts: (rows + 1,), where each
    row's new tokens begin. slots: (tokens,), where in the cache each is written, -1 for nowhere. scale: of query times key.
    """
    heads, head_size = query.shape[1:]
    attend_kernel[(heads, len(lengths))](
        query, key, value, cache, out, table, lengths, starts, slots, scale * LOG2_E,
        query.stride(0), key.stride(0), value.stride(0), out.stride(0), table.stride(0), *cache.stride()[:3],
        PAGE=cache.shape[2], HEAD=head_size, TILE=TILE, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip


class DecodeAttention(FlashAttentionBackend):
    """FlashAttention for prompts and the kernel here for answers, where vllm.config.AttentionConfig's backend is CUSTOM."""

    forward_includes_kv_cache_update = True  # the kernel writes what it has in hand

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["DecodeAttentionImpl"]:
        return DecodeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["DecodeMetadataBuilder"]:
        return DecodeMetadataBuilder


class DecodeMetadataBuilder(FlashAttentionMetadataBuilder):
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> FlashAttentionMetadata:
        """See FlashAttentionMetadataBuilder.build. Steps without prompts are not FlashAttention's, and need no schedule of its."""
        alone = common_attn_metadata.max_query_len == 1
        return super().build(common_prefix_len, common_attn_metadata, fast_build=fast_build or alone)


class DecodeAttentionImpl(FlashAttentionImpl):
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None) -> torch.Tensor:
        """See FlashAttentionImpl.forward."""
        if attn_metadata is None:  # vLLM tries how much memory a step takes
            return output.fill_(0)
        step = attn_metadata
        if step.max_query_len > 1:
            self.do_kv_cache_update(layer, key, value, kv_cache, step.slot_mapping)
            super().forward(layer, query, key, value, kv_cache, step, output, output_scale, output_block_scale)
        attend(query, key, value, kv_cache, output, step.block_table, step.seq_lens, step.query_start_loc, step.slot_mapping, self.scale)
        return output
