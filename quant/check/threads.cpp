// Several callers at once, each with more threads than cores: for ThreadSanitizer, and all must get the bits of one.
// Cores of two speeds, which threads that sleep for their items stand in for.
#include <algorithm>
#include <chrono>
#include <thread>

#include "../csrc/thread_pool.h"
#include "check.h"

namespace check {

namespace {

constexpr int64_t kRows = 9, kOut = 400, kIn = 128;

struct Job {
  Job() : w(kOut, kIn, 4, 32), copy(kOut, kIn, 4, 32), x(kRows * kIn), dense(kOut * kIn) {
    Random random(4);
    w.randomize(random);
    random.fill(x);
    random.fill(dense);
  }
  void run(const Weight& to, const Exact<float>& y, int isa, int threads) const {
    const glm4_weight weight = w.c(), target = to.c();
    const glm4_matrix from{x.data(), kRows, kIn, GLM4_FLOAT32}, out{y.data(), kRows, kOut, GLM4_FLOAT32};
    const glm4_matrix source{dense.data(), kOut, kIn, GLM4_FLOAT32};
    int64_t place[2];
    for (int turn = 0; turn < 20; ++turn) {
      glm4_matmul(&weight, &from, nullptr, &out, 1 + turn % 2, isa, threads);
      if (turn % 5 == 0) glm4_quantize(&source, &target, nullptr, 5, isa, threads, place);
    }
    const int64_t words = dense.size() / 2;  // beyond 512 bytes a block
    if (glm4_read(dense.data(), words * 8, threads) != glm4_read(dense.data(), words * 8, 1)) fail("another sum");
  }

  Weight w, copy;
  Exact<float> x, dense;
};

constexpr int kItems = 64, kThreads = 4, kSlower = 4;

// Seconds for kItems items, of which one thread does one in 1 ms and each of the others in kSlower.
double seconds_of_items(int threads, int64_t items, bool slow) {
  using Clock = std::chrono::steady_clock;
  const std::thread::id first = std::this_thread::get_id();
  auto item = [&](int64_t, int) {
    const bool fast = !slow && std::this_thread::get_id() == first;
    std::this_thread::sleep_for(std::chrono::milliseconds(fast ? 1 : kSlower));
  };
  const Clock::time_point start = Clock::now();
  glm4::parallel_for(threads, items, item);
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

// Fairly shared, 64 items take 64 / (1 + 3 / 4) = 37 ms; a slow thread with a quarter of them takes 64 ms.
void check_uneven_threads(int) {
  describe("one fast core and three that take four times as long");
  double shared = 1e9, quarter = 1e9;
  for (int turn = 0; turn < 5; ++turn) {
    shared = std::min(shared, seconds_of_items(kThreads, kItems, false));
    quarter = std::min(quarter, seconds_of_items(1, kItems / kThreads, true));
  }
  if (shared > 0.85 * quarter) fail("%.0f ms: the fast core waits for the slow ones, %.0f ms", shared * 1e3, quarter * 1e3);
}

void check_threads(int isa) {
  describe("four callers at once");
  const Job job;
  const Exact<float> want(kRows * kOut);
  job.run(job.copy, want, isa, 1);
  struct Caller {
    Weight weight{kOut, kIn, 4, 32};
    Exact<float> y{kRows * kOut};
    std::thread thread;
  };
  Caller callers[4];
  for (Caller& c : callers) c.thread = std::thread([&] { job.run(c.weight, c.y, isa, 5); });
  for (Caller& c : callers) c.thread.join();
  for (Caller& c : callers)
    if (!c.y.same(want) || !c.weight.codes.same(job.copy.codes)) fail("another result than one thread's");
}

}  // namespace check
