// Several callers at once, each with more threads than cores: for ThreadSanitizer, and all must get the bits of one.
#include <thread>

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

}  // namespace

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
