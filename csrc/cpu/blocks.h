// The leaves of the CPU backend: functions over one block of a row, compiled once for each instruction set.
//
// Everything compiled with AVX flags stays behind these function pointers and has internal linkage: an inline function
// with external linkage, compiled for AVX-512 in one file and for any x86 in another, would be merged by the linker
// into whichever copy came first, and crash on a machine without AVX-512.
#pragma once

#include <cstdint>

namespace edge::cpu {

// Elements per block: the float32 block (16 KB) stays in the L1 cache between its two passes, and float sums over a
// block, some 64 terms in each of 64 lanes, are exact to 1e-7. Blocks are merged in double, always in order, so that
// the number of threads does not change a bit of the result.
inline constexpr std::int64_t kBlock = 4096;

// LogitTransform, prepared: z = y * slope. Linear transforms with a positive slope keep y = x, which is exact.
struct Transform {
    bool linear;
    double slope;
    double softcap;  // 0 for none
    double logit_scale;
};

// Of one block: the largest y; the sums of exp(z - z_max) and of exp(z - z_max) * (z - z_max). A block of -inf only has
// max -inf and zero sums. NaN or +inf in z make the sums NaN.
struct BlockSums {
    double max;
    double sum;
    double weighted;
};

// grad[j] = exp(d) * (base + tilt * d) * dz/dx_j, where d = (y_j - max) * slope. max is the row's largest y: the large
// parts cancel in an exact subtraction.
struct RowGradient {
    double max;
    double base;
    double tilt;
};

using ForwardBlock = BlockSums (*)(const void* logits, std::int64_t count, const Transform& transform);
using BackwardBlock = void (*)(const void* logits, void* grad_logits, std::int64_t count, const Transform& transform,
                               const RowGradient& row);

// The same in one exponential per element, for linear transforms: exp((x - the block's max) * slope) is written to
// powers, of type float (double for float64), and later turned into the gradient, powers * factor, each block having a
// factor of its own. powers may share memory with x or grad if the types are equal; only the kernel may read
// them, since it decides their order.
using PowersBlock = BlockSums (*)(const void* logits, void* powers, std::int64_t count, double slope);
using ScaleBlock = void (*)(const void* powers, void* grad_logits, std::int64_t count, double factor);

struct BlockKernels {
    ForwardBlock forward;
    BackwardBlock backward;
    PowersBlock powers;
    ScaleBlock scale;
};

struct InstructionSet {
    const char* name;
    BlockKernels float32;
    BlockKernels bfloat16;
    BlockKernels float16;
};

extern const InstructionSet kPortable;
extern const BlockKernels kPortableFloat64;  // on every machine: the C library's exp decides its speed
#ifdef EDGE_KERNELS_X86
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

}  // namespace edge::cpu
