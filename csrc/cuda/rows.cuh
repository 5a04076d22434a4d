// A row of logits as a block sees it: elements in packets of 16 bytes, the parts before and after the aligned ones, the
// transform that comes first, and the walk over the packets.
#pragma once

#include "../calls.h"
#include "device.cuh"

namespace edge::cuda {

inline constexpr double kLog2E = 1.44269504088896340736;
inline constexpr double kLn2 = 0.69314718055994530942;

// y * gain is z * log2(e), in float. Beyond kHuge the largest product's rounding alone would be a power of two that
// float does not hold, of every element equal to it. The coarse gain, a power of two, makes the product exact;
// different elements are at least 64 apart there, so that only which are equal matters.
struct Gain {
    static constexpr float kHuge = 1073741824.0f;  // 2^30

    float fine;
    float coarse;  // at least fine

    // For elements of which y is the largest.
    __device__ __forceinline__ float at(float y) const { return std::fabs(y * fine) > kHuge ? coarse : fine; }
    // For elements whose largest product is u.
    __device__ __forceinline__ float of(float u) const { return std::fabs(u) > kHuge ? coarse : fine; }
};

// LogitTransform, prepared on the host. y is x where the transform is linear with a positive slope, else f(x);
// z = y * slope, and z * log2(e) is computed as y * gain.
struct Transform {
    bool linear;
    Gain gain;
    float softcap;  // 0 for none
    float inv_softcap;
    float logit_scale;
    double slope;
    double gain_error;  // how much larger slope * log2(e) is than gain.fine, relative to it
};

inline Transform prepare(const LogitTransform& given) {
    const double product = given.logit_scale * given.inv_temperature;
    Transform out{};
    out.linear = given.softcap == 0.0 && product > 0;
    out.slope = out.linear ? product : given.inv_temperature;
    out.gain.fine = static_cast<float>(out.slope * kLog2E);
    out.gain.coarse = static_cast<float>(std::exp2(std::ceil(std::log2(out.slope * kLog2E))));
    out.gain_error = (out.slope * kLog2E - static_cast<double>(out.gain.fine)) / static_cast<double>(out.gain.fine);
    out.softcap = static_cast<float>(given.softcap);
    out.inv_softcap = given.softcap > 0 ? static_cast<float>(1.0 / given.softcap) : 0.0f;
    out.logit_scale = static_cast<float>(given.logit_scale);
    return out;
}

// Elements come in pairs, as packets hold them and as two lanes of a packed instruction take them.
template <class T>
struct Element;

template <>
struct Element<float> {
    static constexpr int kPairs = 2;  // per packet
    static __device__ __forceinline__ float to_float(float x) { return x; }
    static __device__ __forceinline__ float from_float(float x) { return x; }
    static __device__ __forceinline__ float2 pair(const Packet& packet, int k) {
        return {bits_to_float(packet.word[2 * k]), bits_to_float(packet.word[2 * k + 1])};
    }
    static __device__ __forceinline__ void set_pair(Packet& packet, int k, float2 value) {
        packet.word[2 * k] = float_to_bits(value.x);
        packet.word[2 * k + 1] = float_to_bits(value.y);
    }
    // The largest element of some packets, NaN if one is.
    template <int kPackets>
    static __device__ __forceinline__ float largest(const Packet (&packets)[kPackets]) {
        float top = bits_to_float(packets[0].word[0]);
#pragma unroll
        for (int k = 1; k < 4 * kPackets; ++k) top = max_or_nan(top, bits_to_float(packets[k / 4].word[k % 4]));
        return top;
    }
};

template <>
struct Element<__nv_bfloat16> {
    static constexpr int kPairs = 4;
    static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
    static __device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
    static __device__ __forceinline__ float2 pair(const Packet& packet, int k) {
        return {bits_to_float(packet.word[k] << 16), bits_to_float(packet.word[k] & 0xffff0000u)};
    }
    static __device__ __forceinline__ void set_pair(Packet& packet, int k, float2 value) {
        packet.word[k] = to_bits(__floats2bfloat162_rn(value.x, value.y));
    }
    template <int kPackets>
    static __device__ __forceinline__ float largest(const Packet (&packets)[kPackets]) {
        std::uint32_t top = packets[0].word[0];
#pragma unroll
        for (int k = 1; k < 4 * kPackets; ++k) {
            top = to_bits(__hmax2_nan(from_bits(top), from_bits(packets[k / 4].word[k % 4])));
        }
        return max_or_nan(bits_to_float(top << 16), bits_to_float(top & 0xffff0000u));
    }

