// Matrix products of few rows, C (M, N) = A (M, K) B (K, N), on vector extensions; B is packed once per call of the engine.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace skiprnn {

// Uninitialised memory aligned to a cache line, freed with its owner.
template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t size) { allocate(size); }
    Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Buffer() { std::free(data_); }
    void allocate(size_t size) {
        std::free(data_);
        const size_t bytes = (size * sizeof(T) + 127) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (!data_) throw std::bad_alloc();
        size_ = size;
    }
    void zero() { std::memset(data_, 0, size_ * sizeof(T)); }
    size_t size() const { return size_; }
    operator T*() const { return data_; }

private:
    T* data_ = nullptr;
    size_t size_ = 0;
};

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxTileRows = 14;  // 28 accumulators of 32 registers
#else
constexpr int kMaxTileRows = 6;  // 12 accumulators of 16 registers
#endif
constexpr int kTileVectors = 2;

// One tile of C in registers: Rows x Vectors vectors. Transposed: A is given as (K, M), as in the gradient of a weight.
template <class T, int Rows, int Vectors, bool Transposed>
void tile(ptrdiff_t K, const T* a, ptrdiff_t lda, const T* b, ptrdiff_t ldb, T* c, ptrdiff_t ldc, const T* init,
          ptrdiff_t ldinit) {
    constexpr int W = kLanes<T>;
    Vector<T> acc[Rows][Vectors];
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) acc[m][n] = init ? load<T>(init + m * ldinit + n * W) : Vector<T>{};
    for (ptrdiff_t k = 0; k < K; ++k) {
        Vector<T> bk[Vectors];
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) bk[n] = load<T>(b + k * ldb + n * W);
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) {
            const T value = Transposed ? a[k * lda + m] : a[m * lda + k];
#pragma GCC unroll 2
            for (int n = 0; n < Vectors; ++n) acc[m][n] += value * bk[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) store<T>(c + m * ldc + n * W, acc[m][n]);
}

template <class T>
using Tile = void (*)(ptrdiff_t, const T*, ptrdiff_t, const T*, ptrdiff_t, T*, ptrdiff_t, const T*, ptrdiff_t);

template <class T, int Vectors, bool Transposed, int... Rows>
constexpr std::array<Tile<T>, sizeof...(Rows)> tiles(std::integer_sequence<int, Rows...>) {
    return {tile<T, Rows + 1, Vectors, Transposed>...};
}

// All rows of one panel of B, in tiles of nearly equal height.
template <class T, int Vectors, bool Transposed>
void panel(int M, ptrdiff_t K, const T* a, ptrdiff_t lda, const T* b, ptrdiff_t ldb, T* c, ptrdiff_t ldc, const T* init,
           ptrdiff_t ldinit) {
    static constexpr auto kTiles = tiles<T, Vectors, Transposed>(std::make_integer_sequence<int, kMaxTileRows>());
    for (int left = (M + kMaxTileRows - 1) / kMaxTileRows; left > 0; --left) {
        const int rows = (M + left - 1) / left;
        kTiles[rows - 1](K, a, lda, b, ldb, c, ldc, init, ldinit);
        M -= rows;
        a += Transposed ? rows : rows * lda;
        c += rows * ldc;
        if (init) init += rows * ldinit;
    }
}

// One row of C over several panels side by side: a panel alone has too few accumulators to hide their latency.
template <class T, int Panels, int Vectors>
void row_tile(ptrdiff_t K, const T* a, const T* b, T* c, const T* init) {
    constexpr int W = kLanes<T>, width = Vectors * W;
    Vector<T> acc[Panels][Vectors];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) acc[p][n] = init ? load<T>(init + p * width + n * W) : Vector<T>{};
    for (ptrdiff_t k = 0; k < K; ++k) {
        const T value = a[k];
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 2
            for (int n = 0; n < Vectors; ++n) acc[p][n] += value * load<T>(b + (p * K + k) * width + n * W);
    }
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) store<T>(c + p * width + n * W, acc[p][n]);
}

// The same with B in bfloat16, a panel's two vectors in one: the first in the lower halves of its elements, the second in
// the upper ones. Half as much is read, and summed in the same order.
template <int Panels, int Vectors>
void row_tile_halves(ptrdiff_t K, const float* a, const float* b, float* c, const float* init) {
    using Bits = Simd<float>::Bits;
    constexpr int W = kLanes<float>, width = Vectors * W;
    const Bits upper = Bits{} + int32_t(0xffff0000);
    Vector<float> acc[Panels][Vectors];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n)
            acc[p][n] = init ? load<float>(init + p * width + n * W) : Vector<float>{};
    for (ptrdiff_t k = 0; k < K; ++k) {
        const float value = a[k];
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) {
            const Bits pair = (Bits)load<float>(b + (p * K + k) * W);
            acc[p][0] += value * (Vector<float>)(pair << 16);
            if constexpr (Vectors > 1) acc[p][1] += value * (Vector<float>)(pair & upper);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) store<float>(c + p * width + n * W, acc[p][n]);
}

// Whether bfloat16 has all of these numbers.
inline bool fits_halves(int length, const float* const* columns, int count) {
    for (int n = 0; n < count; ++n)
        for (int k = 0; columns[n] && k < length; ++k) {
            uint32_t bits;
            std::memcpy(&bits, &columns[n][k], sizeof(bits));
            if (bits & 0xffff) return false;
        }
    return true;
}

