// What a thread of the engine needs: numbers flushed as everywhere else, and a helper where there is but one row.
#pragma once
#include <atomic>
#include <thread>

#include "gemm.h"

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

// A second thread for the products of a single row: they take as long as a core's cache takes to deliver the weights,
// and two cores deliver twice as fast. A product's second half is done by whoever comes first, so that nobody waits for
// a helper that the system does not run.
template <class T>
class Helper {
public:
    static constexpr size_t kWorth = 1 << 16;  // bytes of weights; fewer are in the first cache
    static constexpr int64_t kUpdates = 256;   // to come, for which starting a thread takes less time than it saves

    Helper() : thread_([this] { run(); }) {}
    Helper(const Helper&) = delete;
    ~Helper() {
        open_.store(kOver, std::memory_order_release);
        thread_.join();
    }

    void multiply(const T* a, const Packed<T>& b, T* c, Start start, const T* bias) {
        job_ = {a, &b, c, start, bias, (b.N / Packed<T>::kWidth + 1) / 2 * Packed<T>::kWidth};
        open_.store(++number_, std::memory_order_release);
        job_.columns(0, job_.half);
        uint64_t expected = number_;
        if (open_.compare_exchange_strong(expected, kNothing))
            job_.columns(job_.half, b.N);
        else
            for (int turns = 0; done_.load(std::memory_order_acquire) != number_; ++turns) relax(turns);
    }

private:
    struct Job {
        const T* a;
        const Packed<T>* b;
        T* c;
        Start start;
        const T* bias;
        int half;
        void columns(int from, int to) const { multiply_columns<T>(from, to, 1, a, 0, *b, c, 0, start, bias); }
    };
    static constexpr uint64_t kNothing = 0, kOver = ~uint64_t(0);
    static constexpr int kPatience = 1000;  // turns, some microseconds, before the system may run somebody else

    Job job_{};  // written while no half is open or being computed
    uint64_t number_ = kNothing;
    alignas(64) std::atomic<uint64_t> open_{kNothing};  // the number of the product whose second half is to be had
    alignas(64) std::atomic<uint64_t> done_{kNothing};  // the last one that the helper completed
    std::thread thread_;

    void run() {
        const FlushDenormals flush;
        for (int turns = 0;; ++turns) {
            uint64_t number = open_.load(std::memory_order_acquire);
            if (number == kOver) return;
            if (number == kNothing || !open_.compare_exchange_strong(number, kNothing)) {
                relax(turns);
                continue;
            }
            job_.columns(job_.half, job_.b->N);
            done_.store(number, std::memory_order_release);
            turns = 0;
        }
    }

    static void relax(int turns) {
        if (turns >= kPatience) return std::this_thread::yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
};

// C (M, N) = A B as in gemm.h, with the helper's help if there is one and it is worth the while.
template <class T>
void multiply(Helper<T>* helper, int M, const T* a, ptrdiff_t lda, const Packed<T>& b, T* c, ptrdiff_t ldc, Start start,
              const T* bias = nullptr) {
    if (helper && M == 1 && size_t(b.K) * b.N * sizeof(T) >= Helper<T>::kWorth)
        helper->multiply(a, b, c, start, bias);
    else
        multiply<T>(M, a, lda, b, c, ldc, start, bias);
}

}  // namespace skiprnn
