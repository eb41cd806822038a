// A small thread pool. Every thread goes through a range of items of its own, in order, and then helps with the others':
// weights are read as one long stream per thread (2 to 10 % faster than items handed out in turn), and a thread that the
// machine holds up delays only its own item.
// Not OpenMP: a second runtime beside torch's own would fight with it for the cores.
#ifndef GLM4LITE_THREAD_POOL_H
#define GLM4LITE_THREAD_POOL_H

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace glm4 {

class ThreadPool {
 public:
  using Work = void (*)(void* context, int64_t item, int slot);

  // Calls work for every item in 0..items-1 on at most `threads` threads; slot in 0..threads-1 names the thread.
  // A second caller at the same time does its items alone.
  void run(int threads, int64_t items, Work work, void* context) {
    threads = static_cast<int>(std::min<int64_t>({threads, items, kMaxThreads}));
    std::unique_lock<std::mutex> owner(owner_, std::defer_lock);
    if (threads <= 1 || !owner.try_lock()) {
      for (int64_t i = 0; i < items; ++i) work(context, i, 0);
      return;
    }
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      for (int i = 0; i < threads; ++i) {
        ranges_[i].next.store(items * i / threads, std::memory_order_relaxed);
        ranges_[i].end = items * (i + 1) / threads;
      }
      slots_ = free_slots_ = threads - 1;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    drain(0);
    finish();
  }

  static ThreadPool& get() {
    static const bool registered = on_fork();
    (void)registered;
    ThreadPool* pool = current().load(std::memory_order_acquire);
    if (pool) return *pool;
    ThreadPool* fresh = new ThreadPool;  // never deleted: its threads sleep until the process ends
    if (current().compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;  // has no threads yet
    return *pool;
  }

 private:
  static constexpr int kMaxThreads = 256;
  static constexpr int kSpins = 1000;  // some 20 to 40 microseconds: the gap between two layers of one token

  static std::atomic<ThreadPool*>& current() {
    static std::atomic<ThreadPool*> pool{nullptr};
    return pool;
  }

  // A forked child has the pool's memory but none of its threads: it starts over.
  static bool on_fork() {
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { current().store(nullptr); });
#endif
    return true;
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");  // some 10 ns; `yield` takes no time at all there
#else
    std::this_thread::yield();
#endif
  }

  void grow(int wanted) {
#if !defined(_WIN32)
    sigset_t all, old;  // signals belong to the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
#endif
    try {
      for (; workers_ < wanted; ++workers_) {
        const uint64_t seen = epoch_.load();
        std::thread([this, seen] { serve(seen); }).detach();
      }
    } catch (const std::exception&) {
      // The system gives no more threads, or no memory for one: those there are do the work.
    }
#if !defined(_WIN32)
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
#endif
  }

  void drain(int slot) {
    const Work work = work_;
    void* const context = context_;
    const int ranges = slots_ + 1;
    for (int turn = 0; turn < ranges; ++turn) {
      Range& range = ranges_[(slot + turn) % ranges];
      for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) work(context, i, slot);
    }
  }

  void finish() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      free_slots_ = 0;  // whoever wakes up only now stays out
    }
    for (int i = 0; i < kSpins && active_.load(std::memory_order_acquire); ++i) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_.load(std::memory_order_relaxed) == 0; });
  }

  void serve(uint64_t seen) {
    for (;;) {
      for (int i = 0; i < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++i) pause();
      int slot;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
        seen = epoch_.load(std::memory_order_relaxed);
        if (free_slots_ == 0) continue;
        slot = slots_ - --free_slots_;
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      drain(slot);
      std::lock_guard<std::mutex> lock(mutex_);
      if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  struct alignas(64) Range {  // a cache line each
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  std::mutex owner_, mutex_;
  Range ranges_[kMaxThreads];
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> active_{0};
  Work work_ = nullptr;
  void* context_ = nullptr;
  int slots_ = 0, free_slots_ = 0, workers_ = 0;
};

// body(item, slot) for every item.
template <class Body>
void parallel_for(int threads, int64_t items, Body& body) {
  ThreadPool::get().run(
      threads, items, [](void* b, int64_t item, int slot) { (*static_cast<Body*>(b))(item, slot); }, &body);
}

}  // namespace glm4

#endif
