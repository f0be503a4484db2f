// The time loop of one layer for NVIDIA GPUs from compute capability 8.0 on: the weights stay in registers, a step costs
// two products on the tensor cores (mma.sync, fp16 operands, float32 sums) and one or two barriers.
//
// Compiled for one problem, by macros: LSTM (1) or GRU (0); POLICY, see below; I, H, KT; SAVE;
// D_OUTPUT, whether the output has a gradient.
// W = 16 KT columns hold what a step reads, [h, x, 1], and zeros. Block (i, r) takes sequences 16 i .. 16 i + 15 of run r
// through all steps, with KT warps: warp w has the columns 16 w .. 16 w + 15 of every gate. As the tensor cores' results
// lie, a lane has 8 elements of each matrix (16, W): [n][2 i + j] is row g + 8 i, column 16 w + 8 n + 2 quad + j, with
// g = lane / 4, quad = lane % 4. What backward needs is kept as it lies in the lanes, 16 bytes of each after the other.
//
// Shapes: R runs, B batch, T steps, I input, H hidden, G gates (LSTM i j f o, GRU r z candidate).

#ifndef CUDA_ON_CPU
typedef unsigned int u32;

__device__ __forceinline__ u32 pack_half(float lo, float hi) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}
__device__ __forceinline__ u32 pack_bfloat(float lo, float hi) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}
__device__ __forceinline__ float half_lo(u32 packed) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(packed));
    return value;
}
__device__ __forceinline__ float half_hi(u32 packed) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(packed));
    return value;
}
__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float least(float x, float bound) {  // nan if x is
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
    return y;
}
__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void ldsm(u32 (&a)[4], const void* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ __forceinline__ void barrier() { __syncthreads(); }
#endif

typedef unsigned short u16;
typedef long long i64;
struct __align__(16) u32x4 { u32 at[4]; };
struct __align__(16) f32x4 { float at[4]; };
struct __align__(8) f32x2 { float at[2]; };

constexpr int G = LSTM ? 4 : 3, W = 16 * KT, THREADS = 32 * KT, ROWS = 16;
constexpr int LEFT = LSTM ? 4 : 2;  // gates that read [h, x, 1]
enum { ALWAYS, RANDOM_STEPS, SKIP, RANDOM_NEURONS, SELECTIVE };
constexpr bool SKIPS = POLICY == SKIP, SELECTS = POLICY == SELECTIVE, NEURONS = POLICY >= RANDOM_NEURONS;
constexpr int BLOCKS = G + SELECTS;  // of gradients: the gates', and that of Selective's coordinator
constexpr int READ = W + 8, PRE = BLOCKS * W + 8;  // of a row in shared memory: ldmatrix without bank conflicts

struct Arguments {
    const float* x;        // (R, B, T, I)
    const float* draw;     // (R, B, T), or (R, B, T, H): random steps, neurons
    const i64* lengths;    // (R, B), or null
    const u32* weights;    // as the lanes hold them, see operator.py
    const float* w_p;      // (R, W): Skip
    const float* b_p;      // (R,)
    const float* coordinator;  // (R, I + 2, W): Selective's W_i, w_u, b
    const float* slope;        // (R,)
    float* states;         // (R, K, B, W): h (and c) before the first step, replaced by those after the last; in backward
                           // their gradients the other way
    float* gate;           // (R, 2, B): q and s likewise
    float* output;         // (R, B, T, H)
    float* updates;        // (R, B, T), or (R, B, T, H)
    u32x4* kept;           // (R, T, tiles, KEPT, threads): see `Kept`
    u32x4* read;           // (R, T, B, W) bfloat16: [h, x, 1]
    u32x4* reset;          // likewise [r * h, x, 1]: GRU
    float* kept_gate;      // (R, T, 3, B): q and s before each step, and what the candidate proposes as the next q
    const float* d_output;   // (R, B, T, H), or null
    const float* d_updates;  // as updates, or null
    u32x4* d_pre;          // (R, T, B, BLOCKS, W) bfloat16: gradients of the pre-activations
    float* d_w_p;          // (R, tiles, W), to be summed over the tiles
    float* d_b_p;          // (R, tiles)
    int B, T;
};

// Backward's 16 bytes per lane and step: LSTM i j f o in fp16, c in float32 (two), h in fp16 where the policy learns; GRU
// r z candidate h; where neurons decide, a bit for each that updates and, above these, for each whose decision has a slope.
constexpr bool KEEPS_H = !LSTM || SKIPS || SELECTS;
constexpr int KEPT_C = 4, KEPT_H = LSTM ? 6 : 3, KEPT_BITS = KEPT_H + KEEPS_H, KEPT = KEPT_BITS + NEURONS;

__device__ __forceinline__ float sigmoid(float x) { return rcp(1 + ex2(-1.4426950408889634f * x)); }
__device__ __forceinline__ float tanh_of(float x) { return 2 * rcp(1 + ex2(-2.8853900817779268f * x)) - 1; }
// Pre-activations of i, j, f, o -> sigmoid, tanh, sigmoid, sigmoid, by one reciprocal, of which a GPU makes few: with
// x' = exp(-x), or exp(-2 x) of j, each is a quotient by 1 + x'. Bounded, for the product of the four must not overflow.
__device__ __forceinline__ void lstm_gates(float (&a)[4]) {
    constexpr float LOG2_E = 1.4426950408889634f, BOUND = 30;
    float i = 1 + ex2(least(-LOG2_E * a[0], BOUND)), f = 1 + ex2(least(-LOG2_E * a[2], BOUND));
    float o = 1 + ex2(least(-LOG2_E * a[3], BOUND)), of_j = ex2(least(-2 * LOG2_E * a[1], BOUND)), j = 1 + of_j;
    float ij = i * j, fo = f * o, inverse = rcp(ij * fo), inverse_ij = inverse * fo, inverse_fo = inverse * ij;
    a[0] = j * inverse_ij, a[1] = (1 - of_j) * i * inverse_ij, a[2] = o * inverse_fo, a[3] = f * inverse_fo;
}
__device__ __forceinline__ float half_at(const u32x4& four, int n, int e) {
    u32 packed = four.at[2 * n + (e >> 1)];
    return e & 1 ? half_hi(packed) : half_lo(packed);
}
__device__ __forceinline__ u32 halves_to_bfloats(u32 packed, float factor) {
    return pack_bfloat(half_lo(packed) * factor, half_hi(packed) * factor);
}
// The sum, or the largest, of the four lanes that share a row.
__device__ __forceinline__ float row_sum(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}
__device__ __forceinline__ float row_max(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    return fmaxf(value, shuffle_xor(value, 2));
}

// Who a thread is, and its two rows.
struct Lane {
    int run, tile, warp, lane, g, quad, column;  // column: the first of its columns
    int row[2], safe[2];                         // of the batch; safe: one that exists
    bool exists[2];
    int length[2];                               // steps that count
    i64 sequence[2];                             // among those of all runs
    bool writes;                                 // what there is once per row
    bool full;                                   // all columns of its warp are h's
    int copied, from;                            // the row and the 8 columns of a matrix (16, W) that it copies

    __device__ __forceinline__ explicit Lane(const Arguments& a) {
        run = blockIdx.y, tile = blockIdx.x;
        warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, quad = lane & 3;
        column = 16 * warp + 2 * quad;
        writes = warp == 0 && quad == 0;
        full = 16 * warp + 15 < H;
        copied = threadIdx.x / (2 * KT), from = threadIdx.x % (2 * KT);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row[i] = ROWS * tile + g + 8 * i;
            exists[i] = row[i] < a.B;
            safe[i] = exists[i] ? row[i] : a.B - 1;
            sequence[i] = (i64)run * a.B + safe[i];
            length[i] = !exists[i] ? 0 : a.lengths ? (int)a.lengths[sequence[i]] : a.T;
        }
    }
    // Its 8 elements of a matrix (B, W) of its run.
    __device__ __forceinline__ void load(float (&values)[2][4], const float* matrix) const {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) values[n][e] = matrix[(i64)safe[e >> 1] * W + column + 8 * n + (e & 1)];
    }
    __device__ __forceinline__ void store(const float (&values)[2][4], float* matrix) const {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (exists[e >> 1]) matrix[(i64)row[e >> 1] * W + column + 8 * n + (e & 1)] = values[n][e];
    }
    // Its elements of step t of (R, B, T, H); those that are not there are left as they are, or not written.
    __device__ __forceinline__ void load_step(float (&values)[2][4], const float* from, int T, int t) const {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (column + 8 * n + (e & 1) < H)
                    values[n][e] = from[(sequence[e >> 1] * T + t) * H + column + 8 * n + (e & 1)];
    }
    __device__ __forceinline__ void store_step(const float (&values)[2][4], float* const (&rows)[2]) const {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float lo = values[n][2 * i], hi = values[n][2 * i + 1];
                if (!exists[i] || column + 8 * n >= H) continue;
                if (H % 2 == 0) {
                    *reinterpret_cast<f32x2*>(rows[i] + 8 * n) = {lo, hi};
                } else {
                    rows[i][8 * n] = lo;
                    if (column + 8 * n + 1 < H) rows[i][8 * n + 1] = hi;
                }
            }
    }
    __device__ __forceinline__ float* state(const Arguments& a, int entry) const {
        return a.states + ((i64)run * (LSTM ? 2 : 1) + entry) * a.B * W;
    }
    // Where a step's 16 bytes of each lane lie.
    __device__ __forceinline__ u32x4* kept(const Arguments& a, int t) const {
        return a.kept + (((i64)run * a.T + t) * gridDim.x + tile) * KEPT * THREADS + threadIdx.x;
    }
    // Its part of GATES matrices (16, W) side by side in shared memory, times a factor, to (.., B, GATES, W) bfloat16.
    template <int GATES>
    __device__ __forceinline__ void copy(u32x4* into, const u16* rows, int stride, float factor, int B) const {
#pragma unroll
        for (int gate = 0; gate < GATES; gate++) {
            u32x4 found = *reinterpret_cast<const u32x4*>(rows + copied * stride + 8 * from + gate * W);
#pragma unroll
            for (int k = 0; k < 4; k++) found.at[k] = halves_to_bfloats(found.at[k], factor);
            if (ROWS * tile + copied < B) into[gate * (W / 8)] = found;
        }
    }
    // Where that is, of step t.
    template <int GATES>
    __device__ __forceinline__ u32x4* destination(u32x4* matrix, const Arguments& a, int t) const {
        return matrix + ((((i64)run * a.T + t) * a.B + ROWS * tile + copied) * GATES) * (W / 8) + from;
    }
    // The fragments of A, rows of `stride` halves in shared memory, for the k-th 16 columns.
    __device__ __forceinline__ void fragments(u32 (&into)[4], const u16* rows, int stride, int k) const {
        ldsm(into, rows + (lane & 15) * stride + (lane >> 4) * 8 + 16 * k);
    }
};

