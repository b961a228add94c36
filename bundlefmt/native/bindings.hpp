// What each file of bindings adds to the extension module.
#pragma once

#include <nanobind/nanobind.h>
#include <unistd.h>

namespace bundlefmt {

void bind_kernels(nanobind::module_& module);
void bind_reading(nanobind::module_& module);

// The GIL is released while this lives. A daemon thread that would take it back while the
// interpreter ends stops here for ever, as from Python 3.14 on: Python before that unwinds such a
// thread's stack, at which C++ aborts.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* const state_;
};

}  // namespace bundlefmt
