// The forward recurrence over some rows of the batch. Each row runs on its own clock: the k-th round of the loop is the
// k-th update of every row that still has one, whenever that is, so skipped steps cost nothing and no lockstep is needed.
#pragma once
#include <cmath>

#include "problem.h"

namespace skiprnn {

// Candidates of one layer for m items, from rows of pointers: the previous state, z and what to write.
template <class T>
struct Candidates {
    Buffer<T> rh, zc;

    void allocate(int items, int P, bool lstm) {
        if (lstm) return;
        rh.allocate(size_t(items) * P);
        zc.allocate(size_t(items) * P);
    }

    void compute(const Layer<T>& layer, bool lstm, int m, const T* xin, T* const* z, const T* const* h,
                 const T* const* c, T* const* h_new, T* const* c_new) {
        const int H = layer.H, P = layer.P, X = layer.X;
        constexpr Z kPart = Z::kPart;
        if (lstm) {
            for (int r = 0; r < m; ++r) lstm_candidate<T, kPart>(H, P, xin + r * X, z[r], c[r], h_new[r], c_new[r]);
            return;
        }
        for (int r = 0; r < m; ++r) gru_reset<T, kPart>(H, P, xin + r * X, z[r], h[r], rh + r * P);
        multiply<T>(m, rh, P, layer.candidate, zc, P, Start::kZero);
        for (int r = 0; r < m; ++r) gru_candidate<T, kPart>(H, P, xin + r * X, z[r], zc + r * P, h[r], h_new[r]);
    }
};

template <class T>
inline T logistic(T x) {
    return 1 / (1 + std::exp(-x));
}

// What Skip proposes as the next q, from the last entry of the top layer's candidate.
template <class T>
inline T propose(const Problem<T>& p, const T* weight, const T* top) {
    return logistic<T>(dot<T>(p.top().P, weight, top) + p.get(p.raw.policy_bias)[0]);
}

// w_p, padded.
template <class T>
Buffer<T> policy_weight(const Problem<T>& p) {
    Buffer<T> weight(p.top().P);
    weight.zero();
    if (p.policy == Policy::kSkip) std::memcpy(weight, p.raw.policy_weight, p.top().H * sizeof(T));
    return weight;
}

template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

constexpr int64_t kMuch = 1 << 24;  // bytes of output that a cache would not keep

template <class T>
class Forward {
public:
    Forward(const Problem<T>& problem, int64_t first, int64_t last)
        : p(problem), first_(first), rows_(int(last - first)), L(int(p.layers.size())), save_(p.raw.layer[0].saved_h),
          weight_(policy_weight(p)), common_(common_steps(p, first, rows_)), time_(rows_, p.T_), q_(rows_), s_(rows_) {
        int widest = 0, widest_input = 0, P = 0;
        for (const auto& layer : p.layers) {
            widest = std::max(widest, layer.G * layer.P);
            widest_input = std::max(widest_input, layer.X);
            P = std::max(P, layer.P);
            h_.emplace_back(save_ ? 0 : size_t(rows_) * layer.P);
            c_.emplace_back(save_ ? 0 : size_t(rows_) * layer.P);
        }
        z_.allocate(size_t(rows_) * widest);
        xin_.allocate(size_t(rows_) * widest_input);
        x_.allocate(size_t(rows_) * p.layers[0].I);
        gathered_.allocate(size_t(rows_) * P);
        mixed_.allocate(size_t(rows_) * 2 * P);
        mixed_.zero();
        u_.allocate(P);
        u_.zero();
        candidates_.allocate(rows_, P, p.lstm);
    }