// The columns of [h, x, 1] that are not h, if any of a thread's are: x of the next step is under way.
struct Inputs {
    bool is_x[2][2], is_one[2][2];
    float x[2][4];

    __device__ __forceinline__ explicit Inputs(const Lane& me) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int column = me.column + 8 * n + j - H;
                is_x[n][j] = column >= 0 && column < I;
                is_one[n][j] = column == I;
            }
    }
    __device__ __forceinline__ void fetch(const Arguments& a, const Lane& me, int t) {
        if (me.full || t >= a.T) return;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int i = e >> 1, j = e & 1;
                x[n][e] = is_x[n][j] ? a.x[(me.sequence[i] * a.T + t) * I + me.column + 8 * n + j - H]
                                     : is_one[n][j] ? 1.f : 0.f;
            }
    }
    // h (or r * h), x and 1 to shared memory.
    __device__ __forceinline__ void write(u16* rows, const float (&h)[2][4], const Lane& me) const {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float lo = h[n][2 * i], hi = h[n][2 * i + 1];
                if (!me.full) {
                    if (me.column + 8 * n >= H) lo = x[n][2 * i];
                    if (me.column + 8 * n + 1 >= H) hi = x[n][2 * i + 1];
                }
                *reinterpret_cast<u32*>(rows + (me.g + 8 * i) * READ + me.column + 8 * n) = pack_half(lo, hi);
            }
    }
};

