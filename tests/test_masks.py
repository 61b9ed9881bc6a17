"""Masks: one canonical form, every ambiguity refused, key compaction and packed lengths exact."""

from __future__ import annotations

import math
import re

import pytest
import torch

import compiled_attn
from compiled_attn import masks, reference
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL

Q, K = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 4, 8)


def keep(*shape: int) -> torch.Tensor:
    return torch.rand(shape) > 0.4


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 5, 7), (2, 1, 5, 7), (2, 4, 1, 7), (1, 1, 5, 7), (1, 4, 1, 7)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_four_dimensional_masks_stay_what_they_are(shape, kind):
    mask = keep(*shape) if kind == "bool" else torch.randn(shape)
    canonical, padding = masks.canonical(mask, None, Q, K)
    assert canonical is mask
    assert padding is None


@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (1, 1, 1, 7), (2, 7), (1, 7)])
def test_one_bit_for_each_key_is_key_padding(shape):
    mask = keep(*shape)
    canonical, padding = masks.canonical(mask, None, Q, K)
    assert canonical is None
    assert padding is not None
    torch.testing.assert_close(padding, mask.reshape(shape[0], 7).expand(2, 7))


def test_one_float_for_each_key_stays_float():
    canonical, padding = masks.canonical(torch.randn(2, 7), None, Q, K)
    assert padding is None
    assert canonical is not None
    assert canonical.shape == (2, 1, 1, 7)


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 5, 7)])
def test_three_dimensional_masks_are_batch_query_key(shape):
    mask = keep(*shape)
    canonical, _ = masks.canonical(mask, None, Q, K)
    assert canonical is not None
    torch.testing.assert_close(canonical, mask[:, None])


def test_two_spellings_of_one_mask_give_one_result():
    mask = keep(2, 7)
    spellings = [{"attn_mask": mask}, {"attn_mask": mask[:, None, None]}, {"key_padding_mask": mask}]
    first, *others = [compiled_attn.attention(Q, K, K, **one) for one in spellings]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_and_key_padding_compose(kind):
    mask, padding = (keep(2, 4, 5, 7) if kind == "bool" else torch.randn(2, 4, 5, 7)), keep(2, 7)
    both = masks.additive(mask, torch.float32).masked_fill(~padding[:, None, None], -math.inf)
    expected = reference.attention(Q, K, K, both)[0]
    actual = compiled_attn.attention(Q, K, K, mask, key_padding_mask=padding)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=1e-5)


AMBIGUOUS = [
    # (B, Sq, H, Sk, shape of the mask, what the text must offer)
    (3, 3, 4, 7, (3, 7), ["(B, Sk)", "(Sq, Sk)", "key_padding_mask=", "mask[None, None]", "mask[:, None, None]"]),
    (7, 7, 4, 7, (7, 7), ["(B, Sk)", "(Sq, Sk)"]),
    (4, 5, 4, 7, (4, 5, 7), ["(B, Sq, Sk)", "(H, Sq, Sk)", "mask[:, None]", "mask[None]"]),
]


