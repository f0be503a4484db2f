// The gradient of the recurrence over some rows of the batch, from each row's last update to its first.
//
// At a skipped step the state passes through, but the decision has a gradient (u = 0, a = s + min(q, 1 - s) = s + q):
//     du = <C, c~ - c> + <H, h~ - h> + Q (p~ - q) - S a + dU;   S <- du + S;   Q <- Q + S
// so its candidates are needed after all; their product with h is the one saved for the row's next update.
#pragma once
#include "forward.h"

namespace skiprnn {

template <class T>
struct LayerGradients {
    // sums over this thread's rows: (I, X), (H, G*P), (X), (P); where rows begin alike, (P) and (P)
    Buffer<T> weight_ih, weight_hh, bias, gate_state, h0, c0;

    LayerGradients(const Layer<T>& layer, bool projected)
        : weight_ih(projected ? 0 : size_t(layer.I) * layer.X), weight_hh(size_t(layer.H) * layer.G * layer.P), bias(layer.X),
          gate_state(layer.P), h0(layer.P), c0(layer.P) {
        weight_ih.zero(), weight_hh.zero(), bias.zero(), gate_state.zero(), h0.zero(), c0.zero();
    }
};

template <class T>
class Backward {
public:
    std::vector<LayerGradients<T>> gradients;
    Buffer<T> d_weight;  // of w_p
    T d_bias = 0;        // of b_p
    T d_q0 = 0, d_s0 = 0;  // where rows begin alike

    Backward(const Problem<T>& problem, int64_t first, int64_t last)
        : d_weight(problem.top().P), p(problem), first_(first), rows_(int(last - first)), L(int(p.layers.size())),
          weight_(policy_weight(p)), common_(common_steps(p, first, rows_)), times_(rows_), ends_(rows_), order_(rows_),
          Q_(rows_), S_(rows_) {
        d_weight.zero();
        for (int l = 0; l < L; ++l) {
            const auto& layer = p.layers[l];
            gradients.emplace_back(layer, l == 0 && p.raw.projected);
            work_.emplace_back();
            auto& w = work_.back();
            w.H.allocate(size_t(rows_) * layer.P);
            w.C.allocate(size_t(rows_) * layer.P);
            w.tail.allocate(p.policy == Policy::kSkip ? size_t(rows_) * layer.R : 0);
            w.gathered.allocate(p.policy == Policy::kSkip ? size_t(rows_) * layer.P : 0);
            w.xin.allocate(size_t(std::max(rows_, kItems)) * layer.X);
            w.candidates.allocate(size_t(kItems) * 2 * layer.P);
            w.scratch.allocate(kItems, layer.P, p.lstm);
            w.capacity = std::max(rows_, kItems);
            w.h.allocate(size_t(w.capacity) * layer.P);
            w.below.allocate(size_t(w.capacity) * width_below(l));
            w.dg.allocate(size_t(w.capacity) * layer.X);
            w.rh.allocate(p.lstm ? 0 : size_t(w.capacity) * layer.P);
            w.drh.allocate(p.lstm ? 0 : size_t(rows_) * layer.P);
            w.kept.allocate(p.neurons ? size_t(rows_) * 2 * layer.P : 0);
        }
        x_.allocate(size_t(kItems) * p.layers[0].I);
        u_.allocate(p.top().P);
        u_.zero();
        if (p.raw.d_x) dx_.allocate(size_t(rows_) * padded(p.layers[0].I));
        find_updates();
    }