// Selective's: which neurons update.
struct Coordinator {
    float w_i[I][2][2], w_u[2][2], b[2][2], slope, x[2][I];

    __device__ __forceinline__ Coordinator(const Arguments& a, const Lane& me) {
        if (!SELECTS) return;
        slope = a.slope[me.run];
        const float* rows = a.coordinator + (i64)me.run * (I + 2) * W + me.column;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int i = 0; i < I; i++) w_i[i][n][j] = rows[i * W + 8 * n + j];
                w_u[n][j] = rows[I * W + 8 * n + j], b[n][j] = rows[(I + 1) * W + 8 * n + j];
            }
    }
    __device__ __forceinline__ void fetch(const Arguments& a, const Lane& me, int t) {
#pragma unroll
        for (int row = 0; row < 2; row++)
#pragma unroll
            for (int i = 0; i < I; i++) x[row][i] = a.x[(me.sequence[row] * a.T + t) * I + i];
    }
    // What is rounded, before it is clamped to [0, 1].
    __device__ __forceinline__ float value(float h, int n, int e) const {
        float sum = b[n][e & 1] + w_u[n][e & 1] * h;
#pragma unroll
        for (int i = 0; i < I; i++) sum += w_i[i][n][e & 1] * x[e >> 1][i];
        return (sum * slope + 1) / 2;
    }
};

