#include <nanobind/nanobind.h>

#include "bindings.hpp"

NB_MODULE(_core, module) {
  nanobind::set_leak_warnings(false);  // a daemon thread that exit stops keeps what it uses
  bundlefmt::bind_kernels(module);
  bundlefmt::bind_reading(module);
}