    void run() {
        for (int64_t k = rows_ ? int64_t(times_[order_[0]].size()) : -1; k >= 0; --k) {
            const int newcomers = end_;
            while (end_ < rows_ && updates(end_) >= k) start(end_++);
            if (p.policy == Policy::kSkip) product_of_tail(newcomers, end_, k);
            pass_skipped(k);
            for (int i = begin_; i < end_; ++i)
                if (follows_[order_[i]] == k) merge_into_leader(i);
            if (k) update(k - 1);
        }
        for (int l = 0; l < L; ++l) add_to_weights(l);
        for (int i = begin_; i < rows_; ++i) finish(i);
    }

private:
    static constexpr int kItems = 64;  // candidates of skipped steps computed together; updates that meet the weights so
    struct Work {
        Buffer<T> H, C;      // gradients of the states, rows in order_
        Buffer<T> tail;      // z of rows that skip after their last update
        Buffer<T> gathered;  // rows of h
        Buffer<T> xin, drh, candidates;
        Buffer<T> kept;  // gradients of neurons that did not update
        Candidates<T> scratch;
        // Of updates whose weights' gradients are not summed yet, and of the one at work, whose rows begin at `held`:
        // h before, the input, the gates' gradients, r * h.
        Buffer<T> h, below, dg, rh;
        int held = 0, capacity = 0;
    };
    struct Step {  // a skipped step of row order_[i]
        int i, candidate;
        int64_t t;
    };

    const Problem<T>& p;
    const int64_t first_;
    const int rows_, L;
    Buffer<T> weight_;
    const Common common_;
    std::vector<std::vector<int32_t>> times_;  // of each row's updates
    std::vector<int64_t> ends_;                // of each row's steps; where its gate became NaN, the first of those
    std::vector<int64_t> follows_;             // so many updates of each row are the leader's; -1: it is no follower
    std::vector<int> order_;                   // rows by falling number of updates; then come the gradients of H, C, Q, S
    int begin_ = 0, end_ = 0;                  // of order_: those that take part; before them, those merged
    std::vector<T> Q_, S_;
    std::vector<Work> work_;
    Buffer<T> x_, dx_;
    Buffer<T> u_;  // of one row's neurons
    std::vector<Step> steps_;
    int items_ = 0;
    std::vector<int> item_row_;
    std::vector<int64_t> item_time_;
    std::vector<const T*> hp_, cp_;
    std::vector<T*> zp_, h_new_, c_new_;

    int width_below(int l) const { return l ? p.layers[l - 1].P : p.layers[0].I; }
    int64_t row(int i) const { return first_ + order_[i]; }
    int64_t time(int i, int64_t k) const { return times_[order_[i]][k]; }
    int64_t updates(int i) const { return int64_t(times_[order_[i]].size()); }
    int64_t skipped_from(int i, int64_t k) const { return k ? time(i, k - 1) + 1 : 0; }
    int64_t skipped_to(int i, int64_t k) const { return k < updates(i) ? time(i, k) : ends_[order_[i]]; }

    void find_updates() {
        for (int r = 0; r < rows_; ++r) {
            const int64_t b = first_ + r, length = p.length(b);
            const T* u = p.neurons ? nullptr : p.get(p.raw.updates) + b * p.T_;
            int64_t t = 0;
            for (; t < length && (!u || u[t] == u[t]); ++t)
                if (!u || u[t] != 0) times_[r].push_back(int32_t(t));
            ends_[r] = t;
            order_[r] = r;
        }
        const auto& leader = times_[common_.leader];
        for (int64_t steps : common_.steps)
            follows_.push_back(steps ? std::lower_bound(leader.begin(), leader.end(), steps) - leader.begin() : -1);
        std::stable_sort(order_.begin(), order_.end(),
                         [&](int a, int b) { return times_[a].size() > times_[b].size(); });
    }

    // f(row) for a row that takes part and, if it is the leader, for those merged into it.
    template <class F>
    void for_each_merged(int i, F f) const {
        f(row(i));
        for (int j = 0; order_[i] == common_.leader && j < begin_; ++j) f(row(j));
    }

