"""AMD's assembly: instructions, loops, what each does, registers, spills, divisions in LLVM's code."""

from __future__ import annotations

import pytest

from fxquant.tuning.facts import gcn
from fxquant.tuning.facts.loops import Instruction

# Cut from an int8 product compiled for gfx942.
GFX942 = """
mm:                                     ; @mm
.Lfunc_begin0:
	s_load_dwordx8 s[4:11], s[0:1], 0x0
	global_load_dwordx4 v[60:63], v[64:65], off
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 13 51                         ; k.py:13:51
	s_and_saveexec_b64 s[16:17], s[2:3]
	s_cbranch_execz .LBB0_2
	global_load_dwordx4 v[64:67], v[64:65], off
.LBB0_2:                                ;   in Loop: Header=BB0_1 Depth=1
	ds_read2st64_b64 v[76:79], v98 offset1:4
	ds_write_b128 v98, v[64:67]
	s_waitcnt lgkmcnt(0)
	s_barrier
	v_mfma_i32_32x32x16_i8 v[16:31], v[92:93], v[78:79], v[16:31]
	v_lshl_add_u64 v[64:65], v[104:105], 0, s[4:5]
	v_pk_mul_f32 v[0:1], v[0:1], v[2:3]
	v_cvt_f32_i32_e32 v0, v0
	s_cbranch_scc0 .LBB0_1
.LBB0_3:
	global_store_dwordx4 v[2:3], v[4:7], off
	s_endpgm
	.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     0
    .sgpr_spill_count: 4
    .vgpr_count:     130
    .vgpr_spill_count: 2
	.end_amdgpu_metadata
"""

LLVM = """
define amdgpu_kernel void @mm(ptr addrspace(1) inreg readonly captures(none) %0, i32 inreg %1) {
  %3 = sdiv i32 %1, %1
  br label %4

4:                                                ; preds = %2, %4
  %5 = phi i32 [ 0, %2 ], [ %9, %4 ]
  %6 = load <4 x i32>, ptr addrspace(1) %0, align 16
  %7 = tail call <16 x i32> @llvm.amdgcn.mfma.i32.32x32x16.i8(i64 0, i64 0, <16 x i32> %8, i32 0, i32 0, i32 0)
  %8 = udiv i32 %5, 48
  %9 = sdiv i32 %5, %1
  %10 = icmp slt i32 %9, %1
  br i1 %10, label %4, label %11

11:                                               ; preds = %4
  ret void
}
"""


def test_the_loop_of_a_product() -> None:
    loop = gcn.loop_of(GFX942, warps=4)
    assert loop.is_loop
    assert loop.matrix == {"v_mfma_i32_32x32x16_i8": 1}
    assert loop.operations == 2 * 32 * 32 * 16 * 4
    assert loop.global_loads == {16: 1}
    assert (loop.shared_loads, loop.shared_stores, loop.barriers) == (1, 1, 2)
    assert (loop.integer, loop.floating, loop.conversions, loop.control) == (1, 1, 1, 3)
    assert loop.total == 12


def test_registers_and_spills_of_vectors_come_from_the_metadata() -> None:
    assert gcn.registers_of(GFX942) == 130
    assert gcn.spills_of(GFX942) == 2


@pytest.mark.parametrize(
    ("name", "operands", "kind"),
    [
        ("buffer_load_dwordx4", "v[0:3], v4, s[0:3], 0 offen", ("global_loads", 16)),
        ("buffer_load_dwordx4", "v4, s[0:3], 0 offen lds", ("async_copies", 16)),
        ("global_load_lds_dwordx4", "", ("async_copies", 16)),
        ("global_load_ubyte", "", ("global_loads", 1)),
        ("buffer_load_ushort", "", ("global_loads", 2)),
        ("global_load_short_d16_hi", "", ("global_loads", 2)),
        ("buffer_store_dwordx2", "", ("global_stores", 8)),
        ("scratch_load_dword", "", ("local", 4)),
        ("v_fma_f32", "", ("floating", 0)),
        ("v_max_f32_e32", "", ("floating", 0)),
        ("v_pk_fma_f16", "", ("floating", 0)),
        ("v_perm_b32", "", ("integer", 0)),
    ],
)
def test_what_an_instruction_does(name: str, operands: str, kind: tuple[str, int]) -> None:
    assert gcn.kind_of(Instruction((), name, operands)) == kind


def test_divisions_by_what_is_no_constant_count_in_the_loop_only() -> None:
    assert gcn.divisions_of(LLVM) == 1
    assert gcn.loop_of(GFX942, warps=4, llvm=LLVM).divisions == 1
    assert gcn.loop_of(GFX942, warps=4).divisions == 0
    assert gcn.loop_of(GFX942.replace("v_pk_mul_f32", "v_rcp_iflag_f32"), warps=4).divisions == 1


def test_inline_assembly_that_llvm_left_out_is_seen() -> None:
    llvm = '  %8 = tail call i32 asm "v_perm_b32 $0, $1, $2, $3", "=v,v,v,v"(i32 %5, i32 %6, i32 %7)'
    assert gcn.lost_assembly("	;;#ASMSTART\n	v_perm_b32 v0, v1, v2, v3\n	;;#ASMEND", llvm) == 0
    assert gcn.lost_assembly("	s_endpgm", llvm) == 1
