"""The MLPs of a model computed a tile of tokens at a time, so that what they hold does not grow with the context.

An MLP works on each token by itself, but holds several numbers of its wide inner width I for each (6 b I bytes a token
with a gate, b bytes a number), and that is most of what a layer holds. Here only the tokens of one tile have them at
once: the forward pass keeps the MLP's input and nothing inside, the backward pass computes each tile again and
differentiates it before the next. No class is swapped and no forward copied: each MLP gets an object as its `forward`,
which calls the one it had.

Inside of a checkpointed layer this costs no product more than checkpointing alone. The input is kept by a node of its
own (`_Keep`), ahead of the MLP's. In most architectures that is the last thing that a layer keeps, and torch's
checkpoint stops computing again as soon as it has it: before the MLP, which the tiles then compute.

Shapes: R rows (the tokens of all sequences), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from hici.models.architectures import get_architecture
from hici.models.lookup import get_causal_lm, get_decoder

Forward = Callable[[Tensor], Tensor]


def tile_mlp(model: Any, tokens: int) -> None:
    """From now on the MLP of every layer is computed `tokens` tokens at a time, in place; again: with another number.

    Results are those of the whole MLP up to rounding, for all parameters that train (LoRA inside of it too). Where a
    call has no more tokens than a tile, and without gradients, nothing is computed twice. Works below and above PEFT;
    `untile_mlp` takes it back.

    Raises:
        ValueError: `tokens` is no integer >= 1; an unsupported model type. Nothing has changed then.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"mlp_tile={tokens!r} is no integer >= 1; give the tokens that an MLP computes at a time")
    for mlp in _mlps(model):
        present = vars(mlp).get("forward")
        if isinstance(present, TiledForward):
            present.tokens = tokens
        else:
            mlp.forward = TiledForward(mlp, tokens, present)


def untile_mlp(model: Any) -> None:
    """Undo `tile_mlp`, in place; a model without it stays as it is. Raises ValueError for an unsupported model type."""
    for mlp in _mlps(model):
        present = vars(mlp).get("forward")
        if isinstance(present, TiledForward):
            del mlp.forward
            if present.replaced is not None:
                mlp.forward = present.replaced


def _mlps(model: Any) -> list[nn.Module]:
    return get_architecture(get_causal_lm(model).config.model_type).mlp_modules(get_decoder(model))


class TiledForward:
    """The `forward` of one MLP in tiles. Kept in the module's `__dict__`: deepcopy and torch.save take it along.

    Attributes:
        mlp: the module that it is the forward of.
        tokens: tokens of a tile.
        replaced: a `forward` that the module had of its own (accelerate sets such); None: its class's.
    """

    def __init__(self, mlp: nn.Module, tokens: int, replaced: Forward | None) -> None:
        self.mlp = mlp
        self.tokens = tokens
        self.replaced = replaced

    def __call__(self, hidden: Tensor) -> Tensor:
        """As the whole MLP: [..., D] -> [..., D]."""
        if hidden.numel() <= self.tokens * hidden.shape[-1]:
            return self.whole(hidden)
        hidden_1RD = hidden.reshape(1, -1, hidden.shape[-1])  # quantised layers want three dimensions
        parameters = [p for p in self.mlp.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
            kept: list[Any] = []
            token = _Keep.apply(hidden_1RD, torch.empty(0, requires_grad=True), kept)
            out_1RD = _Tiled.apply(self, hidden_1RD, token, kept[0], *parameters)
        else:
            out_1RD = self.in_tiles(hidden_1RD)
        return out_1RD.view(*hidden.shape[:-1], -1)

    def whole(self, hidden: Tensor) -> Tensor:
        """The MLP as it was."""
        return type(self.mlp).forward(self.mlp, hidden) if self.replaced is None else self.replaced(hidden)

    def in_tiles(self, hidden_1RD: Tensor) -> Tensor:
        """Without gradients: [1, R, D] -> [1, R, D]."""
        out_1RD = None
        for start, tile_1RD in _tiles(hidden_1RD, self.tokens):
            tile_out = self.whole(tile_1RD)
            if out_1RD is None:
                out_1RD = tile_out.new_empty(1, hidden_1RD.shape[1], tile_out.shape[-1])
            out_1RD[:, start : start + self.tokens] = tile_out
        assert out_1RD is not None  # there are more rows than a tile has
        return out_1RD


class _Keep(torch.autograd.Function):
    """Keeps the MLP's input for `_Tiled`, before that computes; `anchor` makes the node needed, whatever trains."""

    @staticmethod
    def forward(ctx: Any, hidden_1RD: Tensor, anchor: Tensor, kept: list[Any]) -> Tensor:
        ctx.save_for_backward(hidden_1RD)
        kept.append(ctx)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, ...]:
        return None, None, None