    // The gradient of the output at one step joins that of the top layer's h; false if there is none.
    bool add_output(int i, int64_t t) {
        if (!p.raw.d_output) return false;
        const int H = p.top().H;
        T* to = work_[L - 1].H + size_t(i) * p.top().P;
        bool any = false;
        for_each_merged(i, [&](int64_t b) {
            const T* d = p.get(p.raw.d_output) + (b * p.T_ + t) * H;
            bool some = false;
            for (int n = 0; n < H; ++n) some |= d[n] != 0;  // without leaving early: that is not vectorised
            for (int n = 0; some && n < H; ++n) to[n] += d[n];
            any |= some;
        });
        return any;
    }

    // The gradient of the decision at one step, of a neuron's.
    T d_update(int i, int64_t t, int n = 0) const {
        if (!p.raw.d_updates) return 0;
        T sum = 0;
        for_each_merged(i, [&](int64_t b) { sum += p.get(p.raw.d_updates)[(b * p.T_ + t) * p.decisions() + n]; });
        return sum;
    }

    // A follower's earlier steps are the leader's: its gradients are added to the leader's, and it takes part no more.
    void merge_into_leader(int i) {
        const int leader = int(std::find(order_.begin(), order_.end(), common_.leader) - order_.begin());
        for (int l = 0; l < L; ++l) {
            const size_t P = p.layers[l].P;
            for (T* gradients : {(T*)work_[l].H, (T*)work_[l].C}) {
                add_scaled<T>(P, 1, gradients + i * P, gradients + leader * P);
                std::memmove(gradients + i * P, gradients + begin_ * P, P * sizeof(T));
            }
        }
        Q_[leader] += Q_[i], S_[leader] += S_[i];
        Q_[i] = Q_[begin_], S_[i] = S_[begin_];
        std::swap(order_[i], order_[begin_++]);
    }

    void start(int i) {
        const int64_t b = row(i);
        for (int l = 0; l < L; ++l) {
            const auto& layer = p.layers[l];
            auto put = [&](T* to, const void* from) {
                std::fill(to, to + layer.P, T(0));
                if (from) std::memcpy(to, p.get(from) + b * layer.H, layer.H * sizeof(T));
            };
            put(work_[l].H + size_t(i) * layer.P, layer.raw.d_h);
            put(work_[l].C + size_t(i) * layer.P, p.lstm ? layer.raw.d_c : nullptr);
        }
        Q_[i] = p.raw.d_q ? p.get(p.raw.d_q)[b] : 0;
        S_[i] = p.raw.d_s ? p.get(p.raw.d_s)[b] : 0;
        for (int64_t t = p.T_ - 1; t >= p.length(b); --t) add_output(i, t);
        if (ends_[order_[i]] < p.length(b)) become_nan(i);
    }

    // All gradients of a row whose gate became NaN, and of the weights.
    void become_nan(int i) {
        const int64_t b = row(i), end = ends_[order_[i]], steps = p.length(b) - end;
        auto fill = [](T* to, size_t count) { std::fill_n(to, count, kNaN<T>); };
        for (int l = 0; l < L; ++l) {
            auto& sums = gradients[l];
            for (Buffer<T>* sum : {&sums.weight_ih, &sums.weight_hh, &sums.bias}) fill(*sum, sum->size());
            fill(work_[l].H + size_t(i) * p.layers[l].P, p.layers[l].H);
            if (p.lstm) fill(work_[l].C + size_t(i) * p.layers[l].P, p.layers[l].H);
        }
        fill(d_weight, d_weight.size());
        d_bias = Q_[i] = S_[i] = kNaN<T>;
        if (p.raw.d_x) fill(p.get(p.raw.d_x) + (b * p.T_ + end) * p.layers[0].I, steps * p.layers[0].I);
        if (p.raw.d_projected)
            fill(p.get(p.raw.d_projected) + (p.raw.row_starts[b] + updates(i)) * p.layers[0].X, steps * p.layers[0].X);
    }

