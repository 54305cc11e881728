"""Running statistics against the same computed at once in float64."""

import gc

import pytest
import torch

from sparsekern import stats
from sparsekern.ops.inverse_cholesky import inverse_cholesky
from sparsekern.stats import GradSquare, Gram, InputNorm


def tokens(count, in_features, seed=0):
    return torch.randn(count, in_features, generator=torch.Generator().manual_seed(seed))


def test_input_norm_is_the_column_norm_of_the_first_seven_eighths_of_each_batch_as_in_gram():
    x = tokens(32, 7)
    norm, gram = InputNorm(7), Gram(7)
    for part in x.split(16):
        norm.add(part)
        gram.add(part)
    seen = torch.cat([x[:14], x[16:30]]).double()
    torch.testing.assert_close(norm.norm.double(), seen.norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.norm, gram.norm, rtol=1e-6, atol=0)
    assert norm.tokens == 28


def test_gram_is_the_mean_outer_product_of_the_first_seven_eighths_of_each_batch():
    x = tokens(32, 5)
    gram = Gram(5)
    gram.add(x[:16])
    gram.add(x[16:])
    seen = torch.cat([x[:14], x[16:30]]).double()
    torch.testing.assert_close(gram.hessian.double(), seen.T @ seen / 28, rtol=1e-5, atol=1e-6)
    assert (gram.tokens, gram.held_out_tokens) == (28, 4)


def test_fp16_activations_that_would_overflow_are_summed_in_float32():
    x = torch.full((8, 3), 6e4, dtype=torch.float16)
    gram, norm = Gram(3), InputNorm(3)
    gram.add(x)
    norm.add(x)
    assert gram.hessian.isfinite().all()
    assert norm.norm.isfinite().all()


def test_error_is_the_relative_output_error_on_the_tokens_of_its_part():
    x, weight = tokens(16, 6), tokens(4, 6, seed=1)
    pruned = weight * (tokens(4, 6, seed=2) > 0)
    gram = Gram(6)
    gram.add(x)

    def direct(part):
        return ((part @ (weight - pruned).T).norm() / (part @ weight.T).norm()).item()

    assert gram.error(weight, pruned) == pytest.approx(direct(x[:14]), rel=1e-5)
    assert gram.held_out_error(weight, pruned) == pytest.approx(direct(x[14:]), rel=1e-5)


def test_without_held_out_tokens_there_is_no_held_out_error():
    gram = Gram(3)
    gram.add(tokens(5, 3))
    assert gram.held_out_error(torch.ones(2, 3), torch.zeros(2, 3)) is None


def test_inverse_cholesky_is_upper_triangular_and_rebuilds_the_damped_inverse():
    gram = Gram(9)
    gram.add(tokens(64, 9))
    u, damping = gram.inverse_cholesky(0.01)
    h = gram.hessian.double()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(9)
    torch.testing.assert_close((u.T @ u).double(), damped.inverse(), rtol=1e-4, atol=1e-4)
    assert torch.equal(u, u.triu())
    assert u.is_contiguous()
    assert damping == 0.01


def test_layers_that_share_an_input_share_the_factor():
    gram = Gram(4)
    gram.add(tokens(32, 4))
    assert gram.inverse_cholesky(0.01)[0] is gram.inverse_cholesky(0.01)[0]
    before = gram.inverse_cholesky(0.01)[0]
    gram.add(tokens(32, 4, seed=1))
    assert not torch.equal(gram.inverse_cholesky(0.01)[0], before)


def test_an_indefinite_hessian_raises_the_damping_and_says_so():
    gram = Gram(8)
    # one token in eight dimensions: rank one, singular without damping
    gram.add(tokens(1, 8))
    u, damping = gram.inverse_cholesky(0.0)
    assert u.isfinite().all()
    # from 0 the first step is to 1e-4, every further one tenfold
    assert damping == pytest.approx(1e-4 * 10 ** (gram.retries - 1))
    assert gram.retries >= 1


def test_a_hessian_that_no_damping_repairs_is_an_error():
    gram = Gram(2)
    gram.add(torch.eye(2))
    gram._sum = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    with pytest.raises(RuntimeError, match="not positive definite at damping 1"):
        gram.inverse_cholesky(0.01)


def test_dead_inputs_are_found_and_leave_the_hessian_invertible():
    x = tokens(32, 6)
    x[:, 4] = 0
    gram = Gram(6)
    gram.add(x)
    assert gram.dead.tolist() == [False] * 4 + [True, False]
    assert gram.inverse_cholesky(0.01)[0].isfinite().all()


