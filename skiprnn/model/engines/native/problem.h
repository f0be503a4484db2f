// What the engine is asked to compute: the plain C description, and the same with packed weights.
#pragma once
#include <cstdint>
#include <vector>

#include "cells.h"
#include "gemm.h"

// Mirrored field by field in operator.py. Tensors are contiguous, of one floating type; a null pointer: not asked for.
extern "C" {
struct SkiprnnLayer {
    int64_t inputs, hidden;                          // I, H
    const void *weight_ih, *weight_hh, *bias;        // (G*H, I), (G*H, H), (G*H)
    const void *gate_input, *gate_state, *gate_bias;  // Selective's W_i (H, I), w_u (H), b (H)
    const void *h0, *c0;                             // (B, H); alike: (1, H)
    void *h, *c;                                     // (B, H)
    void *saved_h, *saved_c, *saved_z;  // (T+1, B, P), (T+1, B, P), (T+1, B, G*P): before each update, by its number
    const void *d_h, *d_c;
    void *d_h0, *d_c0, *d_weight_ih, *d_weight_hh, *d_bias, *d_gate_input, *d_gate_state, *d_gate_bias;
};

struct SkiprnnProblem {
    int64_t cell, policy, batch, steps, layers, threads;  // B, T, L
    int64_t alike;                                        // all rows begin with one state; then d_x is not asked for
    double slope;                                         // Selective's
    const SkiprnnLayer* layer;                            // (L)
    const void* x;                                        // (B, T, I)
    const void* projected;  // (B, T, X): x's part of the first layer's pre-activations; null: the engine multiplies
    const void* draw;                                     // (B, T) or (B, T, H)
    const int64_t* lengths;                               // (B)
    const void *policy_weight, *policy_bias;              // Skip's w_p (H), b_p
    const void *q0, *s0;                                  // (B); alike: (1)
    void *output, *q, *s, *updates;                       // (B, T, H), (B), (B), (B, T) or (B, T, H)
    void* saved_gate;                                     // (2, T+1, B): q and s before each update
    const void *d_output, *d_q, *d_s, *d_updates;
    void* d_projected;          // (updates, X), row after row of the batch; then d_x and d_weight_ih are not asked for
    const int64_t* row_starts;  // (B): each row's first in d_projected
    void *d_x, *d_policy_weight, *d_policy_bias, *d_q0, *d_s0;
};
}

namespace skiprnn {

enum class Cell { kLstm, kGru };
enum class Policy { kAlways, kRandomSteps, kSkip, kRandomNeurons, kSelective };

inline int padded(int64_t size) { return int((size + 15) / 16 * 16); }

// One layer with its weights packed; blocks of gates are padded to P inside, H in a tensor.
template <class T>
struct Layer {
    const SkiprnnLayer& raw;
    int I, H, P;
    int G;      // gates
    int R;      // columns of the product with h: G*P, of a GRU 2*P (its candidate's product reads r * h)
    int X;      // columns of the product with x: G*P, with Selective's gate (G+1)*P
    Packed<T> input, recurrent, candidate;                 // forward
    Packed<T> input_back, recurrent_back, candidate_back;  // transposed
    Buffer<T> bias, gate_state;                            // (X), (P)

    Layer(const SkiprnnLayer& raw, bool lstm, bool selective)
        : raw(raw), I(int(raw.inputs)), H(int(raw.hidden)), P(padded(H)), G(lstm ? 4 : 3), R(lstm ? 4 * P : 2 * P),
          X((G + selective) * P), bias(X), gate_state(P), input_rows_(X), state_rows_(G * P) {
        for (int g = 0; g < G; ++g)
            for (int u = 0; u < H; ++u) {
                input_rows_[g * P + u] = get(raw.weight_ih) + int64_t(g * H + u) * I;
                state_rows_[g * P + u] = get(raw.weight_hh) + int64_t(g * H + u) * H;
            }
        for (int u = 0; selective && u < H; ++u) input_rows_[G * P + u] = get(raw.gate_input) + int64_t(u) * I;
        bias.zero();
        gate_state.zero();
        for (int g = 0; g < G; ++g)
            for (int u = 0; u < H; ++u) bias[g * P + u] = get(raw.bias)[g * H + u];
        for (int u = 0; selective && u < H; ++u) {
            bias[G * P + u] = get(raw.gate_bias)[u];
            gate_state[u] = get(raw.gate_state)[u];
        }
    }

    void pack_forward(bool projected, bool one_row = false) {
        auto pack = [&](Packed<T>& to, int size, const T* const* columns, int count) {
            one_row ? to.pack_columns_for_one_row(size, size, columns, count) : to.pack_columns(size, size, columns, count);
        };
        if (!projected) pack(input, I, input_rows_.data(), X);
        pack(recurrent, H, state_rows_.data(), R);
        if (R < G * P) pack(candidate, H, &state_rows_[R], P);
    }

