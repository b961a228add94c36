// What each file of bindings adds to the extension module.
#pragma once

#include <nanobind/nanobind.h>

namespace bundlefmt {

void bind_kernels(nanobind::module_& module);
void bind_reading(nanobind::module_& module);

}  // namespace bundlefmt