def test_a_hessian_is_the_only_copy_of_the_sums_that_factoring_makes(monkeypatch):
    """Another would be the largest thing in memory while a wide layer is pruned."""
    size, alive = 53, []
    gram = Gram(size)
    gram.add(tokens(200, size))

    def factor(h):
        gc.collect()
        alive.extend(x.data_ptr() for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == h.shape)
        return inverse_cholesky(h)

    monkeypatch.setattr(stats, "inverse_cholesky", factor)
    gram.inverse_cholesky(0.01)
    # the calibration tokens' sums, the held-out ones', H
    assert len(set(alive)) == 3


def test_damping_per_input_is_that_of_the_hessian_scaled_to_unit_diagonal():
    gram = Gram(9)
    # inputs a thousand times apart: what the mean adds to the smallest drowns it
    gram.add(tokens(64, 9) * torch.logspace(-1.5, 1.5, 9))
    u, damping = gram.inverse_cholesky(0.1, per_input=True)
    h = gram.hessian.double()
    scale = h.diagonal().sqrt()
    unit = h / scale.outer(scale) + 0.1 * torch.eye(9)
    torch.testing.assert_close((u.T @ u).double() * scale.outer(scale), unit.inverse(), rtol=1e-4, atol=1e-4)
    assert damping == 0.1
    assert not torch.allclose(u, gram.inverse_cholesky(0.1)[0])


def test_the_factor_asked_for_last_is_the_one_reported():
    gram = Gram(8)
    gram.add(tokens(1, 8))
    assert (gram.damping, gram.retries) == (None, None)
    gram.inverse_cholesky(0.0)
    gram.inverse_cholesky(0.5)
    assert (gram.damping, gram.retries) == (0.5, 0)
    gram.inverse_cholesky(0.0)
    assert gram.retries > 0


def test_a_hessian_that_is_not_finite_is_told_from_one_that_is_indefinite():
    gram = Gram(3)
    # finite in float32, their squares are not
    gram.add(torch.full((8, 3), 1e20))
    with pytest.raises(ValueError, match="Hessian holds 9 NaN or infinite values"):
        gram.inverse_cholesky(0.01)
    gram = Gram(3)
    gram.add(tokens(8, 3))
    gram._sum[0, 2] = gram._sum[2, 0] = torch.nan
    with pytest.raises(ValueError, match="Hessian holds 2 NaN or infinite values"):
        gram.inverse_cholesky(0.01)


def test_the_held_out_hessian_is_that_of_the_last_eighth_of_each_batch():
    x, gram = tokens(32, 5), Gram(5)
    gram.add(x[:16])
    gram.add(x[16:])
    unseen = torch.cat([x[14:16], x[30:]]).double()
    torch.testing.assert_close(gram.held_out_hessian.double(), unseen.T @ unseen / 4, rtol=1e-5, atol=1e-6)
    few = Gram(5)
    few.add(x[:7])
    assert few.held_out_hessian is None


@pytest.mark.parametrize("statistic", [Gram, InputNorm])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_never_reach_the_statistics(statistic, bad):
    stats = statistic(4)
    x = tokens(8, 4)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="activations hold 1 NaN or infinite"):
        stats.add(x)
    assert stats.tokens == 0
    assert stats.norm.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_of_a_model_is_summed_in_float32(dtype):
    x, gram = tokens(40, 6).to(dtype), Gram(6)
    gram.add(x)
    seen = x[:35].double()
    torch.testing.assert_close(gram.hessian.double(), seen.T @ seen / 35, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gram.norm.double(), seen.norm(dim=0), rtol=1e-5, atol=0)


def test_what_is_read_between_two_batches_is_whole():
    x, gram = tokens(32, 5), Gram(5)
    for part in x.split(16):
        gram.add(part)
        assert torch.equal(gram.hessian, gram.hessian.T)
        assert torch.equal(gram.held_out_hessian, gram.held_out_hessian.T)


def test_grad_square_is_the_mean_over_all_samples_of_squares_that_none_leaves_at_zero():
    stats = GradSquare(1, 2)
    stats.add(torch.tensor([[3.0, -1.0]]))
    stats.add(torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16))
    stats.add(None)
    stats.add(None)
    assert stats.mean_square.tolist() == [[2.5, 0.5]]
    assert stats.samples == 4


def test_a_gradient_that_is_not_finite_never_reaches_the_mean():
    stats = GradSquare(1, 2)
    with pytest.raises(ValueError, match="gradient holds 1 NaN or infinite"):
        stats.add(torch.tensor([[torch.nan, 1.0]]))
    assert stats.samples == 0
    assert stats.mean_square.eq(0).all()
