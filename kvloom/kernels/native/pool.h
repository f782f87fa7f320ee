// Threads that share the items of one call. They sleep between calls, so they never spin beside torch's own pool.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace kvloom {

class Pool {
  public:
    // f(i) for every i below count, on up to `threads` threads, the caller's included. One call at a time: a second caller
    // does its items alone.
    void run(int count, int threads, const std::function<void(int)> &f) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (threads < 2 || count < 2 || !turn.owns_lock()) {
            for (int i = 0; i < count; i++) f(i);
            return;
        }
        grow((threads < count ? threads : count) - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = &f, next_ = 0, count_ = count, wanted_ = (threads < count ? threads : count) - 1, call_++;
        }
        wake_.notify_all();
        share(f);
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // who has not started by now need not
        done_.wait(lock, [&] { return busy_ == 0; });
        work_ = nullptr;
    }

    static Pool &get() {  // never destroyed: its threads may still sleep when the process ends
        static Pool *pool = new Pool;
#if !defined(_WIN32)
        if (pool->process_ != getpid()) pool = new Pool;  // threads do not survive a fork
#endif
        return *pool;
    }

  private:
    void share(const std::function<void(int)> &f) {
        for (int i = next_++; i < count_; i = next_++) f(i);
    }

    void grow(int workers) {
        for (; started_ < workers; started_++) std::thread([this] { loop(); }).detach();
    }

    void loop() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return call_ != seen && wanted_ > 0; });
            seen = call_, wanted_--, busy_++;
            const auto *f = work_;
            lock.unlock();
            share(*f);
            lock.lock();
            if (--busy_ == 0) done_.notify_all();
        }
    }

#if !defined(_WIN32)
    const pid_t process_ = getpid();
#endif
    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    std::atomic<int> next_{0};
    int count_ = 0, wanted_ = 0, busy_ = 0, started_ = 0;
    uint64_t call_ = 0;
    const std::function<void(int)> *work_ = nullptr;
};

}  // namespace kvloom
