"""Addressed noise: published integers, the distribution of the normals, and independence from everything but
the address."""

import math

import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from support.helpers import DEVICE, REAL_SHAPES, NoSync, needs_gpu

from fastgrpo_kernels import INITIAL_STEP, NoiseAddress, normal, normal_ref, normal_triton
from fastgrpo_kernels.common import BLOCK
from fastgrpo_kernels.philox import box_muller, box_muller_ref, philox_ref

pytestmark = pytest.mark.gpu

SIZES = (1, 3, 257, BLOCK + 1, *(math.prod(shape[1:]) for shape in REAL_SHAPES))
# fp32 log, cos and sin against float64: angles up to 2 pi are rounded to 2.4e-7, at a radius of at most 6.8.
NORMAL_TOLERANCE = 2e-6

# Random123, tests/kat_vectors, philox4x32 10 rounds: counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def int64(*values: int) -> torch.Tensor:
    """Unsigned 64-bit integers as the int64 of the same bits."""
    return torch.tensor([v - 2**64 if v >= 2**63 else v for v in values], dtype=torch.int64, device=DEVICE)


def address(seed: int = 7, iteration: int = 3, sample_id: tuple[int, ...] = (0, 1, 5)) -> NoiseAddress:
    return NoiseAddress(int64(seed), int64(iteration), int64(*sample_id))


@triton.jit
def philox_kernel(seed, counter, out, N, BLOCK: tl.constexpr):
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    c0 = tl.load(counter + o_n, mask=m_n).to(tl.uint32)
    c1 = tl.load(counter + N + o_n, mask=m_n).to(tl.uint32)
    c2 = tl.load(counter + 2 * N + o_n, mask=m_n).to(tl.uint32)
    c3 = tl.load(counter + 3 * N + o_n, mask=m_n).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
    tl.store(out + o_n, r0.to(tl.int64), mask=m_n)
    tl.store(out + N + o_n, r1.to(tl.int64), mask=m_n)
    tl.store(out + 2 * N + o_n, r2.to(tl.int64), mask=m_n)
    tl.store(out + 3 * N + o_n, r3.to(tl.int64), mask=m_n)


@triton.jit
def box_muller_kernel(r0, r1, out, N, BLOCK: tl.constexpr):
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    b_r0 = tl.load(r0 + o_n, mask=m_n, other=0).to(tl.uint32)
    b_r1 = tl.load(r1 + o_n, mask=m_n, other=0).to(tl.uint32)
    n0, n1 = box_muller(b_r0, b_r1)
    tl.store(out + o_n, n0, mask=m_n)
    tl.store(out + N + o_n, n1, mask=m_n)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox_ref(tuple(int64(c) for c in counter), int64(key[0] | key[1] << 32))
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("seed", (0, 0xA409382212345678, 2**64 - 1))
def test_integers_equal_triton(seed):
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 2**32, (4, 64), generator=generator).to(DEVICE)
    out = torch.empty_like(counter)
    philox_kernel[(1,)](int64(seed), counter, out, 64, BLOCK=64)
    assert torch.equal(torch.stack(philox_ref(tuple(counter), int64(seed))), out)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", (0, INITIAL_STEP))
def test_triton_equals_reference(size, step):
    where = address(seed=0xFEDCBA9876543210, iteration=2**32 - 1, sample_id=(0, 2**32 - 1))
    expected = normal_ref(where, int64(step), size)
    assert expected.shape == (2, size)
    torch.testing.assert_close(normal_triton(where, int64(step), size), expected, rtol=0, atol=NORMAL_TOLERANCE)