    void finish(int i) {
        const int64_t b = row(i);
        for (int l = 0; l < L; ++l) {
            const auto& layer = p.layers[l];
            auto give = [&](void* to, T* sum, const T* gradient) {
                if (p.raw.alike)
                    add_scaled<T>(layer.P, 1, gradient, sum);
                else
                    std::memcpy(p.get(to) + b * layer.H, gradient, layer.H * sizeof(T));
            };
            give(layer.raw.d_h0, gradients[l].h0, work_[l].H + size_t(i) * layer.P);
            if (p.lstm) give(layer.raw.d_c0, gradients[l].c0, work_[l].C + size_t(i) * layer.P);
        }
        if (p.raw.alike)
            d_q0 += Q_[i], d_s0 += S_[i];
        else if (p.policy == Policy::kSkip)
            p.get(p.raw.d_q0)[b] = Q_[i], p.get(p.raw.d_s0)[b] = S_[i];
    }

    // Rows that skip after their last update have no saved z: compute it.
    void product_of_tail(int from, int to, int64_t k) {
        if (from == to) return;
        for (int l = 0; l < L; ++l) {
            const auto& layer = p.layers[l];
            auto& w = work_[l];
            const int P = layer.P;
            for (int i = from; i < to; ++i)
                std::memcpy(w.gathered + size_t(i - from) * P, p.saved_h(l, k, row(i)), P * sizeof(T));
            multiply<T>(to - from, w.gathered, P, layer.recurrent, w.tail + size_t(from) * layer.R, layer.R,
                        Start::kZero);
        }
    }

    // The steps that the rows skipped just before their update number k, last first.
    void pass_skipped(int64_t k) {
        if (p.policy != Policy::kSkip) {
            if (p.raw.d_output)
                for (int i = begin_; i < end_; ++i)
                    for (int64_t t = skipped_to(i, k) - 1; t >= skipped_from(i, k); --t) add_output(i, t);
            return;
        }
        const size_t bytes = p.layers[0].I * sizeof(T);
        for (int i = begin_; i < end_; ++i) {
            const int64_t b = row(i), from = skipped_from(i, k), to = skipped_to(i, k);
            for (int64_t t = to - 1; t >= from; --t) {
                const bool repeats = t < to - 1 && items_ && std::memcmp(p.x(b, t), p.x(b, t + 1), bytes) == 0;
                if (!repeats) {
                    if (items_ == kItems) flush(k);
                    std::memcpy(x_ + size_t(items_++) * p.layers[0].I, p.x(b, t), bytes);
                    item_row_.push_back(i);
                    item_time_.push_back(t);
                }
                steps_.push_back({i, items_ - 1, t});
            }
        }
        flush(k);
    }

    void flush(int64_t k) {
        if (!items_) return;
        skipped_candidates(k);
        T worth_of_update = 0, proposed = 0;
        int candidate = -1;
        for (const auto& step : steps_) {
            const int i = step.i;
            const int64_t b = row(i);
            if (add_output(i, step.t) || step.candidate != candidate) {
                worth_of_update = 0;
                for (int l = 0; l < L; ++l) {
                    const int P = p.layers[l].P;
                    const T* h_new = work_[l].candidates + size_t(step.candidate) * 2 * P;
                    worth_of_update += worth<T>(P, work_[l].H + size_t(i) * P, h_new, p.saved_h(l, k, b));
                    if (p.lstm)
                        worth_of_update += worth<T>(P, work_[l].C + size_t(i) * P, h_new + P, p.saved_c(l, k, b));
                }
                const int P = p.top().P;
                const T* top = work_[L - 1].candidates + size_t(step.candidate) * 2 * P + (p.lstm ? P : 0);
                proposed = propose<T>(p, weight_, top);
                candidate = step.candidate;
            }
            const T q = *p.saved_q(k, b), s0 = k ? T(0) : p.get(p.raw.s0)[p.initial(b)];
            const T accumulated = s0 + T(step.t - skipped_from(i, k) + 1) * q;
            S_[i] += worth_of_update + Q_[i] * (proposed - q) - S_[i] * accumulated + d_update(i, step.t);
            Q_[i] += S_[i];
        }
        steps_.clear(), item_row_.clear(), item_time_.clear(), items_ = 0;
    }