    void run() {
        for (int r = 0; r < rows_; ++r)
            if (common_.steps[r])
                followers_.push_back(r);
            else
                start(r);
        part(0, 0);
        for (int64_t k = 0;; ++k) {
            active_.clear();
            for (int r = 0; r < rows_; ++r)
                if (time_[r] < p.length(first_ + r)) active_.push_back(r);
            if (active_.empty()) break;
            for (size_t i = 0; !p.raw.projected && i < active_.size(); ++i) {
                const int64_t b = first_ + active_[i];
                std::memcpy(x_ + i * p.layers[0].I, p.x(b, time_[active_[i]]), p.layers[0].I * sizeof(T));
            }
            for (int l = 0; l < L; ++l) update(l, k);
            const int64_t after = time_[common_.leader] + 1;
            for (int r : active_) advance(r, k + 1);
            part(k + 1, after);
        }
    }

private:
    const Problem<T>& p;
    const int64_t first_;
    const int rows_, L;
    const bool save_;
    Buffer<T> weight_;
    std::vector<Buffer<T>> h_, c_;              // the current states; with save_, they live in the saved tensors instead
    Buffer<T> z_, xin_, x_, gathered_, mixed_;  // rows in the order of active_
    Buffer<T> u_;                               // of one row's neurons
    Candidates<T> candidates_;
    const Common common_;
    std::vector<int> followers_;  // of the leader, so far
    std::vector<int64_t> time_;   // of each row's next update; a follower's: T
    std::vector<T> q_, s_;
    std::vector<int> active_;
    std::vector<const T*> hp_, cp_;
    std::vector<T*> zp_, h_new_, c_new_;

    T* h(int l, int64_t k, int r) { return save_ ? p.saved_h(l, k, first_ + r) : h_[l] + r * p.layers[l].P; }
    T* c(int l, int64_t k, int r) {
        if (!p.lstm) return nullptr;
        return save_ ? p.saved_c(l, k, first_ + r) : c_[l] + r * p.layers[l].P;
    }

    void start(int r) {
        const int64_t b = first_ + r;
        for (int l = 0; l < L; ++l) {
            const auto& layer = p.layers[l];
            auto put = [&](T* to, const void* from) {
                std::memcpy(to, p.get(from) + p.initial(b) * layer.H, layer.H * sizeof(T));
                std::fill(to + layer.H, to + layer.P, T(0));
            };
            put(h(l, 0, r), layer.raw.h0);
            if (p.lstm) put(c(l, 0, r), layer.raw.c0);
        }
        if (p.policy == Policy::kSkip) q_[r] = p.get(p.raw.q0)[p.initial(b)], s_[r] = p.get(p.raw.s0)[p.initial(b)];
        std::memset(p.get(p.raw.updates) + b * p.T_ * p.decisions(), 0, p.T_ * p.decisions() * sizeof(T));
        wait(r, 0, 0);
    }

    // Followers whose inputs differ from the leader's before its next update go on by themselves, from the step `after`
    // its last, number k.
    void part(int64_t k, int64_t after) {
        auto leaves = [&](int r) {
            if (common_.steps[r] > time_[common_.leader]) return false;
            leave(r, k, after);
            return true;
        };
        followers_.erase(std::remove_if(followers_.begin(), followers_.end(), leaves), followers_.end());
    }

    void leave(int r, int64_t k, int64_t after) {
        const int leader = common_.leader;
        for (int l = 0; l < L; ++l) {
            std::memcpy(h(l, k, r), h(l, k, leader), p.layers[l].P * sizeof(T));
            if (p.lstm) std::memcpy(c(l, k, r), c(l, k, leader), p.layers[l].P * sizeof(T));
        }
        if (p.policy == Policy::kSkip) q_[r] = q_[leader], s_[r] = k ? T(0) : p.get(p.raw.s0)[0];
        auto copy = [&](void* tensor, int64_t width, int64_t steps) {
            const T* from = p.get(tensor) + (first_ + leader) * p.T_ * width;
            T* to = p.get(tensor) + (first_ + r) * p.T_ * width;
            std::copy(from, from + steps * width, to);
            return to + steps * width;
        };
        T* updates = copy(p.raw.updates, p.decisions(), after);
        std::fill(updates, updates + (p.T_ - after) * p.decisions(), T(0));
        copy(p.raw.output, p.top().H, std::max<int64_t>(after - 1, 0));
        wait(r, after, k);
    }

