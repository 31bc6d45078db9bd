"""Scaling laws: the loss of dense models, the compute-optimal size, and the gain from experts.

N parameters, D tokens, C FLOPs, E experts. The laws were fitted to published runs; they hold in their range.
"""

import math

# Hoffmann et al. 2022: L = E + A / N^alpha + B / D^beta nats per token, as refitted by Besiroglu et al. 2024.
IRREDUCIBLE, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
CHINCHILLA_PARAMS, CHINCHILLA_TOKENS = (70e6, 16e9), (5e9, 5e11)  # range of the fitted runs
# Clark et al. 2022, fit for S-BASE (top-1 of E experts), logarithms to base 10.
_CLARK_A, _CLARK_B, _CLARK_C = -0.082, -0.108, 0.009
_E_START, _E_MAX = 1.847, 314.478
CLARK_PARAMS, CLARK_EXPERTS = (15e6, 1.3e9), 512  # range of active parameters, largest number of experts


def chinchilla_loss(params: float, tokens: float) -> float:
    """Loss in nats per token (of Chinchilla's data) of a dense model of N parameters after D tokens."""
    return IRREDUCIBLE + A / params**ALPHA + B / tokens**BETA


def compute_optimal(flops: float) -> tuple[float, float]:
    """N and D with the lowest loss subject to `6 N D = C` (Hoffmann et al. 2022, equation 4)."""
    ratio = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    params = ratio * (flops / 6) ** (BETA / (ALPHA + BETA))
    return params, flops / (6 * params)


def effective_params(params: float, num_experts: int) -> float:
    """Parameters of the dense model with the same loss as a model of N active parameters and E experts.

    Solves `L(N', 1) = L(N, E)` for `log L = a log N + b log E^ + c log N log E^ + d` (Clark et al. 2022,
    equation 1), where E^ is E with a smooth lower and upper limit.
    """
    log_n, log_e, log_1 = math.log10(params), _log_experts(num_experts), _log_experts(1)
    gain = _CLARK_B * (log_e - log_1) + _CLARK_C * log_n * log_e
    return 10 ** ((_CLARK_A * log_n + gain) / (_CLARK_A + _CLARK_C * log_1))


def _log_experts(num_experts: int) -> float:
    """log10 of E^, where 1/E^ = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1/E_max."""
    offset = 1 / (1 / _E_START - 1 / _E_MAX)
    return -math.log10(1 / (num_experts - 1 + offset) + 1 / _E_MAX)
