"""Validation of the layer's arguments: whatever passes may reach C."""

from __future__ import annotations

import torch
from torch import Tensor

from . import structures

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALVES)


def shape_of(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def require_tensor(name: str, value: object, *kinds: type) -> None:
    """Raises TypeError unless `value` is a dense tensor of a floating-point type that the layer takes. The message
    names `kinds` as what could have come instead."""
    if not isinstance(value, Tensor):
        expected = " or ".join(("a torch.Tensor", *(kind.__name__ for kind in kinds)))
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
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


def score_tensors(initial, transition, emission, final) -> dict[str, Tensor]:
    """All score tensors by name, those of structures too; raises TypeError for what is none."""
    found: dict[str, Tensor] = {}

    def add(name: str, x: object, *kinds: type) -> None:
        if isinstance(x, kinds):
            found.update(x.tensors())
            return
        require_tensor(name, x, *kinds)
        found[name] = x

    add("initial", initial)
    add("transition", transition, *structures.TRANSITIONS)
    if emission is not None:
        add("emission", emission, structures.Active)
    if final is not None:
        add("final", final)
    return found


def common_device(tensors: dict[str, Tensor]) -> torch.device:
    first, *others = tensors
    device = tensors[first].device
    for name in others:
        if tensors[name].device != device:
            raise ValueError(f"{name}: on {tensors[name].device}, expected {device}, where {first} is")
    return device


def _check_dense_transition(transition: Tensor) -> None:
    if transition.dim() not in (2, 3, 4) or transition.shape[-1] != transition.shape[-2] or transition.shape[-1] < 1:
        raise ValueError(
            f"transition: shape is {shape_of(transition)}, expected (N, N), (B, N, N) or (B, T-1, N, N) "
            "with N of at least 1"
        )


def check_shapes(initial, transition, emission, final) -> tuple[int, int, int]:
    """Returns (B, T, N); raises ValueError naming the argument whose shape does not fit."""
    dense, chunked = isinstance(transition, Tensor), isinstance(transition, structures.Chunked)
    if dense:
        _check_dense_transition(transition)
    leading = tuple(transition.shape[:-2]) if dense else transition.leading
    if emission is None and (len(leading) < 2 or not dense):
        came = f"a transition of shape {shape_of(transition)}" if dense else f"a {type(transition).__name__}"
        raise ValueError(
            f"emission: None needs a transition of shape (B, T-1, N, N), got {came}; "
            "give emission (B, T, N), zeros where there is none"
        )
    if chunked:
        num_states = initial.shape[-1] if initial.dim() else 0
    else:
        num_states = transition.shape[-1] if dense else transition.num_states
    if emission is None:
        batch, time = leading[0], leading[1] + 1
    else:
        if not isinstance(emission, structures.Active) and (emission.dim() != 3 or emission.shape[2] != num_states):
            where = "initial" if chunked else "transition"
            raise ValueError(
                f"emission: shape is {shape_of(emission)}, expected (B, T, N) with N = {num_states} as in {where}"
            )
        batch, time = emission.shape[:2]

    def came() -> str:
        return shape_of(transition) if dense else f"{leading} and the rest"

    if leading and leading[0] != batch:
        raise ValueError(f"transition: shape is {came()}, expected B = {batch} first, as in emission")
    if len(leading) == 2 and leading[1] != max(time - 1, 0):
        raise ValueError(
            f"transition: shape is {came()}, expected (B, T-1, N, N) = "
            f"({batch}, {max(time - 1, 0)}, {num_states}, {num_states}); emission has T = {time}"
        )
    for name, x in (("initial", initial), ("final", final)):
        if x is not None and x.shape not in ((num_states,), (batch, num_states)):
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
    if batch and not _fake(lengths) and (lengths.device.type == "cpu" or check):
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 0 or longest > time:
            bad = shortest if shortest < 0 else longest
            raise ValueError(f"lengths: holds {bad}, expected 0 to {time}, the number of frames T")
    return lengths.to(device, non_blocking=True)


def _fake(x: Tensor) -> bool:
    """Whether a tensor's numbers are not to be had, since torch.compile is tracing."""
    return torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor)


def check_active(states: Tensor, lengths: Tensor, num_states: int, check: bool) -> None:
    """Raises ValueError for a state out of range within the lengths, and under `check` for one that comes twice."""
    time = states.shape[1]
    if not states.numel() or _fake(states) or (states.device.type != "cpu" and not check):
        return
    smallest, largest = (int(x) for x in states.aminmax())
    if smallest >= -1 and largest < num_states and not check:
        return  # what most calls end with: one sweep, no mask
    inside = (torch.arange(time, device=states.device) < lengths.unsqueeze(-1)).unsqueeze(-1)
    wrong = inside & ((states < -1) | (states >= num_states))
    if wrong.any():
        where = tuple(int(k) for k in wrong.nonzero()[0])
        raise ValueError(f"Active: states holds {int(states[where])} at {where}, expected -1 to {num_states - 1}")
    if check:
        ordered = states.sort(-1).values
        twice = inside & (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if twice.any():
            b, t, k = (int(k) for k in twice.nonzero()[0])
            raise ValueError(f"Active: states holds {int(ordered[b, t, k])} twice in frame ({b}, {t}), expected once")


def check_scores(initial, transition, emission, lengths: Tensor, final) -> None:
    """:func:`check_values` of all scores."""
    check_values("initial", initial, None)
    if isinstance(transition, Tensor):
        check_values("transition", transition, lengths if transition.dim() == 4 else None, shift=1)
    elif isinstance(transition, structures.Banded):
        scores = torch.where(transition.inside(), transition.diagonals, 0)
        check_values("transition.diagonals", scores, lengths if scores.dim() == 4 else None, shift=1)
    else:
        for name, x in transition.tensors().items():
            check_values(name, x, lengths if x.dim() == 4 else None, shift=1)
    if isinstance(emission, structures.Active):
        check_values("emission.scores", torch.where(emission.states >= 0, emission.scores, 0), lengths)
    else:
        check_values("emission", emission, lengths)
    check_values("final", final, None)


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
