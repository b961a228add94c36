// What serves batches: a pool of reading threads, or one thread with an io_uring.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "batch.hpp"

namespace bundlefmt {

// Of use only to the process that made it: a child has none of its threads.
class Engine {
 public:
  virtual ~Engine() = default;
  // Takes a batch on. Batches are served in turn. Throws std::runtime_error once it is closed.
  virtual void submit(std::shared_ptr<Batch> batch) = 0;
  // Waits for what was submitted. May be called twice.
  virtual void close() = 0;
};

// Throws std::system_error where that many threads are not to be had.
std::unique_ptr<Engine> thread_engine(const Source& source, int threads);
// Reads into `memory`, which must outlive the engine, cost the kernel less: it is told of it once.
// Throws std::runtime_error where there is no io_uring to be had: not built in, or refused.
std::unique_ptr<Engine> uring_engine(const Source& source, int depth, std::span<uint8_t> memory);

}  // namespace bundlefmt
