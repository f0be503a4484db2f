// One row of one step: the cells' equations and their gradients. Vectors have H elements, padded to P; the padding stays 0.
//
// xin: the input's part of every gate's pre-activation, bias included; z: the recurrent part; each in blocks of P.
// dh, dc: gradients of the new state, replaced by what flows to the previous state without a matrix; dg: of the gates.
#pragma once
#include "vector.h"

namespace skiprnn {

// The blocks, in the order of the weights' rows.
enum LstmGate { kI, kJ, kF, kO };
enum GruGate { kR, kZ, kCandidate };

// What z holds.
enum class Z {
    kPart,   // the recurrent part, whose sum with xin is the pre-activation: other inputs may join the same z
    kGates,  // the whole pre-activation, which is replaced by the gates; backward finds them. xin is not read
};

template <class T, Z kHolds>
inline Vector<T> pre_activation(const T* xin, const T* z) {
    return kHolds == Z::kPart ? load<T>(xin) + load<T>(z) : load<T>(z);
}

// c~ = c sigmoid(f) + sigmoid(i) tanh(j);  h~ = tanh(c~) sigmoid(o)
template <class T, Z kHolds>
inline void lstm_candidate(int H, int P, const T* xin, T* z, const T* c, T* h_new, T* c_new) {
    for_vectors<T>(H, P, [&](int v, auto keep) {
        auto gate = [&](int g) { return keep(pre_activation<T, kHolds>(xin + g * P + v, z + g * P + v)); };
        if constexpr (kHolds == Z::kGates) {
            Vector<T> i, j, o, tanh_c;
            sigmoid_and_tanh<T>(gate(kI), gate(kJ), i, j);
            const Vector<T> f = sigmoid<T>(gate(kF)), cell = load<T>(c + v) * f + i * j;
            sigmoid_and_tanh<T>(gate(kO), cell, o, tanh_c);
            store<T>(c_new + v, cell);
            store<T>(h_new + v, tanh_c * o);
            store<T>(z + kI * P + v, i), store<T>(z + kJ * P + v, j);
            store<T>(z + kF * P + v, f), store<T>(z + kO * P + v, o);
        } else {
            const Vector<T> cell =
                times_sigmoid<T>(load<T>(c + v), gate(kF)) + sigmoid_times_tanh<T>(gate(kI), gate(kJ));
            store<T>(c_new + v, cell);
            store<T>(h_new + v, sigmoid_times_tanh<T>(gate(kO), cell));
        }
    });
}

template <class T, Z kHolds>
inline void lstm_backward(int H, int P, const T* xin, const T* z, const T* c, const T* c_new, T* dh, T* dc, T* dg) {
    for_vectors<T>(H, P, [&](int v, auto keep) {
        auto gate = [&](int g) { return keep(pre_activation<T, kHolds>(xin + g * P + v, z + g * P + v)); };
        Vector<T> i = gate(kI), j = gate(kJ), f = gate(kF), o = gate(kO), tanh_c;
        if constexpr (kHolds == Z::kGates) {
            tanh_c = tanh<T>(load<T>(c_new + v));
        } else {
            sigmoid_and_tanh<T>(i, j, i, j);
            f = sigmoid<T>(f);
            sigmoid_and_tanh<T>(o, load<T>(c + v) * f + i * j, o, tanh_c);
        }
        const Vector<T> dh_v = load<T>(dh + v);
        const Vector<T> dc_v = load<T>(dc + v) + dh_v * o * (T(1) - tanh_c * tanh_c);
        store<T>(dg + kI * P + v, dc_v * j * i * (T(1) - i));
        store<T>(dg + kJ * P + v, dc_v * i * (T(1) - j * j));
        store<T>(dg + kF * P + v, dc_v * load<T>(c + v) * f * (T(1) - f));
        store<T>(dg + kO * P + v, dh_v * tanh_c * o * (T(1) - o));
        store<T>(dc + v, dc_v * f);
        store<T>(dh + v, Vector<T>{});
    });
}

// r * h, what the candidate's product reads
template <class T, Z kHolds>
inline void gru_reset(int H, int P, const T* xin, T* z, const T* h, T* rh) {
    for_vectors<T>(H, P, [&](int v, auto keep) {
        const Vector<T> r = sigmoid<T>(keep(pre_activation<T, kHolds>(xin + kR * P + v, z + kR * P + v)));
        store<T>(rh + v, load<T>(h + v) * r);
        if (kHolds == Z::kGates) store<T>(z + kR * P + v, r);
    });
}

// h~ = z h + (1 - z) tanh(candidate), zc the candidate's part of z, from the product of r * h
template <class T, Z kHolds>
inline void gru_candidate(int H, int P, const T* xin, T* z, T* zc, const T* h, T* h_new) {
    for_vectors<T>(H, P, [&](int v, auto keep) {
        Vector<T> stay, candidate;
        sigmoid_and_tanh<T>(keep(pre_activation<T, kHolds>(xin + kZ * P + v, z + kZ * P + v)),
                            keep(pre_activation<T, kHolds>(xin + kCandidate * P + v, zc + v)), stay, candidate);
        store<T>(h_new + v, stay * load<T>(h + v) + (T(1) - stay) * candidate);
        if (kHolds == Z::kGates) store<T>(z + kZ * P + v, stay), store<T>(zc + v, candidate);
    });
}

// The gradients of z and candidate, and r * h once more; z holds the candidate's part as its third block.
template <class T, Z kHolds>
inline void gru_backward_candidate(int H, int P, const T* xin, const T* z, const T* h, T* dh, T* dg, T* rh) {
    for_vectors<T>(H, P, [&](int v, auto keep) {
        auto gate = [&](int g) { return keep(pre_activation<T, kHolds>(xin + g * P + v, z + g * P + v)); };
        Vector<T> r = gate(kR), stay = gate(kZ), candidate = gate(kCandidate);
        if constexpr (kHolds != Z::kGates) r = sigmoid<T>(r), sigmoid_and_tanh<T>(stay, candidate, stay, candidate);
        const Vector<T> h_v = load<T>(h + v), dh_v = load<T>(dh + v);
        store<T>(dg + kZ * P + v, dh_v * (h_v - candidate) * stay * (T(1) - stay));
        store<T>(dg + kCandidate * P + v, dh_v * (T(1) - stay) * (T(1) - candidate * candidate));
        store<T>(dh + v, dh_v * stay);
        store<T>(dg + kR * P + v, r);
        store<T>(rh + v, h_v * r);
    });
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

// Selective's u of each neuron from its coordinator's a without the state's share, and its h; NaN where that is
template <class T>
inline void selective_decisions(int H, int P, const T* a, const T* w, const T* h, T slope, T* u) {
    for_vectors<T>(H, P, [&](int v, auto keep) {
        const Vector<T> ramp = ((load<T>(a + v) + load<T>(w + v) * load<T>(h + v)) * slope + T(1)) / T(2);
        const Vector<T> above = ramp > T(0.5) ? Vector<T>{} + T(1) : Vector<T>{};
        store<T>(u + v, keep(ramp == ramp ? above : ramp));
    });
}

// Each neuron takes its candidate or stays; NaN where u is.
template <class T>
inline void choose(int P, const T* u, const T* candidate, const T* previous, T* to) {
    for (int v = 0; v < P; v += kLanes<T>) {
        const Vector<T> u_v = load<T>(u + v), taken = u_v == u_v ? load<T>(candidate + v) : u_v;
        store<T>(to + v, u_v == T(0) ? load<T>(previous + v) : taken);
    }
}

// Its gradient: d, of the new state, becomes the candidate's; what passes by it to the previous state is kept.
template <class T>
inline void choose_backward(int P, const T* u, T* d, T* kept) {
    for (int v = 0; v < P; v += kLanes<T>) {
        const Vector<T> u_v = load<T>(u + v), d_v = load<T>(d + v), zero = u_v == u_v ? Vector<T>{} : u_v;
        store<T>(kept + v, u_v == T(0) ? d_v : zero);
        store<T>(d + v, u_v == T(1) ? d_v : zero);
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
