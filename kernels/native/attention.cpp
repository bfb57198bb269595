// Attention of grid tokens on a CPU, with a plain C interface. See tile.h, lines.h, few.h, sampled.h, scan.h and gradient.h for
// the arithmetic.
#include "bias.h"
#include "few.h"
#include "gradient.h"
#include "lines.h"
#include "sampled.h"
#include "scan.h"

template <int NV, class Source, class Plan>
static int forward(const Call& call, const Plan& plan) {
    constexpr int WIDTH = LANES * NV;
    const Sizes& sizes = call.sizes;
    const int64_t tiles = Source::tiles(call, plan), heads = (int64_t)call.kv_heads * call.batch;

    return share(call.threads, tiles * heads, Source::run(call, plan) * call.kv_heads, [&](auto next) {
        Scratch scratch;
        Tile<NV> tile;
        tile.columns = scratch.floats(WIDTH * sizes.key);
        tile.scores = scratch.floats(WIDTH * (CHUNK + EIGHT));
        tile.out = scratch.floats(WIDTH * sizes.value_step);
        Source source(call, plan);
        TileBias<NV> bias(call, source);
        List extra;
        int64_t extra_of = -1;

        for (int64_t job = next(); job >= 0; job = next()) {
            const int64_t batch = job / (tiles * call.kv_heads), head = batch * call.kv_heads + job % call.kv_heads;
            source.open(batch, head % call.kv_heads, job / call.kv_heads % tiles);
            if (extra_of != batch) list_extra(call, extra_of = batch, extra);
            gather_columns<NV>(tile.columns, source.lanes.q, sizes.key, call.scale * LOG2E);
            const float* key = call.key + head * call.rows() * sizes.key_step;
            const float* value = call.value + head * call.rows() * sizes.value_step;
            for (const int64_t row : source.lanes.row)
                if (row >= 0) fetch_to_write(call.out + row * sizes.value, sizes.value);
            Keys keys = source.list().view();
            bias.give(keys, source, head % call.kv_heads);
            auto attend = [&](bool careful) {
                tile.careful = careful;
                tile.start(sizes);
                tile.absorb(keys, key + source.first * sizes.key_step,
                            value + source.first * sizes.value_step, sizes);
                tile.absorb(extra.view(), key, value, sizes);
                vec odd{};
                for (int i = 0; i < WIDTH; i++)
                    if (const int64_t row = source.lanes.row[i]; row >= 0) {
                        odd += tile.finish(i, call.out + row * sizes.value, sizes);
                        if (call.lse) call.lse[row] = tile.log_sum(i);
                    }
                float rest = 0;
                for (int i = 0; i < LANES; i++) rest += odd[i];
                return rest == 0;
            };
            if (!attend(false)) attend(true);
        }
    });
}

// Everything about the queries of a tile that its backward needs.
template <int NV>
static void prepare(Gradient<NV>& tile, const Call& call, const Lanes<NV>& lanes) {
    const Sizes& sizes = call.sizes;
    const float* d_out[LANES * NV];
    for (int i = 0; i < LANES * NV; i++) {
        const int64_t row = lanes.row[i];
        float shift = 0, delta = 0;
        d_out[i] = row < 0 ? nullptr : call.d_out + row * sizes.value;
        if (row >= 0) {
            shift = call.lse[row] == NOTHING ? 0 : call.lse[row] * LOG2E;  // a query that sees nothing has no weights
            for (int c = 0; c < sizes.value; c++) delta += d_out[i][c] * call.out[row * sizes.value + c];
            if (call.d_lse) delta -= call.d_lse[row];
        }
        tile.shift[i / LANES][i % LANES] = shift, tile.delta[i / LANES][i % LANES] = delta;
    }
    gather_columns<NV>(tile.columns, lanes.q, sizes.key, call.scale * LOG2E);
    gather_columns<NV>(tile.d_columns, d_out, sizes.value, 1);
    gather_rows<NV>(tile.rows, lanes.q, sizes.key, sizes.key_step, call.scale);
    gather_rows<NV>(tile.d_rows, d_out, sizes.value, sizes.value_step, 1);
    std::memset(tile.d_query, 0, sizeof(float) * LANES * NV * sizes.key_step);
}

// Gradients of the keys and values that a band of tiles sees, and of the extra tokens behind them.
struct Band {
    float *key = nullptr, *value = nullptr;
    int64_t low = 0, high = 0;  // first token, and one past the last
};

