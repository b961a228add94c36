// The compute pool: threads that outlive the call.
#pragma once

#include <functional>

namespace bundlefmt {

// Calls part(i) for every i below `parts`, on the calling thread and on the pool's; returns when
// all are done, or throws what one of them threw. The pool grows to what is asked for. Where it is
// in use by another call, or was started by this process's parent, the calling thread does all
// parts itself.
void run_parts(int parts, const std::function<void(int)>& part);

}  // namespace bundlefmt
