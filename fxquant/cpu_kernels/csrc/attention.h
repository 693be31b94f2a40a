// Attention in one pass over the keys: scores of a block of keys, their exponentials against the largest score so far, and the
// sum of values, which is scaled down when a larger one turns up (FlashAttention, Dao et al. 2022; the running maximum and sum:
// Milakov and Gimelshein 2018). float32 inside, whatever the operands are; where the CPU multiplies pairs of bfloat16, the weights
// of such values are rounded to it.
// Included into each isa_*.cpp inside an anonymous namespace, after vectors.h and turn.h.

#include "attention_scores.h"
#include "attention_tiles.h"

// The queries query0 <= q < query1 of all heads that share a key head: rows [query, head of the group] of one task. Their results
// depend on nothing else. Pairs: bfloat16 operands, multiplied two by two.
template <class Isa, bool Pairs>
class AttentionTask {
public:
    AttentionTask(const AttentionProblem& problem, int64_t batch, int64_t key_head, int64_t query0, int64_t query1, void* room)
        : p(problem), batch_(batch), head0_(key_head * (p.heads / p.key_heads)), group_(p.heads / p.key_heads), query0_(query0),
          query1_(query1), rows_((query1 - query0) * group_), width_(round_up(Pairs ? (p.width + 1) / 2 : p.width, kPad)),
          value_width_(round_up(p.value_width, kPad)) {
        auto* at = static_cast<float*>(room);
        const auto take = [&](int64_t floats) { return std::exchange(at, at + round_up(floats, kPad)); };
        queries_ = take(rows_ * width_);
        sums_ = take(rows_ * value_width_);
        keys_ = take(width_ * kKeyBlock);
        wide_ = take((width_ > value_width_ ? width_ : value_width_) * kKeyBlock);
        scores_ = take(kTall * kKeyBlock);
        tops_ = take(rows_);
        totals_ = take(rows_ * kTotals);
        kept_ = reinterpret_cast<Kept*>(take(rows_ * 2));
        key_data_ = operand(p.key, key_head);
        value_data_ = operand(p.value, key_head);
        for (int64_t r = 0; r < rows_; ++r) tops_[r] = -__builtin_inff();
        std::memset(totals_, 0, static_cast<size_t>(rows_ * kTotals) * sizeof(float));
        std::memset(sums_, 0, static_cast<size_t>(rows_ * value_width_) * sizeof(float));
    }

    void run() {
        each_row([&](int64_t row, int64_t query, int64_t head) { take_query(row, query, head); });
        const int64_t end = p.causal && query1_ < p.keys ? query1_ : p.keys;
        for (int64_t k = 0; k < end; k += kKeyBlock) block(k, end - k < kKeyBlock ? end - k : kKeyBlock);
        each_row([&](int64_t row, int64_t query, int64_t head) { finish(row, query, head); });
    }

private:
    static constexpr int64_t kPad = 16;
    static constexpr int W = Isa::kWidth;
    static constexpr int64_t kTall = Isa::kAttendTall;
    static constexpr int64_t kTotals = Pairs ? W : 1;
    static constexpr int64_t kQueriesAhead = 6;

    template <class Body>
    void each_row(Body body) const {
        int64_t row = 0;
        for (int64_t query = query0_; query < query1_; ++query) {
            for (int64_t head = head0_; head < head0_ + group_; ++head) body(row++, query, head);
        }
    }
    const char* operand(const AttentionOperand& of, int64_t key_head) const {
        return static_cast<const char*>(of.data) + (batch_ * of.batch + key_head * of.head) * size_of(p.type);
    }
    const char* mask(int64_t query, int64_t head, int64_t k0) const {
        const int64_t at = batch_ * p.mask.batch + head * p.mask.head + query * p.mask.row + k0;
        return static_cast<const char*>(p.mask.data) + at * mask_size(p.mask_type);
    }

    void take_query(int64_t row, int64_t query, int64_t head) {
        const auto* from = static_cast<const char*>(p.query.data) +
                           (batch_ * p.query.batch + head * p.query.head + query * p.query.row) * size_of(p.type);
        float* to = queries_ + row * width_;
        if constexpr (Pairs) {
            if (p.width % 2 != 0) to[p.width / 2] = 0.0f;
            int64_t k = 0;
            for (; k + 2 * W <= p.width; k += 2 * W) {
                __builtin_prefetch(from + k * 2 + kQueriesAhead * p.query.row * 2);  // too little of each for the hardware to do it
                store(to + k / 2, load<typename Isa::F>(from + k * 2));
            }
            if (k < p.width) std::memcpy(to + k / 2, from + k * 2, static_cast<size_t>(p.width - k) * 2);
        } else {
            widen_rows<Isa>(p.type, from, 0, 1, p.width, p.scale, to, width_);
        }
    }

    Kept kept_of_row(int64_t query, int64_t head, int64_t k0, int64_t count) const {
        if (p.causal) {  // keys of the block up to the diagonal
            const int64_t left = query + 1 - k0;
            count = left < 0 ? 0 : left < count ? left : count;
        }
        if (p.mask_type == MaskType::none) return {static_cast<int32_t>(count), true};
        const char* at = mask(query, head, k0);
        __builtin_prefetch(at + kKeyBlock * mask_size(p.mask_type));  // for the next block: a line of each row, at least
        return kept_of<Isa>(p.mask_type, at, count);
    }