// Skip's gate of a row.
struct Gate {
    float q, s;
    __device__ __forceinline__ float accumulated() const { return s + least(q, 1 - s); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(const Arguments a) {
    __shared__ __align__(16) u16 rows[2][ROWS * READ];
    __shared__ float logits[2][ROWS][KT];
    const Lane me(a);
    u32 weights[KT][2 * G][2];
    {
        const u32* given = a.weights + ((i64)me.run * KT + me.warp) * KT * 2 * G * 64 + 2 * me.lane;
#pragma unroll
        for (int k = 0; k < KT; k++)
#pragma unroll
            for (int n = 0; n < 2 * G; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) weights[k][n][half] = given[(k * 2 * G + n) * 64 + half];
    }
    float h[2][4], c[2][4], w_p[2][2], b_p = 0;
    me.load(h, me.state(a, 0));
    if (LSTM) me.load(c, me.state(a, 1));
    Gate gate[2];
    bool before[2];  // whether the row updated in the step before
    if (SKIPS) {
        b_p = a.b_p[me.run];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) w_p[n][j] = a.w_p[me.run * W + me.column + 8 * n + j];
#pragma unroll
        for (int i = 0; i < 2; i++)
            gate[i] = {a.gate[(i64)2 * me.run * a.B + me.safe[i]], a.gate[(i64)(2 * me.run + 1) * a.B + me.safe[i]]};
    }
    Inputs inputs(me);
    inputs.fetch(a, me, 0);
    float draw[2] = {1, 1};
    if (POLICY == RANDOM_STEPS)
#pragma unroll
        for (int i = 0; i < 2; i++) draw[i] = a.draw[me.sequence[i] * a.T];

    float draws[2][4] = {};
    if (POLICY == RANDOM_NEURONS) me.load_step(draws, a.draw, a.T, 0);
    Coordinator coordinator(a, me);
    if (SELECTS) coordinator.fetch(a, me, 0);

    // What follows from step t for the gate, once all warps have written their part of its logit.
    auto follow = [&](int t) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float logit = b_p;
#pragma unroll
            for (int w = 0; w < KT; w++) logit += logits[t & 1][me.g + 8 * i][w];
            float proposed = sigmoid(logit);
            if (SAVE && me.writes && me.exists[i]) {
                float* kept = a.kept_gate + ((i64)me.run * a.T + t) * 3 * a.B + me.row[i];
                kept[0] = gate[i].q, kept[a.B] = gate[i].s, kept[2 * a.B] = proposed;
            }
            if (before[i]) gate[i] = {proposed, 0};
            else if (t < me.length[i]) gate[i].s = gate[i].accumulated();
        }
    };

    u32x4* kept = SAVE ? me.kept(a, 0) : nullptr;
    u32x4* read = SAVE ? me.destination<1>(a.read, a, 0) : nullptr;
    u32x4* reset_read = SAVE && !LSTM ? me.destination<1>(a.reset, a, 0) : nullptr;
    const i64 first[2] = {me.sequence[0] * a.T * H + me.column, me.sequence[1] * a.T * H + me.column};
    float* output[2] = {a.output + first[0], a.output + first[1]};
    float* neurons[2] = {a.updates + first[0], a.updates + first[1]};
    for (int t = 0; t < a.T; t++) {
        u16* now = rows[LSTM ? t & 1 : 0];
        inputs.write(now, h, me);
        if (LSTM) inputs.fetch(a, me, t + 1);
        barrier();
        bool on[2];
        if (SKIPS && t) follow(t - 1);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            on[i] = t < me.length[i];
            if (POLICY == RANDOM_STEPS) on[i] = on[i] && draw[i] > 0.5f;
            if (SKIPS) on[i] = on[i] && !(gate[i].accumulated() <= 0.5f);  // what is nan shows
            before[i] = on[i];
            if (!NEURONS && me.writes && me.exists[i]) a.updates[me.sequence[i] * a.T + t] = on[i];
            if (POLICY == RANDOM_STEPS && t + 1 < a.T) draw[i] = a.draw[me.sequence[i] * a.T + t + 1];
        }
        u32 bits = 0;
        if (NEURONS) {
            float update[2][4];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float value = SELECTS ? coordinator.value(h[n][e], n, e) : draws[n][e];
                    bool updates = on[e >> 1] && !(value <= 0.5f);  // what is nan shows
                    bits |= (u32)updates << (4 * n + e);
                    if (SELECTS) bits |= (u32)(on[e >> 1] && value >= 0 && value <= 1) << (8 + 4 * n + e);
                    update[n][e] = updates;
                }
            me.store_step(update, neurons);
            if (POLICY == RANDOM_NEURONS && t + 1 < a.T) me.load_step(draws, a.draw, a.T, t + 1);
            if (SELECTS && t + 1 < a.T) coordinator.fetch(a, me, t + 1);
        }
        auto updates = [&](int n, int e) { return NEURONS ? (bool)(bits >> (4 * n + e) & 1) : on[e >> 1]; };
        float pre[2 * LEFT][4] = {};
