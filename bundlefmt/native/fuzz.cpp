// libFuzzer's way into the core: what the checks let through is computed and read within its
// memory, and brings what it should.
#include <fuzzer/FuzzedDataProvider.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "compute.hpp"
#include "reading/engine.hpp"

using namespace bundlefmt;

namespace {

using Data = FuzzedDataProvider;
using Integers = std::vector<int64_t>;
using Bytes = std::vector<uint8_t>;

constexpr int64_t FILE_BYTES = 50'001;
constexpr int64_t MEMORY_BYTES = 1 << 13;
constexpr int64_t MOST = 1 << 16;  // numbers of a result: more is memory that the caller asks for
constexpr int64_t ALIGNMENTS[] = {1, 512, 4096};
constexpr uint8_t UNTOUCHED = 0xEE;

void require(bool holds) {
  if (!holds) __builtin_trap();
}

int64_t below(Data& data, int64_t end) { return data.ConsumeIntegralInRange<int64_t>(0, end - 1); }

bool seldom(Data& data) { return below(data, 32) == 31; }

// Up to `most` as a rule; now and then any number.
int64_t number(Data& data, int64_t most) {
  return seldom(data) ? data.ConsumeIntegral<int64_t>() : below(data, most + 1);
}

void tamper(Data& data, Integers& list) {
  if (!seldom(data)) return;
  if (list.empty() || data.ConsumeBool())
    list.push_back(data.ConsumeIntegral<int64_t>());
  else
    list[static_cast<size_t>(below(data, static_cast<int64_t>(list.size())))] =
        data.ConsumeIntegral<int64_t>();
}

Bytes some_bytes(Data& data, int64_t count) {
  const Bytes seed = data.ConsumeBytes<uint8_t>(64);
  Bytes bytes(static_cast<size_t>(count));
  for (size_t i = 0; i < bytes.size() && !seed.empty(); ++i) bytes[i] = seed[i % seed.size()];
  return bytes;
}

// Vectors in memory of just their size; none where that is more than a caller can have.
struct Numbers {
  Numbers(Data& data, int64_t tokens, int64_t width) {
    int64_t count;
    if (width < 0 || __builtin_mul_overflow(tokens, width, &count) || count > MOST) return;
    const Bytes bytes = some_bytes(data, 4 * count);
    memory.resize(static_cast<size_t>(count));
    if (count) std::memcpy(memory.data(), bytes.data(), bytes.size());
    vectors = {memory.data(), width, tokens};
  }

  std::vector<float> memory;
  std::optional<Vectors> vectors;
};

// Rows in memory of just their size, in any order in it, apart or not.
struct Stored {
  Stored(Data& data, int64_t stored, int64_t n, const Integers& slots)
      : encoding(static_cast<Encoding>(below(data, 5))) {
    int64_t bytes = n >= 0 && n < 400 && !seldom(data) ? n * block_bytes(encoding) / BLOCK
                                                       : below(data, 600);
    if (!stored && seldom(data)) bytes = data.ConsumeIntegralInRange<int64_t>(0, INT64_MAX);
    const int64_t stride = stored ? below(data, bytes + 9) * (data.ConsumeBool() ? 1 : -1) : 0;
    memory = some_bytes(data, stored ? (stored - 1) * std::abs(stride) + bytes : 0);
    const uint8_t* base = memory.data() + (stride < 0 ? (stored - 1) * -stride : 0);
    if (data.ConsumeBool()) biases.resize(static_cast<size_t>(stored));
    part = {{encoding, base, stride, slots.data(), n}, biases.empty() ? nullptr : biases.data(),
            stored, bytes};
  }

