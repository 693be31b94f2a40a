/* Included ahead of llama.cpp's sources by the Makefile. GCC 12 tells its optimizer that _tile_loadconfig reads 8 bytes of
 * the 64, so the stores to the others are dropped, and llama.cpp ends with SIGSEGV on a CPU with AMX. Its _tile_loadd
 * names no memory that it reads. */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#undef _tile_loadd
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#define _tile_loadd(tile, base, stride) FXQUANT_TILE_LOADD(tile, base, stride)
#define FXQUANT_TILE_LOADD(tile, base, stride) \
    __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm" #tile ::"r"((const void*)(base)), "r"((long)(stride)) : "memory")
#endif