    // The candidates that the collected steps did not take, from slot k and each step's own input.
    void skipped_candidates(int64_t k) {
        for (int l = 0; l < L; ++l) {
            const auto& layer = p.layers[l];
            auto& w = work_[l];
            const int P = layer.P;
            zp_.clear(), hp_.clear(), cp_.clear(), h_new_.clear(), c_new_.clear();
            for (int item = 0; item < items_; ++item) {
                const int i = item_row_[item];
                const int64_t b = row(i);
                zp_.push_back(k < updates(i) ? p.saved_z(l, k, b) : w.tail + size_t(i) * layer.R);
                hp_.push_back(p.saved_h(l, k, b));
                cp_.push_back(p.lstm ? p.saved_c(l, k, b) : nullptr);
                h_new_.push_back(w.candidates + size_t(item) * 2 * P);
                c_new_.push_back(h_new_.back() + P);
            }
            const T* below = l ? work_[l - 1].candidates : x_;
            if (l == 0 && p.raw.projected)
                p.gather_projected(items_, w.xin, [&](int i) { return row(item_row_[i]) * p.T_ + item_time_[i]; });
            else
                multiply<T>(items_, below, l ? 2 * p.layers[l - 1].P : layer.I, layer.input, w.xin, layer.X,
                            Start::kBias, layer.bias);
            w.scratch.compute(layer, p.lstm, items_, w.xin, zp_.data(), hp_.data(), cp_.data(), h_new_.data(),
                              c_new_.data());
        }
    }

    // The rows' update number k.
    void update(int64_t k) {
        const int I = p.layers[0].I, m = end_ - begin_;
        for (int l = 0; l < L; ++l) {
            auto& w = work_[l];
            if (w.held + m > w.capacity) add_to_weights(l);
            for (int i = begin_, to = w.held; i < end_; ++i, ++to) {
                const T* from = l ? p.saved_h(l - 1, k + 1, row(i)) : p.x(row(i), time(i, k));
                std::memcpy(w.below + size_t(to) * width_below(l), from, width_below(l) * sizeof(T));
                std::memcpy(w.h + size_t(to) * p.layers[l].P, p.saved_h(l, k, row(i)), p.layers[l].P * sizeof(T));
            }
        }
        for (int i = begin_; i < end_; ++i) {
            add_output(i, time(i, k));
            if (p.policy == Policy::kSkip) gate(i, k);
        }
        for (int l = L - 1; l >= 0; --l) update_layer(l, m, k);
        if (p.raw.d_x) {
            const auto& layer = p.layers[0];
            const int width = padded(I);
            multiply<T>(m, work_[0].dg + size_t(work_[0].held) * layer.X, layer.X, layer.input_back, dx_, width,
                        Start::kZero);
            for (int i = 0; i < m; ++i)
                std::memcpy(p.get(p.raw.d_x) + (row(begin_ + i) * p.T_ + time(begin_ + i, k)) * I,
                            dx_ + size_t(i) * width, I * sizeof(T));
        }
        for (auto& w : work_) w.held += m;
    }

    // The held updates' share of the gradients of a layer's weights: one product of many rows, not many of few.
    void add_to_weights(int l) {
        const auto& layer = p.layers[l];
        auto& w = work_[l];
        auto& sums = gradients[l];
        const int P = layer.P, X = layer.X, R = layer.R, H = layer.H, columns = layer.G * P;
        const T one = 1;
        multiply_transposed<T>(H, R, w.held, w.h, P, w.dg, X, sums.weight_hh, columns);
        if (!p.lstm) multiply_transposed<T>(H, P, w.held, w.rh, P, w.dg + R, X, sums.weight_hh + R, columns);
        if (l || !p.raw.projected)
            multiply_transposed<T>(layer.I, X, w.held, w.below, width_below(l), w.dg, X, sums.weight_ih, X);
        multiply_transposed<T>(1, X, w.held, &one, 0, w.dg, X, sums.bias, X);
        w.held = 0;
    }

