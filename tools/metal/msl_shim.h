// The part of Metal's standard library that generated kernels use, declared for clang's OpenCL C++ mode: a language with
// Metal's address spaces, vector types, half and no double. A kernel that parses with these declarations calls existing
// functions with the right types, mixes no address spaces and reads no atomic as a plain value. That is a lint, not a
// proof: only Apple's compiler decides.
//
// Signatures follow the Metal Shading Language Specification 3.1. What is missing here is what kernels must not use.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
// Parameters of a kernel may point to what cannot be copied: atomics.
#pragma OPENCL EXTENSION __cl_clang_non_portable_kernel_param_types : enable

// `constant` is a keyword of both languages.
#define device __global
#define threadgroup __local
#define thread __private

// OpenCL's own atomic types have these names.
#define atomic_int metal_atomic_int
#define atomic_uint metal_atomic_uint
#define atomic_float metal_atomic_float

namespace metal {

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;

struct uint3 {
    uint x, y, z;
};

// A scalar stands for both components, as in every vector type of Metal.
struct ulong2 {
    ulong2(ulong both) : x(both), y(both) {}
    ulong x, y;
};

// Arithmetic happens in float.
struct bfloat {
    bfloat() = default;
    explicit bfloat(float value);
    operator float() const;

private:
    ushort bits;
};

// An element lies in the address space of its array.
template <typename T, size_t N>
struct array {
    thread T &operator[](size_t i) thread { return elements[i]; }
    const thread T &operator[](size_t i) const thread { return elements[i]; }
    threadgroup T &operator[](size_t i) threadgroup { return elements[i]; }
    const threadgroup T &operator[](size_t i) const threadgroup { return elements[i]; }
    device T &operator[](size_t i) device { return elements[i]; }
    const device T &operator[](size_t i) const device { return elements[i]; }
    T elements[N];
};

template <typename A, typename B>
struct same_size {
    static_assert(sizeof(A) == sizeof(B), "as_type between types of different size");
    typedef A type;
};

template <typename A, typename B>
typename same_size<A, B>::type as_type(B value);

// Functions over lists of types. Nothing is a template here: arguments of different types are ambiguous, as in Metal.
#define SHIM_INT32(F) F(int) F(uint)
#define SHIM_SMALL_INTEGERS(F) F(char) F(uchar) F(short) F(ushort) SHIM_INT32(F)
#define SHIM_INTEGERS(F) SHIM_SMALL_INTEGERS(F) F(long) F(ulong)
#define SHIM_FLOATS(F) F(half) F(float)

#define SHIM_ORDER(T) \
    T min(T a, T b);  \
    T max(T a, T b);  \
    T clamp(T x, T low, T high);
SHIM_INTEGERS(SHIM_ORDER)
SHIM_FLOATS(SHIM_ORDER)

#define SHIM_INTEGER(T)   \
    T abs(T x);           \
    T addsat(T a, T b);   \
    T subsat(T a, T b);   \
    T clz(T x);           \
    T ctz(T x);           \
    T popcount(T x);      \
    T reverse_bits(T x);  \
    T mulhi(T a, T b);
SHIM_INTEGERS(SHIM_INTEGER)

#define SHIM_MATH(T)      \
    T abs(T x);           \
    T fabs(T x);          \
    T acos(T x);          \
    T asin(T x);          \
    T atan(T x);          \
    T atan2(T y, T x);    \
    T ceil(T x);          \
    T cos(T x);           \
    T cosh(T x);          \
    T exp(T x);           \
    T exp2(T x);          \
    T floor(T x);         \
    T fma(T a, T b, T c); \
    T fmax(T a, T b);     \
    T fmin(T a, T b);     \
    T fmod(T a, T b);     \
    T log(T x);           \
    T log2(T x);          \
    T pow(T x, T y);      \
    T rint(T x);          \
    T round(T x);         \
    T rsqrt(T x);         \
    T sin(T x);           \
    T sinh(T x);          \
    T sqrt(T x);          \
    T tan(T x);           \
    T tanh(T x);          \
    T trunc(T x);         \
    bool isinf(T x);      \
    bool isnan(T x);
SHIM_FLOATS(SHIM_MATH)
namespace precise {
SHIM_MATH(float)
}
namespace fast {
SHIM_MATH(float)
float divide(float a, float b);
} // namespace fast

enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_texture };
void threadgroup_barrier(mem_flags flags);
void simdgroup_barrier(mem_flags flags);

// No function across a SIMD-group takes 64-bit integers.
#define SHIM_SIMD(T)                         \
    T simd_sum(T x);                         \
    T simd_product(T x);                     \
    T simd_min(T x);                         \
    T simd_max(T x);                         \
    T simd_prefix_inclusive_sum(T x);        \
    T simd_prefix_exclusive_sum(T x);        \
    T simd_prefix_inclusive_product(T x);    \
    T simd_prefix_exclusive_product(T x);    \
    T simd_broadcast(T x, ushort lane);      \
    T simd_broadcast_first(T x);             \
    T simd_shuffle(T x, ushort lane);        \
    T simd_shuffle_xor(T x, ushort mask);    \
    T simd_shuffle_up(T x, ushort delta);    \
    T simd_shuffle_down(T x, ushort delta);
