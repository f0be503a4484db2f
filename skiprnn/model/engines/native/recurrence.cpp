// The plain C interface: forward and backward of a recurrence, the batch split between threads that share nothing.
#include <atomic>
#include <memory>
#include <thread>

#include "backward.h"

namespace skiprnn {

// Numbers below the normal range become 0 while this lives: fading gradients reach them, and the processor is slow there.
class FlushDenormals {
public:
#if defined(__x86_64__)
    FlushDenormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__)
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t(1) << 24)));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

private:
    uint64_t before_;
#endif
};

constexpr int64_t kRows = 64;  // of a worker: few enough that all it touches in a round stays in the cache

// Workers over equal shares of the rows, run by the threads as they come free; the workers, for what they summed.
template <class Worker, class T>
std::vector<std::unique_ptr<Worker>> split_batch(const Problem<T>& problem) {
    const int64_t B = problem.B, count = std::max<int64_t>(1, std::min(problem.raw.threads, B));
    const int64_t shares = std::max(count, ((B + kRows - 1) / kRows + count - 1) / count * count);
    std::vector<std::unique_ptr<Worker>> workers(shares);
    std::atomic<int64_t> next{0};
    auto work = [&] {
        const FlushDenormals flush;
        for (int64_t w = next++; w < shares; w = next++) {
            workers[w] = std::make_unique<Worker>(problem, B * w / shares, B * (w + 1) / shares);
            workers[w]->run();
        }
    };
    std::vector<std::thread> threads;
    for (int64_t t = 1; t < count; ++t) threads.emplace_back(work);
    work();
    for (auto& thread : threads) thread.join();
    return workers;
}

template <class T>
void forward(const SkiprnnProblem& raw) {
    Problem<T> problem(raw);
    for (auto& layer : problem.layers) layer.pack_forward(raw.projected && &layer == &problem.layers[0], problem.B == 1);
    split_batch<Forward<T>>(problem);
}

// The sum over the threads, from blocks of P columns to blocks of H rows: weight (G*H, I) from (I, G*P).
template <class T>
void unpack(const std::vector<const T*>& sums, int I, int columns, const Layer<T>& layer, int block, int blocks, T* to) {
    for (int g = 0; g < blocks; ++g)
        for (int u = 0; u < layer.H; ++u)
            for (int i = 0; i < I; ++i) {
                T total = 0;
                for (const T* part : sums) total += part[int64_t(i) * columns + (block + g) * layer.P + u];
                to[int64_t(g * layer.H + u) * I + i] = total;
            }
}

template <class T>
void backward(const SkiprnnProblem& raw) {
    Problem<T> problem(raw);
    const int L = int(problem.layers.size());
    for (int l = 0; l < L; ++l) {
        problem.layers[l].pack_forward(l == 0 && raw.projected);
        problem.layers[l].pack_backward(l > 0 || raw.d_x);
    }
    const auto workers = split_batch<Backward<T>>(problem);
    for (int l = 0; l < L; ++l) {
        const auto& layer = problem.layers[l];
        const auto& out = raw.layer[l];
        auto sums = [&](auto member) {
            std::vector<const T*> parts;
            for (const auto& worker : workers) parts.push_back(worker->gradients[l].*member);
            return parts;
        };
        using Sums = LayerGradients<T>;
        auto to = [](void* p) { return static_cast<T*>(p); };
        const bool projected = l == 0 && raw.projected;  // then the input's weights are not the engine's
        if (!projected) unpack<T>(sums(&Sums::weight_ih), layer.I, layer.X, layer, 0, layer.G, to(out.d_weight_ih));
        unpack<T>(sums(&Sums::weight_hh), layer.H, layer.G * layer.P, layer, 0, layer.G, to(out.d_weight_hh));
        unpack<T>(sums(&Sums::bias), 1, layer.X, layer, 0, layer.G, to(out.d_bias));
        if (raw.alike) {
            unpack<T>(sums(&Sums::h0), 1, layer.P, layer, 0, 1, to(out.d_h0));
            if (problem.lstm) unpack<T>(sums(&Sums::c0), 1, layer.P, layer, 0, 1, to(out.d_c0));
        }
        if (problem.policy != Policy::kSelective) continue;
        if (!projected) unpack<T>(sums(&Sums::weight_ih), layer.I, layer.X, layer, layer.G, 1, to(out.d_gate_input));
        unpack<T>(sums(&Sums::bias), 1, layer.X, layer, layer.G, 1, to(out.d_gate_bias));
        unpack<T>(sums(&Sums::gate_state), 1, layer.P, layer, 0, 1, to(out.d_gate_state));
    }
    if (problem.policy != Policy::kSkip) return;
    T* d_weight = static_cast<T*>(raw.d_policy_weight);
    T* d_bias = static_cast<T*>(raw.d_policy_bias);
    std::fill(d_weight, d_weight + problem.top().H, T(0));
    *d_bias = 0;
    for (const auto& worker : workers) {
        for (int n = 0; n < problem.top().H; ++n) d_weight[n] += worker->d_weight[n];
        *d_bias += worker->d_bias;
    }
    if (!raw.alike) return;
    T *d_q0 = static_cast<T*>(raw.d_q0), *d_s0 = static_cast<T*>(raw.d_s0);
    *d_q0 = *d_s0 = 0;
    for (const auto& worker : workers) *d_q0 += worker->d_q0, *d_s0 += worker->d_s0;
}

}  // namespace skiprnn

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void skiprnn_forward_float32(const SkiprnnProblem* problem) { skiprnn::forward<float>(*problem); }
EXPORT void skiprnn_forward_float64(const SkiprnnProblem* problem) { skiprnn::forward<double>(*problem); }
EXPORT void skiprnn_backward_float32(const SkiprnnProblem* problem) { skiprnn::backward<float>(*problem); }
EXPORT void skiprnn_backward_float64(const SkiprnnProblem* problem) { skiprnn::backward<double>(*problem); }