@needs_gpu
def test_a_gpu_has_the_noise_of_a_cpu():
    """The same integers, and the same normals up to the last bits of log, cos and sin."""
    where, step, size = address(seed=0xFEDCBA9876543210, sample_id=tuple(range(9))), int64(5), 65536
    there = NoiseAddress(*(tensor.cpu() for tensor in where))
    counter = torch.randint(0, 2**32, (4, 64), generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(counter, device=DEVICE)
    philox_kernel[(1,)](where.seed, counter.to(DEVICE), out, 64, BLOCK=64)
    assert torch.equal(out.cpu(), torch.stack(philox_ref(tuple(counter), there.seed)))
    assert torch.equal(out, torch.stack(philox_ref(tuple(counter.to(DEVICE)), where.seed)))
    expected = normal_ref(there, step.cpu(), size)
    for run in (normal_triton, normal_ref):
        torch.testing.assert_close(run(where, step, size).cpu(), expected, rtol=0, atol=NORMAL_TOLERANCE)


def test_extreme_words():
    """Both ends of the uniforms, where log could meet 0: finite, and the same as the reference."""
    words = int64(0, 1, 2**31, 2**32 - 2, 2**32 - 1)
    r0, r1 = (word.flatten() for word in torch.meshgrid(words, words, indexing="ij"))
    expected = torch.stack(box_muller_ref(r0, r1)).float()
    assert 6.7 < expected.abs().max() < 6.8
    out = torch.empty_like(expected)
    box_muller_kernel[(1,)](r0, r1, out, r0.numel(), BLOCK=32)
    torch.testing.assert_close(out, expected, rtol=0, atol=NORMAL_TOLERANCE)


def test_standard_normal():
    eps = normal(address(sample_id=tuple(range(16))), 2, 16384).cpu().double().flatten()
    count = eps.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(eps.pow(power).mean() - moment) < 4 * (variance / count) ** 0.5
    assert stats.kstest(eps.numpy(), "norm").pvalue > 1e-3


def test_every_word_of_the_address_changes_the_noise():
    """And changes it to something independent: no correlation across addresses, nor between the four of a
    quad."""
    size = 4096
    rows = [
        normal(address(sample_id=(4,)), 1, size),
        normal(address(sample_id=(5,)), 1, size),
        normal(address(sample_id=(4,)), 2, size),
        normal(address(sample_id=(4,)), INITIAL_STEP, size),
        normal(address(sample_id=(4,), iteration=4), 1, size),
        normal(address(sample_id=(4,), seed=8), 1, size),
        normal(address(sample_id=(4,), seed=7 + 2**32), 1, size),
        normal(address(sample_id=(1,), iteration=3), 4, size),
    ]
    for table in (torch.cat(rows), rows[0].view(-1, 4).T):
        correlation = torch.corrcoef(table.double()) - torch.eye(len(table), device=DEVICE)
        assert correlation.abs().max() < 5 / table.shape[1] ** 0.5


@pytest.mark.parametrize("size", SIZES)
def test_independent_of_batch_size_and_threads(size):
    ids = tuple(range(7))
    whole = normal(address(sample_id=ids), 1, size)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        parts = [normal(address(sample_id=part), 1, size) for part in (ids[:1], ids[1:4], ids[4:])]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, torch.cat(parts))
    longer = normal(address(sample_id=ids), 1, size + 5)
    assert torch.equal(whole, longer[:, :size])


def test_step_as_int_or_tensor():
    assert torch.equal(normal(address(), 9, 33), normal(address(), int64(9), 33))


def test_no_sync():
    where, step = address(), int64(0)
    with NoSync():
        normal_ref(where, step, 10)
        normal(where, INITIAL_STEP, 10)


@pytest.mark.parametrize("step", (-1, 2**32))
def test_step_outside_32_bits(step):
    with pytest.raises(ValueError, match=f"step is {step}, expected 0 <= step < 2"):
        normal(address(), step, 8)


def test_bad_inputs():
    with pytest.raises(ValueError, match="size is 0"):
        normal(address(), 0, 0)
    with pytest.raises(ValueError, match=r"address.seed has dtype torch.int32"):
        normal(address()._replace(seed=int64(1).int()), 0, 8)
    with pytest.raises(ValueError, match=r"address.iteration has shape \(2,\)"):
        normal(address()._replace(iteration=int64(1, 2)), 0, 8)
    with pytest.raises(ValueError, match=r"step has shape \(2,\)"):
        normal(address(), int64(1, 2), 8)
