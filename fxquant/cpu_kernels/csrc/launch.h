// From problems to tasks on torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "kernels.h"

namespace fxquant {

// Nanoseconds of one thread below which the work is not shared out: a second thread may have to be woken, or wait for a core
// that another program holds, and all wait for the last. One that runs already, as within a step of a model, joins in 2 to 5 us.
constexpr double kSerialTime = 10e3;
constexpr double kReadSpeed = 16;  // bytes a nanosecond, of weights that lie in memory
constexpr int64_t kSerialElements = int64_t{1} << 16;  // passes over x below this are not shared out

// About how long one thread takes for a product: it reads the weight once, or is busy multiplying.
inline double product_time(int64_t rows, int64_t out_features, int64_t in_features, int64_t bits, double products) {
    const double weights = static_cast<double>(out_features) * static_cast<double>(in_features);
    const double multiplied = static_cast<double>(round_up(out_features, kPanel)) * static_cast<double>(in_features);
    return std::max(weights * static_cast<double>(bits) / 8 / kReadSpeed, static_cast<double>(rows) * multiplied / products);
}

// Staged activations of one pass are kept below this, so that scratch does not grow with the batch. 8 MiB of codes are 2048
// rows of 4096: by then reading the weights once more is nothing beside the products.
constexpr int64_t kStagedBytes = int64_t{8} << 20;

// body(begin, end) over contiguous pieces of [0, n), on the calling thread if the whole is small.
template <class Body>
void split(int64_t n, bool serial, Body body) {
    if (serial || n <= 1 || torch::stable::get_num_threads() == 1) {
        if (n > 0) body(int64_t{0}, n);
        return;
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(
        0, n, 1, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); }, &body));
}

// The calling thread's scratch: grows to what was asked for, kStagedBytes or one row block of a very wide x, and is used
// again.
class Scratch {
public:
    char* at_least(int64_t bytes) {
        if (bytes > size_) {
            void* fresh = nullptr;
            STD_TORCH_CHECK(posix_memalign(&fresh, 64, static_cast<size_t>(bytes)) == 0, "fxquant: no memory for ", bytes,
                            " bytes of staged activations");
            memory_.reset(static_cast<char*>(fresh));
            size_ = bytes;
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory_;
    int64_t size_ = 0;
};

inline char* scratch(int64_t bytes) {
    thread_local Scratch held;
    return held.at_least(bytes);
}

// How a product is cut into tasks. No result depends on it.
struct Blocking {
    int64_t rows = kRowBlock;  // of a task, at most
    bool by_rows = false;      // neighbouring tasks share rows, whose codes a thread finds in its L2; else a panel
    bool serial = false;       // on the calling thread alone

    // The same of rows that are so many rows of codes each. At `most` rows of codes; 16 rows, or a multiple, make whole tiles.
    Blocking of_digits(int64_t digits, int64_t most = kRowBlock) const {
        Blocking fewer = *this;
        if (digits > 1) fewer.rows = std::min(rows, most / digits / 16 * 16);
        return fewer;
    }
};

// The blocking that an op's last argument asks for: see fxquant/tuning/cpu.py. 0 in a field: as if it were not there.
// usual: where it asks for none.
inline Blocking blocking_of(int64_t config, Blocking usual = {}) {
    Blocking chosen = usual;
    if (const int64_t rows = config >> 4 & 7; rows > 0) chosen.rows = std::min(kRowBlock, int64_t{16} << rows);
    chosen.by_rows = usual.by_rows || (config >> 7 & 1) != 0;
    chosen.serial = config >> 8 & 1;
    return chosen;
}

// Every panel of N against every row, as tasks of one panel x some rows. task(panel, row0, row1, last) may run on any thread,
// in any order; last: the thread's next task is one of the next panel. time: of one thread, in nanoseconds.
template <class Work>
void for_panels(int64_t out_features, int64_t rows, double time, const Blocking& by, Work work) {
    const int64_t blocks = panels(out_features);
    if (blocks == 0 || rows == 0) return;
    int64_t row_block = std::min(rows, by.rows);
    const int64_t threads = torch::stable::get_num_threads();
    const bool serial = by.serial || time < kSerialTime;
    if (!serial && threads > 1 && blocks < 2 * threads) {  // too few blocks to share out: share rows as well, 24 or more at a time
        const int64_t wanted = (2 * threads + blocks - 1) / blocks;
        row_block = std::min(row_block, std::max<int64_t>(24, (rows + wanted - 1) / wanted));
    }
    const int64_t row_blocks = (rows + row_block - 1) / row_block;
    split(blocks * row_blocks, serial, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t block = by.by_rows ? task / blocks : task % row_blocks;
            const int64_t panel = by.by_rows ? task % blocks : task / row_blocks;
            const bool last = by.by_rows ? panel + 1 < blocks : block + 1 == row_blocks;
            work(panel, block * row_block, std::min(rows, (block + 1) * row_block), last && task + 1 < end);
        }
    });
}

// The same for a weight packed by int8_pack. products: a nanosecond.
template <class Product>
void for_tasks(const Weight& w, int64_t rows, double products, const Blocking& by, Product product) {
    const PanelLayout layout = int8_layout(w.out_features, w.in_features);
    const double time = product_time(rows, w.out_features, w.in_features, 8, products);
    for_panels(w.out_features, rows, time, by, [&](int64_t panel, int64_t row0, int64_t row1, bool last) {
        const int8_t* next = last && layout.is_full(panel + 1) ? w.packed + layout.offset(panel + 1) : nullptr;
        product(Task{panel, next, row0, row1});
    });
}

}  // namespace fxquant