#pragma unroll
        for (int k = 0; k < KT; k++) {
            u32 fragment[4];
            me.fragments(fragment, now, READ, k);
#pragma unroll
            for (int n = 0; n < 2 * LEFT; n++) mma(pre[n], fragment, weights[k][n][0], weights[k][n][1]);
        }
        if (SAVE) me.copy<1>(read, now, READ, 1, a.B);
        if (SAVE && NEURONS) kept[KEPT_BITS * THREADS] = {bits, 0, 0, 0};
        if (SAVE && KEEPS_H) {
            u32x4 packed;
#pragma unroll
            for (int k = 0; k < 4; k++) packed.at[k] = pack_half(h[k >> 1][2 * (k & 1)], h[k >> 1][2 * (k & 1) + 1]);
            kept[KEPT_H * THREADS] = packed;
        }
        float logit[2] = {0, 0}, gates[G][2][4];
        if (LSTM) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                if (SAVE) *reinterpret_cast<f32x4*>(kept + (KEPT_C + n) * THREADS) = {c[n][0], c[n][1], c[n][2], c[n][3]};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float of_step[4] = {pre[n][e], pre[2 + n][e], pre[4 + n][e], pre[2 * (G - 1) + n][e]};
                    lstm_gates(of_step);
                    float i = of_step[0], j = of_step[1], f = of_step[2], o = of_step[3];
                    float c_new = c[n][e] * f + i * j, h_new = tanh_of(c_new) * o;
                    gates[0][n][e] = i, gates[1][n][e] = j, gates[2][n][e] = f, gates[G - 1][n][e] = o;
                    if (SKIPS) logit[e >> 1] += c_new * w_p[n][e & 1];
                    if (updates(n, e)) c[n][e] = c_new, h[n][e] = h_new;
                }
            }
        } else {
            float reset[2][4];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    gates[0][n][e] = sigmoid(pre[n][e]), gates[1][n][e] = sigmoid(pre[2 + n][e]);
                    reset[n][e] = gates[0][n][e] * h[n][e];
                }
            inputs.write(rows[1], reset, me);
            inputs.fetch(a, me, t + 1);
            barrier();
            float candidate[2][4] = {};
#pragma unroll
            for (int k = 0; k < KT; k++) {
                u32 fragment[4];
                me.fragments(fragment, rows[1], READ, k);
#pragma unroll
                for (int n = 0; n < 2; n++) mma(candidate[n], fragment, weights[k][4 + n][0], weights[k][4 + n][1]);
            }
            if (SAVE) me.copy<1>(reset_read, rows[1], READ, 1, a.B);
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float z = gates[1][n][e], value = tanh_of(candidate[n][e]), h_new = z * h[n][e] + (1 - z) * value;
                    gates[2][n][e] = value;
                    if (SKIPS) logit[e >> 1] += h_new * w_p[n][e & 1];
                    if (updates(n, e)) h[n][e] = h_new;
                }
        }
        if (SAVE)
