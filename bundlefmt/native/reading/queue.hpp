// Batches waiting for whoever serves them.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>

#include "batch.hpp"

namespace bundlefmt {

struct Turn {
  std::shared_ptr<Batch> batch;
  int64_t request;
};

class Queue {
 public:
  void push(std::shared_ptr<Batch> batch) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (closed_) throw std::runtime_error("the reader is closed");
      batches_.push_back(std::move(batch));
    }
    waiting_.notify_all();
  }

  // The next request; none when there is nothing to do. With `wait`, only once it is closed.
  std::optional<Turn> pop(bool wait) {
    std::unique_lock<std::mutex> guard(mutex_);
    for (;;) {
      while (!batches_.empty()) {
        if (const auto request = batches_.front()->take()) return Turn{batches_.front(), *request};
        batches_.pop_front();
      }
      if (closed_ || !wait) return std::nullopt;
      waiting_.wait(guard);
    }
  }

  void close() {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      closed_ = true;
    }
    waiting_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable waiting_;
  std::deque<std::shared_ptr<Batch>> batches_;
  bool closed_ = false;
};

}  // namespace bundlefmt
