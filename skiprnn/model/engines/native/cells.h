// One row of one step: the cells' equations and their gradients. P is H padded to whole vectors; the padding stays 0.
//
// xin: the input's part of every gate's pre-activation, bias included; z: the recurrent part; each in blocks of P.
// dh, dc: gradients of the new state, replaced by what flows to the previous state without a matrix; dg: of the gates.
#pragma once
#include "vector.h"

namespace skiprnn {

// What z holds.
enum class Z {
    kPart,   // the recurrent part, whose sum with xin is the pre-activation: other inputs may join the same z
    kGates,  // the whole pre-activation, which is replaced by the gates; backward finds them. xin is not read
};

template <class T, Z kZ>
inline Vector<T> pre_activation(const T* xin, const T* z) {
    return kZ == Z::kPart ? load<T>(xin) + load<T>(z) : load<T>(z);
}

// c~ = c sigmoid(f) + sigmoid(i) tanh(j);  h~ = tanh(c~) sigmoid(o);  blocks i, j, f (its bias holds the + 1), o
template <class T, Z kZ>
inline void lstm_candidate(int P, const T* xin, T* z, const T* c, T* h_new, T* c_new) {
    for (int v = 0; v < P; v += kLanes<T>) {
        auto gate = [&](int g) { return pre_activation<T, kZ>(xin + g * P + v, z + g * P + v); };
        if constexpr (kZ == Z::kGates) {
            Vector<T> i, j, o, tanh_c;
            sigmoid_and_tanh<T>(gate(0), gate(1), i, j);
            const Vector<T> f = sigmoid<T>(gate(2)), cell = load<T>(c + v) * f + i * j;
            sigmoid_and_tanh<T>(gate(3), cell, o, tanh_c);
            store<T>(c_new + v, cell);
            store<T>(h_new + v, tanh_c * o);
            store<T>(z + v, i), store<T>(z + P + v, j), store<T>(z + 2 * P + v, f), store<T>(z + 3 * P + v, o);
        } else {
            const Vector<T> cell =
                load<T>(c + v) / sigmoid_inverse<T>(gate(2)) + sigmoid_times_tanh<T>(gate(0), gate(1));
            store<T>(c_new + v, cell);
            store<T>(h_new + v, sigmoid_times_tanh<T>(gate(3), cell));
        }
    }
}

template <class T, Z kZ>
inline void lstm_backward(int P, const T* xin, const T* z, const T* c, const T* c_new, T* dh, T* dc, T* dg) {
    for (int v = 0; v < P; v += kLanes<T>) {
        auto gate = [&](int g) { return pre_activation<T, kZ>(xin + g * P + v, z + g * P + v); };
        Vector<T> i = gate(0), j = gate(1), f = gate(2), o = gate(3), tanh_c;
        if constexpr (kZ == Z::kGates) {
            tanh_c = tanh<T>(load<T>(c_new + v));
        } else {
            sigmoid_and_tanh<T>(i, j, i, j);
            f = sigmoid<T>(f);
            sigmoid_and_tanh<T>(o, load<T>(c + v) * f + i * j, o, tanh_c);
        }
        const Vector<T> dh_v = load<T>(dh + v);
        const Vector<T> dc_v = load<T>(dc + v) + dh_v * o * (T(1) - tanh_c * tanh_c);
        store<T>(dg + v, dc_v * j * i * (T(1) - i));
        store<T>(dg + P + v, dc_v * i * (T(1) - j * j));
        store<T>(dg + 2 * P + v, dc_v * load<T>(c + v) * f * (T(1) - f));
        store<T>(dg + 3 * P + v, dh_v * tanh_c * o * (T(1) - o));
        store<T>(dc + v, dc_v * f);
        store<T>(dh + v, Vector<T>{});
    }
}

// r * h, what the candidate's product reads; blocks r, z, candidate
template <class T, Z kZ>
inline void gru_reset(int P, const T* xin, T* z, const T* h, T* rh) {
    for (int v = 0; v < P; v += kLanes<T>) {
        const Vector<T> r = sigmoid<T>(pre_activation<T, kZ>(xin + v, z + v));
        store<T>(rh + v, load<T>(h + v) * r);
        if (kZ == Z::kGates) store<T>(z + v, r);
    }
}

// h~ = z h + (1 - z) tanh(candidate), zc the candidate's part of z, from the product of r * h
template <class T, Z kZ>
inline void gru_candidate(int P, const T* xin, T* z, T* zc, const T* h, T* h_new) {
    for (int v = 0; v < P; v += kLanes<T>) {
        Vector<T> keep, candidate;
        sigmoid_and_tanh<T>(pre_activation<T, kZ>(xin + P + v, z + P + v),
                            pre_activation<T, kZ>(xin + 2 * P + v, zc + v), keep, candidate);
        store<T>(h_new + v, keep * load<T>(h + v) + (T(1) - keep) * candidate);
        if (kZ == Z::kGates) store<T>(z + P + v, keep), store<T>(zc + v, candidate);
    }
}

// The gradients of z and candidate, and r * h once more; z holds the candidate's part as its third block.
template <class T, Z kZ>
inline void gru_backward_candidate(int P, const T* xin, const T* z, const T* h, T* dh, T* dg, T* rh) {
    for (int v = 0; v < P; v += kLanes<T>) {
        auto gate = [&](int g) { return pre_activation<T, kZ>(xin + g * P + v, z + g * P + v); };
        Vector<T> r = gate(0), keep = gate(1), candidate = gate(2);
        if (kZ != Z::kGates) r = sigmoid<T>(r), sigmoid_and_tanh<T>(keep, candidate, keep, candidate);
        const Vector<T> h_v = load<T>(h + v), dh_v = load<T>(dh + v);
        store<T>(dg + P + v, dh_v * (h_v - candidate) * keep * (T(1) - keep));
        store<T>(dg + 2 * P + v, dh_v * (T(1) - keep) * (T(1) - candidate * candidate));
        store<T>(dh + v, dh_v * keep);
        store<T>(dg + v, r);
        store<T>(rh + v, h_v * r);
    }
}

// The gradient of r, which dg holds, from drh, that of r * h.
template <class T>
inline void gru_backward_reset(int P, const T* h, const T* drh, T* dh, T* dg) {
    for (int v = 0; v < P; v += kLanes<T>) {
        const Vector<T> r = load<T>(dg + v), drh_v = load<T>(drh + v);
        store<T>(dg + v, drh_v * load<T>(h + v) * r * (T(1) - r));
        store<T>(dh + v, load<T>(dh + v) + drh_v * r);
    }
}

// <d, candidate - previous>: what the decision to update is worth, one state entry's share
template <class T>
inline T worth(int P, const T* d, const T* candidate, const T* previous) {
    Vector<T> total{};
    for (int v = 0; v < P; v += kLanes<T>) total += load<T>(d + v) * (load<T>(candidate + v) - load<T>(previous + v));
    return sum<T>(total);
}

template <class T>
inline T dot(int P, const T* a, const T* b) {
    Vector<T> total{};
    for (int v = 0; v < P; v += kLanes<T>) total += load<T>(a + v) * load<T>(b + v);
    return sum<T>(total);
}

// y += scale * x
template <class T>
inline void add_scaled(int P, T scale, const T* x, T* y) {
    for (int v = 0; v < P; v += kLanes<T>) store<T>(y + v, load<T>(y + v) + scale * load<T>(x + v));
}

}  // namespace skiprnn