    // Skip's gate at an update (u = 1): du goes to q and s before the step, Q to what the candidate proposed.
    void gate(int i, int64_t k) {
        const int64_t b = row(i);
        const T q = *p.saved_q(k, b), s = *p.saved_s(k, b), proposed = *p.saved_q(k + 1, b);
        T du = Q_[i] * (proposed - q) - S_[i] * (s + std::min(q, 1 - s)) + d_update(i, time(i, k));
        for (int l = 0; l < L; ++l) {
            const int P = p.layers[l].P;
            du += worth<T>(P, work_[l].H + size_t(i) * P, p.saved_h(l, k + 1, b), p.saved_h(l, k, b));
            if (p.lstm) du += worth<T>(P, work_[l].C + size_t(i) * P, p.saved_c(l, k + 1, b), p.saved_c(l, k, b));
        }
        const int P = p.top().P;
        const T d = Q_[i] * proposed * (1 - proposed);
        add_scaled<T>(P, d, p.lstm ? p.saved_c(L - 1, k + 1, b) : p.saved_h(L - 1, k + 1, b), d_weight);
        add_scaled<T>(P, d, weight_, (p.lstm ? work_[L - 1].C : work_[L - 1].H) + size_t(i) * P);
        d_bias += d;
        const T to_q = q < 1 - s ? du : q > 1 - s ? 0 : du / 2;  // of min(q, 1 - s); autograd halves it at a tie
        Q_[i] = to_q;
        S_[i] = q < 1 - s ? du : du - (du - to_q);  // du directly, less what 1 - s takes back
    }

    // Gradients of one layer's update of m rows; an upper layer reads the candidate below, which the update made the
    // state below.
    void update_layer(int l, int m, int64_t k) {
        const auto& layer = p.layers[l];
        auto& w = work_[l];
        const int P = layer.P, X = layer.X;
        T* dg = w.dg + size_t(w.held) * X;
        auto step = [&](int i) { return row(begin_ + i) * p.T_ + time(begin_ + i, k); };
        const bool projected = l == 0 && p.raw.projected;
        if (p.keeps_gates()) {
            gate_gradients<Z::kGates>(l, m, k);
        } else {
            if (projected)
                p.gather_projected(m, w.xin, step);
            else
                multiply<T>(m, w.below + size_t(w.held) * width_below(l), width_below(l), layer.input, w.xin, X,
                            Start::kBias, layer.bias);
            for (int i = 0; p.neurons && i < m; ++i) split(i, k);
            gate_gradients<Z::kPart>(l, m, k);
        }
        for (int i = 0; p.neurons && i < m; ++i) join(i);
        multiply<T>(m, dg, X, layer.recurrent_back, w.H + size_t(begin_) * P, P, Start::kAccumulate);
        for (int i = 0; projected && i < m; ++i)
            std::memcpy(p.get(p.raw.d_projected) + (p.raw.row_starts[row(begin_ + i)] + k) * X, dg + size_t(i) * X,
                        X * sizeof(T));
        if (l)
            multiply<T>(m, dg, X, layer.input_back, work_[l - 1].H + size_t(begin_) * width_below(l), width_below(l),
                        Start::kAccumulate);
    }