SHIM_SMALL_INTEGERS(SHIM_SIMD)
SHIM_FLOATS(SHIM_SIMD)

#define SHIM_SIMD_BITS(T) \
    T simd_and(T x);      \
    T simd_or(T x);       \
    T simd_xor(T x);
SHIM_SMALL_INTEGERS(SHIM_SIMD_BITS)

struct simd_vote {
    typedef ulong vote_t;
    explicit operator vote_t() const;
};
bool simd_all(bool x);
bool simd_any(bool x);
simd_vote simd_ballot(bool x);

// Atomics: no copy, no plain access. Floats only in device memory, without minimum and maximum.
enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
    atomic(const __generic atomic &) = delete;
    void operator=(const __generic atomic &) = delete;

private:
    T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

#define SHIM_ATOMIC_ACCESS(SPACE, T)                                                                   \
    T atomic_load_explicit(const volatile SPACE atomic<T> *at, memory_order order);                    \
    void atomic_store_explicit(volatile SPACE atomic<T> *at, T value, memory_order order);             \
    T atomic_exchange_explicit(volatile SPACE atomic<T> *at, T value, memory_order order);             \
    bool atomic_compare_exchange_weak_explicit(                                                        \
        volatile SPACE atomic<T> *at, thread T *expected, T value, memory_order same, memory_order not_same);
#define SHIM_ATOMIC_SUM(SPACE, T)                                                                      \
    T atomic_fetch_add_explicit(volatile SPACE atomic<T> *at, T value, memory_order order);            \
    T atomic_fetch_sub_explicit(volatile SPACE atomic<T> *at, T value, memory_order order);
#define SHIM_ATOMIC_BITS(SPACE, T)                                                                     \
    T atomic_fetch_and_explicit(volatile SPACE atomic<T> *at, T value, memory_order order);            \
    T atomic_fetch_or_explicit(volatile SPACE atomic<T> *at, T value, memory_order order);             \
    T atomic_fetch_xor_explicit(volatile SPACE atomic<T> *at, T value, memory_order order);            \
    T atomic_fetch_min_explicit(volatile SPACE atomic<T> *at, T value, memory_order order);            \
    T atomic_fetch_max_explicit(volatile SPACE atomic<T> *at, T value, memory_order order);
#define SHIM_ATOMICS(T)                                                                                \
    SHIM_ATOMIC_ACCESS(device, T) SHIM_ATOMIC_SUM(device, T) SHIM_ATOMIC_BITS(device, T)               \
    SHIM_ATOMIC_ACCESS(threadgroup, T) SHIM_ATOMIC_SUM(threadgroup, T) SHIM_ATOMIC_BITS(threadgroup, T)
SHIM_INT32(SHIM_ATOMICS)
SHIM_ATOMIC_ACCESS(device, float)
SHIM_ATOMIC_SUM(device, float)

// Matrices of a SIMD-group. `thread_elements` is left out: the compiler writes eight of them, there are two.
template <typename T, int Columns, int Rows>
struct simdgroup_matrix {
    static_assert(Columns == 8 && Rows == 8, "matrices are 8x8");

private:
    T elements[2];
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value);

#define SHIM_MATRIX_MEMORY(SPACE)                                                                      \
    template <typename T>                                                                              \
    void simdgroup_load(                                                                               \
        thread simdgroup_matrix<T, 8, 8> &to, const SPACE T *from, ulong row = 8, ulong2 origin = 0,   \
        bool transpose = false);                                                                       \
    template <typename T>                                                                              \
    void simdgroup_store(                                                                              \
        const thread simdgroup_matrix<T, 8, 8> &from, SPACE T *to, ulong row = 8, ulong2 origin = 0,   \
        bool transpose = false);
SHIM_MATRIX_MEMORY(device)
SHIM_MATRIX_MEMORY(threadgroup)

// Factors have the type of the sum, or half the size of a float sum.
#define SHIM_MATRIX_PRODUCT(TEMPLATE, T, Factor)                                                       \
    TEMPLATE void simdgroup_multiply_accumulate(                                                       \
        thread simdgroup_matrix<T, 8, 8> &to, const thread simdgroup_matrix<Factor, 8, 8> &a,          \
        const thread simdgroup_matrix<Factor, 8, 8> &b, const thread simdgroup_matrix<T, 8, 8> &c);
SHIM_MATRIX_PRODUCT(template <typename T>, T, T)
SHIM_MATRIX_PRODUCT(, float, half)
SHIM_MATRIX_PRODUCT(, float, bfloat)

} // namespace metal

// Metal marks its kernels by an attribute that clang does not know here; nothing else in a generated text is void.
#define void __kernel void

#define double metal_has_no_double