  private:
    static __device__ __forceinline__ std::uint32_t to_bits(__nv_bfloat162 value) {
        std::uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        return bits;
    }
    static __device__ __forceinline__ __nv_bfloat162 from_bits(std::uint32_t bits) {
        __nv_bfloat162 value;
        memcpy(static_cast<void*>(&value), &bits, sizeof bits);
        return value;
    }
};

template <>
struct Element<__half> {
    static constexpr int kPairs = 4;
    static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
    static __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }
    static __device__ __forceinline__ float2 pair(const Packet& packet, int k) {
        return __half22float2(from_bits(packet.word[k]));
    }
    static __device__ __forceinline__ void set_pair(Packet& packet, int k, float2 value) {
        packet.word[k] = to_bits(__floats2half2_rn(value.x, value.y));
    }
    template <int kPackets>
    static __device__ __forceinline__ float largest(const Packet (&packets)[kPackets]) {
        __half2 top = from_bits(packets[0].word[0]);
#pragma unroll
        for (int k = 1; k < 4 * kPackets; ++k) top = __hmax2_nan(top, from_bits(packets[k / 4].word[k % 4]));
        const float2 both = __half22float2(top);
        return max_or_nan(both.x, both.y);
    }

  private:
    static __device__ __forceinline__ std::uint32_t to_bits(__half2 value) {
        std::uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        return bits;
    }
    static __device__ __forceinline__ __half2 from_bits(std::uint32_t bits) {
        __half2 value;
        memcpy(static_cast<void*>(&value), &bits, sizeof bits);
        return value;
    }
};

template <class T>
inline constexpr unsigned kPerPacket = sizeof(Packet) / sizeof(T);

// tanh within 3 ulp: an odd polynomial near 0, where 1 - 2 / (1 + exp(2|u|)) would cancel, and the exponential
// elsewhere.
__device__ __forceinline__ float tanh_exact(float u) {
    const float size = std::fabs(u);
    const float square = u * u;
    float q = -5.70498872745e-3f;
    q = std::fma(q, square, 2.06390887954e-2f);
    q = std::fma(q, square, -5.37397155531e-2f);
    q = std::fma(q, square, 1.33314422036e-1f);
    q = std::fma(q, square, -3.33332819422e-1f);
    const float near = std::fma(q * square, size, size);
    const float e = exp2_approx(size * static_cast<float>(2 * kLog2E));
    const float far = std::fma(-2.0f, reciprocal(1.0f + e), 1.0f);
    return std::copysign(size < 0.625f ? near : far, u);
}

// y of x. The main loops know the linear transforms, in which there is nothing to do.
struct Linear {
    static constexpr bool kIsLinear = true;
    __device__ __forceinline__ explicit Linear(const Transform&) {}
    __device__ __forceinline__ float operator()(float x) const { return x; }
    // Sets slope to dy/dx.
    __device__ __forceinline__ float operator()(float x, float& slope) const {
        slope = 1.0f;
        return x;
    }
};

struct Curved {
    static constexpr bool kIsLinear = false;
    float softcap;
    float inv_softcap;
    float logit_scale;