#pragma unroll
            for (int gate = 0; gate < G; gate++) {
                u32x4 packed;
#pragma unroll
                for (int k = 0; k < 4; k++)
                    packed.at[k] = pack_half(gates[gate][k >> 1][2 * (k & 1)], gates[gate][k >> 1][2 * (k & 1) + 1]);
                kept[gate * THREADS] = packed;
            }
        if (SKIPS)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float part = row_sum(logit[i]);
                if (me.quad == 0) logits[t & 1][me.g + 8 * i][me.warp] = part;
            }
        me.store_step(h, output);
        kept += (i64)gridDim.x * KEPT * THREADS;
        read += (i64)a.B * (W / 8);
        reset_read += (i64)a.B * (W / 8);
        output[0] += H, output[1] += H;
        if (NEURONS) neurons[0] += H, neurons[1] += H;
    }
    me.store(h, me.state(a, 0));
    if (LSTM) me.store(c, me.state(a, 1));
    if (SKIPS) {
        barrier();
        follow(a.T - 1);
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (me.writes && me.exists[i]) {
                a.gate[(i64)2 * me.run * a.B + me.row[i]] = gate[i].q;
                a.gate[(i64)(2 * me.run + 1) * a.B + me.row[i]] = gate[i].s;
            }
    }
}

// Gradients do not fit fp16's range: those of a row are multiplied by a power of 2 that brings the largest gradient of
// its state and gate, two steps before, to about 1: they may grow by 2^16, and what is lost is 2^-25 of the largest.
__device__ __forceinline__ float scale_of(float largest) {
    if (!(largest > 1e-30f && largest < 1e30f)) return 1024.f;
    return __uint_as_float((254u << 23) - (__float_as_uint(largest) & 0x7f800000u));
}
__device__ __forceinline__ float inverse(float power_of_2) { return __uint_as_float((254u << 23) - __float_as_uint(power_of_2)); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward(const Arguments a) {
    __shared__ __align__(16) u16 rows[2][ROWS * PRE];
    __shared__ float worths[2][ROWS][KT], largests[2][ROWS][KT], undo[2][ROWS];
    const Lane me(a);
    u32 weights[G * KT][2][2];
    {
        const u32* given = a.weights + ((i64)me.run * KT + me.warp) * G * KT * 2 * 64 + 2 * me.lane;
#pragma unroll
        for (int k = 0; k < G * KT; k++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) weights[k][n][half] = given[(k * 2 + n) * 64 + half];
    }
    float D_h[2][4], D_c[2][4] = {}, w_p[2][2], d_w_p[2][2] = {}, d_b_p = 0;
    me.load(D_h, me.state(a, 0));
    if (LSTM) me.load(D_c, me.state(a, 1));
    float Q[2] = {0, 0}, S[2] = {0, 0};  // gradients of q and s
    if (SKIPS) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) w_p[n][j] = a.w_p[me.run * W + me.column + 8 * n + j];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Q[i] = a.gate[(i64)2 * me.run * a.B + me.safe[i]];
            S[i] = a.gate[(i64)(2 * me.run + 1) * a.B + me.safe[i]];
        }
    }
    // Each warp's part of the largest gradient of a row's state after step t.
    auto measure = [&](int slot) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float largest = SKIPS ? fmaxf(fabsf(Q[i]), fabsf(S[i])) : 0.f;
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    largest = fmaxf(largest, fmaxf(fabsf(D_h[n][2 * i + j]), fabsf(D_c[n][2 * i + j])));
            largest = row_max(largest);
            if (me.quad == 0) largests[slot][me.g + 8 * i][me.warp] = largest;
        }
    };
    float scale[2];
    auto rescale = [&](int slot) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float largest = 0;
