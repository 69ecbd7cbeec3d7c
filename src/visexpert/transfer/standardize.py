"""Standardization of a teacher's tokens, so that no teacher and no channel weighs more by its scale alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.processes import summed, together

Standardization = Literal["channel", "phi_s"]


def _apply_in_float32(buffers: nn.Module, names: tuple[str, ...], apply: Callable[[], object]) -> None:
    """Move and cast like any module, but keep these buffers in float32: averages over many batches need it."""
    before = {name: getattr(buffers, name) for name in names}
    apply()
    for name, old in before.items():
        new = getattr(buffers, name)
        if new is not None and old is not None and torch.finfo(new.dtype).bits < 32:
            setattr(buffers, name, old.to(device=new.device, dtype=torch.float32))


class Standardize(nn.Module):
    """Standardizes tokens to zero mean and unit variance per channel, with statistics over all tokens seen in training.

    Statistics are cumulative (each batch counts equally) instead of per batch or per token, so that an image's target
    does not depend on its batch and settles with time. They are saved in the checkpoint. Processes that train together
    count their batches as one. Before any training, the statistics of the batch are used.

    Args:
        dim: Number of channels.
    """

    keeps_statistics = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(dim, affine=False, momentum=None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Standardize:
        _apply_in_float32(
            self.statistics,
            ("running_mean", "running_var"),
            lambda: super(Standardize, self)._apply(fn, recurse),  # type: ignore[no-untyped-call]
        )
        return self

    def forward(self, tokens_BTE: Tensor) -> Tensor:
        """Standardize tokens (B, T, E) of images; in training, first update the statistics. The result has no graph."""
        statistics = self.statistics
        assert statistics.running_mean is not None and statistics.running_var is not None
        tokens_BTE = tokens_BTE.detach().to(statistics.running_mean.dtype)
        if self.training and (tokens_BTE.numel() or together()):
            self._learn(tokens_BTE.flatten(0, 1))
        if tokens_BTE.numel() == 0:
            return tokens_BTE
        mean_E, var_E = statistics.running_mean, statistics.running_var
        if not self.training and not statistics.num_batches_tracked:
            var_E, mean_E = torch.var_mean(tokens_BTE, dim=(0, 1))
        return F.batch_norm(tokens_BTE.flatten(0, 1), mean_E, var_E, eps=statistics.eps).view_as(tokens_BTE)

    def _learn(self, tokens_ME: Tensor) -> None:
        """Update as BatchNorm1d does, but skip a batch that is not finite. The host does not wait for the device."""
        statistics, seen = self.statistics, _mean_and_variance(tokens_ME)
        assert statistics.running_mean is not None and statistics.running_var is not None
        tracked = statistics.num_batches_tracked
        assert tracked is not None
        fine = seen.isfinite().all()
        tracked.add_(fine.to(tracked.dtype))
        share = torch.where(fine, 1.0 / tracked.clamp_min(1), torch.zeros_like(seen[0, 0]))
        for own_E, seen_E in zip((statistics.running_mean, statistics.running_var), seen, strict=True):
            own_E.mul_(1.0 - share).add_(share * torch.where(fine, seen_E, torch.zeros_like(seen_E)))


class PhiS(nn.Module):
    """PHI-S (arXiv 2410.01680): rotates tokens by PCA and a Hadamard matrix, then scales all of them by one number.

    y = (H U^T (x - mean)) / sqrt(mean eigenvalue), where U has the eigenvectors of the tokens' covariance and H is
    orthogonal with entries of one size. Every channel of y has unit variance, as after :class:`Standardize`, but the
    map is orthogonal up to one scale: an error counts the same in every direction of the teacher's space, so the
    squared error weighs what the teacher varies most in, and the original tokens can be restored.

    The map is computed once, because its eigenvectors would jump between batches: by :meth:`fit` before training, else
    from the first finite batch of training, that of all processes. It is saved in the checkpoint. Before that, the
    batch's own is used.

    Args:
        dim: Number of channels E.

    Raises:
        ConfigError: There is no Hadamard matrix of this size, or :func:`hadamard` cannot build it.
    """

    keeps_statistics = True
    mean_E: Tensor
    rotation_EE: Tensor
    scale: Tensor
    fitted: Tensor
    _names = ("mean_E", "rotation_EE", "scale")

    def __init__(self, dim: int) -> None:
        super().__init__()
        hadamard(dim)
        self.register_buffer("mean_E", torch.zeros(dim))
        self.register_buffer("rotation_EE", torch.eye(dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("fitted", torch.tensor(False))
        self._is_fitted = False  # on the host, so that it need not wait for the device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PhiS:
        _apply_in_float32(self, self._names, lambda: super(PhiS, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def ready(self) -> bool:
        """Return whether the map was computed, here or in the run that wrote the checkpoint."""
        self._is_fitted = self._is_fitted or bool(self.fitted)
        return self._is_fitted

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Compute the map from the mean and covariance of all tokens.

        Args:
            batches: Tokens (..., E); batches that are not finite are left out. If none is left, nothing is computed.
        """
        found = _moments(batches)
        if found is None:
            return
        mean_E, rotation_EE, scale = _phi_s(*found)
        self.mean_E.copy_(mean_E)
        self.rotation_EE.copy_(rotation_EE)
        self.scale.copy_(scale)
        self.fitted.fill_(True)

    def forward(self, tokens_BTE: Tensor) -> Tensor:
        """Standardize tokens (B, T, E) of images; the result has no graph."""
        tokens_BTE = tokens_BTE.detach().to(self.mean_E.dtype)
        if self.training and not self.ready() and (tokens_BTE.numel() or together()):
            self.fit([tokens_BTE])
        if tokens_BTE.numel() == 0:
            return tokens_BTE
        mean_E, rotation_EE, scale = self.mean_E, self.rotation_EE, self.scale
        if not self.ready() and (own := _moments([tokens_BTE])) is not None:
            mean_E, rotation_EE, scale = (part.to(tokens_BTE) for part in _phi_s(*own))
        with torch.autocast(tokens_BTE.device.type, enabled=False):
            return (tokens_BTE - mean_E) @ (rotation_EE.T * scale)

    def restore(self, standardized_BTE: Tensor) -> Tensor:
        """Undo the map: return tokens (..., E) of the teacher from standardized ones."""
        return standardized_BTE.to(self.mean_E.dtype) @ self.rotation_EE / self.scale + self.mean_E