@pytest.mark.parametrize(("batch", "length", "heads", "keys", "shape", "offers"), AMBIGUOUS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_ambiguous_masks_are_refused_with_the_spelling_to_use(batch, length, heads, keys, shape, offers, kind):
    query, key = torch.randn(batch, length, heads, 8), torch.randn(batch, keys, heads, 8)
    mask = keep(*shape) if kind == "bool" else torch.randn(shape)
    with pytest.raises(ValueError, match="could be") as refused:
        compiled_attn.attention(query, key, key, mask)
    for offer in offers:
        assert offer in str(refused.value)
    if kind == "bool" and len(shape) == 2:  # the spelling that is never ambiguous
        compiled_attn.attention(query, key, key, key_padding_mask=mask)


WRONG = {
    "2d_queries": (torch.ones(5, 7, dtype=torch.bool), "mask[None, None]"),
    "2d_length": (torch.ones(2, 6, dtype=torch.bool), "expected (B, Sk) = (2, 7)"),
    "3d_heads": (torch.ones(4, 5, 7, dtype=torch.bool), "expected (B, Sq, Sk) = (2, 5, 7)"),
    "4d_layout": (torch.ones(2, 5, 4, 7, dtype=torch.bool), "expected (B|1, H|1, Sq|1, Sk) = (2, 4, 5, 7)"),
    "4d_broadcast_keys": (torch.ones(2, 4, 5, 1), "expected (B|1, H|1, Sq|1, Sk) = (2, 4, 5, 7)"),
    "1d": (torch.ones(7, dtype=torch.bool), "1 dimensions"),
    "5d": (torch.ones(1, 2, 4, 5, 7), "5 dimensions"),
    "int": (torch.ones(2, 7, dtype=torch.int64), "torch.int64; give bool"),
    "device": (torch.ones(2, 7, dtype=torch.bool, device="meta"), "is on meta, query on cpu"),
}


@pytest.mark.parametrize("which", WRONG)
def test_masks_that_make_no_sense(which):
    mask, text = WRONG[which]
    with pytest.raises(ValueError, match=re.escape(text)):
        compiled_attn.attention(Q, K, K, mask)


def test_key_padding_masks_that_make_no_sense_give_all_reasons():
    with pytest.raises(ValueError, match="key_padding_mask") as refused:
        compiled_attn.attention(
            Q, K, K, torch.ones(9, dtype=torch.int32), key_padding_mask=torch.ones(2, 6, device="meta")
        )
    for text in ("is on meta", "give bool, True = a real key", "expected (B, Sk) = (2, 7)", "torch.int32", "1 dimens"):
        assert text in str(refused.value)


@pytest.mark.parametrize("attribute", ["attn_mask", "key_padding_mask"])
def test_masks_that_are_no_tensors(attribute):
    with pytest.raises(TypeError, match=f"{attribute} must be a tensor.*list"):
        compiled_attn.attention(Q, K, K, **{attribute: [[True] * 7] * 2})


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1), (0, 3), (3, 0)])
@pytest.mark.parametrize("causal", [0, CAUSAL, ALIGN_LOWER_RIGHT, CAUSAL | ALIGN_LOWER_RIGHT])
@pytest.mark.parametrize("window", [None, (2, 1), (-1, 1), (2, -1), (0, 0)], ids=str)
def test_positions_one_by_one(lengths, causal, window):
    """The definition, spelled as loops."""
    q_length, k_length = lengths
    found = masks.positions(q_length, k_length, causal, window, torch.device("cpu"))
    if not causal & CAUSAL and window is None:
        assert found is None
        return
    shift = k_length - q_length if causal & ALIGN_LOWER_RIGHT else 0
    left, right = (-1, -1) if window is None else window
    expected = torch.zeros(q_length, k_length, dtype=torch.bool)
    for i in range(q_length):
        for j in range(k_length):
            seen = not causal & CAUSAL or j <= i + shift
            seen = seen and (left < 0 or j >= i + shift - left) and (right < 0 or j <= i + shift + right)
            expected[i, j] = seen
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_empty_rows_of_bool_and_float_masks():
    mask = keep(2, 3, 5, 7)
    mask[0, 1, 2] = False
    mask[1, 2, 0] = False
    as_bool = masks.empty_rows(mask)
    torch.testing.assert_close(as_bool, ~mask.any(-1, keepdim=True))
    torch.testing.assert_close(masks.empty_rows(masks.additive(mask, torch.float32)), as_bool)
    assert as_bool.sum() == 2


@pytest.mark.parametrize("q_length", [1, 5, 7, 9])
def test_empty_rows_under_a_causal_mask(q_length):
    padding = keep(3, 1, 1, 7)
    padding[0, ..., :4] = False
    padding[1] = False
    causal = torch.ones(q_length, 7, dtype=torch.bool).tril()
    expected = ~(padding & causal).any(-1, keepdim=True)
    torch.testing.assert_close(masks.empty_causal_rows(padding, q_length), expected)
    torch.testing.assert_close(masks.empty_causal_rows(masks.additive(padding, torch.float32), q_length), expected)


