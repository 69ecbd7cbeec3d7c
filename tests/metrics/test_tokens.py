"""What tokens hold, by probes whose answer is known, and how far they are from others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.losses import normalized_mse
from visexpert.metrics import fit_ridge, ridge_accuracy, ridge_r2
from visexpert.metrics.tokens import TokenError, TokenProbes, cell_targets


def _data(count: int = 400, width: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features_NE = torch.randn(count, width, generator=generator, dtype=torch.float64) * 3 + 5
    fit_N = torch.arange(count) < count // 2
    return features_NE, fit_N, ~fit_N


def test_linear_targets_are_read_perfectly() -> None:
    features_NE, fit_N, evaluate_N = _data()
    targets_NM = features_NE @ torch.randn(6, 2, dtype=torch.float64) + 7
    assert ridge_r2(features_NE, targets_NM, fit_N=fit_N, evaluate_N=evaluate_N) == pytest.approx(1, abs=1e-6)
    # float16 tokens are lifted to float64 before anything is summed
    assert ridge_r2(features_NE.half(), targets_NM, fit_N=fit_N, evaluate_N=evaluate_N) == pytest.approx(1, abs=1e-4)


def test_unrelated_targets_are_not_read() -> None:
    features_NE, fit_N, evaluate_N = _data(2000)
    noise_N = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    assert abs(ridge_r2(features_NE, noise_N, fit_N=fit_N, evaluate_N=evaluate_N)) < 0.03


def test_known_share_of_variance() -> None:
    """Target = feature + noise of a third of its variance: R2 = 3/4."""
    features_NE, fit_N, evaluate_N = _data(20000, 3)
    signal_N = (features_NE[:, 0] - 5) / 3
    target_N = signal_N + torch.randn(20000, generator=torch.Generator().manual_seed(2)) / 3**0.5
    assert ridge_r2(features_NE, target_N, fit_N=fit_N, evaluate_N=evaluate_N) == pytest.approx(0.75, abs=0.02)


def test_labels() -> None:
    features_NE, fit_N, evaluate_N = _data()
    labels_N = (features_NE[:, 0] > 5).long() + 2 * (features_NE[:, 1] > 5).long()
    accuracy = ridge_accuracy(features_NE, labels_N, fit_N=fit_N, evaluate_N=evaluate_N)
    assert 0.85 < accuracy <= 1
    separable_NE = torch.nn.functional.one_hot(labels_N, 4).double()
    assert ridge_accuracy(separable_NE, labels_N, fit_N=fit_N.nonzero()[:, 0], evaluate_N=evaluate_N) == 1


def test_solution_equals_normal_equations() -> None:
    features_NE, *_ = _data(80, 5)
    targets_NM = torch.randn(80, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe = fit_ridge(features_NE, targets_NM, penalties=[0.1])
    x_NE = (features_NE - features_NE.mean(0)) / features_NE.std(0, correction=0)
    y_NM = targets_NM - targets_NM.mean(0)
    weight_EM = torch.linalg.solve(x_NE.T @ x_NE / 80 + 0.1 * torch.eye(5, dtype=torch.float64), x_NE.T @ y_NM / 80)
    torch.testing.assert_close(probe.weight_EM, weight_EM)
    torch.testing.assert_close(probe.predict(features_NE), x_NE @ weight_EM + targets_NM.mean(0))


def test_penalty_is_chosen_on_the_fit_rows_alone() -> None:
    features_NE, fit_N, evaluate_N = _data(60, 40)
    targets_N = features_NE[:, 0] + 5 * torch.randn(60, generator=torch.Generator().manual_seed(4))
    # Few rows, many features, much noise: a large penalty wins. Without noise a small one does.
    assert fit_ridge(features_NE[fit_N], targets_N[fit_N, None]).penalty >= 0.1
    assert fit_ridge(features_NE, features_NE[:, :1]).penalty == 1e-6
    # What the evaluation rows hold cannot change the fit.
    changed_NE = features_NE.clone()
    changed_NE[evaluate_N] = 99.0
    torch.testing.assert_close(
        fit_ridge(features_NE[fit_N], targets_N[fit_N, None]).weight_EM,
        fit_ridge(changed_NE[fit_N], targets_N[fit_N, None]).weight_EM,
    )


def test_scale_and_constant_features_do_not_matter() -> None:
    features_NE, fit_N, evaluate_N = _data()
    target_N = features_NE[:, 0] ** 2
    plain = ridge_r2(features_NE, target_N, fit_N=fit_N, evaluate_N=evaluate_N)
    scaled_NE = torch.cat([features_NE * torch.tensor([1e-4, 1, 10, 1e5, 1, 1]), torch.full((400, 1), 0.1)], 1)
    assert ridge_r2(scaled_NE, target_N, fit_N=fit_N, evaluate_N=evaluate_N) == pytest.approx(plain, abs=1e-6)


def test_splits_must_be_apart_and_large_enough() -> None:
    features_NE, fit_N, evaluate_N = _data()
    target_N = features_NE[:, 0]
    with pytest.raises(ValueError, match="overlap"):
        ridge_r2(features_NE, target_N, fit_N=fit_N, evaluate_N=torch.tensor([0, 399]))
    with pytest.raises(ValueError, match="too few"):
        ridge_r2(features_NE, target_N, fit_N=torch.tensor([0, 1]), evaluate_N=evaluate_N)
    with pytest.raises(ValueError, match="at least one evaluation row"):
        ridge_r2(features_NE, target_N, fit_N=fit_N, evaluate_N=torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="constant on the evaluation rows"):
        ridge_r2(features_NE, torch.ones(400), fit_N=fit_N, evaluate_N=evaluate_N)
    with pytest.raises(ValueError, match="above 0"):
        fit_ridge(features_NE, target_N[:, None], penalties=[0.0])


CLASSES = ("colour", "shape", "size", "material")


def scenes(count: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Random truth of 4x4 cells of 4x4 pixels, each cell one object or background."""
    generator = torch.Generator().manual_seed(seed)
    depth = 1 + 4 * torch.rand(count, 4, 4, generator=generator)
    labels = torch.randint(-1, 3, (count, 4, 4), generator=generator)
    normals = torch.nn.functional.normalize(torch.randn(count, 3, 4, 4, generator=generator), dim=1)

    def up(values: Tensor) -> Tensor:
        return values.repeat_interleave(4, -1).repeat_interleave(4, -2)

    return {"depth_BHW": up(depth), "normals_B3HW": up(normals), **{f"{name}_BHW": up(labels) for name in CLASSES}}