  Encoding encoding;
  Bytes memory;
  std::vector<float> biases;
  Part part;
};

int any_threads(Data& data) {
  return seldom(data) ? data.ConsumeIntegral<int>() : static_cast<int>(below(data, 4));
}

void compute(Data& data) {
  const int64_t stored = below(data, 41), n = number(data, 300);
  const int64_t tokens = seldom(data) ? data.ConsumeIntegralInRange<int64_t>(0, INT64_MAX)
                                      : below(data, 10);
  Integers slots(static_cast<size_t>(below(data, 41)));
  for (int64_t& slot : slots) slot = stored ? below(data, stored) : 0;
  tamper(data, slots);
  const auto count = static_cast<int64_t>(slots.size());
  if (slots_fault(slots.data(), count, stored)) return;
  const int threads = any_threads(data), kind = static_cast<int>(below(data, 3));
  const Stored down(data, stored, n, slots);
  const int64_t width = seldom(data) ? number(data, 300) : kind == 1 ? count : n;
  const Numbers x(data, tokens, width);
  if (!x.vectors) return;
  if (kind == 0) {
    if (products_fault(down.part, count, *x.vectors, threads)) return;
    if (tokens > MOST) return;
    Numbers out(data, tokens, count);
    if (out.vectors) products(down.part.rows, count, *x.vectors, *out.vectors, threads);
  } else if (kind == 1) {
    if (weighted_sum_fault(down.part, count, *x.vectors, threads) || tokens > MOST) return;
    Numbers y(data, tokens, n);
    if (y.vectors) weighted_sum(down.part.rows, count, *x.vectors, *y.vectors, threads);
  } else {
    const auto another = [&] { return seldom(data) ? below(data, 41) : stored; };
    const Stored selector(data, another(), n, slots), up(data, another(), n, slots);
    const Numbers active(data, seldom(data) ? below(data, 10) : tokens,
                         seldom(data) ? below(data, 41) : count);
    Ffn layer{{}, {}, down.part, static_cast<Activation>(below(data, 6)), 0.5F, {}};
    const bool known = data.ConsumeBool();
    if (known != seldom(data)) layer.active = active.vectors;
    if (!known) layer.selector = selector.part;
    if (data.ConsumeBool()) layer.up = up.part;
    if (ffn_fault(layer, count, *x.vectors, threads) || tokens > MOST) return;
    Numbers y(data, tokens, n);
    if (y.vectors) ffn(layer, count, *x.vectors, *y.vectors, threads);
  }
}

void digest(Data& data) {
  const int64_t length = below(data, 2000), count = below(data, 20), stride = below(data, 2100);
  const Bytes rows = some_bytes(data, count ? (count - 1) * stride + length : 0);
  std::vector<uint64_t> found(static_cast<size_t>(count));
  const int threads = any_threads(data);
  if (threads_fault(threads)) return;
  digests(rows.data(), stride, length, count, found.data(), threads);
  for (int64_t k = 0; k < count; ++k)
    require(found[static_cast<size_t>(k)] ==
            portable_kernels.xxh3_64(rows.data() + k * stride, static_cast<uint64_t>(length)));
}

void turn_over(Data& data) {
  const int item = seldom(data) ? data.ConsumeIntegral<int>() : 1 << below(data, 3);
  const int64_t height = number(data, 150), width = number(data, 150);
  const auto times_item = [&](int64_t items) {
    int64_t bytes;
    return seldom(data) || __builtin_mul_overflow(items, item, &bytes) ? number(data, 600) : bytes;
  };
  const int64_t in_bytes = times_item(width), out_bytes = times_item(height);
  const int64_t gap = below(data, 9);
  const int threads = any_threads(data);
  if (height < 0 || width < 0 || in_bytes < 0 || out_bytes < 0) return;  // no such arrays
  if (transpose_fault(height, in_bytes, width, out_bytes, item, threads)) return;
  if (height && width && (height > 200 || width > 200)) return;
  const bool empty = !height || !width;
  const int64_t in_stride = in_bytes + (empty ? 0 : gap);  // where empty, in_bytes may be any number
  const Bytes in = some_bytes(data, empty ? 0 : (height - 1) * in_stride + in_bytes);
  Bytes out(empty ? 0 : static_cast<size_t>(width * out_bytes));
  transpose(in.data(), in_stride, height, width, out.data(), out_bytes, item, threads);
  for (int64_t i = 0; !empty && i < width; ++i)
    for (int64_t j = 0; j < height; ++j)
      require(!std::memcmp(out.data() + i * out_bytes + j * item,
                           in.data() + j * in_stride + i * item,
                           static_cast<size_t>(item)));
}

uint8_t content(int64_t offset) {
  return static_cast<uint8_t>(offset % 251 + (offset >> 8) % 7);
}

int file() {
  static const int fd = [] {
    Bytes bytes(FILE_BYTES);
    for (int64_t i = 0; i < FILE_BYTES; ++i) bytes[static_cast<size_t>(i)] = content(i);
    const int made = memfd_create("fuzz", 0);
    require(write(made, bytes.data(), bytes.size()) == FILE_BYTES);
    return made;
  }();
  return fd;
}

Bytes& registered() {
  static auto& memory = *new Bytes(MEMORY_BYTES);
  return memory;
}

// Each is made once; null where there is no io_uring.
Engine* engine(Data& data) {
  static std::optional<std::unique_ptr<Engine>> engines[2][3][2];
  const bool ring = data.ConsumeBool(), many = data.ConsumeBool();
  const int64_t choice = below(data, 3);
  auto& made = engines[ring][choice][many];
  if (!made) {
    const int64_t alignment = ALIGNMENTS[choice];
    const Source source{file(), alignment, alignment};
    const int count = many ? 4 : 1;
    try {
      made = ring ? uring_engine(source, count, registered()) : thread_engine(source, count);
    } catch (const std::runtime_error& error) {
      std::fprintf(stderr, "%s\n", error.what());
      made = nullptr;
    }
  }
  return made->get();
}

// What the memory should hold, and by how many views each byte is filled.
struct Expected {
  explicit Expected(const Reads& reads)
      : bytes(static_cast<size_t>(reads.memory_bytes), UNTOUCHED), fills(bytes.size()) {
    for (size_t k = 0; k < reads.offsets.size(); ++k) {
      int64_t offset = reads.offsets[k];
      for (auto view = reads.bounds[k]; view < reads.bounds[k + 1]; ++view)
        for (int64_t i = 0; i < reads.lengths[view]; ++i, ++offset) {
          if (reads.starts[view] == SPARE) continue;
          const auto at = static_cast<size_t>(reads.starts[view] + i);
          bytes[at] = content(offset);
          ++fills[at];
        }
      in_file = in_file && (offset <= FILE_BYTES || offset == reads.offsets[k]);
    }
  }

