"""What an operator is: y = A x, through a singular value decomposition A = U Σ Vᵀ.

To add one: a class in a file of this folder, a row of `OPERATORS` in `__init__.py`, a task YAML in
configs/. A class states

    name               in task files (measurement.operator.name) and in the results path
    parameters         its keys under measurement.operator, each a `util.parameters.Parameter`
    build              (in_shape, device, dtype, **parameters) → the operator, parameters complete
    variant            (parameters) → the part of the results path that tells its kinds apart
    restored_size      (size, parameters) → (H, W) restored from a measurement of that (H, W)

and, if they hold, `is_identity`, `keeps_sharp`, `of_kspace`; if it acts along a volume's slice
axis, `of_volumes`, `on_grid`, `restored_depth`, `restored_spacing`, `interpolated`; or, if x's
channels cannot be slices, `takes_volumes`. It gives `in_shape, out_shape, singular_values, U, Ut,
V, Vt, frequency_variance`, and where it knows better `frequency_posterior_mean`, `widest_std` and
`picture`. Methods see nothing else of it. A separable operator, A = A_channel ⊗ A_rows ⊗ A_cols,
only needs `factors_of`, see `separable.py`.

Everything that methods do with a measurement in the singular directions is written here once:
`inverted`, `correction`, `gain`, `score`, `posterior_mean`. One whose SVD is out of reach
(`has_svd` is False, see `several_coils.Points`) gives `forward`, `transpose`, `reduced`, `score`,
`frequency_posterior_mean`, `spread`, `device`, `dtype`, `norm` and `sees_all` instead; methods that
look into singular directions say so, `needs_svd`.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.operators.spread import Spread
from guided_diffusion.statistics import PriorStatistics
from util.errors import UserError
from util.parameters import Parameters, check_parameters

Shape = tuple[int, int, int]
Sigma = float | torch.Tensor  # of the noise: a number, or (N, 1, 1, 1) where images have their own
WHERE = "measurement.operator"


class Grid(NamedTuple):
    """What a volume's header says of its voxels, in mm.

    spacing: from slice to slice; thickness: of a slice, None where the header does not say;
    pixel: the shorter side of a pixel.
    """

    spacing: float
    thickness: float | None
    pixel: float


class Operator:
    """A, Aᵀ and the SVD of A on images (N, C, H, W).

    Attributes:
        in_shape, out_shape: (C, H, W) of x and of y.
        is_identity: whether y is x but for the noise.
        keeps_sharp: whether y is an image of x's kind, its anatomy as fine as its pixels.
        of_kspace: whether y is k-space, of which there are raw files, too.
        of_volumes: whether it acts along the slices of a volume, which are then x's channels.
        from_all_sides: whether a volume is better restored when the network sees all its planes.
        has_svd: whether it has `singular_values, U, Ut, V, Vt`.
        singular_values: of the shape that spectra have without their batch axis. Spectra, the
            tensors that `Ut` and `Vt` return, hold one coefficient for each singular direction.
            Directions that A does not see may be left out, or have singular value 0.
    """

    name: ClassVar[str] = ""
    parameters: ClassVar[Parameters] = {}
    is_identity: ClassVar[bool] = False
    keeps_sharp: ClassVar[bool] = False
    of_kspace: ClassVar[bool] = False
    of_volumes: ClassVar[bool] = False
    from_all_sides: ClassVar[bool] = True
    has_svd: ClassVar[bool] = True

    in_shape: Shape
    out_shape: Shape
    singular_values: torch.Tensor

    @classmethod
    def build(
        cls, in_shape: Shape, device: torch.device | str, dtype: torch.dtype, **parameters: Any
    ) -> "Operator":
        """The operator for images of `in_shape`, from all its parameters.

        Raises:
            UserError: parameters that do not fit one another, or the image.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the parameters that a task file gives with the defaults of the others.

        Raises:
            UserError: an unknown key, or a value of another type or out of range.
        """
        return check_parameters(cls.parameters, parameters, WHERE, cls.name)

    @classmethod
    def variant(cls, parameters: Mapping[str, Any]) -> str:
        """The part of the results path that tells kinds of this operator apart; "" if it has one.

        Args:
            parameters: complete, see `check`.
        """
        return ""

    @classmethod
    def restored_size(cls, size: tuple[int, int], parameters: Mapping[str, Any]) -> tuple[int, int]:
        """(H, W) of the image whose measurement has the given (H, W).

        Args:
            parameters: complete, see `check`.
        """
        return size

    @classmethod
    def takes_volumes(cls, parameters: Mapping[str, Any]) -> bool:
        """Whether the channels of x may be the slices of a volume."""
        return True

    @classmethod
    def expected_size(cls, size: tuple[int, int], parameters: Mapping[str, Any]) -> tuple[int, int]:
        """(H, W) of images that its parameters are made for; `size`, where they suit any.

        Raises:
            UserError: parameters that suit no image.
        """
        return size

    @classmethod
    def on_grid(cls, parameters: Mapping[str, Any], grid: Grid, simulated: bool) -> dict[str, Any]:
        """The parameters for one volume, with what its header tells.

        Args:
            parameters: complete, see `check`.
            simulated: whether the volume is x, not y.

        Raises:
            UserError: parameters that do not fit the volume.
        """
        return dict(parameters)

    @classmethod
    def restored_depth(cls, slices: int, parameters: Mapping[str, Any]) -> int:
        """Slices of the volume whose measurement has that many."""
        return slices

    @classmethod
    def restored_spacing(cls, parameters: Mapping[str, Any]) -> float | None:
        """mm between restored slices; None where they are those of the measurement."""
        return None

    @classmethod
    def interpolated(
        cls, y: NDArray[np.float32], depth: int, parameters: Mapping[str, Any]
    ) -> NDArray[np.float32] | None:
        """What a volume's slices y (n, H, W) make of `depth` ones by interpolation alone."""
        return None

    def V(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Spectrum → image (N, C, H, W); the columns of V are orthonormal."""
        raise NotImplementedError

    def Vt(self, x: torch.Tensor) -> torch.Tensor:
        """Image → spectrum, the transpose of `V`."""
        raise NotImplementedError

    def U(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Spectrum → measurement (N, *out_shape); A V Σ⁺, where it has its own `forward`."""
        return self.forward(self.V(self._over_s(spectrum)))

    def Ut(self, y: torch.Tensor) -> torch.Tensor:
        """Measurement → spectrum, the transpose of `U`; Σ⁺ Vᵀ Aᵀ, where it has its `transpose`."""
        return self._over_s(self.Vt(self.transpose(y)))

    def _over_s(self, spectrum: torch.Tensor) -> torch.Tensor:
        s = self.singular_values
        return torch.where(s > 0, spectrum / torch.where(s > 0, s, 1.0), 0.0)

    def frequency_variance(self, variance: torch.Tensor) -> torch.Tensor:
        """The variance along each singular direction of a random image that is diagonal in the DCT.

        Args:
            variance: (H, W), of each DCT coefficient, the same in all channels.

        Returns:
            diag(Vᵀ C V), C the image's covariance; broadcasts to a spectrum.
        """
        raise NotImplementedError

    def in_frequencies(self) -> "Operator":
        """The same A, its singular directions as near to cosines as they may be chosen.

        Where singular values are equal, any orthonormal basis of their directions will do.
        """
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A x, (N, *in_shape) → (N, *out_shape)."""
        return self.U(self.singular_values * self.Vt(x))

    def transpose(self, y: torch.Tensor) -> torch.Tensor:
        """Aᵀ y, (N, *out_shape) → (N, *in_shape)."""
        return self.V(self.singular_values * self.Ut(y))

    def picture(self, y: torch.Tensor) -> torch.Tensor:
        """What is shown of a measurement: an image (N, C, h, w) in [-1, 1]; y, where it is one."""
        return y

    def widest_std(self, statistics: PriorStatistics, sigma: float) -> float:
        """√r_t above which y knows all that a state could hold; infinite where A may be blind.

        Args:
            statistics: of the prior's images; sigma: of the noise.
        """
        return math.inf

    @property
    def solves(self) -> bool:
        """Whether `frequency_posterior_mean` counts all of C, so that a state needs no directions.

        Few steps then start from such a mean, and need not know what of y a state already holds.
        """
        return False

    @property
    def device(self) -> torch.device:
        return self.singular_values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.singular_values.dtype

    @property
    def norm(self) -> float:
        """The largest singular value."""
        return float(self.singular_values.max())

    @property
    def sees_all(self) -> bool:
        """Whether no direction of the image is lost."""
        s = self.singular_values
        return s.numel() == math.prod(self.in_shape) and bool((s > 0).all())

    def inverted(self, Uty: torch.Tensor, sigma: Sigma) -> tuple[torch.Tensor, torch.Tensor]:
        """The measurement divided by the singular values, and the noise that it then has.

        Returns:
            (ȳ = Uᵀy/s, its standard deviation σ/s), spectra; infinite noise where s = 0.
        """
        s = self.singular_values
        seen = s > 0
        safe = torch.where(seen, s, 1.0)
        return Uty / safe, torch.where(seen, sigma / safe, torch.inf)

    def correction(
        self, x: torch.Tensor, spectrum: torch.Tensor, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What to add to x so that A sees `spectrum` in it, and all that A does not see stays.

        Args:
            x: (N, C, H, W).
            spectrum: the coefficients to give it; ignored where s = 0.
            where: a spectrum of truth values, the directions to change; all that A sees if None.

        Returns:
            (N, C, H, W).
        """
        where = self.singular_values > 0 if where is None else where
        return self.V(torch.where(where, spectrum - self.Vt(x), 0.0))

    def reduced(self, y: torch.Tensor) -> torch.Tensor:
        """The sufficient statistic of y that `score` and posterior means take: Uᵀy, a spectrum."""
        return self.Ut(y)

    def gain(self, sigma: Sigma, variance: Sigma) -> torch.Tensor:
        """Σ (σ² I + variance Σ²)⁻¹, the diagonal of Aᵀ (σ² I + variance A Aᵀ)⁻¹ between V and Uᵀ.

        Directions that A does not see (s = 0) carry no information, also when σ = 0.

        Args:
            sigma, variance: numbers, or tensors that broadcast to a spectrum.
        """
        s = self.singular_values
        return torch.where(s > 0, s / (sigma**2 + variance * s**2), 0.0)

    def score(
        self, x: torch.Tensor, reduced: torch.Tensor, sigma: Sigma, variance: float
    ) -> torch.Tensor:
        """∇_x log N(y; A x, σ² I + variance A Aᵀ) = Aᵀ (σ² I + variance A Aᵀ)⁻¹ (y - A x).

        Args:
            x: (N, C, H, W); reduced: see `reduced`; sigma, variance: see `gain`.
        """
        residual = reduced - self.singular_values * self.Vt(x)
        return self.V(self.gain(sigma, variance) * residual)

    def posterior_mean(
        self, x_0: torch.Tensor, reduced: torch.Tensor, sigma: Sigma, variance: float
    ) -> torch.Tensor:
        """E[x | y] for x ~ N(x_0, variance I) and y = A x + σ n.

            x_0 + variance Aᵀ (σ² I + variance A Aᵀ)⁻¹ (y - A x_0)

        Args:
            x_0, reduced, sigma: see `score`.
        """
        return x_0 + variance * self.score(x_0, reduced, sigma, variance)

    def frequency_posterior_mean(
        self, x_0: torch.Tensor, reduced: torch.Tensor, sigma: Sigma, variance: torch.Tensor
    ) -> torch.Tensor:
        """E[x | y] for x ~ N(x_0, C), C diagonal in the DCT, and y = A x + σ n.

        Of C only the diagonal of Vᵀ C V counts, see `frequency_variance`; an operator that knows
        better replaces this.

        Args:
            x_0, reduced, sigma: see `score`.
            variance: (H, W), of each DCT coefficient.
        """
        v = self.frequency_variance(variance)
        residual = reduced - self.singular_values * self.Vt(x_0)
        return x_0 + self.V(v * self.gain(sigma, v) * residual)

    def spread(self, variance: torch.Tensor, sigma: Sigma) -> Spread:
        """The covariance that such an x has given y.

        Args: see `frequency_posterior_mean`.
        """
        return Spread(self, variance, sigma)


def expect(condition: bool, key: str, expected: str, found: Any) -> None:
    """Raise the UserError of a parameter that does not fit the others or the image."""
    if not condition:
        raise UserError(f"{WHERE}.{key}: expected {expected}, found {found!r}")