#pragma unroll
            for (int w = 0; w < KT; w++) largest = fmaxf(largest, largests[slot][me.g + 8 * i][w]);
            scale[i] = scale_of(largest);
        }
    };
    measure(a.T & 1);
    barrier();
    rescale(a.T & 1);

    // What a step needs is fetched while the products of the one after it run.
    u32x4 gates[G], kept_h;
    u32 bits = 0;
    float d_neurons[2][4] = {};
    Coordinator coordinator(a, me);
    f32x4 kept_c[2];
    float updated[2], q[2], s[2], proposed[2], given[2] = {0, 0};
    auto fetch = [&](int t) {
        const u32x4* kept = me.kept(a, t);
#pragma unroll
        for (int gate = 0; gate < G; gate++) gates[gate] = kept[gate * THREADS];
        if (LSTM)
#pragma unroll
            for (int n = 0; n < 2; n++) kept_c[n] = *reinterpret_cast<const f32x4*>(kept + (KEPT_C + n) * THREADS);
        if (KEEPS_H) kept_h = kept[KEPT_H * THREADS];
        if (NEURONS) bits = kept[KEPT_BITS * THREADS].at[0];
        if (SELECTS && a.d_updates) me.load_step(d_neurons, a.d_updates, a.T, t);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!NEURONS) updated[i] = a.updates[me.sequence[i] * a.T + t];
            if (SKIPS) {
                const float* of_gate = a.kept_gate + ((i64)me.run * a.T + t) * 3 * a.B + me.safe[i];
                q[i] = of_gate[0], s[i] = of_gate[a.B], proposed[i] = of_gate[2 * a.B];
                if (a.d_updates) given[i] = a.d_updates[me.sequence[i] * a.T + t];
            }
        }
    };
    fetch(a.T - 1);

    u32x4* d_pre = me.destination<BLOCKS>(a.d_pre, a, a.T - 1);
    for (int t = a.T - 1; t >= 0; t--) {
        const int slot = t & 1;
        u16* now = rows[slot];
        if (D_OUTPUT) {  // may be large where the state's gradient has all but vanished
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int column = me.column + 8 * n + (e & 1);
                    if (me.exists[e >> 1] && column < H)
                        D_h[n][e] += a.d_output[(me.sequence[e >> 1] * a.T + t) * H + column];
                }
            measure(slot);
            barrier();
            rescale(slot);
        }
        bool on[2], valid[2];
        float d_logit[2] = {0, 0}, worth[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            valid[i] = t < me.length[i];
            on[i] = me.exists[i] && (NEURONS || updated[i] > 0.5f);
            if (SKIPS && on[i]) d_logit[i] = Q[i] * proposed[i] * (1 - proposed[i]);
            d_b_p += d_logit[i];
        }
        const float factor[2] = {scale[0], scale[1]}, unscale[2] = {inverse(scale[0]), inverse(scale[1])};
        auto write = [&](int gate, int n, const float (&d)[4]) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 packed = pack_half(d[2 * i] * factor[i], d[2 * i + 1] * factor[i]);
                *reinterpret_cast<u32*>(now + (me.g + 8 * i) * PRE + gate * W + me.column + 8 * n) = packed;
            }
        };
        float h[2][4], r[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float d[BLOCKS][4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = e >> 1;
                const bool u = NEURONS ? (bool)(bits >> (4 * n + e) & 1) : on[i];
                float E_h = u ? D_h[n][e] : 0.f, E_c = u ? D_c[n][e] : 0.f;  // to the candidate
                float of_update = SELECTS ? d_neurons[n][e] : 0.f;
                if (KEEPS_H) h[n][e] = half_at(kept_h, n, e);
                if (LSTM) {
                    float gi = half_at(gates[0], n, e), gj = half_at(gates[1], n, e), gf = half_at(gates[2], n, e);
                    float go = half_at(gates[G - 1], n, e), c = kept_c[n].at[e];
                    float c_new = c * gf + gi * gj, tanh_c = tanh_of(c_new);
                    if (SKIPS) {
                        worth[i] += D_h[n][e] * (tanh_c * go - h[n][e]) + D_c[n][e] * (c_new - c);
                        E_c += d_logit[i] * w_p[n][e & 1];
                        d_w_p[n][e & 1] += d_logit[i] * c_new;
                    }
                    if (SELECTS) of_update += D_h[n][e] * (tanh_c * go - h[n][e]) + D_c[n][e] * (c_new - c);
                    E_c += E_h * go * (1 - tanh_c * tanh_c);
                    d[0][e] = E_c * gj * gi * (1 - gi);
                    d[1][e] = E_c * gi * (1 - gj * gj);
                    d[2][e] = E_c * c * gf * (1 - gf);
                    d[G - 1][e] = E_h * tanh_c * go * (1 - go);
                    D_c[n][e] = u ? E_c * gf : D_c[n][e];
                    D_h[n][e] = u ? 0.f : D_h[n][e];
                } else {
                    float z = half_at(gates[1], n, e), value = half_at(gates[2], n, e);
                    r[n][e] = half_at(gates[0], n, e);
                    if (SKIPS) {
                        float h_new = z * h[n][e] + (1 - z) * value;
                        worth[i] += D_h[n][e] * (h_new - h[n][e]);
                        E_h += d_logit[i] * w_p[n][e & 1];
                        d_w_p[n][e & 1] += d_logit[i] * h_new;
                    }
                    if (SELECTS) of_update += D_h[n][e] * (z * h[n][e] + (1 - z) * value - h[n][e]);
                    d[1][e] = E_h * (h[n][e] - value) * z * (1 - z);
                    d[2][e] = E_h * (1 - z) * (1 - value * value);
                    D_h[n][e] = u ? E_h * z : D_h[n][e];
                }
                if (SELECTS) {
                    d[BLOCKS - 1][e] = bits >> (8 + 4 * n + e) & 1 ? of_update * coordinator.slope / 2 : 0.f;
                    D_h[n][e] += d[BLOCKS - 1][e] * coordinator.w_u[n][e & 1];
                }
            }
#pragma unroll
            for (int gate = LSTM ? 0 : 1; gate < BLOCKS; gate++) write(gate, n, d[gate]);
        }
        if (me.writes)
