"""SASS: instructions, loops, what each does, registers, spills."""

from __future__ import annotations

import pytest

from fxquant.tuning.facts import sass
from fxquant.tuning.facts.loops import Instruction

# Cut from an int8 product compiled for sm_90a; the encodings beside the instructions are left out.
SM90 = """
Resource usage:
 Common:
  GLOBAL:0
 Function mm:
  REG:117 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
	code for sm_90a
		Function : mm
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000fe20000000800 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R6], desc[UR20][R8.64], P5 ;
        /*0020*/              @!P5 BRA 0x0100 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/                   IGMMA.64x128x32.S8.S8 R88, gdesc[UR8], R88 ;
        /*0050*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR12], R24, gsb0 ;
        /*0060*/                   LDGSTS.E.BYPASS.LTC128B.128 [R165], desc[UR20][R16.64], P6 ;
        /*0070*/                   IADD3.X R7, RZ, R9, RZ, P0, !PT ;
        /*0080*/                   ISETP.GE.AND P5, PT, R4, UR5, PT ;
        /*0090*/              @!P5 BRA 0x0030 ;
        /*0100*/                   STL [R1+0x4], R3 ;
        /*0110*/                   STG.E.128 desc[UR20][R2.64], R4 ;
        /*0120*/                   EXIT ;
        /*0130*/                   BRA 0x130;
        /*0140*/                   NOP;
"""


def test_the_loop_of_a_warp_group_product() -> None:
    loop = sass.loop_of(SM90, warps=8)
    assert loop.is_loop
    assert loop.matrix == {"IGMMA.64x128x32.S8.S8": 2}
    assert loop.operations == 2 * (2 * 64 * 128 * 32) * 2  # two warp groups
    assert loop.async_copies == {16: 1}
    assert (loop.barriers, loop.integer, loop.control, loop.local) == (1, 2, 1, 0)
    assert loop.total == 7


def test_registers_and_spills_are_of_the_whole_function() -> None:
    assert sass.registers_of(SM90) == 117
    assert sass.count_of("local", SM90) == 1
    assert sass.count_of("bulk_copies", SM90) == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("IMMA.16832.S8.S8.SAT", "matrix"),
        ("QGMMA.64x256x32.F32.E4M3.E4M3", "matrix"),
        ("UTCOMMA.4X", "matrix"),
        ("LDSM.16.M88.4", "matrix_loads"),
        ("LDS.128", "shared_loads"),
        ("UTMALDG.2D", "bulk_copies"),
        ("LDL.LU", "local"),
        ("I2FP.F32.S32", "conversions"),
        ("FMUL2", "floating"),
        ("BAR.SYNC.DEFER_BLOCKING", "barriers"),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "atomics"),
    ],
)
def test_what_an_instruction_does(name: str, kind: str) -> None:
    assert sass.kind_of(Instruction((), name))[0] == kind


@pytest.mark.parametrize(
    ("name", "size"),
    [("LDG.E.128", 16), ("LDG.E.64.CONSTANT", 8), ("LDG.E", 4), ("LDG.E.U16", 2), ("LDG.E.U8.CONSTANT", 1),
     ("LDGSTS.E.BYPASS.LTC128B.128", 16), ("LDGSTS.E.LTC128B", 4), ("LDG.E.ENL2.256", 32)],
)  # fmt: skip
def test_bytes_of_an_access(name: str, size: int) -> None:
    assert sass.kind_of(Instruction((), name))[1] == size


@pytest.mark.parametrize(
    ("name", "operations"),
    [("IMMA.16832.S8.S8.SAT", 16 * 8 * 32), ("HMMA.16816.F32.BF16", 16 * 8 * 16), ("HMMA.1688.F32.TF32", 16 * 8 * 8),
     ("QMMA.16832.F32.E4M3.E4M3", 16 * 8 * 32), ("HGMMA.64x256x16.F32.BF16", 64 * 256 * 16 / 4)],
)  # fmt: skip
def test_operations_of_four_warps(name: str, operations: int) -> None:
    text = f"        /*0000*/                   {name} R0, R4, R8, R0 ;\n"
    assert sass.loop_of(text, warps=4).operations == 2 * operations * 4


def test_a_product_in_tensor_memory_has_its_shape_from_the_ptx() -> None:
    text = "/*0000*/ UTCIMMA gdesc[UR4], gdesc[UR6], tmem[UR19], tmem[UR10], idesc[UR11], UPT ;\n"
    assert sass.loop_of(text, warps=8, blockwide=2 * 128 * 128 * 32).operations == 2 * 128 * 128 * 32


@pytest.mark.parametrize("name", ["I2F.U32.RP", "I2F.RP", "I2F.U64.RP"])
def test_a_division_is_known_by_its_reciprocal(name: str) -> None:
    text = f"        /*0000*/                   {name} R0, R4 ;\n"
    assert sass.loop_of(text, warps=4).divisions == 1
    assert sass.loop_of(text, warps=4, divisions=3).divisions == 3


def test_an_uncertain_branch_with_its_predicate_among_the_operands_also_falls_through() -> None:
    conditional, certain = sass.parse("/*0010*/ BRA.U UP0, 0x220 ;\n /*0020*/ BRA 0x10 ;\n")
    assert (conditional.targets, conditional.falls) == (("220",), True)
    assert (certain.targets, certain.falls) == (("10",), False)
