// Vectors of the widest kind the compiler was told it may use, and exp, sigmoid, tanh on them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace skiprnn {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float Vector __attribute__((vector_size(kVectorBytes), may_alias));
    typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef int32_t Integer;
    typedef Integer Bits __attribute__((vector_size(kVectorBytes), may_alias));
    static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    static constexpr int kMantissa = 23;
    static constexpr int32_t kOne = 127 << 23;  // the bits of 1.0
    static constexpr float kLn2High = 0.6931471805599453f, kLn2Low = 0;  // exp(-20) off by 2e-7 of it, 1e-6 without FMA
    static constexpr float kSigmoidLimit = 60, kTanhLimit = 20;  // beyond, the result no longer changes visibly
    static constexpr float kSigmoidZero = 88.3f;  // from there on exp(x) is so large that its inverse is no normal number
    // expm1(r) / r on |r| <= ln(2) / 2, Chebyshev fit: relative error 1e-8
    static constexpr int kTerms = 6;
    static constexpr float kCoefficients[kTerms] = {1.0f,        0.5f,          0.16666504741f,
                                                    0.041666351f, 0.0083691580f, 0.0013941121f};
};

template <>
struct Simd<double> {
    typedef double Vector __attribute__((vector_size(kVectorBytes), may_alias));
    typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef int64_t Integer;
    typedef Integer Bits __attribute__((vector_size(kVectorBytes), may_alias));
    static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr int kMantissa = 52;
    static constexpr int64_t kOne = int64_t(1023) << 52;
    static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
    static constexpr double kSigmoidLimit = 300, kTanhLimit = 42;
    static constexpr double kSigmoidZero = 709.4;
    // expm1(r) / r, Taylor: the next term is below 1e-17
    static constexpr int kTerms = 14;
    static constexpr double kCoefficients[kTerms] = {
        1.0,          1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,        1.0 / 720,         1.0 / 5040,
        1.0 / 40320,  1.0 / 362880,  1.0 / 3628800,  1.0 / 39916800,  1.0 / 479001600,  1.0 / 6227020800.0,
        1.0 / 87178291200.0};
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
inline Vector<T> load(const T* p) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
inline void store(T* p, Vector<T> v) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

// Of the vectors over H elements padded to P, body(v, keep) for the one at v; keep makes what lies in the padding 0: there
// a weight of 0 times an infinite number left NaN.
template <class T>
struct Whole {
    Vector<T> operator()(Vector<T> x) const { return x; }
};

template <class T>
struct Part {
    using Bits = typename Simd<T>::Bits;
    Bits mask;
    explicit Part(int there) {
        static constexpr typename Simd<T>::Integer kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        std::memcpy(&mask, kNumbers, sizeof(mask));
        mask = mask < Bits{} + there;
    }
    Vector<T> operator()(Vector<T> x) const { return (Vector<T>)((Bits)x & mask); }
};

template <class T, class Body>
inline void for_vectors(int H, int P, Body body) {
    int v = 0;
    for (; v + kLanes<T> <= H; v += kLanes<T>) body(v, Whole<T>());
    for (; v < P; v += kLanes<T>) body(v, Part<T>(H - v));
}

template <class T>
inline T sum(Vector<T> v) {
    T total = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) total += v[lane];
    return total;
}

template <class T>
inline Vector<T> clamp(Vector<T> x, T limit) {
    const Vector<T> high = Vector<T>{} + limit, low = Vector<T>{} - limit;
    x = x > high ? high : x;  // a NaN passes through both
    return x < low ? low : x;
}

// The same in two instructions instead of four: GCC makes none of min and max that lets a NaN through.
#if defined(__AVX512F__)
template <>
inline Vector<float> clamp<float>(Vector<float> x, float limit) {
    return _mm512_max_ps(_mm512_set1_ps(-limit), _mm512_min_ps(_mm512_set1_ps(limit), x));
}
#elif defined(__AVX2__)
template <>
inline Vector<float> clamp<float>(Vector<float> x, float limit) {
    return _mm256_max_ps(_mm256_set1_ps(-limit), _mm256_min_ps(_mm256_set1_ps(limit), x));
}
#endif

