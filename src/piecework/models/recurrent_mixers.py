"""Mixers of transformers' models on operators with a state per sequence, by the functions that their code calls.

A mixer, Mamba's or a gated delta net's, asks its cache for what came before, and gives that to functions of its own
file: a causal convolution, then a scan or the delta rule. Here its forward runs as it is, with a cache that has
nothing, and with functions of ours under those names, whose states lie in a slot per sequence. No model is known by
name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers import Cache
from transformers.activations import ACT2FN

from piecework.models.batch import ForwardBatch
from piecework.models.cache_interface import Past
from piecework.models.trial import CONV_STATE, RECURRENT_STATE, unreached
from piecework.ops.states import causal_conv as _causal_conv  # noqa: F401  as the next ones, registers its operator
from piecework.ops.states import delta_rule as _delta_rule  # noqa: F401
from piecework.ops.states import mamba2_scan as _mamba2_scan  # noqa: F401
from piecework.ops.states import selective_scan as _selective_scan  # noqa: F401

_EPS: Final = 1e-6  # of the length that queries and keys are divided by


def keep_states(module: nn.Module) -> None:
    """Let every mixer of a model keep its states in slots; they are made in its first forward, one slot of each."""
    for part in module.modules():
        code = inspect.unwrap(type(part).forward).__code__
        if not _FUNCTIONS.keys().isdisjoint(code.co_names):
            vars(part)["forward"] = partial(_forward, part)


@final
class MixerStates(Cache):  # type: ignore[misc]  # transformers' classes have no types
    """What a mixer is given in place of a cache: nothing came before, and what comes is kept elsewhere.

    Args:
        mixer: whose states are used.
        batch: the sequences.
    """

    def __init__(self, mixer: nn.Module, batch: ForwardBatch) -> None:
        super().__init__(layers=[])
        self._mixer = mixer
        self._batch = batch
        self._asked: set[str] = set()
        self._used: set[str] = set()

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Return that there is none; our convolution has it."""
        self._asked.add(CONV_STATE)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Return that there is none; our scan or delta rule has it."""
        self._asked.add(RECURRENT_STATE)

    def update_conv_state(self, conv_states: Tensor, *_: object, **__: object) -> Tensor:
        """Return what is to be convolved as it is."""
        self._asked.add(CONV_STATE)
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor | None, *_: object, **__: object) -> None:
        """Take what our functions give for a state, which is None. Raises UnsupportedModelError for anything else."""
        if recurrent_states is not None:
            raise unreached(self._mixer, "keeps a recurrent state of a function that piecework has no operator for")

    def run(
        self, name: str, op: Callable[..., Tensor], x: Tensor, *tensors: Tensor | None, slot: tuple[int, ...]
    ) -> Tensor:
        """Run an operator on tensors and the mixer's state `name`, whose slots have the shape `slot` and the type of x.

        Raises UnsupportedModelError the second time.
        """
        if name in self._used:
            raise unreached(self._mixer, f"uses its {name} twice in one forward")
        self._used.add(name)
        if not hasattr(self._mixer, name):
            self._mixer.register_buffer(name, x.new_empty((1, *slot)), persistent=False)
        batch = self._batch
        state = getattr(self._mixer, name)
        return op(x, *tensors, state, batch.seq_lens, batch.query_start, batch.num_decode_tokens, batch.state_slots)

    def check(self) -> None:
        """Raise UnsupportedModelError where the mixer asked for a state that nothing of ours has used."""
        for name in sorted(self._asked - self._used):
            raise unreached(self._mixer, f"gives its {name} to none of {', '.join(_FUNCTIONS)}")


def _forward(mixer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a mixer's own forward, with our functions and states."""
    past = next((value for value in (*args, *kwargs.values()) if isinstance(value, Past)), None)
    if past is None:
        raise unreached(mixer, "is not given the model's cache")
    states = MixerStates(mixer, past.batch)
    own: Any = inspect.unwrap(type(mixer).forward)
    names = {**own.__globals__, **{name: partial(function, states) for name, function in _FUNCTIONS.items()}}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    given = [states if value is past else value for value in args]
    result = forward(mixer, *given, **{name: states if value is past else value for name, value in kwargs.items()})
    states.check()
    return result