    // The time of the row's update number k, the first at or after `from`; until then its output repeats.
    void wait(int r, int64_t from, int64_t k) {
        const int64_t b = first_ + r, end = p.length(b);
        int64_t t = from;
        if (p.policy == Policy::kRandomSteps) {
            while (t < end && !(p.get(p.raw.draw)[b * p.T_ + t] > T(0.5))) ++t;
        } else if (p.policy == Policy::kSkip) {
            // repeated addition, as the reference: eq. 6 in closed form differs at exact ties
            T s = s_[r], accumulated = s + std::min(q_[r], 1 - s);
            if (t < end && accumulated != accumulated) return become_nan(r, t, k);
            for (; t < end && !(accumulated > T(0.5)); ++t) s = accumulated, accumulated = s + q_[r];  // q <= 1 - s now
            s_[r] = s;
            if (save_) *p.saved_q(k, b) = q_[r], *p.saved_s(k, b) = s_[r];
        }
        time_[r] = t;
        show(r, from, t < end ? t : p.T_, k);
        if (t == end) finish(r, k);
    }

    // The outputs from the one after update number k, at the step before `from`, up to a step.
    void show(int r, int64_t from, int64_t last, int64_t k) {
        const int64_t b = first_ + r, H = p.top().H, first = std::max<int64_t>(from - 1, 0);
        T* output = p.get(p.raw.output) + (b * p.T_ + first) * H;
        repeat<T>(h(L - 1, k, r), H, last - first, output, p.B * p.T_ * H * int64_t(sizeof(T)) >= kMuch);
    }

    // A gate that is NaN says so for good: of decisions, outputs and states from step t on.
    void become_nan(int r, int64_t t, int64_t k) {
        const int64_t b = first_ + r, H = p.top().H;
        time_[r] = p.T_;
        show(r, t, t, k);
        auto fill = [&](void* tensor, int64_t from, int64_t count) {
            std::fill_n(p.get(tensor) + from, count, kNaN<T>);
        };
        fill(p.raw.output, (b * p.T_ + t) * H, (p.T_ - t) * H);
        fill(p.raw.updates, b * p.T_ + t, p.length(b) - t);
        for (int l = 0; l < L; ++l) {
            fill(p.raw.layer[l].h, b * p.layers[l].H, p.layers[l].H);
            if (p.lstm) fill(p.raw.layer[l].c, b * p.layers[l].H, p.layers[l].H);
        }
        fill(p.raw.q, b, 1), fill(p.raw.s, b, 1);
        if (save_) *p.saved_q(k, b) = q_[r], *p.saved_s(k, b) = s_[r];
    }

    void finish(int r, int64_t k) {
        const int64_t b = first_ + r;
        for (int l = 0; l < L; ++l) {
            const auto& layer = p.layers[l];
            std::memcpy(p.get(layer.raw.h) + b * layer.H, h(l, k, r), layer.H * sizeof(T));
            if (p.lstm) std::memcpy(p.get(layer.raw.c) + b * layer.H, c(l, k, r), layer.H * sizeof(T));
        }
        if (p.policy == Policy::kSkip) p.get(p.raw.q)[b] = q_[r], p.get(p.raw.s)[b] = s_[r];
    }

    // The active rows of h, contiguous for a product; gathered if they are not.
    const T* contiguous(int l, int64_t k) {
        const int P = p.layers[l].P;
        if (int(active_.size()) == rows_) return h(l, k, 0);
        for (size_t i = 0; i < active_.size(); ++i) std::memcpy(gathered_ + i * P, h(l, k, active_[i]), P * sizeof(T));
        return gathered_;
    }

    // Update number k of the active rows in one layer.
    void update(int l, int64_t k) {
        const auto& layer = p.layers[l];
        const int m = int(active_.size()), P = layer.P, width = layer.G * P;
        const bool in_place = save_ && m == rows_;
        T* z = in_place ? p.saved_z(l, k, first_) : z_;
        zp_.clear(), hp_.clear(), cp_.clear(), h_new_.clear(), c_new_.clear();
        for (int i = 0; i < m; ++i) {
            const int r = active_[i];
            zp_.push_back(z + size_t(i) * width);
            hp_.push_back(h(l, k, r));
            cp_.push_back(c(l, k, r));
            h_new_.push_back(p.neurons ? mixed_ + size_t(i) * 2 * P : h(l, k + 1, r));
            c_new_.push_back(p.neurons ? mixed_ + size_t(i) * 2 * P + P : c(l, k + 1, r));
        }
        if (p.keeps_gates())
            whole(l, k, m, z);
        else
            in_parts(l, k, m, z);
        for (int i = 0; save_ && !in_place && i < m; ++i)
            std::memcpy(p.saved_z(l, k, first_ + active_[i]), zp_[i], width * sizeof(T));
        for (int i = 0; p.neurons && i < m; ++i) mix(l, k, i);
    }

