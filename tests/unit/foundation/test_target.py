from pathlib import Path

import pytest

from piecework.errors import PieceworkError
from piecework.foundation.target import (
    NATIVE,
    Target,
    lesser_target,
    make_target,
    missing_flags,
    parse_cpuinfo,
    parse_sysctl,
    read_target,
)

AVX2 = "fpu sse2 ssse3 avx avx2 fma bmi2"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq"


@pytest.mark.parametrize(
    ("machine", "flags", "isa"),
    [
        ("x86_64", "sse2", "baseline"),
        ("x86_64", AVX2, "avx2"),
        ("x86_64", AVX512, "avx512"),
        ("x86_64", f"{AVX512} avx512_bf16", "avx512_bf16"),
        ("x86_64", f"{AVX512} avx512_bf16 amx_tile amx_bf16", "amx_bf16"),
        ("aarch64", "fp asimd", "asimd"),
        ("aarch64", "asimd bf16", "asimd_bf16"),
        ("aarch64", "asimd sve", "sve"),
        ("aarch64", "asimd sve sve2 bf16 i8mm", "sve2_bf16"),
        ("riscv64", "", "baseline"),
    ],
)
def test_level(machine: str, flags: str, isa: str) -> None:
    assert make_target(machine, system="linux", flags=frozenset(flags.split())).isa == isa


def test_flags_that_compilers_ignore_are_dropped() -> None:
    target = make_target("x86_64", system="linux", flags=frozenset({"svm", "avx", "hypervisor", "sse2"}))
    assert target.flags == ("avx", "sse2")


def test_missing_flags() -> None:
    small = make_target("x86_64", system="linux", flags=frozenset(AVX2.split()))
    large = make_target("x86_64", system="linux", flags=frozenset(AVX512.split()))
    assert missing_flags(small.fact, target=large) == ()
    assert missing_flags(large.fact, target=large) == ()
    assert missing_flags(large.fact, target=small) == ("avx512bw", "avx512dq", "avx512f", "avx512vl")


def test_parse_cpuinfo_reads_the_first_processor() -> None:
    text = "processor\t: 0\nflags\t\t: sse2 avx\n\nprocessor : 1\nflags : other\n"
    assert parse_cpuinfo(text.splitlines()) == {"sse2", "avx"}
    assert parse_cpuinfo(["Features\t: fp asimd\n"]) == {"fp", "asimd"}
    assert parse_cpuinfo(["vendor_id : x\n"]) == frozenset()


def test_parse_sysctl() -> None:
    intel = "machdep.cpu.features: FPU SSE3 AVX1.0 FMA\nmachdep.cpu.leaf7_features: AVX2 BMI2\n"
    assert make_target("x86_64", system="darwin", flags=parse_sysctl(intel)).isa == "avx2"
    arm = "hw.optional.arm64: 1\nhw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
    assert make_target("aarch64", system="darwin", flags=parse_sysctl(arm)) == Target(
        machine="aarch64", system="darwin", isa="asimd_bf16", flags=("asimd", "bf16")
    )


def test_read_target(tmp_path: Path) -> None:
    here = read_target()
    assert here.machine
    assert here.system
    assert missing_flags(here.fact, target=here) == ()


V4 = (
    "sse2 pni ssse3 sse4_1 sse4_2 popcnt cx16 movbe abm avx f16c fma avx2 bmi1 bmi2 "
    "avx512f avx512dq avx512cd avx512bw avx512vl"
)


@pytest.mark.parametrize(("isa", "compiler"), [("avx2", "-march=x86-64-v3"), ("avx512", "-march=x86-64-v4")])
def test_code_can_be_made_for_lesser_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isa: str, compiler: str
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {V4} avx512_bf16 amx_tile amx_bf16\n")
    here = read_target(cpuinfo=cpuinfo)
    monkeypatch.setenv("PIECEWORK_ISA", isa)
    lesser = read_target(cpuinfo=cpuinfo)
    assert (here.isa, here.compiler_flags) == ("amx_bf16", NATIVE)
    assert (lesser.isa, lesser.compiler_flags) == (isa, (compiler,))
    assert missing_flags(lesser.fact, target=here) == ()
    assert missing_flags(here.fact, target=lesser)


def test_code_can_not_be_made_for_better_cpus() -> None:
    here = make_target("x86_64", system="linux", flags=frozenset(V4.split()))
    with pytest.raises(PieceworkError, match="one of avx2, avx512, or no PIECEWORK_ISA"):
        lesser_target(here, "avx512_bf16")
    with pytest.raises(PieceworkError, match="PIECEWORK_ISA=sse"):
        lesser_target(here, "sse")


def test_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert read_target(cpuinfo=tmp_path / "none").isa == "baseline"
