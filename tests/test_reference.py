"""The float64 reference, against loops over every query, key and head."""

from __future__ import annotations

import math

import pytest
import torch

from compiled_attn import reference


def by_hand(query, key, value, allowed, bias, scale):
    """One score at a time; ``allowed(b, h, i, j)`` and ``bias(b, h, i, j)`` are plain functions."""
    batch, q_length, heads, _ = query.shape
    k_length, key_heads = key.shape[1:3]
    out = torch.zeros(batch, q_length, heads, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, q_length), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // key_heads)
            for i in range(q_length):
                seen = [j for j in range(k_length) if allowed(b, h, i, j)]
                scores = [
                    scale * float(query[b, i, h].double() @ key[b, j, kv].double()) + bias(b, h, i, j) for j in seen
                ]
                if not scores or max(scores) == -math.inf:
                    continue
                total = sum(math.exp(score) for score in scores)
                lse[b, h, i] = math.log(total)
                for j, score in zip(seen, scores, strict=True):
                    out[b, i, h] += math.exp(score) / total * value[b, j, kv].double()
    return out, lse


def tensors(key_heads=4, q_length=4, k_length=6):
    return (
        torch.randn(2, q_length, 4, 8),
        torch.randn(2, k_length, key_heads, 8),
        torch.randn(2, k_length, key_heads, 5),
    )


def always(b, h, i, j):
    return True


def zero(b, h, i, j):
    return 0.0


def compare(query, key, value, allowed=always, bias=zero, **options):
    out, lse = reference.attention(query, key, value, **options)
    right_out, right_lse = by_hand(query, key, value, allowed, bias, 1 / math.sqrt(8))
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(out, right_out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, right_lse, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_heads_and_value_width(key_heads):
    compare(*tensors(key_heads))


@pytest.mark.parametrize("scale", [0.0, -0.7, 2.0])
def test_scale(scale):
    query, key, value = tensors()
    out, lse = reference.attention(query, key, value, scale=scale)
    right, right_lse = by_hand(query, key, value, always, zero, scale)
    torch.testing.assert_close(out, right, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, right_lse, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("lengths", [(4, 6), (6, 4), (5, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("window", [None, (1, 2), (0, 0), (-1, 1)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_causal_and_window(lengths, alignment, window, causal):
    q_length, k_length = lengths
    shift = k_length - q_length if alignment == "lower_right" else 0

    def allowed(b, h, i, j):
        left, right = (-1, -1) if window is None else window
        position = i + shift
        inside = (left < 0 or j >= position - left) and (right < 0 or j <= position + right)
        return inside and (not causal or j <= position)

    compare(*tensors(2, *lengths), allowed, is_causal=causal, causal_alignment=alignment, window_size=window)


def test_bool_mask_with_empty_rows():
    mask = torch.rand(2, 4, 4, 6) > 0.5
    mask[0, 1, 2] = False
    compare(*tensors(), lambda b, h, i, j: bool(mask[b, h, i, j]), attn_mask=mask)


def test_float_mask_with_minus_infinity():
    mask = torch.randn(1, 4, 4, 6)
    mask[0, 0, 0] = -math.inf
    mask[..., 2] = -math.inf
    compare(*tensors(), bias=lambda b, h, i, j: float(mask[0, h, i, j]), attn_mask=mask)


def test_key_padding_with_causal():
    padding = torch.tensor([[False, False, True, True, False, True], [False] * 6])
    compare(*tensors(), lambda b, h, i, j: bool(padding[b, j]) and j <= i, key_padding_mask=padding, is_causal=True)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "causal_alignment": "lower_right"}], ids=str)
def test_varlen_is_dense_sequence_by_sequence(options):
    query, key, value = torch.randn(9, 4, 8), torch.randn(11, 2, 8), torch.randn(11, 2, 5)
    starts_q, starts_k = [0, 2, 2, 7], [0, 5, 6, 10]
    lengths = [torch.tensor(starts, dtype=torch.int32) for starts in (starts_q, starts_k)]
    out, lse = reference.varlen_attention(query, key, value, *lengths, **options)
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        one, one_lse = reference.attention(query[None, q0:q1], key[None, k0:k1], value[None, k0:k1], **options)
        torch.testing.assert_close(out[q0:q1], one[0])
        torch.testing.assert_close(lse[:, q0:q1], one_lse[0])
    # two rows belong to no sequence
    torch.testing.assert_close(out[7:], torch.zeros(2, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(lse[:, 7:], torch.full((4, 2), -math.inf, dtype=torch.float64))


@pytest.mark.parametrize("mask", ["none", "empty_row", "padding"])
def test_gradcheck(mask):
    query, key, value = (tensor.double().requires_grad_() for tensor in tensors(2))
    options = {"is_causal": True}
    if mask == "empty_row":
        keep = torch.rand(2, 1, 4, 6) > 0.4
        keep[0, 0, 1] = False
        options = {"attn_mask": keep}
    if mask == "padding":
        options["key_padding_mask"] = torch.tensor([[False, True, True, False, True, True], [False] * 6])
    assert torch.autograd.gradcheck(lambda *x: reference.attention(*x, **options)[0], (query, key, value))


def test_gradcheck_of_a_float_mask():
    query, key, value = (tensor.double() for tensor in tensors())
    mask = torch.randn(1, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: reference.attention(query, key, value, m)[0], (mask,))


def test_plain_is_attention_in_the_dtype_of_its_inputs():
    dense = [tensor.bfloat16() for tensor in (torch.randn(2, 5, 4, 8), *(torch.randn(2, 7, 4, 8) for _ in range(2)))]
    packed = [tensor[0] for tensor in dense]
    for inputs in (dense, packed):
        out, lse = reference.plain(*inputs)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.bfloat16)
        right, right_lse = reference.plain(*(tensor.double() for tensor in inputs))
        assert not reference.judge(out, out, right).wrong and not reference.judge(lse, lse, right_lse).wrong
    exact, exact_lse = reference.attention(*dense)
    right, right_lse = reference.plain(*(tensor.double() for tensor in dense))
    torch.testing.assert_close(right, exact)
    torch.testing.assert_close(right_lse, exact_lse)


def test_the_rule_of_twice_the_yardsticks_error():
    right = torch.tensor([1.0, -3.0], dtype=torch.float64)
    step = 4 * torch.finfo(torch.bfloat16).eps * (1 + 3)
    yardstick = right + 0.125
    for error, wrong in ((0.25 + step, ""), (0.3125 + step, "off by 4.38e-01 from float64, allowed 3.75e-01")):
        verdict = reference.judge((right + error).bfloat16(), yardstick.bfloat16(), right)
        assert verdict == (error, 0.125, wrong)
    # a share of the root mean square, sqrt(5), beside it
    wide = (right + 1.0).bfloat16()
    assert not reference.judge(wide, yardstick.bfloat16(), right, 0.46).wrong
    wrong = reference.judge(wide, yardstick.bfloat16(), right, 0.44).wrong
    assert wrong == "off by 1.00e+00 from float64, allowed 9.84e-01 in root mean square"


def test_nan_and_another_shape_are_wrong():
    right = torch.zeros(4, dtype=torch.float64)
    for rounding in (0.0, 0.5):
        assert reference.judge(torch.full((4,), math.nan), torch.zeros(4), right, rounding).wrong
    assert reference.judge(torch.zeros(2), torch.zeros(2), right).wrong == "of shape (2,), not (4,)"
