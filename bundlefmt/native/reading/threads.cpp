#include <thread>

#include "engine.hpp"
#include "queue.hpp"

namespace bundlefmt {
namespace {

class Threads : public Engine {
 public:
  Threads(const Source& source, int threads) : source_(source) {
    try {
      for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {  // no more threads to be had: those that run must not outlive this
      close();
      throw;
    }
  }
  ~Threads() override { close(); }

  void submit(std::shared_ptr<Batch> batch) override { queue_.push(std::move(batch)); }

  void close() override {
    queue_.close();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  void work() {
    while (const auto turn = queue_.pop(true)) {
      const int64_t start = now();
      const auto failure = serve(source_, *turn->batch, turn->request);
      turn->batch->latencies[static_cast<size_t>(turn->request)] = now() - start;
      turn->batch->finish(failure);
    }
  }

  const Source source_;
  Queue queue_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Engine> thread_engine(const Source& source, int threads) {
  return std::make_unique<Threads>(source, threads);
}

}  // namespace bundlefmt
