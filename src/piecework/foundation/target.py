"""Facts about the CPU, without torch: the machine, its instruction-set level and the flags behind it.

Compiled code may use any instruction of the CPU it was compiled on (compilers are run with `-march=native`), so
it runs wherever all flags that a compiler makes use of are there as well. `PIECEWORK_ISA=avx2` makes code for lesser
CPUs of that level.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from piecework.errors import PieceworkError
from piecework.foundation.environment import ISA_VARIABLE, lesser_isa

# Only flags that change what a C++ compiler or an Inductor kernel emits; the rest (virtualisation, power, mitigations)
# differs between machines that run the same code. Names as in Linux' /proc/cpuinfo.
_X86_NAMES = (
    "sse2 pni ssse3 sse4_1 sse4_2 sse4a popcnt cx16 movbe abm aes pclmulqdq avx f16c fma avx2 bmi1 bmi2 adx sha_ni "
    "avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg "
    "avx512_vpopcntdq avx512_bf16 avx512_fp16 avx_vnni avx_vnni_int8 avx_vnni_int16 avx_ifma avx_ne_convert gfni "
    "vaes vpclmulqdq amx_tile amx_int8 amx_bf16 amx_fp16 avx10_1 avx10_2"
)
_ARM_NAMES = (
    "asimd asimdhp asimdrdm asimddp asimdfhm fphp atomics crc32 aes pmull sha2 sha3 sha512 fcma jscvt lrcpc bf16 i8mm "
    "sve sve2 svebf16 svei8mm sme sme2 dotprod"
)
_X86_FLAGS = frozenset(_X86_NAMES.split())
_ARM_FLAGS = frozenset(_ARM_NAMES.split())

# Best first; a level holds when all its flags are there.
_X86_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("amx_bf16", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16"})),
    ("avx512_bf16", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx512_bf16"})),
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})),
    ("avx2", frozenset({"avx2", "fma"})),
)
_ARM_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("sve2_bf16", frozenset({"asimd", "sve2", "bf16"})),
    ("sve_bf16", frozenset({"asimd", "sve", "bf16"})),
    ("sve", frozenset({"asimd", "sve"})),
    ("asimd_bf16", frozenset({"asimd", "bf16"})),
    ("asimd", frozenset({"asimd"})),
)


_V3_NAMES = "sse2 pni ssse3 sse4_1 sse4_2 popcnt cx16 movbe abm avx f16c fma avx2 bmi1 bmi2"
_V3: Final = frozenset(_V3_NAMES.split())
_V4: Final = _V3 | {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}
NATIVE: Final = ("-march=native",)
_LESSER: Final = {
    "avx2": (_V3, ("-march=x86-64-v3",)),
    "avx512": (_V4, ("-march=x86-64-v4",)),
    "avx512_bf16": (
        _V4 | {"avx512_vnni", "avx512_bf16"},
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
    ),
}
"""Levels that code can be made for on better CPUs: the flags that it may depend on, and what compilers are told."""


@dataclass(frozen=True)
class Target:
    """The CPU that code is compiled for or run on.

    Args:
        machine: "x86_64", "aarch64", … (macOS' "arm64" and Windows' "AMD64" are written as these).
        system: "linux" or "darwin".
        isa: the instruction-set level, such as "avx512_bf16", "avx2", "asimd" or "baseline".
        flags: the CPU flags that compiled code may depend on, sorted.
        compiler_flags: what says so to C++ compilers.
    """

    machine: str
    system: str
    isa: str
    flags: tuple[str, ...]
    compiler_flags: tuple[str, ...] = NATIVE

    @property
    def fact(self) -> str:
        """The value of the fact `target/isa`: the level, a colon, and the flags."""
        return f"{self.isa}: {' '.join(self.flags)}"


def read_target(*, cpuinfo: Path = Path("/proc/cpuinfo")) -> Target:
    """Return this machine's CPU, or the lesser one that `PIECEWORK_ISA` names.

    An unreadable list of flags gives the level "baseline". Raises PieceworkError for a level that this CPU hasn't.
    """
    target = _own_target(cpuinfo)
    name = lesser_isa()
    return target if name in (None, target.isa) else lesser_target(target, name)


def lesser_target(target: Target, isa: str) -> Target:
    """Return a CPU of the level `isa` of which `target` has all flags. Raises PieceworkError where there is none."""
    flags, compiler_flags = _LESSER.get(isa, (frozenset[str](), ()))
    if not flags or not flags <= set(target.flags):
        known = [name for name, (needed, _) in _LESSER.items() if needed <= set(target.flags) and name != target.isa]
        raise PieceworkError(
            asked=f"{ISA_VARIABLE}={isa}",
            found=f"this CPU's level is {target.isa}",
            try_=f"one of {', '.join([*known, target.isa])}, or no {ISA_VARIABLE}",
        )
    return replace(make_target(target.machine, system=target.system, flags=flags), compiler_flags=compiler_flags)


def _own_target(cpuinfo: Path) -> Target:
    machine = _machine_name(platform.machine())
    system = platform.system().lower()
    if sys.platform == "darwin":
        return make_target(machine, system=system, flags=_darwin_flags(machine))
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            flags = parse_cpuinfo(lines)
    except OSError:
        flags = frozenset()
    return make_target(machine, system=system, flags=flags)


def make_target(machine: str, *, system: str, flags: frozenset[str]) -> Target:
    """Return the target with `flags`, of which those that don't matter to compiled code are dropped."""
    known, levels = (_X86_FLAGS, _X86_LEVELS) if machine == "x86_64" else (_ARM_FLAGS, _ARM_LEVELS)
    relevant = flags & known
    isa = next((name for name, needed in levels if needed <= relevant), "baseline")
    return Target(machine=machine, system=system, isa=isa, flags=tuple(sorted(relevant)))


def missing_flags(fact: str, *, target: Target) -> tuple[str, ...]:
    """Return the flags in a recorded `target/isa` value that `target` lacks; empty means its code runs here."""
    _, _, flags = fact.partition(":")
    return tuple(sorted(set(flags.split()) - set(target.flags)))


def parse_cpuinfo(lines: Iterable[str]) -> frozenset[str]:
    """Return the CPU flags of the first processor in the lines of /proc/cpuinfo, reading no further."""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def parse_sysctl(text: str) -> frozenset[str]:
    """Return CPU flags under their Linux names from lines of macOS' `sysctl hw.optional machdep.cpu`."""
    flags = set[str]()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.startswith("machdep.cpu.") and name.endswith("features"):
            flags.update(_DARWIN_X86.get(word, word.lower()) for word in value.split())
        elif name in _DARWIN_ARM and value.strip() == "1":
            flags.add(_DARWIN_ARM[name])
    return frozenset(flags)


_DARWIN_X86 = {"SSE3": "pni", "SSE4.1": "sse4_1", "SSE4.2": "sse4_2", "AVX1.0": "avx", "LZCNT": "abm", "CX16": "cx16"}
_DARWIN_ARM = {
    "hw.optional.arm64": "asimd",
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_LSE": "atomics",
    "hw.optional.arm.FEAT_SME": "sme",
}


def _darwin_flags(machine: str) -> frozenset[str]:
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "hw.optional", "machdep.cpu"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return frozenset({"asimd"}) if machine == "aarch64" else frozenset()
    return parse_sysctl(done.stdout)


def _machine_name(name: str) -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())
