"""What a measurement y = A x + σ n says of x under a Gaussian prior, through A = U Σ Vᵀ."""

import torch


def gain(operator, sigma, variance):
    """Σ (σ² I + variance Σ²)⁻¹, the diagonal of Aᵀ (σ² I + variance A Aᵀ)⁻¹ between V and Uᵀ.

    Directions that A does not see (s = 0) carry no information, also when σ = 0.

    Args:
        sigma, variance: numbers, or tensors that broadcast to a spectrum, one value a direction.
    """
    s = operator.singular_values
    return torch.where(s > 0, s / (sigma**2 + variance * s**2), 0.0)


def gaussian_posterior_mean(operator, x_0, Uty, sigma, variance):
    """E[x | y] for x ~ N(x_0, V variance Vᵀ) and y = A x + σ n.

        x_0 + variance Aᵀ (σ² I + variance A Aᵀ)⁻¹ (y - A x_0)

    Args:
        x_0: (N, C, H, W); Uty: Uᵀy, a spectrum; sigma, variance: see `gain`.
    """
    residual = Uty - operator.singular_values * operator.Vt(x_0)
    return x_0 + operator.V(variance * gain(operator, sigma, variance) * residual)
