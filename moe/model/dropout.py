"""Dropout and other random numbers that follow from the sample and the place in the model alone.

PyTorch draws masks one after the other, so that they depend on how a batch is split over ranks and micro
batches, and on what was drawn before. Here each element has a number of its own, as in a counter-based
generator (Salmon et al. 2011), and topology, micro batch, recomputation and resuming change nothing.

Shape suffixes: B samples, S positions, D d_model, P places in the model.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def dropout_keys(seed: int, step: int, samples: Sequence[int]) -> Tensor:
    """What the masks of each sample follow from.

    Args:
        seed: `run.seed`.
        step: of the optimizer, so that a sample has other masks in the next epoch.
        samples: B numbers, such as the places in the text where the samples start.

    Returns:
        (B,) int32.
    """
    keys = [np.random.SeedSequence([seed, step, sample]).generate_state(1)[0] for sample in samples]
    return torch.from_numpy(np.array(keys, dtype=np.uint32).view(np.int32))


def keys_of_places(keys: Tensor, places: int) -> Tensor:
    """A key for each sample and each of P places in the model: (P, B) int32, of (B,) as in `dropout`."""
    return _mix(_mix(_numbers(places, keys.device))[:, None] + _as_int32(keys))


def dropout(hidden: Tensor, rate: float, keys: Tensor) -> Tensor:
    """Set each element to 0 with probability `rate`, and divide the others by `1 - rate`.

    Args:
        hidden: (B, S, D), any float type.
        rate: at least 0 and below 1.
        keys: (B,) int32, of one place. Of wider integers the lowest 32 bits count.

    Returns:
        (B, S, D), same dtype.

    Raises:
        ValueError: an argument has another shape, type or range.
    """
    if hidden.dim() != 3 or not hidden.is_floating_point():
        got = f"{tuple(hidden.shape)} of {hidden.dtype}"
        raise ValueError(f"hidden should be (batch, sequence, d_model) of a float type, got {got}")
    if not 0 <= rate < 1:
        raise ValueError(f"rate should be at least 0 and below 1, got {rate}")
    keys = _as_int32(keys)
    if len(keys) != len(hidden):
        raise ValueError(f"keys should be one for each of {len(hidden)} samples, got {len(keys)}")
    lowest_kept = min(round(rate * 2**32), 2**32 - 1) - 2**31
    return torch.where(_numbers_of_elements(keys, hidden.shape[1:]) >= lowest_kept, hidden / (1 - rate), 0)


def uniform_numbers(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Random numbers between 0 and 1, both excluded, that follow from keys and places.

    Args:
        keys: (B,) int32, of one place in the model.
        shape: S, D of the elements of a sample.

    Returns:
        (B, S, D) fp32, multiples of 2**-24.
    """
    bits_BSD = _numbers_of_elements(_as_int32(keys), shape) >> 9 & 0x7FFFFF
    return (bits_BSD.float() + 0.5) * 2**-23


def random_int32(numbers: Tensor) -> Tensor:
    """A random number for each number, of which the lowest 32 bits count: int32, the same in every call."""
    return _mix(numbers.to(torch.int32))


def _numbers_of_elements(keys: Tensor, shape: Sequence[int]) -> Tensor:
    elements_SD = _mix(_numbers(math.prod(shape), keys.device)).view(*shape)
    return _mix(elements_SD + keys[:, None, None])


def _as_int32(keys: Tensor) -> Tensor:
    if keys.dim() != 1 or keys.is_floating_point():
        got = f"{tuple(keys.shape)} of {keys.dtype}"
        raise ValueError(f"keys should be (batch,) of int32, as from dropout_keys, got {got}")
    return keys.to(torch.int32)


def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def _mix(numbers: Tensor) -> Tensor:
    """A one-to-one hash of int32, whose products overflow: the last steps of splitmix32.

    Its shifts and factors come from a search for unbiased ones (github.com/skeeto/hash-prospector).
    """
    mixed = numbers ^ (numbers >> 16 & 0xFFFF)
    mixed *= 0x21F0AAAD
    mixed ^= mixed >> 15 & 0x1FFFF
    mixed *= 0x735A2D97
    mixed ^= mixed >> 15 & 0x1FFFF
    return mixed