def _convolve(
    states: MixerStates,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_ignored: object,
) -> Tensor:
    """Serve as `causal_conv1d_fn`: hidden_states [1, C, T], weight [C, K] -> [1, C, T]."""
    x = hidden_states.squeeze(0).t()
    window = (weight.shape[0], weight.shape[1] - 1)
    out = states.run(CONV_STATE, torch.ops.piecework.causal_conv, x, weight, bias, slot=window)
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.t().unsqueeze(0)


def _scan(
    states: MixerStates,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    **options: Any,
) -> Any:
    """Serve as `mamba2_chunk_scan`: hidden_states [1, T, H, P], dt [1, T, H], A [H], B and C [1, T, G, N].

    Returns [1, T, H, P] in float32, and with `return_final_states` None beside it.
    """
    x, steps, b, c = (t.squeeze(0).float() for t in (hidden_states, dt, B, C))
    low, high = options.get("dt_limit", (0.0, float("inf")))
    steps = _time_steps(steps, options.get("dt_bias"), positive=options.get("dt_softplus", False)).clamp(low, high)
    slot = (*x.shape[1:], b.shape[-1])
    scaled, log_decay = x * steps.unsqueeze(-1), steps * A.float()
    out = states.run(RECURRENT_STATE, torch.ops.piecework.mamba2_scan, scaled, log_decay, b, c, slot=slot)
    if options.get("D") is not None:
        out = out + x * options["D"].float().unsqueeze(-1)
    return (out.unsqueeze(0), None) if options.get("return_final_states") else out.unsqueeze(0)


def _scan_channels(
    states: MixerStates,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    **options: Any,
) -> Any:
    """Serve as `mamba_selective_scan`: hidden_states and dt [1, I, T], A [I, N], B and C [1, N, T].

    Returns [1, I, T] in float32, and with `return_last_state` None beside it.
    """
    x, steps, b, c = (t.squeeze(0).t().float() for t in (hidden_states, dt, B, C))
    steps = _time_steps(steps, options.get("delta_bias"), positive=options.get("delta_softplus", False))
    tokens, slot = (x * steps, steps, A.float(), b, c), (x.shape[1], A.shape[1])
    out = states.run(RECURRENT_STATE, torch.ops.piecework.selective_scan, *tokens, slot=slot)
    if options.get("D") is not None:
        out = out + x * options["D"].float()
    if options.get("z") is not None:
        out = out * silu(options["z"].squeeze(0).t().float())
    out = out.t().unsqueeze(0)
    return (out, None) if options.get("return_last_state") else out


def _time_steps(steps: Tensor, bias: Tensor | None, *, positive: bool) -> Tensor:
    """Return time steps of projected ones, with a bias, and by softplus where they are to be made positive."""
    biased = steps if bias is None else steps + bias.float()
    return softplus(biased) if positive else biased


def _correct(
    states: MixerStates,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_ignored: object,
) -> tuple[Tensor, None]:
    """Serve as `torch_chunk_gated_delta_rule`: query and key [1, T, Hk, Dk], value [1, T, Hv, Dv], g and beta
    [1, T, Hv] -> [1, T, Hv, Dv].
    """
    q, k, v, log_decay, corrected = (t.squeeze(0).float() for t in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + _EPS) for t in (q, k))
    q = q * q.shape[-1] ** -0.5
    slot = (v.shape[1], k.shape[2], v.shape[2])
    tokens = (q, k, v, log_decay, corrected)
    out = states.run(RECURRENT_STATE, torch.ops.piecework.delta_rule, *tokens, slot=slot)
    return out.to(query.dtype).unsqueeze(0), None


_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "causal_conv1d_fn": _convolve,
    "mamba2_chunk_scan": _scan,
    "mamba_selective_scan": _scan_channels,
    "torch_chunk_gated_delta_rule": _correct,
}
"""Functions of transformers' modelling files, and what is called in their place."""
