"""In which order providers of IR ops are tried, as a value. Needs no torch.

    ProviderOrder(default=("native",), per_op={"rms_norm": ("triton", "native")})
    ProviderOrder.parse(["rms_norm=triton,native", "silu_mul[1:64]=triton,native", "@cuda=triton,native", "native"])

`ops/ir/selection.py` chooses a call's implementation by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from piecework.errors import OpError

NATIVE: Final = "native"
DEFAULT_PROVIDERS: Final = (NATIVE,)
IR_OPS: Final = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "silu_mul",
    "gelu_mul",
    "rotary",
    "rotate_pairs",
    "quantize_static_fp8",
    "quantize_dynamic_per_token",
    "quantize_group_fp8",
    "moe_route",
)
"""Names of our own ops that have providers; those of other packages are written "namespace::name"."""

_RULE: Final = re.compile(
    r"(?:(?:@(?P<device>\w+)|(?P<op>\w+(?:::\w+)?)(?:\[(?P<low>\d+):(?P<high>\d+)\])?)=)?(?P<providers>[\w,\s]*)"
)


@dataclass(frozen=True, order=True)
class RangeRule:
    """The providers of an op where a call's rows are all among `low` to `high`, ends included."""

    op: str
    low: int
    high: int
    providers: tuple[str, ...]


@dataclass(frozen=True)
class ProviderOrder:
    """In which order providers are tried. Hashable; equal orders have equal text.

    The most specific list that applies to a call is taken: of `ranges`, else of `per_op`, else of `per_device`, else
    `default`. Of that list, the first provider whose implementation supports the call. A list that should always have
    one ends with "native".

    Args:
        default: for every op.
        per_op: by the op's name: "rms_norm", or "namespace::name" for ops of other packages.
        ranges: for an op at some numbers of rows (tokens).
        per_device: by type of device, "cpu" or "cuda".

    Raises OpError for an unknown op, an empty list, or a name that can't be a provider's.
    """

    default: tuple[str, ...] = DEFAULT_PROVIDERS
    per_op: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ranges: tuple[RangeRule, ...] = ()
    per_device: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_op = {_op_name(op): tuple(names) for op, names in self.per_op.items()}
        per_device = {device: tuple(names) for device, names in self.per_device.items()}
        ranges = (RangeRule(_op_name(r.op), r.low, r.high, tuple(r.providers)) for r in self.ranges)
        object.__setattr__(self, "default", tuple(self.default))
        object.__setattr__(self, "per_op", dict(sorted(per_op.items())))
        object.__setattr__(self, "ranges", tuple(sorted(ranges)))
        object.__setattr__(self, "per_device", dict(sorted(per_device.items())))
        for names in (self.default, *per_op.values(), *per_device.values(), *(r.providers for r in self.ranges)):
            _check_names(names)
        for rule in self.ranges:
            _check_range(rule, self.ranges)

    def __hash__(self) -> int:
        return hash(self.text())

    @staticmethod
    def parse(rules: str | Sequence[str]) -> ProviderOrder:
        """Read what `--provider` takes, one rule an item: "rms_norm=triton,native".

        "OP[LOW:HIGH]=…" is for a range of rows, "@cuda=…" for a type of device, and a bare "triton,native" for all ops.
        One text may hold several rules, separated by ";", as `text` writes them. Raises OpError.
        """
        default: tuple[str, ...] = DEFAULT_PROVIDERS
        per_op: dict[str, tuple[str, ...]] = {}
        per_device: dict[str, tuple[str, ...]] = {}
        ranges: list[RangeRule] = []
        texts = [rules] if isinstance(rules, str) else rules
        for text in (part.strip() for whole in texts for part in whole.split(";")):
            found = _RULE.fullmatch(text)
            if found is None:
                raise OpError(
                    asked=f"the providers {text!r}",
                    found="no rule of that form",
                    try_='"rms_norm=triton,native", "rms_norm[1:64]=triton,native", "@cuda=triton,native" or "native"',
                )
            names = tuple(name.strip() for name in found["providers"].split(",") if name.strip())
            if found["device"]:
                per_device[found["device"]] = names
            elif found["low"]:
                ranges.append(RangeRule(found["op"], int(found["low"]), int(found["high"]), names))
            elif found["op"]:
                per_op[found["op"]] = names
            else:
                default = names
        return ProviderOrder(default, per_op, tuple(ranges), per_device)

    def text(self) -> str:
        """Return the order as one line that `parse` reads; equal orders give equal lines."""
        rules = [
            ",".join(self.default),
            *(f"@{device}={','.join(names)}" for device, names in self.per_device.items()),
            *(f"{op}={','.join(names)}" for op, names in self.per_op.items()),
            *(f"{rule.op}[{rule.low}:{rule.high}]={','.join(rule.providers)}" for rule in self.ranges),
        ]
        return ";".join(rules)

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return self.text()

    @staticmethod
    def from_json(data: str) -> ProviderOrder:
        """Read what `to_json` wrote. Raises OpError."""
        return ProviderOrder.parse(data)

    @property
    def names(self) -> tuple[str, ...]:
        """Every provider that is named, each once."""
        lists = (self.default, *self.per_device.values(), *self.per_op.values(), *(r.providers for r in self.ranges))
        return tuple(dict.fromkeys(name for names in lists for name in names))


def as_order(value: ProviderOrder | str | Sequence[str] | None) -> ProviderOrder:
    """Return an order, its text, a list of rules, or None (for the default) as an order. Raises OpError."""
    if value is None:
        return ProviderOrder()
    return value if isinstance(value, ProviderOrder) else ProviderOrder.parse(value)


def _op_name(name: str) -> str:
    """Return an op's name as orders write it: without "piecework::"."""
    short = name.removeprefix("piecework::")
    if "::" not in short and short not in IR_OPS:
        raise OpError(
            asked=f"providers for the op {name!r}",
            found="no op of that name",
            try_=f'one of {", ".join(IR_OPS)}, or "namespace::name" for an op of another package',
        )
    return short


def _check_names(names: Sequence[str]) -> None:
    wrong = [name for name in names if not name.isidentifier()]
    if not names or wrong or len(set(names)) != len(names):
        raise OpError(
            asked=f"the providers {','.join(names) or '(none)'}",
            found=f"{wrong[0]!r}, which is no name" if wrong else "one twice" if names else "an empty list",
            try_='names such as "triton,native"',
        )


def _check_range(rule: RangeRule, rules: Sequence[RangeRule]) -> None:
    if rule.high < rule.low:
        raise OpError(asked=f"{rule.low} to {rule.high} rows of {rule.op}", found="an empty range", try_="LOW <= HIGH")
    for other in rules:
        if other is not rule and other.op == rule.op and rule.low <= other.high and other.low <= rule.high:
            raise OpError(
                asked=f"providers of {rule.op} for {rule.low} to {rule.high} rows",
                found=f"others for {other.low} to {other.high}",
                try_="ranges that don't overlap",
            )