// Tiles of one KV head write to the keys they share, so one thread takes a whole band of them; bands are added up in order,
// which makes the result the same in every run.
template <int NV, class Source, class Plan>
static int backward(const Call& call, const Plan& plan) {
    constexpr int WIDTH = LANES * NV;
    const Sizes& sizes = call.sizes;
    const int64_t tiles = Source::tiles(call, plan), heads = (int64_t)call.kv_heads * call.batch;
    const int64_t wanted = call.threads == 1 ? 1 : (4 * call.threads + heads - 1) / heads;
    const int64_t bands = std::max<int64_t>(1, std::min<int64_t>({wanted, 16, tiles}));
    const int64_t entries = call.bias ? call.group * call.entries : 0;  // of a KV head
    std::vector<Band> band(bands > 1 ? bands * heads : 0);
    float* biases = entries ? (float*)std::calloc(bands * heads * entries, sizeof(float)) : nullptr;  // gradients, per band
    if (entries && !biases) return 1;

    int failed = share(call.threads, bands * heads, 1, [&](auto next) {
        Scratch scratch;
        Gradient<NV> tile;
        tile.columns = scratch.floats(WIDTH * sizes.key);
        tile.scores = scratch.floats(WIDTH * (CHUNK + EIGHT));
        tile.slopes = scratch.floats(WIDTH * (CHUNK + EIGHT));
        tile.d_columns = scratch.floats(WIDTH * sizes.value);
        tile.rows = scratch.floats(WIDTH * sizes.key_step);
        tile.d_rows = scratch.floats(WIDTH * sizes.value_step);
        tile.d_query = scratch.floats(WIDTH * sizes.key_step);
        Source source(call, plan);
        TileBias<NV> bias(call, source);
        List extra;

        for (int64_t job = next(); job >= 0; job = next()) {
            const int64_t head = job / bands, batch = head / call.kv_heads, part = job % bands;
            const int64_t from = tiles * part / bands, to = tiles * (part + 1) / bands;
            const float* key = call.key + head * call.rows() * sizes.key_step;
            const float* value = call.value + head * call.rows() * sizes.value_step;
            Band all{call.d_key + head * call.rows() * sizes.key_step,
                     call.d_value + head * call.rows() * sizes.value_step, 0, call.tokens()};
            Band& into = bands > 1 ? band[job] : all;
            if (bands > 1) {
                into.low = call.tokens();
                for (int64_t t = from; t < to; t++) {
                    int64_t low, high;
                    source.reach(t, low, high);
                    into.low = std::min(into.low, low), into.high = std::max(into.high, high + 1);
                }
                const size_t rows = into.high - into.low + call.extra;
                into.key = (float*)std::calloc(rows * sizes.key_step, sizeof(float));
                into.value = (float*)std::calloc(rows * sizes.value_step, sizeof(float));
                if (!into.key || !into.value) throw std::bad_alloc();
            }
            float* d_bias = biases + job * entries;
            list_extra(call, batch, extra);
            for (int64_t t = from; t < to; t++) {
                source.open(batch, head % call.kv_heads, t);
                prepare(tile, call, source.lanes);
                const int64_t first = source.first, at = first - into.low, behind = into.high - into.low - call.tokens();
                Keys keys = source.list().view();
                bias.give(keys, source, head % call.kv_heads);
                tile.pull(keys, key + first * sizes.key_step, value + first * sizes.value_step,
                          into.key + at * sizes.key_step, into.value + at * sizes.value_step, sizes);
                tile.pull(extra.view(), key, value, into.key + behind * sizes.key_step,
                          into.value + behind * sizes.value_step, sizes);
                for (int i = 0; i < WIDTH; i++)
                    if (const int64_t row = source.lanes.row[i]; row >= 0)
                        for (int d = 0; d < sizes.key; d++)
                            call.d_q[row * sizes.key + d] = tile.d_query[i * sizes.key_step + d] * call.scale;
                bias.collect(d_bias, t + 1 == to);
            }
        }
    });
    if (bands > 1 && !failed)
        failed = share(call.threads, heads, 1, [&](auto next) {
            for (int64_t head = next(); head >= 0; head = next())
                for (int64_t b = head * bands; b < (head + 1) * bands; b++) {
                    auto add = [&](float* all, const float* part, int64_t step) {
                        const int64_t inside = band[b].high - band[b].low;
                        for (int64_t i = 0; i < inside * step; i++) all[band[b].low * step + i] += part[i];
                        for (int64_t i = 0; i < call.extra * step; i++)
                            all[call.tokens() * step + i] += part[inside * step + i];
                    };
                    add(call.d_key + head * call.rows() * sizes.key_step, band[b].key, sizes.key_step);
                    add(call.d_value + head * call.rows() * sizes.value_step, band[b].value, sizes.value_step);
                }
        });
    for (int64_t job = 0; job < bands * heads; job++)
        for (int64_t i = 0; i < entries; i++)
            call.d_bias[job / bands % call.kv_heads * entries + i] += biases[job * entries + i];
    std::free(biases);
    for (Band& b : band) std::free(b.key), std::free(b.value);
    return failed;
}

extern "C" {

int vision_attn_lanes() { return LANES; }

void vision_attn_use_team(Team threads) { team = threads; }

int vision_attn_forward_boxes(const Call* call, const Boxes* boxes) {
    return boxes->vectors == 2 ? forward<2, BoxSource<2>>(*call, *boxes) : forward<1, BoxSource<1>>(*call, *boxes);
}

int vision_attn_forward_lines(const Call* call, const Lines* lines) { return forward_lines(*call, *lines); }

int vision_attn_forward_few(const Call* call, const FewBlocks* blocks) { return forward_few(*call, *blocks); }

int vision_attn_forward_sampled(const Sampled* call) { return forward_sampled(*call); }

int vision_attn_backward_boxes(const Call* call, const Boxes* boxes) {
    return boxes->vectors == 2 ? backward<2, BoxSource<2>>(*call, *boxes) : backward<1, BoxSource<1>>(*call, *boxes);
}

int vision_attn_forward_blocks(const Call* call, const Blocks* blocks) {
    return blocks->vectors == 2 ? forward<2, BlockSource<2>>(*call, *blocks)
                                : forward<1, BlockSource<1>>(*call, *blocks);
}

int vision_attn_backward_blocks(const Call* call, const Blocks* blocks) {
    return blocks->vectors == 2 ? backward<2, BlockSource<2>>(*call, *blocks)
                                : backward<1, BlockSource<1>>(*call, *blocks);
}

int vision_attn_scan(const Scan* call) { return scan(*call); }
}