  Bytes bytes;
  std::vector<int> fills;
  bool in_file = true;
};

void read(Data& data) {
  Engine* const reader = engine(data);
  if (!reader) return;
  Reads reads;
  reads.memory_bytes = below(data, MEMORY_BYTES + 1);
  const bool own = data.ConsumeBool();
  Bytes memory(own ? static_cast<size_t>(reads.memory_bytes) : 0);
  reads.memory = own ? memory.data() : registered().data();
  std::fill_n(reads.memory, reads.memory_bytes, UNTOUCHED);
  Bytes spare(static_cast<size_t>(seldom(data) ? below(data, 500) : MEMORY_BYTES));
  reads.spare = spare.data();
  reads.spare_bytes = static_cast<int64_t>(spare.size());
  const int64_t unit = ALIGNMENTS[below(data, 3)];
  const auto requests = below(data, 9);
  reads.bounds.push_back(0);
  for (int64_t k = 0; k < requests; ++k) {
    const int64_t offset = number(data, FILE_BYTES + 500);
    reads.offsets.push_back(seldom(data) ? offset : offset - offset % unit);
    const int64_t views = seldom(data) ? below(data, 1500) : below(data, 5);
    for (int64_t view = 0; view < views; ++view) {
      const int64_t room = reads.memory_bytes;
      const int64_t start = below(data, room / unit + 1) * unit;
      reads.starts.push_back(seldom(data) ? SPARE : start);
      reads.lengths.push_back(views > 8 ? std::min<int64_t>(room - start, 3)
                                        : below(data, (room - start) / unit + 1) * unit);
    }
    reads.bounds.push_back(static_cast<int64_t>(reads.starts.size()));
  }
  for (Integers* list : {&reads.offsets, &reads.bounds, &reads.starts, &reads.lengths})
    tamper(data, *list);
  if (reads.fault()) return;

  const Expected expected(reads);
  if (data.ConsumeBool()) {
    reads.stride = number(data, 300);
    reads.bundle_bounds.push_back(0);
    for (int64_t k = 0; k < reads.count(); ++k) {
      for (auto left = below(data, 3); left > 0; --left) {
        const int64_t start = number(data, reads.memory_bytes);
        const bool inside = start >= 0 && start <= reads.memory_bytes && reads.stride >= 0 &&
                            reads.stride <= reads.memory_bytes - start;
        reads.bundle_starts.push_back(start);
        reads.expected.push_back(
            inside && !seldom(data)
                ? portable_kernels.xxh3_64(expected.bytes.data() + start,
                                           static_cast<uint64_t>(reads.stride))
                : data.ConsumeIntegral<uint64_t>());
      }
      reads.bundle_bounds.push_back(static_cast<int64_t>(reads.bundle_starts.size()));
    }
    for (Integers* list : {&reads.bundle_bounds, &reads.bundle_starts}) tamper(data, *list);
    if (reads.fault()) return;
  }

  const auto batch = std::make_shared<Batch>(std::move(reads));
  reader->submit(batch);
  const auto failure = batch->wait();
  const Reads& asked = batch->reads;
  for (int64_t i = 0; i < asked.memory_bytes; ++i) {
    const auto at = static_cast<size_t>(i);
    if (!expected.fills[at]) require(asked.memory[i] == UNTOUCHED);
    if (!failure && expected.fills[at] == 1) require(asked.memory[i] == expected.bytes[at]);
  }
  if (!failure) return require(expected.in_file);
  require(failure->request >= 0 && failure->request < asked.count());
  if (failure->kind == Kind::damaged)
    require(failure->found != asked.expected[static_cast<size_t>(failure->bundle)]);
  else
    require(!expected.in_file);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  Data data(bytes, size);
  constexpr void (*TARGETS[])(Data&) = {read, compute, digest, turn_over};
  TARGETS[below(data, 4)](data);
  return 0;
}

// An instruction set that this CPU does not have is not a finding.
extern "C" int LLVMFuzzerInitialize(int*, char***) {
  try {
    kernels();
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "not on this CPU, which has %s\n", error.what());
    std::exit(0);
  }
  return 0;
}