// exp(x) = scale * (1 + p) with scale a power of two and p = expm1(r), |r| <= ln(2) / 2
template <class T>
inline void exp_parts(Vector<T> x, Vector<T>& scale, Vector<T>& p) {
    using S = Simd<T>;
    const T log2e = T(1.44269504088896340736);
    const Vector<T> shifted = x * log2e + S::kMagic;
    const Vector<T> n = shifted - S::kMagic;
    Vector<T> r = x - n * S::kLn2High;
    if constexpr (S::kLn2Low != 0) r -= n * S::kLn2Low;
    Vector<T> q = Vector<T>{} + S::kCoefficients[S::kTerms - 1];
#pragma GCC unroll 16
    for (int term = S::kTerms - 2; term >= 0; --term) q = q * r + S::kCoefficients[term];
    p = q * r;
    typename S::Bits bits = (typename S::Bits)shifted;
    bits = (bits << S::kMantissa) + S::kOne;
    scale = (Vector<T>)bits;
}

// 1 + exp(-x), so that sigmoid(x) is its inverse
template <class T>
inline Vector<T> sigmoid_inverse(Vector<T> x, T limit = Simd<T>::kSigmoidLimit) {
    Vector<T> scale, p;
    exp_parts<T>(-clamp<T>(x, limit), scale, p);
    return (scale * p + scale) + T(1);
}

// expm1(2x), so that tanh(x) = e / (e + 2), accurate near 0 too
template <class T>
inline Vector<T> tanh_exponential(Vector<T> x) {
    Vector<T> scale, p;
    exp_parts<T>(clamp<T>(x + x, Simd<T>::kTanhLimit), scale, p);
    return scale * p + (scale - T(1));
}

// s, a multiple of sigmoid(x), but of 0 where torch's is 0: beside infinite weights or states, that shows.
template <class T>
inline Vector<T> or_zero(Vector<T> x, Vector<T> s) {
    return x < Vector<T>{} - Simd<T>::kSigmoidZero ? s * T(0) : s;
}

template <class T>
inline Vector<T> sigmoid(Vector<T> x) {
    return or_zero<T>(x, T(1) / sigmoid_inverse<T>(x));
}

template <class T>
inline Vector<T> tanh(Vector<T> x) {
    const Vector<T> e = tanh_exponential<T>(x);
    return e / (e + T(2));
}

// sigmoid(a) * tanh(b) for one division
template <class T>
inline Vector<T> sigmoid_times_tanh(Vector<T> a, Vector<T> b) {
    const Vector<T> e = tanh_exponential<T>(b);
    return e / (sigmoid_inverse<T>(a, Simd<T>::kSigmoidZero) * (e + T(2)));
}

// c * sigmoid(a) likewise
template <class T>
inline Vector<T> times_sigmoid(Vector<T> c, Vector<T> a) {
    return or_zero<T>(a, c / sigmoid_inverse<T>(a));
}

// sigmoid(a) and tanh(b) for one division
template <class T>
inline void sigmoid_and_tanh(Vector<T> a, Vector<T> b, Vector<T>& sigmoid_a, Vector<T>& tanh_b) {
    const Vector<T> s = sigmoid_inverse<T>(a), e = tanh_exponential<T>(b), e2 = e + T(2);
    const Vector<T> inverse = T(1) / (s * e2);
    sigmoid_a = or_zero<T>(a, inverse * e2);
    tanh_b = e * (inverse * s);
}

// Copies of a row (H), one after the other; streamed past the cache, which then need not fetch what is overwritten.
template <class T>
void repeat(const T* row, int64_t H, int64_t copies, T* to, [[maybe_unused]] bool stream) {
#if defined(__x86_64__)
    constexpr int64_t kLine = 64 / sizeof(T), kPiece = sizeof(__m128i) / sizeof(T);
    const int64_t total = copies * H, head = int64_t(-reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T));
    if (stream && H >= kLine && total >= head + 2 * kLine) {
        T wrapped[2 * kPiece];  // the end of the row and its beginning again
        std::memcpy(wrapped, row + H - kPiece, kPiece * sizeof(T));
        std::memcpy(wrapped + kPiece, row, kPiece * sizeof(T));
        std::memcpy(to, row, head * sizeof(T));
        int64_t at = head, entry = head % H;
        for (; at + kLine <= total; at += kLine)
            for (int64_t piece = 0; piece < kLine; piece += kPiece) {
                const T* from = entry + kPiece <= H ? row + entry : wrapped + entry - (H - kPiece);
                const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
                _mm_stream_si128(reinterpret_cast<__m128i*>(to + at + piece), value);
                if ((entry += kPiece) >= H) entry -= H;
            }
        for (; at < total; ++at) to[at] = row[entry], entry = entry + 1 < H ? entry + 1 : 0;
        return;
    }
#endif
    for (int64_t copy = 0; copy < copies; ++copy) std::memcpy(to + copy * H, row, H * sizeof(T));
}

}  // namespace skiprnn