class _Tiled(torch.autograd.Function):
    """(tiled forward, hidden, _Keep's output, _Keep's node, parameters that train) -> the MLP's output.

    The parameters are arguments so that autograd hands each its whole gradient once: DDP and FSDP2 wait for that.
    """

    @staticmethod
    def forward(
        ctx: Any, tiled: TiledForward, hidden_1RD: Tensor, token: Tensor, keeper: Any, *parameters: Tensor
    ) -> Tensor:
        ctx.tiled, ctx.keeper = tiled, keeper
        ctx.surroundings = _surroundings(hidden_1RD)
        return tiled.in_tiles(hidden_1RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_1RD: Tensor) -> tuple[Any, ...]:
        (hidden_1RD,) = ctx.keeper.saved_tensors
        wants_hidden = ctx.needs_input_grad[1]
        # asked anew: FSDP2 has gathered them again meanwhile
        parameters = [p for p in ctx.tiled.mlp.parameters() if p.requires_grad]
        d_hidden_1RD = torch.empty_like(hidden_1RD) if wants_hidden else None
        totals: list[Tensor | None] = [None] * len(parameters)
        with ctx.surroundings.random_state():
            for start, tile_1RD in _tiles(hidden_1RD, ctx.tiled.tokens):
                place = slice(start, start + tile_1RD.shape[1])
                tile_1RD = tile_1RD.detach().requires_grad_(wants_hidden)
                with torch.enable_grad(), ctx.surroundings.autocast():
                    out_1RD = ctx.tiled.whole(tile_1RD)
                wanted = [tile_1RD] * wants_hidden + parameters
                found = list(torch.autograd.grad(out_1RD, wanted, d_out_1RD[:, place], allow_unused=True))
                if d_hidden_1RD is not None:
                    d_hidden_1RD[:, place] = found.pop(0)
                totals = [_sum(total, gradient) for total, gradient in zip(totals, found, strict=True)]
        d_parameters = [None if t is None else t.to(p.dtype) for t, p in zip(totals, parameters, strict=True)]
        return None, d_hidden_1RD, None, None, *d_parameters


def _tiles(hidden_1RD: Tensor, tokens: int) -> list[tuple[int, Tensor]]:
    """(first row, [1, at most `tokens`, D]) of each tile."""
    return [(i * tokens, tile_1RD) for i, tile_1RD in enumerate(hidden_1RD.split(tokens, dim=1))]


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """In float32 at least: many small terms would be lost in a sum of 16-bit numbers."""
    if gradient is None:
        return total
    if total is None:
        return gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
    return total + gradient  # not in place: autograd may have handed out one tensor twice


class _Surroundings(NamedTuple):
    """What the forward pass ran under, for the backward pass to compute the same again."""

    device: str
    autocast_dtype: torch.dtype | None
    cpu_state: Tensor
    devices: list[int]
    states: list[Tensor]

    def autocast(self) -> Any:
        """Context: autocast as it was."""
        return torch.autocast(self.device, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def random_state(self) -> Any:
        """Context: random numbers (dropout) as they were; afterwards as they are now."""
        return _RandomState(self)


class _RandomState:
    def __init__(self, surroundings: _Surroundings) -> None:
        self.surroundings = surroundings
        self.fork = torch.random.fork_rng(devices=surroundings.devices, device_type=_accelerator(surroundings.device))

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.set_rng_state(self.surroundings.cpu_state)
        if self.surroundings.devices:
            set_device_states(self.surroundings.devices, self.surroundings.states, device_type=self.surroundings.device)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


def _accelerator(device: str) -> str:
    return "cuda" if device == "cpu" else device  # fork_rng asks for an accelerator's name, even if none is forked


def _surroundings(hidden: Tensor) -> _Surroundings:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    devices, states = get_device_states(hidden)
    return _Surroundings(device, dtype, torch.get_rng_state(), devices, states)
