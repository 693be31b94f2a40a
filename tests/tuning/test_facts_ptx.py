"""PTX: matrix instructions with their shapes, and divisions in the loop."""

from __future__ import annotations

from fxquant.tuning.facts import ptx

LOOP = """
.visible .entry mm(
	.param .u64 .ptr .global .align 1 mm_param_0
)
{
	ld.param.u64 	%rd1, [mm_param_0];
	div.s32 	%r9, %r8, %r7;
	@%p1 bra 	$L__BB0_2;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	.loc	1 13 13                         // k.py:13:13
	rem.u32 	%r3, %r1, %r2;
	div.full.f32 	%f3, %f1, %f2;
	// begin inline asm
	mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 { %r1, %r2, %r3, %r4 }, { %r5 }, { %r6 }, { %r7 };
	// end inline asm
	@!%p2 bra 	$L__BB0_1;
$L__BB0_2:
	ret;
}
"""

TENSOR_MEMORY = """
	elect.sync 	%r149|%p29, -1;
$L__BB0_4:
	mov.b32 	%r145, 136316064;
	// begin inline asm
	@%p29 tcgen05.mma.cta_group::1.kind::i8 [ %r445 + 0 ], %rd83, %rd84, %r145, %p28;
	// end inline asm
	{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r2], %r3;
	@!complete bra.uni waitLoop;
	}
	@%p1 bra 	$L__BB0_4;
	ret;
"""


def test_matrix_instructions_by_shape_and_types() -> None:
    assert ptx.matrix_of(LOOP) == {"mma.m16n8k32.s32.s8.s8.s32": 1}
    wide = "\twgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%r1,%r2}, %rd1, %rd2, p, 1, 1;"
    assert ptx.matrix_of(wide) == {"wgmma.m64n128k32.s32.s8.s8": 1}


def test_only_divisions_of_integers_in_the_loop_count() -> None:
    assert ptx.divisions_of(LOOP) == 1
    assert ptx.divisions_of(LOOP.replace("rem.u32", "add.u32")) == 0


def test_the_shape_of_a_product_in_tensor_memory_is_in_its_descriptor() -> None:
    assert ptx.matrix_of(TENSOR_MEMORY) == {"tcgen05.mma.i8.m128n128k32": 1}
    assert ptx.blockwide_operations(TENSOR_MEMORY) == 2 * 128 * 128 * 32
    assert ptx.blockwide_operations(LOOP) == 0


def test_labels_of_inline_assembly_are_no_loops() -> None:
    assert not any("waitLoop" in i.targets for i in ptx.parse(TENSOR_MEMORY))