    // How many keys of a block any row sees.
    int64_t look_at_mask(int64_t k0, int64_t count) {
        int64_t end = 0;
        Kept kept = {};
        each_row([&](int64_t row, int64_t query, int64_t head) {
            if (head == head0_ || p.mask.head != 0) kept = kept_of_row(query, head, k0, count);
            kept_[row] = kept;
            end = kept.end > end ? kept.end : end;
        });
        return end;
    }

    static void fetch_rows(const char* rows, int64_t stride, int64_t count, int64_t bytes) {
        for (int64_t r = 0; r < count; ++r, rows += stride) {
            for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(rows + line);
        }
    }

    void block(int64_t k0, int64_t count) {
        const int64_t seen = look_at_mask(k0, count), whole = round_up(seen, kPad);
        if (seen == 0) return;
        if (whole < count) count = whole;
        const int64_t size = size_of(p.type);
        const char *keys = key_data_ + k0 * p.key.row * size, *values = value_data_ + k0 * p.value.row * size;
        fetch_rows(keys, p.key.row * size, count, p.width * size);
        fetch_rows(values, p.value.row * size, seen, p.value_width * size);
        const auto* value = reinterpret_cast<const float*>(values);
        int64_t stride = p.value.row;
        if constexpr (Pairs) {
            turn_paired_keys<Isa>(keys, p.key.row, count, p.width, wide_, keys_);
            pair_values<Isa>(values, stride, count, p.value_width, wide_, value_width_);
        } else {
            turn_keys<Isa>(p.type, keys, p.key.row, count, p.width, wide_, keys_);
            if (p.type != Float::f32 || p.value_width % W != 0) {
                widen_rows<Isa>(p.type, values, stride, count, p.value_width, 1.0f, wide_, value_width_);
            }
        }
        if (Pairs || p.type != Float::f32 || p.value_width % W != 0) {
            value = wide_;
            stride = value_width_;
        }
        for (int64_t r = 0; r < rows_; r += kTall) tile(r, rows_ - r < kTall ? rows_ - r : kTall, k0, value, stride);
    }

    void tile(int64_t row, int64_t rows, int64_t k0, const float* value, int64_t value_stride) {
        int64_t end = 0;
        bool plain = true;
        for (int64_t r = row; r < row + rows; ++r) {
            end = kept_[r].end > end ? kept_[r].end : end;
            plain = plain && kept_[r].plain;
        }
        if (end == 0) return;
        const int64_t vectors = (end + W - 1) / W;
        const int64_t depth = Pairs ? round_up(p.width, 2) : p.width;
        attend<Isa, Pairs>(
            rows, vectors, {queries_ + row * width_, width_, keys_, kKeyBlock, depth, scores_, kKeyBlock, nullptr, p.scale});
        if (!plain) apply_masks(row, rows, k0);
        alignas(64) float keep[kPad];
        soften_vectors<Isa, Pairs>(vectors, kept_ + row, rows, scores_, {tops_ + row, totals_ + row * kTotals}, keep);
        attend<Isa, Pairs>(
            rows, (p.value_width + W - 1) / W,
            {scores_, kKeyBlock, value, value_stride, end, sums_ + row * value_width_, value_width_, keep, 1.0f});
    }

    void apply_masks(int64_t row, int64_t rows, int64_t k0) {
        for (int64_t r = row; r < row + rows; ++r) {
            if (kept_[r].plain) continue;
            const char* at = mask(query0_ + r / group_, head0_ + r % group_, k0);
            apply_mask<Isa>(p.mask_type, at, kept_[r].end, scores_ + (r - row) * kKeyBlock);
        }
    }

    void finish(int64_t row, int64_t query, int64_t head) {
        float total = totals_[row * kTotals];
        if constexpr (Pairs) total = lanes_to_one<W>(load<typename Isa::F>(totals_ + row * kTotals), kSum);
        const float by = total == 0.0f ? 1.0f : total;  // nothing was left: 0
        const float* from = sums_ + row * value_width_;
        char* to = static_cast<char*>(p.out) + ((batch_ * p.queries + query) * p.heads + head) * p.value_width * size_of(p.type);
        const int64_t next = p.heads * p.value_width * size_of(p.type);
        for (int64_t line = 0; line < p.value_width * size_of(p.type); line += 64) __builtin_prefetch(to + kQueriesAhead * next + line, 1);
        if constexpr (Pairs) return store_paired<Isa>(from, p.value_width, 1.0f / by, to);
        const auto divided = [by](auto sum) { return sum / by; };
        switch (p.type) {
            case Float::f32: return store_row<Isa, Float::f32>(from, p.value_width, to, divided);
            case Float::bf16: return store_row<Isa, Float::bf16>(from, p.value_width, to, divided);
            case Float::f16: return store_row<Isa, Float::f16>(from, p.value_width, to, divided);
        }
    }

    const AttentionProblem& p;
    int64_t batch_, head0_, group_, query0_, query1_, rows_, width_, value_width_;
    float *queries_, *sums_, *keys_, *wide_, *scores_;
    float *tops_, *totals_;  // of each row: see Running
    Kept* kept_;
    const char *key_data_, *value_data_;
};

template <class Isa>
void attention(const AttentionProblem& problem, int64_t batch, int64_t key_head, int64_t query0, int64_t query1, void* room) {
    if constexpr (Isa::kAddsPairs) {
        if (problem.type == Float::bf16 && Isa::adds_pairs()) {
            return AttentionTask<Isa, true>(problem, batch, key_head, query0, query1, room).run();
        }
    }
    AttentionTask<Isa, false>(problem, batch, key_head, query0, query1, room).run();
}