    // The input's part of the active rows' pre-activations.
    void project(int l, int64_t k, int m, T* xin) {
        const auto& layer = p.layers[l];
        if (l == 0 && p.raw.projected)
            p.gather_projected(m, xin, [&](int i) { return (first_ + active_[i]) * p.T_ + time_[active_[i]]; });
        else
            multiply<T>(m, l ? contiguous(l - 1, k + 1) : x_, l ? p.layers[l - 1].P : layer.I, layer.input, xin,
                        layer.X, Start::kBias, layer.bias);
    }

    // Candidates, z without the input's part: backward joins it with the inputs of skipped steps as well.
    void in_parts(int l, int64_t k, int m, T* z) {
        const auto& layer = p.layers[l];
        const int P = layer.P;
        project(l, k, m, xin_);
        multiply<T>(m, contiguous(l, k), P, layer.recurrent, z, layer.G * P, Start::kZero);
        candidates_.compute(layer, p.lstm, m, xin_, zp_.data(), hp_.data(), cp_.data(), h_new_.data(), c_new_.data());
        for (int i = 0; !p.lstm && i < m; ++i) std::memcpy(zp_[i] + layer.R, candidates_.zc + i * P, P * sizeof(T));
    }

    // The same from whole pre-activations, which the gates replace in z.
    void whole(int l, int64_t k, int m, T* z) {
        const auto& layer = p.layers[l];
        const int H = layer.H, P = layer.P, R = layer.R, width = layer.G * P;
        project(l, k, m, z);
        multiply<T>(m, contiguous(l, k), P, layer.recurrent, z, width, Start::kAccumulate);
        if (p.lstm) {
            for (int i = 0; i < m; ++i) lstm_candidate<T, Z::kGates>(H, P, z, zp_[i], cp_[i], h_new_[i], c_new_[i]);
            return;
        }
        for (int i = 0; i < m; ++i) gru_reset<T, Z::kGates>(H, P, z, zp_[i], hp_[i], candidates_.rh + i * P);
        multiply<T>(m, candidates_.rh, P, layer.candidate, z + R, width, Start::kAccumulate);
        for (int i = 0; i < m; ++i) gru_candidate<T, Z::kGates>(H, P, z, zp_[i], zp_[i] + R, hp_[i], h_new_[i]);
    }

    // Which neurons of item i take their candidate.
    void mix(int l, int64_t k, int i) {
        const auto& layer = p.layers[l];
        const int r = active_[i], H = layer.H, P = layer.P;
        const int64_t step = (first_ + r) * p.T_ + time_[r];
        if (p.policy == Policy::kSelective)
            selective_decisions<T>(H, P, xin_ + size_t(i) * layer.X + layer.G * P, layer.gate_state, hp_[i],
                                   T(p.raw.slope), u_);
        else
            std::memcpy(u_, p.get(p.raw.draw) + step * H, H * sizeof(T));
        std::memcpy(p.get(p.raw.updates) + step * H, u_, H * sizeof(T));
        choose<T>(P, u_, h_new_[i], hp_[i], h(l, k + 1, r));
        if (p.lstm) choose<T>(P, u_, c_new_[i], cp_[i], c(l, k + 1, r));
    }

    // After the row's update: the gate, and when the next one is. k counts the updates so far.
    void advance(int r, int64_t k) {
        const int64_t b = first_ + r;
        if (!p.neurons) p.get(p.raw.updates)[b * p.T_ + time_[r]] = 1;
        if (p.policy == Policy::kSkip) {
            q_[r] = propose<T>(p, weight_, p.lstm ? c(L - 1, k, r) : h(L - 1, k, r));
            s_[r] = 0;
        }
        wait(r, time_[r] + 1, k);
    }
};

}  // namespace skiprnn