@pytest.mark.parametrize("shape", [(4, 11), (1, 1), (3, 0), (0, 5), (1, 33)], ids=str)
@pytest.mark.parametrize("masked", ["some", "all", "none"])
def test_packing_brings_the_real_keys_of_all_sequences_together_and_back(shape, masked):
    padding = keep(*shape) if masked == "some" else torch.full(shape, masked == "none")
    padding[1:2] = masked == "none"
    source, target, cu_seqlens = masks.packing(padding)
    rows = torch.randn(padding.numel(), 3)
    packed = rows.index_select(0, source)
    real = padding.flatten().nonzero().flatten()
    torch.testing.assert_close(packed[: len(real)], rows[real])
    if len(real):  # behind the last comes the last again, never a masked one
        torch.testing.assert_close(packed[len(real) :], rows[real[-1:]].expand(len(rows) - len(real), 3))
    packed[len(real) :] = 0.0  # as gradients are
    torch.testing.assert_close(packed.index_select(0, target), rows * padding.flatten()[:, None])
    torch.testing.assert_close(cu_seqlens.diff(), padding.sum(1).to(torch.int32))
    assert cu_seqlens[0] == 0
    assert (source.dtype, target.dtype, cu_seqlens.dtype) == (torch.int32,) * 3


# sequences of 3 and 2, 0 and 4, 5 and 0 queries and keys; two rows and one key behind the last one
STARTS = [torch.tensor(starts, dtype=torch.int32) for starts in ([0, 3, 3, 8], [0, 2, 6, 6])]


def test_rows_that_have_nothing_to_attend_to():
    queries, keys = torch.ones(10, 1, 1), torch.ones(7, 1, 1)
    attended = masks.varlen_mask(*STARTS, 10, 7, 0, None)
    torch.testing.assert_close(masks.lonely(queries, *STARTS), ~attended.any(1))
    torch.testing.assert_close(masks.lonely(keys, *reversed(STARTS)), ~attended.any(0))
    assert masks.lonely(keys, *reversed(STARTS)).tolist() == [False, False, True, True, True, True, True]


def test_rows_behind_the_last_sequence_are_cleared_in_place():
    queries = torch.full((10, 2, 3), math.nan)
    assert masks.behind(queries, STARTS[0]).tolist() == [False] * 8 + [True] * 2
    assert masks.clear_behind(queries, STARTS[0]) is queries
    torch.testing.assert_close(queries[8:], torch.zeros(2, 2, 3))
    assert queries[:8].isnan().all()


@pytest.mark.parametrize("causal", [0, CAUSAL, CAUSAL | ALIGN_LOWER_RIGHT])
@pytest.mark.parametrize("window", [None, (1, 1), (2, -1)], ids=str)
def test_varlen_mask_is_block_diagonal(causal, window):
    starts_q, starts_k = [0, 3, 3, 8], [0, 2, 6, 12]
    lengths_q, lengths_k = (torch.tensor(starts, dtype=torch.int32) for starts in (starts_q, starts_k))
    expected = torch.zeros(10, 13, dtype=torch.bool)  # two rows and one key behind the last sequence
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        inside = masks.positions(q1 - q0, k1 - k0, causal, window, torch.device("cpu"))
        expected[q0:q1, k0:k1] = True if inside is None else inside
    found = masks.varlen_mask(lengths_q, lengths_k, 10, 13, causal, window)
    torch.testing.assert_close(found, expected)


def test_varlen_mask_of_a_causal_window_with_a_negative_right():
    """A right bound of 0 or more is cut by causal; positions and varlen_mask must agree on it."""
    lengths = torch.tensor([0, 6], dtype=torch.int32)
    for right in (-1, 0, 3):
        dense = masks.positions(6, 6, CAUSAL, (2, right), torch.device("cpu"))
        packed = masks.varlen_mask(lengths, lengths, 6, 6, CAUSAL, (2, right))
        assert dense is not None
        torch.testing.assert_close(packed, dense)