#pragma unroll
            for (int i = 0; i < 2; i++) undo[slot][me.g + 8 * i] = unscale[i];
        if (SKIPS)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float part = row_sum(worth[i]);
                if (me.quad == 0) worths[slot][me.g + 8 * i][me.warp] = part;
            }
        barrier();
        if (SKIPS)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float d_u = given[i] - S[i] * Gate{q[i], s[i]}.accumulated() + Q[i] * (proposed[i] - q[i]);
#pragma unroll
                for (int w = 0; w < KT; w++) d_u += worths[slot][me.g + 8 * i][w];
                float room = 1 - s[i], share = q[i] < room ? 1.f : q[i] == room ? 0.5f : 0.f;
                float d_accumulated = (d_u + (on[i] ? 0.f : S[i])) * share;
                if (valid[i]) Q[i] = (on[i] ? 0.f : Q[i]) + d_accumulated, S[i] = d_accumulated;
            }
        if (t < a.T - 1 && !D_OUTPUT) rescale((t + 1) & 1);  // for the next step, from the gradients that the last one left
        if (t) fetch(t - 1);
        if (!LSTM) {
            float d_reset[2][4] = {};
#pragma unroll
            for (int k = 0; k < KT; k++) {
                u32 fragment[4];
                me.fragments(fragment, now, PRE, (G - 1) * KT + k);
#pragma unroll
                for (int n = 0; n < 2; n++) mma(d_reset[n], fragment, weights[(G - 1) * KT + k][n][0], weights[(G - 1) * KT + k][n][1]);
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float d_r[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float value = d_reset[n][e] * unscale[e >> 1];
                    d_r[e] = value * h[n][e] * r[n][e] * (1 - r[n][e]);
                    D_h[n][e] += value * r[n][e];
                }
                write(0, n, d_r);
            }
            barrier();
        }
        float total[2][2][4] = {};  // in two sums, for a product waits for the one before it
#pragma unroll
        for (int k = 0; k < LEFT * KT; k++) {
            u32 fragment[4];
            me.fragments(fragment, now, PRE, k);
#pragma unroll
            for (int n = 0; n < 2; n++) mma(total[k & 1][n], fragment, weights[k][n][0], weights[k][n][1]);
        }
        me.copy<BLOCKS>(d_pre, now, PRE, undo[slot][me.copied], a.B);
        d_pre -= (i64)a.B * BLOCKS * (W / 8);
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                D_h[n][e] += (total[0][n][e] + total[1][n][e]) * unscale[e >> 1];
        if (!me.full)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (me.column + 8 * n + (e & 1) >= H) D_h[n][e] = 0;  // x's, which is no part of the scale
        if (!D_OUTPUT) measure(slot);
    }
    me.store(D_h, me.state(a, 0));
    if (LSTM) me.store(D_c, me.state(a, 1));
    if (SKIPS) {
        const i64 tile = (i64)me.run * gridDim.x + me.tile;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float sum = d_w_p[n][j];
#pragma unroll
                for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
                if (me.g == 0) a.d_w_p[tile * W + me.column + 8 * n + j] = sum;
            }
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) d_b_p += shuffle_xor(d_b_p, mask);
        if (threadIdx.x == 0) a.d_b_p[tile] = d_b_p;
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (me.writes && me.exists[i]) {
                a.gate[(i64)2 * me.run * a.B + me.row[i]] = Q[i];
                a.gate[(i64)(2 * me.run + 1) * a.B + me.row[i]] = S[i];
            }
    }
}