    __device__ __forceinline__ explicit Curved(const Transform& transform)
        : softcap(transform.softcap), inv_softcap(transform.inv_softcap), logit_scale(transform.logit_scale) {}
    __device__ __forceinline__ float operator()(float x) const {
        float unused;
        return (*this)(x, unused);
    }
    __device__ __forceinline__ float operator()(float x, float& slope) const {
        const float scaled = x * logit_scale;
        slope = logit_scale;
        if (softcap == 0.0f) return scaled;
        const float bent = tanh_exact(scaled * inv_softcap);
        slope = logit_scale * std::fma(-bent, bent, 1.0f);
        return softcap * bent;
    }
};

// A row as [head | packets | tail]: the packets are aligned, the others are fewer than a packet's elements.
template <class T>
struct Row {
    T* begin;
    unsigned head;
    unsigned packets;
    unsigned tail;

    __device__ __forceinline__ Row(T* row, std::int64_t vocab) : begin(row) {
        const auto past = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(row) % sizeof(Packet));
        const std::int64_t before = (sizeof(Packet) - past) % sizeof(Packet) / sizeof(T);
        head = static_cast<unsigned>(before < vocab ? before : vocab);
        packets = static_cast<unsigned>((vocab - head) / kPerPacket<T>);
        tail = static_cast<unsigned>((vocab - head) % kPerPacket<T>);
    }
    __device__ __forceinline__ std::int64_t index_of(unsigned packet) const {
        return head + static_cast<std::int64_t>(packet) * kPerPacket<T>;
    }
    __device__ __forceinline__ T* packet(unsigned index) const { return begin + index_of(index); }
    // Of an element between head and tail.
    __device__ __forceinline__ unsigned packet_of(std::int64_t index) const {
        return static_cast<unsigned>((index - head) / kPerPacket<T>);
    }
};

// The part of a row that one block takes: a run of its packets, the head with the first and the tail with the last.
struct Part {
    unsigned first;  // packet
    unsigned last;   // past the end
    bool has_head;
    bool has_tail;

    __device__ __forceinline__ Part(unsigned packets, unsigned part, unsigned parts)
        : has_head(part == 0), has_tail(part == parts - 1) {
        const unsigned each = (packets + parts - 1) / parts;
        first = part * each < packets ? part * each : packets;
        last = packets - first < each ? packets : first + each;
    }

    template <class T>
    __device__ __forceinline__ bool holds(const Row<T>& row, std::int64_t index) const {
        if (index < row.head) return has_head;
        if (index >= row.index_of(row.packets)) return has_tail;
        const unsigned packet = row.packet_of(index);
        return packet >= first && packet < last;
    }

    // Calls single(index of an element) for this thread's element of the head and of the tail.
    template <class T, class Single>
    __device__ __forceinline__ void ends(const Row<T>& row, const Single& single) const {
        if (has_head && threadIdx.x < row.head) single(static_cast<std::int64_t>(threadIdx.x));
        if (has_tail && threadIdx.x < row.tail) single(row.index_of(row.packets) + threadIdx.x);
    }
};

template <int kValue>
struct Count {
    static constexpr int value = kValue;
};

// Calls body(i, Count<kAtOnce>{}) for this thread's packets i, i + blockDim.x, ... of [first, last), kAtOnce of them at
// a time and the remaining ones singly. Packet i is always the thread's whose number is (i - first) mod blockDim.x.
template <int kAtOnce, class Body>
__device__ __forceinline__ void for_packets(unsigned first, unsigned last, const Body& body) {
    unsigned i = first + threadIdx.x;
    for (; i + (kAtOnce - 1) * blockDim.x < last; i += kAtOnce * blockDim.x) body(i, Count<kAtOnce>{});
    if constexpr (kAtOnce > 1) {
#pragma unroll 1
        for (; i < last; i += blockDim.x) body(i, Count<1>{});
    }
}

// A packet gathered from elements that do not lie as their destination does.
template <class T>
__device__ __forceinline__ Packet gather(const T* from) {
    Packet out;
    T element[kPerPacket<T>];
#pragma unroll
    for (unsigned k = 0; k < kPerPacket<T>; ++k) element[k] = from[k];
    memcpy(&out, element, sizeof out);
    return out;
}

}  // namespace edge::cuda