// B (K, N) in panels of kTileVectors vectors, each contiguous over K; N is a multiple of the lanes.
template <class T>
struct Packed {
    static constexpr int kWidth = kTileVectors * kLanes<T>;
    int K = 0, N = 0;
    bool halves = false;  // in bfloat16, for row_tile_halves
    Buffer<T> data;

    // Like pack_columns, for products of one row: in bfloat16 if nothing is lost.
    void pack_columns_for_one_row(int rows, int length, const T* const* columns, int count) {
        if constexpr (std::is_same_v<T, float>) halves = fits_halves(length, columns, count);
        if (!halves) return pack_columns(rows, length, columns, count);
        constexpr int W = kLanes<T>;
        K = rows, N = count;
        data.allocate(size_t(K) * W * ((N + kWidth - 1) / kWidth));
        data.zero();
        for (int n = 0; n < N; ++n) {
            T* out = data + size_t(n / kWidth) * W * K + n % W;
            const int moved = n % kWidth < W ? 16 : 0;  // a number's bfloat16 is its upper half
            for (int k = 0; columns[n] && k < length; ++k) {
                uint32_t bits, pair;
                std::memcpy(&bits, &columns[n][k], sizeof(bits));
                std::memcpy(&pair, &out[size_t(k) * W], sizeof(pair));
                pair |= bits >> moved;
                std::memcpy(&out[size_t(k) * W], &pair, sizeof(pair));
            }
        }
    }

    // From B's columns: pointers to `length` elements each, 0 beyond them; a null pointer is a column of zeros.
    void pack_columns(int rows, int length, const T* const* columns, int count) {
        allocate(rows, count);
        for (int n = 0; n < N; ++n) {
            const int width = std::min(kWidth, N - n / kWidth * kWidth);
            T* out = data + size_t(n / kWidth) * kWidth * K + n % kWidth;
            const int filled = columns[n] ? length : 0;
            for (int k = 0; k < filled; ++k) out[size_t(k) * width] = columns[n][k];
            for (int k = filled; k < K; ++k) out[size_t(k) * width] = 0;
        }
    }

    // From B's rows, likewise.
    void pack_rows(int columns, int length, const T* const* rows, int count) {
        allocate(count, columns);
        T* out = data;
        for (int n = 0; n < N; n += kWidth) {
            const int width = std::min(kWidth, N - n), there = std::clamp(length - n, 0, width);
            for (int k = 0; k < K; ++k, out += width) {
                const int filled = rows[k] ? there : 0;
                if (filled) std::memcpy(out, rows[k] + n, filled * sizeof(T));
                std::fill(out + filled, out + width, T(0));
            }
        }
    }

private:
    void allocate(int rows, int columns) {
        K = rows, N = columns;
        data.allocate(size_t(K) * N);
    }
};

enum class Start { kZero, kAccumulate, kBias };

// C (M, N) = A B, plus C itself or a bias row.
template <class T>
void multiply(int M, const T* a, ptrdiff_t lda, const Packed<T>& b, T* c, ptrdiff_t ldc, Start start,
              const T* bias = nullptr) {
    constexpr int W = kLanes<T>, kPanels = 4;
    const T* packed = b.data;
    int n = 0;
    auto begin = [&] { return start == Start::kZero ? nullptr : start == Start::kBias ? bias + n : c + n; };
    if constexpr (std::is_same_v<T, float>) {
        auto halves = [&](auto panels, auto vectors) {
            for (; n + panels * vectors * W <= b.N; n += panels * vectors * W) {
                row_tile_halves<panels, vectors>(b.K, a, packed, c + n, begin());
                packed += ptrdiff_t(b.K) * panels * W;
            }
        };
        if (b.halves) {
            constexpr std::integral_constant<int, kPanels> four;
            constexpr std::integral_constant<int, 2> two;
            constexpr std::integral_constant<int, 1> one;
            return halves(four, two), halves(two, two), halves(one, two), halves(one, one);
        }
    }
    for (; M == 1 && n + kPanels * kTileVectors * W <= b.N; n += kPanels * kTileVectors * W) {
        row_tile<T, kPanels, kTileVectors>(b.K, a, packed, c + n, begin());
        packed += ptrdiff_t(b.K) * kPanels * kTileVectors * W;
    }
    for (; n < b.N; n += kTileVectors * W) {
        const T* init = begin();
        const ptrdiff_t ldinit = start == Start::kBias ? 0 : ldc;
        if (b.N - n >= kTileVectors * W)
            panel<T, kTileVectors, false>(M, b.K, a, lda, packed, kTileVectors * W, c + n, ldc, init, ldinit);
        else
            panel<T, 1, false>(M, b.K, a, lda, packed, W, c + n, ldc, init, ldinit);
        packed += ptrdiff_t(b.K) * kTileVectors * W;
    }
}

// C (M, N) += A^T B, with A (K, M) and B (K, N) as they lie in memory: the gradient of a weight over K rows.
template <class T>
void multiply_transposed(int M, int N, int K, const T* a, ptrdiff_t lda, const T* b, ptrdiff_t ldb, T* c,
                         ptrdiff_t ldc) {
    constexpr int W = kLanes<T>;
    for (int n = 0; n < N; n += kTileVectors * W) {
        if (N - n >= kTileVectors * W)
            panel<T, kTileVectors, true>(M, K, a, lda, b + n, ldb, c + n, ldc, c + n, ldc);
        else
            panel<T, 1, true>(M, K, a, lda, b + n, ldb, c + n, ldc, c + n, ldc);
    }
}

}  // namespace skiprnn
