/* GCC 12 declares that _tile_loadconfig reads 8 of the 64 bytes that it reads, and drops the stores to the others:
 * llama.cpp then crashes on CPUs with AMX. Included before every file of its build, this declares all of them. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