    void pack_backward(bool needs_input) {
        if (needs_input) input_back.pack_rows(padded(I), I, input_rows_.data(), X);
        recurrent_back.pack_rows(P, H, state_rows_.data(), R);
        if (R < G * P) candidate_back.pack_rows(P, H, &state_rows_[R], P);
    }

    static const T* get(const void* p) { return static_cast<const T*>(p); }

private:
    std::vector<const T*> input_rows_, state_rows_;  // a tensor's row for each padded column; null for padding
};

template <class T>
struct Problem {
    const SkiprnnProblem& raw;
    int64_t B, T_;
    Policy policy;
    bool lstm, neurons;
    std::vector<Layer<T>> layers;

    explicit Problem(const SkiprnnProblem& raw)
        : raw(raw), B(raw.batch), T_(raw.steps), policy(Policy(raw.policy)), lstm(Cell(raw.cell) == Cell::kLstm),
          neurons(policy == Policy::kRandomNeurons || policy == Policy::kSelective) {
        layers.reserve(raw.layers);
        for (int l = 0; l < raw.layers; ++l) layers.emplace_back(raw.layer[l], lstm, policy == Policy::kSelective);
    }

    // Whether backward finds the gates in saved_z. Skip's needs the product with h alone, which skipped steps use as well.
    bool keeps_gates() const { return policy == Policy::kAlways || policy == Policy::kRandomSteps; }

    const Layer<T>& top() const { return layers.back(); }
    int64_t decisions() const { return neurons ? top().H : 1; }  // at each step
    int64_t length(int64_t b) const {
        return raw.lengths ? std::min(std::max<int64_t>(raw.lengths[b], 0), T_) : T_;
    }
    int64_t initial(int64_t b) const { return raw.alike ? 0 : b; }  // row b's, of h0, c0, q0 and s0
    const T* x(int64_t b, int64_t t) const { return get(raw.x) + (b * T_ + t) * layers[0].I; }
    // x's part of the first layer's pre-activations at item i's row and step, if it comes projected.
    template <class Step>
    void gather_projected(int items, T* xin, Step step) const {
        const size_t X = layers[0].X;
        for (int i = 0; i < items; ++i) std::memcpy(xin + i * X, get(raw.projected) + step(i) * X, X * sizeof(T));
    }
    T* saved_h(int l, int64_t k, int64_t b) const { return slot(raw.layer[l].saved_h, k, b, layers[l].P); }
    T* saved_c(int l, int64_t k, int64_t b) const { return slot(raw.layer[l].saved_c, k, b, layers[l].P); }
    T* saved_z(int l, int64_t k, int64_t b) const { return slot(raw.layer[l].saved_z, k, b, layers[l].G * layers[l].P); }
    T* saved_q(int64_t k, int64_t b) const { return slot(raw.saved_gate, k, b, 1); }
    T* saved_s(int64_t k, int64_t b) const { return slot(raw.saved_gate, T_ + 1 + k, b, 1); }

    static const T* get(const void* p) { return static_cast<const T*>(p); }
    static T* get(void* p) { return static_cast<T*>(p); }

private:
    T* slot(void* base, int64_t k, int64_t b, int64_t width) const { return get(base) + (k * B + b) * width; }
};

// Rows that begin alike are one computation until their inputs differ: the leader's, whose first input repeats longest
// (an image's margin, a text's padding).
struct Common {
    int leader = 0;
    std::vector<int64_t> steps;  // of each row, so many are the leader's; of the leader itself none
};

template <class T>
Common common_steps(const Problem<T>& p, int64_t first, int rows) {
    Common common;
    common.steps.resize(rows);
    const bool drawn = p.policy == Policy::kRandomSteps || p.policy == Policy::kRandomNeurons;
    const bool by_row = p.raw.projected && p.raw.layer[0].saved_h;  // d_projected has each row's own
    if (!p.raw.alike || drawn || by_row) return common;
    auto equal = [&](int r, int64_t t, int other, int64_t s) {
        return std::memcmp(p.x(first + r, t), p.x(first + other, s), p.layers[0].I * sizeof(T)) == 0;
    };
    int64_t longest = -1;
    for (int r = 0; r < rows; ++r) {
        int64_t t = 0;
        while (t < p.length(first + r) && equal(r, t, r, 0)) ++t;
        if (t > longest) longest = t, common.leader = r;
    }
    for (int r = 0; r < rows; ++r) {
        if (r == common.leader) continue;
        const int64_t end = std::min(p.length(first + r), p.length(first + common.leader));
        while (common.steps[r] < end && equal(r, common.steps[r], common.leader, common.steps[r])) ++common.steps[r];
    }
    return common;
}

}  // namespace skiprnn
