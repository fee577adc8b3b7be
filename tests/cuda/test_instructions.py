"""How many instructions the kernels' hot loops take on sm_90a: none grows unnoticed.

After a change that is worth its instructions, or for a new kernel: `python tests/cuda/sass.py --record` (of the built
module; of a cubin with its name behind), and the table's difference is part of the change.
"""

import json

import pytest
import sass

from ddfast.ops import native

MARGIN = 1.1

# A loop over an outer one's 2 turns, with a rare path behind the end and a branch out of line.
TEXT = """
		Function : _ZN6ddfast48_GLOBAL__N__df915283_15_nearest_code_cu_cb4fe00a14nearest_kernelILi8ELb1EEEvNS0_1LE
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a0000017a02 */
                                                                              /* 0x000fe40000000f00 */
        /*0010*/                   MOV R2, RZ ;                               /* 0x0 */
        /*0020*/                   MOV R3, RZ ;                               /* 0x0 */
        /*0030*/                   BRA.DIV UR4, 0xd0 ;                        /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;       /* 0x0 */
        /*0050*/              @!P1 BRA 0xa0 ;                                 /* 0x0 */
        /*0060*/                   NOP ;                                      /* 0x0 */
        /*0070*/               @P0 BRA 0x30 ;                                 /* 0x0 */
        /*0080*/              @!P2 BRA 0x20 ;                                 /* 0x0 */
        /*0090*/                   EXIT ;                                     /* 0x0 */
        /*00a0*/                   MUFU.RCP R7, R7 ;                          /* 0x0 */
        /*00b0*/               @P3 BRA 0xa0 ;                                 /* 0x0 */
        /*00c0*/                   BRA 0x70 ;                                 /* 0x0 */
        /*00d0*/                   WARPSYNC.COLLECTIVE R3, 0xd0 ;             /* 0x0 */
        /*00e0*/                   BRA 0x40 ;                                 /* 0x0 */
        /*00f0*/                   BRA 0xf0;                                  /* 0x0 */
        /*0100*/                   NOP;                                       /* 0x0 */
"""

# Two guards of work, one of none, and two branches.
GUARDED = """
		Function : guarded
        /*0000*/                   MOV R2, RZ ;
        /*0010*/              @!P0 BRA 0x30 ;
        /*0020*/                   FFMA R3, R4, R5, R3 ;
        /*0030*/              @!P1 BRA 0x50 ;
        /*0040*/                   FFMA R3, R4, R5, R3 ;
        /*0050*/              @!P2 BRA 0x70 ;
        /*0060*/                   MOV R3, RZ ;
        /*0070*/              @!P3 BRA 0xb0 ;
        /*0080*/                   FADD R3, R3, R3 ;
        /*0090*/                   FADD R3, R3, R3 ;
        /*00a0*/                   BRA 0xc0 ;
        /*00b0*/                   FADD R3, R3, R3 ;
        /*00c0*/               @P4 BRA 0x10 ;
        /*00d0*/                   EXIT ;
"""


def test_loops_of_a_listing():
    [(name, code)] = sass.parsed(TEXT).items()
    assert name == "nearest_kernel<8, true>"
    assert len(code) == 17
    found = [(loop.head, loop.depth, len(loop.turn), len(loop.whole), loop.markers) for loop in sass.loops(code)]
    assert found == [(0x20, 0, 6, 9, 0), (0x30, 1, 4, 7, 1), (0xA0, 2, 2, 2, 0)]
    assert sorted(one.at for one in sass.hot_loop(code).turn) == [0x30, 0x40, 0x50, 0x70]


def test_a_pass_skips_no_work_and_takes_the_shorter_branch():
    [code] = sass.parsed(GUARDED).values()
    assert sorted(one.at for one in sass.hot_loop(code).turn) == [0x10, 0x20, 0x30, 0x40, 0x50, 0x70, 0xB0, 0xC0]


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[sass.Instruction]]:
    """Of the built module."""
    if not hasattr(native.cuda, "sample_codes"):
        pytest.skip(f"{native.cuda_reason}: no module with these kernels")
    if sass.cuobjdump() is None:
        pytest.skip("no cuobjdump")
    return sass.kernels(native.cuda.__file__)


def test_hot_loops_have_not_grown(kernels):
    table = json.loads(sass.TABLE.read_text())
    version = sass.compiler(native.cuda.__file__)
    if version != table["compiler"]:
        pytest.skip(f"built by nvcc {version}; the table is of {table['compiler']}")
    found = sass.passes(kernels)
    assert found.keys() == table["passes"].keys(), "kernels came or went: python tests/cuda/sass.py --record"
    grown = {name: (table["passes"][name], now) for name, now in found.items() if now > MARGIN * table["passes"][name]}
    assert not grown, f"(recorded, now) instructions: {grown}; if it is worth it: python tests/cuda/sass.py --record"


def test_no_atomic_goes_through_a_generic_pointer(kernels):
    """To another block's shared memory it would compile to a load and a store where the hardware has no such atomic."""
    generic = {
        name: {one.opcode for one in code if one.opcode.split(".")[0] in ("ATOM", "QSPC")}
        for name, code in kernels.items()
    }
    assert not {name: opcodes for name, opcodes in generic.items() if opcodes}