    // From the new state's gradients those of the gates, and what of them flows to the previous state without a product.
    template <Z kHolds>
    void gate_gradients(int l, int m, int64_t k) {
        const auto& layer = p.layers[l];
        auto& w = work_[l];
        const int N = layer.H, P = layer.P, X = layer.X;
        const T* h = w.h + size_t(w.held) * P;
        T *H = w.H + size_t(begin_) * P, *C = w.C + size_t(begin_) * P;
        T *dg = w.dg + size_t(w.held) * X, *rh = w.rh + size_t(w.held) * P;
        if (p.lstm) {
            for (int i = 0; i < m; ++i) {
                const int64_t b = row(begin_ + i);
                lstm_backward<T, kHolds>(N, P, w.xin + i * X, p.saved_z(l, k, b), p.saved_c(l, k, b),
                                         p.saved_c(l, k + 1, b), H + i * P, C + i * P, dg + i * X);
            }
            return;
        }
        for (int i = 0; i < m; ++i)
            gru_backward_candidate<T, kHolds>(N, P, w.xin + i * X, p.saved_z(l, k, row(begin_ + i)), h + i * P,
                                              H + i * P, dg + i * X, rh + i * P);
        multiply<T>(m, dg + 2 * P, X, layer.candidate_back, w.drh, P, Start::kZero);
        for (int i = 0; i < m; ++i) gru_backward_reset<T>(P, h + i * P, w.drh + i * P, H + i * P, dg + i * X);
    }

    // Neuron policies: of the gradients of the new state, what goes to the candidate, to the old state and to the decision;
    // of the row i of those that take part.
    void split(int i, int64_t k) {
        const auto& layer = p.top();
        auto& w = work_[0];
        const int P = layer.P, position = begin_ + i;
        const int64_t b = row(position), t = time(position, k);
        const T *xin = w.xin + size_t(i) * layer.X, *h = w.h + size_t(w.held + i) * P;
        T* z = p.saved_z(0, k, b);
        std::memcpy(u_, p.get(p.raw.updates) + (b * p.T_ + t) * layer.H, layer.H * sizeof(T));
        T *H = w.H + size_t(position) * P, *C = w.C + size_t(position) * P, *kept = w.kept + size_t(i) * 2 * P;
        const bool learned = p.policy == Policy::kSelective;
        if (learned) {
            T *h_new = w.candidates, *c_new = h_new + P, *da = w.dg + size_t(w.held + i) * layer.X + layer.G * P;
            const T *c = p.lstm ? p.saved_c(0, k, b) : nullptr, slope = T(p.raw.slope);
            if (p.lstm)
                lstm_candidate<T, Z::kPart>(layer.H, P, xin, z, c, h_new, c_new);
            else
                gru_candidate<T, Z::kPart>(layer.H, P, xin, z, z + 2 * P, h, h_new);
            std::fill(da, da + P, T(0));
            for (int n = 0; n < layer.H; ++n) {
                const T ramp = ((xin[layer.G * P + n] + layer.gate_state[n] * h[n]) * slope + 1) / 2;
                if (ramp >= 0 && ramp <= 1) {  // elsewhere the clamp passes no gradient
                    T du = H[n] * (h_new[n] - h[n]) + d_update(position, t, n);
                    if (p.lstm) du += C[n] * (c_new[n] - c[n]);
                    da[n] = du * slope / 2;
                }
                gradients[0].gate_state[n] += da[n] * h[n];
            }
        }
        choose_backward<T>(P, u_, H, kept);
        if (p.lstm) choose_backward<T>(P, u_, C, kept + P);
    }

    void join(int i) {
        const auto& layer = p.top();
        auto& w = work_[0];
        const int P = layer.P;
        T *H = w.H + size_t(begin_ + i) * P, *C = w.C + size_t(begin_ + i) * P, *kept = w.kept + size_t(i) * 2 * P;
        add_scaled<T>(P, 1, kept, H);
        if (p.lstm) add_scaled<T>(P, 1, kept + P, C);
        if (p.policy != Policy::kSelective) return;
        const T* da = w.dg + size_t(w.held + i) * layer.X + layer.G * P;
        for (int n = 0; n < layer.H; ++n) H[n] += da[n] * layer.gate_state[n];
    }
};

}  // namespace skiprnn
