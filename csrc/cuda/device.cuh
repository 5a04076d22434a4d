// What the kernels need of a GPU beyond plain C++: instructions that have no name in CUDA C++, each with a meaning in
// plain C++ beside it. nvcc's host pass compiles the latter and never runs it; tests/cuda_on_cpu does run it, every
// thread as a fiber.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace edge::cuda {

// The architecture that this pass compiles for, as 10 * major + minor.
#if defined(__CUDA_ARCH__)
inline constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#elif defined(EDGE_KERNELS_EMULATED_ARCHITECTURE)
inline constexpr int kArchitecture = EDGE_KERNELS_EMULATED_ARCHITECTURE;
#else
inline constexpr int kArchitecture = 80;
#endif

inline constexpr int kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;
inline constexpr float kLowest = -3.402823466e38f;

// 16 bytes, the widest access of one thread.
struct alignas(16) Packet {
    std::uint32_t word[4];
};

// The block's shared memory. All of it is dynamic, so that a test can poison it as a GPU leaves it: undefined.
__device__ __forceinline__ char* shared_memory() {
#ifdef __CUDACC__
    extern __shared__ Packet edge_shared_memory[];
    return reinterpret_cast<char*>(edge_shared_memory);
#else
    return static_cast<char*>(emulated_shared_memory());
#endif
}

// 2^x within 2 ulp; what would be denormal is 0.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
#endif
}

// 1 / x within 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

__device__ __forceinline__ float bits_to_float(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    static_assert(sizeof value == sizeof bits);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

__device__ __forceinline__ std::uint32_t float_to_bits(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

// The larger of the two, NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return a > b || a != a ? a : b;
#endif
}

// Two at a time: one instruction from sm_100 on, two before.
__device__ __forceinline__ float2 fma2(float2 a, float2 b, float2 c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    return __ffma2_rn(a, b, c);
#else
    return {std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y)};
#endif
}

__device__ __forceinline__ float2 add2(float2 a, float2 b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    return __fadd2_rn(a, b);
#else
    return {a.x + b.x, a.y + b.y};
#endif
}

__device__ __forceinline__ float2 mul2(float2 a, float2 b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    return __fmul2_rn(a, b);
#else
    return {a.x * b.x, a.y * b.y};
#endif
}

// Values in memory are read again after it: a compiler that kept them in registers would run out of these.
__device__ __forceinline__ void forget_registers() {
#ifdef __CUDA_ARCH__
    asm volatile("" ::: "memory");
#endif
}

// How long the L2 cache should hold a line: a matrix larger than it is not worth holding, and what is read once more
// soon is worth more than what is not.
enum class Keep { kNormal, kBriefly, kLong };

class CachePolicy {
  public:
    __device__ __forceinline__ explicit CachePolicy(Keep keep) {
#ifdef __CUDA_ARCH__
        if (keep == Keep::kBriefly) {
            asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(bits_));
        } else if (keep == Keep::kLong) {
            asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(bits_));
        } else {
            asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(bits_));
        }
#else
        (void)keep;
#endif
    }

    // Past the L1 cache, which has no use for what a block reads once.
    __device__ __forceinline__ Packet load(const void* from) const {
#ifdef __CUDA_ARCH__
        Packet out;
        asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                     : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
                     : "l"(from), "l"(bits_));
        return out;
#else
        return *static_cast<const Packet*>(from);
#endif
    }

    __device__ __forceinline__ void store(void* to, const Packet& value) const {
#ifdef __CUDA_ARCH__
        asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;"
                     :
                     : "l"(to), "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3]),
                       "l"(bits_)
                     : "memory");
#else
        *static_cast<Packet*>(to) = value;
#endif
    }

  private:
    unsigned long long bits_ = 0;
};

}  // namespace edge::cuda