def make_standardization(kind: Standardization, dim: int) -> Standardize | PhiS:
    """Build the standardization of a teacher's tokens of width ``dim``."""
    return PhiS(dim) if kind == "phi_s" else Standardize(dim)


def hadamard(size: int) -> Tensor:
    """Return an orthogonal matrix (size, size) whose entries are all +-1 / sqrt(size), in float64.

    Built by Sylvester's doubling from 1, 2, or one of Paley's two constructions over a prime: most multiples of 4 (the
    first without is 52), among them the widths of vision transformers.

    Raises:
        ConfigError: There is none, or these constructions do not give it.
    """
    core, doublings = size, 0
    while (built := _core(core)) is None:
        if core % 2 or core < 2:
            raise ConfigError(
                f"PHI-S needs a Hadamard matrix as wide as the teacher's tokens, and there is none for {size} channels "
                "that this package can build (1, 2, and most multiples of 4); use heads.standardize: channel."
            )
        core, doublings = core // 2, doublings + 1
    for _ in range(doublings):
        built = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=built.dtype), built)
    return built / math.sqrt(size)


def _core(size: int) -> Tensor | None:
    """Return a Hadamard matrix of entries +-1 by Paley's constructions, or of size 1 or 2; None if they give none."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4:
        return None
    if _is_prime(prime := size - 1):  # 3 modulo 4
        return torch.eye(size, dtype=torch.float64) + _bordered(prime, below=-1.0)
    if _is_prime(prime := size // 2 - 1) and prime % 4 == 1:
        conference = _bordered(prime, below=1.0)
        double = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        single = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, double) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), single)
    return None


def _bordered(prime: int, *, below: float) -> Tensor:
    """Return Jacobsthal's matrix of quadratic residues, with a row of ones above it and a column of ``below``."""
    residue = torch.full((prime,), -1.0, dtype=torch.float64)
    residue[torch.arange(1, prime) ** 2 % prime] = 1.0
    residue[0] = 0.0
    steps = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, below
    matrix[1:, 1:] = residue[(steps[:, None] - steps) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _mean_and_variance(tokens_ME: Tensor) -> Tensor:
    """Return the mean and unbiased variance (2, E) of the tokens of all processes; not finite without any."""
    count, own_2E = len(tokens_ME), tokens_ME.new_zeros(2, tokens_ME.shape[1])
    if count > 1 or not together():
        F.batch_norm(tokens_ME, own_2E[0], own_2E[1], training=True, momentum=1.0)  # fast
    elif count:
        own_2E[0] = tokens_ME[0]
    if not together():
        return own_2E
    mean_E, total = _mean_over_processes(own_2E[0], count)
    scatter_E = summed(own_2E[1] * max(count - 1, 0) + count * (own_2E[0] - mean_E).square())
    return torch.stack([mean_E, scatter_E / (total - 1)])


def _mean_over_processes(mean_E: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of what each process has the mean and number of, and the number of all."""
    sums = summed(torch.cat([mean_E * count, mean_E.new_full((1,), count)]))
    return sums[:-1] / sums[-1], sums[-1]


def _moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return mean (E,) and covariance (E, E) of the rows of all finite batches, float64; None without any.

    Batches, and processes that train together, are joined around their own means (Chan et al. 1979), so a mean far from
    zero costs no digits.
    """
    count, mean_E, scatter_EE = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        rows_ME = batch.detach().flatten(0, -2).double()
        rows_ME = rows_ME[: len(rows_ME) if bool(rows_ME.isfinite().all()) else 0]
        own_E = rows_ME.sum(0) / max(len(rows_ME), 1)
        centered_ME = rows_ME - own_E
        apart_E = own_E - mean_E.to(own_E)
        total = max(count + len(rows_ME), 1)
        within_EE = centered_ME.T @ centered_ME
        between_EE = torch.outer(apart_E, apart_E) * (count * len(rows_ME) / total)
        scatter_EE = scatter_EE.to(own_E) + within_EE + between_EE
        mean_E, count = mean_E.to(own_E) + apart_E * (len(rows_ME) / total), count + len(rows_ME)
    if together():
        own_E, (mean_E, counted) = mean_E, _mean_over_processes(mean_E, count)
        scatter_EE = summed(scatter_EE + count * torch.outer(own_E - mean_E, own_E - mean_E))
        count = int(counted)
    return (mean_E, scatter_EE / count) if count else None


def _phi_s(mean_E: Tensor, covariance_EE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the rotation H U^T and the scale 1 / sqrt(mean eigenvalue)."""
    vectors_EE = torch.linalg.eigh(covariance_EE).eigenvectors
    rotation_EE = hadamard(len(mean_E)).to(covariance_EE) @ vectors_EE.T
    mean_variance = covariance_EE.diagonal().mean()
    return mean_E, rotation_EE, mean_variance.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
