"""Which flags of /proc/cpuinfo a program can depend on (pure).

A program asks the CPU once, at its start, and then uses what it found. The other flags describe the kernel's own
choices, timers, power and virtualisation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

#: Instructions and registers (x86), by name.
_INSTRUCTIONS: Final = frozenset(
    """abm adx aes aperfmperf avx avx2 avx_vnni bmi1 bmi2 cldemote clflush clflushopt clwb clzero cmov cx16 cx8 enqcmd
    f16c fma fma4 fpu fsgsbase fxsr gfni hle lahf_lm lm lwp mmx mmxext movbe movdir64b movdiri nopl ospke osxsave
    pclmulqdq pku pni popcnt prefetchi ptwrite rdpid rdrand rdseed rdtscp rtm serialize sha512 sha_ni sm3 sm4 sse sse2
    sse4_1 sse4_2 sse4a ssse3 syscall tbm tsc tsxldtrk user_shstk vaes vpclmulqdq waitpkg wbnoinvd xop xsave xsavec
    xsaveopt""".split()  # noqa: SIM905 (else sixty lines)
)
_FAMILIES: Final = ("avx512", "avx_", "amx_", "3dnow")
#: Faster ways of doing what every CPU can: nothing breaks without them.
SPEED_ONLY: Final = frozenset({"erms", "fsrm", "fsrs", "fzrm", "fsrc", "rep_good", "misalignsse"})
#: Names that occur on x86 only.
_X86: Final = frozenset({"fpu", "tsc"})


def program_flags(flags: Iterable[str]) -> frozenset[str]:
    """Those that a program can depend on, with those that only make it faster."""
    flags = frozenset(flags)
    if not _X86 & flags:
        return flags  # on other architectures all of them are instructions
    return frozenset(
        flag for flag in flags if flag in _INSTRUCTIONS or flag in SPEED_ONLY or flag.startswith(_FAMILIES)
    )
