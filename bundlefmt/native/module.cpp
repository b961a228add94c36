#include <nanobind/nanobind.h>

#include "bindings.hpp"

NB_MODULE(_core, module) {
  bundlefmt::bind_kernels(module);
  bundlefmt::bind_reading(module);
}
