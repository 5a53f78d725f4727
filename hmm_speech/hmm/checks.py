"""Validation of the layer's arguments: whatever passes may reach C."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALVES)


def shape_of(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def require_tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a dense tensor of a floating-point type that the layer takes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: dtype is {value.dtype}, expected float32, float64, float16 or bfloat16")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: layout is {value.layout}, expected a dense tensor (call .to_dense())")


def common_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """float64 if all are, else float32. float64 beside others is refused: one of them is not what the user thinks."""
    doubles = [name for name, x in tensors.items() if x.dtype == torch.float64]
    if doubles and len(doubles) < len(tensors):
        others = ", ".join(f"{name} is {x.dtype}" for name, x in tensors.items() if name not in doubles)
        raise TypeError(
            f"{doubles[0]} is torch.float64 but {others}; expected one precision: convert with .double() or .float()"
        )
    return torch.float64 if doubles else torch.float32


def check_shapes(initial: Tensor, transition: Tensor, emission: Tensor | None, final: Tensor | None):
    """Returns (B, T, N); raises ValueError naming the argument whose shape does not fit."""
    if transition.dim() not in (2, 3, 4) or transition.shape[-1] != transition.shape[-2] or transition.shape[-1] < 1:
        raise ValueError(
            f"transition: shape is {shape_of(transition)}, expected (N, N), (B, N, N) or (B, T-1, N, N) "
            "with N of at least 1"
        )
    num_states = transition.shape[-1]
    if emission is None:
        if transition.dim() != 4:
            raise ValueError(
                f"emission: None needs a transition of shape (B, T-1, N, N), got {shape_of(transition)}; "
                "give emission (B, T, N), zeros where there is none"
            )
        batch, time = transition.shape[0], transition.shape[1] + 1
    else:
        if emission.dim() != 3 or emission.shape[2] != num_states:
            raise ValueError(
                f"emission: shape is {shape_of(emission)}, expected (B, T, N) with N = {num_states} as in transition"
            )
        batch, time = emission.shape[:2]
    if transition.dim() > 2 and transition.shape[0] != batch:
        raise ValueError(f"transition: shape is {shape_of(transition)}, expected B = {batch} first, as in emission")
    if transition.dim() == 4 and transition.shape[1] != max(time - 1, 0):
        raise ValueError(
            f"transition: shape is {shape_of(transition)}, expected (B, T-1, N, N) = "
            f"({batch}, {max(time - 1, 0)}, {num_states}, {num_states}); emission has T = {time}"
        )
    for name, x in (("initial", initial), ("final", final)):
        if x is not None and tuple(x.shape) not in ((num_states,), (batch, num_states)):
            raise ValueError(f"{name}: shape is {shape_of(x)}, expected ({num_states},) or ({batch}, {num_states})")
    return batch, time, num_states


def check_lengths(lengths: object, batch: int, time: int, device: torch.device, check: bool) -> Tensor:
    """Lengths as int64 on the scores' device. Values are seen where that costs no synchronisation, or under `check`."""
    if lengths is None:
        return torch.full((batch,), time, dtype=torch.int64, device=device)
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: got {type(lengths).__name__}, expected an int64 tensor of shape ({batch},)")
    if lengths.dtype != torch.int64:
        raise TypeError(f"lengths: dtype is {lengths.dtype}, expected torch.int64 (call .long())")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths: shape is {shape_of(lengths)}, expected ({batch},), one length a sequence")
    if lengths.device.type != "cpu" and lengths.device != device:
        raise ValueError(f"lengths: on {lengths.device}, expected {device} as the scores, or the CPU")
    fake = torch.compiler.is_compiling() or isinstance(lengths, torch._subclasses.FakeTensor)
    if batch and not fake and (lengths.device.type == "cpu" or check):
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 0 or longest > time:
            bad = shortest if shortest < 0 else longest
            raise ValueError(f"lengths: holds {bad}, expected 0 to {time}, the number of frames T")
    return lengths.to(device, non_blocking=True)


def check_values(name: str, value: Tensor | None, lengths: Tensor | None, shift: int = 0) -> None:
    """Raises ValueError at +inf or NaN within the lengths. `shift` is 1 for transitions, which have T-1 frames."""
    if value is None:
        return
    bad = value.isnan() | (value == float("inf"))
    if lengths is not None:
        inside = torch.arange(value.shape[1], device=value.device) < (lengths - shift).unsqueeze(-1)
        bad = bad & inside.view(*inside.shape, *(1,) * (value.dim() - 2))
    if bad.any():
        where = tuple(int(k) for k in bad.nonzero()[0])
        found = float(value[where])
        raise ValueError(f"{name}: holds {found} at {where}, expected finite scores, or -inf for what is forbidden")