def test_cell_targets_by_hand() -> None:
    targets = scenes(1)
    for name in CLASSES:
        targets[f"{name}_BHW"] = torch.full((1, 16, 16), -1)
    targets["colour_BHW"][0, :4, :3] = 5  # three quarters of the first cell
    targets["material_BHW"][0, :4, :3] = 1
    targets["depth_BHW"] = torch.full((1, 16, 16), torch.e)
    cells = cell_targets(targets, (4, 4))
    assert cells["object"][0].tolist() == [True] + [False] * 15
    assert cells["colour"][0, 0] == 5
    assert cells["depth"].shape == (1, 16, 1)
    assert cells["depth"].flatten().tolist() == pytest.approx([1.0] * 16)


def test_truth_in_the_tokens_is_found_and_noise_is_not() -> None:
    targets = scenes(60)
    cells = cell_targets(targets, (4, 4))
    onehot = torch.nn.functional.one_hot(cells["colour"], 3).float()
    tokens_BTD = torch.cat([cells["depth"], onehot, torch.randn(60, 16, 4)], dim=-1)
    probes = TokenProbes()
    probes.update(tokens_BTD, (4, 4), targets)
    scores = probes.compute()
    assert scores["depth"] > 0.999
    assert scores["object_depth"] > 0.999
    assert scores["colour"] > 0.99
    assert abs(scores["normals"]) < 0.1


def test_images_past_the_limit_are_ignored() -> None:
    targets = scenes(20)
    few, many = TokenProbes(max_images=12), TokenProbes(max_images=12)
    tokens_BTD = torch.randn(20, 16, 3, generator=torch.Generator().manual_seed(1))
    few.update(tokens_BTD[:12], (4, 4), {name: value[:12] for name, value in targets.items()})
    many.update(tokens_BTD, (4, 4), targets)
    assert few.compute() == many.compute()


def test_nothing_seen_gives_nothing() -> None:
    assert TokenProbes().compute() == {}


def test_scores_that_too_few_tokens_stand_for_are_left_out() -> None:
    targets = scenes(8)
    for name in CLASSES:
        targets[f"{name}_BHW"] = torch.full((8, 16, 16), -1)
        targets[f"{name}_BHW"][:, :4, :4] = 1  # eight tokens on objects
    probes = TokenProbes()
    probes.update(torch.randn(8, 16, 3), (4, 4), targets)
    assert set(probes.compute()) == {"depth", "normals"}


def test_batches_add_up_to_the_whole() -> None:
    reference, ours = torch.randn(5, 4, 6) + 3, torch.randn(5, 4, 6) + 3
    error = TokenError()
    for part in (slice(0, 2), slice(2, 5)):
        error.update(ours[part], reference[part])
    found = error.compute()
    cosine = F.cosine_similarity(ours.double(), reference.double(), dim=-1)
    assert found["nmse"] == pytest.approx(float(normalized_mse(ours, reference)), rel=1e-5)
    rms = ((ours - reference).square().mean() / reference.square().mean()).sqrt()
    assert found["relative"] == pytest.approx(float(rms), rel=1e-5)
    assert found["mean_cosine"] == pytest.approx(float(cosine.mean()))
    assert found["min_cosine"] == pytest.approx(float(cosine.min()))
    assert found["num_images"] == 5


def test_equal_tokens_and_a_constant() -> None:
    reference, error = torch.randn(3, 4, 6), TokenError()
    error.update(reference, reference)
    assert error.compute()["nmse"] == 0 and error.compute()["min_cosine"] == pytest.approx(1)
    error.reset()
    error.update(reference.mean((0, 1)).expand_as(reference), reference)
    assert error.compute()["nmse"] == pytest.approx(1, rel=1e-5) and error.compute()["num_images"] == 3
